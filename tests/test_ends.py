"""How commands end when the world is against them: one clear line, the right exit code, nothing half-written."""

import errno
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from PIL import Image

from jobs import compare, export, pack, predict, train
from sst.config import NetworkSettings
from sst.data.shards import Manifest
from sst.nn.geometry import STRIDE
from sst.nn.network import LandmarkDetector
from sst.run import ray_cluster
from sst.run.ray_cluster import check_cluster, own_process_group, short_tmpdir
from sst.run.tracking import Tracker, artifact_place
from sst.train.model import save_model
from tests.small import files, write_toy

NETWORK = NetworkSettings(input_size=64, width=16, depth=2, groups=2, descriptor_size=16)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Pictures, a model, shards and a file."""
    root = tmp_path_factory.mktemp("world")
    (root / "pics").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (3, 96, 96, 3), np.uint8)
    for number, image in enumerate(noise):
        Image.fromarray(image).save(root / "pics" / f"{number}.png")
    model = LandmarkDetector(NETWORK.shape, 3)
    save_model(str(root / "model"), model, network=NETWORK, clusters=[0, 1, 2], visible=0.0)
    write_toy(str(root / "shards"), train=16, test=4)
    (root / "file").write_text("mine")
    return root


COMMANDS = {
    "pack": (pack.main, "folder --images {}/pics --out"),
    "predict": (predict.main, "{}/model {}/pics --out"),
    "export": (export.main, "{}/model --out"),
    "train": (train.main, "toy-cpu --shards {}/shards --name x --runs"),
}


def ended(name: str, world: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Exit code and the lines on stderr that are errors."""
    main, words = COMMANDS[name]
    with pytest.raises(SystemExit) as caught:
        main([*words.replace("{}", str(world)).split(), str(out)])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "interrupted"))]
    assert len(said) == 1
    return caught.value.code, said[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_below_a_file(name, world, tmp_path, capsys):
    before = files(world)
    code, said = ended(name, world, world / "file" / "out", capsys)
    assert code == 2 and f"{world}/file" in said and "a file is on the way" in said
    assert files(world) == before


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("place", ["/proc/none", "/dev/null", "link"])
def test_an_output_where_there_can_be_no_folder(name, place, world, tmp_path, capsys):
    (tmp_path / "link").symlink_to("none/deeper")
    code, said = ended(name, world, tmp_path / place, capsys)
    assert code == 2 and str(tmp_path / place) in said and ("; choose " in said or "let --runs name" in said)
    assert [path.name for path in tmp_path.iterdir()] == ["link"] and Path("/dev/null").is_char_device()


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("number", "expected", "words"),
    [(errno.EROFS, 2, "can be written to"), (errno.EACCES, 2, "may read and write"), (errno.ENOSPC, 1, "free some")],
)
def test_disks_that_are_read_only_or_full(name, number, expected, words, world, tmp_path, capsys, monkeypatch):
    def fail(file: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    code, said = ended(name, world, tmp_path / "new" / "out", capsys)
    assert code == expected and words in said and str(tmp_path) in said
    assert not list(tmp_path.iterdir())


def test_a_disk_that_gets_full_on_the_way(world, tmp_path, capsys):
    """A limit on the size of files stands for it: the first shard is larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        code, said = ended("pack", world, tmp_path / "out", capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1 and "no room for its 0.1 MB (File too large)" in said
    assert not list(tmp_path.iterdir())


def test_sigterm_while_packing_and_predicting_leaves_nothing(world, tmp_path, capsys, monkeypatch):
    for name, place in (("pack", "sst.corpora.packing.pack_item"), ("predict", "sst.predict.predictor._load")):
        monkeypatch.setattr(place, lambda *_: os.kill(os.getpid(), signal.SIGTERM) or signal.pause())
        monkeypatch.setattr("sst.corpora.packing.ordered_map", map)
        monkeypatch.setattr("sst.predict.predictor.ordered_map", map)
        code, said = ended(name, world, tmp_path / "out", capsys)
        assert code == 143 and said == "interrupted"
        assert not list(tmp_path.iterdir())


def test_a_video_that_could_not_be_written_whole_is_an_error(world, tmp_path, capsys, monkeypatch):
    """OpenCV says nothing when its disk is full."""
    import cv2

    writer = cv2.VideoWriter(str(tmp_path / "in.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 25, (64, 48))
    for level in (0, 90, 180):
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()
    monkeypatch.setattr(cv2.VideoWriter, "write", lambda self, image: None)
    with pytest.raises(SystemExit) as caught:
        predict.main([str(world / "model"), str(tmp_path / "in.mp4"), "--out", str(tmp_path / "out")])
    assert caught.value.code == 1 and "no room for a video of 3 frames" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [(40_000, 8), (8, 40_000)])
def test_strips_are_packed_and_predicted(size, world, tmp_path):
    (tmp_path / "pics").mkdir()
    Image.new("RGB", size, "red").save(tmp_path / "pics" / "strip.png")
    pack.main(["folder", "--images", str(tmp_path / "pics"), "--out", str(tmp_path / "out"), "--test-share", "0"])
    assert Manifest.load(str(tmp_path / "out")).samples_of("train") == 1
    predict.main([str(world / "model"), str(tmp_path / "pics"), "--out", str(tmp_path / "found")])
    with Image.open(tmp_path / "found" / "pictures" / "00000_strip.jpg") as drawn:
        assert max(drawn.size) == 1920 and min(drawn.size) == 1
    rows = [line.split(",") for line in (tmp_path / "found" / "predictions.csv").read_text().splitlines()[1:]]
    # A point in the first cell may lie half a cell before its middle, where the image begins.
    half = [STRIDE / 2 / NETWORK.input_size * side for side in size]
    inside = [-half[i] <= float(row[3 + i]) <= size[i] for row in rows for i in (0, 1)]
    assert rows and all(inside)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_is_gone(scheme, world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"{scheme}127.0.0.1:{free_port()}")
    monkeypatch.setattr("sst.run.pipeline.Tracking.open", lambda *_: NoTracker())
    code, said = ended("train", world, tmp_path / "runs", capsys)
    assert code == 2 and "no Ray cluster answers at RAY_ADDRESS=" in said and "unset RAY_ADDRESS" in said
    assert not (tmp_path / "runs").exists()


class NoTracker:
    """Takes everything."""

    def __getattr__(self, name: str) -> object:
        return lambda *_: None


def test_a_port_that_is_no_cluster_is_not_waited_for_long(monkeypatch):
    monkeypatch.setattr(ray_cluster, "CLUSTER_SECONDS", 0.2)
    check_cluster("local")
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))  # bound, and nobody listens
        with pytest.raises(ray_cluster.UserError, match="no Ray cluster answers"):
            check_cluster(f"127.0.0.1:{full.getsockname()[1]}")


@pytest.mark.parametrize(("length", "kept"), [(12, True), (99, False)])
def test_a_deep_tmpdir_does_not_make_the_paths_of_sockets_too_long(length, kept, monkeypatch):
    deep = "/" + "t" * (length - 1)
    monkeypatch.setenv("TMPDIR", deep)
    with short_tmpdir():
        assert (os.environ["TMPDIR"] == deep) == kept
        session = "ray/session_2026-11-27_07-40-40_969121_4194304/sockets/plasma_store"
        assert len(f"{os.environ['TMPDIR']}/{session}") <= 107
    assert os.environ["TMPDIR"] == deep


def test_a_signal_to_the_group_does_not_reach_what_ray_starts():
    def group() -> int:
        # As Ray does, with something to be done between fork and exec.
        code = "import os; print(os.getpgid(0))"
        return int(subprocess.run([sys.executable, "-c", code], capture_output=True, preexec_fn=int).stdout)

    mine = os.getpgid(0)
    assert group() == mine
    with own_process_group():
        assert group() != mine
    assert group() == mine


def test_an_mlflow_database_of_another_version(tmp_path, caplog, capsys):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{tmp_path}/new.db").create_experiment("e")
    (tmp_path / "new.db").rename(tmp_path / "mlflow.db")  # under a name that MLflow has not looked at yet
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'c48cb773bb87'")
    tracker = Tracker(str(tmp_path / "later"), uri, "e", "n")
    deadline = time.monotonic() + 60
    while "upgrade" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not tracker.close("FINISHED")
    assert f"run `mlflow db upgrade {uri}`" in caplog.text and "the run goes on" in caplog.text
    with pytest.raises(SystemExit) as caught:
        compare.main(["--tracking", uri, "--experiment", "e", "--out", str(tmp_path / "page.html")])
    assert caught.value.code == 2 and f"run `mlflow db upgrade {uri}`" in capsys.readouterr().err


def test_percent_signs_in_a_path_are_themselves(tmp_path):
    folder = tmp_path / "a%20b"
    place = artifact_place(f"sqlite:///{folder}/mlflow.db", "my runs")
    (tmp_path / "x.txt").write_text("x")
    get_artifact_repository(place).log_artifact(str(tmp_path / "x.txt"))
    assert [path.name for path in folder.rglob("*.txt")] == ["x.txt"] and not (tmp_path / "a b").exists()


def test_a_file_of_ones_own_is_not_replaced_by_a_page(tmp_path, capsys):
    (tmp_path / "page.html").write_text("<html>mine</html>")
    with pytest.raises(SystemExit) as caught:
        compare.main(["--tracking", f"sqlite:///{tmp_path}/no.db", "--out", str(tmp_path / "page.html")])
    assert caught.value.code == 2 and "not a page of `landmarks compare`" in capsys.readouterr().err
    assert (tmp_path / "page.html").read_text() == "<html>mine</html>"
