"""k-means over rows that several members hold: as on all rows at once, and over real actors."""

from contextlib import suppress

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import kmeans, pool
from cluster.actor import KMeansSettings, even_parts, start_actor
from cluster.shards import Descriptors


def rows_of(count: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def fit_in_parts(x: np.ndarray, parts: list[np.ndarray], clusters: int, **told) -> kmeans.KMeansResult:
    members = [pool.PoolMember(part) for part in parts]

    def call(method, arguments):
        assert len(arguments) == len(members)
        return [getattr(member, method)(*own) for member, own in zip(members, arguments, strict=True)]

    return pool.fit_pool(call, len(members), clusters, **told)


@settings(max_examples=30)
@given(
    count=st.integers(20, 200),
    clusters=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    cuts=st.lists(st.integers(1, 19)),
)
def test_parts_give_what_all_rows_give(count, clusters, seed, cuts):
    x = rows_of(count, 4, seed)
    parts = [part for part in np.split(x, sorted(set(cuts))) if len(part)]
    start = x[np.random.default_rng(seed).choice(count, clusters, replace=False)]
    whole = kmeans.fit(x, clusters, start=start, iterations=20)
    spread = fit_in_parts(x, parts, clusters, start=start, iterations=20)
    np.testing.assert_allclose(spread.centroids, whole.centroids, atol=1e-4)
    assert spread.inertia == pytest.approx(whole.inertia, rel=1e-4)
    assert spread.counts.sum() == count and spread.iterations == whole.iterations and spread.empty == whole.empty


@pytest.mark.parametrize("most", [1000, 60])
def test_seeding_is_that_of_all_rows(most, monkeypatch):
    monkeypatch.setattr(kmeans, "SEEDING_ROWS", most)
    monkeypatch.setattr(pool, "SEEDING_ROWS", most)
    x = rows_of(300, 6, 1)
    whole, spread = kmeans.fit(x, 9, seed=5), fit_in_parts(x, np.array_split(x, 4), 9, seed=5)
    np.testing.assert_allclose(spread.centroids, whole.centroids, atol=1e-4)
    assert spread.counts.tolist() == whole.counts.tolist()


def test_rows_that_are_too_alike_for_a_draw_are_all_looked_at(monkeypatch):
    monkeypatch.setattr(pool, "SEEDING_ROWS", 10)
    x = np.zeros((500, 3), np.float32)
    x[::100] = np.arange(15).reshape(5, 3)
    result = fit_in_parts(x, np.array_split(x, 3), 6, seed=0)
    assert result.inertia == pytest.approx(0.0, abs=1e-6) and result.empty == 0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda x: x.__setitem__((70, 1), np.nan), "1 of 80 descriptors are not finite"),
        (lambda x: x.__setitem__(slice(None), 1.0), "there are only 1"),
    ],
)
def test_refuses_what_fit_refuses(spoil, said):
    x = rows_of(80, 3, 0)
    spoil(x)
    with pytest.raises(ValueError, match=said) as caught:
        fit_in_parts(x, np.array_split(x, 3), 4)
    with pytest.raises(ValueError) as single:
        kmeans.fit(x, 4)
    assert str(caught.value) == str(single.value)


def test_refuses_a_start_of_another_shape():
    x = rows_of(80, 3, 0)
    with pytest.raises(ValueError, match=r"\(4, 2\), needed is \(4, 3\)"):
        fit_in_parts(x, np.array_split(x, 2), 4, start=np.zeros((4, 2), np.float32))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 8))
def test_a_sample_is_split_evenly_every_row_once(counts, parts):
    sample = [(f"shard {number}", 10 * np.arange(count)) for number, count in enumerate(counts)]
    if not sum(counts):
        with pytest.raises(ValueError, match="no descriptor"):
            even_parts(sample, parts)
        return
    split = even_parts(sample, parts)
    sizes = [sum(len(rows) for _, rows in own) for own in split]
    assert len(split) == min(parts, sum(counts)) and max(sizes) - min(sizes) <= 1
    joined = [(url, int(row)) for own in split for url, rows in own for row in rows]
    assert joined == [(url, int(row)) for url, rows in sample for row in rows]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Three descriptor shards, of which most rows are drawn."""
    folder, rng, drawn = tmp_path_factory.mktemp("descriptors"), np.random.default_rng(0), []
    for number, count in enumerate((50, 90, 30)):
        url = f"{folder}/{number}.npz"
        points = np.zeros((count, 2), np.float32)
        Descriptors(np.array([0, count]), points, rows_of(count, 8, number).astype(np.float16)).save(url)
        drawn.append((url, np.sort(rng.choice(count, count - 5, replace=False))))
    return drawn


@pytest.fixture(scope="module")
def cluster():
    import ray

    ray.init(address="local", num_cpus=2, log_to_driver=False)
    yield ray
    ray.shutdown()


def test_actors_give_what_one_gives(cluster, sample):
    told = KMeansSettings(6, seed=2)
    one, three = start_actor(num_cpus=0), start_actor(num_cpus=0, members=3)
    assert cluster.get(three.backend.remote("auto")) == "torch"
    whole, spread = cluster.get([one.fit.remote(sample, told), three.fit.remote(sample, told)])
    np.testing.assert_allclose(spread.centroids, whole.centroids, atol=1e-4)
    assert spread.counts.tolist() == whole.counts.tolist()
    again = cluster.get(three.fit.remote(sample, told, whole.centroids))
    np.testing.assert_allclose(again.centroids, whole.centroids, atol=1e-4)
    with pytest.raises(ValueError, match="distinct"):
        cluster.get(three.fit.remote(sample, KMeansSettings(1000)))


def test_a_lost_member_costs_nothing_of_the_result(cluster, sample):
    told = KMeansSettings(6, iterations=800, tolerance=-1.0, seed=2)
    actor = start_actor(num_cpus=0, members=2)
    expected = cluster.get(actor.fit.remote(sample, told))
    running, killed = actor.fit.remote(sample, told), 0
    while not killed:
        assert not cluster.wait([running], timeout=0.05)[0], "the fit was over before a member was seen"
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if "SampleMember.sums" in " ".join(process.cmdline()):
                    process.kill()
                    killed += 1
                    break
    found = cluster.get(running)
    assert np.array_equal(found.centroids, expected.centroids) and found.iterations == 800
