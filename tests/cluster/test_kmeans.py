"""k-means by every backend: start, Lloyd steps, empty clusters, sampling over shards, and what it refuses."""

import logging
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2  # type: ignore[import-untyped]
from sklearn.cluster import KMeans

from cluster import KMeansSettings, choose_backend, fit, lloyd, rapids, sample_rows, seeding
from cluster.actor import KMeansActor, assign_shard_task, read_sample
from cluster.shards import Descriptors, Labels
from tests.cluster.backends import BACKENDS, Fit, fit_by, fit_in_parts
from tests.cluster.stand_in import KMeans as StandIn
from tests.nn.test_steps import Waits


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


def from_start(x: np.ndarray, start: np.ndarray, iterations: int, small: float = -1.0):
    """Lloyd's algorithm alone: centroids, sums and steps."""
    rows = lloyd.Rows(torch.from_numpy(x), torch.from_numpy(x.mean(axis=0)))
    begin, rng = torch.from_numpy(start.astype(np.float32)), np.random.default_rng(0)
    centroids, found, steps = lloyd.lloyd(rows.sums, begin, iterations=iterations, small=small, rng=rng)
    return centroids.numpy(), found, steps


def test_finds_separated_groups(fit_rows: Fit) -> None:
    centres, x = blobs(clusters=5)
    result = fit_rows(x, KMeansSettings(5, seed=3))
    gap = np.linalg.norm(result.centroids[:, None] - centres[None], axis=2)
    assert sorted(gap.argmin(axis=1)) == list(range(5)) and gap.min(axis=1).max() < 0.1
    assert result.counts.tolist() == [80] * 5 and result.counts.dtype == np.int64
    assert result.inertia == pytest.approx(5 * 0.01, rel=0.2)  # 5 columns of variance 0.1^2
    assert (result.empty, result.centroids.dtype) == (0, np.float32)
    assert 1 <= result.iterations < 20


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), clusters=st.integers(1, 6), steps=st.integers(1, 5))
def test_steps_equal_the_slow_reference(seed: int, clusters: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, 3)).astype(np.float32)
    start = x[rng.choice(40, clusters, replace=False)]
    centroids, found, taken = from_start(x, start, steps)
    expected = slow_lloyd(x, start, steps)
    np.testing.assert_allclose(centroids, expected, atol=1e-4)
    distance = ((x[:, None] - expected[None]) ** 2).sum(axis=2)
    assert float(found.errors.sum()) / 40 == pytest.approx(distance.min(axis=1).mean(), rel=1e-4)
    assert taken == steps and found.counts.sum() == 40


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    _, x = blobs()
    whole = fit(x, KMeansSettings(6, seed=1))
    monkeypatch.setattr(lloyd, "CHUNK", 7)
    parts = fit(x, KMeansSettings(6, seed=1))
    np.testing.assert_allclose(whole.centroids, parts.centroids, atol=1e-5)
    assert whole.counts.tolist() == parts.counts.tolist()


@pytest.mark.parametrize("rows", [1, 15, 16, 48, 49, 200])
@pytest.mark.parametrize("clusters", [1, 2, 30, 300])
def test_sums_equal_the_reference_whatever_fills_blocks_and_chunks(
    rows: int, clusters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lloyd, "BLOCK", 16)
    monkeypatch.setattr(lloyd, "CHUNK", 48)
    rng = np.random.default_rng(rows)
    x, centroids = (rng.integers(-9, 9, (count, 3)).astype(np.float32) for count in (rows, clusters))
    distance = ((x[:, None] - centroids[None]) ** 2).sum(axis=2)  # exact, and many centroids are equally near
    nearest = distance.argmin(axis=1)
    expected = np.zeros((clusters, 3))
    np.add.at(expected, nearest, x)
    origin = torch.from_numpy(rng.integers(-9, 9, 3))
    found = lloyd.Rows(torch.from_numpy(x), origin).sums(torch.from_numpy(centroids))
    np.testing.assert_array_equal(found.sums.numpy(), expected)
    np.testing.assert_array_equal(found.counts.numpy(), np.bincount(nearest, minlength=clusters))
    errors = np.bincount(nearest, weights=distance.min(axis=1), minlength=clusters)
    np.testing.assert_array_equal(found.errors.numpy(), errors)


def test_rounding_does_not_hide_what_rows_far_from_zero_differ_by() -> None:
    """Groups 0.002 apart at a distance of 1: of such squared distances float32 holds little once 1 is added."""
    rng = np.random.default_rng(0)
    group = np.arange(600) % 2
    x = (1 + 0.002 * group[:, None] + 2e-4 * rng.normal(size=(600, 8))).astype(np.float32)
    result = fit(x, KMeansSettings(2))
    assert sorted(result.counts) == [300, 300]
    wide = x.astype(np.float64)
    assert result.inertia == pytest.approx(sum(wide[group == g].var(axis=0).sum() for g in (0, 1)) / 2, rel=0.02)


