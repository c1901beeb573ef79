"""Nobody's files are lost: a verb replaces and removes its own alone, and only when the new ones are complete."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from cluster import storage
from jobs import export, pack, predict
from sst.config import NetworkSettings
from sst.data.shards import Manifest
from sst.errors import UserError
from sst.nn.network import LandmarkDetector
from sst.outputs import Outputs, refuse_overlap
from sst.train.model import save_model
from tests.small import files

NETWORK = NetworkSettings(input_size=64, width=16, depth=2, groups=2, descriptor_size=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    url = str(tmp_path_factory.mktemp("run") / "model")
    save_model(url, LandmarkDetector(NETWORK.shape, 3), network=NETWORK, clusters=[0, 1, 2], visible=0.0)
    return url


def pictures(folder: Path, count: int = 3) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(np.full((24, 32, 3), 40 * number, np.uint8)).save(folder / f"{number}.png")
    return folder


def refused(main, *arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    assert ended.value.code == 2


def test_predicting_into_the_folder_of_the_pictures_leaves_them(model, tmp_path, capsys, monkeypatch):
    """As `predict . --out . --overwrite` in a folder with a folder "pictures"."""
    pictures(tmp_path / "mine" / "pictures")
    writer = cv2.VideoWriter(str(tmp_path / "mine" / "video.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 25, (32, 24))
    writer.write(np.zeros((24, 32, 3), np.uint8))
    writer.release()
    monkeypatch.chdir(tmp_path / "mine")
    before = files(tmp_path)
    for given, how in ((".", "is"), ("pictures", "contains"), ("video.mp4", "contains"), ("pic*/*.png", "contains")):
        refused(predict.main, model, given, "--out", ".", "--overwrite")
        assert f"--out {how} the input {given};" in capsys.readouterr().err
    refused(predict.main, model, "pictures", "--out", "pictures/found")
    assert "--out lies inside the input pictures" in capsys.readouterr().err
    assert files(tmp_path) == before


def test_predictions_replace_only_predictions(model, tmp_path, capsys):
    images, out = pictures(tmp_path / "images"), tmp_path / "out"
    for name in ("pictures/mine.jpg", "named.json"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    refused(predict.main, model, images, "--out", out, "--overwrite")
    assert "not from `landmarks predict`" in capsys.readouterr().err
    (out / "pictures" / "mine.jpg").unlink()
    (out / "pictures").rmdir()
    (out / "named.json").unlink()
    predict.main([model, str(images), "--out", str(out)])
    (out / "pictures" / "mine.jpg").write_text("mine")
    (out / "notes.txt").write_text("mine")
    predict.main([model, str(images / "0.png"), "--out", str(out), "--overwrite"])
    assert sorted(path.name for path in (out / "pictures").iterdir()) == ["00000_0.jpg", "mine.jpg"]
    predict.main([model, str(images / "0.png"), "--out", str(out), "--overwrite", "--pictures", "0"])
    assert {name for name, data in files(out).items() if data == b"mine"} == {"pictures/mine.jpg", "notes.txt"}


def test_predictions_stay_when_new_ones_fail(model, tmp_path, capsys):
    images, out = pictures(tmp_path / "images"), tmp_path / "out"
    predict.main([model, str(images), "--out", str(out)])
    before = files(out)
    (tmp_path / "bad.png").write_text("no image")
    refused(predict.main, model, tmp_path / "bad.png", "--out", out, "--overwrite")
    assert files(out) == before


def test_an_export_replaces_only_an_export(model, tmp_path, capsys):
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "weights").write_text("mine")
    before = files(tmp_path)
    refused(export.main, model, "--out", tmp_path, "--overwrite")
    assert "mlflow is there already, and not from `landmarks export`" in capsys.readouterr().err
    refused(export.main, model, "--out", model)
    assert files(tmp_path) == before


def test_packing_replaces_only_a_corpus(tmp_path, capsys):
    images, out = pictures(tmp_path / "images"), tmp_path / "out"
    out.mkdir()
    (out / "shard-00000.tar").write_text("mine")
    words = ["folder", "--images", images, "--out", out, "--test-share", "0"]
    for more in ([], ["--overwrite"]):
        refused(pack.main, *words, *more)
        assert "shard-00000.tar is there already" in capsys.readouterr().err
        assert files(out) == {"shard-00000.tar": b"mine"}
    (out / "shard-00000.tar").rename(out / "shard-00007.tar")
    refused(pack.main, *words, "--shard-samples", "1")
    (out / "shard-00007.tar").rename(out / "mine.tar")
    (out / "manifest.json").write_text('{"name": "a web page"}')
    refused(pack.main, *words, "--overwrite")
    assert "not a manifest of `landmarks pack`" in capsys.readouterr().err
    assert files(out) == {"mine.tar": b"mine", "manifest.json": b'{"name": "a web page"}'}


def test_a_corpus_stays_when_packing_over_it_fails(tmp_path, capsys):
    images, out = pictures(tmp_path / "images"), tmp_path / "out"
    words = ["folder", "--images", images, "--out", out, "--shard-samples", "1"]
    pack.main(list(map(str, words)))
    before = files(out)
    (images / "bad.png").write_text("no image")
    refused(pack.main, *words, "--overwrite")
    assert files(out) == before
    (images / "bad.png").unlink()
    (images / "2.png").unlink()
    pack.main(list(map(str, [*words, "--overwrite"])))
    assert sorted(files(out)) == ["manifest.json", "shard-00000.tar", "shard-00001.tar"]
    Manifest.load(str(out)).check(str(out))


def test_packing_goes_on_after_a_kill(tmp_path, monkeypatch):
    """What a killed writer left without a manifest is in its record, so it is its own."""
    images, out = pictures(tmp_path / "images"), tmp_path / "out"
    words = ["folder", "--images", str(images), "--out", str(out), "--shard-samples", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("sst.data.shards.ShardWriter._finish", lambda self: 1 / 0)
        patch.setattr("sst.data.shards.ShardWriter._take_back", lambda self: None)
        with pytest.raises(ZeroDivisionError):
            pack.main(words)
    assert (out / "shard-00002.tar").exists() and not (out / "manifest.json").exists()
    pack.main([*words[:-1], "3", "--test-share", "0"])
    assert sorted(files(out)) == ["manifest.json", "shard-00000.tar"]


@pytest.mark.parametrize(
    ("out", "given", "how"),
    [
        ("a", "a", "is"),
        ("a/../a/", "a", "is"),
        ("link", "a", "is"),
        (".", "a/b", "contains"),
        ("link/new/er", "a", "lies inside"),
        ("s3://bucket/x/", "s3://bucket/x", "is"),
        ("s3://bucket", "s3://bucket/x", "contains"),
    ],
)
def test_outputs_and_inputs_do_not_overlap(tmp_path, monkeypatch, out, given, how):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--out {how} the folder"):
        refuse_overlap(out, {"the folder": given, "nothing": None})


@pytest.mark.parametrize(("out", "given"), [("ab", "a"), ("b", "a/b"), ("s3://bucket/xy", "s3://bucket/x")])
def test_neighbours_are_permitted(tmp_path, monkeypatch, out, given):
    monkeypatch.chdir(tmp_path)
    refuse_overlap(out, {"the folder": given})


def test_a_record_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".landmarks-predict.json").write_text('{"verb": "predict", "files": ["../mine"]}')
    with Outputs(str(tmp_path / "out"), "predict", True, ()) as outputs:
        outputs.write("new", b"1")
    assert (tmp_path / "mine").exists()


def test_outputs_on_an_object_store():
    for data in (b"1", b"2"):
        with Outputs("memory://outputs", "predict", True, ("a", "b")) as outputs:
            outputs.write("a/x" if data == b"1" else "b", data)
    with pytest.raises(UserError, match="holds b already"):
        Outputs("memory://outputs", "predict", False, ("a", "b"))
    with pytest.raises(UserError, match="not from `landmarks export`"):
        Outputs("memory://outputs", "export", True, ("b",))


def test_a_pipe_or_device_is_written_to_and_not_replaced(tmp_path):
    """As `--json /dev/stdout` or `--out /dev/null`: a file renamed onto it would take its place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    storage.write_json(str(pipe), [1])
    assert pipe.is_fifo() and json.loads(os.read(reader, 100)) == [1] and list(tmp_path.iterdir()) == [pipe]
    os.close(reader)
