"""Does training at 256 px do what it must? `python -m benchmarks.fullsize --corpus drawings --minutes 60`.

Trains by the command that a user gives, on drawings or on a folder of images, at the published input size and depth:
on CPU cores with a width of 64 instead of 256 channels, in a schedule that fits the time, with warm-up, rounds and
stage 2 in the proportions of the preset `faces-cpu`. Then says round by round how many labels and
clusters there were, what stage 2 did to weights and maps, and which of these hold:

- labels per image never fall below half of the first round's; every cluster is in use in every round;
- stage 2 does not wear the weights away, and its maps stand out at the labelled places more than before;
- twelve landmarks or more are visible in over 80 % of the test images;
- their forward error is below that of the first keypoints, where these can be scored.

`--width 256` is the published width. An image in a step takes two cores 0.03 s at a width of 64 and 0.2 s to 3 s at
256, by the processor, so there half an hour gives a round of a few steps and a stage 2 of some dozens or hundreds: too
few for the last two. What else is given goes to jobs.train, such as `--cluster.clusters 100`. A folder's annotations
(FOLDER/annotations.csv, images in FOLDER/images or FOLDER) are for scoring only.
"""

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.checks import DidNotHold, NotRunHere, Row, checked, job, report
from benchmarks.common import idle_share, machine, print_table
from cluster import storage
from sst.config import TrainSettings
from sst.data.corpus import Corpus, open_corpus
from sst.data.loader import shard_batches
from sst.environment import usable_cpus
from sst.nn.augment import warp_images
from sst.nn.network import DetectorDescriptor, LandmarkDetector, NetworkShape
from sst.nn.precision import autocast
from sst.report.evaluate_run import AnnotatedImages, score_constant, score_first_keypoints, score_run
from sst.report.evaluation import percent
from sst.train.checkpoint import latest_checkpoint
from sst.train.model import load_model
from sst.train.run_directory import RunDirectory

WARM_UP, STAGE_1 = 500 / 3400, 1300 / 3400
"""Shares of all steps after which warm-up and stage 1 end: 500 + 800 + 2,100 in the preset faces-cpu."""

MIN_ROUND, MAX_ROUNDS = 100, 4
"""Steps without which a round teaches the descriptors too little for another, and the preset's number of rounds."""

MIN_IMAGES, MAX_IMAGES = 64, 1500
"""Fewer than the least give too few descriptors for the clusters; more than the most make passes longer, not better."""

REFINEMENT, MAX_REFINEMENTS = 100, 6
"""Steps of a refinement, and how many there are at most; they have half of stage 2 where that is long enough."""

MIN_LABELS = 0.5
MIN_LANDMARKS, VISIBLE_IMAGES = 12, 0.8
MIN_WEIGHTS = 0.9
"""Of its root mean square so much must be left to the median convolution. Weights that stage 2 wears away lose 5e-4,
the learning rate, of their 0.03 a step, so that thirty steps take a third; those that learn do not shrink."""

INPUT_SIZE, DEPTH, CLUSTERS = 256, 4, 40

MIN_STEPS = 2000
"""Steps for which rather fewer images are taken in each: after a warm-up of some dozens a detector finds nothing."""

VIEW_SECONDS = 0.02
"""Seconds of a core for a random view of 256 px."""

LABELLED_IMAGES = 16
"""Images on which the maps of stage 2 are looked at."""


