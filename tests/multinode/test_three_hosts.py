"""A submitted job on three hosts with addresses, names and processes of their own; corpus and run on an S3 store.

The hosts are network namespaces (`netns_cluster.sh`), so the test needs Linux, root and iproute2.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from cluster.shards import Labels
from tests.small import files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("netns_cluster.sh")
STORE = "10.77.0.10:5005"
VARIABLES = {
    "AWS_ENDPOINT_URL": f"http://{STORE}",
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}
QUICK = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
"""Seconds that an elastic run waits for a host before it goes on without."""
PACK = "toy --count 90 --size 96 --test-share 0.3 --shard-samples 16".split()
TRAIN = """
toy-cpu --workers 3 --resources.worker-cpus 0.6 --stage1.pairs 6 --stage2.batch 6
--network.input-size 64 --network.width 16 --network.depth 2 --network.groups 2 --network.descriptor-size 16
--keypoints.max-num-keypoints 20
--cluster.clusters 8 --stage1.warmup-iterations 10 --stage1.rounds 2 --stage1.round-iterations 10
--stage1.min-labels 2 --stage1.threshold 0.05 --stage2.iterations 30 --stage2.min-population 2 --stage2.merge-after 10
--stage2.merge-every 10 --stage2.refine-rounds 1 --stage2.refine-iterations 10 --stage2.refine-confidence 0.0
""".split()


def why_not() -> str | None:
    """Why namespaces can't be made here; None if they can."""
    if os.geteuid() != 0 or not all(shutil.which(name) for name in ("ip", "nsenter", "unshare")):
        return "namespaces need root, iproute2 and util-linux"
    made = subprocess.run(["ip", "netns", "add", "landmarks-try"], capture_output=True, text=True)
    if made.returncode:
        return f"namespaces can't be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", "landmarks-try"], check=True)
    return None


