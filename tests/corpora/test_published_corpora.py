"""Packing of the published corpora, from tiny archives in their owners' layouts."""

import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cdflib
import cv2
import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import savemat

from jobs.pack import main
from sst.corpora import celeba, human36m, packing, torch7
from sst.corpora.annotation_files import read_annotations
from sst.corpora.faces import box_of_five, extent_box, grown_box
from sst.corpora.packing import Item, Packed, SourceImage, UnusableImage, mixed, pack_item, shuffled
from sst.data.jpeg import decode_jpeg
from sst.data.shards import Manifest, RawSample, SampleMeta
from sst.errors import UserError
from sst.report.evaluation import PROTOCOLS
from tests.corpora.test_pack import fails, samples, save

Break = tuple[Callable[[Path], object], tuple[str, ...]]
"""What is done to an archive, and the words that the message must have."""


@pytest.fixture(autouse=True)
def nothing_left_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Temporary files must be gone after every test."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    yield
    assert not list(scratch.iterdir())


def packed(source: str, root: Path, *arguments: str) -> dict[str, RawSample]:
    """Packs an archive; its samples by source."""
    out = root.parent / "out"
    main([source, "--root", str(root), "--out", str(out), "--overwrite", *arguments])
    stored = samples(out)
    assert len({s.meta.source for s in stored}) == len(stored)
    return {s.meta.source: s for s in stored}


def in_view(meta: SampleMeta) -> np.ndarray:
    """Stored points in pixels of the 256 px view."""
    x0, y0, x1, y1 = meta.box
    return (np.array(meta.points) - [x0, y0]) * 256 / [x1 - x0, y1 - y0]


def refused(capsys: pytest.CaptureFixture[str], source: str, root: Path, words: tuple[str, ...], *more: str) -> None:
    out = root.parent / "refused"
    message = fails(capsys, source, "--root", str(root), "--out", str(out), *more)
    for word in words:
        assert word in message, message
    assert "expected" in message and not out.exists()


def write(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def edit(path: str, old: str, new: str) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        text = (root / path).read_text()
        assert old in text
        write(root / path, text.replace(old, new, 1))

    return change


def gone(path: str) -> Callable[[Path], object]:
    return lambda root: (root / path).rename(root.parent / "gone")


def noise(seed: int, height: int, width: int) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return cv2.resize(small, (width, height))


# Boxes of faces


def margin_of(x0: float, y0: float, x1: float, y1: float) -> int:
    """The published margin in words of its own: 8 % of a size, at least 8 for small faces."""
    wide, high = 1.2 * x1 - x0, 2 * y1 - y0
    size = (wide + high) / 2
    return 8 if size < 20 else int(size * 8 / 100)


@given(st.tuples(*[st.floats(-50, 400)] * 4), st.integers(20, 450), st.integers(20, 450))
def test_grown_box_is_the_published_one(box: tuple[float, float, float, float], width: int, height: int) -> None:
    x0, y0, x1, y1 = grown_box(box, width, height)
    margin = margin_of(*box)
    assert (x0, y0) == (float(int(max(0, box[0] - margin))), float(int(max(0, box[1] - margin))))
    assert (x1, y1) == (int(min(box[2] + margin, width - 1)), int(min(box[3] + margin, height - 1)))


def test_grown_box_by_hand() -> None:
    # (1.2 * 132 - 45 + 2 * 185 - 60) / 2 = 211.7, of which 8 % is 16.9
    assert grown_box((45, 60, 132, 185), 178, 218) == (29, 44, 148, 201)
    assert grown_box((10, 12, 14, 16), 178, 218) == (2, 4, 22, 24)  # below 20: 8 pixels
    assert grown_box((5, 5, 170, 215), 178, 218) == (0, 0, 177, 217)


def test_extent_box_raises_its_top_by_a_third() -> None:
    points = np.array([[10.9, 40.2], [50.7, 99.9], [30.0, 70.0]])
    assert extent_box(points) == (10, 40 - 59 / 3, 50, 99)


@given(st.floats(0.5, 3), st.floats(-100, 100), st.floats(-100, 100))
def test_the_box_of_five_points_moves_with_the_face(scale: float, x: float, y: float) -> None:
    five = np.array([[69, 111], [108, 111], [88, 135], [73, 152], [105, 152]], np.float64)
    base, moved = box_of_five(five), box_of_five(five * scale + [x, y])
    assert moved == pytest.approx(np.array(base) * scale + [x, y, x, y], abs=1e-6)
    assert base[0] < 69 and base[1] < 90 and base[2] > 108 and base[3] > 180  # chin and forehead are in it


def test_the_box_of_five_points_is_near_the_box_of_68(faces: Path) -> None:
    """On real faces the derived box overlaps the box of the 68 points as two detectors' would."""
    overlaps = []
    for row in read_annotations(str(faces / "annotations.csv")).rows[::20]:
        assert row.points is not None
        p = row.points
        five = np.stack([p[36:42].mean(axis=0), p[42:48].mean(axis=0), p[30], p[48], p[54]])
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = box_of_five(five), extent_box(p)
        common = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
        overlaps.append(common / ((ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - common))
    assert np.median(overlaps) > 0.85


# CelebA and MAFL

FIVE = np.array([[69, 111], [108, 111], [88, 135], [73, 152], [105, 152]])
PARTITION = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 0, 0]
TRAINING, TESTING = (1, 3, 9), (4, 11, 13)  # MAFL takes images of all splits


def five_of(number: int) -> np.ndarray:
    return FIVE + [[number % 3, -number % 4]]


def points68_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).uniform([40, 60], [140, 190], (68, 2)).round(2)


def name_of(number: int) -> str:
    return f"{number:06d}.jpg"


def celeba_tree(root: Path) -> Path:
    rows = []
    for number in range(1, len(PARTITION) + 1):
        save(root / "Img" / "img_align_celeba" / name_of(number), noise(number, 218, 178), quality=95)
        rows.append(f"{name_of(number)} " + " ".join(f"{v:4d}" for v in five_of(number).ravel()))
    header = (
        "lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x rightmouth_y "
    )
    write(root / "Anno" / "list_landmarks_align_celeba.txt", "\n".join([str(len(rows)), header, *rows, ""]))
    parts = [f"{name_of(n)} {part}" for n, part in enumerate(PARTITION, 1)]
    write(root / "Eval" / "list_eval_partition.txt", "\n".join([*parts, ""]))
    write(root / "MAFL" / "training.txt", "\n".join([*map(name_of, TRAINING), ""]))
    write(root / "MAFL" / "testing.txt", "\n".join(map(name_of, TESTING)))  # without a last line break
    return root


