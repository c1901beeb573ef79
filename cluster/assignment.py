"""From descriptors to labels: each image's points are matched to clusters one to one.

Shape letters: N points, K clusters, D descriptor size, P and M points of an image.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from cluster.shards import Descriptors, Labels, widened

CACHED_ROWS = 1_024
"""Descriptors that are widened to float32 at once: 1 MB of them at the published width stay in a core's cache."""


@dataclass(frozen=True)
class Assignment:
    """Matches of one image.

    Attributes:
        point: int64 (n,): index of the point, ascending.
        cluster: int64 (n,): its cluster; no cluster occurs twice.
        distance: float32 (n,): squared L2 distance of the point's descriptor to the centroid.
    """

    point: np.ndarray
    cluster: np.ndarray
    distance: np.ndarray


@dataclass(frozen=True)
class NearestStatistics:
    """Squared distances of points to their nearest centroid, summed per cluster; shards add up with `+`.

    Attributes:
        count: int64 (K,).
        total: float64 (K,): sum of the distances.
        total_square: float64 (K,): sum of their squares.
    """

    count: np.ndarray
    total: np.ndarray
    total_square: np.ndarray

    @classmethod
    def of(cls, distance_NK: np.ndarray) -> "NearestStatistics":
        """Statistics of points whose squared distances to all clusters are given."""
        clusters = distance_NK.shape[1]
        nearest = distance_NK.argmin(axis=1)
        distance = np.take_along_axis(distance_NK, nearest[:, None], axis=1)[:, 0].astype(np.float64)
        return cls(
            np.bincount(nearest, minlength=clusters),
            np.bincount(nearest, weights=distance, minlength=clusters),
            np.bincount(nearest, weights=distance**2, minlength=clusters),
        )

    def __add__(self, other: "NearestStatistics") -> "NearestStatistics":
        return NearestStatistics(
            self.count + other.count, self.total + other.total, self.total_square + other.total_square
        )

    def thresholds(self) -> np.ndarray:
        """Mean plus population standard deviation per cluster, float32 (K,); 0 for an empty cluster.

        Source: Mallis et al. 2020, section 3.2.
        """
        count = np.maximum(self.count, 1)
        mean = self.total / count
        variance = np.maximum(self.total_square / count - mean**2, 0.0)
        return np.asarray(mean + np.sqrt(variance), dtype=np.float32)


def squared_distances(desc_ND: np.ndarray, centroids_KD: np.ndarray) -> np.ndarray:
    """Squared L2 distances (N, K), float32, by matrix products.

    Raises:
        ValueError: if the two widths differ.
    """
    if desc_ND.ndim != 2 or centroids_KD.ndim != 2 or desc_ND.shape[1] != centroids_KD.shape[1]:
        raise ValueError(f"descriptors {desc_ND.shape} and centroids {centroids_KD.shape} must be (N, D) and (K, D)")
    centroids_KD = np.asarray(centroids_KD, np.float32)
    doubled_DK, norm_K = -2 * centroids_KD.T, np.einsum("kd,kd->k", centroids_KD, centroids_KD)
    distance_NK = np.empty((len(desc_ND), len(centroids_KD)), np.float32)
    for first in range(0, len(desc_ND), CACHED_ROWS):
        rows_ND = widened(desc_ND[first : first + CACHED_ROWS])
        part_NK = np.matmul(rows_ND, doubled_DK, out=distance_NK[first : first + CACHED_ROWS])
        part_NK += np.einsum("nd,nd->n", rows_ND, rows_ND)[:, None]
        part_NK += norm_K
        np.maximum(part_NK, 0, out=part_NK)
    return distance_NK


def assign(desc_ND: np.ndarray, centroids_KD: np.ndarray) -> Assignment:
    """Matches an image's points to clusters one to one, with the least total squared L2 distance.

    Args:
        desc_ND: L2-normalised descriptors; N may be 0.
        centroids_KD: cluster centres.

    Returns:
        min(N, K) matches.

    Raises:
        ValueError: if the two widths differ.

    Source: Mallis et al. 2020, section 3.2.
    """
    return _match(squared_distances(desc_ND, centroids_KD))


def assign_shard(descriptors: Descriptors, centroids_KD: np.ndarray) -> tuple[Labels, NearestStatistics]:
    """Assigns every image of a shard.

    All matches are kept with their distances: the thresholds are known only when all shards' statistics are
    added, and are applied by `Labels.below` when labels are read.

    Raises:
        ValueError: if the descriptors' and the centroids' widths differ.
    """
    distance_NK = squared_distances(descriptors.descriptors, centroids_KD)
    offsets = descriptors.offsets
    matches = [_match(distance_NK[a:b]) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    rows = _joined([match.point + first for match, first in zip(matches, offsets, strict=False)], np.int64)
    labels = Labels(
        offsets=np.cumsum([0, *(len(match.point) for match in matches)], dtype=np.int64),
        points=descriptors.points[rows],
        cluster=_joined([match.cluster for match in matches], np.int16),
        distance=_joined([match.distance for match in matches], np.float32),
    )
    return labels, NearestStatistics.of(distance_NK)


def _match(distance_NK: np.ndarray) -> Assignment:
    nearest_N = distance_NK.argmin(axis=1)
    if len(np.unique(nearest_N)) == len(nearest_N):  # nobody competes: the nearest clusters are the optimum
        point, cluster = np.arange(len(nearest_N)), nearest_N
    else:
        point, cluster = linear_sum_assignment(distance_NK)
    return Assignment(point, cluster, distance_NK[point, cluster])


def _joined(parts: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    """Concatenation that is also legal for a shard without images."""
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype)
