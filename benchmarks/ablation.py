"""What does each choice of the method give? `python -m benchmarks.ablation --corpus SHARDS`.

Trains the base and then every choice of `CHOICES`, one at a time against it, by the whole pipeline: on drawings with
the preset toy-cpu, and on a packed corpus with annotations with faces-cpu. All schedules are `--share` of the presets';
a choice's factors count from there. The table has the median over the seeds, and the smallest and largest: forward and
backward error in per cent, landmarks in over 80 % of the images, and seconds of wall clock, the start of Ray and the
report included. Where no landmark could be scored, an error counts as larger than any.

What is finished is kept in OUT/rows.jsonl as soon as it is, and the same command trains only what is not there yet:
what a row was trained with and on is compared, not its name. A run that was interrupted begins anew, since its seconds
count. The first seed is trained for all choices before the second. Runs lie in OUT/runs, where
`python -m benchmarks.labels` says what became of a choice's labels.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from pydantic import BaseModel, ConfigDict

from benchmarks.checks import DidNotHold, isolated
from benchmarks.common import idle_share, machine, print_table
from cluster import storage
from sst.config import TrainSettings
from sst.corpora.sources import Toy, pack_source
from sst.data.corpus import open_corpus
from sst.data.shards import MANIFEST
from sst.errors import UserError, exit_on_user_error
from sst.presets import PRESETS
from sst.progress import clock
from sst.run.estimate import scaled
from sst.run.tracking import Tracking
from sst.tune.search_space import with_values


@dataclass(frozen=True)
class Times:
    """The base's value times a factor, for what differs between presets."""

    factor: float


CHOICES: dict[str, dict[str, Any]] = {
    "squared error in stage 2": {
        "stage2.objective": "squared",
        "stage2.optimizer": "rmsprop",
        "stage2.learning_rate": 5e-4,
        "stage2.weight_decay": 0.0,
        "stage2.visible": 0.2,
    },
    "old labels united": {"stage1.unite": True},
    "no refinement": {"stage2.refine_rounds": 0, "stage2.iterations": Times(4)},
    "as many clusters as landmarks": {"cluster.clusters": Times(2 / 3)},
    "three clusters a landmark": {"cluster.clusters": Times(2)},
    "mirrored views": {"stage1.flip_share": 0.5, "stage2.flip_share": 0.5},
    "nothing covered": {"stage2.occlude_share": 0.0},
    "focal loss in the detector": {"stage1.detector_objective": "focal", "stage1.threshold": 0.25},
    "softmax contrast": {"stage1.contrast": "softmax", "stage1.descriptor_weight": 0.1},
    "warm-up on points": {"stage1.warmup_classes": "points"},
    "half the warm-up": {"stage1.warmup_iterations": Times(0.5)},
    "twice the warm-up": {"stage1.warmup_iterations": Times(2)},
    "detector draws cells": {"stage1.detector_target": "cell"},
    "cluster numbers afresh": {"cluster.keep_identities": False},
}
"""Name of a choice: the settings, by dotted name, in which it differs from the base."""

BASE = "base"
DRAWINGS = "drawings"

LONGEST = 6 * 3600.0
"""Seconds after which a run is taken to hang."""


