"""What do two workers give that one does not? `python -m benchmarks.scaling --pairs 8`.

Each worker has one core, one thread and equal work: stage-1 steps at the faces-cpu size. One worker, two that average
their gradients by DDP, and two that know nothing of each other take turns, so that what memory and clock cost two busy
cores is told apart from what the exchange costs. Bytes are those that the loopback interface has seen.
"""

import multiprocessing as mp
import os
import socket
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import idle_share, machine, summed_up
from sst.config import TrainSettings
from sst.nn.network import DetectorDescriptor
from sst.nn.steps import random_batch, stage1_losses
from sst.presets import PRESETS
from sst.train.workers import Group

WARM_UP = 2
LINK = 100e9 / 8
"""Bytes per second of a 100 Gbit/s link."""

STEP_FLOP = 62e9
"""Of a training step per image at full size."""

GPU_FLOPS = 300e12
"""What is assumed of one GPU on paper: a third of the matrix peak of an H100 or H200 in bf16."""


def loopback_bytes() -> int:
    """Bytes that the loopback interface has sent."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def worker(rank: int, world: int, joined: bool, pairs: int, steps: int, port: int, queue: mp.Queue) -> None:
    """Takes steps on one core, and tells their seconds and the bytes sent meanwhile."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    settings = PRESETS["faces-cpu"][1]
    torch.manual_seed(0)
    model = DetectorDescriptor(settings.network.shape).train()
    wrapped = Group(rank, world if joined else 1).wrap(model)
    batch, generator = (
        random_batch(pairs, settings.network.input_size, settings.cluster.clusters),
        torch.Generator().manual_seed(rank),
    )
    taken, sent = [], 0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            dist.barrier()
            sent = loopback_bytes()
        started = time.perf_counter()
        model.zero_grad()
        stage1_losses(wrapped, batch, settings.stage1_step(), generator).total().backward()
        taken.append(time.perf_counter() - started)
    dist.barrier()
    sent = loopback_bytes() - sent
    queue.put((taken[WARM_UP:], sent / steps))
    dist.destroy_process_group()


def measure(world: int, joined: bool, pairs: int, steps: int) -> tuple[float, float]:
    """(median seconds of a step, bytes per step over all workers)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    given = [(rank, world, joined, pairs, steps, port, queue) for rank in range(world)]
    processes = [context.Process(target=worker, args=each) for each in given]
    for process in processes:
        process.start()
    results = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return max(statistics.median(taken) for taken, _ in results), max(sent for _, sent in results)


def parameters(settings: TrainSettings) -> int:
    """Number of weights of the stage-1 network."""
    with torch.device("meta"):
        return sum(p.numel() for p in DetectorDescriptor(settings.network.shape).parameters())


def on_paper(gpus: int) -> tuple[float, float, float]:
    """For the full size on so many GPUs, at 32 images each: (ms computing, ms sending, efficiency if nothing overlaps).

    A ring sends 2 (n - 1) / n times the gradients over every link.
    """
    settings = TrainSettings()
    compute = 32 * STEP_FLOP / GPU_FLOPS
    sending = 2 * (gpus - 1) / gpus * 4 * parameters(settings) / LINK
    return 1e3 * compute, 1e3 * sending, compute / (compute + sending)


def main(pairs: int = 8, steps: int = 12, repeats: int = 5) -> None:
    """Measures and prints two tables.

    Args:
        pairs: pairs of views per worker and step.
        steps: timed steps of a repeat.
        repeats: of each kind, in turns.
    """
    console = Console(width=120)
    console.print(machine(), f"idle before: {100 * idle_share():.0f} %")
    kinds = {"1 worker": (1, False), "2 workers, DDP": (2, True), "2 workers, each alone": (2, False)}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    sent: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, (world, joined) in kinds.items():
            taken, through = measure(world, joined, pairs, steps)
            seconds[name].append(taken)
            sent[name].append(through)
    table = Table("", "seconds per step", "images/s", "efficiency to 1 worker", "kB per step", title="stage-1 step")
    for name, (world, _) in kinds.items():
        ratios = [one / each for one, each in zip(seconds["1 worker"], seconds[name], strict=True)]
        rate = 2 * pairs * world / statistics.median(seconds[name])
        table.add_row(
            name,
            summed_up(seconds[name]),
            f"{rate:.1f}",
            summed_up(ratios),
            f"{statistics.median(sent[name]) / 1e3:.0f}",
        )
    console.print(table)
    small = parameters(PRESETS["faces-cpu"][1])
    console.print(f"gradients of one worker: {small} weights, {4 * small / 1e3:.0f} kB in float32")
    paper = Table("GPUs", "ms computing", "ms sending", "efficiency without overlap", title="on paper, full size")
    for gpus in (8, 64):
        compute, sending, efficiency = on_paper(gpus)
        paper.add_row(str(gpus), f"{compute:.1f}", f"{sending:.1f}", f"{100 * efficiency:.0f} %")
    console.print(paper, f"{parameters(TrainSettings())} weights")


if __name__ == "__main__":
    tyro.cli(main)
