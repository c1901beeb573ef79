"""Landmarks that refine themselves: the network's own answers become the labels of its next round of training.

An answer counts where the network is sure of it, and gives the same place on a randomly warped copy of the image. What
agrees under warps averages out what single labels were off by, and where clusters had no label answers fill the gap.

Shape letters: N images, K clusters. Points are (x, y) in pixels of a 256 px view.
"""

from dataclasses import dataclass

import numpy as np

from cluster.merging import Overlap, merge_plan
from cluster.shards import Labels
from sst.nn.geometry import SCORING_SIZE, STRIDE

LOST = 0.5
"""A landmark that agrees with itself in less than this share of the images that had its label is set back."""

PATIENCE = 4
"""Refinements without a gain after which there are no more."""

GAIN = 0.01
"""Share by which answers must agree better than ever before for it to be a gain: less is noise of the warps."""

FAR_APART = 0.125
"""Share of the view from which landmarks are far enough apart: beyond, more distance makes none the better choice."""


def agreed(
    plain_NK2: np.ndarray, sure_NK: np.ndarray, warped_NK2: np.ndarray, again_NK: np.ndarray, radius: float
) -> np.ndarray:
    """The mean of an answer and of that on a warped copy, moved back; float32 (N, K, 2), NaN where it does not count.

    Args:
        plain_NK2: answers.
        sure_NK: bool, whether the network is sure of them.
        warped_NK2: answers on warped copies, moved back.
        again_NK: bool, whether it is sure of these.
        radius: pixels within which both are the same place.
    """
    same_NK = np.linalg.norm(plain_NK2 - warped_NK2, axis=-1) < radius
    mean_NK2 = (plain_NK2 + warped_NK2) / 2
    return np.where((sure_NK & again_NK & same_NK)[..., None], mean_NK2, np.nan).astype(np.float32)


def labels_of(points_NK2: np.ndarray, input_size: int) -> Labels:
    """Labels of a shard at points that are not NaN."""
    image, cluster = np.isfinite(points_NK2[..., 0]).nonzero()
    counts = np.bincount(image, minlength=len(points_NK2))
    places = points_NK2[image, cluster] * (input_size / SCORING_SIZE / STRIDE)
    offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
    return Labels(offsets, places.astype(np.float32), cluster.astype(np.int16), np.zeros(len(image), np.float32))


def points_of(labels: Labels, clusters: int, input_size: int) -> np.ndarray:
    """A shard's labels as points; float32 (N, K, 2), NaN where there is none."""
    points = np.full((len(labels), clusters, 2), np.nan, np.float32)
    image = np.repeat(np.arange(len(labels)), np.diff(labels.offsets))
    points[image, labels.cluster] = labels.points * np.float32(SCORING_SIZE / input_size * STRIDE)
    return points


@dataclass(frozen=True)
class Agreement:
    """How far answers agree, summed over images; shards add up with `+`.

    Attributes:
        images: their number.
        found: int64 (K,): images in which the answer counts.
        near: int64 (K, K): images in which two answers count and lie at the same place.
        both: int64 (K, K): images in which both count.
        apart: float64 (K, K): sum of their distances there.
        compared: int64 (K,): images in which the label before is there too.
        slid: float64 (K, 2): sum of the steps from there.
        error: float64 (K,): sum of the distances between the answers on an image and on its warped copy, where found.
    """

    images: int
    found: np.ndarray
    near: np.ndarray
    both: np.ndarray
    apart: np.ndarray
    compared: np.ndarray
    slid: np.ndarray
    error: np.ndarray

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def agreement(points_NK2: np.ndarray, before_NK2: np.ndarray, error_NK: np.ndarray, radius: float) -> Agreement:
    """Counts of one shard.

    Args:
        points_NK2: from `agreed`.
        before_NK2: labels before, NaN where there are none.
        error_NK: distance between each answer and that on the warped copy.
        radius: pixels within which two landmarks are one place.
    """
    there_NK = np.isfinite(points_NK2[..., 0])
    clusters = points_NK2.shape[1]
    near, both, apart = (
        np.zeros((clusters, clusters), int),
        np.zeros((clusters, clusters), int),
        np.zeros((clusters,) * 2),
    )
    for points_K2, there_K in zip(points_NK2.astype(np.float64), there_NK, strict=True):
        here = np.flatnonzero(there_K)
        gap = np.linalg.norm(points_K2[here, None] - points_K2[None, here], axis=-1)
        pairs = np.ix_(here, here)
        near[pairs] += gap < radius
        both[pairs] += 1
        apart[pairs] += gap
    steps = points_NK2.astype(np.float64) - before_NK2
    return Agreement(
        len(points_NK2),
        there_NK.sum(0),
        near,
        both,
        apart,
        np.isfinite(steps[..., 0]).sum(0),
        np.nansum(steps, 0),
        np.where(there_NK, error_NK, 0.0).sum(0, dtype=np.float64),
    )