class Row(BaseModel):
    """One finished run.

    Attributes:
        choice: name of the choice.
        corpus: name of the corpus.
        seed: of the run.
        key: of settings and corpus, see `Task.key`.
        commit: of the code.
        forward: error, as a fraction; None where no landmark could be scored.
        backward: likewise.
        kept: landmarks in over 80 % of the images.
        seconds: wall clock.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    choice: str
    corpus: str
    seed: int
    key: str
    commit: str
    forward: float | None
    backward: float | None
    kept: int
    seconds: float


@dataclass(frozen=True)
class Task:
    """One run to be trained.

    Attributes:
        choice: name of the choice.
        corpus: name of the corpus.
        shards: where it lies.
        manifest: sha256 of its manifest.
        settings: of the run, the seed included.
    """

    choice: str
    corpus: str
    shards: str
    manifest: str
    settings: TrainSettings

    @property
    def key(self) -> str:
        """What tells runs apart that were trained differently or on other images."""
        return storage.sha256(f"{self.manifest}\n{self.settings.method_json()}".encode())

    @property
    def name(self) -> str:
        """Of its run directory."""
        return f"{self.corpus}-{self.choice.replace(' ', '-')}-{self.settings.seed}"


def changed(settings: TrainSettings, choice: Mapping[str, Any]) -> TrainSettings:
    """The settings with those of a choice.

    Raises:
        UserError: if there is no such setting, or it does not take the value.
    """
    values = {}
    for name, value in choice.items():
        if isinstance(value, Times):
            before: Any = settings
            for part in name.split("."):
                before = getattr(before, part)
            value = type(before)(value.factor * before)
        values[name] = value
    return with_values(settings, values)


@dataclass(frozen=True)
class Basis:
    """A corpus and the settings against which choices are tried on it."""

    corpus: str
    shards: str
    settings: TrainSettings

    def tasks(self, choices: Sequence[str], seed: int) -> list[Task]:
        """The base and those choices that change something here."""
        manifest = open_corpus(self.shards).manifest_hash
        base = self.settings.changed(seed=seed)
        every = {BASE: base} | {name: changed(base, CHOICES[name]) for name in choices}
        return [
            Task(name, self.corpus, self.shards, manifest, settings)
            for name, settings in every.items()
            if name == BASE or settings != base
        ]


def rows_in(file: Path) -> list[Row]:
    """The rows that are kept."""
    return [Row.model_validate_json(line) for line in file.read_text().splitlines()] if file.exists() else []


def finish(tasks: Sequence[Task], file: Path, train: Callable[[Task], Row]) -> dict[str, Row]:
    """Trains what has no row yet, and keeps each row at once; says how long the rest will take.

    A run that fails is named and passed over; the next command tries it again.

    Returns:
        The rows of the tasks that have one, by key.
    """
    found = {row.key: row for row in rows_in(file)}
    left = [task for task in tasks if task.key not in found]
    print(f"{len(tasks) - len(left)} of {len(tasks)} runs are there already", flush=True)
    while left:
        task = left.pop(0)
        print(f"--- {task.name}", flush=True)
        try:
            row = train(task)
        except DidNotHold as error:
            print(f"    FAILED, and will be tried again by the next command: {error}", file=sys.stderr, flush=True)
            continue
        text = "".join(f"{each.model_dump_json()}\n" for each in [*rows_in(file), row])
        storage.write_bytes(str(file), text.encode())
        found[row.key] = row
        print(f"    {row.seconds:.0f} s; {time_left(left, list(found.values()))}", flush=True)
    return {task.key: found[task.key] for task in tasks if task.key in found}


def time_left(left: Sequence[Task], rows: Sequence[Row]) -> str:
    """From what runs on the same corpus took, or on any where there is none yet."""

    def seconds(corpus: str) -> float:
        return statistics.median([row.seconds for row in rows if row.corpus == corpus] or [r.seconds for r in rows])

    return f"{len(left)} runs to go, about {clock(sum(seconds(task.corpus) for task in left))}"


def run_row(task: Task, out: str, commit: str) -> str:
    """Trains one run from its start to its report, in this process; its row as JSON."""
    import ray

    from sst.run.pipeline import train_run

    url = storage.join(out, "runs", task.name)
    storage.remove(url)  # of a start that was interrupted, which would go on and make the seconds too few
    started = time.monotonic()
    tracking = Tracking(f"sqlite:///{Path(out).absolute()}/mlflow.db", "ablation", task.name)
    outcome = train_run(task.settings, task.shards, url, tracking)
    seconds, scores = time.monotonic() - started, outcome.scores
    ray.shutdown()
    if scores is None:
        raise DidNotHold(f"{task.shards} has no annotations to score with")
    forward, backward = (None if math.isnan(each) else each for each in (scores.forward, scores.backward))
    return Row(
        choice=task.choice,
        corpus=task.corpus,
        seed=task.settings.seed,
        key=task.key,
        commit=commit,
        forward=forward,
        backward=backward,
        kept=scores.landmarks_kept,
        seconds=seconds,
    ).model_dump_json()


def train_apart(task: Task, out: str, commit: str) -> Row:
    """As `run_row`, in a process of its own, which gives all memory back."""
    return Row.model_validate_json(isolated(run_row, task, out, commit, seconds=LONGEST))


def cell(values: Sequence[float | None], digits: int) -> str:
    """Median, and smallest and largest where there are several; a dash where there was none."""
    numbers = [math.inf if value is None else value for value in values]

    def shown(value: float) -> str:
        return f"{value:.{digits}f}" if math.isfinite(value) else "none"

    if not numbers:
        return "-"
    ends = f" ({shown(min(numbers))} to {shown(max(numbers))})" if len(numbers) > 1 else ""
    return shown(statistics.median(numbers)) + ends


COLUMNS: dict[str, Callable[[Row], float | None]] = {
    "forward, %": lambda row: None if row.forward is None else 100 * row.forward,
    "backward, %": lambda row: None if row.backward is None else 100 * row.backward,
    "landmarks": lambda row: row.kept,
    "seconds": lambda row: row.seconds,
}
"""Figures of a choice on a corpus."""


def table(tasks: Sequence[Task], rows: Mapping[str, Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: a choice in each, with its figures on every corpus, from rows by key."""
    corpora = list(dict.fromkeys(task.corpus for task in tasks))
    prefixes = [f"{corpus}: " if len(corpora) > 1 else "" for corpus in corpora]
    header = ["choice", *(prefix + name for prefix in prefixes for name in COLUMNS)]
    lines = []
    for choice in dict.fromkeys(task.choice for task in tasks):
        line = [choice]
        for corpus in corpora:
            keys = [task.key for task in tasks if (task.choice, task.corpus) == (choice, corpus)]
            mine = [rows[key] for key in keys if key in rows]
            for name, value in COLUMNS.items():
                line.append(cell([value(row) for row in mine], 2 if name.endswith("%") else 0) if keys else "as base")
        lines.append(line)
    return header, lines


