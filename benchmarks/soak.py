"""Does a run survive an hour of being killed and stopped? `python -m benchmarks.soak --minutes 60 --every 120`.

Trains on the embedded corpus twice, with equal settings: once undisturbed, once while a process of the run (a worker,
the k-means actor or the driver) is killed at random about every so many seconds, or a worker is stopped, so that it
hangs; a killed driver's command is given again.
Says whether both ended with equal weights and labels, how much time a kill cost, whether memory grew, and what was left
over. A kill is recovered from when the run is further than it was at the kill, lost steps done again.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import tyro
from rich.console import Console
from rich.table import Table

from sst.config import TrainSettings
from sst.presets import PRESETS
from sst.run.estimate import scaled

DEMO_MINUTES = 8.0
"""What the toy-cpu preset takes on two cores."""

VICTIMS = {"worker": "RayTrainWorker", "stopped worker": "RayTrainWorker", "k-means actor": "KMeansActor"}


@dataclass
class Observed:
    """What was seen of one run.

    Attributes:
        seconds: wall time.
        kills: how often each kind of process was killed.
        memory: (seconds, proportional memory of all processes in MB) every few seconds.
        recoveries: seconds from a kill to new progress, by kind of process.
    """

    seconds: float = 0.0
    kills: dict[str, int] = field(default_factory=dict)
    memory: list[tuple[float, float]] = field(default_factory=list)
    recoveries: dict[str, list[float]] = field(default_factory=dict)


def arguments(settings: TrainSettings, folder: Path, name: str) -> list[str]:
    """The command line of a run with these settings."""
    one, two = settings.stage1, settings.stage2
    given = {
        "shards": folder / "shards", "name": name, "runs": folder / "runs", "tracking": f"sqlite:///{folder}/mlflow.db",
        "stage1.warmup-iterations": one.warmup_iterations, "stage1.rounds": one.rounds,
        "stage1.round-iterations": one.round_iterations, "stage2.iterations": two.iterations,
        "stage2.refine-rounds": two.refine_rounds, "stage2.refine-iterations": two.refine_iterations,
        "resources.max-failures": 1_000, "resources.checkpoint-steps": 100, "workers": 2,
        "resources.hang-minutes": 0.5,
    }  # fmt: skip
    words = [word for option, value in given.items() for word in (f"--{option}", str(value))]
    return [sys.executable, "-m", "jobs.train", "toy-cpu", *words]


def tree(process: psutil.Popen) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def memory_mb(process: psutil.Popen) -> float:
    """Proportional set sizes of a process and all below it, in MB."""
    total = 0.0
    for each in tree(process):
        try:
            total += each.memory_full_info().pss / 1e6
        except psutil.Error:
            continue
    return total


def kill_one(process: psutil.Popen, rng: random.Random) -> str | None:
    """Kills or stops a random process of the run; returns its kind, or None where there is none of the kind drawn."""
    kind = rng.choice(["worker", "stopped worker", "k-means actor", "driver"])
    if kind == "driver":
        for each in tree(process):
            each.kill()
        return kind
    found = []
    for each in tree(process):
        try:
            if VICTIMS[kind] in " ".join(each.cmdline()):
                found.append(each)
        except psutil.Error:
            continue
    if not found:
        return None
    one = rng.choice(found)
    if kind == "stopped worker":
        one.suspend()
    else:
        one.kill()
    return kind


def progress(run: Path) -> tuple[int, int]:
    """(steps, kinds of lines): how far a run has ever been; a line written again does not count."""
    lines, step, seen = run / "metrics.jsonl", 0, set()
    for raw in lines.read_text().splitlines() if lines.exists() else []:
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        step = max(step, line.get("step", 0))
        seen.add((line.get("kind"), line.get("what"), line.get("done"), line.get("round"), step))
    return step, len(seen)


def watch(command: list[str], run: Path, every: float | None, seed: int) -> Observed:
    """Runs a command to its good end, killing if asked.

    Raises:
        RuntimeError: if it ends with an error that nobody killed it for.
    """
    seen, rng, started = Observed(), random.Random(seed), time.monotonic()
    next_kill = started + (every or 0) * rng.uniform(0.5, 1.5)
    hurt: tuple[str, float, tuple[int, int]] | None = None
    while True:
        errors = tempfile.TemporaryFile()  # a pipe that nobody reads would stop the run when it is full
        process, driver_killed = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=errors), False
        while process.poll() is None:
            seen.memory.append((time.monotonic() - started, memory_mb(process)))
            time.sleep(2)
            if hurt and progress(run) > hurt[2]:
                kind, at, _ = hurt
                seen.recoveries.setdefault(kind, []).append(time.monotonic() - at)
                print(f"{time.monotonic() - started:6.0f} s: further than before", flush=True)
                hurt = None
            before = progress(run)
            if every and time.monotonic() > next_kill and (kind := kill_one(process, rng)):
                seen.kills[kind] = seen.kills.get(kind, 0) + 1
                next_kill = time.monotonic() + every * rng.uniform(0.5, 1.5)
                driver_killed = kind == "driver"
                hurt = hurt or (kind, time.monotonic(), before)
                print(f"{time.monotonic() - started:6.0f} s: {kind}", flush=True)
        if process.returncode == 0:
            seen.seconds = time.monotonic() - started
            return seen
        if not driver_killed:
            errors.seek(0)
            raise RuntimeError(f"exit code {process.returncode}: {errors.read().decode()[-2000:]}")


def contents(run: Path) -> dict[str, bytes]:
    """Weights and labels of a run, by name."""
    kept = [*run.glob("model/*"), *run.glob("rounds/*/labels/*"), *run.glob("predictions/*")]
    return {str(path.relative_to(run)): path.read_bytes() for path in kept}


def names(run: Path) -> set[str]:
    """Files of a run, apart from Ray's own."""
    every = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    return {str(path) for path in every if path.parts[0] != "ray"}


