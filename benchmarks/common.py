"""What all benchmarks say about where and how they ran, how they sum up repeats, and the sizes that they take.

Needs torch and numpy alone: benchmarks of the GPU run on machines that have nothing else.
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch

from sst.nn.augment import STRONGER, Augmentation
from sst.nn.network import NetworkShape
from sst.nn.precision import Precision

Size = Literal["full", "cpu"]


def settings_of(size: Size, precision: Precision = "auto") -> Any:
    """What a step asks of `sst.config.TrainSettings`, which needs more than torch: celeba's or faces-cpu's."""
    full = size == "full"
    shape = NetworkShape() if full else NetworkShape(width=64, depth=3, groups=8, descriptor_size=64)
    return SimpleNamespace(
        network=SimpleNamespace(input_size=256 if full else 96, shape=shape),
        cluster=SimpleNamespace(clusters=100 if full else 30),
        stage1=SimpleNamespace(
            pairs=16,
            augmentation=Augmentation(),
            different_share=0.5,
            margin=0.8,
            descriptor_weight=10.0,
            detector_weight=1.0 if full else 2.0,
            detector_target="cell" if full else "bump",
            threshold=0.2 if full else 0.15,
        ),
        stage2=SimpleNamespace(batch=64 if full else 32, augmentation=STRONGER, flip_share=0.0),
        resources=SimpleNamespace(precision=precision),
    )


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
