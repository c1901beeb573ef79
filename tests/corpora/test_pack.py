"""Packing: which images are taken, what is stored of them, and how mistakes end."""

import hashlib
import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jobs.pack import main
from sst.corpora import packing
from sst.corpora.packing import Item, SourceImage, UnusableImage, pack_item, read_image, split_of
from sst.corpora.pictures import white_level
from sst.data.jpeg import decode_jpeg
from sst.data.shards import Manifest, RawSample, read_shard
from sst.predict.sources import find_sources

FACES = Path("../shared/data/faces")


def save(path: Path, image: np.ndarray | Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if image is None:  # one for each name: equal ones would belong to one split
        image = np.full((40, 60, 3), np.frombuffer(hashlib.sha256(str(path).encode()).digest()[:3], np.uint8))
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def samples(url: Path) -> list[RawSample]:
    manifest = Manifest.load(str(url))
    manifest.check(str(url))
    return [x for shard in manifest.shards for x in read_shard(f"{url}/{shard.file}", shard.sha256)]


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs the job; it must exit with code 2 and one message, which is returned."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    message = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("packing ")]
    assert len(message) == 1 and message[0].startswith("error: ")
    return message[0]


# Reading images


def test_kinds_of_pixels_become_rgb(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 60000, 1000, dtype=np.uint16), (40, 1))
    half_clear = np.full((40, 60, 4), (200, 0, 0, 255), np.uint8)
    half_clear[:, 30:, 3] = 0
    flat = Image.fromarray(np.full((40, 60, 3), (200, 40, 0), np.uint8))
    kinds = {
        "grey.png": (Image.new("L", (60, 40), 77), (0, 0), (77, 77, 77)),
        "bits.png": (Image.new("1", (60, 40), 1), (0, 0), (255, 255, 255)),
        "deep.png": (Image.fromarray(ramp), (0, 30), (117, 117, 117)),  # 30000 / 257 = 116.7
        "clear.png": (Image.fromarray(half_clear), (0, 40), (255, 255, 255)),
        "solid.png": (Image.fromarray(half_clear), (0, 10), (200, 0, 0)),
        "cmyk.jpg": (flat.convert("CMYK"), (9, 9), (200, 40, 0)),
        "palette.png": (flat.convert("P", palette=Image.Palette.ADAPTIVE), (0, 0), (200, 40, 0)),
        "web.webp": (flat, (9, 9), (200, 40, 0)),
        "bmp.bmp": (flat, (9, 9), (200, 40, 0)),
        "tif.TIF": (flat, (9, 9), (200, 40, 0)),
    }
    for name, (image, place, expected) in kinds.items():
        read = read_image(save(tmp_path / name, image))
        assert read.shape == (40, 60, 3) and read.dtype == np.uint8, name
        assert np.abs(read[place].astype(int) - expected).max() <= 4, name


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[:8, :8] = 255  # top left of what is stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: top left comes to the top right
    read = read_image(save(tmp_path / "a.png", image, exif=exif))
    assert read.shape == (60, 40, 3)
    assert read[2, 37].min() == 255 and read[2, 2].max() == 0


def test_refused_images_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    cut = save(tmp_path / "cut.jpg", rng.integers(0, 255, (90, 90, 3), np.uint8))
    cut.write_bytes(cut.read_bytes()[:-1500])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    save(tmp_path / "one.png", np.zeros((1, 1, 3), np.uint8))
    save(tmp_path / "float.tif", Image.new("F", (60, 40)))
    save(tmp_path / "huge.png", np.zeros((200, 200, 3), np.uint8))
    monkeypatch.setattr(packing, "MAX_PIXELS", 39_999)
    words = {
        "cut.jpg": "truncated",
        "text.jpg": "cannot identify",
        "empty.jpg": "cannot identify",
        "gone.jpg": "unread",
    }
    words |= {"one.png": "1 x 1", "float.tif": "floating", "huge.png": "200 x 200 pixels; at most 39999"}
    for name, word in words.items():
        with pytest.raises(UnusableImage, match=word) as caught:
            read_image(tmp_path / name)
        assert str(tmp_path) not in str(caught.value)


def deep(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), values[..., ::-1] if values.ndim == 3 else values)
    return path


