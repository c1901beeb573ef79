"""Does peak memory grow with the number of images? `python -m benchmarks.memory --counts 1000 20000`.

Packs the embedded corpus and runs a whole run with a tiny network for each number of images, in a process of
its own, and watches every process below it. Largest: the highest resident memory of any single process. Total:
the highest sum of the proportional set sizes of all of them.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro
from rich.console import Console
from rich.table import Table

SCHEDULE = """
--network.width 16 --network.depth 2 --network.groups 2 --network.descriptor-size 16 --keypoints.max-num-keypoints 20
--cluster.sample 10000 --stage1.warmup-iterations 60 --stage1.rounds 1 --stage1.round-iterations 60
--stage2.iterations 120 --stage2.refine-rounds 1 --stage2.refine-iterations 60
""".split()


@dataclass(frozen=True)
class Peak:
    """Highest memory seen, in MB."""

    largest: float
    total: float
    seconds: float


def watch(command: list[str]) -> Peak:
    """Runs a command and watches the memory of all its processes.

    Raises:
        RuntimeError: if it fails.
    """
    started, largest, total = time.monotonic(), 0.0, 0.0
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        resident, proportional = [], []
        for each in [process, *process.children(recursive=True)]:
            try:
                memory = each.memory_full_info()
                resident.append(memory.rss)
                proportional.append(memory.pss)
            except psutil.Error:
                continue  # it has just ended
        largest, total = max([largest, *resident]), max(total, sum(proportional))
        time.sleep(0.5)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}")
    return Peak(largest / 1e6, total / 1e6, time.monotonic() - started)


def main(counts: tuple[int, ...] = (1_000, 20_000)) -> None:
    """Measures each number of images and prints the table so far after each.

    Args:
        counts: numbers of images.
    """
    table = Table("images", "pack: largest MB", "train: largest MB", "train: total MB", "train: s")
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            shards, database = str(Path(folder, "shards")), f"sqlite:///{folder}/mlflow.db"
            packed = watch(
                [sys.executable, "-m", "jobs.pack", "toy", "--count", str(count), "--size", "64", "--out", shards]
            )
            place = ["--shards", shards, "--name", "memory", "--runs", folder, "--tracking", database]
            trained = watch([sys.executable, "-m", "jobs.train", "toy-cpu", *place, *SCHEDULE])
        metrics = (packed.largest, trained.largest, trained.total, trained.seconds)
        table.add_row(f"{count:,}", *(f"{value:.0f}" for value in metrics))
        Console().print(table)  # the next number of images may take an hour


if __name__ == "__main__":
    tyro.cli(main)
