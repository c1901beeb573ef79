"""Clusters of one round take the numbers of the previous round's clusters that they continue.

k-means is fitted afresh in every round, since descriptors drift from round to round. A cluster is known again by the
points that it labels: their place in the image stays, whatever becomes of their descriptors.

Shape letters: K clusters, N points, M previous labels.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree

from cluster.assignment import squared_distances
from cluster.shards import Descriptors, Labels


def shared_labels(previous: Labels, descriptors: Descriptors, centroids_KD: np.ndarray, radius: float) -> np.ndarray:
    """Counts, for a shard, which new cluster's points lie where which previous label was; shards add up with `+`.

    Of the points of an image the one nearest to a previous label counts, with the cluster whose centroid is nearest to
    its descriptor.

    Args:
        previous: the previous round's labels of the shard.
        descriptors: the new round's points of the same images.
        centroids_KD: the new round's centroids.
        radius: how far a point may be from a label, in heatmap cells.

    Returns:
        int64 (K, K): rows are new clusters, columns previous ones.

    Raises:
        ValueError: if the shards are of different images, or a label's cluster is none of K.
    """
    clusters = len(centroids_KD)
    if len(previous) != len(descriptors):
        raise ValueError(f"labels of {len(previous)} images and descriptors of {len(descriptors)} are of other shards")
    if previous.cluster.max(initial=-1) >= clusters:
        raise ValueError(f"a previous label names cluster {previous.cluster.max()} of {clusters}")
    if not len(previous.points) or not len(descriptors.points):
        return np.zeros((clusters, clusters), np.int64)
    # Images lie further apart along a third axis than any radius reaches, so one search serves the whole shard.
    places_N3, places_M3 = (_by_image(shard.points, shard.offsets, radius) for shard in (descriptors, previous))
    distance_M, point_M = cKDTree(places_N3).query(places_M3, distance_upper_bound=np.nextafter(radius, np.inf))
    found_M = np.isfinite(distance_M)
    new = squared_distances(descriptors.descriptors[point_M[found_M]], centroids_KD).argmin(axis=1)
    pairs = new * clusters + previous.cluster[found_M]
    return np.bincount(pairs, minlength=clusters**2).reshape(clusters, clusters)


def match_clusters(shared_KK: np.ndarray) -> np.ndarray:
    """The numbers that new clusters take, one to one, so that as many labels as possible keep theirs.

    Args:
        shared_KK: sum of `shared_labels` over all shards.

    Returns:
        int64 (K,): a permutation; clusters that continue none take the numbers that are left.
    """
    return np.asarray(linear_sum_assignment(shared_KK, maximize=True)[1], dtype=np.int64)


def _by_image(points_N2: np.ndarray, offsets: np.ndarray, radius: float) -> np.ndarray:
    image_N = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return np.column_stack([points_N2.astype(np.float64), image_N * (2 * radius + 1)])
