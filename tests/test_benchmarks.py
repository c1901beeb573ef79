"""Benchmarks that read what runs leave behind must understand it, and those that judge must not hide what fails."""

import json
import math
import os
from functools import partial

import pytest

from benchmarks import fullsize, gpu, objective
from benchmarks.checks import DidNotHold, NotRunHere, checked, isolated, job, report
from benchmarks.fullsize import Scale, schedule, train_words
from benchmarks.round import rounds_of
from cluster import storage
from cluster.actor import read_sample
from cluster.kmeans import fit
from jobs import train
from sst.data.corpus import Corpus, open_corpus
from sst.data.shards import Manifest
from sst.run.claim import claim
from sst.run.metrics import MetricsFile
from sst.train.run_directory import RunDirectory
from sst.train.tools import Tools
from sst.tune.sweep import TrialRecord
from tests.small import SETTINGS, train_locally, write_toy


def test_the_parts_of_a_round_are_those_that_the_run_notes(tmp_path):
    corpus, run = str(tmp_path / "corpus"), tmp_path / "run"
    write_toy(corpus, train=24, test=8)
    claim(RunDirectory(str(run)), SETTINGS, open_corpus(corpus))

    def solve(sample, asked):
        return fit(read_sample(sample), asked)

    train_locally(corpus, str(run), Tools(solve, log=MetricsFile(str(run)).write))
    rounds = rounds_of(run)
    assert [each["steps"] for each in rounds] == [SETTINGS.stage1.round_iterations] * SETTINGS.stage1.rounds
    for each in rounds:
        parts = {name: seconds for name, seconds in each.items() if name not in ("steps", "all")}
        assert all(seconds >= 0 for name, seconds in parts.items() if name != "rest") and each["training"] > 0
        # What is noted is rounded to tenths of a second, and short; it covers a round all the same.
        assert -0.5 < each["rest"] < 0.5 * each["all"] + 0.5


def test_what_a_sweep_notes_of_its_trials_can_be_ranked(tmp_path):
    run = tmp_path / "trials" / "000"
    claim(RunDirectory(str(run)), SETTINGS, Corpus("", Manifest(corpus="toy", shards=()), ""))
    record = TrialRecord(values={}, status="finished", metrics={"model/repeatability": 0.5})
    storage.write_json(str(run / "trial.json"), record.model_dump(mode="json"))
    MetricsFile(str(run)).write({"kind": "round", "round": 1, "made_by": "correspondence", "equivariance_error": 2.0})
    found = objective.metrics_of(tmp_path)["000"]
    assert found["model/repeatability"] == 0.5 and found["round 1/equivariance_error"] == 2.0


def raising(error: Exception):
    def check() -> str:
        raise error

    return check


def test_a_failing_check_is_reported_stops_no_other_and_gives_exit_code_1(tmp_path, capsys):
    checks = {
        "first": lambda: "fine",
        "second": raising(DidNotHold("3 of 40 clusters | in use")),
        "third": raising(ZeroDivisionError("division by zero")),
        "fourth": raising(NotRunHere("no GPU")),
        "last": lambda: "fine\nas well",
    }
    rows = [checked(name, check) for name, check in checks.items()]
    assert [row.outcome for row in rows] == ["held", "did not hold", "did not hold", "not run here", "held"]
    assert report(rows, "a machine", tmp_path / "table.md") == 1
    written = (tmp_path / "table.md").read_text()
    assert written in capsys.readouterr().out
    assert "2 held, 2 did not hold, 1 not run here" in written
    lines = [line.split(" | ") for line in written.splitlines() if line.startswith(("| s", "| t", "| f", "| l"))]
    assert [line[1] for line in lines] == ["held", "**did not hold**", "**did not hold**", "**not run here**", "held"]
    assert lines[1][-1] == "3 of 40 clusters / in use |" and lines[4][-1] == "fine as well |"
    assert "ZeroDivisionError: division by zero" in lines[2][-1]


