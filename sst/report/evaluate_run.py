"""Scores of a finished run: predictions against annotations, which nothing else in the system reads."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from cluster import storage
from cluster.assignment import assign
from sst.config import TrainSettings
from sst.data.corpus import Corpus, open_corpus
from sst.data.shards import ShardInfo, read_shard
from sst.environment import usable_cpus
from sst.errors import GivenPath, UserError
from sst.nn.geometry import SCORING_SIZE, STRIDE, box_to_view, transform_points
from sst.report.evaluation import MIN_TRAIN, PROTOCOLS, Scores, constant_guess, evaluate, percent
from sst.train.extraction import first_keypoints
from sst.train.keypoints import generic_detector
from sst.train.model import load_model
from sst.train.run_directory import RunDirectory

TRAIN_IMAGES = 1000
"""Annotated training images that the regressions may be fitted on (paper, section 4)."""


@dataclass(frozen=True)
class AnnotatedImages:
    """Annotated images of a corpus.

    Attributes:
        rows: for each used shard, the numbers of its annotated samples, with the training shards first.
        groundtruth: float64 (N, L, 2), pixels of a 256 px view.
        is_test: bool (N,).
    """

    rows: list[tuple[ShardInfo, np.ndarray]]
    groundtruth: np.ndarray
    is_test: np.ndarray

    @classmethod
    def of(cls, corpus: Corpus, *, training_only: bool = False) -> "AnnotatedImages | None":
        """Reads the first 1,000 annotated training images and all annotated test images; None where there are too few.

        Args:
            corpus: what to read.
            training_only: leave the test images unread.

        Raises:
            ValueError: if images have different numbers of points.
        """
        rows: list[tuple[ShardInfo, np.ndarray]] = []
        points: list[np.ndarray] = []
        tests: list[bool] = []
        for shard in sorted(corpus.manifest.shards, key=lambda s: (s.split == "test", s.file)):
            if len(points) >= TRAIN_IMAGES if shard.split == "train" else training_only:
                continue
            numbers = []
            for number, sample in enumerate(read_shard(f"{corpus.url}/{shard.file}", shard.sha256)):
                full = shard.split == "train" and len(points) >= TRAIN_IMAGES
                if sample.meta.points is not None and not full:
                    numbers.append(number)
                    matrix = box_to_view(np.array(sample.meta.box), int(SCORING_SIZE))
                    points.append(transform_points(matrix, np.array(sample.meta.points, np.float64)))
                    tests.append(shard.split == "test")
            rows.append((shard, np.array(numbers, np.int64)))
        trained = len(tests) - sum(tests)
        if not trained or not (training_only or (any(tests) and trained >= MIN_TRAIN)):
            return None
        if len({len(p) for p in points}) > 1:
            raise ValueError("annotated images have different numbers of points, so they cannot be scored together")
        return cls(rows, np.stack(points), np.array(tests))


def score_run(run: RunDirectory, corpus: Corpus, annotated: AnnotatedImages, visible: float) -> Scores:
    """Forward and backward error of a run's predictions.

    Args:
        run: a finished run.
        corpus: its corpus; the manifest names the protocol.
        annotated: its annotated images.
        visible: confidence from which a landmark counts as visible.
    """
    parts = []
    for shard, numbers in annotated.rows:
        arrays = storage.load_npz(run.predictions_url(shard.file))
        points = arrays["points"][numbers].astype(np.float64)
        points[arrays["confidence"][numbers] < visible] = np.nan
        parts.append(points)
    return evaluate(np.concatenate(parts), annotated.groundtruth, annotated.is_test, protocol_of(corpus))


def score_first_keypoints(
    run: RunDirectory, corpus: Corpus, annotated: AnnotatedImages, settings: TrainSettings
) -> Scores:
    """The baseline without training: each cluster of the first keypoints taken as a landmark.

    Test images get keypoints and the nearest matching clusters of round 0; nothing is fitted on them.
    """
    record, centroids = run.record(0), run.centroids(0)
    assert record.thresholds is not None
    thresholds = np.array(record.thresholds)
    detector = generic_detector(settings.keypoints, settings.network.input_size)
    to_pixels = SCORING_SIZE / settings.network.input_size * STRIDE

    def matched(shard: ShardInfo, numbers: np.ndarray) -> np.ndarray:
        found, _ = first_keypoints(corpus.url, shard, detector, settings.network.input_size)
        points = np.full((len(numbers), len(centroids), 2), np.nan)
        for row, number in enumerate(numbers):
            each, descriptors = found.sample(number)
            match = assign(descriptors, centroids)
            sure = match.distance < thresholds[match.cluster]
            points[row, match.cluster[sure]] = each[match.point[sure]] * to_pixels
        return points

    with ThreadPoolExecutor(usable_cpus()) as pool:  # OpenCV and torch let other threads compute
        parts = list(pool.map(matched, *zip(*annotated.rows, strict=True)))
    return evaluate(np.concatenate(parts), annotated.groundtruth, annotated.is_test, protocol_of(corpus))


def score_constant(corpus: Corpus, annotated: AnnotatedImages) -> float:
    """Forward error of always answering the mean training points."""
    return constant_guess(annotated.groundtruth, annotated.is_test, protocol_of(corpus))


def protocol_of(corpus: Corpus) -> str:
    """The corpus's scoring protocol; by the annotated box's size where the packer named none."""
    name = corpus.manifest.protocol or "ls3d"
    if name not in PROTOCOLS:
        raise ValueError(f"the manifest of {corpus.url} names protocol {name!r}; known are {sorted(PROTOCOLS)}")
    return name


class Run(BaseModel):
    """A finished run beside a constant guess and its first keypoints."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: Annotated[GivenPath, tyro.conf.Positional]
    """Directory or URL of the run."""
    shards: GivenPath | None = None
    """Where its shards lie now, if they have moved."""
    visible: float | None = None
    """Confidence from which a landmark counts as visible, instead of the run's own."""


