"""Plain functions of one shard: what the network sees on all its images, in the shard's order."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from cluster.assignment import assign
from cluster.shards import Descriptors, Labels, widened
from sst.config import TrainSettings
from sst.data.corpus import Corpus
from sst.data.loader import decode_to_view, shard_batches
from sst.data.shards import RawSample, ShardInfo, decode, read_shard
from sst.nn.augment import Augmentation, invert_affine, random_affine, warp_images
from sst.nn.geometry import SCORING_SIZE, STRIDE, box_to_view, transform, transform_points
from sst.nn.losses import sample_descriptors
from sst.nn.network import LandmarkDetector
from sst.nn.precision import Precision, autocast
from sst.nn.steps import Batch, describe, keypoint_maps
from sst.nn.suppression import decode_keypoints, decode_landmarks
from sst.nn.symmetry import mirror_matrix
from sst.train.keypoints import VIEW, KeypointDetector
from sst.train.refinement import agreed
from sst.train.symmetry import Symmetry, find_symmetry

logger = logging.getLogger(__name__)

BATCH = 64
"""Images per forward pass without gradients."""

KEYPOINT_BATCH = 16
"""Images whose first keypoints are sought at once: a network of others, at 448 px, takes some tens of MB for each."""


def first_keypoints(
    corpus: str, shard: ShardInfo, detector: KeypointDetector, input_size: int, *, background: bool = False
) -> tuple[Descriptors, np.ndarray]:
    """First keypoints of a shard's images (stage 0).

    Args:
        corpus: directory of the shards.
        shard: the shard.
        detector: finds and describes them.
        input_size: side S of the network's view, which sets the heatmap units of the points.
        background: seek them in the stored context around the object too, and keep those.

    Returns:
        The keypoints, and whether each lies on the object: within the view and, where there is one, the object box;
        bool (N,). Without `background` all do.
    """
    import cv2

    cv2.setNumThreads(1)  # a shard is a task, and there are as many tasks as cores
    points, descriptors, inside, counts = [], [], [], [0]
    samples = read_shard(f"{corpus}/{shard.file}", shard.sha256)
    for group in iter(lambda: list(islice(samples, KEYPOINT_BATCH)), []):
        for found, described, on_object in keypoints_of(group, detector, background):
            kept = np.ones(len(found), bool) if background else on_object
            points.append(found[kept] * (input_size / VIEW / STRIDE))
            descriptors.append(described[kept].astype(np.float16))
            inside.append(on_object[kept])
            counts.append(int(kept.sum()))
    empty = np.zeros((0, 2), np.float32), np.zeros((0, detector.descriptor_size), np.float16)
    keypoints = Descriptors(
        np.cumsum(counts, dtype=np.int64),
        np.concatenate([empty[0], *points], dtype=np.float32),
        np.concatenate([empty[1], *descriptors]),
    )
    return keypoints, np.concatenate([np.zeros(0, bool), *inside])


def keypoints_of(
    samples: Sequence[RawSample], detector: KeypointDetector, background: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Keypoints of images in pixels of the view at `VIEW`, their descriptors, and which lie on the object.

    An image that can't be decoded has none.
    """
    shown = [_shown(sample, detector.sees_view, background) for sample in samples]
    every = iter(detector([image for image, _ in shown if image is not None]))
    for sample, (image, to_view) in zip(samples, shown, strict=True):
        if image is None:
            yield np.zeros((0, 2)), np.zeros((0, detector.descriptor_size)), np.zeros(0, bool)
            continue
        found, described = next(every)
        found = transform_points(to_view, found).astype(np.float32)
        inside = np.asarray(((found >= 0) & (found <= VIEW - 1)).all(axis=1))
        if sample.meta.object_box is not None:
            stored_to_view = box_to_view(np.array(sample.meta.box), VIEW)
            low, high = transform_points(stored_to_view, np.array(sample.meta.object_box).reshape(2, 2))
            inside &= ((found >= low) & (found <= high)).all(axis=1)
        yield found, described, inside