def face_csv(
    path: Path, boxes: dict[int, tuple[float, ...]], points: dict[int, np.ndarray], landmarks: int = 68
) -> str:
    columns = ["file", "box_x0", "box_y0", "box_x1", "box_y1"] + [f"{a}{n}" for n in range(landmarks) for a in "xy"]
    lines = [",".join(columns)]
    for number in sorted({*boxes, *points}):
        box = [str(v) for v in boxes.get(number, ("",) * 4)]
        values = [str(v) for v in points[number].ravel()] if number in points else [""] * (2 * landmarks)
        lines.append(",".join([name_of(number), *box, *values]))
    write(path, "\n".join(lines))
    return str(path)


TRAIN_OF_CELEBA = {n for n, part in enumerate(PARTITION, 1) if part == 0} - set(TESTING)


def test_celeba_splits_points_and_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = packed("celeba", celeba_tree(tmp_path / "celeba"))
    assert {n: s.meta.split for n, s in stored.items()} == (
        {name_of(n): "train" for n in TRAIN_OF_CELEBA} | {name_of(n): "test" for n in TESTING}
    )
    manifest = Manifest.load(str(tmp_path / "out"))
    assert (manifest.corpus, manifest.protocol, manifest.landmarks) == ("celeba", None, 5)
    assert "no scoring protocol" in capsys.readouterr().out
    for number in TRAIN_OF_CELEBA | set(TESTING):
        meta = stored[name_of(number)].meta
        annotated = number in (*TRAINING, *TESTING)
        assert (meta.points is not None) == annotated
        five = five_of(number).astype(float)
        eyes, mouth = (five[0] + five[1]) / 2, (five[3] + five[4]) / 2
        unit = np.hypot(*(eyes - mouth))
        x, y = (eyes + mouth) / 2
        x = x - 1.5 * (five[2][0] - x)
        box = (x - 1.1 * unit, y - 1.6 * unit, x + 1.1 * unit, y + 1.2 * unit)
        m = margin_of(*box)
        x0, y0, x1, y1 = int(box[0] - m), int(box[1] - m), int(box[2] + m), int(box[3] + m)
        assert (meta.box[2] - meta.box[0], meta.box[3] - meta.box[1]) == (x1 - x0, y1 - y0)
        if annotated:
            expected = (five - [x0, y0]) * 256 / [x1 - x0, y1 - y0]
            assert in_view(meta) == pytest.approx(expected, abs=1e-3)


def test_mafl_test_images_are_in_test_shards_only(tmp_path: Path) -> None:
    packed("celeba", celeba_tree(tmp_path / "celeba"), "--shard-samples", "2")
    manifest = Manifest.load(str(tmp_path / "out"))
    held_out = {name_of(n) for n in TESTING}
    for shard in manifest.shards:
        found = {s.meta.source for s in packing_read(tmp_path / "out" / shard.file)}
        assert found <= held_out if shard.split == "test" else not found & held_out
    assert manifest.samples_of("test") == len(held_out)


def packing_read(path: Path) -> list[RawSample]:
    from sst.data.shards import read_shard

    return list(read_shard(str(path)))


@given(st.lists(st.integers(0, 2), min_size=6, max_size=14), st.data())
def test_mafl_test_images_are_never_trained_on(parts: list[int], data: st.DataObject) -> None:
    numbers = list(range(1, len(parts) + 1))
    order = data.draw(st.permutations(numbers))
    cut, end = sorted([data.draw(st.integers(1, len(parts) - 1)), data.draw(st.integers(2, len(parts)))])
    testing, training = order[:cut], order[cut : max(end, cut + 1)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root / "list_eval_partition.txt", "\n".join(f"{name_of(n)} {p}" for n, p in enumerate(parts, 1)))
        rows = [f"{name_of(n)} " + " ".join(map(str, FIVE.ravel())) for n in numbers]
        write(root / "list_landmarks_align_celeba.txt", "\n".join([str(len(rows)), "names", *rows]))
        write(root / "MAFL" / "training.txt", "\n".join(map(name_of, training)))
        write(root / "MAFL" / "testing.txt", "\n".join(map(name_of, testing)))
        for number in numbers:
            write(root / "img_align_celeba" / name_of(number), b"")
        items = celeba.items(str(root))
    train, test = ({i.source for i in items if i.split == split} for split in ("train", "test"))
    assert test == set(map(name_of, testing)) and not train & test
    assert train == {name_of(n) for n in numbers if parts[n - 1] == 0 and n not in testing}


def test_celeba_with_published_boxes_and_68_points(tmp_path: Path) -> None:
    boxes = {n: (40.5 + n, 60.0, 130.25, 180.0 + n) for n in (1, 2, 4, 9)}  # 9 is in no split that is used
    points = {n: points68_of(n) for n in (1, 3, 4, 9, 11, 13)}
    table = face_csv(tmp_path / "a.csv", boxes, points)
    stored = packed("celeba", celeba_tree(tmp_path / "celeba"), "--annotations", table)
    manifest = Manifest.load(str(tmp_path / "out"))
    assert (manifest.protocol, manifest.landmarks) == ("mafl", 68)
    assert PROTOCOLS["mafl"].min_points <= 68
    assert {n for n, s in stored.items() if s.meta.points} == set(map(name_of, (1, 3, 4, 11, 13)))
    for number in (1, 4):
        meta, (x0, y0, x1, y1) = stored[name_of(number)].meta, boxes[number]
        m = margin_of(x0, y0, x1, y1)
        corner, far = np.array([int(x0 - m), int(y0 - m)]), np.array([int(x1 + m), int(y1 + m)])
        expected = (points[number] - corner) * 256 / (far - corner)
        assert in_view(meta) == pytest.approx(expected, abs=1e-3)
        # What is stored is the image around the box: the crop has twice the box's sides, cut at the borders.
        image = decode_jpeg(stored[name_of(number)].jpeg).astype(int)
        left, top = (corner - meta.box[:2]).astype(int)
        there = noise(number, 218, 178)[top : top + image.shape[0], left : left + image.shape[1]]
        assert image.shape == there.shape and np.abs(image - there).mean() < 3


