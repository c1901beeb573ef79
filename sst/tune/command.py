"""What the command for sweeps asks for, and the table that it shows at the end."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from cluster import storage
from sst.config import TrainSettings
from sst.errors import GivenPath, UserError
from sst.run.claim import with_absolute_weights
from sst.run.options import RunName, RunOptions, WithRuns
from sst.run.tracking import absolute_uri
from sst.tune.objective import Objective
from sst.tune.search_space import default_space, draw_trials, parse_space, read_space
from sst.tune.sweep import Sweep, TrialRecord

LOG_WIDTH = 200
"""Columns of the table where no terminal says how many there are: in the log of a job."""


class TuneCommand(BaseModel):
    """What is searched, where it lies, and how it is told to work."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: GivenPath
    """Directory or URL of the shards that `landmarks pack` wrote."""
    name: RunName
    """Name of the sweep."""
    vary: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What varies: SETTING=20,30,50 (one of these), SETTING=1e-4..1e-3 (a range), SETTING=1e-4..1e-3:log; may be given
    again for further settings. By default the number of clusters, the learning rate and the detector's threshold."""
    space: GivenPath | None = None
    """YAML file that maps settings to such values, as lists or ranges; --vary goes before it."""
    trials: Annotated[int, Field(ge=1, le=10_000)] = 8
    """Trials at most; fewer where there are fewer combinations."""
    objective: Objective = "label-free"
    """What is made small: the share of landmarks not found again after a warp, or an error that needs annotations."""
    early_stop: bool = True
    """Stop hopeless trials after a third of their rounds (ASHA)."""
    concurrent: Annotated[int | None, Field(ge=1)] = None
    """Trials at once; by default as many as the cluster has room for."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with the sweep of that name."""
    where: WithRuns = RunOptions()
    settings: Annotated[TrainSettings, tyro.conf.arg(name="")] = TrainSettings()
    """What does not vary; a preset gives the defaults."""


def sweep_of(command: TuneCommand) -> Sweep:
    """The sweep that was asked for, with its trials drawn.

    Raises:
        UserError: if the search space is not as it should be.
    """
    space = dict(read_space(command.space)) if command.space else {}
    for text in command.vary:
        name, equals, values = text.partition("=")
        if not equals:
            raise UserError(f"--vary {text}: write SETTING=VALUES, such as cluster.clusters=20,30,50")
        space[name] = values
    settings = with_absolute_weights(command.settings)
    dimensions = parse_space(space or default_space(settings), settings)
    tracking = command.where.tracked_as(command.name)
    return Sweep(  # trials work elsewhere, so nothing in it may be relative
        url=storage.absolute(storage.join(command.where.runs, command.name)),
        settings=settings,
        shards=storage.absolute(command.shards),
        trials=draw_trials(dimensions, command.trials, settings.seed),
        objective=command.objective,
        tracking=replace(tracking, uri=absolute_uri(tracking.uri)),
    )


def print_table(sweep: Sweep, records: Sequence[TrialRecord]) -> None:
    """Trials in the order of their objective, finished ones first."""
    names = list(dict.fromkeys(name for values in sweep.trials for name in values))
    scored = any("score/forward" in record.metrics for record in records)
    scores = ["score/forward", "score/backward"] if scored else []
    short = [name.rpartition(".")[2] for name in names]
    shown_names = [last if short.count(last) == 1 else name for name, last in zip(names, short, strict=True)]
    headers = [name.removeprefix("score/") for name in scores]
    table = Table("trial", *shown_names, "status", "steps", "objective", "landmarks", *headers)
    places = {"finished": 0, "stopped": 1, "failed": 2}

    def place(number: int) -> tuple[int, float]:
        objective = records[number].objective
        return places[records[number].status], float("inf") if objective is None else objective

    for number in sorted(range(len(records)), key=place):
        record = records[number]
        metrics = [record.objective, record.metrics.get("model/landmarks"), *(record.metrics.get(n) for n in scores)]
        shown = ["-" if metric is None else f"{metric:.4g}" for metric in metrics]
        values = [str(record.values[name]) for name in names]
        table.add_row(f"{number:03d}", *values, record.status, str(record.step), *shown)
    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print(table)
