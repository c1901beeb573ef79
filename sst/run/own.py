"""Settings for one's own images: what to train, how long, on what, and why.

Everything scales from what was measured: the `faces-cpu` preset on CPU cores, the published schedule on GPUs.
"""

import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import torch
import tyro
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from cluster import storage
from sst.config import TrainSettings, differences
from sst.corpora import folder
from sst.corpora.sources import Folder, pack_source
from sst.data.corpus import open_corpus
from sst.data.shards import MANIFEST
from sst.environment import usable_cpus
from sst.errors import UserError
from sst.nn.network import DetectorDescriptor, LandmarkDetector
from sst.nn.steps import random_batch, stage1_losses, stage2_losses
from sst.presets import PRESETS
from sst.progress import duration
from sst.report.advice import FEW_IMAGES
from sst.report.finish import Outcome
from sst.run.pipeline import train_run
from sst.run.tracking import DEFAULT_URI, Tracking
from sst.train.run_directory import RunDirectory
from sst.train.schedule import plan

LEAST_IMAGES = 60
"""Training images below which there is nothing to cluster."""

CLUSTERS_PER_LANDMARK = 1.5
"""Clusters to begin with: some stay too small, and some name the same place and are merged."""

POPULATION_SHARE = 0.06
"""Share of the training images in which a cluster must be labelled to become a landmark."""

PUBLISHED_IMAGES = 200_000
"""Images of the corpus that the published schedule is made for."""

LEAST_SCHEDULE = 0.1
"""Smallest share of the published schedule; the steps otherwise go with the root of the number of images."""

LEAST_ROUND = 150
"""Steps of a round below which there are rather fewer rounds."""

PASS_SHARE = 2.0
"""Seconds per image of a pass over the corpus without training (decoding, forward, writing), in those of a step."""

WORKER_GB, REST_GB = 1.6, 2.8
"""Memory of a CPU worker in float32 over all rounds and mergings, and of all else (driver, Ray, k-means, tasks on two
cores), with `faces-cpu` (benchmarks/RESULTS.md)."""

START_SECONDS = 40.0
"""Starting Ray and its workers, and writing the report."""


@dataclass(frozen=True)
class Machine:
    """What there is to train on.

    Attributes:
        cpus: usable cores.
        gpus: CUDA devices.
        memory_gb: memory that is free now.
    """

    cpus: int
    gpus: int
    memory_gb: float


@dataclass(frozen=True)
class Choice:
    """One setting that was chosen, and why."""

    setting: str
    value: str
    why: str


def this_machine() -> Machine:
    """The machine that this runs on."""
    return Machine(usable_cpus(), torch.cuda.device_count(), psutil.virtual_memory().available / 1e9)


def workers_for(machine: Machine) -> int:
    """A power of two up to 8, as many as there are GPUs, or cores with memory for a worker each.

    Raises:
        UserError: if there is not memory for one.
    """
    fitting = machine.gpus or min(machine.cpus, int((machine.memory_gb - REST_GB) / WORKER_GB))
    if fitting < 1:
        raise UserError(
            f"{machine.memory_gb:.1f} GB of memory are free, and training takes {WORKER_GB + REST_GB:.1f}; close other "
            "programs, or take a larger machine"
        )
    return int(2 ** min(3, int(math.log2(fitting))))


