"""Scores of a finished run: predictions against annotations, which nothing else in the system reads."""

from dataclasses import dataclass

import numpy as np

from cluster import storage
from cluster.assignment import assign
from sst.config import TrainSettings
from sst.data.shards import ShardInfo, read_shard
from sst.nn.geometry import SCORING_SIZE, STRIDE, box_to_view, transform_points
from sst.report.evaluation import PROTOCOLS, Scores, constant_guess, evaluate
from sst.train.extraction import first_keypoints
from sst.train.keypoints import generic_detector
from sst.train.rounds import Corpus
from sst.train.run_directory import RunDirectory

TRAIN_IMAGES = 1000
"""Annotated training images that the regressions may be fitted on (paper, section 4)."""


@dataclass(frozen=True)
class Annotated:
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
    def of(cls, corpus: Corpus) -> "Annotated | None":
        """Reads the first 1,000 annotated training images and all annotated test images; None where there are none.

        Raises:
            ValueError: if images have different numbers of points.
        """
        rows: list[tuple[ShardInfo, np.ndarray]] = []
        points: list[np.ndarray] = []
        tests: list[bool] = []
        for shard in sorted(corpus.manifest.shards, key=lambda s: (s.split == "test", s.file)):
            if shard.split == "train" and len(points) >= TRAIN_IMAGES:
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
        if not points or not any(tests) or all(tests):
            return None
        if len({len(p) for p in points}) > 1:
            raise ValueError("annotated images have different numbers of points, so they cannot be scored together")
        return cls(rows, np.stack(points), np.array(tests))


def score_run(run: RunDirectory, corpus: Corpus, annotated: Annotated, visible: float) -> Scores:
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


def score_first_keypoints(run: RunDirectory, corpus: Corpus, annotated: Annotated, settings: TrainSettings) -> Scores:
    """The baseline without training: each cluster of the first keypoints taken as a landmark.

    Test images get keypoints and the nearest matching clusters of round 0; nothing is fitted on them.
    """
    record, centroids = run.record(0), run.centroids(0)
    assert record.thresholds is not None
    thresholds = np.array(record.thresholds)
    detector = generic_detector(settings.keypoints)
    to_pixels = SCORING_SIZE / settings.network.input_size * STRIDE
    parts = []
    for shard, numbers in annotated.rows:
        found, _ = first_keypoints(corpus.url, shard, detector, settings.network.input_size)
        points = np.full((len(numbers), len(centroids), 2), np.nan)
        for row, number in enumerate(numbers):
            own, descriptors = found.sample(number)
            match = assign(descriptors, centroids)
            sure = match.distance < thresholds[match.cluster]
            points[row, match.cluster[sure]] = own[match.point[sure]] * to_pixels
        parts.append(points)
    return evaluate(np.concatenate(parts), annotated.groundtruth, annotated.is_test, protocol_of(corpus))


def score_constant(corpus: Corpus, annotated: Annotated) -> float:
    """Forward error of always answering the mean training points."""
    return constant_guess(annotated.groundtruth, annotated.is_test, protocol_of(corpus))


def protocol_of(corpus: Corpus) -> str:
    """The corpus's scoring protocol; by the annotated box's size where the packer named none."""
    name = corpus.manifest.protocol or "ls3d"
    if name not in PROTOCOLS:
        raise ValueError(f"the manifest of {corpus.url} names protocol {name!r}; known are {sorted(PROTOCOLS)}")
    return name