def test_tolerance_is_a_share_of_the_mean_variance() -> None:
    x = (np.random.default_rng(0).normal(size=(700, 4)) + 100).astype(np.float32)
    steps = [fit(x, KMeansSettings(5, tolerance=share)).iterations for share in (1e3, 1e-2, 1e-4)]
    assert steps[0] == 1 and steps == sorted(set(steps))
    assert steps == [fit(32 * x, KMeansSettings(5, tolerance=share)).iterations for share in (1e3, 1e-2, 1e-4)]
    start = x[:5]
    shift = np.square(from_start(x, start, 1)[0] - start).sum()
    assert from_start(x, start, 50, 1.01 * shift)[2] == 1 and from_start(x, start, 50, 0.99 * shift)[2] > 1


def test_is_as_good_as_scipy_on_unstructured_rows(fit_rows: Fit) -> None:
    x = np.random.default_rng(0).normal(size=(1500, 8)).astype(np.float32)
    centroids, nearest = kmeans2(x, 20, minit="++", iter=100, rng=1)
    scipy_inertia = ((x - centroids[nearest]) ** 2).sum(axis=1).mean()
    assert fit_rows(x, KMeansSettings(20)).inertia < 1.01 * scipy_inertia


def cone(change: str) -> np.ndarray:
    """Descriptors as a trained network gives them: 100 groups in a narrow cone, inertia 0.0005 about their mean."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(100, 32))
    offsets = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    classes = rng.choice(100, 4_000, p=rng.dirichlet(np.full(100, 3.0)))
    common, away = np.linalg.qr(rng.normal(size=(32, 2)))[0].T
    spread = 0.02 * offsets[classes] + 0.001 * rng.normal(size=(4_000, 32))
    x = common + (0.3 * away if change == "drifted" else 0.0) + spread
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    if change == "rotated":
        x = x @ np.linalg.qr(rng.normal(size=(32, 32)))[0]
    return x.astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("change", ["as it was", "rotated", "drifted"])
def test_no_cluster_dies_and_inertia_is_the_best(change: str, gpu: object) -> None:
    """Two rounds' descriptors, by every backend, against the best of ten fits by scikit-learn."""
    x = cone(change)
    best = min(KMeans(100, n_init=1, random_state=seed).fit(x).inertia_ for seed in range(10)) / len(x)
    found = {name: fit_by(name)(x, KMeansSettings(100, seed=2**63 - 25)) for name in BACKENDS}
    for name, result in found.items():
        assert result.empty == 0 and result.counts.min() > 0, name
        assert result.inertia < 1.02 * best, name
        assert result.inertia == pytest.approx(found["torch"].inertia, rel=0.02), name


def test_stale_centroids_are_refilled() -> None:
    """From centroids of another round, in which all but a few are nobody's nearest."""
    x, old = cone("rotated"), fit(cone("as it was"), KMeansSettings(100)).centroids
    stale = ((x[:, None, :8] - old[None, :, :8]) ** 2).sum(2)  # eight columns tell enough
    assert len(np.unique(stale.argmin(1))) < 60
    _, found, _ = from_start(x, old, 100, 1e-4 * x.var(axis=0).mean())
    assert found.counts.min() > 0
    assert float(found.errors.sum()) / len(x) < 1.5 * fit(x, KMeansSettings(100)).inertia


def test_an_empty_cluster_takes_half_of_the_one_with_the_largest_error() -> None:
    centres, x = blobs(clusters=4)
    x[np.arange(400) % 4 == 2] += np.random.default_rng(1).normal(0, 3, (100, 5)).astype(np.float32)
    start = np.concatenate([centres, np.full((1, 5), 1e3)])
    centroids, found, _ = from_start(x, start, 50, 1e-6)
    nearest = ((x[:, None] - centroids[None]) ** 2).sum(2).argmin(1)
    assert sorted(np.unique(nearest[np.arange(400) % 4 == 2])) == [2, 4] and found.counts[[2, 4]].min() > 20


def test_a_cluster_is_refilled_although_no_step_is_left() -> None:
    centres, x = blobs(clusters=4)
    _, found, steps = from_start(x, np.concatenate([centres, np.full((1, 5), 1e3)]), 1, 1e-6)
    assert found.counts.min() > 0 and 1 < steps <= 1 + lloyd.SETTLING


