"""Stage 2: clusters that name the same place are merged.

Shape letters: B images, K clusters, N labels.
"""

from dataclasses import dataclass

import numpy as np

from cluster.shards import Labels


@dataclass(frozen=True)
class Overlap:
    """In how many images channels are confident, and confident at the same place; shards add up with `+`.

    Attributes:
        confident: int64 (K,).
        together: int64 (K, K), symmetric; the diagonal equals `confident`.
    """

    confident: np.ndarray
    together: np.ndarray

    def __add__(self, other: "Overlap") -> "Overlap":
        return Overlap(self.confident + other.confident, self.together + other.together)


def count_overlaps(
    points_BK2: np.ndarray, confidence_BK: np.ndarray, *, confident: float = 0.2, radius: float = 5.7
) -> Overlap:
    """Counts, for all pairs of channels, the images where both are confident and lie at the same place.

    Args:
        points_BK2: each channel's maximum, in pixels of 256.
        confidence_BK: the maximum's value.
        confident: least value of a confident maximum.
        radius: two points nearer than this, in pixels of 256, are the same place.

    Source: Mallis et al. 2020, merging of the second stage.
    """
    clusters = confidence_BK.shape[1]
    together_KK = np.zeros((clusters, clusters), np.int64)
    sure_BK = confidence_BK >= confident
    for points_K2, sure_K in zip(points_BK2.astype(np.float64), sure_BK, strict=True):
        there = np.flatnonzero(sure_K)  # most channels are silent, so only these are compared
        gap = points_K2[there, None] - points_K2[None, there]
        together_KK[np.ix_(there, there)] += np.hypot(gap[..., 0], gap[..., 1]) < radius
    return Overlap(sure_BK.sum(axis=0, dtype=np.int64), together_KK)


def merge_plan(overlap: Overlap, population_K: np.ndarray, share: float = 0.7) -> np.ndarray:
    """Decides which channel absorbs which.

    From the most to the least populated, a channel is absorbed by the first kept channel with which it lies together in
    more than `share` of the confident images of the rarer of the two; otherwise it is kept.

    Args:
        overlap: of all images.
        population_K: labels of each cluster. Confident images are no substitute: they saturate, as a trained channel is
            sure of itself almost everywhere.
        share: see above.

    Returns:
        int64 (K,): for each cluster the kept cluster that it becomes, itself if kept.

    Source: Mallis et al. 2020, merging of the second stage.
    """
    count_K = overlap.confident
    mapping_K = np.arange(len(count_K))
    kept: list[int] = []
    for cluster in np.argsort(-np.asarray(population_K), kind="stable"):
        needed = share * np.minimum(count_K[cluster], count_K[kept])
        absorbers = np.flatnonzero(overlap.together[cluster, kept] > needed)
        if len(absorbers):
            mapping_K[cluster] = kept[absorbers[0]]
        else:
            kept.append(int(cluster))
    return mapping_K


def apply_merge(labels: Labels, mapping_K: np.ndarray, population_K: np.ndarray) -> Labels:
    """Renames absorbed clusters; of several with one name in an image the most populated one's point stays.

    Args:
        labels: of one shard.
        mapping_K: from `merge_plan`.
        population_K: labels of each cluster over all shards, before the merging.
    """
    image_N = np.repeat(np.arange(len(labels)), np.diff(labels.offsets))
    merged_N = mapping_K[labels.cluster]
    # equal populations: the lower number is the more populated one, as in `merge_plan`
    order = np.lexsort((labels.cluster, -population_K[labels.cluster], merged_N, image_N))
    first = np.ones(len(order), bool)
    first[1:] = (np.diff(image_N[order]) != 0) | (np.diff(merged_N[order]) != 0)
    stays_N = np.zeros(len(order), bool)
    stays_N[order[first]] = True
    renamed = Labels(labels.offsets, labels.points, merged_N.astype(np.int16), labels.distance)
    return renamed.keep(stays_N)
