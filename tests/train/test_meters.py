"""What "img/s" counts: images that pass through the network, per second of wall clock."""

from dataclasses import replace

import pytest
import torch

from sst.nn.network import DetectorDescriptor, LandmarkDetector
from sst.nn.steps import random_batch, stage1_losses, stage2_losses
from sst.train import meters
from sst.train.meters import Meter
from sst.train.schedule import plan
from tests.small import SETTINGS


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_counts_the_images_that_the_network_sees(stage):
    shape, seen, generator = SETTINGS.network.shape, [], torch.Generator()
    model = DetectorDescriptor(shape) if stage == 1 else LandmarkDetector(shape, 8)
    model.register_forward_pre_hook(lambda _, images: seen.append(len(images[0])))
    if stage == 1:
        stage1_losses(model, random_batch(SETTINGS.stage1.pairs, 64, 8), SETTINGS.stage1_step(), generator)
    else:
        active = torch.ones(8, dtype=torch.bool)
        stage2_losses(model, random_batch(SETTINGS.stage2.batch, 64, 8), active, SETTINGS.stage2_step(), generator)
    phase = next(phase for phase in plan(SETTINGS, 48) if phase.stage == stage)
    assert sum(seen) == phase.views


def test_every_second_of_the_clock_counts_once(monkeypatch):
    """Steps of 2 s of which half a second is waiting, and 7 s for a checkpoint between two lines."""
    now = 100.0
    monkeypatch.setattr(meters.time, "monotonic", lambda: now)
    meter, lines = Meter(replace(plan(SETTINGS, 48)[0], batch=16), 1), []
    for number in (1, 2):
        for _ in range(5):
            with meter.waiting():
                now += 0.5
            now += 1.5
            meter.add({"loss": torch.tensor(float(number))})
        lines.append(meter.line(5 * number, 5 * number))
        now += 7.0
    assert [line["images_per_second"] for line in lines] == pytest.approx([5 * 32 / 10, 5 * 32 / 17])
    assert [line["waiting_share"] for line in lines] == pytest.approx([2.5 / 10, 2.5 / 17])
    assert sum(5 * 32 / line["images_per_second"] for line in lines) == pytest.approx(now - 100.0 - 7.0)
    assert [line["loss"] for line in lines] == [1.0, 2.0]


def test_the_time_in_which_the_device_finishes_the_steps_counts(monkeypatch):
    now = 0.0

    class OnDevice(torch.Tensor):
        """Its value is there three seconds after it is asked for."""

        def __float__(self) -> float:
            nonlocal now
            now += 3.0
            return super().__float__()

    monkeypatch.setattr(meters.time, "monotonic", lambda: now)
    meter = Meter(replace(plan(SETTINGS, 48)[0], batch=16), 1)
    meter.add({"loss": torch.tensor(1.0).as_subclass(OnDevice)})
    now += 1.0
    assert meter.line(1, 1)["images_per_second"] == pytest.approx(32 / 4)