def test_what_cuml_leaves_empty_is_refilled(gpu: type[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    centres, x = blobs(clusters=4)
    start = np.concatenate([centres, np.full((1, 5), 1e3)]).astype(np.float32)
    monkeypatch.setattr("cluster.kmeans.find_start", lambda *_: start)
    monkeypatch.setattr("cluster.pool.find_start", lambda *_: start)
    for result in (fit(x, KMeansSettings(5, backend="cuml")), fit_in_parts(x, KMeansSettings(5), nccl=True)):
        assert result.empty == 0 and result.backend == "cuml"


def test_rows_that_float32_cannot_part_end_the_refilling() -> None:
    x = np.full((40, 2), 1.0, np.float32)
    x[::2] = np.nextafter(np.float32(1), np.float32(2))
    result = fit(x, KMeansSettings(2))
    assert result.counts.sum() == 40 and result.iterations <= 100 + lloyd.SETTLING


def test_a_seed_fixes_the_result_and_another_changes_it(fit_rows: Fit) -> None:
    x = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
    seeds = (2**63 - 1, 2**63 - 1, 2)
    first, again, other = (fit_rows(x, KMeansSettings(20, seed=seed)).centroids for seed in seeds)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("tolerance", [0.0, -1.0])
def test_no_tolerance_is_a_tolerance(fit_rows: Fit, tolerance: float) -> None:
    x = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    exact, coarse = (fit_rows(x, KMeansSettings(9, tolerance=share)).inertia for share in (tolerance, 10.0))
    assert exact < coarse


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_rows_without_variance_are_one_cluster(fit_rows: Fit, value: float) -> None:
    result = fit_rows(np.full((50, 3), value), KMeansSettings(1))
    assert result.counts.tolist() == [50] and result.inertia == pytest.approx(0.0, abs=1e-6)
    np.testing.assert_allclose(result.centroids, np.full((1, 3), value), rtol=1e-6)


@pytest.mark.parametrize("layout", ["float64", "float16", "Fortran", "every other"])
def test_rows_come_in_any_layout(fit_rows: Fit, layout: str) -> None:
    _, x = blobs(clusters=3, rows=60)
    given_x = {
        "float64": x.astype(np.float64),
        "float16": x.astype(np.float16),
        "Fortran": np.asfortranarray(x),
        "every other": np.repeat(x, 2, axis=0)[::2],
    }[layout]
    kept = given_x.copy()
    assert sorted(fit_rows(given_x, KMeansSettings(3)).counts) == [20, 20, 20]
    np.testing.assert_array_equal(given_x, kept)


def test_every_distinct_row_gets_its_cluster(fit_rows: Fit) -> None:
    x = np.repeat(np.eye(6, dtype=np.float32), [500, 1, 1, 1, 1, 1], axis=0)
    for seed in range(5):
        result = fit_rows(x, KMeansSettings(6, seed=seed))
        assert sorted(result.counts.tolist()) == [1, 1, 1, 1, 1, 500] and result.inertia == pytest.approx(0, abs=1e-6)


def test_seeding_from_a_subsample_without_enough_distinct_rows(fit_rows: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeding, "SEEDING_ROWS", 10)
    x = np.repeat(np.eye(6, dtype=np.float32), [500, 1, 1, 1, 1, 1], axis=0)
    assert fit_rows(x, KMeansSettings(6)).empty == 0


def test_seeding_never_waits_for_the_device() -> None:
    x, rng = torch.from_numpy(blobs()[1]), np.random.default_rng(0)
    square, waited = x.square().sum(1), []
    for clusters in (5, 25):
        with Waits() as waits:
            chosen = seeding.plus_plus(x, square, clusters, 4, rng)
            chosen = seeding.swap(x, square, chosen, 4, rng)
        waited.append(len(waits.seen))
        assert len(set(chosen.tolist())) == clusters
    assert waited[0] == waited[1] <= 2  # not once per cluster


def test_swaps_lower_the_error_of_a_start() -> None:
    x = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)

    def error(chosen: torch.Tensor) -> float:
        return float(((x[:, None] - x[chosen.numpy()][None]) ** 2).sum(2).min(1).sum())

    rows = torch.from_numpy(x)
    begin = torch.arange(20)
    better = seeding.swap(rows, rows.square().sum(1), begin, 4, np.random.default_rng(0))
    assert error(better) < 0.9 * error(begin) and torch.equal(begin, torch.arange(20))


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
        fit(x, KMeansSettings(clusters))
    assert all(number in str(error.value) for number in numbers)


def test_refuses_what_is_not_finite_or_has_another_shape() -> None:
    x = np.eye(4)
    x[1, 2], x[3, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match="2 of 4 descriptors are not finite"):
        fit(x, KMeansSettings(2))
    with pytest.raises(ValueError, match=r"not an array of shape \(4,\)"):
        fit(np.ones(4), KMeansSettings(2))
    with pytest.raises(ValueError, match="at least 1 cluster"):
        fit(np.eye(4), KMeansSettings(0))


def test_backend_is_chosen_openly(gpu: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [choose_backend(name) for name in ("auto", "torch", "cuml")] == ["cuml", "torch", "cuml"]  # type: ignore[arg-type]
    monkeypatch.setattr(sys.modules["cupy.cuda"], "is_available", lambda: False)
    assert choose_backend("auto") == "torch"
    with pytest.raises(RuntimeError, match="no usable GPU"):
        choose_backend("cuml")
    with pytest.raises(ValueError, match="'gpu' is unknown"):
        choose_backend("gpu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("missing", "error", "said"),
    [
        ("cuml", ModuleNotFoundError("No module named 'cuml'", name="cuml"), "cuml is not installed"),
        ("cuml", ImportError("libcuvs.so: undefined symbol: __nvJitLinkCreate_13_3"), "__nvJitLinkCreate_13_3.*13.3"),
        ("cuml", OSError("libcudart.so.13: cannot open"), "libcudart.so.13: cannot open"),
        ("raft_dask", ModuleNotFoundError("No module named 'ucxx'", name="ucxx"), "No module named 'ucxx'"),
    ],
)
def test_an_obstacle_is_reported_as_it_is_once(
    missing: str, error: Exception, said: str, gpu: object, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)

    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name.split(".")[0] == missing:
                raise error

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(RuntimeError, match=said):
        choose_backend("cuml", several=True)
    for _ in range(2):
        assert choose_backend("auto", several=True) == "torch"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "GPU that is there" in record.message


def test_where_there_is_no_gpu_nothing_is_said(caplog) -> None:
    if rapids.gpu_here():
        pytest.skip("there is a GPU")
    assert choose_backend("auto") == "torch" and not caplog.records


def test_auto_goes_on_by_torch_when_cuml_fails(gpu: type[StandIn], monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    x = blobs()[1]
    monkeypatch.setattr(gpu, "fail", MemoryError("std::bad_alloc: out of memory"))
    results = [fit(x, KMeansSettings(6)) for _ in range(2)]
    assert [result.backend for result in results] == ["torch", "torch"]
    assert np.array_equal(results[0].centroids, fit(x, KMeansSettings(6, backend="torch")).centroids)
    (record,) = caplog.records
    assert "bad_alloc" in record.message
    with pytest.raises(RuntimeError, match="MemoryError: std::bad_alloc"):
        fit(x, KMeansSettings(6, backend="cuml"))


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.integers(0, 30), max_size=8), size=st.integers(0, 120), seed=st.integers(0, 99))
def test_sample_is_sorted_distinct_and_of_the_asked_size(rows: list[int], size: int, seed: int) -> None:
    drawn = sample_rows(rows, size, seed)
    assert [part.dtype for part in drawn] == [np.int64] * len(rows)
    assert sum(map(len, drawn)) == min(size, sum(rows))
    for part, count in zip(drawn, rows, strict=True):
        assert np.all(np.diff(part) > 0) and (len(part) == 0 or 0 <= part[0] <= part[-1] < count)


def test_sample_is_uniform_over_all_rows() -> None:
    rows, hits = [3, 0, 10, 27], np.zeros(40)
    first = np.cumsum([0, *rows])
    for seed in range(4000):
        for start, part in zip(first, sample_rows(rows, 8, seed), strict=False):
            hits[start + part] += 1
    # each row is drawn with probability 1/5: 800 times, standard deviation 25
    assert np.abs(hits - 800).max() < 5 * 25


def test_a_sample_of_few_shards_is_uniform_over_all_rows_too() -> None:
    hits = np.zeros(120)
    for seed in range(3000):
        drawn = sample_rows([20] * 6, 8, seed, max_shards=2)
        assert sum(len(part) > 0 for part in drawn) <= 2 and sum(map(len, drawn)) == 8
        for shard, part in enumerate(drawn):
            hits[20 * shard + part] += 1
    # each row is drawn with probability 1/15: 200 times, standard deviation 14
    assert np.abs(hits - 200).max() < 5 * 14
    for whole, bounded in zip(sample_rows([5, 7], 6, 1), sample_rows([5, 7], 6, 1, max_shards=2), strict=True):
        assert np.array_equal(whole, bounded)


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
