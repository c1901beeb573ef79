"""Settings for one's own images: what to train, how long, on what, and why.

Everything scales from what was measured: the `faces-cpu` preset on CPU cores, the `faces-gpu` preset on GPUs.
"""

import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.table import Table

from cluster import storage
from sst.config import TrainSettings, differences
from sst.corpora import folder
from sst.corpora.sources import Folder, images_of, pack_source
from sst.data.corpus import Corpus, open_corpus
from sst.data.shards import MANIFEST
from sst.environment import usable_cpus
from sst.errors import GivenPath, UserError, other_version, problems
from sst.outputs import NewDirectory, refuse_overlap
from sst.presets import PRESETS
from sst.progress import duration
from sst.report.advice import FEW_IMAGES
from sst.report.finish import Outcome
from sst.run.estimate import expected_seconds, measure, within
from sst.run.options import RunName, RunOptions, WithRuns
from sst.run.own_data import OwnData, changes, look
from sst.run.pipeline import train_run
from sst.run.placement import REST_GB, WORKER_GB, Machine, cpu_workers, place
from sst.train.run_directory import RunDirectory

MIN_IMAGES = 60
"""Training images below which there is nothing to cluster."""

CLUSTERS_PER_LANDMARK = 1.5
"""Clusters to begin with: some stay too small, and some name the same place and are merged."""

POPULATION_SHARE = 0.06
"""Share of the training images in which a cluster must be labelled to become a landmark."""


@dataclass(frozen=True)
class Choice:
    """One setting that was chosen, and why."""

    setting: str
    value: str
    why: str


def this_machine() -> Machine:
    """The machine that this runs on."""
    return Machine(usable_cpus(), torch.cuda.device_count(), psutil.virtual_memory().available / 1e9)


def workers_for(settings: TrainSettings, machine: Machine) -> int:
    """How many workers auto will take here.

    Raises:
        UserError: if there is not memory for one on CPUs.
    """
    if not machine.gpus and not cpu_workers(int(machine.cpus), machine.memory_gb):
        raise UserError(
            f"{machine.memory_gb:.1f} GB of memory are free, and training takes {WORKER_GB + REST_GB:.1f}; close other "
            "programs, or take a larger machine"
        )
    return int(place(settings, [machine]).workers)


def choose(images: int, landmarks: int, machine: Machine) -> TrainSettings:
    """Settings for so many training images and landmarks on a machine.

    Args:
        images: training images.
        landmarks: how many are wanted.
        machine: what there is.

    Raises:
        UserError: if there are too few images, or too little memory.
    """
    if images < MIN_IMAGES:
        raise UserError(
            f"{images} training images: the method finds landmarks by what recurs, and needs at least {MIN_IMAGES} "
            f"images of the object, better {FEW_IMAGES} or more"
        )
    clusters = max(landmarks + 2, round(CLUSTERS_PER_LANDMARK * landmarks))
    population = max(4, min(500, round(POPULATION_SHARE * images)))
    base = PRESETS["faces-gpu" if machine.gpus else "faces-cpu"][1]
    settings = base.changed(
        cluster=base.cluster.changed(clusters=clusters),
        stage2=base.stage2.changed(min_population=population, max_landmarks=landmarks),
    )
    workers_for(settings, machine)  # refuses a machine with too little memory
    return settings


def reasons(settings: TrainSettings, images: int, machine: Machine, minutes: float | None) -> list[Choice]:
    """What was chosen, and why, as a person reads it."""
    network, one, two = settings.network, settings.stage1, settings.stage2
    device = f"{machine.gpus} GPU{'s' if machine.gpus > 1 else ''}" if machine.gpus else f"{machine.cpus} CPU cores"
    size = "the published network" if machine.gpus else "small enough for CPU cores"
    if minutes is not None:
        schedule = f"as much as fits {minutes:g} minutes"
    else:
        schedule = f"the schedule of the {'faces-gpu' if machine.gpus else 'faces-cpu'} preset"
    clusters, population, wanted = settings.cluster.clusters, two.min_population, two.max_landmarks
    return [
        Choice("workers", str(workers_for(settings, machine)), f"{device}, {machine.memory_gb:.0f} GB of memory free"),
        Choice("network", f"{network.input_size} px, width {network.width}", size),
        Choice("clusters", str(clusters), f"{CLUSTERS_PER_LANDMARK:g} for each landmark: some will be merged"),
        Choice("landmarks", str(wanted), "as you asked; of more, steady ones that are spread over the object"),
        Choice("least population", str(population), f"{100 * POPULATION_SHARE:.0f} % of {images} training images"),
        Choice("stage 1", f"{one.warmup_iterations} + {one.rounds} x {one.round_iterations} steps", schedule),
        Choice(
            "stage 2",
            f"{two.iterations} steps, then {two.refine_rounds} refinements of {two.refine_iterations}",
            schedule,
        ),
    ]


OWN_MAX_SKIPPED = 0.2
"""Share of unusable files that a folder of one's own may hold."""