class Predictions(BaseModel):
    """Landmarks from anywhere: an npz with prediction (N, K, 2), groundtruth (N, L, 2) and is_test (N,)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Annotated[GivenPath, tyro.conf.Positional]
    """The npz; coordinates in pixels of a 256 px view, NaN = not visible."""
    protocol: str
    """Scoring protocol: mafl, ls3d, human36m, faces68 or toy."""
    out: Annotated[GivenPath | None, tyro.conf.arg(name="json")] = None
    """Where the scores are written; printed if not given."""


def evaluate_run(config: Run) -> dict[str, tuple[float, Scores | None]]:
    """Scores a run and its baselines, prints the table and returns its rows.

    Raises:
        UserError: if the run is not finished or its corpus has no annotations.
    """
    run = RunDirectory(config.run)
    given_url = run.settings_url
    if not storage.exists(given_url):
        raise UserError(f"{run.url} is no run: it has no settings.json")
    given = storage.read_json(given_url)
    corpus = open_corpus(config.shards or given["shards"])
    try:
        _, model = load_model(run.model_url)
    except ValueError as error:
        remedy = "" if run.has_model() else "; go on with the run by the `landmarks train` command that began it"
        raise UserError(f"{error}{remedy}") from error
    annotated = AnnotatedImages.of(corpus)
    if annotated is None:
        raise UserError(
            f"{corpus.url} has fewer than {MIN_TRAIN} annotated training images, or no annotated test image, "
            "so nothing can be scored"
        )
    settings = TrainSettings.model_validate(given["settings"])
    first = score_first_keypoints(run, corpus, annotated, settings)
    trained = score_run(run, corpus, annotated, model.visible if config.visible is None else config.visible)
    rows: dict[str, tuple[float, Scores | None]] = {
        "constant guess": (score_constant(corpus, annotated), None),
        "first keypoints, no training": (first.forward, first),
        "trained landmarks": (trained.forward, trained),
    }
    table = Table("", "forward", "backward", "landmarks in over 80 % of images")
    for name, (forward, scores) in rows.items():
        kept = ("-", "-") if scores is None else (percent(scores.backward), str(scores.landmarks_kept))
        table.add_row(name, percent(forward), *kept)
    Console().print(table)
    return rows


def evaluate_predictions(config: Predictions) -> Scores:
    """Scores an npz; writes or prints JSON.

    Raises:
        UserError: if the file or its arrays are not as they should be, or the JSON file is there and not one of scores.
    """
    if (
        config.out is not None
        and storage.is_file(config.out)
        and b'"forward_curve"' not in storage.read_bytes(config.out)
    ):
        raise UserError(
            f"{config.out}: not scores of `landmarks evaluate`, so it is not replaced; choose another --json"
        )
    try:
        arrays = storage.load_npz(config.file)
        missing = [name for name in ("prediction", "groundtruth", "is_test") if name not in arrays]
        if missing:
            raise ValueError(f"{config.file}: arrays {missing} are missing")
        scores = evaluate(arrays["prediction"], arrays["groundtruth"], arrays["is_test"].astype(bool), config.protocol)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    if config.out is not None:
        storage.write_json(config.out, scores.to_json())
    else:
        Console().print_json(data=scores.to_json())
    return scores