CELEBA_BREAKS: dict[str, Break] = {
    "no images": (gone("Img/img_align_celeba"), ("the folder of aligned images", "Img/img_align_celeba")),
    "no partition": (gone("Eval/list_eval_partition.txt"), ("Eval/list_eval_partition.txt",)),
    "no points": (gone("Anno/list_landmarks_align_celeba.txt"), ("Anno/list_landmarks_align_celeba.txt",)),
    "no training list": (gone("MAFL/training.txt"), ("MAFL/training.txt",)),
    "no test list": (gone("MAFL/testing.txt"), ("MAFL/testing.txt",)),
    "a training image": (gone("Img/img_align_celeba/000002.jpg"), ("1 file is missing", "000002.jpg")),
    "a test image": (gone("Img/img_align_celeba/000011.jpg"), ("000011.jpg",)),
    "odd split": (edit("Eval/list_eval_partition.txt", "03.jpg 0", "03.jpg 7"), ("line 3", "000003.jpg 7")),
    "odd list": (edit("MAFL/testing.txt", "000011.jpg", "eleven"), ("testing.txt, line 2", "'eleven'")),
    "empty list": (lambda root: write(root / "MAFL/testing.txt", ""), ("testing.txt: empty",)),
    "twice": (edit("MAFL/testing.txt", "000011.jpg", "000004.jpg"), ("testing.txt", "twice")),
    "both lists": (
        edit("MAFL/training.txt", "000003.jpg", "000004.jpg"),
        ("training.txt", "000004.jpg", "testing.txt"),
    ),
    "points cut": (edit("Anno/list_landmarks_align_celeba.txt", "14\n", "15\n"), ("14 images", "15")),
    "points without count": (edit("Anno/list_landmarks_align_celeba.txt", "14\n", ""), ("line 1", "number of images")),
    "too few numbers": (
        edit("Anno/list_landmarks_align_celeba.txt", "   70", ""),
        ("line 3", "000001.jpg", "10 numbers"),
    ),
    "points renamed": (edit("Anno/list_landmarks_align_celeba.txt", "000002.jpg", "999999.jpg"), ("000002.jpg",)),
    "a binary list": (lambda root: write(root / "MAFL/training.txt", b"\xff\xfe\x00"), ("training.txt", "text")),
    "images as a file": (
        lambda root: (gone("Img/img_align_celeba")(root), write(root / "Img/img_align_celeba", "")),
        ("img_align_celeba: not a folder",),
    ),
}


@pytest.mark.parametrize("case", CELEBA_BREAKS)
def test_celeba_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    root = celeba_tree(tmp_path / "celeba")
    change, words = CELEBA_BREAKS[case]
    change(root)
    refused(capsys, "celeba", root, words)


def test_images_that_are_not_aligned_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = celeba_tree(tmp_path / "celeba")
    save(root / "Img" / "img_align_celeba" / "000002.jpg", noise(0, 300, 200))
    message = fails(capsys, "celeba", "--root", str(root), "--out", str(tmp_path / "refused"))
    assert "000002.jpg: 200 x 300 pixels; aligned images have 178 x 218" in message
    assert not (tmp_path / "refused").exists()
    assert len(packed("celeba", root, "--max-skipped", "0.2")) == len(TRAIN_OF_CELEBA) + len(TESTING) - 1


def test_celeba_annotation_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = celeba_tree(tmp_path / "celeba")
    all_points = {n: points68_of(n) for n in TESTING}
    broken = points68_of(4)
    broken[7] = np.nan
    for points, landmarks, words in [
        ({4: points68_of(4)}, 68, ("a.csv: no points of 000011.jpg", "68")),
        (all_points | {4: broken}, 68, ("000004.jpg has 67 points",)),
        ({n: five_of(n) for n in TESTING}, 5, ("has 5 points; 68",)),
        ({8000: points68_of(1)}, 68, ("names none of the images", "000001.jpg")),
    ]:
        table = face_csv(tmp_path / "a.csv", {}, points, landmarks)
        message = fails(
            capsys, "celeba", "--root", str(root), "--out", str(tmp_path / "refused"), "--annotations", table
        )
        assert all(word in message for word in words), message
    assert not (tmp_path / "refused").exists()


def test_the_root_must_be_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "file", "")
    for source in ("celeba", "ls3d", "human36m", "bbcpose"):
        refused(capsys, source, tmp_path / "nowhere", ("nowhere", "no such folder"))
        refused(capsys, source, tmp_path / "file", ("file: not a folder",))


# Torch7 tensors


def text7(text: str) -> bytes:
    return struct.pack("<i", len(text)) + text.encode()


def t7(
    array: np.ndarray, strides: tuple[int, ...] | None = None, offset: int = 1, storage: np.ndarray | None = None
) -> bytes:
    """The bytes that Torch7 writes for a tensor, 64-bit and little-endian."""
    kind = {"f4": "Float", "f8": "Double", "i8": "Long"}[array.dtype.str[1:]]
    strides = strides or tuple(s // array.itemsize for s in array.strides)
    storage = np.ascontiguousarray(array).ravel() if storage is None else storage
    parts = [struct.pack("<ii", 4, 1), text7("V 1"), text7(f"torch.{kind}Tensor"), struct.pack("<i", array.ndim)]
    parts += [struct.pack(f"<{array.ndim}q", *array.shape), struct.pack(f"<{array.ndim}q", *strides)]
    parts += [struct.pack("<q", offset), struct.pack("<ii", 4, 2), text7("V 1"), text7(f"torch.{kind}Storage")]
    return b"".join([*parts, struct.pack("<q", storage.size), storage.tobytes()])


def test_the_first_bytes_are_those_of_torch() -> None:
    """A 2 x 3 tensor of floats, against the bytes that Torch itself is documented to have written."""
    start = bytes.fromhex("04000000 01000000 03000000 562031 11000000".replace(" ", "")) + b"torch.FloatTensor"
    start += bytes.fromhex("02000000 0200000000000000 0300000000000000".replace(" ", ""))
    start += bytes.fromhex("0300000000000000 0100000000000000 0100000000000000 04000000 02000000".replace(" ", ""))
    data = t7(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert data.startswith(start)
    assert torch7.parse_tensor(data).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_tensors_are_read_as_they_lie_in_their_storage(kind: type) -> None:
    values = np.arange(20, dtype=kind)
    read = torch7.parse_tensor(t7(values[:6].reshape(3, 2), strides=(1, 5), offset=4, storage=values))
    assert read.dtype == np.float64
    assert read.tolist() == [[3 + row + 5 * column for column in range(2)] for row in range(3)]


@given(st.data())
def test_damaged_tensors_are_refused_in_order(data: st.DataObject) -> None:
    whole = bytearray(t7(np.arange(136, dtype=np.float32).reshape(68, 2)))
    if data.draw(st.booleans()):
        damaged = bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(ValueError):
            torch7.parse_tensor(damaged)
        return
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 130))] = data.draw(st.integers(0, 255))
    try:
        torch7.parse_tensor(bytes(whole))
    except ValueError:
        pass  # any other error, or a huge array, would fail the test