@dataclass(frozen=True)
class Command:
    """What is trained on what."""

    corpus: str | None = None
    """Shards of an annotated corpus beside the drawings."""
    only: tuple[str, ...] = ()
    """Choices to try; all if not given."""
    seeds: tuple[int, ...] = (0, 1)
    """Of the runs."""
    share: float = 0.25
    """Length of the schedules, as a share of the presets'."""
    drawings: int = 2000
    """Number of drawings; 0 leaves them out."""
    out: Path = Path("runs/ablation")
    """Folder of rows, runs, logs and drawings."""

    def run(self) -> int:
        """Trains what is not there, prints the table and returns the exit code, 1 if a run failed.

        Raises:
            UserError: if a choice is unknown or there is nothing to train on.
        """
        unknown = [name for name in self.only if name not in CHOICES]
        if unknown:
            raise UserError(f"no choice is called {unknown[0]!r}; there are {', '.join(CHOICES)}")
        bases, choices = self.bases(), self.only or tuple(CHOICES)
        tasks = [task for seed in self.seeds for basis in bases for task in basis.tasks(choices, seed)]
        title = machine()
        print(f"{title}; idle before: {100 * idle_share():.0f} %", flush=True)
        train = partial(train_apart, out=str(self.out), commit=title.rsplit(", ", 1)[1])
        rows = finish(tasks, self.out / "rows.jsonl", train)
        commits = ", ".join(sorted({row.commit for row in rows.values()}))
        print(f"\n{title}; schedules x {self.share:g}; commits of the rows: {commits}\n")
        print_table(*table(tasks, rows))
        return 0 if len(rows) == len(tasks) else 1

    def bases(self) -> list[Basis]:
        """Drawings, packed where that has not been done, and the corpus."""
        bases = []
        if self.drawings:
            shards = self.out / f"{DRAWINGS}-{self.drawings}"
            if not (shards / MANIFEST).exists():
                pack_source(Toy(count=self.drawings, out=str(shards)))
            bases.append(Basis(DRAWINGS, str(shards), scaled(PRESETS["toy-cpu"][1], self.share)))
        if self.corpus is not None:
            name = open_corpus(self.corpus).manifest.corpus
            bases.append(Basis(name, self.corpus, scaled(PRESETS["faces-cpu"][1], self.share)))
        if not bases:
            raise UserError("nothing to train on: give a --corpus or some --drawings")
        return bases


@exit_on_user_error()
def main() -> None:
    """Trains and prints."""
    sys.exit(tyro.cli(Command, description=__doc__).run())


if __name__ == "__main__":
    main()
