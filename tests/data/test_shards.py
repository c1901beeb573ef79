"""Image shards: what is written comes back, and damage never passes."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from cluster import storage
from sst.data.jpeg import decode_jpeg, decode_jpeg_scaled
from sst.data.shards import Manifest, SampleMeta, ShardWriter, decode, read_shard


def jpeg(height: int = 20, width: int = 30, level: int = 90) -> bytes:
    image = np.full((height, width, 3), level, np.uint8)
    return simplejpeg.encode_jpeg(image, quality=95, colorsubsampling="444")


def meta(source: str = "a", split: str = "train", **changes: object) -> SampleMeta:
    return SampleMeta.model_validate({"source": source, "split": split, "box": (0, 0, 30, 20), **changes})


def write(url: str, splits: str = "tttttee", shard_samples: int = 2) -> Manifest:
    with ShardWriter(url, "small", None, shard_samples) as writer:
        for number, letter in enumerate(splits):
            split = "train" if letter == "t" else "test"
            writer.add(jpeg(level=number * 20), meta(f"Bild é {number}.v1.JPG", split))
    assert writer.manifest is not None
    return writer.manifest


def test_samples_come_back_in_order(tmp_path: Path) -> None:
    url = str(tmp_path / "c")
    manifest = write(url)
    assert Manifest.load(url) == manifest
    assert [(s.file, s.split, s.samples) for s in manifest.shards] == [
        ("shard-00000.tar", "train", 2),
        ("shard-00001.tar", "train", 2),
        ("shard-00002.tar", "train", 1),
        ("shard-00003.tar", "test", 2),
    ]
    read = [x for s in manifest.shards for x in read_shard(f"{url}/{s.file}", s.sha256)]
    assert [x.key for x in read] == [f"{n:09d}" for n in range(7)]
    assert [x.meta.source for x in read] == [f"Bild é {n}.v1.JPG" for n in range(7)]
    assert [x.jpeg for x in read] == [jpeg(level=n * 20) for n in range(7)]
    manifest.check(url)


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    assert write(str(tmp_path / "a")) == write(str(tmp_path / "b"))


def test_works_on_an_object_store() -> None:
    manifest = write("memory://corpus")
    loaded = Manifest.load("memory://corpus")
    loaded.check("memory://corpus")
    assert loaded == manifest
    assert len(list(read_shard("memory://corpus/shard-00000.tar", manifest.shards[0].sha256))) == 2


def test_a_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    url = tmp_path / "c"
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(str(url), "c", None, 1) as writer:
        writer.add(jpeg(), meta())
        assert (url / "shard-00000.tar").exists()
        raise RuntimeError("stop")
    assert not url.exists()


def test_an_earlier_corpus_is_replaced_whole_and_other_files_stay(tmp_path: Path) -> None:
    write(str(tmp_path), shard_samples=1)
    (tmp_path / "notes.txt").write_text("mine")
    write(str(tmp_path), "t")
    assert storage.list_names(str(tmp_path)) == ["manifest.json", "notes.txt", "shard-00000.tar"]


def test_unequal_numbers_of_points_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="2 points, earlier images have 1"),
        ShardWriter(str(tmp_path), "c") as writer,
    ):
        writer.add(jpeg(), meta(points=[(1, 1)], visible=[True]))
        writer.add(jpeg(), meta(points=[(1, 1), (2, 2)], visible=[True, True]))


@pytest.mark.parametrize(
    "changes",
    [
        {"points": [(float("nan"), 1)], "visible": [True]},
        {"points": [(1, 1)], "visible": None},
        {"points": [(1, 1)], "visible": [True, False]},
        {"box": (5, 5, 5, 9)},
        {"colour": "red"},
        {"split": "val"},
    ],
)
def test_impossible_meta_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SampleMeta.model_validate({"source": "a", "split": "train", "box": (0, 0, 9, 9), **changes})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no manifest.json in it"),
        ("{oops", "not a JSON file"),
        ('{"schema": 2, "corpus": "c", "shards": []}', "schema"),
        ('{"schema": 1, "corpus": "c", "shards": [], "extra": 1}', "extra"),
        ('{"schema": 1, "corpus": "c"}', "shards"),
        ("[]", "not a manifest"),
    ],
)
def test_unusable_manifests_are_named_with_a_remedy(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        Manifest.load(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "landmarks pack" in str(caught.value)


def test_no_directory_and_a_file_instead(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(ValueError, match="no such directory"):
        Manifest.load(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="not a directory"):
        Manifest.load(str(tmp_path / "f"))


def test_check_lists_all_that_is_wrong(tmp_path: Path) -> None:
    manifest = write(str(tmp_path))
    (tmp_path / "shard-00001.tar").unlink()
    short = tmp_path / "shard-00003.tar"
    short.write_bytes(short.read_bytes()[:-512])
    with pytest.raises(ValueError, match="2 of 4 shards") as caught:
        manifest.check(str(tmp_path))
    expected = manifest.shards[3].bytes
    assert "shard-00001.tar is missing" in str(caught.value)
    assert f"shard-00003.tar has {expected - 512} bytes ({expected} expected)" in str(caught.value)


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_a_check_lists_a_corpus_once_and_asks_for_no_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Forty thousand questions to an object store would take half an hour."""
    url = str(tmp_path) if where == "folder" else f"memory://{tmp_path.name}"
    manifest = write(url)

    def asked(url: str) -> int:
        raise AssertionError(f"asked for {url}")

    with monkeypatch.context() as patched:
        patched.setattr(storage, "size", asked)
        manifest.check(url)
    storage.remove(f"{url}/shard-00002.tar")
    with pytest.raises(ValueError, match=r"1 of 4 shards.*shard-00002\.tar is missing"):
        manifest.check(url)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_cut_or_a_flipped_bit_never_passes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    url = str(tmp_path_factory.mktemp("damage"))
    shard = write(url, "tt").shards[0]
    path = Path(url) / shard.file
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        place = data.draw(st.integers(0, len(whole) - 1))
        damaged = whole[:place] + bytes([whole[place] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[place + 1 :]
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"shard-00000\.tar.*landmarks pack"):
        next(read_shard(f"{url}/{shard.file}", shard.sha256))


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


TEXT = meta().model_dump_json().encode()
FIRST = [("000000000.jpg", b"x"), ("000000000.json", TEXT)]
SECOND = [("000000001.jpg", b"y"), ("000000001.json", TEXT)]


@pytest.mark.parametrize(
    "members",
    [
        FIRST[:1],
        [*FIRST, *SECOND[:1]],
        [*FIRST, *SECOND, *FIRST],
        [*SECOND, *FIRST],
        [*FIRST, ("000000001.v1.jpg", b"y"), ("000000001.v1.json", TEXT)],
        [*FIRST, ("README", b"hello")],
        [*FIRST, ("__extra__", b"hello")],
        [FIRST[0], ("000000000.json", b"{}")],
        [FIRST[0], ("000000000.json", b"\xff")],
    ],
)
def test_wrong_structure_is_refused_without_a_hash(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    path = tmp_path / "shard-00000.tar"
    path.write_bytes(tar_of(FIRST + SECOND))
    assert len(list(read_shard(str(path)))) == 2
    path.write_bytes(tar_of(members))
    with pytest.raises(ValueError, match="damaged shard"):
        next(read_shard(str(path)))


def test_a_cut_at_any_block_is_found_without_a_hash(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.tar"
    whole = tar_of(FIRST + SECOND)
    end = 8 * 512  # four members of a header and one block each
    for length in range(0, end + 1024, 256):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged shard"):
            next(read_shard(str(path)))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shard-00007\.tar: shard is missing"):
        next(read_shard(str(tmp_path / "shard-00007.tar"), "0" * 64))


def test_foreign_tar_reader_agrees(tmp_path: Path) -> None:
    write(str(tmp_path), "tt")
    with tarfile.open(tmp_path / "shard-00000.tar") as tar:
        names = tar.getnames()
        member = tar.extractfile(names[1])
        assert member is not None
        record = json.load(member)
    assert names == ["000000000.jpg", "000000000.json", "000000001.jpg", "000000001.json"]
    assert record["source"] == "Bild é 0.v1.JPG" and record["points"] is None


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 300), st.integers(8, 300), st.integers(1, 320))
def test_decoding_takes_the_smallest_sufficient_size(height: int, width: int, min_side: int) -> None:
    got = decode_jpeg(jpeg(height, width), min_side).shape[:2]
    eighths = [n for n in range(1, 9) if n == 8 or n / 8 * min(height, width) >= min_side]
    small = max(height, width) < 64
    n = 8 if small else min(eighths)
    assert got == (-(-height * n // 8), -(-width * n // 8))


@pytest.mark.parametrize("scale", [0.1, 0.25, 0.3, 0.5, 0.6, 0.75, 0.8, 1.0])
def test_a_bright_spot_lies_where_the_span_says(scale: float) -> None:
    height, width, x, y = 203, 331, 310.0, 187.0  # near the far corner, where a wrong scale shows most
    grid_y, grid_x = np.mgrid[:height, :width]
    spot = 250 * np.exp(-((grid_x - x) ** 2 + (grid_y - y) ** 2) / (2 * 5.0**2))
    data = simplejpeg.encode_jpeg(
        np.repeat(spot[:, :, None], 3, 2).astype(np.uint8), quality=98, colorsubsampling="444"
    )
    image, span_height, span_width = decode_jpeg_scaled(data, scale)
    scale_y, scale_x = image.shape[0] / span_height, image.shape[1] / span_width
    assert scale <= scale_x == pytest.approx(scale_y) and scale_x < scale + 0.126
    weight = np.clip(image[:, :, 0].astype(float) - 20, 0, None)
    found_y, found_x = ((grid * weight).sum() / weight.sum() for grid in np.mgrid[: image.shape[0], : image.shape[1]])
    assert ((found_x + 0.5) / scale_x - 0.5, (found_y + 0.5) / scale_y - 0.5) == pytest.approx(
        (x, y), abs=0.1 + 0.02 / scale_x
    )


def test_colours_are_rgb_and_cmyk_and_grey_are_read() -> None:
    red = np.zeros((80, 80, 3), np.uint8)
    red[..., 0] = 200
    assert np.abs(decode_jpeg(simplejpeg.encode_jpeg(red)).astype(int) - red).max() < 5
    for mode, expected in (("CMYK", (200, 0, 0)), ("L", (60, 60, 60))):
        buffer = io.BytesIO()
        Image.fromarray(red).convert(mode).save(buffer, "JPEG")
        assert np.abs(decode_jpeg(buffer.getvalue()).astype(int) - expected).max() < 6


def test_a_corrupt_image_names_sample_and_source(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path), "c") as writer:
        writer.add(jpeg(200, 200)[:-300], meta("cut.jpg"))
    sample = next(read_shard(str(tmp_path / "shard-00000.tar")))
    for scale in (1.0, 0.5):
        with pytest.raises(ValueError, match=r"000000000 \(cut\.jpg\)"):
            decode(sample, scale)