def test_pictures_of_12_bits_in_16_are_stretched_alike_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bright = np.full((40, 60), 3000, np.uint16)
    deep(tmp_path / "in" / "bright.png", bright)
    deep(tmp_path / "in" / "dark.tif", bright // 4)
    deep(tmp_path / "in" / "colour.png", np.dstack([bright, bright // 2, bright // 3]))
    save(tmp_path / "in" / "plain.png", np.full((40, 60, 3), 90, np.uint8))
    main(["folder", "--images", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--test-share", "0"])
    assert "16-bit pictures use values up to 4095 only" in capsys.readouterr().out
    assert Manifest.load(str(tmp_path / "out")).white == 4095
    stored = {s.meta.source: decode_jpeg(s.jpeg)[20, 30].tolist() for s in samples(tmp_path / "out")}
    wanted = {"bright.png": [187] * 3, "dark.tif": [47] * 3, "colour.png": [187, 93, 62], "plain.png": [90] * 3}
    for name, colour in wanted.items():
        np.testing.assert_allclose(stored[name], colour, atol=2)


def test_of_a_file_with_several_pictures_the_first_is_used_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *rest = (Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue"))
    (tmp_path / "in").mkdir()
    for name in ("a.gif", "b.tif", "c.png", "d.webp"):
        first.save(tmp_path / "in" / name, save_all=True, append_images=rest)
    first.save(tmp_path / "in" / "e.gif")
    first.save(tmp_path / "in" / "camera.jpg", "MPO", save_all=True, append_images=rest)  # the rest are its previews
    said = "only the first of several pictures in a file (animations, pages) is used: 4 (a.gif, b.tif, c.png, ...)"
    main(["folder", "--images", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--test-share", "0"])
    assert capsys.readouterr().out.count(f"note: {said}") == 1
    for sample in samples(tmp_path / "out"):
        np.testing.assert_allclose(decode_jpeg(sample.jpeg)[10, 10], (255, 0, 0), atol=4)
    assert find_sources([str(tmp_path / "in")]).notes == [said]
    assert find_sources([str(tmp_path / "in" / "e.gif")]).notes == []


@pytest.mark.parametrize(("most", "white"), [(200, 255), (1000, 1023), (4095, 4095), (4096, 8191), (40_000, None)])
def test_the_bits_that_are_used_set_what_is_white(tmp_path: Path, most: int, white: int | None) -> None:
    deep(tmp_path / "a.png", np.full((40, 60), most, np.uint16))
    deep(tmp_path / "b.png", np.full((40, 60, 3), most // 2, np.uint16))
    deep(tmp_path / "d.jp2", np.full((40, 60, 3), most // 2, np.uint16))
    save(tmp_path / "c.png")
    assert white_level([tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"]) == white
    assert white_level([tmp_path / "d.jp2"]) == white_level([tmp_path / "b.png"])
    assert white_level([tmp_path / "c.png"]) is None


# One item


def item(image: np.ndarray, box: object = None, points: object = None, visible: object = None) -> Item:
    array = None if points is None else np.array(points, np.float64)
    return Item("a", "train", None, lambda: SourceImage(image, box, array, visible))  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_points_stay_on_what_they_mark(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(200, 500)), data.draw(st.integers(200, 500))
    x0, y0 = data.draw(st.floats(0, width - 150)), data.draw(st.floats(0, height - 150))
    x1, y1 = data.draw(st.floats(x0 + 100, width)), data.draw(st.floats(y0 + 100, height))
    x, y = data.draw(st.floats(x0 + 30, x1 - 30)), data.draw(st.floats(y0 + 30, y1 - 30))
    size = data.draw(st.integers(60, 300))
    grid_y, grid_x = np.mgrid[:height, :width]
    spot = 250 * np.exp(-((grid_x - x) ** 2 + (grid_y - y) ** 2) / (2 * 6.0**2))
    image = np.repeat(spot[:, :, None], 3, 2).astype(np.uint8)

    packed = pack_item(item(image, (x0, y0, x1, y1), [(x, y)]), context=2.0, size=size)

    assert packed.meta is not None and packed.meta.points is not None and packed.meta.visible == (True,)
    stored = decode_jpeg(packed.jpeg)[:, :, 0].astype(float)
    weight = np.clip(stored - 20, 0, None)
    rows, columns = np.mgrid[: stored.shape[0], : stored.shape[1]]
    found = ((columns * weight).sum() / weight.sum(), (rows * weight).sum() / weight.sum())
    assert packed.meta.points[0] == pytest.approx(found, abs=0.1)
    # The point divides the box as before, to rounding: the two were moved alike.
    bx0, by0, bx1, by1 = packed.meta.box
    px, py = packed.meta.points[0]
    assert (px - bx0) / (bx1 - bx0) == pytest.approx((x - x0) / (x1 - x0), abs=1e-5)
    assert (py - by0) / (by1 - by0) == pytest.approx((y - y0) / (y1 - y0), abs=1e-5)
    # The box is as large as asked for (to the whole pixels of the image), and never magnified.
    assert max(bx1 - bx0, by1 - by0) == pytest.approx(min(size, max(x1 - x0, y1 - y0)), rel=0.01)


def test_crop_has_the_stated_context() -> None:
    image = np.zeros((300, 400, 3), np.uint8)
    packed = pack_item(item(image, (150, 100, 250, 160)), context=2.0, size=256)
    assert packed.meta is not None
    assert decode_jpeg(packed.jpeg).shape == (120, 200, 3)
    assert packed.meta.box == (50, 30, 150, 90)
    clipped = pack_item(item(image, (0, 0, 100, 60)), context=2.0, size=256)
    assert clipped.meta is not None and clipped.meta.box == (0, 0, 100, 60)
    assert decode_jpeg(clipped.jpeg).shape == (90, 150, 3)


@pytest.mark.parametrize(
    "box", [None, (5, 5, 5, 30), (5, 5, 6, 30), (30, 30, 5, 5), (500, 0, 600, 9), (math.nan, 0, 9, 9)]
)
def test_a_box_without_area_gives_the_whole_image(box: object) -> None:
    packed = pack_item(item(np.zeros((40, 60, 3), np.uint8), box), size=30)
    assert packed.meta is not None and packed.meta.box == (0, 0, 30, 20)
    assert packed.notes == (() if box is None else ("box unusable, whole image taken",))


def test_bad_points_are_kept_as_not_visible() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    points = [(10, 10), (math.nan, 3), (61, 5), (59.4, 39.4), (20, 20), (math.inf, 0)]
    visible = np.array([True, True, True, True, False, True])
    packed = pack_item(item(image, None, points, visible))
    assert packed.meta is not None and packed.meta.points is not None
    assert packed.meta.visible == (True, False, False, True, False, False)
    assert packed.meta.points[1] == packed.meta.points[5] == (30, 20)
    assert packed.meta.points[2] == (61, 5)
    assert sorted(packed.notes) == ["point outside"] + ["point unknown"] * 2


@given(st.text(min_size=1, max_size=20))
def test_split_depends_on_the_share_alone(name: str) -> None:
    assert split_of(name, 0) == "train"
    shares = [split_of(name, share) for share in (0.1, 0.3, 0.9, 1.0)]
    assert shares == sorted(shares, reverse=True) and shares[-1] == "test"  # once a test image, always one


def test_split_keeps_its_share() -> None:
    assert sum(split_of(f"img{n}", 0.1) == "test" for n in range(5000)) / 5000 == pytest.approx(0.1, abs=0.015)


# The job


def test_folder_without_annotations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["b.JPG", "a.b.c.png", "sub dir/ü ö.jpeg", "sub dir/deep/x.webp", "z.bmp"]
    for name in names:
        save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    out = tmp_path / "out"
    main(["folder", "--images", str(tmp_path / "in"), "--out", str(out), "--test-share", "0.5"])
    stored = samples(out)
    assert sorted(s.meta.source for s in stored) == sorted(names)
    assert {s.meta.source: s.meta.split for s in stored} == {name: split_of(name, 0.5) for name in names}
    manifest = Manifest.load(str(out))
    assert (manifest.protocol, manifest.landmarks, manifest.corpus, manifest.skipped) == (
        None,
        None,
        "in",
        (),
    )
    summary = capsys.readouterr().out.splitlines()[-1]
    assert "0 skipped" in summary and str(out) in summary


def csv_folder(root: Path, landmarks: int, count: int = 6) -> tuple[Path, Path]:
    columns = ["file", "split", "box_x0", "box_y0", "box_x1", "box_y1", "ignored"]
    lines = [",".join(columns + [f"{axis}{n}" for n in range(landmarks) for axis in "xy"])]
    for number in range(count):
        save(root / "images" / f"{number}.png")
        split = "test" if number % 2 else "train"
        places = [f"{n % 50}.5,{n % 30}" for n in range(landmarks)]
        lines.append(",".join([f"{number}.png", split, "10", "5", "40.5", "30", "?", *places]))
    (root / "a.csv").write_text("\n".join(lines))
    return root / "images", root / "a.csv"


@pytest.mark.parametrize(("landmarks", "protocol"), [(68, "faces68"), (5, None)])
def test_csv_annotations(tmp_path: Path, landmarks: int, protocol: str | None) -> None:
    images, table = csv_folder(tmp_path, landmarks)
    main(["folder", "--images", str(images), "--annotations", str(table), "--out", str(tmp_path / "out")])
    manifest = Manifest.load(str(tmp_path / "out"))
    assert (manifest.protocol, manifest.landmarks, manifest.samples_of("test")) == (protocol, landmarks, 3)
    for sample in samples(tmp_path / "out"):
        assert sample.meta.split == ("test" if int(sample.meta.source[0]) % 2 else "train")
        x0, y0, _, _ = sample.meta.box
        assert sample.meta.points is not None
        assert sample.meta.points[3] == pytest.approx((3.5 + x0 - 10, 3 + y0 - 5))


def test_coco_annotations(tmp_path: Path) -> None:
    for name in ("one.png", "two.png", "bare.png"):
        save(tmp_path / "in" / name)
    coco = {
        "images": [{"id": 7, "file_name": "one.png", "split": "test"}, {"id": 8, "file_name": "two.png"}],
        "annotations": [
            {"image_id": 7, "bbox": [10, 5, 20, 30], "keypoints": [12, 8, 2, 20, 9, 1, 0, 0, 0]},
            {"image_id": 8, "bbox": [0, 0, 30, 30], "keypoints": [1, 1, 2, 2, 2, 2, 3, 3, 2]},
            {"image_id": 8, "bbox": [30, 10, 20, 20], "keypoints": [31, 11, 2, 32, 12, 2, 33, 13, 2]},
            {"image_id": 8, "bbox": [0, 0, 60, 40], "iscrowd": 1},
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(coco))
    out = tmp_path / "out"
    main(
        [
            "folder",
            "--images",
            str(tmp_path / "in"),
            "--annotations",
            str(tmp_path / "a.json"),
            "--context",
            "1",
        ]
        + ["--out", str(out), "--test-share", "0"]
    )
    stored = {s.meta.source: s.meta for s in samples(out)}
    assert sorted(stored) == ["bare.png", "one.png", "two.png#0", "two.png#1"]
    one = stored["one.png"]
    assert one.split == "test" and one.box == (0, 0, 20, 30)
    assert one.points == ((2, 3), (10, 4), (10, 15)) and one.visible == (True, False, False)
    assert stored["two.png#1"].points == ((1, 1), (2, 2), (3, 3))
    assert stored["bare.png"].points is None


def test_annotations_without_an_object_are_said_to_be_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "in" / "a.png")
    (tmp_path / "none.json").write_text('{"images": [{"id": 1, "file_name": "a.png"}], "annotations": []}')
    words = ["--images", str(tmp_path / "in"), "--annotations", str(tmp_path / "none.json")]
    main(["folder", *words, "--out", str(tmp_path / "out"), "--test-share", "0"])
    assert "none.json: no object in it, so all images are seen whole" in capsys.readouterr().out


def test_toy_is_repeatable_and_annotated(tmp_path: Path) -> None:
    for name in ("a", "b"):
        main(["toy", "--count", "12", "--seed", "3", "--size", "64", "--out", str(tmp_path / name)])
    first = Manifest.load(str(tmp_path / "a"))
    assert first == Manifest.load(str(tmp_path / "b"))
    assert first.protocol == "toy" and first.landmarks is not None and first.landmarks >= 12
    assert sum(shard.samples for shard in first.shards) == 12
    main(["toy", "--count", "12", "--seed", "4", "--size", "64", "--out", str(tmp_path / "c")])
    assert Manifest.load(str(tmp_path / "c")).shards[0].sha256 != first.shards[0].sha256


def test_shards_are_mixed(tmp_path: Path) -> None:
    for number in range(40):
        save(tmp_path / "in" / f"{number:02d}.png", np.zeros((9, 9, 3), np.uint8))
    url = tmp_path / "out"
    main(
        [
            "folder",
            "--images",
            str(tmp_path / "in"),
            "--out",
            str(url),
            "--test-share",
            "0",
            "--shard-samples",
            "10",
        ]
    )
    order = [int(s.meta.source[:2]) for s in samples(url)]
    assert sorted(order) == list(range(40))
    assert len(Manifest.load(str(url)).shards) == 4
    assert max(order[:10]) - min(order[:10]) > 20  # a shard of neighbours would span 9


def test_unreadable_images_are_listed_or_fatal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(9):
        save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "bad.jpg").write_text("no image")
    arguments = ["folder", "--images", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    message = fails(capsys, *arguments)
    assert "1 of 10 images" in message and "bad.jpg" in message and "--max-skipped" in message
    assert not (tmp_path / "out").exists()
    main([*arguments, "--max-skipped", "0.1"])
    manifest = Manifest.load(str(tmp_path / "out"))
    assert [s.source for s in manifest.skipped] == ["bad.jpg"] and "cannot identify" in manifest.skipped[0].reason
    assert len(samples(tmp_path / "out")) == 9


def test_mistakes_end_with_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    (tmp_path / "empty").mkdir()
    assert "no such folder" in fails(capsys, "folder", "--images", str(tmp_path / "none"), *out)
    assert "no image in it" in fails(capsys, "folder", "--images", str(tmp_path / "empty"), *out)
    images, table = csv_folder(tmp_path, 2, 9)
    for number in range(7):
        (images / f"{number}.png").unlink()
    base = ["folder", "--images", str(images), "--annotations"]
    message = fails(capsys, *base, str(table), *out)
    assert "7 of 9 files" in message and "4.png" in message and "5.png" not in message
    assert "can't read" in fails(capsys, *base, str(tmp_path / "no.csv"), *out)
    for name, text, words in [
        ("a.json", "{}", "not COCO"),
        ("b.csv", "name,x0,y0\n", "no column 'file'"),
        ("c.csv", "file,x0,y0\n8.png,1,left\n", "line 2: y0 is 'left'"),
        ("d.csv", "file,split\n8.png,val\n", "split is 'val'"),
        ("e.csv", "file,split\n8.png,test\n8.png,train\n", "is in the split 'train' and in 'test'"),
    ]:
        (tmp_path / name).write_text(text)
        assert words in fails(capsys, *base, str(tmp_path / name), *out)
    with pytest.raises(SystemExit) as caught:
        main(["toy", "--count", "0", *out])
    assert caught.value.code == 2 and "count" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_corpus_is_kept_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "in" / "a.png")
    arguments = ["folder", "--images", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    main(arguments)
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    save(tmp_path / "in" / "b.png")
    assert "--overwrite" in fails(capsys, *arguments)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    main([*arguments, "--overwrite"])
    assert len(samples(tmp_path / "out")) == 2


def test_unknown_options_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["toy", "--count", "3", "--out", "x", "--colour", "red"])
    assert caught.value.code == 2 and "colour" in capsys.readouterr().err


@pytest.mark.skipif(not FACES.exists(), reason="the faces data are not at hand")
def test_real_faces(tmp_path: Path) -> None:
    names = ["00000.jpg", "02000.jpg", "04226.jpg"]
    lines = (FACES / "annotations.csv").read_text().splitlines()
    (tmp_path / "a.csv").write_text("\n".join([lines[0], *(x for x in lines if x[:9] in names)]))
    (tmp_path / "images").mkdir()
    for name in names:
        (tmp_path / "images" / name).write_bytes((FACES / "images" / name).read_bytes())
    out = tmp_path / "out"
    main(
        [
            "folder",
            "--images",
            str(tmp_path / "images"),
            "--annotations",
            str(tmp_path / "a.csv"),
            "--out",
            str(out),
        ]
    )
    assert Manifest.load(str(out)).protocol == "faces68"
    for sample in samples(out):
        assert sample.meta.points is not None and len(sample.meta.points) == 68
        original = cv2.imread(str(FACES / "images" / sample.meta.source))[:, :, ::-1]
        cells = next(x for x in lines if x.startswith(sample.meta.source)).split(",")
        # None of these boxes is above 256 pixels, so the eye corner's surroundings are those of the original.
        place = np.rint([float(v) for v in cells[7 + 72 : 7 + 74]]).astype(int)
        shift = np.rint(np.array(sample.meta.points[36]) - [float(v) for v in cells[7 + 72 : 7 + 74]]).astype(int)
        x, y = place
        there = original[y - 6 : y + 7, x - 6 : x + 7].astype(int)
        x, y = place + shift
        here = decode_jpeg(sample.jpeg)[y - 6 : y + 7, x - 6 : x + 7].astype(int)
        assert np.abs(there - here).mean() < 4