def test_other_objects_of_torch_are_refused() -> None:
    points = np.zeros((68, 2), np.float32)
    for data, words in [
        (struct.pack("<i", 3) + bytes(60), "another kind"),  # a table
        (t7(np.zeros((2, 2), np.int64)), "floats or doubles"),
        (t7(points) + b"more", "4 bytes follow"),
        (t7(points, offset=2), "does not fit"),
        (t7(points, strides=(2, -1)), "does not fit"),
        (t7(points).replace(b"FloatStorage", b"LongsStorage"), "storage"),
        (bytes(torch7.MAX_BYTES + 1), "fewer than"),
        (b"", "cut short"),
    ]:
        with pytest.raises(ValueError, match=words):
            torch7.parse_tensor(data)


# 300W-LP and LS3D-W

LP_IMAGES = ("AFW/AFW_134212_1_0", "AFW/AFW_134212_1_1", "HELEN/HELEN_10_2", "IBUG/IBUG_image_003_1_0", "LFPW/LFPW_1")
BALANCED = "LS3D-W-balanced-20-03-2017/new_dataset"


def face_points(seed: int, centre: float, spread: float) -> np.ndarray:
    return np.random.default_rng(seed).uniform(centre - spread, centre + spread, (68, 2)).astype(np.float32)


def ls3d_tree(root: Path) -> Path:
    lp = root / "300W_LP"
    for number, name in enumerate(LP_IMAGES):
        part, stem = name.split("/")
        points = face_points(number, 225, 80)
        save(lp / f"{name}.jpg", noise(number, 450, 450))
        (lp / "landmarks" / part).mkdir(parents=True, exist_ok=True)
        savemat(lp / "landmarks" / part / f"{stem}_pts.mat", {"pts_2d": points + 9, "pts_3d": points})
        savemat(lp / f"{name}.mat", {"pt2d": points.T - 5, "roi": np.array([[1, 1, 450, 450]])})
        save(lp / f"{part}_Flip" / f"{stem}.jpg", noise(number, 450, 450))
        savemat(lp / f"{part}_Flip" / f"{stem}.mat", {"pt2d": points.T})
    for number, spread in ((1, 100), (7153, 9)):
        save(root / BALANCED / f"{number}.jpg", noise(number, 300, 400))
        kind = np.float32 if number == 1 else np.float64
        write(root / BALANCED / f"{number}.t7", t7(face_points(number, 150, spread).astype(kind)))
    return root


def ls3d_oracle(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """Points in the view by the published steps, one after the other."""
    left, top, right, bottom = (int(v) for v in (*points.min(axis=0), *points.max(axis=0)))
    high = top - (bottom - top) / 3
    m = margin_of(left, high, right, bottom)
    x0, y0 = int(max(left - m, 0)), int(max(high - m, 0))
    x1, y1 = int(min(right + m, width - 1)), int(min(bottom + m, height - 1))
    return np.array([((x - x0) * (256 / (x1 - x0)), (y - y0) * (256 / (y1 - y0))) for x, y in points.tolist()])


def test_ls3d_splits_points_and_boxes(tmp_path: Path) -> None:
    stored = packed("ls3d", ls3d_tree(tmp_path / "faces"))
    tests = {f"{BALANCED}/1.jpg": (1, 100), f"{BALANCED}/7153.jpg": (7153, 9)}
    assert {n for n, s in stored.items() if s.meta.split == "train"} == {f"{name}.jpg" for name in LP_IMAGES}
    assert {n for n, s in stored.items() if s.meta.split == "test"} == set(tests)
    manifest = Manifest.load(str(tmp_path / "out"))
    assert (manifest.corpus, manifest.protocol, manifest.landmarks) == ("ls3d", "ls3d", 68)
    for number, name in enumerate(LP_IMAGES):
        expected = ls3d_oracle(face_points(number, 225, 80), 450, 450)
        assert in_view(stored[f"{name}.jpg"].meta) == pytest.approx(expected, abs=2e-3)
    for name, (seed, spread) in tests.items():
        expected = ls3d_oracle(face_points(seed, 150, spread), 400, 300)
        assert in_view(stored[name].meta) == pytest.approx(expected, abs=2e-3 if spread > 50 else 2e-2)


@pytest.mark.parametrize("source", ["celeba", "ls3d", "bbcpose"])
def test_no_training_box_comes_from_annotated_points_where_a_detector_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bbc_archive: Path, source: str
) -> None:
    """With a box of one image alone those of the others are named as missing; with all of them it packs."""
    trees = {"celeba": celeba_tree, "ls3d": ls3d_tree, "bbcpose": lambda _: bbc_archive}
    root = trees[source](tmp_path / "archive")
    shown = {name: s for name, s in packed(source, root).items() if s.meta.split == "train"}
    header = "file,box_x0,box_y0,box_x1,box_y1"
    rows = [f"{name.removeprefix('300W_LP/')},{20 + n},30,{90 + n},120" for n, name in enumerate(sorted(shown))]
    table = tmp_path / "boxes.csv"
    told = ("--annotations", str(table), "--boxes", "detector")
    write(table, "\n".join([header, rows[0]]))
    others = f"and {len(rows) - 2} others; expected one for every training image"
    refused(capsys, source, root, ("boxes.csv: no box of", others), *told)
    write(table, "\n".join([header, *rows]))
    after = packed(source, root, *told)
    for n, name in enumerate(sorted(shown)):
        x0, _, x1, _ = after[name].meta.box
        width = 70 + (0 if source == "bbcpose" else 2 * margin_of(20 + n, 30, 90 + n, 120))
        assert x1 - x0 == pytest.approx(width, abs=1)