def _shown(sample: RawSample, sees_view: bool, background: bool) -> tuple[np.ndarray | None, np.ndarray]:
    """What the detector is shown of an image, none if it can't be decoded; and the matrix from there to the view."""
    import cv2

    try:
        if not sees_view:
            return decode(sample)[0], box_to_view(np.array(sample.meta.box), VIEW)
        image, to_view = decode_to_view(sample, VIEW)
    except ValueError as error:
        logger.warning("left out: %s", error)
        return None, np.eye(3)
    margin = VIEW // 2 if background else 0
    side = VIEW + 2 * margin
    to_canvas = np.array([[1.0, 0.0, margin], [0.0, 1.0, margin], [0.0, 0.0, 1.0]]) @ to_view
    # Beyond the stored image its border goes on, so that no edge appears there.
    canvas = cv2.warpAffine(image, to_canvas[:2], (side, side), borderMode=cv2.BORDER_REPLICATE)
    return canvas, np.array([[1.0, 0.0, -margin], [0.0, 1.0, -margin], [0.0, 0.0, 1.0]])


@torch.inference_mode()
def extract_descriptors(
    model: nn.Module,
    corpus: str,
    shard: ShardInfo,
    previous: Labels | None,
    *,
    input_size: int,
    threshold: float,
    precision: Precision,
    enough: int | None = None,
) -> tuple[Descriptors, int, int]:
    """Keypoints of the detector, united with previous labels or alone, and their descriptors (paper, section 3.2).

    Args:
        model: stage-1 network.
        corpus: directory of the shards.
        shard: the shard.
        previous: the shard's labels of the round before; or none, so that labels are what the detector finds now.
        input_size: side S of the view.
        threshold: detector confidence above which a keypoint is taken.
        precision: see `sst.nn.precision`.
        enough: see `sst.nn.steps.describe`.

    Returns:
        The keypoints; how many were dropped, since their descriptors cannot be compared; and in how many images
        previous labels were united.
    """
    device = next(model.parameters()).device
    counts, points, descriptors = [], [], []  # type: list[np.ndarray], list[np.ndarray], list[np.ndarray]
    first = united = 0
    for batch in shard_batches(corpus, shard, input_size, BATCH):
        labels = None
        if previous is not None:
            labels = torch.from_numpy(padded_points(previous, first, len(batch.keys))).to(device)
        *found, united_B = describe(
            model,
            batch.to(device),
            labels,
            input_size=input_size,
            threshold=threshold,
            precision=precision,
            enough=enough,
        )
        for values, each in zip((counts, points, descriptors), found, strict=True):
            values.append(each.cpu().numpy())
        united += int(united_B.sum())
        first += len(batch.keys)
    ends = np.cumsum(np.concatenate([[0], *counts]), dtype=np.int64)
    shard_descriptors = Descriptors(ends, np.concatenate(points), np.concatenate(descriptors))
    kept = usable(shard_descriptors.descriptors)
    return shard_descriptors.keep(kept), int((~kept).sum()), united


def usable(descriptors_ND: np.ndarray) -> np.ndarray:
    """Which normalised descriptors can be compared: not zero, not NaN (the published code met them); bool (N,)."""
    rows = widened(descriptors_ND)
    return np.asarray(np.isfinite(rows).all(1) & ((rows**2).sum(1) > 0.5))


def padded_points(labels: Labels, first: int, count: int) -> np.ndarray:
    """Labelled points of `count` images from image `first` on; float32 (B, P, 2), padded with NaN."""
    ends = labels.offsets[first : first + count + 1]
    number = np.diff(ends)
    padded = np.full((count, max(1, number.max(initial=0)), 2), np.nan, np.float32)
    padded[np.arange(padded.shape[1]) < number[:, None]] = labels.points[ends[0] : ends[-1]]
    return padded


@dataclass(frozen=True)
class Predictions:
    """Landmarks of a shard's images.

    Attributes:
        points: float32 (S, K, 2), pixels of a 256 px view.
        confidence: float32 (S, K).
    """

    points: np.ndarray
    confidence: np.ndarray

    def visible_points(self, visible: float) -> np.ndarray:
        """The points, NaN where the confidence is below `visible`."""
        return np.where((self.confidence >= visible)[..., None], self.points, np.nan)


