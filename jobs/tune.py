"""Searches settings: `python -m jobs.tune PRESET --shards DIR --name SWEEP --vary cluster.clusters=20,30,50`.

Each trial is a whole run. Weak trials are stopped between rounds, lost ones go on, and all share the shards and, where
their settings permit, the first keypoints. The best trial is the one with the smallest objective, which needs no
annotations unless told otherwise.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from cluster import storage
from sst.config import TrainSettings
from sst.errors import UserError, exit_on_user_error
from sst.presets import PRESETS
from sst.run.claim import with_absolute_weights
from sst.run.preflight import check_kept
from sst.run.tracking import DEFAULT_URI, Tracking, absolute_uri
from sst.tune.objective import Objective
from sst.tune.search_space import default_space, draw_trials, parse_space, read_space
from sst.tune.sweep import Sweep, TrialRecord, best_of, run_sweep, told

LOG_WIDTH = 200
"""Columns of the table where no terminal says how many there are: in the log of a job."""


class TuneCommand(BaseModel):
    """What is searched, where it lies, and how it is told to work."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: str
    """Directory or URL of the shards that jobs.pack wrote."""
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """Name of the sweep."""
    vary: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What varies: SETTING=20,30,50 (one of these), SETTING=1e-4..1e-3 (a range), SETTING=1e-4..1e-3:log; may be given
    again for further settings. By default the number of clusters, the learning rate and the detector's threshold."""
    space: str | None = None
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
    runs: str = "runs"
    """Directory or URL under which sweeps and runs lie."""
    tracking: str = DEFAULT_URI
    """MLflow tracking URI; MLFLOW_TRACKING_URI gives another default."""
    experiment: str = "landmarks"
    """MLflow experiment."""
    register_as: Annotated[str | None, tyro.conf.arg(name="register")] = None
    """Name under which the best trial's model becomes a new version in MLflow's model registry."""
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
    return Sweep(
        url=storage.absolute(storage.join(command.runs, command.name)),
        settings=settings,
        shards=storage.absolute(command.shards),
        trials=draw_trials(dimensions, command.trials, settings.seed),
        objective=command.objective,
        # Trials work elsewhere, so nothing may be relative.
        tracking=Tracking(
            absolute_uri(command.tracking), command.experiment, command.name, register=command.register_as
        ),
    )


def print_table(sweep: Sweep, records: Sequence[TrialRecord]) -> None:
    """Trials in the order of their objective, finished ones first."""
    names = list(dict.fromkeys(name for values in sweep.trials for name in values))
    scored = any("score/forward" in record.figures for record in records)
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
        figures = [record.objective, record.figures.get("model/landmarks"), *(record.figures.get(n) for n in scores)]
        shown = ["-" if figure is None else f"{figure:.4g}" for figure in figures]
        values = [str(record.values[name]) for name in names]
        table.add_row(f"{number:03d}", *values, record.status, str(record.step), *shown)
    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print(table)


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None) -> None:
    """Searches; mistakes exit with code 2, a sweep without a finished trial with 1, an interrupted one with 130."""
    presets = tyro.extras.subcommand_type_from_defaults(
        {
            name: TuneCommand.model_construct(shards=tyro.MISSING, name=tyro.MISSING, settings=settings)
            for name, (_, settings) in PRESETS.items()
        },
        {name: about for name, (about, _) in PRESETS.items()},
        sort_subcommands=False,
    )
    command: TuneCommand = tyro.cli(
        presets, prog="jobs.tune", description=__doc__, args=arguments, config=(tyro.conf.AvoidSubcommands,)
    )
    check_kept(runs=command.runs, tracking=command.tracking)
    sweep = sweep_of(command)
    records = run_sweep(sweep, concurrent=command.concurrent, early_stop=command.early_stop, resume=command.resume)
    print_table(sweep, records)
    best = best_of(records)
    if best is None:
        reasons = "; ".join(f"{n:03d}: {record.error or record.status}" for n, record in enumerate(records))
        print(f"error: no trial finished ({reasons})", file=sys.stderr)
        raise SystemExit(1)
    print(f"best trial  {sweep.run(best).url}: {told(sweep.trials[best])}")


if __name__ == "__main__":
    main()