def test_what_is_not_run_is_no_failure(tmp_path):
    rows = [checked("first", lambda: "fine"), checked("second", raising(NotRunHere("no GPU")))]
    assert report(rows, "a machine", tmp_path / "table.md") == 0


def test_a_command_that_fails_is_named_with_its_exit_code_and_last_words(tmp_path):
    words = ["folder", "--images", "nowhere", "--out", str(tmp_path / "shards")]
    with pytest.raises(DidNotHold, match=r"jobs\.pack ended with exit code 2: .*nowhere.*\(log\.txt\)"):
        job("pack", words, tmp_path / "log.txt", seconds=120)


def test_a_command_that_is_not_done_in_time_is_ended(tmp_path):
    with pytest.raises(DidNotHold, match="jobs.pack was not done after 0 s"):
        job("pack", ["toy", "--count", "100000", "--out", str(tmp_path / "shards")], tmp_path / "log.txt", seconds=0.1)


def test_a_check_whose_process_dies_did_not_hold():
    with pytest.raises(DidNotHold, match="exit code 7"):
        isolated(os._exit, 7, seconds=120)


@pytest.mark.parametrize(("width", "image"), [(16, 0.02), (64, 0.04), (256, 3.0)])
def test_a_schedule_is_one_that_training_takes_and_that_fits_the_time(tmp_path, capsys, width, image):
    scale = Scale(width, batch=8, image=image, start=75.0)
    plan = schedule(60, scale)
    train.main([*train_words(plan, scale, tmp_path, "run"), "--print-config"])
    told = json.loads(capsys.readouterr().out)
    assert (told["network"]["width"], told["network"]["input_size"]) == (width, 256)
    assert told["stage1"]["warmup_iterations"] < told["stage1"]["rounds"] * told["stage1"]["round_iterations"]
    images = 2 * told["stage1"]["pairs"] * (plan.warm_up + plan.rounds * plan.round_steps)
    images += told["stage2"]["batch"] * plan.stage2
    assert 1200 < images * scale.image < 3600


def plan_without_gpu(out, **told) -> gpu.Plan:
    told = {"images": None, "gpus": 0, "minutes": 8.0, "deadline": math.inf} | told
    return gpu.Plan(out=out, scale=Scale(16, batch=8, image=0.02, start=75.0), **told)


def test_what_needs_a_gpu_is_said_to_be_not_run_where_there_is_none(tmp_path):
    plan = plan_without_gpu(tmp_path)
    names = ("cuml here", "cuml beside torch", "k-means over NCCL")
    rows = [checked(name, partial(gpu.checks_of(plan)[name], plan)) for name in names]
    assert {(row.outcome, row.seen) for row in rows} == {("not run here", "no GPU")}


def test_a_check_for_which_no_time_is_left_did_not_hold(tmp_path):
    plan = plan_without_gpu(tmp_path, deadline=0.0)
    row = checked("pack", partial(gpu.checks_of(plan)["pack drawings"], plan))
    assert row.outcome == "did not hold" and "no time was left" in row.seen


def test_single_checks_can_be_asked_for(tmp_path, capsys):
    assert gpu.Command(size="cpu", out=tmp_path, only=("export",)).run(()) == 1
    assert "| export | **did not hold** | 0 | run drawings has no model" in (tmp_path / "checks.md").read_text()
    assert gpu.Command(size="cpu", out=tmp_path, only=("exports",)).run(()) == 2
    assert "no check is called 'exports'; there are install, " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_short_training_at_256_pixels_keeps_its_labels_clusters_and_weights(tmp_path):
    """Some minutes are too few for landmarks that are sure in most images, so these are not asked for."""
    fullsize.Command(minutes=8, width=16, out=tmp_path).run(())
    written = (tmp_path / "drawings-16.md").read_text()
    for criterion in ("labels", "clusters", "weights", "maps"):
        assert f"| {criterion} | held |" in written
