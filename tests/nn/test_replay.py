"""Recorded steps: what is replayed is what the plain step does. A stand-in for a CUDA graph enforces its rules."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sst.nn.augment import warp_images
from sst.nn.network import DetectorDescriptor
from sst.nn.optimizer import Update
from sst.nn.replay import LABEL_MULTIPLE, MOST_SHAPES, PLAIN_STEPS, Replayed, empty, fill, padded_shapes, tensors_of
from sst.nn.steps import Batch, random_batch, stage1_losses
from tests.small import SETTINGS


class RecordingTape:
    """Plays by doing the work again with what its input holds; results and gradients stay at the recorded places."""

    def __init__(self, weights: list[torch.nn.Parameter], played: list["RecordingTape"]) -> None:
        self.weights, self.played = weights, played

    def record(self, work, generator: torch.Generator) -> Tensor:
        assert all(weight.grad is None for weight in self.weights), "it would add to gradients that lie elsewhere"
        self.work = work
        held = [weight.detach().clone() for weight in self.weights]
        self.values = work().clone()
        self.gradients = [weight.grad for weight in self.weights]
        with torch.no_grad():  # recording does nothing to the weights
            for weight, before in zip(self.weights, held, strict=True):
                weight.copy_(before)
        self.values.fill_(float("nan"))
        return self.values

    def play(self) -> None:
        self.played.append(self)
        for weight in self.weights:
            weight.grad = None
        self.values.copy_(self.work())
        for place, weight in zip(self.gradients, self.weights, strict=True):
            place.copy_(weight.grad)
            weight.grad = None


class Refusing(RecordingTape):
    """As where a library can't be captured."""

    def record(self, work, generator: torch.Generator) -> Tensor:
        work_result = generator.initial_seed()
        raise RuntimeError(f"operation not permitted\nwhen stream is capturing ({work_result})")


class Training:
    """A small network in training, plain or recorded. No running averages, so that recording can be undone."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = DetectorDescriptor(SETTINGS.network.shape)
        self.weights = list(self.model.parameters())
        self.played: list[RecordingTape] = []
        self.said: list[str] = []

    def step(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        self.model.zero_grad()
        losses = stage1_losses(self.model, batch, SETTINGS.with_precision("float32").stage1_step(), generator)
        losses.total().backward()
        with torch.no_grad():
            for weight in self.weights:
                weight.sub_(weight.grad, alpha=1e-3)
        finite = torch.isfinite(torch.stack([weight.grad.sum() for weight in self.weights])).all()
        return losses.metrics() | {"finite": finite}

    def recorded(self, tape: type[RecordingTape] = RecordingTape) -> Replayed:
        return Replayed(self.step, self.weights, lambda: tape(self.weights, self.played), self.said.append)


def some_batch(side: int, labels: int, seed: int) -> Batch:
    """Four images of a size, with so many labels each."""
    batch = random_batch(4, SETTINGS.network.input_size, SETTINGS.cluster.clusters)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (4, side, side + 8, 3), generator=generator).to(torch.uint8)
    stored = torch.full((4, 2), float(side))
    return replace(
        batch, images=images, stored=stored, points=batch.points[:, :labels], cluster=batch.cluster[:, :labels]
    )


def test_recorded_steps_are_the_plain_ones() -> None:
    """Of three shapes in turns, from before recording until long after: to the bit those of the padded batches."""
    plain, other = Training(), Training()
    recorded, generator = other.recorded(), torch.Generator()
    for number in range(4 * PLAIN_STEPS):
        batch = some_batch((40, 70, 44)[number % 3], (3, 20, 7)[number % 3], number)
        held = empty(batch, padded_shapes(batch))
        fill(held, batch)
        expected = plain.step(held, generator.manual_seed(number))
        found = recorded(batch, number)
        assert {name: float(value.detach()) for name, value in expected.items()} == {
            name: float(value.detach()) for name, value in found.items()
        }
        for ours, theirs in zip(other.weights, plain.weights, strict=True):
            assert torch.equal(ours.grad, theirs.grad)
    assert len(set(other.played)) == 2 and not other.said  # 40 and 44 pixels are padded to one shape


def test_results_outlive_the_next_step() -> None:
    """They are looked at many steps later; what a graph writes is overwritten by its next play."""
    recorded = Training().recorded()
    batches = [some_batch(40, 5, seed) for seed in range(PLAIN_STEPS + 3)]
    found = [recorded(batch, seed)["loss"].detach() for seed, batch in enumerate(batches)]
    assert len({float(loss) for loss in found}) == len(found)


def test_where_recording_fails_it_is_said_once_and_steps_are_plain() -> None:
    plain, other = Training(), Training()
    recorded, generator = other.recorded(Refusing), torch.Generator()
    for number in range(2 * PLAIN_STEPS):
        batch = some_batch(64, LABEL_MULTIPLE, number)
        batch = replace(batch, images=batch.images[:, :, :64].contiguous())  # nothing is padded
        expected, found = plain.step(batch, generator.manual_seed(number)), recorded(batch, number)
        assert torch.equal(found["loss"], expected["loss"])
    assert other.said == ["operation not permitted when stream is capturing (3)"] and not other.played


def test_more_shapes_than_are_kept_are_plain_steps() -> None:
    training = Training()
    recorded = training.recorded()
    for side in range(64, 64 * (MOST_SHAPES + 2), 64):
        recorded(replace(some_batch(64, 5, side), images=torch.zeros(4, 64, side, 3, dtype=torch.uint8)), side)
    assert len(recorded._shapes) == MOST_SHAPES


@pytest.mark.parametrize(("side", "labels"), [(40, 3), (64, 16), (65, 17)])
def test_a_batch_in_a_larger_one_is_the_same_with_padding(side: int, labels: int) -> None:
    batch = some_batch(side, labels, 0)
    shapes = padded_shapes(batch)
    tensors = tensors_of(batch).values()
    held = Batch(batch.keys, *(tensor.new_full(shape, 7) for tensor, shape in zip(tensors, shapes, strict=True)))
    fill(held, batch)
    rows, columns = batch.images.shape[1:3]
    assert torch.equal(held.images[:, :rows, :columns], batch.images) and held.images.sum() == batch.images.sum()
    assert torch.equal(held.points[:, :labels], batch.points) and torch.equal(held.cluster[:, :labels], batch.cluster)
    assert (held.cluster[:, labels:] == -1).all() and torch.equal(held.to_view, batch.to_view)
    views, padded = (warp_images(each.images, each.to_view, side) for each in (batch, held))
    torch.testing.assert_close(views, padded, rtol=0, atol=1e-4)  # black beyond the image is what there was before


def test_an_update_that_is_recorded_reads_its_rate_where_it_lies() -> None:
    """On CPUs the rate is a number; on GPUs a tensor, which a recorded step reads. Both move by `set_rate`."""
    training = Training()
    update = Update(training.model, 1e-3, 0.0)
    for weight in training.weights:
        weight.grad = torch.ones_like(weight)
    before = [weight.detach().clone() for weight in training.weights]
    update.set_rate(0.0)
    update.step()
    assert all(torch.equal(a, b) for a, b in zip(before, training.weights, strict=True))
    update.set_rate(1e-2)
    update.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, training.weights, strict=True))