class OwnCommand(BaseModel):
    """A folder of your own images: packs them, chooses settings, says how long it will take, trains and reports."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: GivenPath
    """Folder of images of one kind of object; subfolders are searched too."""
    landmarks: Annotated[int, Field(ge=2, le=200)] = 20
    """How many landmarks are wanted."""
    annotations: GivenPath | None = None
    """CSV or COCO file with boxes of the objects, where they do not fill the images; points in it are for scoring."""
    category: str | None = None
    """Category of the annotated objects, where the file has several; or "all"."""
    name: RunName | None = None
    """Name of the run; by default that of the folder."""
    minutes: Annotated[float | None, Field(gt=0)] = None
    """How long it may take from the first keypoints to the report, 5 or more; by default as long as the schedule takes.
    Packing, and measuring how fast the machine is, come before that."""
    where: WithRuns = RunOptions()
    stop_when_unwell: bool = False
    """End the run after a checkpoint, with exit code 4, at a sign that it comes to nothing, not only warn. The
    same command without this goes on."""
    as_packed: bool = False
    """Go on with the pictures and boxes that the run packed, although the folder or the annotations have changed."""


def train_own(command: OwnCommand) -> Outcome:
    """Packs the folder where that has not been done, settles on settings, and trains.

    Raises:
        UserError: if the images or the machine do not permit it, a run of that name was begun otherwise, or pictures or
            boxes are no longer those that it packed.
    """
    name = command.name or re.sub(r"[^\w.-]", "_", Path(command.images).resolve().name)
    run = RunDirectory(storage.join(command.where.runs, name))
    given = command.model_dump(include={"images", "landmarks", "annotations", "category", "minutes"})
    given |= {"images": str(Path(command.images).resolve())}
    begun = storage.exists(run.chosen_url)
    if begun and (changed := differences(_chosen(run)["given"], given)):
        raise UserError(f"{run.url} is a run that was begun otherwise ({'; '.join(changed)}); take another --name")
    if storage.exists(storage.join(run.shards_url, MANIFEST)):
        check_unchanged(command, run)
    else:
        pack_own(command, run)
    if not begun:
        settings = own_settings(command, open_corpus(run.shards_url), run.url)
        storage.write_json(run.chosen_url, {"given": given, "settings": settings.model_dump(mode="json")})
    try:
        settings = TrainSettings.model_validate(_chosen(run)["settings"])
    except ValidationError as error:
        raise UserError(f"{run.chosen_url}: settings not {other_version(error)}") from error
    resources = settings.resources.changed(stop_when_unwell=command.stop_when_unwell)
    settings = settings.changed(resources=resources)
    try:
        return train_run(settings, run.shards_url, run.url, command.where.tracked_as(name))
    except UserError:
        if not begun:
            storage.remove(run.chosen_url)  # the name is free for what is corrected; the shards stay
        raise


def _chosen(run: RunDirectory) -> dict[str, Any]:
    """What `train own` was asked for, and the settings that it chose.

    Raises:
        UserError: if the record is damaged.
    """
    content = _record(run.chosen_url)
    if not isinstance(content, dict) or not {"given", "settings"} <= content.keys():
        raise UserError(
            f"{run.chosen_url}: not what `landmarks train own` writes; remove it and give the same command again, or "
            "take another --name"
        )
    return content


def _record(url: str) -> Any:
    try:
        return storage.read_json(url)
    except ValueError as error:
        raise UserError(str(error)) from error


def pack_own(command: OwnCommand, run: RunDirectory) -> None:
    """Packs the folder into the run's directory, and notes what it packs.

    Raises:
        UserError: if the images or the machine do not permit it, or the folder and the run's directory overlap.
    """
    refuse_overlap(
        run.url, {"the folder": command.images, "--annotations": command.annotations}, "the run (--runs and --name)"
    )
    config = partial(
        Folder,
        images=command.images,
        annotations=command.annotations,
        category=command.category,
        out=run.shards_url,
        max_skipped=OWN_MAX_SKIPPED,
    )
    found = images_of(config())
    items = list(found[0])
    choose(sum(item.split == "train" for item in items), command.landmarks, this_machine())  # before any work
    data = look(command.images, folder.pictures_of(command.images, command.annotations).names, command.annotations)
    several_for_every_worker = max(32, min(256, len(items) // 16))
    directory = NewDirectory(run.url)
    earlier = storage.read_bytes(run.packed_url) if storage.exists(run.packed_url) else None
    # Before the shards: whenever this ends, there are none without it, and without their manifest it is not read.
    storage.write_json(run.packed_url, data.model_dump())
    try:
        pack_source(config(shard_samples=several_for_every_worker), found)
    except BaseException:
        if not storage.exists(storage.join(run.shards_url, MANIFEST)):
            if earlier is None:
                storage.remove(run.packed_url)
            else:
                storage.write_bytes(run.packed_url, earlier)
            directory.take_back()
        raise


def check_unchanged(command: OwnCommand, run: RunDirectory) -> None:
    """Refuses to go on in silence with pictures or boxes that are no longer what the folder has.

    Raises:
        UserError: saying what has changed, and what to do.
    """
    if command.as_packed:
        return
    if not storage.exists(run.packed_url):  # shards of an earlier version, or packed otherwise
        print(
            f"note: {run.url} holds no packed.json, so it is not known whether pictures have changed since",
            file=sys.stderr,
        )
        return
    if not Path(command.images).is_dir():
        print(f"note: {command.images} is gone; {run.url} goes on with what it packed", file=sys.stderr)
        return
    try:
        before = OwnData.model_validate(_record(run.packed_url))
    except ValidationError as error:
        raise UserError(
            f"{run.packed_url}: not as this version writes it ({problems(error)}); remove it to go on "
            "without a look at what has changed"
        ) from error
    names = folder.pictures_of(command.images, command.annotations).names
    now = look(command.images, names, command.annotations, before)
    if said := changes(before, now):
        raise UserError(
            f"{command.images} is not what {run.url} was begun with: {'; '.join(said)}. The run knows only what it "
            "packed: take another --name to train on what is there now, or add --as-packed to go on as it was"
        )


def own_settings(command: OwnCommand, corpus: Corpus, run_url: str) -> TrainSettings:
    """Settles on settings, and says what was chosen, why, and what it will take."""
    machine, images = this_machine(), corpus.manifest.samples_of("train")
    settings = choose(images, command.landmarks, machine)
    print("measuring how fast this machine is", flush=True)
    speed = measure(settings, machine, workers_for(settings, machine), corpus)
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
