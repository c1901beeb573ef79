"""k-means: seeding, Lloyd steps, sampling over shards, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2  # type: ignore[import-untyped]

from cluster import kmeans
from cluster.actor import KMeansActor, KMeansSettings, assign_shard_task, read_sample
from cluster.shards import Descriptors, Labels


def blobs(clusters: int = 6, rows: int = 400, width: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Well separated groups: their true centres and the rows."""
    rng = np.random.default_rng(seed)
    centres = 20 * np.eye(clusters, width) + rng.normal(size=(clusters, width))
    return centres, (centres[np.arange(rows) % clusters] + rng.normal(0, 0.1, (rows, width))).astype(np.float32)


def slow_lloyd(x: np.ndarray, centroids: np.ndarray, steps: int) -> np.ndarray:
    """Lloyd's algorithm word by word, float64."""
    x, centroids = x.astype(np.float64), centroids.astype(np.float64).copy()
    for _ in range(steps):
        groups: dict[int, list[np.ndarray]] = {}
        for row in x:
            groups.setdefault(int(np.argmin([np.sum((row - c) ** 2) for c in centroids])), []).append(row)
        for cluster, members in groups.items():
            centroids[cluster] = np.mean(members, axis=0)
    return centroids


def test_finds_separated_groups() -> None:
    centres, x = blobs(clusters=5)
    result = kmeans.fit(x, 5, seed=3)
    gap = np.linalg.norm(result.centroids[:, None] - centres[None], axis=2)
    assert sorted(gap.argmin(axis=1)) == list(range(5)) and gap.min(axis=1).max() < 0.1
    assert result.counts.tolist() == [80] * 5 and result.counts.dtype == np.int64
    assert result.inertia == pytest.approx(5 * 0.01, rel=0.2)  # 5 columns of variance 0.1^2
    assert (result.backend, result.empty, result.centroids.dtype) == ("torch", 0, np.float32)
    assert 1 <= result.iterations < 20


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), clusters=st.integers(1, 6), steps=st.integers(1, 5))
def test_steps_equal_the_slow_reference(seed: int, clusters: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, 3)).astype(np.float32)
    start = x[rng.choice(40, clusters, replace=False)]
    result = kmeans.fit(x, clusters, iterations=steps, tolerance=-1.0, start=start)
    expected = slow_lloyd(x, start, steps)
    np.testing.assert_allclose(result.centroids, expected, atol=1e-4)
    distance = ((x[:, None] - expected[None]) ** 2).sum(axis=2)
    assert result.inertia == pytest.approx(distance.min(axis=1).mean(), rel=1e-4)
    assert result.iterations == steps and result.counts.sum() == 40


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    _, x = blobs()
    whole = kmeans.fit(x, 6, seed=1)
    monkeypatch.setattr(kmeans, "CHUNK", 7)
    parts = kmeans.fit(x, 6, seed=1)
    np.testing.assert_allclose(whole.centroids, parts.centroids, atol=1e-5)
    assert whole.counts.tolist() == parts.counts.tolist()


@pytest.mark.parametrize("rows", [1, 15, 16, 48, 49, 200])
@pytest.mark.parametrize("clusters", [1, 2, 30, 300])
def test_sums_equal_the_reference_whatever_fills_blocks_and_chunks(
    rows: int, clusters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kmeans, "BLOCK", 16)
    monkeypatch.setattr(kmeans, "CHUNK", 48)
    rng = np.random.default_rng(rows)
    x, centroids = (rng.integers(-9, 9, (count, 3)).astype(np.float32) for count in (rows, clusters))
    distance = ((x[:, None] - centroids[None]) ** 2).sum(axis=2)  # exact, and many centroids are equally near
    nearest = distance.argmin(axis=1)
    expected = np.zeros((clusters, 3))
    np.add.at(expected, nearest, x)
    sums, counts, total = kmeans.nearest_sums(torch.from_numpy(x), torch.from_numpy(centroids))
    np.testing.assert_array_equal(sums.numpy(), expected)
    np.testing.assert_array_equal(counts.numpy(), np.bincount(nearest, minlength=clusters))
    assert float(total) + kmeans.total_squares(torch.from_numpy(x)) == distance.min(axis=1).sum()


def test_tolerance_is_a_share_of_the_mean_variance() -> None:
    x = (np.random.default_rng(0).normal(size=(700, 4)) + 100).astype(np.float32)
    start = x[:5]
    shift = np.square(kmeans.fit(x, 5, start=start, iterations=1).centroids - start).sum() / x.var(axis=0).mean()
    assert kmeans.fit(x, 5, start=start, tolerance=1.01 * shift).iterations == 1
    assert kmeans.fit(x, 5, start=start, tolerance=0.99 * shift).iterations > 1


def test_is_as_good_as_scipy_on_unstructured_rows() -> None:
    x = np.random.default_rng(0).normal(size=(1500, 8)).astype(np.float32)
    centroids, nearest = kmeans2(x, 20, minit="++", iter=100, rng=1)
    scipy_inertia = ((x - centroids[nearest]) ** 2).sum(axis=1).mean()
    assert kmeans.fit(x, 20, seed=0).inertia < 1.03 * scipy_inertia