def choose(images: int, landmarks: int, machine: Machine) -> TrainSettings:
    """Settings for so many training images and landmarks on a machine.

    Args:
        images: training images.
        landmarks: how many are wanted.
        machine: what there is.

    Raises:
        UserError: if there are too few images, or too little memory.
    """
    if images < LEAST_IMAGES:
        raise UserError(
            f"{images} training images: the method finds landmarks by what recurs, and needs at least {LEAST_IMAGES} "
            f"images of the object, better {FEW_IMAGES} or more"
        )
    workers = workers_for(machine)
    clusters = max(landmarks + 2, round(CLUSTERS_PER_LANDMARK * landmarks))
    population = max(4, min(500, round(POPULATION_SHARE * images)))
    share = 1.0 if not machine.gpus else min(1.0, max(LEAST_SCHEDULE, math.sqrt(images / PUBLISHED_IMAGES)))
    base = PRESETS["celeba" if machine.gpus else "faces-cpu"][1]
    small = PRESETS["faces-cpu"][1]
    settings = base.model_copy(
        update={
            "keypoints": small.keypoints,
            "cluster": base.cluster.model_copy(update={"clusters": clusters}),
            "stage1": small.stage1.model_copy(
                update={
                    "warmup_iterations": base.stage1.warmup_iterations,
                    "rounds": base.stage1.rounds,
                    "round_iterations": base.stage1.round_iterations,
                }
            ),
            "stage2": base.stage2.model_copy(
                update={
                    "min_population": population,
                    "most_landmarks": landmarks,
                    "merge_every": small.stage2.merge_every if not machine.gpus else 5_000,
                    "visible": small.stage2.visible,
                    "augmentation": small.stage2.augmentation,
                }
            ),
            "resources": base.resources.model_copy(update={"workers": str(workers)}),
        }
    )
    return TrainSettings.model_validate(scaled(settings, share).model_dump())


def reasons(settings: TrainSettings, images: int, machine: Machine, minutes: float | None) -> list[Choice]:
    """What was chosen, and why, as a person reads it."""
    network, one, two = settings.network, settings.stage1, settings.stage2
    device = f"{machine.gpus} GPUs" if machine.gpus else f"{machine.cpus} CPU cores"
    size = "the published network" if machine.gpus else "small enough for CPU cores"
    if minutes is not None:
        schedule = f"as much as fits {minutes:g} minutes"
    elif machine.gpus:
        schedule = "the published schedule, less by the root of the number of images"
    else:
        schedule = "the schedule of the faces-cpu preset"
    clusters, population, wanted = settings.cluster.clusters, two.min_population, two.most_landmarks
    return [
        Choice("workers", settings.resources.workers, f"{device}, {machine.memory_gb:.0f} GB of memory free"),
        Choice("network", f"{network.input_size} px, width {network.width}", size),
        Choice("clusters", str(clusters), f"{CLUSTERS_PER_LANDMARK:g} for each landmark: some will be merged"),
        Choice("landmarks", str(wanted), "as you asked; of more, the steadiest are kept"),
        Choice("least population", str(population), f"{100 * POPULATION_SHARE:.0f} % of {images} training images"),
        Choice("stage 1", f"{one.warmup_iterations} + {one.rounds} x {one.round_iterations} steps", schedule),
        Choice("stage 2", f"{two.iterations} steps", schedule),
    ]


