"""What a sweep makes small, and which trial is the best by it."""

import math

import pytest

from sst.config import TrainSettings
from sst.run.tracking import Tracking
from sst.tune.command import print_table
from sst.tune.objective import final_objective, round_error
from sst.tune.sweep import Sweep, TrialRecord, best_of

FIGURES = {
    "model/repeatability": 0.8,
    "model/equivariance_error": 1.5,
    "score/forward": 0.05,
    "score/backward": math.nan,
}


def test_each_objective_is_its_figure_in_per_cent():
    assert final_objective("label-free", FIGURES) == pytest.approx(20.0)
    assert final_objective("forward", FIGURES) == pytest.approx(5.0)
    assert final_objective("backward", FIGURES) is None
    assert final_objective("label-free", {}) is None and final_objective("forward", {}) is None


def test_the_error_of_a_round_counts_in_distances_between_clusters():
    # 25 clusters lie 20 % of the view apart, so 2 % of the view are a tenth of that.
    assert round_error({"equivariance_error": 2.0}, 25) == pytest.approx(10.0)
    assert round_error({}, 25) > round_error({"equivariance_error": 70.0}, 25)


def test_a_model_that_sees_hardly_anything_is_not_the_best():
    found = [final_objective("label-free", {"model/repeatability": share}) for share in (0.35, 0.01, 0.26)]
    records = [TrialRecord(values={}, status="finished", objective=value) for value in found]
    assert best_of(records) == 0
    assert best_of([*records, TrialRecord(values={}, status="stopped", objective=0.1)]) == 0
    assert best_of([TrialRecord(values={}, status="finished"), TrialRecord(values={}, status="failed")]) is None


def test_the_table_has_room_in_a_log_for_every_name_and_number(capsys):
    values = {"cluster.clusters": 15, "stage1.learning_rate": 0.0006698, "stage1.threshold": 0.1761}
    sweep = Sweep("runs/mine", TrainSettings(), "shards", [values], "label-free", Tracking("", "landmarks", "mine"))
    figures = {"model/landmarks": 15.0, "score/forward": 0.07508, "score/backward": 0.06719}
    print_table(sweep, [TrialRecord(values=values, status="finished", step=1900, objective=59.02, metrics=figures)])
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert all(word in shown for word in ("learning_rate", "threshold", "backward", "0.0006698", "finished", "0.06719"))
