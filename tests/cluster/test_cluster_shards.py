"""Per-shard records and their storage: round trips, damage, atomic writes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import storage
from cluster.shards import Descriptors, Labels, widened


def descriptors(sizes: list[int], seed: int = 0) -> Descriptors:
    rng, rows = np.random.default_rng(seed), sum(sizes)
    return Descriptors(
        np.cumsum([0, *sizes]),
        rng.random((rows, 2)).astype(np.float32),
        rng.normal(size=(rows, 4)).astype(np.float16),
    )


def labels(sizes: list[int], seed: int = 0) -> Labels:
    rng, rows = np.random.default_rng(seed), sum(sizes)
    return Labels(
        np.cumsum([0, *sizes]),
        rng.random((rows, 2)).astype(np.float32),
        rng.integers(0, 9, rows).astype(np.int16),
        rng.random(rows).astype(np.float32),
    )


@pytest.mark.parametrize("make", [descriptors, labels])
@pytest.mark.parametrize("sizes", [[], [0], [3], [0, 2, 0, 5]])
@pytest.mark.parametrize("where", ["local", "memory"])
def test_round_trip(tmp_path: Path, make: type, sizes: list[int], where: str) -> None:
    url = storage.join(str(tmp_path) if where == "local" else "memory://shards", "deep", "a.npz")
    shard = make(sizes)
    shard.save(url)
    again = type(shard).load(url)
    assert len(again) == len(sizes)
    for name, value in vars(shard).items():
        assert getattr(again, name).dtype == value.dtype
        np.testing.assert_array_equal(getattr(again, name), value)


def test_samples_own_their_rows() -> None:
    shard = descriptors([2, 0, 3])
    points, desc = shard.sample(2)
    np.testing.assert_array_equal(points, shard.points[2:5])
    np.testing.assert_array_equal(desc, shard.descriptors[2:5])
    assert desc.dtype == np.float32 and shard.sample(1)[0].shape == (0, 2)


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 5), max_size=6), seed=st.integers(0, 2**32 - 1))
def test_keeping_rows_keeps_them_with_their_images(sizes: list[int], seed: int) -> None:
    shard = labels(sizes, seed)
    mask = np.random.default_rng(seed).random(sum(sizes)) < 0.5
    kept = shard.keep(mask)
    assert len(kept) == len(shard)
    for image in range(len(shard)):
        own = slice(shard.offsets[image], shard.offsets[image + 1])
        np.testing.assert_array_equal(kept.sample(image)[0], shard.points[own][mask[own]])
        np.testing.assert_array_equal(kept.sample(image)[1], shard.cluster[own][mask[own]])


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 3, 2, 3], [], [[0, 3]]])
def test_offsets_that_do_not_fit_are_refused(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="offsets"):
        Labels(np.array(offsets), np.zeros((3, 2)), np.zeros(3, np.int16), np.zeros(3))


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="equally long"):
        Labels(np.array([0, 3]), np.zeros((3, 2)), np.zeros(2, np.int16), np.zeros(3))
    with pytest.raises(ValueError, match="as many points as descriptors"):
        Descriptors(np.array([0, 3]), np.zeros((3, 2)), np.zeros((2, 4)))


def test_every_cut_is_found_and_named(tmp_path: Path) -> None:
    url = str(tmp_path / "a.npz")
    descriptors([2, 3]).save(url)
    data = storage.read_bytes(url)
    for size in range(0, len(data), 7):
        storage.write_bytes(url, data[:size])
        with pytest.raises(ValueError, match=r"a\.npz"):
            Descriptors.load(url)


def test_flipped_bits_never_pass_as_other_values(tmp_path: Path) -> None:
    """The zip's checksums cover the arrays: a flipped bit is refused, or lies where no value is stored."""
    url, shard = str(tmp_path / "a.npz"), labels([2, 3])
    shard.save(url)
    data = storage.read_bytes(url)
    refused = 0
    for position in range(0, len(data), 5):
        storage.write_bytes(url, data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        try:
            again = Labels.load(url)
        except ValueError as error:
            assert "a.npz" in str(error)
            refused += 1
        else:
            for name, value in vars(shard).items():
                np.testing.assert_array_equal(getattr(again, name), value)
    assert refused > len(data) / 5 / 4


def test_another_kind_of_shard_is_named(tmp_path: Path) -> None:
    url = str(tmp_path / "a.npz")
    descriptors([2]).save(url)
    with pytest.raises(ValueError, match=r"a\.npz: arrays \['cluster', 'distance'\] are missing, so this is no Labels"):
        Labels.load(url)


def test_inconsistent_file_is_named(tmp_path: Path) -> None:
    url = str(tmp_path / "a.npz")
    storage.save_npz(url, offsets=np.array([0, 9]), points=np.zeros((2, 2)), descriptors=np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"a\.npz: descriptor shard: offsets"):
        Descriptors.load(url)


class Bomb:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('a pickle was executed')",)


def test_a_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    url = str(tmp_path / "a.npz")
    np.savez(url, offsets=np.array([Bomb()], dtype=object))
    with pytest.raises(ValueError, match=r"a\.npz: not a readable npz"):
        storage.load_npz(url)
    with pytest.raises(ValueError):
        storage.save_npz(str(tmp_path / "b.npz"), offsets=np.array([Bomb()], dtype=object))
    assert storage.list_names(str(tmp_path)) == ["a.npz"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "a.json")
    storage.write_json(url, {"round": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no room for its"):
        storage.write_json(url, {"round": 2})
    assert storage.read_json(url) == {"round": 1} and storage.list_names(str(tmp_path)) == ["a.json"]


def test_damaged_json_is_named(tmp_path: Path) -> None:
    url = str(tmp_path / "a.json")
    for data in (b"", b'{"a": 1', b"\xff\xfe\x00", b"[" * 100_000):
        storage.write_bytes(url, data)
        with pytest.raises(ValueError, match=r"a\.json: not a JSON file"):
            storage.read_json(url)


@pytest.mark.parametrize("where", ["local", "memory"])
def test_directories(tmp_path: Path, where: str) -> None:
    root = str(tmp_path / "run") if where == "local" else "memory://directories"
    assert storage.list_names(root) == [] and not storage.exists(root)
    storage.remove(root)
    for name in ("b.json", "a.json"):
        storage.write_json(storage.join(root, name), 1)
    storage.write_json(storage.join(root, "rounds", "c.json"), 2)
    assert storage.list_names(root) == ["a.json", "b.json", "rounds"]
    storage.remove(storage.join(root, "rounds"))
    assert storage.list_names(root) == ["a.json", "b.json"]
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "rounds", "c.json"))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_widening_is_numpys_whatever_the_layout(kind):
    rows = np.random.default_rng(0).normal(size=(7, 6)).astype(kind)
    rows[0, :3] = np.inf, np.nan, 0
    fixed = rows.copy()
    fixed.setflags(write=False)
    for each in (rows, rows[:, ::2], rows[:0], fixed):
        np.testing.assert_array_equal(widened(each), each.astype(np.float32))
