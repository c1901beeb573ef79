"""What all benchmarks say about where and how they ran, and how they sum up repeats."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import torch

from sst.tracking import git_commit


def machine() -> str:
    """Hardware, commit and versions, in one line."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    found = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in found.read_text().splitlines() if "model name" in line]
    cpu = models[0] if models else platform.processor()
    versions = " ".join(f"{name} {metadata.version(name)}" for name in ("torch", "numpy"))
    commit = (git_commit() or "no commit")[:18]
    return (
        f"{len(os.sched_getaffinity(0))} cores ({cpu}), {gpu}, {versions}, python {platform.python_version()}, {commit}"
    )


def summed_up(values: Sequence[float], digits: int = 3) -> str:
    """Median, and in brackets the smallest and largest."""
    middle = statistics.median(values)
    return f"{middle:.{digits}g} ({min(values):.{digits}g} to {max(values):.{digits}g})"


def idle_share() -> float:
    """Share of the machine that other processes leave idle just now; figures taken beside other work say little."""
    first = _cpu_times()
    subprocess.run(["sleep", "1"], check=True)
    second = _cpu_times()
    spent = [b - a for a, b in zip(first, second, strict=True)]
    return (spent[3] + spent[4]) / max(1, sum(spent))


def _cpu_times() -> list[int]:
    return [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]


def core_seconds(work: Callable[[], object], repeats: int = 5, warm_up: int = 1) -> list[float]:
    """CPU seconds of this process, all threads together, for each repeat; other processes do not count."""
    taken = []
    for number in range(warm_up + repeats):
        started = time.process_time()
        work()
        if number >= warm_up:
            taken.append(time.process_time() - started)
    return taken