class Hosts:
    """Three hosts of one CPU each, the head among them, and an object store on the head."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "hosts"
        self.environment = os.environ | {
            "VENV": sys.prefix,
            "WORKDIR": str(ROOT),
            "NETNS_PREFIX": f"lm{os.getpid() % 10_000}",
            "NETNS_STATE": str(self.state),
            "JOB_ENV": json.dumps({"env_vars": VARIABLES | QUICK, "excludes": [".git", "tests", "docs"]}),
        }
        self("up")
        server = [str(SCRIPT), "exec", "0", "env", *self.variables(), sys.executable, "-m", "moto.server"]
        log = open(folder / "store.log", "w")
        self.store = subprocess.Popen(
            [*server, "-H", *STORE.replace(":", " -p ").split()], env=self.environment, stdout=log, stderr=log
        )
        end = time.monotonic() + 60
        while self.python("import boto3; boto3.client('s3').create_bucket(Bucket='corpus')", check=False).returncode:
            assert time.monotonic() < end, (folder / "store.log").read_text()

    @staticmethod
    def variables() -> list[str]:
        return [f"{name}={value}" for name, value in VARIABLES.items()]

    def __call__(self, *words: str, check: bool = True) -> subprocess.CompletedProcess:
        done = subprocess.run([str(SCRIPT), *words], env=self.environment, capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def python(self, code: str, check: bool = True) -> subprocess.CompletedProcess:
        return self("exec", "0", "env", *self.variables(), sys.executable, "-c", code, check=check)

    def submit(self, *command: str, check: bool = True) -> subprocess.CompletedProcess:
        return self("submit", "--", "python", "-m", *command, check=check)

    def close(self) -> None:
        with suppress(OSError):
            self.store.kill()
        self("down")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("multinode")


@pytest.fixture(scope="module")
def hosts(folder):
    if reason := why_not():
        pytest.skip(reason)
    hosts = Hosts(folder)
    yield hosts
    hosts.close()


def test_three_hosts_give_what_one_gives(hosts, folder):
    hosts.submit("jobs.pack", *PACK, "--out", "s3://corpus/shards")
    places = ["--shards", "s3://corpus/shards", "--runs", "s3://corpus/runs", "--name", "run"]
    job = hosts.submit("jobs.train", *TRAIN, *places, "--tracking", f"sqlite:///{folder}/three.db")
    progress = [line for line in job.stdout.splitlines() if "img/s" in line]
    assert len(progress) >= 6 and not any("\x1b" in line or "\r" in line for line in progress), job.stdout
    for host in range(3):
        found = list((hosts.state / f"host{host}" / "ray").glob("session_2*/logs/train/ray-train-app-worker-*"))
        assert len(found) == 1, f"host {host} had {len(found)} workers"
    hosts.python(f"import fsspec; fsspec.filesystem('s3').get('corpus/', '{folder}/three/', recursive=True)")

    module = [sys.executable, "-m"]
    subprocess.run([*module, "jobs.pack", *PACK, "--out", str(folder / "shards")], check=True, cwd=ROOT)
    here = ["--shards", str(folder / "shards"), "--runs", str(folder), "--name", "run"]
    tracking = ["--tracking", f"sqlite:///{folder}/one.db"]
    subprocess.run([*module, "jobs.train", *TRAIN, *here, *tracking], check=True, cwd=ROOT)

    three = folder / "three"
    for shard in (folder / "shards").iterdir():
        assert shard.read_bytes() == (three / "shards" / shard.name).read_bytes()
    # The same number of workers, each on one CPU, adds up in the same order wherever they are: all is bit-equal but
    # the labels' distances, whose last bit depends on the BLAS kernel that an environment chooses.
    here, there = files(folder / "run"), files(three / "runs" / "run")
    assert here.keys() == there.keys()
    same = [name for name in here if name.endswith((".safetensors", ".npz")) and "/labels/" not in name]
    assert len(same) > 10 and [name for name in same if here[name] != there[name]] == []
    labels = [name for name in here if "/labels/" in name]
    assert len(labels) > 10
    for name in labels:
        one, other = Labels.load(str(folder / "run" / name)), Labels.load(str(three / "runs" / "run" / name))
        for part in ("offsets", "points", "cluster"):
            np.testing.assert_array_equal(getattr(one, part), getattr(other, part), err_msg=name)
        np.testing.assert_allclose(one.distance, other.distance, rtol=0, atol=1e-6, err_msg=name)


def test_a_mistake_fails_the_job_and_says_why(hosts):
    lost = hosts.submit("jobs.train", *TRAIN, "--shards", "s3://corpus/shards", "--name", "lost", check=False)
    assert lost.returncode != 0 and "--runs runs" in lost.stdout and "failed" in lost.stdout


def test_an_elastic_run_goes_on_with_the_hosts_that_are_left_and_takes_new_ones(hosts, folder):
    hosts.submit("jobs.pack", *PACK, "--out", "s3://corpus/elastic/shards")
    places = "--shards s3://corpus/elastic/shards --runs s3://corpus/elastic --name run --workers 2:3".split()
    longer = ["--stage2.iterations", "1500", "--stage2.merge-every", "150", "--resources.checkpoint-steps", "20"]
    tracking = ["--tracking", f"sqlite:///{folder}/elastic.db"]
    command = [str(SCRIPT), "submit", "--", "python", "-m", "jobs.train", *TRAIN, *longer, *places, *tracking]
    log = folder / "elastic.log"

    def steps() -> list[str]:
        return [line for line in log.read_text().splitlines() if "img/s" in line]

    def wait_for_steps(number: int) -> None:
        while len(steps()) < number:
            assert job.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.5)

    end = time.monotonic() + 1500
    with open(log, "w") as file, subprocess.Popen(command, env=hosts.environment, stdout=file, stderr=file) as job:
        wait_for_steps(2)
        hosts("kill", "2")
        wait_for_steps(len(steps()) + 5)
        hosts("boot", "2")
        assert job.wait() == 0, log.read_text()
    metrics = "s3://corpus/elastic/run/metrics.jsonl"
    read = hosts.python(f"import fsspec; print(fsspec.open('{metrics}', 'rt').open().read())")
    told = [json.loads(line) for line in read.stdout.splitlines() if '"kind": "step"' in line]
    assert [workers for workers, _ in groupby(line["workers"] for line in told)] == [3, 2, 3]
    assert told[-1]["phase_step"] == told[-1]["phase_steps"]
