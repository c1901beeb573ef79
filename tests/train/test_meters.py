"""What "img/s" counts: images that pass through the network, per second of wall clock."""

import pytest
import torch

from sst.nn.network import DetectorDescriptor, LandmarkDetector
from sst.nn.steps import random_batch, stage1_losses, stage2_losses
from sst.train import meters
from sst.train.meters import Figures
from sst.train.schedule import images_of_step, plan
from tests.small import SETTINGS


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_counts_the_images_that_the_network_sees(stage):
    shape, seen, generator = SETTINGS.network.shape, [], torch.Generator()
    model = DetectorDescriptor(shape) if stage == 1 else LandmarkDetector(shape, 8)
    model.register_forward_pre_hook(lambda _, images: seen.append(len(images[0])))
    if stage == 1:
        stage1_losses(model, random_batch(SETTINGS.stage1.pairs, SETTINGS), SETTINGS, generator)
    else:
        active = torch.ones(8, dtype=torch.bool)
        stage2_losses(model, random_batch(SETTINGS.stage2.batch, SETTINGS), active, SETTINGS, generator)
    assert sum(seen) == images_of_step(SETTINGS, stage)


def test_every_second_of_the_clock_counts_once(monkeypatch):
    """Steps of 2 s of which half a second is waiting, and 7 s for a checkpoint between two lines."""
    now = 100.0
    monkeypatch.setattr(meters.time, "monotonic", lambda: now)
    figures, lines = Figures(plan(SETTINGS, 48)[0], 32, 1), []
    for number in (1, 2):
        for _ in range(5):
            with figures.waiting():
                now += 0.5
            now += 1.5
            figures.add({"loss": torch.tensor(float(number))})
        lines.append(figures.line(5 * number, 5 * number))
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
    figures = Figures(plan(SETTINGS, 48)[0], 32, 1)
    figures.add({"loss": torch.tensor(1.0).as_subclass(OnDevice)})
    now += 1.0
    assert figures.line(1, 1)["images_per_second"] == pytest.approx(32 / 4)