def scaled(settings: TrainSettings, factor: float) -> TrainSettings:
    """The same schedule with all steps times a factor; rounds become fewer before they become too short."""
    one, two = settings.stage1, settings.stage2

    def steps(count: int) -> int:
        return max(1, round(count * factor))

    in_rounds = steps(one.rounds * one.round_iterations)
    rounds = max(1, min(one.rounds, in_rounds // LEAST_ROUND))
    stage1 = {
        "warmup_iterations": steps(one.warmup_iterations),
        "rounds": rounds,
        "round_iterations": max(1, in_rounds // rounds),
    }
    stage2 = {
        "iterations": steps(two.iterations),
        "milestones": tuple(steps(milestone) for milestone in two.milestones),
        "merge_after": steps(two.merge_after),
        "merge_every": None if two.merge_every is None else steps(two.merge_every),
    }
    return settings.model_copy(
        update={"stage1": one.model_copy(update=stage1), "stage2": two.model_copy(update=stage2)}
    )


@dataclass(frozen=True)
class Speed:
    """Measured on this machine.

    Attributes:
        stage1: seconds of a step of stage 1.
        stage2: seconds of a step of stage 2.
        memory_gb: that a run will take; of a GPU where there is one, else of the machine.
    """

    stage1: float
    stage2: float
    memory_gb: float


def measure(settings: TrainSettings, machine: Machine, repeats: int = 3) -> Speed:
    """Times one worker's share of a step of each stage, on random images; some seconds."""
    device = torch.device("cuda" if machine.gpus else "cpu")
    workers, clusters = settings.resources.most_workers, settings.cluster.clusters
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, machine.cpus // workers))
    generator = torch.Generator(device).manual_seed(0)
    models = (DetectorDescriptor(settings.network.shape), LandmarkDetector(settings.network.shape, clusters))
    active = torch.ones(clusters, dtype=torch.bool, device=device)
    seconds = []
    for model, total in zip(models, (settings.stage1.pairs, settings.stage2.batch), strict=True):
        model.to(device).train()
        batch = random_batch(total // workers, settings.network.input_size, settings.cluster.clusters).to(device)
        taken = []
        for _ in range(1 + repeats):
            started = time.perf_counter()
            if isinstance(model, DetectorDescriptor):
                losses = stage1_losses(model, batch, settings.stage1_step(), generator)
            else:
                losses = stage2_losses(model, batch, active, settings.stage2_step(), generator)
            losses.total().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
        seconds.append(sorted(taken[1:])[repeats // 2])
    torch.set_num_threads(threads)
    memory = torch.cuda.max_memory_allocated() / 1e9 if machine.gpus else WORKER_GB * workers + REST_GB
    return Speed(seconds[0], seconds[1], memory)


def expected_seconds(settings: TrainSettings, images: int, speed: Speed) -> float:
    """How long a run will take: its steps, the passes over the corpus between them, and the start."""
    phases = plan(settings, images)
    steps = sum(phase.steps * (speed.stage1 if phase.stage == 1 else speed.stage2) for phase in phases)
    one_pass = PASS_SHARE * images * speed.stage2 / settings.stage2.batch
    return steps + (len(phases) + 2) * one_pass + START_SECONDS


def within(settings: TrainSettings, images: int, speed: Speed, minutes: float) -> TrainSettings:
    """The settings with the schedule that fits the time.

    Raises:
        UserError: if not even a tenth of the full schedule fits.
    """
    factor, tried = 1.0, {}
    for _ in range(24):  # a run has fixed costs, and whole rounds, so its time is not in proportion to its steps
        ratio = expected_seconds(scaled(settings, factor), images, speed) / (60 * minutes)
        tried[factor] = abs(ratio - 1)
        factor /= ratio**0.7
    factor = min(tried, key=lambda each: tried[each])
    if factor < LEAST_SCHEDULE:
        raise UserError(
            f"--minutes {minutes:g} is too short: the full schedule takes about "
            f"{expected_seconds(settings, images, speed) / 60:.0f} minutes here, and at least a tenth of it is needed"
        )
    return scaled(settings, factor)


OWN_MAX_SKIPPED = 0.2
"""Share of unusable files that a folder of one's own may hold."""


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


def train_own(command: OwnCommand) -> Outcome:
    """Packs the folder where that has not been done, settles on settings, and trains.

    Raises:
        UserError: if the images or the machine do not permit it, or a run of that name was told otherwise.
    """
    name = command.name or re.sub(r"[^\w.-]", "_", Path(command.images).resolve().name)
    run_url = storage.join(command.runs, name)
    told_url = RunDirectory(run_url).chosen_url
    told = command.model_dump(include={"images", "landmarks", "annotations", "minutes"})
    told |= {"images": str(Path(command.images).resolve())}
    if storage.exists(told_url) and (changed := differences(storage.read_json(told_url)["told"], told)):
        raise UserError(f"{run_url} is a run that was told otherwise ({'; '.join(changed)}); take another --name")
    shards = storage.join(run_url, "shards")
    if not storage.exists(storage.join(shards, MANIFEST)):
        items = folder.items(command.images, command.annotations)
        choose(sum(item.split == "train" for item in items), command.landmarks, this_machine())  # before any work
        pack_source(
            Folder(
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