def test_a_seed_fixes_the_result_and_another_changes_it() -> None:
    x = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
    first, again, other = (kmeans.fit(x, 20, seed=seed).centroids for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_warm_start_keeps_cluster_numbers() -> None:
    centres, x = blobs(clusters=5)
    order = np.array([3, 0, 4, 1, 2])
    result = kmeans.fit(x, 5, start=centres[order])
    np.testing.assert_allclose(result.centroids, centres[order], atol=0.1)


def test_empty_cluster_keeps_its_centroid_and_is_counted() -> None:
    centres, x = blobs(clusters=4)
    start = np.concatenate([centres, np.full((1, 5), 1e3)]).astype(np.float32)
    result = kmeans.fit(x, 5, start=start)
    assert result.empty == 1 and result.counts[4] == 0
    assert np.array_equal(result.centroids[4], start[4])


def test_seeding_takes_every_distinct_row_once() -> None:
    x = np.repeat(np.eye(6, dtype=np.float32), [500, 1, 1, 1, 1, 1], axis=0)
    for seed in range(5):
        result = kmeans.fit(x, 6, seed=seed)
        assert sorted(result.counts.tolist()) == [1, 1, 1, 1, 1, 500] and result.inertia == pytest.approx(0, abs=1e-6)


def test_seeding_from_a_subsample_without_enough_distinct_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "SEEDING_ROWS", 10)
    x = np.repeat(np.eye(6, dtype=np.float32), [500, 1, 1, 1, 1, 1], axis=0)
    assert kmeans.fit(x, 6).empty == 0


@pytest.mark.parametrize(
    ("x", "clusters", "numbers"),
    [
        (np.eye(3), 4, ("4 clusters", "only 3")),
        (np.ones((50, 3)), 2, ("2 clusters", "only 1", "50 in all")),
        (np.array([[0.0, 1], [-0.0, 1]]), 2, ("2 clusters", "only 1")),
        (np.empty((0, 3)), 1, ("1 clusters", "only 0")),
    ],
)
def test_fewer_distinct_rows_than_clusters(x: np.ndarray, clusters: int, numbers: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        kmeans.fit(x, clusters)
    assert all(number in str(error.value) for number in numbers)


def test_refuses_what_is_not_finite_or_has_another_shape() -> None:
    x = np.eye(4)
    x[1, 2], x[3, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match="2 of 4 descriptors are not finite"):
        kmeans.fit(x, 2)
    with pytest.raises(ValueError, match=r"\(2, 3\), needed is \(2, 4\)"):
        kmeans.fit(np.eye(4), 2, start=np.zeros((2, 3)))
    with pytest.raises(ValueError, match="at least 1 cluster"):
        kmeans.fit(np.eye(4), 0)


def test_backend_is_chosen_openly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "_cuml_obstacle", lambda: "no usable GPU")
    assert kmeans.choose_backend("auto") == "torch"
    with pytest.raises(RuntimeError, match="no usable GPU"):
        kmeans.choose_backend("cuml")
    with pytest.raises(ValueError, match="'gpu' is unknown"):
        kmeans.choose_backend("gpu")  # type: ignore[arg-type]
    monkeypatch.setattr(kmeans, "_cuml_obstacle", lambda: None)
    assert (kmeans.choose_backend("auto"), kmeans.choose_backend("torch")) == ("cuml", "torch")


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.integers(0, 30), max_size=8), size=st.integers(0, 120), seed=st.integers(0, 99))
def test_sample_is_sorted_distinct_and_of_the_asked_size(rows: list[int], size: int, seed: int) -> None:
    drawn = kmeans.sample_rows(rows, size, seed)
    assert [part.dtype for part in drawn] == [np.int64] * len(rows)
    assert sum(map(len, drawn)) == min(size, sum(rows))
    for part, count in zip(drawn, rows, strict=True):
        assert np.all(np.diff(part) > 0) and (len(part) == 0 or 0 <= part[0] <= part[-1] < count)


def test_sample_is_uniform_over_all_rows() -> None:
    rows, hits = [3, 0, 10, 27], np.zeros(40)
    first = np.cumsum([0, *rows])
    for seed in range(4000):
        for start, part in zip(first, kmeans.sample_rows(rows, 8, seed), strict=False):
            hits[start + part] += 1
    # each row is drawn with probability 1/5: 800 times, standard deviation 25
    assert np.abs(hits - 800).max() < 5 * 25


def test_actor_reads_its_sample_and_the_task_writes_labels(tmp_path: object) -> None:
    _, x = blobs(clusters=3, rows=60)
    offsets = np.array([0, 0, 10, 30])
    urls = [f"{tmp_path}/{name}.npz" for name in "ab"]
    for url, part in zip(urls, (x[:30], x[30:]), strict=True):
        Descriptors(offsets, np.zeros((30, 2), np.float32), part.astype(np.float16)).save(url)
    sample = [
        (urls[0], np.array([0, 4, 5, 29])),
        (f"{tmp_path}/unread.npz", np.empty(0, np.int64)),
        (urls[1], np.array([7])),
    ]
    np.testing.assert_array_equal(read_sample(sample), x[[0, 4, 5, 29, 37]].astype(np.float16).astype(np.float32))

    everything = [(url, np.arange(30)) for url in urls]
    result = KMeansActor().fit(everything, KMeansSettings(clusters=3, backend="torch"))
    assert sorted(result.counts.tolist()) == [20, 20, 20]
    statistics = assign_shard_task(urls[0], f"{tmp_path}/labels.npz", result.centroids)
    labels = Labels.load(f"{tmp_path}/labels.npz")
    assert labels.offsets.tolist() == [0, 0, 3, 6] and statistics.count.sum() == 30
    with pytest.raises(ValueError, match="no descriptor in any shard"):
        KMeansActor().fit([(urls[0], np.empty(0, np.int64))], KMeansSettings(clusters=3))