def main(minutes: float = 60.0, every: float = 120.0, seed: int = 0, images: int = 2000) -> None:
    """Prints what was seen.

    Args:
        minutes: of the disturbed run, about.
        every: seconds between two kills, about.
        seed: of the kills.
        images: drawings to train on.
    """
    settings = scaled(PRESETS["toy-cpu"][1], 0.6 * minutes / DEMO_MINUTES)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pack = f"toy --count {images} --out {folder}/shards".split()
        subprocess.run([sys.executable, "-m", "jobs.pack", *pack], check=True, stdout=subprocess.DEVNULL)
        runs = folder / "runs"
        calm = watch(arguments(settings, folder, "calm"), runs / "calm", None, seed)
        print(f"undisturbed: {calm.seconds:.0f} s", flush=True)
        wild = watch(arguments(settings, folder, "wild"), runs / "wild", every, seed)
        equal = contents(runs / "calm") == contents(runs / "wild")
        left_over = sorted(names(runs / "wild") - names(runs / "calm"))
    kills = sum(wild.kills.values())
    thirds = [[mb for at, mb in wild.memory if part <= 3 * at / wild.seconds < part + 1] or [0.0] for part in range(3)]
    table = Table("", "undisturbed", "disturbed", title=f"soak of {minutes:g} minutes, a fault about every {every:g} s")
    table.add_row("seconds", f"{calm.seconds:.0f}", f"{wild.seconds:.0f}")
    table.add_row("faults", "0", ", ".join(f"{count} x {kind}" for kind, count in sorted(wild.kills.items())))
    table.add_row("seconds lost per fault", "", f"{(wild.seconds - calm.seconds) / max(1, kills):.1f}")
    for kind, seconds in sorted(wild.recoveries.items()):
        spread = f"{statistics.median(seconds):.0f} ({min(seconds):.0f} to {max(seconds):.0f})"
        table.add_row(f"seconds to new progress: {kind}", "", spread)
    peaks = " / ".join(f"{max(part):.0f}" for part in thirds)
    table.add_row("peak memory, MB", f"{max(mb for _, mb in calm.memory):.0f}", f"{peaks} (by thirds)")
    table.add_row("weights, labels, predictions", "", "equal, bit for bit" if equal else "DIFFERENT")
    table.add_row("files left over", "", ", ".join(left_over) or "none")
    Console().print(table)
    if not equal or left_over:
        sys.exit(1)


if __name__ == "__main__":
    tyro.cli(main)
