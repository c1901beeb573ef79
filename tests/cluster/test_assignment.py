"""Assignment, thresholds and union, against slow references."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.assignment import NearestStatistics, assign, assign_shard, squared_distances
from cluster.shards import Descriptors

seeds = st.integers(0, 2**32 - 1)


def unit(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    x = rng.normal(size=(rows, width)) + 1e-3
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def distances(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared distances, float64, by differences."""
    return ((x[:, None].astype(np.float64) - centroids[None]) ** 2).sum(axis=2)


def cheapest(cost: np.ndarray) -> float:
    """Least total of a one-to-one match, by trying all."""
    if cost.shape[0] > cost.shape[1]:
        cost = cost.T
    rows = np.arange(len(cost))
    return min(float(cost[rows, list(columns)].sum()) for columns in permutations(range(cost.shape[1]), len(cost)))


@settings(max_examples=60, deadline=None)
@given(seed=seeds, points=st.integers(0, 6), clusters=st.integers(1, 6), width=st.integers(1, 4))
def test_assignment_is_one_to_one_and_cheapest(seed: int, points: int, clusters: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    x, centroids = unit(rng, points, width), unit(rng, clusters, width)
    match, cost = assign(x, centroids), distances(x, centroids)
    assert len(match.point) == len(match.cluster) == min(points, clusters)
    assert np.all(np.diff(match.point) > 0) and len(set(match.cluster.tolist())) == len(match.cluster)
    np.testing.assert_allclose(match.distance, cost[match.point, match.cluster], atol=1e-5)
    assert match.distance.sum() == pytest.approx(cheapest(cost), abs=1e-5)


def test_competing_points_share_out_clusters() -> None:
    """Both points are nearest to cluster 0; giving it to the first one costs more in all."""
    centroids = np.array([[0.0], [5.0]])
    match = assign(np.array([[-1.0], [1.0]]), centroids)
    assert match.cluster.tolist() == [0, 1] and match.distance.tolist() == [1.0, 16.0]


def test_assignment_refuses_other_widths() -> None:
    with pytest.raises(ValueError, match=r"\(4, 3\) and centroids \(2, 5\)"):
        assign(np.zeros((4, 3)), np.zeros((2, 5)))


@settings(max_examples=40, deadline=None)
@given(seed=seeds, sizes=st.lists(st.integers(0, 9), max_size=6), clusters=st.integers(1, 7))
def test_shard_equals_its_images(seed: int, sizes: list[int], clusters: int) -> None:
    rng = np.random.default_rng(seed)
    x, centroids = unit(rng, sum(sizes), 4).astype(np.float16), unit(rng, clusters, 4).astype(np.float32)
    points = rng.random((len(x), 2)).astype(np.float32)
    shard = Descriptors(np.cumsum([0, *sizes]), points, x)
    labels, statistics = assign_shard(shard, centroids)
    assert (labels.cluster.dtype, labels.distance.dtype, labels.points.dtype) == (
        np.int16,
        np.float32,
        np.float32,
    )
    assert np.diff(labels.offsets).tolist() == [min(size, clusters) for size in sizes]
    for image in range(len(sizes)):
        image_points, image_desc = shard.sample(image)
        match, cost = assign(image_desc, centroids), distances(image_desc, centroids)
        rows = slice(labels.offsets[image], labels.offsets[image + 1])
        np.testing.assert_array_equal(labels.points[rows], image_points[match.point])
        assert len(set(labels.cluster[rows].tolist())) == len(labels.cluster[rows])
        np.testing.assert_allclose(labels.distance[rows], cost[match.point, labels.cluster[rows]], atol=1e-5)
        assert labels.distance[rows].sum() == pytest.approx(match.distance.sum(), abs=1e-5)
    np.testing.assert_allclose(statistics.thresholds(), slow_thresholds(x.astype(np.float64), centroids), atol=1e-3)


def slow_thresholds(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    nearest: list[list[float]] = [[] for _ in centroids]
    for row in distances(x, centroids):
        nearest[int(row.argmin())].append(float(row.min()))
    return np.array([np.mean(d) + np.std(d) if d else 0.0 for d in nearest])


def test_thresholds_by_hand() -> None:
    distance = np.array([[1.0, 9, 9], [3, 9, 9], [9, 4, 9]], np.float32)
    statistics = NearestStatistics.of(distance)
    assert statistics.count.tolist() == [2, 1, 0]
    assert statistics.thresholds().tolist() == [2 + 1, 4, 0]  # mean + population standard deviation


@settings(max_examples=30, deadline=None)
@given(seed=seeds, cut=st.integers(0, 30))
def test_statistics_of_parts_add_up(seed: int, cut: int) -> None:
    distance = np.random.default_rng(seed).random((30, 4)).astype(np.float32)
    whole = NearestStatistics.of(distance)
    added = NearestStatistics.of(distance[:cut]) + NearestStatistics.of(distance[cut:])
    assert added.count.tolist() == whole.count.tolist()
    np.testing.assert_allclose(added.thresholds(), whole.thresholds(), rtol=1e-5)


def test_labels_are_filtered_by_their_own_clusters_threshold() -> None:
    shard = Descriptors(
        np.array([0, 2, 2, 3]), np.zeros((3, 2), np.float32), np.array([[1, 0], [0, 1], [0.5, 0]], np.float16)
    )
    labels, _ = assign_shard(shard, np.array([[1.0, 0], [0, 2]]))
    assert labels.distance.tolist() == [0, 1, 0.25]
    kept = labels.below(np.array([0.2, 1.5], np.float32))
    assert kept.offsets.tolist() == [0, 2, 2, 2] and kept.cluster.tolist() == [0, 1]


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 7])
def test_distances_do_not_depend_on_how_many_rows_are_widened_at_once(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(rows)
    x, centroids = unit(rng, rows, 5).astype(np.float16), unit(rng, 4, 5)
    monkeypatch.setattr("cluster.assignment.CACHED_ROWS", 3)
    np.testing.assert_allclose(squared_distances(x, centroids), distances(x, centroids), atol=1e-6)
