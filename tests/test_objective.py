"""What a sweep makes small, and which trial is the best by it."""

import math

import pytest

from sst.objective import final_objective, round_objective
from sst.sweep import TrialRecord, best_of

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


def test_a_round_without_keypoints_is_worse_than_any():
    assert round_objective({"equivariance_error": 2.5}) == 2.5
    assert round_objective({}) == math.inf


def test_a_model_that_sees_hardly_anything_is_not_the_best():
    found = [final_objective("label-free", {"model/repeatability": share}) for share in (0.35, 0.01, 0.26)]
    records = [TrialRecord(values={}, status="finished", objective=value) for value in found]
    assert best_of(records) == 0
    assert best_of([*records, TrialRecord(values={}, status="stopped", objective=0.1)]) == 0
    assert best_of([TrialRecord(values={}, status="finished"), TrialRecord(values={}, status="failed")]) is None
