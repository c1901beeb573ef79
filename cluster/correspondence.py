"""One round of correspondence: descriptor shards in, label shards out.

A sample over all shards trains k-means; then every shard is assigned by itself. The only values that travel are
row numbers, centroids and per-cluster sums.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np

from cluster import storage
from cluster.actor import assign_shard_task, shared_labels_task
from cluster.dispatch import ShardMap
from cluster.kmeans import KMeansResult, sample_rows
from cluster.matching import match_clusters
from cluster.shards import Labels

Sample = Sequence[tuple[str, np.ndarray]]
"""(descriptor shard URL, row numbers) pairs."""

FitKMeans = Callable[[Sample], KMeansResult]
"""Fits centroids on a sample."""

SAMPLED_SHARDS = 2_000
"""Shards whose descriptors k-means reads at most: of ten million images there are 200 GB in forty thousand."""

SAME_PLACE = 1.5
"""Heatmap cells within which a point and a label of the round before are the same place: a neighbouring cell counts."""


@dataclass(frozen=True)
class PreviousLabels:
    """A round whose clusters the next one's are to continue.

    Attributes:
        round_url: its directory.
        thresholds: float32 (K,), by which its labels count.
    """

    round_url: str
    thresholds: np.ndarray


@dataclass(frozen=True)
class Correspondence:
    """What a round of correspondence found.

    Attributes:
        kmeans: the fit.
        thresholds: float32 (K,): a label stays where its squared distance is below its cluster's.
        population: int64 (K,): labels of each cluster that stay, over the corpus.
        images: number of images.
        seconds: "kmeans" and "assign", the latter with the counting.
    """

    kmeans: KMeansResult
    thresholds: np.ndarray
    population: np.ndarray
    images: int
    seconds: dict[str, float]


def shard_url(folder: str, shard: str) -> str:
    """What a folder holds for an image shard."""
    return storage.join(folder, shard.removesuffix(".tar") + ".npz")


def descriptors_folder(round_url: str) -> str:
    """Where a round keeps descriptors until it is complete."""
    return storage.join(round_url, "descriptors")


def descriptors_url(round_url: str, shard: str) -> str:
    """Where a round keeps the descriptors of an image shard."""
    return shard_url(descriptors_folder(round_url), shard)


def labels_url(round_url: str, shard: str) -> str:
    """Where a round keeps the labels of an image shard."""
    return shard_url(storage.join(round_url, "labels"), shard)


def correspond(
    round_url: str,
    descriptors: str,
    rows_per_shard: dict[str, int],
    fit: FitKMeans,
    run_on_shards: ShardMap,
    *,
    sample: int,
    seed: int,
    previous: PreviousLabels | None,
) -> Correspondence:
    """Clusters a round's descriptors and labels every image.

    Args:
        round_url: directory of the round, into which labels are written.
        descriptors: folder with its descriptor shards.
        rows_per_shard: image shard file name to number of descriptors.
        fit: k-means.
        run_on_shards: runs the assignment.
        sample: descriptors that k-means trains on.
        seed: of the sample.
        previous: the round before, of the same images, whose cluster numbers are carried over; or none.

    Raises:
        ValueError: if there are fewer distinct descriptors than clusters.

    Source: Mallis et al. 2020, section 3.2.
    """
    shards, started = sorted(rows_per_shard), time.monotonic()
    rows = sample_rows([rows_per_shard[shard] for shard in shards], sample, seed, SAMPLED_SHARDS)
    pairs = zip(shards, rows, strict=True)
    kmeans = fit([(shard_url(descriptors, shard), chosen) for shard, chosen in pairs])
    if previous:
        given = previous.thresholds, kmeans.centroids, SAME_PLACE
        shared = run_on_shards(
            shared_labels_task,
            [(shard_url(descriptors, s), labels_url(previous.round_url, s), *given) for s in shards],
        )
        kmeans = kmeans.renumbered(match_clusters(reduce(add, shared)))
    fitted = time.monotonic()
    statistics = run_on_shards(
        assign_shard_task,
        [(shard_url(descriptors, s), labels_url(round_url, s), kmeans.centroids) for s in shards],
    )
    thresholds = reduce(add, statistics).thresholds()
    counted = run_on_shards(_population, [(labels_url(round_url, shard), thresholds) for shard in shards])
    return Correspondence(
        kmeans,
        thresholds,
        np.sum([population for population, _ in counted], 0),
        sum(images for _, images in counted),
        {"kmeans": fitted - started, "assign": time.monotonic() - fitted},
    )


def _population(url: str, thresholds: np.ndarray) -> tuple[np.ndarray, int]:
    labels = Labels.load(url)
    return np.bincount(labels.below(thresholds).cluster, minlength=len(thresholds)), len(labels)
