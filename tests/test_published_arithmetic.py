"""What the authors' published code computes, replayed step by step in plain loops, against what is done here.

Each replay is written from a reading of that code (Mallis et al., NeurIPS 2020), without looking at ours;
docs/fidelity.md says which row each one shows.
"""

import itertools

import pytest
import torch

from sst.presets import PRESETS
from sst.train.schedule import learning_rate, plan

CELEBA = PRESETS["celeba"][1]


def replayed_stage_1() -> tuple[list[list[float]], int]:
    """Learning rate of every step, a list for each training between two correspondences; and the last step's number.

    A counter of iterations goes through all 30 trainings. At its multiples of 2,000 after the warm-up the schedule is
    moved on, and where that brings back the first rate the training ends; the counter then skips a number.
    """
    weights = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.RMSprop(weights, lr=5e-4, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=5, T_mult=1, eta_min=5e-6)
    optimizer.step()  # torch wants to see a step before the schedule's first
    iteration, trainings = 0, []
    for _ in range(30):
        rates: list[float] = []
        while True:
            if iteration == 20_000:
                break
            if iteration % 2_000 == 0 and iteration > 20_000:
                schedule.step()
                if optimizer.param_groups[0]["lr"] == 5e-4:
                    break
            rates.append(optimizer.param_groups[0]["lr"])
            iteration += 1
        iteration += 1
        trainings.append(rates)
    return trainings, iteration - 1


def replayed_stage_2(epoch_batches: int) -> tuple[list[float], list[int]]:
    """Learning rate of every step, and the steps taken before each merging; a step sees two batches."""
    optimizer = torch.optim.RMSprop([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    optimizer.step()
    iteration, rates, mergings, epochs_to_wait = 0, [], [], 0
    while iteration < 80_000:
        halves = 0
        for _ in range(epoch_batches):
            if iteration in (50_000, 65_000):
                schedule.step()
                iteration += 1
            halves += 1
            if halves % 2 == 0:
                rates.append(optimizer.param_groups[0]["lr"])
                iteration += 1
        if iteration > 25_000:
            if epochs_to_wait == 0:
                mergings.append(len(rates))
            epochs_to_wait = 1 - epochs_to_wait
    return rates, mergings


def runs_of_equal(values: list[float]) -> list[tuple[float, int]]:
    return [(value, len(list(group))) for value, group in itertools.groupby(values)]


def test_stage_1_has_the_published_steps_rates_and_correspondences():
    trainings, counted = replayed_stage_1()
    ours = [phase for phase in plan(CELEBA, 160_000) if phase.stage == 1]
    assert len(ours) == len(trainings) == 30  # a correspondence follows each: the last one labels stage 2
    assert sum(phase.steps for phase in ours) == counted == 310_000
    for phase, theirs in zip(ours, trainings, strict=True):
        rates = [learning_rate(CELEBA, phase, step) for step in range(phase.steps)]
        for (own, steps), (rate, published) in zip(runs_of_equal(rates), runs_of_equal(theirs), strict=True):
            assert own == pytest.approx(rate, rel=1e-12)
            assert steps - published in (0, 1)  # the number that the counter skips
    assert [f"{1e4 * rate:.2f}" for rate, _ in runs_of_equal(trainings[-1])] == ["5.00", "4.53", "3.29", "1.76", "0.52"]
    assert set(trainings[0]) == {5e-4}


def test_stage_2_has_the_published_steps_rates_and_mergings():
    images = 64 * 1_000
    rates, mergings = replayed_stage_2(images // 32)
    ours = [phase for phase in plan(CELEBA, images) if phase.stage == 2]
    own = [learning_rate(CELEBA, phase, step) for phase in ours for step in range(phase.steps)]
    # The counter skips a number at each milestone, so the second comes a step early; the last epoch is finished.
    for (rate, steps), (theirs, published) in zip(runs_of_equal(own), runs_of_equal(rates), strict=True):
        assert rate == pytest.approx(theirs, rel=1e-12) and (abs(steps - published) <= 1 or theirs < 6e-6)
    assert 80_000 == len(own) <= len(rates) < 81_000
    starts = [phase.stage_step for phase in ours[1:]]
    # They merge at the end of the epoch in which step 25,000 falls.
    assert len(starts) == pytest.approx(len(mergings), abs=1)
    assert all(0 <= theirs - start <= 1_000 for theirs, start in zip(mergings, starts, strict=False))
    assert {b - a for a, b in itertools.pairwise(mergings)} == {b - a for a, b in itertools.pairwise(starts)} == {2_000}
