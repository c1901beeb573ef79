"""k-means over rows that several members hold: as on all rows at once, and over real actors."""

from contextlib import suppress
from dataclasses import replace

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import Descriptors, KMeansSettings, fit, rapids, seeding
from cluster.actor import KMeansActor, even_parts, start_actor
from tests.cluster.backends import fit_in_parts


def rows_of(count: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


@settings(max_examples=30)
@given(count=st.integers(20, 200), clusters=st.integers(1, 8), seed=st.integers(0, 2**31), parts=st.integers(1, 5))
def test_parts_give_what_all_rows_give(count, clusters, seed, parts):
    x, told = rows_of(count, 4, seed), KMeansSettings(clusters, iterations=20, seed=seed)
    whole, spread = fit(x, told), fit_in_parts(x, told, parts)
    np.testing.assert_allclose(spread.centroids, whole.centroids, atol=1e-4)
    assert spread.inertia == pytest.approx(whole.inertia, rel=1e-4)
    assert spread.counts.sum() == count and spread.iterations == whole.iterations and spread.empty == whole.empty


@pytest.mark.parametrize("nccl", [False, True])
@pytest.mark.parametrize("most", [1000, 60])
def test_two_members_give_what_one_fit_gives(most, nccl, gpu, monkeypatch):
    monkeypatch.setattr(seeding, "SEEDING_ROWS", most)
    x, told = rows_of(300, 6, 1), KMeansSettings(9, seed=2**63 - 1)
    whole = fit(x, replace(told, backend="cuml" if nccl else "torch"))
    spread = fit_in_parts(x, told, 2, nccl)
    np.testing.assert_allclose(spread.centroids, whole.centroids, atol=1e-4)
    assert spread.counts.tolist() == whole.counts.tolist() and spread.backend == whole.backend
    assert len(gpu.fits) == 3 * nccl


@pytest.mark.parametrize("nccl", [False, True])
def test_rows_that_are_too_alike_for_a_draw_are_all_looked_at(nccl, gpu, monkeypatch):
    monkeypatch.setattr(seeding, "SEEDING_ROWS", 10)
    x = np.zeros((500, 3), np.float32)
    x[::100] = np.arange(15).reshape(5, 3)
    result = fit_in_parts(x, KMeansSettings(6), 3, nccl)
    assert result.inertia == pytest.approx(0.0, abs=1e-6) and result.empty == 0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda x: x.__setitem__((70, 1), np.nan), "1 of 80 descriptors are not finite"),
        (lambda x: x.__setitem__(slice(None), 1.0), "there are only 1"),
    ],
)
def test_refuses_what_fit_refuses(spoil, said):
    x, told = rows_of(80, 3, 0), KMeansSettings(4)
    spoil(x)
    with pytest.raises(ValueError, match=said) as caught:
        fit_in_parts(x, told)
    with pytest.raises(ValueError) as single:
        fit(x, told)
    assert str(caught.value) == str(single.value)


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


def test_where_cuml_fails_in_a_member_the_fit_begins_again_by_torch(cluster, sample, monkeypatch, caplog):
    """The members' processes have no cuML, whatever was found before."""
    monkeypatch.setattr(rapids, "_given_up", [])
    monkeypatch.setattr("cluster.actor._choose_for_pool", lambda requested: ("cuml", None))
    found = KMeansActor(members=2).fit(sample, KMeansSettings(6, seed=2))
    assert found.backend == "torch" and found.empty == 0
    assert "No module named" in caplog.text
    with pytest.raises(RuntimeError, match="No module named"):
        KMeansActor(members=2).fit(sample, KMeansSettings(6, backend="cuml"))
