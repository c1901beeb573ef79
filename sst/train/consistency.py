"""Label-free measures: how well points follow a warp, and how many labels persist."""

import math

import numpy as np

from cluster.shards import Labels


def equivariance_error(moved_NK2: np.ndarray, predicted_NK2: np.ndarray, size: float) -> float:
    """Mean distance between landmarks moved by a known warp and those predicted on the warped copy.

    Args:
        moved_NK2: landmarks of the plain images, moved by the warp; NaN = not visible.
        predicted_NK2: landmarks predicted on the warped images, in the same pixels; NaN = not visible.
        size: side of the image in those pixels.

    Returns:
        Per cent of `size`, over the landmarks visible in both; NaN if there are none.

    Raises:
        ValueError: if the shapes differ or `size` is not positive.
    """
    if moved_NK2.shape != predicted_NK2.shape:
        raise ValueError(f"landmarks of different shapes: {moved_NK2.shape} and {predicted_NK2.shape}")
    if not size > 0:
        raise ValueError(f"size must be positive, not {size}")
    distance = np.linalg.norm(moved_NK2.astype(np.float64) - predicted_NK2, axis=-1)
    distance = distance[np.isfinite(distance)]
    return float(100.0 * distance.mean() / size) if len(distance) else math.nan


def repeatability(moved_NK2: np.ndarray, predicted_NK2: np.ndarray, radius: float) -> np.ndarray:
    """Share of the images on which a landmark is visible before and after a known warp, and at the same place.

    Args:
        moved_NK2: landmarks of the plain images, moved by the warp; NaN = not visible.
        predicted_NK2: landmarks predicted on the warped images, in the same pixels; NaN = not visible.
        radius: pixels within which it is the same place.

    Returns:
        float64 (K,).
    """
    distance = np.linalg.norm(moved_NK2.astype(np.float64) - predicted_NK2, axis=-1)
    share: np.ndarray = (distance < radius).mean(0)  # a NaN is below nothing
    return share


def coverage(structure_NP2: np.ndarray, points_NK2: np.ndarray, reach: float) -> float:
    """Share of what recurs on the object that lies within reach of a landmark.

    Args:
        structure_NP2: labelled points of all clusters, whether they became landmarks or not; NaN = none.
        points_NK2: visible landmarks; NaN = not visible.
        reach: pixels.

    Returns:
        A fraction of the labelled points; NaN if there are none.
    """
    there = np.isfinite(structure_NP2[..., 0])
    if not there.any():
        return math.nan
    gap = np.linalg.norm(structure_NP2[:, :, None].astype(np.float64) - points_NK2[:, None], axis=-1)
    return float((gap < reach).any(-1)[there].mean())  # a NaN is below nothing


def label_persistence(previous: Labels, current: Labels, radius: float) -> float:
    """Share of the previous labels that are found again: same image, same cluster, at most `radius` away.

    Args:
        previous: a shard's labels of one round.
        current: the same shard's labels of a later round.
        radius: in the labels' units, heatmap cells.

    Returns:
        A fraction; NaN if there are no previous labels.

    Raises:
        ValueError: if the two have different numbers of images.
    """
    if len(previous) != len(current):
        raise ValueError(f"label shards of different images: {len(previous)} and {len(current)}")
    if not len(previous.points):
        return math.nan
    clusters = 1 + max(int(labels.cluster.max(initial=0)) for labels in (previous, current))
    # A cluster occurs at most once per image, so (image, cluster) names a label.
    _, before, after = np.intersect1d(
        _label_names(previous, clusters),
        _label_names(current, clusters),
        assume_unique=True,
        return_indices=True,
    )
    distance = np.linalg.norm(previous.points[before].astype(np.float64) - current.points[after], axis=1)
    return float((distance <= radius).sum() / len(previous.points))


def _label_names(labels: Labels, clusters: int) -> np.ndarray:
    image = np.repeat(np.arange(len(labels), dtype=np.int64), np.diff(labels.offsets))
    names: np.ndarray = image * clusters + labels.cluster
    return names
