"""A sweep through its command: one that loses a trial's process, then its own, and goes on."""

import json
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest

from tests.runs import TINY, lines

THRESHOLDS, CLUSTERS = (0.05, 0.99), (8, 20_000)
"""A detector that finds points and one that finds none; clusters that the corpus has, and too many for it."""
TRIALS = [(threshold, clusters) for threshold in THRESHOLDS for clusters in CLUSTERS]


def command(folder: Path, shards: Path, *more: str) -> list[str]:
    tiny = [*TINY]
    for name in ("--cluster.clusters", "--stage1.threshold"):
        at = tiny.index(name)
        del tiny[at : at + 2]
    # With old labels in every image a detector that finds nothing makes a weak trial.
    tiny += ["--register", "small", "--stage1.unite"]
    return [
        *(sys.executable, "-m", "jobs.tune", "toy-cpu", "--shards", str(shards), "--name", "sweep"),
        *("--runs", str(folder / "runs"), "--tracking", f"sqlite:///{folder}/mlflow.db", *tiny),
        *("--vary", "stage1.threshold=" + ",".join(map(str, THRESHOLDS))),
        *("--vary", "cluster.clusters=" + ",".join(map(str, CLUSTERS)), *more),
    ]


def below(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def wait_for(what, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 400
    while not what():
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shards):
    """A sweep that is over: the first trial's process was killed in training, the command after the second trial."""
    folder = tmp_path_factory.mktemp("sweep")
    trials, log = folder / "runs" / "sweep" / "trials", folder / "first.log"
    with open(log, "w") as file:
        process = subprocess.Popen(command(folder, shards), stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: any(line.get("step", 0) >= 10 for line in lines(trials / "000")), process, log)
        titles = {p: " ".join(p.cmdline()) for p in below(process)}
        leaders = [p for p, title in titles.items() if "ImplicitFunc" in title]
        assert len(leaders) == 1, titles
        leaders[0].kill()
        wait_for((trials / "001" / "trial.json").exists, process, log)
    finally:
        for each in [*below(process), process]:
            each.kill()
        process.wait()
    (folder / "trained").write_text(json.dumps([len(lines(trials / name)) for name in ("000", "001")]))
    again = subprocess.run(command(folder, shards, "--resume"), capture_output=True, text=True)
    (folder / "again.log").write_text(again.stdout + again.stderr)
    assert again.returncode == 0, again.stdout + again.stderr
    return folder


@pytest.fixture(scope="module")
def records(folder):
    trials = folder / "runs" / "sweep" / "trials"
    return [json.loads((trials / f"{number:03d}" / "trial.json").read_text()) for number in range(len(TRIALS))]


def test_a_lost_trial_goes_on_a_weak_one_is_stopped_a_wrong_one_ends_nothing(records):
    assert [record["status"] for record in records] == ["finished", "failed", "stopped", "failed"]
    assert [tuple(record["values"].values()) for record in records] == TRIALS
    assert records[0]["step"] == 70 and 0 < records[0]["objective"] <= 100
    assert {"model/landmarks", "model/repeatability", "model/label_persistence"} <= records[0]["metrics"].keys()
    assert records[2]["step"] < 70 and "worst quarter" in records[2]["error"]
    assert all("descriptors" in records[number]["error"] for number in (1, 3))


def test_a_resumed_sweep_trains_nothing_again(folder):
    trials = folder / "runs" / "sweep" / "trials"
    assert [len(lines(trials / name)) for name in ("000", "001")] == json.loads((folder / "trained").read_text())
    assert "best trial" in (folder / "again.log").read_text()


def test_the_first_keypoints_are_computed_once(folder):
    sweep = folder / "runs" / "sweep"
    (shared,) = (sweep / "keypoints").iterdir()
    made = [path.stat().st_mtime_ns for path in shared.iterdir()]
    assert len(made) == 5  # a file for each shard of training images, and the record
    assert max(made) < (sweep / "trials" / "000" / "trial.json").stat().st_mtime_ns
    assert (sweep / "trials" / "002" / "rounds" / "0000" / "record.json").exists()


def test_the_sweep_is_a_parent_run_with_nested_trials_and_a_registered_model(folder):
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = {run.info.run_name: run for run in client.search_runs(["1"])}
    assert runs.keys() == {"sweep", *(f"sweep-{number:03d}" for number in range(len(TRIALS)))}
    parent = runs.pop("sweep")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    status = [runs[f"sweep-{number:03d}"].info.status for number in range(len(TRIALS))]
    assert status == ["FINISHED", "FAILED", "KILLED", "FAILED"] and parent.info.status == "FINISHED"
    best = runs["sweep-000"]
    assert parent.data.tags["best"] == best.info.run_id
    assert parent.data.metrics["objective"] == pytest.approx(100 * (1 - best.data.metrics["model/repeatability"]))
    (version,) = client.search_model_versions("name = 'small'")
    assert version.run_id == best.info.run_id


def test_a_sweep_is_not_begun_twice(folder, shards):
    again = subprocess.run(command(folder, shards), capture_output=True, text=True)
    assert again.returncode == 2 and "--resume" in again.stderr
    other = subprocess.run(command(folder, shards, "--resume", "--seed", "7"), capture_output=True, text=True)
    assert other.returncode == 2 and "seed: 0 -> 7" in other.stderr