def test_ls3d_with_published_boxes(tmp_path: Path) -> None:
    write(
        tmp_path / "boxes.csv",
        "file,box_x0,box_y0,box_x1,box_y1\nAFW/AFW_134212_1_0.jpg,150,140,300,330\nAFW_Flip/AFW_134212_1_0.jpg,1,1,9,9",
    )
    stored = packed("ls3d", ls3d_tree(tmp_path / "faces"), "--annotations", str(tmp_path / "boxes.csv"))
    m = margin_of(150, 140, 300, 330)
    points = (face_points(0, 225, 80) - [150 - m, 140 - m]) * 256 / [150 + 2 * m, 190 + 2 * m]
    assert in_view(stored["AFW/AFW_134212_1_0.jpg"].meta) == pytest.approx(points, abs=2e-3)
    other = ls3d_oracle(face_points(1, 225, 80), 450, 450)
    assert in_view(stored["AFW/AFW_134212_1_1.jpg"].meta) == pytest.approx(other, abs=2e-3)


PTS = "300W_LP/landmarks/AFW/AFW_134212_1_1_pts.mat"
LS3D_BREAKS: dict[str, Break] = {
    "no 300W-LP": (gone("300W_LP"), ("300W_LP", "the folder of 300W-LP")),
    "a part": (gone("300W_LP/HELEN"), ("HELEN: no such folder",)),
    "no landmarks": (gone("300W_LP/landmarks"), ("landmarks/AFW: no such folder", "_pts.mat")),
    "one annotation": (gone(PTS), ("landmarks/AFW: 1 file is missing: AFW_134212_1_1_pts.mat",)),
    "no test set": (gone("LS3D-W-balanced-20-03-2017"), ("LS3D-W balanced is missing", "NAME.t7")),
    "one tensor": (gone(f"{BALANCED}/7153.t7"), ("7153.t7", "beside each image")),
    "another variable": (
        lambda root: savemat(root / PTS, {"pts_2d": np.zeros((68, 2))}),
        ("AFW_134212_1_1_pts.mat", "no such variable", "pts_3d"),
    ),
    "another shape": (
        lambda root: savemat(root / PTS, {"pts_3d": np.zeros((21, 2))}),
        ("AFW_134212_1_1_pts.mat", "(21, 2)", "68 x 2"),
    ),
    "not numbers": (
        lambda root: savemat(root / PTS, {"pts_3d": np.array(["a", "b"])}),
        ("AFW_134212_1_1_pts.mat", "numbers"),
    ),
    "damaged matrix": (lambda root: write(root / PTS, "hello"), ("AFW_134212_1_1_pts.mat", "can't be read")),
    "another tensor": (
        lambda root: write(root / BALANCED / "1.t7", t7(np.zeros((68, 3)))),
        ("1.t7", "(68, 3)", "68 x 2"),
    ),
    "damaged tensor": (lambda root: write(root / BALANCED / "1.t7", b"\4\0"), ("1.t7", "cut short")),
    "huge tensor": (lambda root: write(root / BALANCED / "1.t7", bytes(2_000_000)), ("1.t7", "2000000 bytes")),
}


@pytest.mark.parametrize("case", LS3D_BREAKS)
def test_ls3d_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    root = ls3d_tree(tmp_path / "faces")
    change, words = LS3D_BREAKS[case]
    change(root)
    refused(capsys, "ls3d", root, words)


# Human3.6M

WIDTH, HEIGHT, BLUE_FROM = 80, 64, 48  # the codec works in blocks of 16
H36M_LENGTH = {"train": 21, "test": 52}
TAKEN = {"train": [0, 10, 20], "test": [0, 50]}
CAMERA = "54138969"


def grey_of(frame: int) -> int:
    return 40 + 4 * (frame % 50)


def write_video(path: Path, frames: int) -> None:
    """Every frame has a brightness of its own; its right part is blue, to tell the order of the channels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 50, (WIDTH, HEIGHT))
    assert writer.isOpened()
    for number in range(frames):
        image = np.full((HEIGHT, WIDTH, 3), grey_of(number), np.uint8)
        image[:, BLUE_FROM:, 0] = 250  # OpenCV's first channel is blue
        writer.write(image)
    writer.release()


def mask_of(box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[box[1] : box[3] + 1, box[0] : box[2] + 1] = 1
    return mask


def write_masks(path: Path, masks: list[np.ndarray]) -> None:
    """As MATLAB 7.3 writes a cell array: a header before the HDF5 part, references to arrays with axes reversed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", userblock_size=512) as file:
        cells = file.create_dataset("Masks", (len(masks), 1), dtype=h5py.ref_dtype)
        cells.attrs["MATLAB_class"] = np.bytes_("cell")
        for number, mask in enumerate(masks):
            data = file.create_dataset(f"#refs#/{number}", data=mask.T, compression="gzip")
            data.attrs["MATLAB_class"] = np.bytes_("logical")
            cells[number, 0] = data.ref
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\0\2IM")


def write_pose(path: Path, pose: np.ndarray, name: str = "Pose") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    file = cdflib.cdfwrite.CDF(str(path), cdf_spec={"Compressed": 0}, delete=True)
    spec = {"Variable": name, "Data_Type": 44, "Num_Elements": 1, "Rec_Vary": True, "Var_Type": "zVariable"}
    file.write_var(spec | {"Dim_Sizes": list(pose.shape[1:])}, var_attrs={}, var_data=pose)
    file.close()


def box_in(number: int) -> tuple[int, int, int, int]:
    return 20 + number % 9, 10 + number % 4, 50, 50 + number % 3


def joints_of(subject: str, action: str, frame: int) -> np.ndarray:
    seed = [frame, human36m.ACTIONS.index(action), int(subject[1:])]
    return np.random.default_rng(seed).uniform([20, 10], [50, 50], (32, 2)).astype(np.float32)


def stem_of(subject: str, action: str) -> str:
    return f"{action}.{CAMERA}" if action == "Posing" else f"{action} 1.{CAMERA}"