@dataclass(frozen=True)
class Scale:
    """What a run is made of, and what that takes on this machine.

    Attributes:
        width: channels of the network.
        batch: images in a step of stage 2, and views in a step of stage 1 as long as these are no more than published.
        image: seconds of an image in a step.
        start: seconds before the first step and after the last.
    """

    width: int
    batch: int
    image: float
    start: float

    @property
    def pairs(self) -> int:
        """Pairs of views in a step of stage 1."""
        return min(16, self.batch // 2)

    def steps(self, minutes: float) -> int:
        """That fit so many minutes, a quarter of which is for passes over the images."""
        return int(0.75 * self.seconds(minutes) / (self.batch * self.image))

    def seconds(self, minutes: float) -> float:
        """What is left of so many minutes between start and end."""
        return max(60.0 * minutes - self.start, 30.0)


def scale_of(width: int, gpu: bool, minutes: float) -> Scale:
    """Sizes and seconds of a width on this machine, with its GPU or on its cores.

    On a GPU the published batches at 1,500 images a second of full width (as measured on an H200). On cores the time of
    an image is measured, and the batch is the largest, up to 32, with which there are some
    thousand steps.
    """
    if gpu:
        return Scale(width, 64, 1 / 1500, 60.0)
    image = image_seconds(width)
    scales = [Scale(width, batch, image, 75.0) for batch in (32, 16, 8)]
    return next((scale for scale in scales if scale.steps(minutes) >= MIN_STEPS), scales[-1])


def image_seconds(width: int) -> float:
    """Seconds of an image in a step on this machine's cores: forward and backward as measured now, and the views.

    Measured on one thread in seconds of its core, which other processes hardly change; workers use all cores.
    """
    model, seconds = LandmarkDetector(NetworkShape(width, DEPTH, width // 8, width), CLUSTERS), []
    images, threads = torch.rand(2, 3, INPUT_SIZE, INPUT_SIZE), torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(3):
        started = time.process_time()
        with autocast(images.device, "auto"):
            heat = model(images)
        heat.float().square().mean().backward()
        seconds.append((time.process_time() - started) / len(images))
    torch.set_num_threads(threads)
    return (min(seconds) + VIEW_SECONDS) / usable_cpus()


@dataclass(frozen=True)
class Schedule:
    """What fits a time: images, and steps of warm-up, each round and stage 2."""

    images: int
    warm_up: int
    rounds: int
    round_steps: int
    stage2: int

    @property
    def refinements(self) -> int:
        """Rounds of stage 2 in which the landmarks refine themselves."""
        return max(1, min(MAX_REFINEMENTS, self.stage2 // (2 * REFINEMENT)))

    @property
    def refinement(self) -> int:
        """Steps of each."""
        return min(REFINEMENT, self.stage2 // 2)


def schedule(minutes: float, scale: Scale) -> Schedule:
    """The schedule for so many minutes: a quarter of them for passes over the images, the rest for steps.

    As many rounds as leave each its least steps; one at least. A pass without gradients takes a third of a step's time
    per image, and there is one after the warm-up and each round, two for each refinement, and three at the end.
    """
    steps = scale.steps(minutes)
    in_rounds = int((STAGE_1 - WARM_UP) * steps)
    rounds = max(1, min(MAX_ROUNDS, in_rounds // MIN_ROUND))
    images = int(0.25 * scale.seconds(minutes) / ((rounds + 2 * MAX_REFINEMENTS + 4) * scale.image / 3))
    return Schedule(
        images=max(MIN_IMAGES, min(MAX_IMAGES, images)),
        warm_up=max(2, int(WARM_UP * steps)),
        rounds=rounds,
        round_steps=max(2, in_rounds // rounds),
        stage2=max(24, int((1 - STAGE_1) * steps)),
    )


def train_words(plan: Schedule, scale: Scale, out: Path, name: str) -> list[str]:
    """The arguments of jobs.train."""
    given: dict[str, object] = {
        "shards": out / f"{name}-shards", "name": name, "runs": out / "runs",
        "tracking": f"sqlite:///{out.absolute()}/mlflow.db",
        "network.input-size": INPUT_SIZE, "network.depth": DEPTH, "network.width": scale.width,
        "network.groups": scale.width // 8, "network.descriptor-size": scale.width,
        "cluster.clusters": CLUSTERS,
        "stage1.pairs": scale.pairs, "stage1.warmup-iterations": plan.warm_up,
        "stage1.rounds": plan.rounds, "stage1.round-iterations": plan.round_steps,
        "stage2.batch": scale.batch, "stage2.iterations": plan.stage2 - plan.refinements * plan.refinement,
        "stage2.refine-rounds": plan.refinements, "stage2.refine-iterations": plan.refinement,
        "stage2.min-population": max(4, round(0.06 * plan.images)),
        "resources.checkpoint-steps": max(5, min(200, plan.warm_up)),
    }  # fmt: skip
    return ["faces-cpu", *(word for option, value in given.items() for word in (f"--{option}", str(value)))]


def pack(corpus: str, images: int, out: Path, name: str, seconds: float) -> str:
    """Packs drawings, or images of a folder drawn evenly; says how many."""
    shards, log = out / f"{name}-shards", out / "logs" / "pack.txt"
    words = ["--out", str(shards), "--shard-samples", str(max(16, min(256, images // 8)))]
    if corpus == "drawings":
        words = ["toy", "--count", str(images), "--size", "256", *words]
    else:
        words = ["folder", *thinned(Path(corpus), images, out / f"{name}-images"), *words]
    job("pack", words, log, seconds)
    manifest = open_corpus(str(shards)).manifest
    return f"{manifest.samples_of('train')} training and {manifest.samples_of('test')} test images"


def thinned(folder: Path, maximum: int, out: Path) -> list[str]:
    """Links to at most so many images of a folder, drawn evenly, with their annotations; the words that name them."""
    notes, root = folder / "annotations.csv", folder / "images" if (folder / "images").is_dir() else folder
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path != notes)
    chosen = {names[number] for number in np.linspace(0, len(names) - 1, min(maximum, len(names))).astype(int)}
    for name in chosen:
        link = out / "images" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to((root / name).resolve())
    words = ["--images", str(out / "images")]
    if not notes.exists():
        return words
    with notes.open() as source, (out / "annotations.csv").open("w", newline="") as target:
        rows = csv.DictReader(source)
        writer = csv.DictWriter(target, rows.fieldnames or [])
        writer.writeheader()
        writer.writerows(row for row in rows if row["file"] in chosen)
    return [*words, "--annotations", str(out / "annotations.csv")]


@dataclass(frozen=True)
class Trained:
    """A run and where its last weights of stage 1 are kept, which the run itself removes."""

    run: RunDirectory
    stage1: Path

    @classmethod
    def at(cls, out: Path, name: str) -> "Trained":
        """The run of that name below an output folder."""
        return cls(RunDirectory(str(out / "runs" / name)), out / f"{name}-stage1.safetensors")

    def keep_stage1(self, seen: set[str]) -> None:
        """Copies the weights of the newest checkpoint if it is of stage 1; to be called every second."""
        names = set(storage.list_names(self.run.checkpoints_url))
        if names <= seen:
            return
        found = latest_checkpoint(self.run.checkpoints_url)
        if found is not None and f"{found[0].step:010d}" not in seen:
            seen.add(f"{found[0].step:010d}")
            if found[0].stage == 1:
                source = Path(self.run.checkpoints_url) / f"{found[0].step:010d}" / "model.safetensors"
                self.stage1.write_bytes(source.read_bytes())

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """The run's metrics of one kind, so far."""
        path = Path(self.run.metrics_url)
        every = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in every if line["kind"] == kind]

    @property
    def settings(self) -> TrainSettings:
        """What it was told."""
        return TrainSettings.model_validate(storage.read_json(self.run.settings_url)["settings"])

    @property
    def corpus(self) -> Corpus:
        """What it was trained on."""
        return open_corpus(storage.read_json(self.run.settings_url)["shards"])

    def rounds(self) -> list[dict[str, Any]]:
        """Figures of every round of correspondence."""
        return [line for line in self.lines("round") if line["made_by"] == "correspondence"]


def train(trained: Trained, words: Sequence[str], log: Path, seconds: float, kill: Callable[[], bool] | None) -> bool:
    """Trains, keeping the last weights of stage 1; False if `kill` answered True and the run was killed."""
    seen: set[str] = set()

    def look() -> bool:
        trained.keep_stage1(seen)
        return kill is not None and kill()

    return job("train", words, log, seconds, look)


def check_labels(trained: Trained) -> str:
    """Labels per image must not fall below half of the first round's."""
    found = [line["labels_per_image"] for line in trained.rounds()]
    if not found:
        raise DidNotHold("there was no round")
    seen = f"labels per image by round: {', '.join(f'{each:.1f}' for each in found)}"
    if min(found) < MIN_LABELS * found[0] or not found[0]:
        raise DidNotHold(seen)
    return seen


def check_clusters(trained: Trained) -> str:
    """Every cluster must be in use in every round."""
    found, clusters = [int(line["clusters_in_use"]) for line in trained.rounds()], trained.settings.cluster.clusters
    seen = f"of {clusters} clusters in use by round: {', '.join(map(str, found))}"
    if not found or min(found) < clusters:
        raise DidNotHold(seen)
    return seen


def convolutions(state: dict[str, Tensor]) -> dict[str, float]:
    """Root mean square of every convolution's weights that both stages have."""
    kept = {name: weight for name, weight in state.items() if name.startswith("backbone.") and weight.ndim == 4}
    return {name: float(weight.float().square().mean().sqrt()) for name, weight in kept.items()}


def check_weights(trained: Trained) -> str:
    """The median convolution's weights must not shrink in stage 2."""
    if not trained.stage1.exists():
        raise NotRunHere("the weights of stage 1 were not seen")
    before = convolutions(load_file(trained.stage1))
    after = convolutions(load_model(trained.run.model_url)[0].state_dict())
    shares = sorted(after[name] / before[name] for name in before)
    spread = [f"{min(each.values()):.2g} to {max(each.values()):.2g}" for each in (before, after)]
    middle = shares[len(shares) // 2]
    seen = f"RMS of the convolutions {spread[0]} before stage 2, {spread[1]} after it; median ratio {middle:.2f}"
    if not middle >= MIN_WEIGHTS:
        raise DidNotHold(seen)
    return seen


@torch.inference_mode()
def standing_out(trained: Trained, network: LandmarkDetector, channels: Sequence[int]) -> float:
    """Height of a landmark's map at its labelled place above the map's mean, over some training images.

    Args:
        trained: whose last labels are taken.
        network: with a channel for each of `channels`.
        channels: clusters.
    """
    corpus, size, record = trained.corpus, trained.settings.network.input_size, trained.run.records()[-1]
    shard, place = corpus.train[0], {cluster: number for number, cluster in enumerate(channels)}
    labels = trained.run.labels(record, shard.file)
    batch = next(shard_batches(corpus.url, shard, size, LABELLED_IMAGES))
    heat = network.eval()(warp_images(batch.images, batch.to_view, size)).numpy()
    heights = []
    for image in range(len(batch.keys)):
        rows = slice(labels.offsets[image], labels.offsets[image + 1])
        for (x, y), cluster in zip(labels.points[rows], labels.cluster[rows], strict=True):
            if int(cluster) in place:
                drawn = heat[image, place[int(cluster)]]
                column, row = np.clip(np.rint([x, y]).astype(int), 0, drawn.shape[0] - 1)
                heights.append(drawn[row, column] - drawn.mean())
    if not heights:
        raise DidNotHold(f"no label of a landmark in {len(batch.keys)} images")
    return float(np.mean(heights))


def check_maps(trained: Trained) -> str:
    """After stage 2 a landmark's map must stand out at the labelled places, more than with a fresh last layer."""
    if not trained.stage1.exists():
        raise NotRunHere("the weights of stage 1 were not seen")
    network, record = load_model(trained.run.model_url)
    learnt, clusters = DetectorDescriptor(record.network.shape), trained.settings.cluster.clusters
    learnt.load_state_dict(load_file(trained.stage1))
    torch.manual_seed(0)
    fresh = LandmarkDetector.from_stage1(learnt, clusters, network.probabilities)
    if not record.clusters:
        raise DidNotHold("the model has no landmark")
    before = standing_out(trained, fresh, range(clusters))
    after = standing_out(trained, network, record.clusters)
    loss = [line["loss"] for line in trained.lines("step") if line["stage"] == 2]
    seen = (
        f"maps at labelled places above their mean: {before:.3f} before stage 2, {after:.3f} after it; "
        f"loss {loss[0]:.5f} to {loss[-1]:.5f}"
    )
    if not after > max(before, 0.01):
        raise DidNotHold(seen)
    return seen


def visible_in_most(trained: Trained) -> tuple[int, int]:
    """Landmarks that are visible in over 80 % of the test images, and all."""
    _, record = load_model(trained.run.model_url)
    tests = [shard for shard in trained.corpus.manifest.shards if shard.split == "test"]
    urls = [trained.run.predictions_url(shard.file) for shard in tests]
    confidence = np.concatenate([storage.load_npz(url)["confidence"] for url in urls])
    return int(((confidence >= record.visible).mean(axis=0) > VISIBLE_IMAGES).sum()), len(record.clusters)


def check_landmarks(trained: Trained) -> str:
    """Twelve landmarks must be visible in most test images."""
    shown, every = visible_in_most(trained)
    seen = f"{shown} of {every} landmarks visible in over 80 % of the test images"
    if shown < MIN_LANDMARKS:
        raise DidNotHold(seen)
    return seen


def check_error(trained: Trained) -> str:
    """The forward error must be below that of the first keypoints, or of a constant guess where these have none."""
    corpus = trained.corpus
    annotated = AnnotatedImages.of(corpus)
    if annotated is None:
        raise NotRunHere("the corpus has no annotations")
    _, model = load_model(trained.run.model_url)
    constant = score_constant(corpus, annotated)
    first = score_first_keypoints(trained.run, corpus, annotated, trained.settings).forward
    after = score_run(trained.run, corpus, annotated, model.visible).forward
    seen = f"forward error {percent(after)}; first keypoints {percent(first)}, constant guess {percent(constant)}"
    # Where no first cluster is in 80 % of the images there is no error to compare with, and any is better than none.
    if not after < (constant if np.isnan(first) else first):
        raise DidNotHold(seen)
    return seen


CRITERIA: dict[str, Callable[[Trained], str]] = {
    "labels": check_labels,
    "clusters": check_clusters,
    "weights": check_weights,
    "maps": check_maps,
    "landmarks": check_landmarks,
    "forward error": check_error,
}


def print_rounds(trained: Trained) -> None:
    """Prints the figures of every round."""
    names = ("labels_per_image", "clusters_in_use", "label_persistence", "inertia")
    rows = []
    for line in trained.lines("round"):
        cells = [f"{line[name]:.4g}" if name in line else "" for name in names]
        rows.append((str(line["round"]), line["made_by"], *cells))
    print_table(("round", "made by", *(name.replace("_", " ") for name in names)), rows)


def main() -> None:
    """Trains and says what held."""
    command, more = tyro.cli(Command, description=__doc__, return_unknown_args=True)
    sys.exit(command.run(more))


@dataclass(frozen=True)
class Command:
    """What is trained on what."""

    corpus: str = "drawings"
    """drawings, or a folder of images."""
    minutes: float = 60.0
    """That it may take on this machine if nothing else runs; it is ended after twice as many."""
    width: int = 64
    """Channels of the network, a multiple of 8; 256 is the published width."""
    out: Path = Path("runs/fullsize")
    """Folder of run, logs and table."""

    def run(self, more: Sequence[str]) -> int:
        """Trains and prints; returns the exit code."""
        name = f"{Path(self.corpus).name}-{self.width}"
        trained = Trained.at(self.out, name)
        if os.path.exists(trained.run.url):
            print(f"{trained.run.url} is there already; take another --out", file=sys.stderr)
            return 2
        self.out.mkdir(parents=True, exist_ok=True)
        scale = scale_of(self.width, torch.cuda.is_available(), self.minutes)
        plan = schedule(self.minutes, scale)
        title = (
            f"{machine()}; idle before: {100 * idle_share():.0f} %; {name}, {self.minutes:g} minutes; {scale}; {plan}"
        )
        print(title, flush=True)
        seconds, log = 120 * self.minutes, self.out / "logs" / f"{name}.txt"
        words = [*train_words(plan, scale, self.out, name), *more]

        def trains() -> str:
            train(trained, words, log, seconds, None)
            return "finished"

        rows: list[Row] = [checked("pack", lambda: pack(self.corpus, plan.images, self.out, name, seconds))]
        rows.append(checked("train", trains))
        if Path(trained.run.metrics_url).exists():
            print_rounds(trained)
            rows += [checked(each, partial(check, trained)) for each, check in CRITERIA.items()]
        return report(rows, title, self.out / f"{name}.md")


if __name__ == "__main__":
    main()
