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


class Job:
    """A submitted training, whose log is read while it runs."""

    def __init__(self, hosts: Hosts, folder: Path, name: str, *options: str) -> None:
        tracking = ["--tracking", f"sqlite:///{folder}/{name}.db", "--name", name]
        self.log = folder / f"{name}-{time.monotonic()}.log"
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(
                [str(SCRIPT), "submit", "--", "python", "-m", "jobs.train", *TRAIN, *options, *tracking],
                env=hosts.environment,
                stdout=file,
                stderr=file,
            )
        self.end = time.monotonic() + 1500

    def said(self, text: str = "img/s") -> list[str]:
        return [line for line in self.log.read_text().splitlines() if text in line]

    def wait_for(self, number: int, text: str = "img/s") -> None:
        while len(self.said(text)) < number:
            assert self.process.poll() is None and time.monotonic() < self.end, self.log.read_text()
            time.sleep(0.5)

    def finish(self) -> None:
        assert self.process.wait() == 0, self.log.read_text()


LONGER = ["--stage2.iterations", "900", "--stage2.merge-every", "150", "--resources.checkpoint-steps", "20"]


def metrics_of(hosts: Hosts, url: str) -> list[dict]:
    read = hosts.python(f"import fsspec; print(fsspec.open('{url}/metrics.jsonl', 'rt').open().read())")
    return [json.loads(line) for line in read.stdout.splitlines() if line.startswith("{")]


def workers_of(told: list[dict]) -> list[int]:
    return [workers for workers, _ in groupby(line["workers"] for line in told if line["kind"] == "step")]


def test_an_elastic_run_goes_on_with_the_hosts_that_are_left_and_takes_new_ones(hosts, folder):
    hosts.submit("jobs.pack", *PACK, "--out", "s3://corpus/elastic/shards")
    places = "--shards s3://corpus/elastic/shards --runs s3://corpus/elastic --workers 2:3".split()
    job = Job(hosts, folder, "killed", *LONGER, *places)
    job.wait_for(2)
    hosts("kill", "2")
    job.wait_for(len(job.said()) + 5)
    hosts("boot", "2")
    job.finish()
    told = metrics_of(hosts, "s3://corpus/elastic/killed")
    assert workers_of(told) == [3, 2, 3]
    last = [line for line in told if line["kind"] == "step"][-1]
    assert last["phase_step"] == last["phase_steps"]


def test_a_host_that_is_taken_away_with_notice_costs_not_a_step(hosts, folder):
    hosts.submit("jobs.pack", *PACK, "--out", "s3://corpus/drained/shards")
    places = "--shards s3://corpus/drained/shards --runs s3://corpus/drained --workers 2:3".split()
    rare = [*LONGER[:-1], "100000", "--resources.max-failures", "0"]
    job = Job(hosts, folder, "drained", *rare, *places)
    job.wait_for(2)
    hosts("drain", "2")
    job.wait_for(1, "is about to be taken away")
    job.wait_for(len(job.said()) + 2)
    hosts("kill", "2")
    hosts("boot", "2")
    job.finish()
    told = metrics_of(hosts, "s3://corpus/drained/drained")
    left = next(number for number, line in enumerate(told) if line["kind"] == "leaving")
    assert told[left]["step"] > 20
    resumed = next(line for line in told[left:] if line["kind"] == "resume")
    assert resumed["step"] == told[left]["step"]
    assert workers_of(told) == [3, 2, 3]


def test_the_same_command_goes_on_with_a_run_whose_cluster_was_lost_with_its_head(hosts, folder):
    """Runs after the others: the store is on the head, so this run lies in a folder that all hosts see."""
    module = [sys.executable, "-m"]
    subprocess.run([*module, "jobs.pack", *PACK, "--out", str(folder / "shards"), "--overwrite"], check=True, cwd=ROOT)
    places = ["--shards", str(folder / "shards"), "--runs", str(folder)]
    for name in ("undisturbed", "headless"):
        job = Job(hosts, folder, name, *places)
        if name == "headless":
            job.wait_for(1, "round 1 ")
            for host in range(3):
                hosts("kill", str(host))
            job.process.kill()
            for host in range(3):
                hosts("boot", str(host))
            job = Job(hosts, folder, name, *places)
        job.finish()
    assert job.said("resumed after step")
    undisturbed, headless = files(folder / "undisturbed"), files(folder / "headless")
    weights = [name for name in undisturbed if name.endswith(".safetensors") and name.startswith("model/")]
    assert len(weights) == 1 and undisturbed[weights[0]] == headless[weights[0]]
