"""A step's gradient is that of the whole batch, however many workers share it."""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from sst.nn.augment import Augmentation
from sst.nn.network import DetectorDescriptor, LandmarkDetector, NetworkShape
from sst.nn.steps import Batch, Losses, Stage1Step, Stage2Step, random_batch, stage1_losses, stage2_losses
from sst.train.workers import Group

CLUSTERS, SIDE = 60, 32
STILL = Augmentation(
    blur_probability=0,
    contrast=(1, 1),
    noise_probability=0,
    brightness=(1, 1),
    colour_probability=0,
    scale=(1, 1),
    shift=0,
    rotation=0,
)
"""Two views of an image are the same, so that they do not depend on who draws them."""


def uneven_batch() -> Batch:
    """Eight images, of which the first has all 60 labels and the others few."""
    batch, rng = random_batch(8, SIDE, CLUSTERS), torch.Generator().manual_seed(1)
    cluster = torch.full((8, CLUSTERS), -1)
    for row, labels in enumerate((60, 2, 3, 9, 4, 12, 2, 20)):
        cluster[row, :labels] = torch.randperm(CLUSTERS, generator=rng)[:labels]
    points = torch.rand(8, CLUSTERS, 2, generator=rng) * (SIDE // 4 - 1)
    return replace(batch, points=points, cluster=cluster)


def share_of(batch: Batch, rows: slice) -> Batch:
    tensors = (batch.images, batch.stored, batch.to_view, batch.points, batch.cluster)
    return Batch(batch.keys[rows], *(tensor[rows] for tensor in tensors))


def network_of(stage: int) -> nn.Module:
    torch.manual_seed(0)
    shape = NetworkShape(width=16, depth=1, groups=2, descriptor_size=16)
    return DetectorDescriptor(shape) if stage == 1 else LandmarkDetector(shape, CLUSTERS)


def losses_of(stage: int, network: nn.Module, batch: Batch) -> Losses:
    generator = torch.Generator().manual_seed(0)
    if stage == 1:
        step = Stage1Step(input_size=SIDE, precision="float32", different_share=0.0, augmentation=STILL)
        return stage1_losses(network, batch, step, generator)
    active = torch.arange(CLUSTERS) % 7 > 0
    return stage2_losses(network, batch, active, Stage2Step(SIDE, "float32", augmentation=STILL), generator)


def gradients(network: nn.Module) -> list[Tensor]:
    return [weight.grad.clone() for weight in network.parameters() if weight.grad is not None]


def of_workers(stage: int, world: int) -> list[Tensor]:
    """Gradient of a batch that so many workers share, each in its turn."""
    network, batch = network_of(stage), uneven_batch()
    size = len(batch.keys) // world
    shares = [losses_of(stage, network, share_of(batch, slice(n * size, (n + 1) * size))) for n in range(world)]
    counts = torch.stack([losses.counts for losses in shares]).sum(0)
    torch.stack([losses.total(counts) for losses in shares]).sum().backward()
    return gradients(network)


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_of_one_two_and_four_workers_are_equal(stage: int) -> None:
    alone = of_workers(stage, 1)
    assert max(float(gradient.abs().max()) for gradient in alone) > 1e-4
    for world in (2, 4):
        torch.testing.assert_close(of_workers(stage, world), alone, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_means_of_shares_are_not_the_mean_of_the_batch(stage: int) -> None:
    """What this is for: the uneven labels above do tell the two apart."""
    network, batch = network_of(stage), uneven_batch()
    shares = [losses_of(stage, network, share_of(batch, slice(n, n + 2))) for n in range(0, 8, 2)]
    torch.stack([losses.scale * losses.metrics()["loss"] / 4 for losses in shares]).sum().backward()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gradients(network), of_workers(stage, 1), atol=1e-6, rtol=1e-2)


def work(rank: int, folder: str) -> None:
    """One of two workers: a step of each stage on its half of the batch; the first leaves its gradients."""
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    group = Group(rank, 2)
    found: list[list[Tensor]] = []
    for stage in (1, 2):
        network = network_of(stage)
        wrapped = group.wrap(network)
        losses = losses_of(stage, wrapped, share_of(uneven_batch(), slice(4 * rank, 4 * rank + 4)))
        (losses.total(group.total(losses.counts)) * group.world).backward()
        found.append(gradients(network))
    if rank == 0:
        torch.save(found, f"{folder}/gradients")
    dist.destroy_process_group()


def together(work: Callable[[int, str], None], world: int, folder: Path) -> None:
    """Runs workers in processes of their own."""
    every = [mp.get_context("spawn").Process(target=work, args=(rank, str(folder))) for rank in range(world)]
    for one in every:
        one.start()
    end = time.monotonic() + 150
    for one in every:
        one.join(max(0.0, end - time.monotonic()))
        one.kill()  # where it hangs: two that wait for each other would keep the tests from ending
        one.join()
    assert [one.exitcode for one in every] == [0] * world


def steps(rank: int, folder: str) -> None:
    """One of three workers: four steps, and once more, beginning anew after two as a resumed run does."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=3, timeout=timedelta(seconds=60))
    group, mine = Group(rank, 3), share_of(uneven_batch(), [slice(0, 2), slice(2, 5), slice(5, 8)][rank])
    ends = []
    for begins in ((0,), (0, 2)):
        network = network_of(1)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        for step in range(4):
            if step in begins:
                wrapped = group.wrap(network)
            optimizer.zero_grad()
            losses = losses_of(1, wrapped, mine)
            (losses.total(group.total(losses.counts)) * group.world).backward()
            optimizer.step()
        ends.append([weight.detach().clone() for weight in network.parameters()])
    if rank == 0:
        torch.save(ends, f"{folder}/weights")
    dist.destroy_process_group()


def test_three_workers_that_begin_anew_go_on_bit_for_bit(tmp_path) -> None:
    together(steps, 3, tmp_path)
    undisturbed, resumed = torch.load(tmp_path / "weights")
    assert all(torch.equal(one, other) for one, other in zip(undisturbed, resumed, strict=True))


def test_two_processes_have_the_gradient_of_one(tmp_path) -> None:
    together(work, 2, tmp_path)
    for stage, gradient in zip((1, 2), torch.load(tmp_path / "gradients"), strict=True):
        torch.testing.assert_close(gradient, of_workers(stage, 1), atol=1e-6, rtol=1e-4)
