"""How long a run will take on this machine, and the schedule that fits a time: from measured steps and passes.

What is measured is what the run will do: recorded steps on a GPU, whole passes over a shard with their reading
and decoding.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import nn

from cluster.kmeans import KMeansSettings, fit
from cluster.outliers import outlier_scores
from cluster.shards import Labels
from sst.config import Stage2Settings, TrainSettings
from sst.data.corpus import Corpus
from sst.data.shards import read_shard
from sst.errors import UserError
from sst.nn.network import DetectorDescriptor, LandmarkDetector, use_kernels
from sst.nn.optimizer import Update
from sst.nn.precision import laid_out
from sst.nn.replay import PLAIN_STEPS, own_stream, seeded, training_step
from sst.nn.steps import Batch, Losses, random_batch, stage1_losses, stage2_losses
from sst.run.placement import REST_GB, WORKER_GB, Machine
from sst.train.extraction import extract_descriptors, keypoints_of, predict_shard
from sst.train.keypoints import generic_detector
from sst.train.schedule import plan

MIN_ROUND = 150
"""Steps of a round, or between two mergings, below which there are rather fewer of them; the shortest schedule has as
many in the warm-up and in a single round, and twice as many in stage 2."""

START_SECONDS = 40.0
"""Starting Ray and its workers, and writing the report."""

ROUND_SECONDS = 2.0
"""Of a round or merging beyond its pass and k-means: metrics, records, a checkpoint (benchmarks/RESULTS.md)."""

SIDE_BY_SIDE = 1 / 0.92
"""How much longer a step takes when workers share a machine (benchmarks/RESULTS.md, from one worker to two)."""

POINTS = 20
"""Labelled points of an image, of which a pass is measured and k-means gets so many rows."""

KMEANS_ROWS = 20_000
"""Rows on which k-means is timed; its time goes with their number."""

KEYPOINT_IMAGES = 12
"""Images on which the first keypoints are timed."""

MEASURE_SECONDS = 10.0
"""After so long, besides the first time, nothing is repeated any more."""


@dataclass(frozen=True)
class Speed:
    """Measured on this machine.

    Attributes:
        stage1: seconds of a step of stage 1, as the run computes it.
        stage2: seconds of a step of stage 2.
        describe: seconds per image of extracting descriptors, all workers at it.
        predict: seconds per image of predicting landmarks, likewise.
        keypoints: seconds per image of the first keypoints, all cores at it.
        kmeans: seconds of a fit per row.
        first: seconds that the first steps and passes of both stages take beyond the others.
        memory_gb: that a run will take; of a GPU where there is one, else of the machine.
    """

    stage1: float
    stage2: float
    describe: float
    predict: float
    keypoints: float
    kmeans: float
    first: float
    memory_gb: float


def expected_seconds(settings: TrainSettings, images: int, speed: Speed) -> float:
    """How long a run will take from its start to its report.

    Args:
        settings: of the run.
        images: training images.
        speed: of the machine.
    """
    phases = plan(settings, images)
    steps = sum(phase.steps * (speed.stage1 if phase.stage == 1 else speed.stage2) for phase in phases)
    rounds = sum(phase.stage == 1 for phase in phases)  # each is followed by a correspondence
    refinements = settings.stage2.refine_rounds
    merges = len(phases) - rounds - refinements - 1
    kmeans = speed.kmeans * min(settings.cluster.sample, POINTS * images)
    # A refinement looks at every image and at a warped copy; 2 for the end.
    predicted = merges + 2 * refinements + 2
    passes = images * (speed.keypoints + rounds * speed.describe + predicted * speed.predict)
    between = (rounds + 1) * kmeans + (rounds + merges + refinements + 1) * ROUND_SECONDS
    return START_SECONDS + speed.first + steps + passes + between


def scaled(settings: TrainSettings, factor: float) -> TrainSettings:
    """The same schedule with all steps times a factor, down to a least length.

    Rounds and mergings become fewer before they become too short; nothing that was shorter becomes longer. Refinements
    keep their length, so that there are more or fewer of them; only the last that is left becomes shorter.
    """
    one, two = settings.stage1, settings.stage2

    def steps(count: int, minimum: int) -> int:
        return max(min(count, minimum), round(count * factor))

    in_rounds = steps(one.rounds * one.round_iterations, MIN_ROUND)
    rounds = max(min(1, one.rounds), min(one.rounds, in_rounds // MIN_ROUND))
    iterations = steps(two.iterations, 2 * MIN_ROUND)
    refinements = steps(two.refine_rounds, 1)
    in_refinements = steps(two.refine_rounds * two.refine_iterations, MIN_ROUND)
    refinement = min(two.refine_iterations, in_refinements) if refinements else two.refine_iterations
    share = (iterations + refinements * refinement) / stage2_steps(two)
    every = two.merge_every
    return settings.changed(
        stage1=one.changed(
            warmup_iterations=steps(one.warmup_iterations, MIN_ROUND),
            rounds=rounds,
            round_iterations=max(1, in_rounds // rounds) if rounds else one.round_iterations,
        ),
        stage2=two.changed(
            iterations=iterations,
            refine_rounds=refinements,
            refine_iterations=refinement,
            milestones=tuple(round(milestone * share) for milestone in two.milestones),
            merge_after=round(two.merge_after * iterations / two.iterations),
            merge_every=None
            if every is None
            else max(min(every, MIN_ROUND), round(every * iterations / two.iterations)),
        ),
    )


def stage2_steps(two: Stage2Settings) -> int:
    """Optimizer steps of stage 2, refinements included."""
    return two.iterations + two.refine_rounds * two.refine_iterations


def within(settings: TrainSettings, images: int, speed: Speed, minutes: float) -> TrainSettings:
    """The settings with the longest schedule that is over in the time, if need be longer than they have.

    Raises:
        UserError: if the shortest schedule takes longer; the message has how long.
    """
    shortest = expected_seconds(scaled(settings, 0.0), images, speed)
    if shortest > 60 * minutes:
        passes = shortest - expected_seconds(scaled(settings, 0.0), 0, speed)
        enough = math.ceil(shortest / 6) / 10
        raise UserError(
            f"--minutes {minutes:g} is too short: the shortest schedule takes {enough:g} minutes here, "
            f"{passes / 60:.1f} of them for going through {images} images, and the full one "
            f"{expected_seconds(settings, images, speed) / 60:.0f}; take --minutes {enough:g} or more, or fewer images"
        )
    step = min(speed.stage1, speed.stage2)
    factor = max(1.0, 60 * minutes / step / stage2_steps(settings.stage2))  # beyond what could fit
    while factor > 1e-5:
        # Whole rounds and mergings make the time jump, so no equation is solved.
        if expected_seconds(fitting := scaled(settings, factor), images, speed) <= 60 * minutes:
            return fitting
        factor *= 0.99
    return scaled(settings, 0.0)


def measure(settings: TrainSettings, machine: Machine, workers: int, corpus: Corpus) -> Speed:
    """Times each worker's share of a step and of a pass of both stages, the first keypoints and k-means.

    Takes some seconds.

    Args:
        settings: of the run.
        machine: this one.
        workers: that will share it.
        corpus: packed images, of which one shard is gone through.
    """
    device = torch.device("cuda" if machine.gpus else "cpu")
    shared = SIDE_BY_SIDE if workers > 1 else 1.0
    with as_in_training(machine, workers):
        use_kernels(device, settings.network.shape, settings.network.input_size, settings.resources.precision)
        keypoints = keypoint_seconds(settings, corpus)
        kmeans = kmeans_seconds(settings)
        one = stage_seconds(settings, device, workers, corpus, stage=1)
        two = stage_seconds(settings, device, workers, corpus, stage=2)
    memory = torch.cuda.max_memory_allocated() / 1e9 if machine.gpus else WORKER_GB * workers + REST_GB
    torch.cuda.empty_cache()  # this process lives as long as the run, and would keep what the workers need
    return Speed(
        stage1=shared * one[0],
        stage2=shared * two[0],
        describe=shared * one[1] / workers,
        predict=shared * two[1] / workers,
        keypoints=keypoints / machine.cpus,
        kmeans=kmeans,
        first=one[2] + two[2],
        memory_gb=memory,
    )


@contextmanager
def as_in_training(machine: Machine, workers: int) -> Iterator[None]:
    """While inside, torch computes as in one of the workers that share the machine."""
    threads, searches = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(max(1, int(machine.cpus) // workers))
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = searches


def stage_seconds(
    settings: TrainSettings, device: torch.device, workers: int, corpus: Corpus, stage: int
) -> tuple[float, float, float]:
    """(seconds of a step, of an image in a pass, of the first ones beyond that) of a stage, in one worker."""
    network, clusters = settings.network.shape, settings.cluster.clusters
    probabilities, kind = settings.stage2.objective == "focal", (settings.stage1, settings.stage2)[stage - 1].optimizer
    model: nn.Module = DetectorDescriptor(network) if stage == 1 else LandmarkDetector(network, clusters, probabilities)
    model = laid_out(model, device).train()
    update = Update(model, 1e-6, 0.0, kind)
    total = settings.stage1.pairs if stage == 1 else settings.stage2.batch
    batch = random_batch(max(2, total // workers), settings.network.input_size, clusters).to(device)
    active = torch.ones(clusters, dtype=torch.bool, device=device)
    shard = min(corpus.train, key=lambda each: each.samples)

    def losses_of(given: Batch, generator: torch.Generator) -> Losses:
        if stage == 1:
            return stage1_losses(model, given, settings.stage1_step(), generator)
        return stage2_losses(model, given, active, settings.stage2_step(), generator)

    step, recorded = training_step(model, update, losses_of), device.type == "cuda"
    take = seeded(step, list(model.parameters()), recorded, refused=lambda why: None)  # the run will say

    def one_step() -> None:
        take(batch, 0)
        if recorded:
            torch.cuda.synchronize()

    def one_pass() -> None:
        if stage == 2:
            predict_shard(model, corpus, shard, settings)
            return
        extract_descriptors(
            model,
            corpus.url,
            shard,
            some_labels(shard.samples, settings),
            input_size=settings.network.input_size,
            threshold=1.0,  # points are the labels' then, as many as there usually are
            precision=settings.resources.precision,
        )

    with own_stream(device):
        step_seconds, first_step = timed(one_step, time.perf_counter, first=PLAIN_STEPS + 1 if recorded else 1)
    model.eval()
    pass_seconds, first_pass = timed(one_pass, time.perf_counter)
    return step_seconds, pass_seconds / shard.samples, first_step + first_pass


def timed(
    work: Callable[[], None], clock: Callable[[], float], repeats: int = 3, first: int = 1
) -> tuple[float, float]:
    """(median seconds of up to so many times, seconds that the first ones took beyond that).

    After `MEASURE_SECONDS` it is not repeated again; where already the first ones took longer, once.

    Args:
        work: what is timed.
        clock: gives seconds.
        repeats: times that count.
        first: times before them, until everything is ready.
    """

    def seconds(times: int = 1) -> float:
        started = clock()
        for _ in range(times):
            work()
        return clock() - started

    ready, taken = seconds(first), list[float]()
    began = clock()
    while not taken or (len(taken) < repeats and clock() - began < MEASURE_SECONDS):
        taken.append(seconds())
    usual = statistics.median(taken)
    return usual, max(0.0, ready - first * usual)


def some_labels(images: int, settings: TrainSettings) -> Labels:
    """`POINTS` labels at random places of every image."""
    rng, number = np.random.default_rng(0), images * POINTS
    places = rng.uniform(0, settings.network.input_size / 4 - 1, (number, 2)).astype(np.float32)
    offsets = np.arange(0, number + 1, POINTS, dtype=np.int64)
    return Labels(offsets, places, np.zeros(number, np.int16), np.zeros(number, np.float32))


def keypoint_seconds(settings: TrainSettings, corpus: Corpus) -> float:
    """Seconds of a core for the first keypoints of an image, outlier scores included."""
    shard = corpus.train[0]
    detector, rng = generic_detector(settings.keypoints, settings.network.input_size), np.random.default_rng(0)
    reference = rng.normal(size=(settings.keypoints.outlier_reference, detector.descriptor_size)).astype(np.float32)
    samples = list(islice(read_shard(f"{corpus.url}/{shard.file}", shard.sha256), KEYPOINT_IMAGES))
    started = time.perf_counter()
    for _, described, _ in keypoints_of(samples, detector, settings.keypoints.remove_background):
        if len(described):
            outlier_scores(described, reference, neighbours=settings.keypoints.outlier_neighbours)
    return (time.perf_counter() - started) / len(samples)


def kmeans_seconds(settings: TrainSettings) -> float:
    """Seconds per row of a fit of as many iterations as there may be, at most; data with clusters need fewer."""
    rows = max(KMEANS_ROWS, 4 * settings.cluster.clusters)
    x = np.random.default_rng(0).normal(size=(rows, settings.network.descriptor_size)).astype(np.float32)
    started = time.perf_counter()
    fit(x, KMeansSettings(settings.cluster.clusters, settings.cluster.iterations, backend="torch"))
    return (time.perf_counter() - started) / rows
