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
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

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
PACK = "toy --count 90 --size 96 --test-share 0.3 --shard-samples 16".split()
TRAIN = """
toy-cpu --resources.workers 3 --resources.worker-cpus 0.6 --stage1.pairs 6 --stage2.batch 6
--network.input-size 64 --network.width 16 --network.depth 2 --network.groups 2 --network.descriptor-size 16
--keypoints.most 20 --cluster.clusters 8 --stage1.warmup-iterations 10 --stage1.rounds 2 --stage1.round-iterations 10
--stage1.min-labels 2 --stage1.threshold 0.05 --stage2.iterations 30 --stage2.min-population 2 --stage2.merge-after 10
--stage2.merge-every 10
""".split()

WEIGHTS = 1e-4
"""Largest difference of a weight from the run on one host: sums over workers and threads come in another order."""


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
            "JOB_ENV": json.dumps({"env_vars": VARIABLES, "excludes": [".git", "tests", "docs"]}),
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
    weights, others = (
        load_file(place / "model" / "model.safetensors") for place in (folder / "run", three / "runs/run")
    )
    assert weights.keys() == others.keys()
    differences = {name: float(np.abs(weights[name] - others[name]).max()) for name in weights}
    assert max(differences.values()) <= WEIGHTS, differences


def test_a_mistake_fails_the_job_and_says_why(hosts):
    lost = hosts.submit("jobs.train", *TRAIN, "--shards", "s3://corpus/shards", "--name", "lost", check=False)
    assert lost.returncode != 0 and "--runs runs" in lost.stdout + lost.stderr and "FAILED" in lost.stdout + lost.stderr