@torch.inference_mode()
def predict_landmarks(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    input_size: int,
    precision: Precision,
    warp_seed: int | None = None,
    mirrored: bool = False,
) -> Predictions:
    """Every landmark's peak on every image.

    Args:
        model: stage-2 network.
        batches: images in order.
        input_size: side S of the view.
        precision: see `sst.nn.precision`.
        warp_seed: predict on randomly warped copies instead, and move the points back to the un-warped view.
        mirrored: predict on mirrored images instead, and mirror the points back.
    """
    device = next(model.parameters()).device
    scale = SCORING_SIZE / input_size * STRIDE
    points, confidences = [], []
    generator = torch.Generator().manual_seed(warp_seed or 0)
    for batch in (batch.to(device) for batch in batches):
        warp = torch.eye(3).expand(len(batch.keys), 3, 3).to(device)
        if warp_seed is not None:
            warp = random_affine(len(batch.keys), input_size, Augmentation(), generator).to(device)
        if mirrored:
            warp = mirror_matrix(input_size, device) @ warp
        with autocast(device, precision):
            heat = model(warp_images(batch.images, warp @ batch.to_view, input_size))
        found, confidence = decode_landmarks(heat)
        found = transform(invert_affine(warp), found * STRIDE) / STRIDE
        points.append((found * scale).cpu().numpy())
        confidences.append(confidence.cpu().numpy())
    return Predictions(np.concatenate(points), np.concatenate(confidences))


@torch.inference_mode()
def found_clusters(
    model: nn.Module,
    batch: Batch,
    centroids: np.ndarray,
    thresholds: np.ndarray,
    *,
    input_size: int,
    threshold: float,
    precision: Precision,
    warp_B33: torch.Tensor | None = None,
) -> np.ndarray:
    """Where the clusters of a round are found on images; float64 (B, K, 2), pixels of the S x S view, NaN where not.

    Args:
        model: stage-1 network.
        batch: B images, on the model's device.
        centroids: of the clusters.
        thresholds: squared distances below which a point counts.
        input_size: side S of the view.
        threshold: detector confidence above which a keypoint is taken.
        precision: see `sst.nn.precision`.
        warp_B33: by which the views are changed first; the points are then those of the changed ones.
    """
    heat, desc = keypoint_maps(model, batch, input_size, precision, warp_B33)
    image, points, _ = decode_keypoints(heat, threshold)
    result = np.full((len(batch.keys), len(centroids), 2), np.nan)
    for row in range(len(batch.keys)):
        each = points[image == row]
        raw = sample_descriptors(desc[row : row + 1], each[None])[0]
        unit = functional.normalize(raw, dim=-1).cpu().numpy()
        kept = usable(unit)
        match = assign(unit[kept], centroids)
        sure = match.distance < thresholds[match.cluster]
        result[row, match.cluster[sure]] = each.cpu().numpy()[kept][match.point[sure]] * STRIDE
    return result


def predict_shard(
    model: nn.Module,
    corpus: Corpus,
    shard: ShardInfo,
    settings: TrainSettings,
    warp_seed: int | None = None,
    mirrored: bool = False,
) -> Predictions:
    """Landmarks on all images of a shard; see `sst.train.extraction.predict_landmarks`."""
    size = settings.network.input_size
    batches = shard_batches(corpus.url, shard, size, BATCH)
    return predict_landmarks(
        model,
        batches,
        input_size=size,
        precision=settings.resources.precision,
        warp_seed=warp_seed,
        mirrored=mirrored,
    )


def agreed_answers(
    model: nn.Module, corpus: Corpus, shard: ShardInfo, settings: TrainSettings, warp_seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """A shard's landmarks where the network gives the same place on a randomly warped copy of the image.

    Args:
        model: stage-2 network.
        corpus: of the shard.
        shard: whose images are looked at.
        settings: say how sure and how near both answers must be.
        warp_seed: of the warps.

    Returns:
        From `sst.train.refinement.agreed`, float32 (N, K, 2), pixels of a 256 px view; and the distance of both answers
        whether they count or not, (N, K).
    """
    two = settings.stage2
    plain, warped = (predict_shard(model, corpus, shard, settings, warp_seed=seed) for seed in (None, warp_seed))
    sure, again = (each.confidence >= two.refine_confidence for each in (plain, warped))
    points = agreed(plain.points, sure, warped.points, again, two.refine_radius)
    return points, np.linalg.norm(plain.points - warped.points, axis=-1)


def shard_symmetry(
    model: LandmarkDetector, corpus: Corpus, shard: ShardInfo, settings: TrainSettings, visible: float
) -> Symmetry:
    """Left/right pairs as the images of one shard show them."""
    plain, mirrored = (predict_shard(model, corpus, shard, settings, mirrored=flag) for flag in (False, True))
    return find_symmetry(plain.visible_points(visible), mirrored.visible_points(visible), SCORING_SIZE)
