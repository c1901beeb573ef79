"""Whoever is killed, wherever it was: the run ends with the weights and labels of an undisturbed one, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import all_labels, arguments, lines, model_bytes

DRIVER = """
import json, os, sys
import ray
ray.init("local", num_cpus=2, log_to_driver=False, runtime_env={"worker_process_setup_hook": "tests.injector.install"})
if "FAULT" in os.environ:
    told = json.load(open(os.environ["FAULT"]))
    json.dump(told | {"driver": os.getpid()}, open(os.environ["FAULT"], "w"))
from jobs.train import main
main(sys.argv[1:])
"""

WORKER = ["stage 1", "extraction", "k-means", "assignment", "checkpoint", "stage 2", "merging", "merged labels"]
CASES = [
    *(("worker", place) for place in [*WORKER, "prediction"]),
    *(("actor", place) for place in ("stage 1", "k-means", "assignment")),
    *(("driver", place) for place in [*WORKER, "prediction"]),
]


def run_driver(
    folder: Path, shards: Path, name: str, fault: Path | None, *more: str
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "FAULT")}
    environment |= {"PYTHONPATH": os.getcwd(), "RAY_AUTH_MODE": "disabled", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    if fault is not None:
        environment["FAULT"] = str(fault)
    return subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments(folder, shards, name), *more],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
    )


@pytest.fixture(scope="module", autouse=True)
def no_other_cluster(undisturbed):
    import ray  # not above: whoever imports it before a run decides whether the run's cluster has a token

    ray.shutdown()


@pytest.mark.slow  # a quarter of an hour; with the quick tests one worker that hangs is ended, below
@pytest.mark.parametrize(("victim", "place"), CASES)
def test_a_killed_process_costs_nothing_of_the_result(undisturbed, folder, shards, victim, place):
    name = f"{victim}-{place}".replace(" ", "-")
    run, fault = folder / "runs" / name, folder / f"{name}.json"
    fault.write_text(json.dumps({"place": place, "victim": victim}))
    done = run_driver(folder, shards, name, fault)
    assert fault.with_name(fault.name + ".fired").exists(), done.stderr
    if victim == "driver":
        assert done.returncode == -9 and not (run / "report.html").exists()
        done = run_driver(folder, shards, name, fault)
    assert done.returncode == 0, done.stderr
    assert model_bytes(run) == model_bytes(undisturbed)
    assert all_labels(run) == all_labels(undisturbed)
    assert not list(run.rglob("*.tmp")) and not (run / "lock.json").exists()
    kinds = [line["kind"] for line in lines(run)]
    assert ("resume" in kinds) == (victim == "worker" or (victim == "driver" and place not in NO_CHECKPOINT_YET))


HANGS = {
    ("worker", "stage 1"): "has given no sign of life for",
    ("actor", "k-means"): "k-means gave no answer (fit) for 30 s; it is started again",
    ("task", "assignment"): "got done in 30 s; they are begun again",
}
"""Who is stopped where, and what is said of it."""


@pytest.mark.parametrize(
    ("victim", "place"),
    [pytest.param(*case, marks=[] if case == ("worker", "stage 1") else pytest.mark.slow) for case in HANGS],
)
def test_a_process_that_hangs_is_ended_and_named_and_costs_nothing_of_the_result(
    undisturbed, folder, shards, victim, place
):
    name = f"hang-{victim}"
    run, fault = folder / "runs" / name, folder / f"{name}.json"
    fault.write_text(json.dumps({"place": place, "victim": victim, "signal": "SIGSTOP"}))
    done = run_driver(folder, shards, name, fault, "--resources.hang-minutes", "1")
    assert fault.with_name(fault.name + ".fired").exists() and done.returncode == 0, done.stderr
    assert model_bytes(run) == model_bytes(undisturbed)
    assert all_labels(run) == all_labels(undisturbed)
    said = [line["text"] for line in lines(run) if line["kind"] == "hang"]
    named = [text for text in said if HANGS[victim, place] in text]
    assert len(named) == 1, said  # on a busy machine others may have waited too
    assert f"warning: {named[0]}" in done.stdout


NO_CHECKPOINT_YET = ("assignment",)
"""Places that a run reaches before its first checkpoint."""


NODES = """
import json, os, sys, threading, time
from pathlib import Path
import psutil, ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False)
metrics, marker = Path(os.environ["METRICS"]), Path(os.environ["LOST"])

def has_worker(node):
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return any("RayTrainWorker" in " ".join(child.cmdline()) for child in raylet.children())

def lose():
    while not metrics.exists() or metrics.read_text().count('"kind": "step"') < 3:
        time.sleep(0.1)
    lost = next(node for node in nodes if has_worker(node))
    marker.write_text(str(len(ray.nodes())))
    cluster.remove_node(lost, allow_graceful=False)

threading.Thread(target=lose, daemon=True).start()
from jobs.train import main
try:
    main(sys.argv[1:])
finally:
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.slow
def test_a_lost_node_costs_nothing_of_the_result(undisturbed, folder, shards):
    """Three nodes of one machine; one that trains is taken away, the other two finish."""
    run, lost = folder / "runs" / "node", folder / "node.lost"
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "FAULT")}
    environment |= {"PYTHONPATH": os.getcwd(), "RAY_AUTH_MODE": "disabled", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    environment |= {"METRICS": str(run / "metrics.jsonl"), "LOST": str(lost)}
    done = subprocess.run(
        [sys.executable, "-c", NODES, *arguments(folder, shards, "node")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr
    assert lost.read_text() == "3"
    assert model_bytes(run) == model_bytes(undisturbed)
    assert all_labels(run) == all_labels(undisturbed)
    assert "resume" in [line["kind"] for line in lines(run)]
