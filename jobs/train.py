"""Trains a landmark detector: `python -m jobs.train PRESET --shards DIR --name NAME`.

PRESET `own` takes a folder of your own images instead of shards, and chooses the settings:
`python -m jobs.train own --images DIR --landmarks 20`.

The same command goes on with an unfinished run of that name, and finds a finished one done.
`python -m jobs.train PRESET --print-config` shows all settings and does nothing else.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from cluster import storage
from jobs import pack
from sst.config import PRESETS, TrainSettings
from sst.corpora import folder
from sst.data.shards import MANIFEST
from sst.errors import UserError, exit_on_user_error
from sst.progress import duration
from sst.report.advice import FEW_IMAGES
from sst.run.own import choose, expected_seconds, measure, reasons, this_machine, within
from sst.run.pipeline import Outcome, Tracking, differences, open_corpus, percent, train_run
from sst.run.preflight import check_kept
from sst.run.tracking import DEFAULT_URI, redact

OWN_MAX_SKIPPED = 0.2
"""Share of unusable files that a folder of one's own may hold."""


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


class OwnCommand(BaseModel):
    """A folder of your own images: packs them, chooses settings, says how long it will take, trains and reports."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: str
    """Folder of images of one kind of object; subfolders are searched too."""
    landmarks: Annotated[int, Field(ge=2, le=200)] = 20
    """How many landmarks are wanted."""
    annotations: str | None = None
    """CSV or COCO file with boxes of the objects, where they do not fill the images; points in it are for scoring."""
    name: Annotated[str | None, Field(pattern=r"^[\w.-]+$")] = None
    """Name of the run; by default that of the folder."""
    minutes: Annotated[float | None, Field(gt=0)] = None
    """How long training may take; by default as long as the schedule takes."""
    runs: str = "runs"
    """Directory or URL under which runs lie."""
    tracking: str = DEFAULT_URI
    """MLflow tracking URI; MLFLOW_TRACKING_URI gives another default."""
    experiment: str = "landmarks"
    """MLflow experiment."""
    register_as: Annotated[str | None, tyro.conf.arg(name="register")] = None
    """Name under which the finished model becomes a new version in MLflow's model registry."""


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


def train_own(command: OwnCommand) -> Outcome:
    """Packs the folder where that has not been done, settles on settings, and trains.

    Raises:
        UserError: if the images or the machine do not permit it, or a run of that name was told otherwise.
    """
    name = command.name or re.sub(r"[^\w.-]", "_", Path(command.images).resolve().name)
    run_url = storage.join(command.runs, name)
    told_url = storage.join(run_url, "own.json")
    told = command.model_dump(include={"images", "landmarks", "annotations", "minutes"})
    told |= {"images": str(Path(command.images).resolve())}
    if storage.exists(told_url) and (changed := differences(storage.read_json(told_url)["told"], told)):
        raise UserError(f"{run_url} is a run that was told otherwise ({'; '.join(changed)}); take another --name")
    shards = storage.join(run_url, "shards")
    if not storage.exists(storage.join(shards, MANIFEST)):
        items = folder.items(command.images, command.annotations)
        choose(sum(item.split == "train" for item in items), command.landmarks, this_machine())  # before any work
        pack.run(
            pack.Folder(
                images=command.images,
                annotations=command.annotations,
                out=shards,
                max_skipped=OWN_MAX_SKIPPED,
                shard_samples=max(32, min(256, len(items) // 16)),  # several for every worker
            )
        )
    if not storage.exists(told_url):
        settings = own_settings(command, open_corpus(shards).manifest.samples_of("train"), run_url)
        storage.write_json(told_url, {"told": told, "settings": settings.model_dump(mode="json")})
    settings = TrainSettings.model_validate(storage.read_json(told_url)["settings"])
    tracking = Tracking(command.tracking, command.experiment, name, register=command.register_as)
    return train_run(settings, shards, run_url, tracking)


def own_settings(command: OwnCommand, images: int, run_url: str) -> TrainSettings:
    """Settles on settings, and says what was chosen, why, and what it will take."""
    machine = this_machine()
    settings = choose(images, command.landmarks, machine)
    speed = measure(settings, machine)
    if command.minutes is not None:
        settings = within(settings, images, speed, command.minutes)
    table = Table("setting", "chosen", "why", title=f"{images} training images")
    for choice in reasons(settings, images, machine, command.minutes):
        table.add_row(choice.setting, choice.value, choice.why)
    Console().print(table)
    if images < FEW_IMAGES:
        print(f"note: {images} training images are few; from {FEW_IMAGES} on landmarks are more and steadier")
    print(
        f"about {duration(expected_seconds(settings, images, speed))} and "
        f"{speed.memory_gb:.1f} GB of {'GPU ' if machine.gpus else ''}memory; results will lie in {run_url}. "
        "Stopped by Ctrl-C or by accident, the same command goes on.",
        flush=True,
    )
    return settings


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
