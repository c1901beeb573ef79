"""Whole runs through the commands, on one shared local Ray cluster with two DDP workers."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import takewhile

import mlflow
import numpy as np
import pytest
import torch

from cluster.dispatch import RayMap
from jobs import pack, train
from sst.data.shards import Manifest
from sst.report.evaluate_run import Run, evaluate_run
from sst.run.distributed import TASK_CPUS
from tests.runs import all_labels, arguments, lines, model_bytes


@pytest.fixture(scope="module", autouse=True)
def cluster():
    yield
    import ray

    ray.shutdown()


def test_a_run_is_scored_pictured_and_tracked(undisturbed, folder):
    page = (undisturbed / "report.html").read_text()
    pictures = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    names = {path.stem for path in (undisturbed / "figures").iterdir()}
    assert {"landmarks", "before_after", "errors", "rounds"} < names and len(pictures) == len(names)
    assert all(base64.b64decode(picture)[8:12] == b"WEBP" for picture in pictures)
    assert "http://" not in page and "https://" not in page
    scores = json.loads((undisturbed / "scores.json").read_text())
    assert scores["protocol"] == "toy" and scores["landmarks_kept"] > 0 and scores["forward"] > 0
    kinds = {line["kind"] for line in lines(undisturbed)}
    assert {"step", "round", "shards"} <= kinds
    run_id = json.loads((undisturbed / "mlflow.json").read_text())["run_id"]
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "undisturbed"
    assert run.data.params["stage1.rounds"] == "2"
    assert len(client.get_metric_history(run_id, "round/labels_per_image")) == 7
    assert run.data.metrics["step/images_per_second"] > 0
    assert {file.path for file in client.list_artifacts(run_id)} == {"figures", "model", "report.html", "rounds"}
    assert run.data.tags["version.torch"] == torch.__version__ and len(run.data.tags["manifest_sha256"]) == 64
    assert run.data.metrics["model/landmarks"] >= 1
    model = mlflow.pyfunc.load_model(f"{run.info.artifact_uri}/model")
    found = model.predict(np.zeros((2, 64, 64, 3), np.uint8))
    assert found["points"].shape == (2, run.data.metrics["model/landmarks"], 2)
    assert found["confidence"].shape == found["points"].shape[:2] and model.metadata.signature is not None
    pictures = {file.path for file in client.list_artifacts(run_id, "rounds")}
    assert pictures == {f"rounds/{number:04d}.png" for number in range(len(list((undisturbed / "rounds").iterdir())))}


def test_the_same_command_finds_the_run_done(undisturbed, folder, shards, capsys):
    before, count = model_bytes(undisturbed), len(lines(undisturbed))
    train.main(arguments(folder, shards, "undisturbed"))
    assert model_bytes(undisturbed) == before and len(lines(undisturbed)) == count
    assert "report" in capsys.readouterr().out


def test_other_settings_under_the_same_name_are_refused(undisturbed, folder, shards, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([*arguments(folder, shards, "undisturbed"), "--seed", "1"])
    assert stop.value.code == 2
    assert "seed: 0 -> 1" in capsys.readouterr().err


def test_task_processes_stay_while_workers_train(undisturbed):
    """Each has loaded torch, which takes seconds; Ray would end them where trainers hold the CPUs."""
    import ray

    trainers = ray.remote(num_cpus=1.8)(Counter).remote()
    ray.get(trainers.__ray_ready__.remote())
    run_on_shards = RayMap(TASK_CPUS)
    before = run_on_shards(os.getpid, [()] * 4)
    time.sleep(3)  # a second without work is what Ray waits
    after = run_on_shards(os.getpid, [()] * 4)
    ray.kill(trainers)
    assert set(after) <= set(before)


def test_each_pass_over_the_shards_is_shown_once_and_by_a_name_of_its_own(undisturbed):
    first = takewhile(lambda line: line["kind"] != "round", lines(undisturbed))
    passes = [line["what"] for line in first if line["kind"] == "shards" and line["done"] == line["total"]]
    assert passes == ["detect", "score", "filter", "assign", "population"]


def test_evaluate_puts_a_run_beside_its_baselines(undisturbed, capsys):
    rows = evaluate_run(Run(run=str(undisturbed)))
    assert set(rows) == {"constant guess", "first keypoints, no training", "trained landmarks"}
    assert 0.05 < rows["constant guess"][0] < 0.5
    assert "constant guess" in capsys.readouterr().out


def test_a_killed_driver_is_followed_by_the_same_command(undisturbed, folder, shards):
    run = folder / "runs" / "driver"
    command = [sys.executable, "-m", "jobs.train", *arguments(folder, shards, "driver")]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment, start_new_session=True) as process:
        deadline = time.monotonic() + 240
        while not any(line.get("phase") == "landmarks" for line in lines(run)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
    assert not (run / "model").exists()
    train.main(arguments(folder, shards, "driver"))
    assert model_bytes(run) == model_bytes(undisturbed)
    assert all_labels(run) == all_labels(undisturbed)
    assert not list(run.rglob("*.tmp"))


def test_a_run_that_is_unwell_saves_and_ends_with_a_code_of_its_own(folder, shards, capsys):
    """Its detector is never as sure as it is asked to be."""
    with pytest.raises(SystemExit) as ended:
        train.main([*arguments(folder, shards, "unwell"), "--stage1.threshold", "0.999", "--stop-when-unwell"])
    said, run = capsys.readouterr(), folder / "runs" / "unwell"
    assert ended.value.code == 4
    assert "the detector's highest point" in said.err and "without --stop-when-unwell goes on" in said.err
    assert "warning: step 10 (warm-up): the detector's highest point" in said.out
    assert [path.name for path in sorted((run / "checkpoints").iterdir())][-1] == f"{10:010d}"
    assert not (run / "model").exists() and not (run / "lock.json").exists()


def test_fewer_descriptors_than_clusters(folder, shards, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([*arguments(folder, shards, "few"), "--cluster.clusters", "30000"])
    assert stop.value.code == 2
    assert "30000" in capsys.readouterr().err
    assert not (folder / "runs" / "few").exists()


def test_a_corpus_without_annotations_trains_too_and_invisible_landmarks_are_reported(folder, tmp_path, capsys):
    import simplejpeg

    from sst.corpora.drawings import draw

    images = tmp_path / "images"
    images.mkdir()
    for index in range(60):
        (images / f"{index}.jpg").write_bytes(simplejpeg.encode_jpeg(draw(1, index, 96).image))
    pack.main(f"folder --images {images} --out {tmp_path / 'shards'} --shard-samples 16".split())
    assert Manifest.load(str(tmp_path / "shards")).landmarks is None
    other = "--stage1.rounds 1 --stage2.visible 1 --workers auto".split()
    train.main([*arguments(folder, tmp_path / "shards", "plain"), *other])
    run = folder / "runs" / "plain"
    assert re.search(r"; ([12]) workers? on CPUs \(auto: one for each of", capsys.readouterr().out)
    assert not (run / "scores.json").exists()
    page = (run / "report.html").read_text()
    assert "no annotations" in page and "No landmark is visible on any image." in page
    assert {path.stem for path in (run / "figures").iterdir()} == {"landmarks", "before_after", "rounds"}


LONG = {"warm-up": "--stage1.warmup-iterations 20000", "landmarks": "--stage2.iterations 20000"}


@pytest.mark.parametrize(
    ("number", "code", "phase"), [(signal.SIGINT, 130, "landmarks"), (signal.SIGTERM, 143, "warm-up")]
)
def test_a_signal_saves_and_ends_with_a_code_of_its_own(folder, shards, number, code, phase):
    run = folder / "runs" / f"interrupted{code}"
    long = f"--resources.checkpoint-steps 100000 {LONG[phase]}".split()
    command = [sys.executable, "-m", "jobs.train", *arguments(folder, shards, run.name), *long]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 240
        while not any(line.get("phase") == phase for line in lines(run)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        shown, _ = process.communicate(timeout=120)
    assert process.returncode == code
    assert "finishing the step" in shown and "the same command goes on" in shown
    assert not (run / "model").exists() and not list(run.rglob("*.tmp"))
    assert not (run / "stop").exists() and not (run / "lock.json").exists()
    steps = [line["step"] for line in lines(run) if line["kind"] == "step"]
    assert max(int(path.name) for path in (run / "checkpoints").iterdir()) == steps[-1]  # nothing shown is lost