def human_tree(root: Path) -> Path:
    """One video of each action and subject, and what else such a folder holds."""
    made: dict[int, bytes] = {}
    for subject, split in human36m.SUBJECTS.items():
        length = H36M_LENGTH[split]
        folder = root / subject
        if length not in made:
            write_video(root / "video.mp4", length)
            made[length] = (root / "video.mp4").read_bytes()
            (root / "video.mp4").unlink()
            write_masks(root / "masks.mat", [mask_of(box_in(n)) for n in range(length)])
            made[-length] = (root / "masks.mat").read_bytes()
            (root / "masks.mat").unlink()
        for action in human36m.ACTIONS:
            stem = stem_of(subject, action)
            write(folder / "Videos" / f"{stem}.mp4", made[length])
            write(folder / "MySegmentsMat" / "ground_truth_bb" / f"{stem}.mat", made[-length])
            pose = np.stack([joints_of(subject, action, n).ravel() for n in range(length)])[None]
            write_pose(folder / "MyPoseFeatures" / "D2_Positions" / f"{stem}.cdf", pose)
        for other in ("WalkingDog", "WalkTogether", "_ALL 1", "Eating"):
            write(folder / "Videos" / f"{other}.{CAMERA}.mp4", made[length])
    return root


@pytest.fixture(scope="module")
def human_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return human_tree(tmp_path_factory.mktemp("h36m") / "training" / "subjects").parents[1]


HUMAN_NAMES = {
    0: "hip", 1: "right hip", 2: "right knee", 3: "right ankle", 4: "right foot", 5: "right toe",
    6: "left hip", 7: "left knee", 8: "left ankle", 9: "left foot", 10: "left toe",
    17: "left shoulder", 18: "left elbow", 19: "left wrist", 20: "left thumb", 21: "left a", 22: "left b", 23: "left c",
    25: "right shoulder", 26: "right elbow", 27: "right wrist", 28: "right thumb", 29: "right a", 30: "right b",
    31: "right c",
}  # fmt: skip


def consistent_oracle(points: np.ndarray) -> np.ndarray:
    """Renames one joint after the other, by its name."""
    by_name = {HUMAN_NAMES.get(n, f"joint {n}"): tuple(p) for n, p in enumerate(points.tolist())}
    legs = {"knee", "ankle", "foot", "toe"}
    found = []
    for number in range(32):
        name = HUMAN_NAMES.get(number, f"joint {number}")
        side, _, part = name.partition(" ")
        if side in ("left", "right"):
            judge = "knee" if part in legs else "hip"
            if by_name[f"right {judge}"][0] > by_name[f"left {judge}"][0]:
                name = f"{'left' if side == 'right' else 'right'} {part}"
        found.append(by_name[name])
    return np.array(found)


@given(st.integers(0, 10_000))
def test_joints_are_named_as_if_everyone_faced_the_camera(seed: int) -> None:
    points = np.random.default_rng(seed).uniform(0, 450, (32, 2))
    before = points.copy()
    named = human36m.view_consistent(points)
    assert named.tolist() == consistent_oracle(points).tolist()
    assert (points == before).all()
    assert human36m.view_consistent(named).tolist() == named.tolist()  # nothing is left to rename
    assert named[1, 0] <= named[6, 0] and named[2, 0] <= named[7, 0]


def test_the_normalising_joints_are_the_shoulders() -> None:
    assert (HUMAN_NAMES[25], HUMAN_NAMES[17]) == ("right shoulder", "left shoulder")
    points = np.zeros((1, 32, 2))
    points[0, 25] = (3, 4)
    assert PROTOCOLS["human36m"].normaliser(points).tolist() == [5]