def set_back(found: Agreement, active_K: np.ndarray, population_K: np.ndarray, radius: float) -> np.ndarray:
    """Landmarks that have gone wrong, which take their labels of before again; bool (K,).

    Those that agree with themselves in far fewer images than had a label (a landmark that answers one and the same
    place of the view does not move with the warp), and those whose answers have slid to a place beside their labels.

    Args:
        found: over all images.
        active_K: bool.
        population_K: labels before.
        radius: pixels of the mean step from which it has slid.
    """
    lost = found.found < LOST * population_K
    mean_step = found.slid / np.maximum(1, found.compared)[:, None]
    slid: np.ndarray = np.linalg.norm(mean_step, axis=1) > radius
    return np.asarray(active_K & (lost | slid))


def spread_out(found: Agreement, candidate_K: np.ndarray, wanted: int) -> np.ndarray:
    """The landmarks to keep where there are more than are wanted; bool (K,).

    One after the other that agrees in the most images, times how far it lies from the nearest that is already kept (up
    to `FAR_APART`): so that they cover the object instead of crowding where it is plainest.

    Args:
        found: over all images.
        candidate_K: bool.
        wanted: how many at most.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        distance_KK = np.where(found.both > 0, found.apart / found.both, np.inf)
    worth_K = np.where(candidate_K, found.found / max(1, found.images), -1.0)
    room_K = np.ones(len(worth_K))
    kept = np.zeros(len(worth_K), bool)
    for _ in range(min(wanted, int(candidate_K.sum()))):
        chosen = int(np.argmax(np.where(kept, -1.0, worth_K * room_K)))
        kept[chosen] = True
        room_K = np.minimum(room_K, distance_KK[chosen] / (FAR_APART * SCORING_SIZE))
    return kept


def kept_landmarks(
    found: Agreement, active_K: np.ndarray, population_K: np.ndarray, share: float, wanted: int | None
) -> np.ndarray:
    """The landmarks that go on: of those at one place the one with the most labels, of too many a spread; bool (K,).

    Args:
        found: over all images.
        active_K: those so far.
        population_K: labels of each before.
        share: see `cluster.merging.merge_plan`.
        wanted: at most so many; None for all.
    """
    count_K = np.where(active_K, found.found, 0)
    near_KK = np.where(active_K[:, None] & active_K, found.near, 0)
    mapping = merge_plan(Overlap(count_K, near_KK), np.where(active_K, population_K, -1), share)
    own_place = active_K & (mapping == np.arange(len(mapping)))
    return own_place if wanted is None else spread_out(found, own_place, wanted)


def settled(errors: list[float]) -> bool:
    """Whether refinements have ceased to gain.

    Args:
        errors: for each so far, how far answers on images and on their warped copies lie apart.
    """
    before, last = errors[:-PATIENCE], errors[-PATIENCE:]
    return bool(before) and min(last) > (1 - GAIN) * min(before)
