"""Which files of a folder are its pictures: the same for packing, predicting and training on one's own."""

import io
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import pack, predict
from sst.config import NetworkSettings
from sst.corpora.annotations import match_names
from sst.corpora.listing import is_video, pictures_in
from sst.data.shards import Manifest, read_shard
from sst.nn.network import LandmarkDetector
from sst.predict.sources import find_sources
from sst.train.model import save_model

NETWORK = NetworkSettings(input_size=64, width=16, depth=2, groups=2, descriptor_size=16)


def data(level: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((24, 32, 3), level, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def packed(images: Path, out: Path, *more: object) -> dict[str, str]:
    """Source to split."""
    pack.main(["folder", "--images", str(images), "--out", str(out), *map(str, more)])
    shards = Manifest.load(str(out)).shards
    return {s.meta.source: s.meta.split for shard in shards for s in read_shard(f"{out}/{shard.file}")}


@pytest.fixture
def messy(tmp_path):
    """A folder as people have it, and the pictures in it."""
    root = tmp_path / "mine"
    own = ["a.jpg", "sub/b.PNG", "scan", "old.jfif", "grey.pgm"]
    write(root, {name: data(10 * n, kind) for n, (name, kind) in
                 enumerate(zip(own, ["JPEG", "PNG", "PNG", "JPEG", "PPM"], strict=True))})  # fmt: skip
    junk = ["._a.jpg", ".DS_Store", "Thumbs.db", "__MACOSX/sub/._b.PNG", "@eaDir/a.jpg/SYNO.jpg", ".cache/a.jpg"]
    ours = ["pred/pictures/00000_a.jpg", "pred/named_pictures/00000_a.jpg", "runs/x/figures/a.png", "mlruns/1/a.png"]
    write(root, {name: data(1) for name in junk + ours})
    write(root, {"pred/predictions.json": b"{}", "pred/predictions.csv": b"file"})
    write(root, {"runs/x/settings.json": b'{"settings": {}, "manifest": "", "shards": ""}'})
    write(root, {"notes.txt": b"hello", "IMG_1.NEF": b"II*\0", "short": b""})
    os.mkfifo(root / "pipe.jpg")
    (root / "sub" / "back").symlink_to("..")
    (root / "again").symlink_to("sub")
    (root / "outside").symlink_to(tmp_path)
    return root, own


def test_a_folder_is_what_its_owner_means(messy, tmp_path, capsys):
    root, own = messy
    assert packed(root, tmp_path / "out").keys() == set(own)
    said = capsys.readouterr().err
    assert "note: left out: " in said
    for part in ("6 system or hidden (", "3 links", "again/", "outside/", "sub/back/", "4 made by landmarks or MLflow",
                 "1 no regular files (pipe.jpg)", "1 raw files", "4 no pictures"):  # fmt: skip
        assert part in said, said
    assert {target.file for target in find_sources([str(root)]).targets} == set(own)
    assert capsys.readouterr().err == said


def test_a_link_to_a_store_of_pictures_is_followed(tmp_path):
    write(tmp_path / "store", {"a.png": data(1), "b.png": data(2)})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "all").symlink_to("../store")
    (tmp_path / "mine" / "one.png").symlink_to("../store/a.png")
    assert pictures_in(str(tmp_path / "mine")).names == ["all/a.png", "all/b.png", "one.png"]


@pytest.mark.parametrize("name", ["a.mp4", "D:\\\\films\\\\a.WMV", "b/c.mpg", "c.mj2", "d.mts"])
def test_videos_are_known_by_their_endings(name):
    assert is_video(name) and not is_video(f"{name}.png")


def test_equal_pictures_are_all_for_training_or_all_test_pictures(tmp_path, capsys):
    write(tmp_path / "mine", {f"{n:03d}.png": data(n) for n in range(60)})
    write(tmp_path / "mine" / "copies", {f"{n:03d}.png": data(n) for n in range(30)})
    for n in range(30, 60):
        (tmp_path / "mine" / f"link_{n:03d}.png").symlink_to(f"{n:03d}.png")
    splits = packed(tmp_path / "mine", tmp_path / "out", "--test-share", "0.3")
    tests = {name[-7:] for name, split in splits.items() if split == "test"}
    assert 10 < len(tests) < 50 and not tests & {name[-7:] for name, split in splits.items() if split == "train"}
    said = capsys.readouterr().out
    assert "equal to test pictures" in said
    assert "60 pictures are links to others or copies of them, and are used too: copies/000.png, copies/001.png" in said
    (tmp_path / "a.csv").write_text("file,split\n000.png,test\ncopies/000.png,train\n")
    splits = packed(tmp_path / "mine", tmp_path / "2", "--test-share", 0, "--annotations", tmp_path / "a.csv")
    assert {name for name, split in splits.items() if split == "test"} == {"000.png", "copies/000.png"}


NFC, NFD = (unicodedata.normalize(form, "Käse é.png") for form in ("NFC", "NFD"))
LONG = "ü" * 125 + ".png"  # 254 bytes
BYTES = os.fsdecode(b"caf\xe9.png")


def test_files_of_any_name_are_packed_and_predicted(tmp_path, capsys):
    names = [NFD, LONG, BYTES, "a%20b.png", "c#d?.png", "e::f.png", "-g.png", "two\nlines.png", "file:h.png"]
    write(tmp_path / "mine", {name: data(20 * n) for n, name in enumerate(names)})
    write(tmp_path / "mine", {os.fsdecode(b"bad\xff.png"): b"no picture"})
    (tmp_path / "boxes.csv").write_text(f"file,box_x0,box_y0,box_x1,box_y1\n{NFC},4,4,20,20\n")
    expected = {name if name != BYTES else "caf\\xe9.png" for name in names}
    splits = packed(tmp_path / "mine", tmp_path / "out", "--annotations", tmp_path / "boxes.csv", "--max-skipped", 0.2)
    assert splits.keys() == expected
    assert Manifest.load(str(tmp_path / "out")).skipped[0].source == "bad\\xff.png"
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
    model = str(tmp_path / "model")
    save_model(model, LandmarkDetector(NETWORK.shape, 3), network=NETWORK, clusters=[0, 1, 2], visible=0.0)
    boxes = ["--boxes", str(tmp_path / "boxes.csv")]
    predict.main([model, str(tmp_path / "mine"), "--out", str(tmp_path / "found"), *boxes])
    drawn = {path.name[6:-4] for path in (tmp_path / "found" / "pictures").iterdir()}
    called = expected - {NFD} | {NFC}  # as the file of boxes calls it
    assert drawn == {name[:-4] if name != LONG else "ü" * 100 for name in called}
    table = (tmp_path / "found" / "predictions.csv").read_text()
    assert NFC in table and "caf\\xe9.png" in table
    capsys.readouterr()


def test_an_exact_name_goes_before_one_of_the_same_text():
    assert NFC != NFD
    assert match_names([NFC, NFD], [NFD, NFC]) == {NFC: NFC, NFD: NFD}
    assert match_names([NFC, "x"], [NFD]) == {NFC: NFD}
    assert match_names(["images/caf\\xe9.png", "\ud800.png"], [BYTES]) == {"images/caf\\xe9.png": BYTES}
