"""Trains a landmark detector: `python -m jobs.train PRESET --shards DIR --name NAME`.

The same command goes on with an unfinished run of that name, and finds a finished one done.
`python -m jobs.train PRESET --print-config` shows all settings and does nothing else.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict, Field

from sst.config import PRESETS, TrainSettings
from sst.errors import exit_on_user_error
from sst.pipeline import Outcome, percent, train_run
from sst.tracking import redact


class TrainCommand(BaseModel):
    """What a run reads, where it lies, and how it is told to work."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: str
    """Directory or URL of the shards that jobs.pack wrote."""
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """Name of the run; the same name goes on with the same run."""
    runs: str = "runs"
    """Directory or URL under which runs lie."""
    tracking: str = "sqlite:///mlflow.db"
    """MLflow tracking URI."""
    experiment: str = "landmarks"
    """MLflow experiment."""
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print all settings as JSON and exit; --shards and --name may be left out."""
    settings: Annotated[TrainSettings, tyro.conf.arg(name="")] = TrainSettings()
    """The method; a preset gives the defaults."""


def parse(arguments: Sequence[str] | None) -> TrainCommand:
    """The command line as a checked configuration; a wrong one exits with code 2."""
    anything: str = "none" if "--print-config" in (arguments or sys.argv) else tyro.MISSING
    presets = {
        name: (
            about,
            TrainCommand.model_construct(shards=anything, name=anything, settings=settings),
        )
        for name, (about, settings) in PRESETS.items()
    }
    return tyro.extras.overridable_config_cli(presets, prog="jobs.train", description=__doc__, args=arguments)


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains; mistakes exit with code 2, a failed run with 1, an interrupted one with 130."""
    command = parse(arguments)
    if command.print_config:
        print(command.settings.model_dump_json(indent=2))
        return
    outcome = train_run(
        command.settings,
        command.shards,
        f"{command.runs.rstrip('/')}/{command.name}",
        tracking=command.tracking,
        experiment=command.experiment,
        name=command.name,
    )
    print_outcome(outcome, command.tracking)


def print_outcome(outcome: Outcome, tracking: str) -> None:
    """Says what came out and where to look at it."""
    if outcome.scores is not None:
        print(f"forward error   {percent(outcome.scores.forward)}")
        print(f"backward error  {percent(outcome.scores.backward)}")
        print(f"landmarks       {outcome.landmarks}, {outcome.scores.landmarks_kept} in over 80 % of the images")
    else:
        print(f"landmarks       {outcome.landmarks}; the corpus has no annotations to score them with")
    print(f"report          {outcome.report}")
    print(f"MLflow          {Path(sys.executable).parent}/mlflow ui --backend-store-uri {redact(tracking)}")


if __name__ == "__main__":
    main()
