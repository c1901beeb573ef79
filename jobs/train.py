"""Trains on a folder of your own images, or on packed shards.

`own --images DIR --landmarks 20` packs the folder and chooses the settings; `PRESET --shards DIR --name NAME` takes
what pack wrote, and any setting can be changed.

The same command goes on with an unfinished run of that name, and finds a finished one done.
`PRESET --print-config` shows all settings and does nothing else.
"""

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from pydantic import BaseModel, ConfigDict

from cluster import storage
from sst.config import TrainSettings
from sst.errors import GivenPath, exit_on_user_error
from sst.run.console import print_outcome
from sst.run.options import RunName, RunOptions, WithRuns, one_per_preset
from sst.run.own import OwnCommand, train_own
from sst.run.pipeline import train_run
from sst.run.preflight import check_kept

PRINT_CONFIG = "--print-config"


class TrainCommand(BaseModel):
    """What a run reads, where it lies, and how it is told to work."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: GivenPath
    """Directory or URL of the shards that `landmarks pack` wrote."""
    name: RunName
    """Name of the run; the same name goes on with the same run."""
    where: WithRuns = RunOptions()
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print all settings as JSON and exit; --shards and --name may be left out."""
    settings: Annotated[TrainSettings, tyro.conf.arg(name="")] = TrainSettings()
    """The method; a preset gives the defaults."""


def either_command(anything: object = tyro.MISSING) -> Any:
    """`own`, or one of the presets."""
    return Annotated[OwnCommand, tyro.conf.subcommand("own")] | one_per_preset(TrainCommand, anything)


COMMAND = either_command()


def parse(arguments: Sequence[str] | None, prog: str = "python -m jobs.train") -> TrainCommand | OwnCommand:
    """The command line as a checked configuration; a wrong one exits with code 2."""
    command: TrainCommand | OwnCommand = tyro.cli(
        either_command("none") if PRINT_CONFIG in (sys.argv if arguments is None else arguments) else COMMAND,
        prog=prog,
        description=__doc__,
        args=arguments,
        config=(tyro.conf.AvoidSubcommands,),
    )
    return command


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None, prog: str = "python -m jobs.train") -> None:
    """Trains; mistakes exit with code 2, a failed run with 1, an unwell one with 4, an interrupted one with 130."""
    command = parse(arguments, prog)
    where = command.where
    check_kept(runs=where.runs, tracking=where.tracking)
    if isinstance(command, OwnCommand):
        print_outcome(train_own(command), where.tracking)
        return
    if command.print_config:
        print(command.settings.model_dump_json(indent=2))
        return
    outcome = train_run(
        command.settings, command.shards, storage.join(where.runs, command.name), where.tracked_as(command.name)
    )
    print_outcome(outcome, where.tracking)


if __name__ == "__main__":
    main()
