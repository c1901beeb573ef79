"""Clusters keep their numbers from round to round, by what they label."""

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import Descriptors, KMeansSettings, Labels, fit, match_clusters, shared_labels


def shards(seed: int, sizes: list[int], labelled: list[int], clusters: int) -> tuple[Labels, Descriptors]:
    rng = np.random.default_rng(seed)
    previous = Labels(
        np.cumsum([0, *labelled]),
        rng.integers(0, 6, (sum(labelled), 2)).astype(np.float32),
        rng.integers(0, clusters, sum(labelled)).astype(np.int16),
        np.zeros(sum(labelled), np.float32),
    )
    points = (rng.integers(0, 6, (sum(sizes), 2)) + rng.uniform(-0.3, 0.3, (sum(sizes), 2))).astype(np.float32)
    return previous, Descriptors(np.cumsum([0, *sizes]), points, rng.normal(size=(sum(sizes), 3)).astype(np.float16))


@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=5),
    radius=st.sampled_from([0.5, 1.5, 4.0]),
)
def test_shared_labels_equal_the_slow_count(seed: int, images: list[tuple[int, int]], radius: float) -> None:
    clusters = 4
    previous, new = shards(seed, [a for a, _ in images], [b for _, b in images], clusters)
    centroids = np.random.default_rng(seed).normal(size=(clusters, 3)).astype(np.float32)
    expected = np.zeros((clusters, clusters), int)
    for image in range(len(images)):
        points, desc = new.sample(image)
        for place, cluster in zip(*previous.sample(image), strict=True):
            gaps = [float(np.hypot(*(point.astype(float) - place))) for point in points]
            if gaps and min(gaps) <= radius:
                row = desc[int(np.argmin(gaps))].astype(float)
                expected[int(np.argmin([((row - c) ** 2).sum() for c in centroids])), cluster] += 1
    np.testing.assert_array_equal(shared_labels(previous, new, centroids, radius), expected)


def test_other_shards_and_unknown_clusters_are_refused() -> None:
    previous, new = shards(0, [3, 3], [2, 2], 4)
    with pytest.raises(ValueError, match="labels of 2 images and descriptors of 1"):
        shared_labels(previous, shards(0, [3], [2], 4)[1], np.zeros((4, 3)), 1.0)
    with pytest.raises(ValueError, match="names cluster . of 1"):
        shared_labels(previous, new, np.zeros((1, 3)), 1.0)


@given(seed=st.integers(0, 2**32 - 1), clusters=st.integers(1, 6))
def test_as_many_labels_as_possible_keep_their_number(seed: int, clusters: int) -> None:
    shared = np.random.default_rng(seed).integers(0, 9, (clusters, clusters))
    number = match_clusters(shared)
    assert sorted(number) == list(range(clusters))
    kept = shared[np.arange(clusters), number].sum()
    assert kept == max(shared[np.arange(clusters), list(order)].sum() for order in permutations(range(clusters)))


def test_clusters_under_other_numbers_are_the_same_clusters() -> None:
    x = np.random.default_rng(0).normal(size=(90, 3)).astype(np.float32)
    result, number = fit(x, KMeansSettings(4)), np.array([2, 0, 3, 1])
    other = result.renumbered(number)
    for cluster in range(4):
        assert np.array_equal(other.centroids[number[cluster]], result.centroids[cluster])
        assert other.counts[number[cluster]] == result.counts[cluster]


def part(shard: Labels | Descriptors, images: slice) -> Any:
    """Some of a shard's images, as a shard."""
    first, last = shard.offsets[images.start], shard.offsets[images.stop]
    offsets = shard.offsets[images.start : images.stop + 1] - first
    return type(shard)(offsets, *(column[first:last] for name, column in vars(shard).items() if name != "offsets"))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("change", ["rotated", "drifted"])
def test_clusters_keep_their_numbers_while_descriptors_turn(change: str) -> None:
    """The same points twice, the second time with descriptors that have nothing to do with the first centroids."""
    rng, clusters, images = np.random.default_rng(0), 12, 60
    truth = unit(rng.normal(size=(clusters, 16)))
    common, away = unit(rng.normal(size=(2, 16)))
    classes = np.concatenate([rng.permutation(clusters)[:9] for _ in range(images)])
    noise = 0.002 * rng.normal(size=(len(classes), 16))
    turn = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    first = unit(common + 0.02 * truth[classes] + noise)
    second = first @ turn if change == "rotated" else unit(common + 0.3 * away + 0.02 * truth[classes] + noise)
    offsets = 9 * np.arange(images + 1)
    points = rng.uniform(0, 60, (len(classes), 2)).astype(np.float32)

    def numbered(desc: np.ndarray, seed: int) -> tuple[Descriptors, np.ndarray]:
        shard = Descriptors(offsets, points, desc.astype(np.float16))
        return shard, fit(shard.descriptors, KMeansSettings(clusters, seed=seed)).centroids

    def nearest(shard: Descriptors, centroids: np.ndarray) -> np.ndarray:
        rows = shard.descriptors.astype(float)
        return ((rows[:, None] - centroids[None]) ** 2).sum(2).argmin(1)

    (before, old), (after, new) = numbered(first, 1), numbered(second, 2)
    labels = Labels(offsets, points, nearest(before, old).astype(np.int16), np.zeros(len(points), np.float32))
    stale = (nearest(after, old) == labels.cluster).mean()
    halves = [slice(0, images // 2), slice(images // 2, images)]  # as two shards
    parts = [(part(labels, half), part(after, half)) for half in halves]
    shared = sum(shared_labels(before, now, new, 1.5) for before, now in parts)
    found = fit(after.descriptors, KMeansSettings(clusters, seed=2)).renumbered(match_clusters(shared))
    assert (nearest(after, found.centroids) == labels.cluster).mean() > 0.95
    assert stale < 0.3  # what the first round's centroids would have made of it
