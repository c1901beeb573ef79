"""Trains a landmark detector: `python -m jobs.train PRESET --shards DIR --name NAME`.

PRESET `own` takes a folder of your own images instead of shards, and chooses the settings:
`python -m jobs.train own --images DIR --landmarks 20`.

The same command goes on with an unfinished run of that name, and finds a finished one done.
`python -m jobs.train PRESET --print-config` shows all settings and does nothing else.
"""

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from pydantic import BaseModel, ConfigDict, Field

from cluster import storage
from sst.config import TrainSettings
from sst.errors import exit_on_user_error
from sst.presets import PRESETS
from sst.run.console import print_outcome
from sst.run.own import OwnCommand, train_own
from sst.run.pipeline import train_run
from sst.run.preflight import check_kept
from sst.run.tracking import DEFAULT_URI, Tracking


class TrainCommand(BaseModel):
    """What a run reads, where it lies, and how it is told to work."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: str
    """Directory or URL of the shards that jobs.pack wrote."""
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """Name of the run; the same name goes on with the same run."""
    runs: str = "runs"
    """Directory or URL under which runs lie."""
    tracking: str = DEFAULT_URI
    """MLflow tracking URI; MLFLOW_TRACKING_URI gives another default."""
    experiment: str = "landmarks"
    """MLflow experiment."""
    register_as: Annotated[str | None, tyro.conf.arg(name="register")] = None
    """Name under which the finished model becomes a new version in MLflow's model registry."""
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print all settings as JSON and exit; --shards and --name may be left out."""
    settings: Annotated[TrainSettings, tyro.conf.arg(name="")] = TrainSettings()
    """The method; a preset gives the defaults."""


def parse(arguments: Sequence[str] | None) -> TrainCommand | OwnCommand:
    """The command line as a checked configuration; a wrong one exits with code 2."""
    anything: str = "none" if "--print-config" in (arguments or sys.argv) else tyro.MISSING
    presets = tyro.extras.subcommand_type_from_defaults(
        {
            name: TrainCommand.model_construct(shards=anything, name=anything, settings=settings)
            for name, (_, settings) in PRESETS.items()
        },
        {name: about for name, (about, _) in PRESETS.items()},
        sort_subcommands=False,
    )
    either: Any = Annotated[OwnCommand, tyro.conf.subcommand("own")] | presets
    command: TrainCommand | OwnCommand = tyro.cli(
        either,
        prog="jobs.train",
        description=__doc__,
        args=arguments,
        config=(tyro.conf.AvoidSubcommands,),
    )
    return command


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains; mistakes exit with code 2, a failed run with 1, an interrupted one with 130."""
    command = parse(arguments)
    check_kept(runs=command.runs, tracking=command.tracking)
    if isinstance(command, OwnCommand):
        print_outcome(train_own(command), command.tracking)
        return
    if command.print_config:
        print(command.settings.model_dump_json(indent=2))
        return
    outcome = train_run(
        command.settings,
        command.shards,
        storage.join(command.runs, command.name),
        Tracking(command.tracking, command.experiment, command.name, register=command.register_as),
    )
    print_outcome(outcome, command.tracking)


if __name__ == "__main__":
    main()
