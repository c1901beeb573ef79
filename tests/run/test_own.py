"""`jobs.train own`: settings for one's own images."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jobs import train
from sst.config import TrainSettings
from sst.corpora.drawings import draw
from sst.errors import UserError
from sst.presets import PRESETS
from sst.run.own import (
    LEAST_IMAGES,
    Machine,
    Speed,
    choose,
    expected_seconds,
    measure,
    reasons,
    scaled,
    within,
    workers_for,
)
from sst.train.consistency import repeatability
from tests.small import SETTINGS

LAPTOP = Machine(cpus=2, gpus=0, memory_gb=20.0)
SPEED = Speed(stage1=0.127, stage2=0.117, memory_gb=3.5)


@given(
    images=st.integers(LEAST_IMAGES, 10**6),
    landmarks=st.integers(2, 200),
    cpus=st.integers(1, 256),
    gpus=st.integers(0, 16),
    memory=st.floats(4.5, 2000),
)
def test_any_folder_and_machine_give_sound_settings(images, landmarks, cpus, gpus, memory):
    settings = choose(images, landmarks, Machine(cpus, gpus, memory))
    assert TrainSettings.model_validate(settings.model_dump()) == settings
    assert settings.stage2.most_landmarks == landmarks < settings.cluster.clusters
    assert settings.stage2.min_population < images
    assert settings.resources.most_workers <= (gpus or cpus)
    assert all("?" not in choice.why for choice in reasons(settings, images, Machine(cpus, gpus, memory), None))


def test_thirty_clusters_on_two_cores_are_the_measured_preset():
    settings, preset = choose(3244, 20, LAPTOP), PRESETS["faces-cpu"][1]
    assert settings.stage1 == preset.stage1 and settings.network == preset.network
    assert settings.cluster == preset.cluster and settings.stage2.min_population == pytest.approx(200, abs=10)


def test_workers_fit_memory():
    assert workers_for(Machine(64, 0, 9.5)) == 4
    assert workers_for(Machine(64, 0, 600.0)) == 8
    assert workers_for(Machine(64, 3, 600.0)) == 2
    with pytest.raises(UserError, match="1.0 GB of memory are free"):
        workers_for(Machine(64, 0, 1.0))


def test_too_few_images_are_refused_with_what_the_method_needs():
    with pytest.raises(UserError, match=f"needs at least {LEAST_IMAGES}"):
        choose(LEAST_IMAGES - 1, 20, LAPTOP)


def test_the_estimate_for_the_measured_run_is_what_it_took():
    """27.5 minutes for `faces-cpu` on two cores (README)."""
    minutes = expected_seconds(PRESETS["faces-cpu"][1], 3244, SPEED) / 60
    assert 0.85 < minutes / 27.5 < 1.15


@given(st.floats(4, 600), st.integers(LEAST_IMAGES, 20_000))
def test_a_schedule_for_some_minutes_takes_them(minutes, images):
    settings = choose(images, 20, LAPTOP)
    try:
        fitting = within(settings, images, SPEED, minutes)
    except UserError:
        assert expected_seconds(scaled(settings, 0.1), images, SPEED) / 60 > 0.95 * minutes
        return
    assert expected_seconds(fitting, images, SPEED) / 60 == pytest.approx(minutes, rel=0.06)
    assert max(fitting.stage2.milestones) < fitting.stage2.iterations


def test_a_shorter_schedule_has_fewer_rounds_rather_than_tiny_ones():
    short = scaled(choose(3000, 20, LAPTOP), 0.15).stage1
    assert short.rounds == 4 and short.round_iterations == 150


def test_speed_is_measured_by_real_steps():
    speed = measure(SETTINGS, LAPTOP, repeats=1)
    assert 0 < speed.stage1 < 60 and 0 < speed.stage2 < 60


def test_repeatability_counts_images_where_a_landmark_stays():
    moved = np.zeros((4, 3, 2))
    found = moved + np.array([[1.0, 0], [9.0, 0], [1.0, 0]])
    found[0, 2] = np.nan
    moved[3, 2] = np.nan
    np.testing.assert_array_equal(repeatability(moved, found, 5.0), [1, 0, 0.5])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "owls").mkdir()
    for number in range(70):
        Image.fromarray(draw(1, number, 64).image).save(tmp_path / "owls" / f"{number}.jpg")
    return tmp_path / "owls"


@pytest.fixture
def started(monkeypatch):
    """What would be trained."""
    runs = []
    monkeypatch.setattr("sst.run.own.train_run", lambda *args: runs.append(args))
    monkeypatch.setattr(train, "print_outcome", lambda *args: None)
    monkeypatch.setattr("sst.run.own.measure", lambda settings, machine: SPEED)
    return runs


def own(folder, *more: str) -> None:
    train.main(["own", "--images", str(folder), "--runs", str(folder.parent / "runs"), *more])


def test_a_folder_is_packed_settled_and_trained(folder, started, capsys):
    own(folder, "--landmarks", "12")
    settings, shards, run, tracking = started[0]
    said = " ".join(capsys.readouterr().out.split())
    assert tracking.name == "owls" and run.endswith("runs/owls")
    assert settings.cluster.clusters == 18 and settings.stage2.most_landmarks == 12
    assert "1.5 for each landmark" in said and "GB of memory" in said and "training images are few" in said
    assert json.loads((folder.parent / "runs" / "owls" / "shards" / "manifest.json").read_text())["corpus"] == "owls"


def test_going_on_keeps_the_settings_that_were_chosen(folder, started, monkeypatch, capsys):
    own(folder, "--landmarks", "12")
    monkeypatch.setattr("sst.run.own.this_machine", lambda: Machine(64, 0, 500))
    own(folder, "--landmarks", "12")
    assert started[0] == started[1]
    with pytest.raises(SystemExit) as exit_:
        own(folder, "--landmarks", "13")
    assert exit_.value.code == 2 and "landmarks: 12 -> 13" in capsys.readouterr().err


def test_too_few_images_leave_nothing(folder, started, capsys):
    for number in range(30):
        (folder / f"{number}.jpg").unlink()
    with pytest.raises(SystemExit) as exit_:
        own(folder)
    assert exit_.value.code == 2 and "needs at least" in capsys.readouterr().err
    assert not (folder.parent / "runs").exists() and not started
