"""What all benchmarks say about where and how they ran, how they sum up repeats, and the sizes that they take.

Needs torch and numpy alone: benchmarks of the GPU run on machines that have nothing else.
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from sst.nn.network import NetworkShape
from sst.nn.precision import Precision
from sst.nn.steps import Stage1Step, Stage2Step

Size = Literal["full", "cpu"]


@dataclass(frozen=True)
class Sizes:
    """What a benchmark of the device takes: network, batches and steps as in training.

    Attributes:
        shape: of the network.
        clusters: K.
        pairs: pairs of views in a step of stage 1.
        batch: images in a step of stage 2.
        threshold: detector confidence above which a keypoint is taken.
        stage1: what a step of stage 1 needs to know.
        stage2: likewise of stage 2.
    """

    shape: NetworkShape
    clusters: int
    pairs: int
    batch: int
    threshold: float
    stage1: Stage1Step
    stage2: Stage2Step


def sizes_of(size: Size, precision: Precision = "auto") -> Sizes:
    """The published sizes, which need torch alone, or those of the preset faces-cpu."""
    if size == "full":
        steps = Stage1Step(precision=precision), Stage2Step(precision=precision)
        return Sizes(NetworkShape(), 100, 16, 64, 0.2, *steps)
    from sst.presets import PRESETS  # not on a bare GPU machine

    given = PRESETS["faces-cpu"][1].with_precision(precision)
    one, two = given.stage1, given.stage2
    steps = given.stage1_step(), given.stage2_step()
    return Sizes(given.network.shape, given.cluster.clusters, one.pairs, two.batch, one.threshold, *steps)


def machine() -> str:
    """Hardware, commit and versions, in one line."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    found = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in found.read_text().splitlines() if "model name" in line]
    cpu = models[0] if models else platform.processor()
    versions = " ".join(f"{name} {metadata.version(name)}" for name in ("torch", "numpy"))
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    commit = asked.stdout.strip() or "no commit"
    return (
        f"{len(os.sched_getaffinity(0))} cores ({cpu}), {gpu}, {versions}, python {platform.python_version()}, {commit}"
    )


def device_of_run() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def wall_seconds(work: Callable[[], object], repeats: int = 5, warm_up: int = 1) -> list[float]:
    """Seconds of each repeat, the GPU's work included."""
    taken = []
    for number in range(warm_up + repeats):
        synchronise()
        started = time.perf_counter()
        work()
        synchronise()
        if number >= warm_up:
            taken.append(time.perf_counter() - started)
    return taken


def core_seconds(work: Callable[[], object], repeats: int = 5, warm_up: int = 1) -> list[float]:
    """CPU seconds of this process, all threads together, for each repeat; other processes do not count."""
    taken = []
    for number in range(warm_up + repeats):
        started = time.process_time()
        work()
        if number >= warm_up:
            taken.append(time.process_time() - started)
    return taken


def idle_share() -> float:
    """Share of the machine that other processes leave idle just now; figures taken beside other work say little."""
    first = _cpu_times()
    time.sleep(1)
    second = _cpu_times()
    spent = [b - a for a, b in zip(first, second, strict=True)]
    return (spent[3] + spent[4]) / max(1, sum(spent))


def _cpu_times() -> list[int]:
    return [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]


def summed_up(values: Sequence[float], digits: int = 3) -> str:
    """Median, and in brackets the smallest and largest."""
    middle = statistics.median(values)
    return f"{middle:.{digits}g} ({min(values):.{digits}g} to {max(values):.{digits}g})"


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints aligned columns as a Markdown table, to be kept in RESULTS.md."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