def view_oracle(points: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """Published steps: a 450 px crop of 1.5 box heights, magnified 1.4 times about its middle, resized to 256."""
    x0, y0, x1, y1 = box
    found = []
    for x, y in points.astype(float).tolist():
        crop_x = (x - (x0 + x1) / 2) / (1.5 * (y1 - y0)) * 450 + 225
        crop_y = (y - (y0 + y1) / 2) / (1.5 * (y1 - y0)) * 450 + 225
        found.append((((crop_x - 225) * 1.4 + 225) / 450 * 256, ((crop_y - 225) * 1.4 + 225) / 450 * 256))
    return np.array(found)


def test_human36m_frames_points_and_boxes(human_archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(["human36m", "--root", str(human_archive), "--out", str(out), "--shard-samples", "50"])
    stored = {s.meta.source: s for s in samples(out)}
    expected = {
        f"{subject}/{stem_of(subject, action)}/{frame:06d}": (subject, split, action, frame)
        for subject, split in human36m.SUBJECTS.items()
        for action in human36m.ACTIONS
        for frame in TAKEN[split]
    }
    assert set(stored) == set(expected)
    manifest = Manifest.load(str(out))
    assert (manifest.corpus, manifest.protocol, manifest.landmarks) == ("human36m", "human36m", 32)
    assert {s for s, split in human36m.SUBJECTS.items() if split == "train"} == {"S1", "S5", "S6", "S7", "S8", "S9"}
    for source, (subject, split, action, frame) in expected.items():
        meta = stored[source].meta
        assert (meta.split, meta.subject) == (split, subject)
        joints = consistent_oracle(joints_of(subject, action, frame))
        assert in_view(meta) == pytest.approx(view_oracle(joints, box_in(frame)), abs=2e-3)
        x0, y0, x1, y1 = meta.box
        image = decode_jpeg(stored[source].jpeg)
        assert image.shape == (450, 450, 3)  # the scale at which first keypoints are sought
        assert (x1 - x0, y1 - y0) == pytest.approx((450 / 1.4, 450 / 1.4), abs=0.3)
        assert (x0 + x1) / 2 == pytest.approx(225, abs=0.6)
        # The middle of the picture is the middle of the box, in the frame that was asked for.
        bx0, _, bx1, _ = box_in(frame)
        assert (bx0 + bx1) / 2 < BLUE_FROM - 8
        assert image[221:229, 221:229, 0].mean() == pytest.approx(grey_of(frame), abs=3)
        assert image[225, 421, 2] > 200 and image[225, 421, 0] < 190  # the right is blue
    # A shard is not a row of neighbours.
    for shard in manifest.shards_of("train")[:2]:
        assert len({s.meta.subject for s in packing_read(out / shard.file)}) >= 5


def test_a_person_crop_is_black_outside_of_the_frame() -> None:
    ramp = np.repeat(np.tile(np.arange(20, 20 + 2 * WIDTH, 2, dtype=np.uint8), (HEIGHT, 1))[:, :, None], 3, axis=2)
    box = (2, 20, 30, 50)  # shows 45 rows and columns about (16, 35), of which x < 0 is outside
    found = human36m.person(ramp, box, np.zeros((32, 2), np.float32)).image
    assert found.shape == (450, 450, 3)
    for row, column in [(225, 225), (225, 100), (40, 300), (440, 440), (225, 40), (225, 10), (10, 440)]:
        x = (column - 225) * 45 / 450 + 16
        y = (row - 225) * 45 / 450 + 35
        inside = 0 <= x <= WIDTH - 1 and 0 <= y <= HEIGHT - 1
        value = 20 + 2 * x if inside else 0
        assert found[row, column, 0] == pytest.approx(value, abs=1.1), (row, column)


BB, D2 = "MySegmentsMat/ground_truth_bb", "MyPoseFeatures/D2_Positions"
S5 = f"Waiting 1.{CAMERA}"


def masks(*sizes: int) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        with h5py.File(root / "S5" / BB / f"{S5}.mat", "w") as file:
            file.create_dataset("Masks", data=np.zeros(sizes))

    return change


HUMAN_BREAKS: dict[str, Break] = {
    "a subject": (gone("S7"), ("S7/Videos", "no such folder")),
    "first subject": (gone("S1"), ("subject S1", "training/subjects/S1")),
    "boxes": (gone(f"S8/{BB}"), (f"S8/{BB}: no such folder", ".mat of S8")),
    "one box file": (gone(f"S5/{BB}/{S5}.mat"), ("S5: 1 file is missing", f"{BB}/{S5}.mat")),
    "one joint file": (gone(f"S11/{D2}/{S5}.cdf"), ("S11: 1 file is missing", f"{D2}/{S5}.cdf")),
    "one video": (gone(f"S6/Videos/{S5}.mp4"), ("S6: 1 file is missing", f"Videos/{S5}.mp4")),
    "boxes of another format": (
        lambda root: write(root / "S5" / BB / f"{S5}.mat", "hello"),
        (f"{S5}.mat", "MATLAB 7.3"),
    ),
    "boxes of another name": (
        lambda root: h5py.File(root / "S5" / BB / f"{S5}.mat", "w").close(),
        (f"{S5}.mat", "Masks"),
    ),
    "boxes not in cells": (masks(21, 1), (f"{S5}.mat", "cell array Masks")),
    "joints of another format": (
        lambda root: write(root / "S5" / D2 / f"{S5}.cdf", "hello"),
        (f"{S5}.cdf", "CDF file"),
    ),
    "joints of another name": (
        lambda root: write_pose(root / "S5" / D2 / f"{S5}.cdf", np.zeros((1, 21, 64), np.float32), "Bones"),
        (f"{S5}.cdf", "Pose"),
    ),
    "joints of another shape": (
        lambda root: write_pose(root / "S5" / D2 / f"{S5}.cdf", np.zeros((1, 21, 96), np.float32)),
        (f"{S5}.cdf", "(1, 21, 96)", "64"),
    ),
    "too few joints": (
        lambda root: write_pose(root / "S5" / D2 / f"{S5}.cdf", np.zeros((1, 20, 64), np.float32)),
        (f"{S5}.cdf", "20 frames", "frame 20"),
    ),
}


@pytest.fixture
def human_copy(human_archive: Path, tmp_path: Path) -> Path:
    """The archive's files as links, so that each can be replaced."""
    root = tmp_path / "h36m"
    for path in human_archive.rglob("*.*"):
        copy = root / path.relative_to(human_archive / "training" / "subjects")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return root


@pytest.mark.parametrize("case", HUMAN_BREAKS)
def test_human36m_mistakes(human_copy: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    change, words = HUMAN_BREAKS[case]
    change(human_copy)
    refused(capsys, "human36m", human_copy, words)


def test_a_missing_action_is_named(human_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in human_copy.glob(f"S9/**/Posing.{CAMERA}.*"):
        path.unlink()
    refused(capsys, "human36m", human_copy, ("S9/Videos: no video of Posing", "Posing.CAMERA.mp4"))


def test_frames_that_can_not_be_used_are_listed(human_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(human_copy / "S5" / "Videos" / f"{S5}.mp4", 15)  # frame 20 is missing
    write(human_copy / "S6" / "Videos" / f"{S5}.mp4", "damaged")
    boxes = [mask_of(box_in(n)) for n in range(21)]
    boxes[10] = np.zeros((HEIGHT, WIDTH), np.uint8)
    write_masks(human_copy / "S7" / BB / f"{S5}.mat", boxes)
    out = human_copy.parent / "out"
    message = fails(capsys, "human36m", "--root", str(human_copy), "--out", str(out))
    assert f"5 of {6 * 6 * 3 + 6 * 2} images" in message and f"S5/{S5}/000020: the video can't be decoded" in message
    assert not out.exists()
    main(["human36m", "--root", str(human_copy), "--out", str(out), "--max-skipped", "0.1"])
    reasons = {s.source: s.reason for s in Manifest.load(str(out)).skipped}
    assert set(reasons) == {f"S5/{S5}/000020", f"S7/{S5}/000010", *(f"S6/{S5}/{n:06d}" for n in (0, 10, 20))}
    assert reasons[f"S7/{S5}/000010"] == "box of frame 10 is empty"
    assert not {s.meta.source for s in samples(out)} & set(reasons)


def test_missing_libraries_are_named(human_archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"needs h5py.*\[corpora\]"):
        human36m.clips(str(human_archive))


# Mixing what comes in an order of its own


def drawn_items(count: int) -> list[Item]:
    def load(number: int) -> SourceImage:
        if number % 10 == 3:
            raise UnusableImage("three")
        return SourceImage(noise(number, 24, 32), None, np.array([[number, 1.0]]))

    return [
        Item(f"{n}", "test" if n % 4 == 0 else "train", None, lambda n=n: load(n))
        for n in range(count)  # type: ignore[misc]
    ]


def test_mixing_gives_the_order_of_shuffling() -> None:
    items = drawn_items(50)
    usable = [item for item in items if int(item.source) % 10 != 3]
    results = list(mixed(((item.source, pack_item(item)) for item in items), seed=5))
    refusals = [result for result in results if result[1].meta is None]
    assert refusals == results[:5] and {source for source, _ in refusals} == {"3", "13", "23", "33", "43"}
    assert results[5:] == [(item.source, pack_item(item)) for item in shuffled(usable, seed=5)]


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing.tempfile, "TemporaryFile", lambda buffering: open("/dev/full", "r+b", buffering))
    results: list[tuple[str, Packed]] = [(item.source, pack_item(item)) for item in drawn_items(3)]
    with pytest.raises(UserError, match="TMPDIR"):
        list(mixed(results, seed=0))


# BBC Pose

FRAMES = {"train": np.arange(5, 29, 2), "test": np.array([3, 40, 41])}


def kind_of(video: int) -> str:
    return "train" if video <= 10 else "val" if video <= 15 else "test"


def signer(video: int, frame: int) -> np.ndarray:
    """Seven joints as MATLAB has them, counted from 1."""
    return np.random.default_rng([video, frame]).integers([150, 60], [320, 250], (7, 2)).astype(float)


def bbc_struct(count: int = 22) -> np.ndarray:
    fields = ("videoName", "type", "source", "train_frames", "train_joints", "test_frames", "test_joints")
    array = np.zeros((1, count), [(name, object) for name in fields])
    for video in range(1, count + 1):
        entry: dict[str, Any] = {"videoName": f"v{video}", "source": "buehler11" if video <= 20 else "charles13"}
        entry["type"] = kind_of(video) if video <= 20 else "train"
        for part, frames in FRAMES.items():
            used = frames if part == "train" or kind_of(video) != "train" else frames[:0]
            joints = [signer(video, int(n)).T for n in used]
            entry[f"{part}_frames"] = used[None].astype(float)
            entry[f"{part}_joints"] = np.stack(joints, axis=2) if joints else np.zeros((0, 0))
        array[0, video - 1] = tuple(entry[name] for name in fields)
    return array


def bbc_tree(root: Path) -> Path:
    save(root / "frame.jpg", noise(0, 404, 720))
    frame = (root / "frame.jpg").read_bytes()
    for video in range(1, 21):
        for number in range(1, 45):
            write(root / str(video) / f"{number}.jpg", frame)
    (root / "code").mkdir()
    savemat(root / "code" / "bbcpose.mat", {"bbcpose": bbc_struct()})
    return root


@pytest.fixture(scope="module")
def bbc_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bbc_tree(tmp_path_factory.mktemp("bbc") / "bbc")


@pytest.mark.parametrize("every", [1, 5])
def test_bbcpose_frames_points_and_boxes(bbc_archive: Path, tmp_path: Path, every: int) -> None:
    out = tmp_path / "out"
    main(["bbcpose", "--root", str(bbc_archive), "--out", str(out), "--every", str(every)])
    stored = {s.meta.source: s.meta for s in samples(out)}
    train = {f"{v}/{n}.jpg" for v in range(1, 11) for n in FRAMES["train"].tolist()[::every]}
    test = {f"{v}/{n}.jpg" for v in range(16, 21) for n in FRAMES["test"].tolist()}
    assert {n for n, meta in stored.items() if meta.split == "train"} == train
    assert {n for n, meta in stored.items() if meta.split == "test"} == test
    manifest = Manifest.load(str(out))
    assert (manifest.corpus, manifest.protocol, manifest.landmarks) == ("bbcpose", None, 7)
    for source, meta in stored.items():
        video, frame = (int(part) for part in source.removesuffix(".jpg").split("/"))
        joints = signer(video, frame) - 1
        centre = (joints.min(axis=0) + joints.max(axis=0)) / 2
        low, high = np.maximum(centre - 150, 0), np.minimum(centre + 150, [720, 404])
        assert in_view(meta) == pytest.approx((joints - low) * 256 / (high - low), abs=2e-2)


def struct_without(field: str) -> np.ndarray:
    array = bbc_struct()
    return array[[name for name in array.dtype.names or () if name != field]].astype(
        [(name, object) for name in array.dtype.names or () if name != field]
    )


def struct_with(video: int, field: str, value: object) -> np.ndarray:
    array = bbc_struct()
    array[0, video - 1][field] = value
    return array


BBC_STRUCTS: dict[str, tuple[Callable[[], dict[str, Any]], tuple[str, ...]]] = {
    "another variable": (lambda: {"other": np.zeros(3)}, ("bbcpose.mat: no such variable", "variable bbcpose")),
    "not a struct": (lambda: {"bbcpose": np.zeros(3)}, ("bbcpose.mat", "no field test_frames")),
    "no joints": (lambda: {"bbcpose": struct_without("train_joints")}, ("bbcpose.mat", "no field train_joints")),
    "too few videos": (lambda: {"bbcpose": bbc_struct(19)}, ("bbcpose.mat", "19 elements", "at least 20")),
    "odd type": (lambda: {"bbcpose": struct_with(3, "type", "rest")}, ("type of video 3", "'rest'")),
    "odd joints": (
        lambda: {"bbcpose": struct_with(2, "train_joints", np.zeros((2, 6, 12)))},
        ("bbcpose.mat: video 2", "(2, 6, 12)", "2 x 7 x N"),
    ),
    "no frames": (lambda: {"bbcpose": struct_with(17, "test_frames", np.zeros((0, 0)))}, ("video 17 has test_frames",)),
    "frames that are not there": (
        lambda: {"bbcpose": struct_with(18, "test_frames", np.array([[3.0, 40.0, 999.0]]))},
        ("18: 1 file is missing: 999.jpg", "bbcpose.mat"),
    ),
}


@pytest.mark.parametrize("case", BBC_STRUCTS)
def test_bbcpose_mistakes(bbc_archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    root = tmp_path / "bbc"
    root.mkdir()
    for video in range(1, 21):
        (root / str(video)).symlink_to(bbc_archive / str(video))
    content, words = BBC_STRUCTS[case]
    savemat(root / "bbcpose.mat", content())
    refused(capsys, "bbcpose", root, words)
    write(root / "bbcpose.mat", "hello")
    refused(capsys, "bbcpose", root, ("bbcpose.mat: can't be read",))
    (root / "bbcpose.mat").unlink()
    refused(capsys, "bbcpose", root, ("the file of annotations", "bbcpose.mat or code/bbcpose.mat"))
    savemat(root / "bbcpose.mat", {"bbcpose": bbc_struct()})
    (root / "4").unlink()
    refused(capsys, "bbcpose", root, ("4: no such folder", "the frames of video 4"))


# The job


@pytest.mark.parametrize("source", ["folder", "toy", "celeba", "ls3d", "human36m", "bbcpose"])
def test_every_source_has_help(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([source, "--help"])
    assert caught.value.code == 0 and "--out" in capsys.readouterr().out
