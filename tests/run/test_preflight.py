"""What is known before a run starts, and what is said when it can't go on."""

import collections
import errno
import importlib
from collections.abc import Callable

import fsspec
import pytest
import torch
from aiohttp import ClientPayloadError, InvalidURL, ServerDisconnectedError
from botocore.exceptions import (
    ConnectionClosedError,
    EndpointConnectionError,
    NoCredentialsError,
    ResponseStreamingError,
)

from cluster import storage
from sst.errors import UserError, exit_on_user_error
from sst.presets import PRESETS
from sst.run import preflight
from sst.run.preflight import check_disk, check_kept, conflicts, disk_need, versions
from sst.train import trainer as training
from sst.train.trainer import out_of_memory
from tests.small import SETTINGS, files, local_tools, train_locally, write_toy


def test_a_disk_that_is_too_small_is_refused_with_both_numbers(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: usage(10**9, 0, 10**8))
    with pytest.raises(UserError, match=r"may take \d+\.\d GB, and 0\.1 GB are free there"):
        check_disk(PRESETS["celeba"][1], 200_000, str(tmp_path / "runs" / "x"))
    check_disk(PRESETS["celeba"][1], 200_000, "s3://bucket/runs/x")


def test_the_estimate_holds_what_a_run_takes_and_not_much_more(tmp_path):
    write_toy(str(tmp_path / "corpus"), train=48, test=16)
    train_locally(str(tmp_path / "corpus"), str(tmp_path / "run"), local_tools([]))
    taken = sum(map(len, files(tmp_path / "run").values()))
    estimate = disk_need(SETTINGS, 64) - preflight.PICTURES_BYTES
    assert taken < estimate < 4 * taken


def test_a_full_disk_leaves_the_last_good_state_and_says_how_much_is_needed(tmp_path, monkeypatch):
    storage.write_bytes(str(tmp_path / "a"), b"good")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(OSError, match=r"a: no room for its 2\.0 MB \(.*\); free some and give the same command again"):
        storage.write_bytes(str(tmp_path / "a"), bytes(2_000_000))
    assert files(tmp_path) == {"a": b"good"}


def test_versions_name_what_is_installed():
    found = versions()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert all(found[name] != "none" for name in preflight.COMPARED)


def test_nodes_with_other_versions_are_named():
    nodes = {"a": {"torch": "2.9", "ray": "2.60"}, "b": {"torch": "2.8", "ray": "2.60"}, "c": {"torch": "2.9"}}
    assert conflicts(nodes) == ["ray: 2.60 on a, b; none on c", "torch: 2.8 on b; 2.9 on a, c"]
    assert conflicts({"a": versions(), "b": versions()}) == []


def test_running_out_of_gpu_memory_names_batch_size_and_a_value_to_try(tmp_path, monkeypatch):
    write_toy(str(tmp_path / "corpus"), train=48, test=16)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(training, "stage1_losses", full)
    with pytest.raises(RuntimeError, match=r"stage1\.pairs 4 on 1 workers at 64 px.*try --stage1\.pairs 2"):
        train_locally(str(tmp_path / "corpus"), str(tmp_path / "run"), local_tools([]))
    least = SETTINGS.model_copy(update={"stage1": SETTINGS.stage1.model_copy(update={"pairs": 2})})
    assert "try a smaller --network.input-size than 64" in out_of_memory(least, 1)


class Flaky:
    """An object store's methods that fail a few times."""

    def __init__(self, fs, failures: int, error: Callable[[str], Exception]) -> None:
        self.fs, self.left, self.error, self.calls = fs, failures, error, 0

    def __getattr__(self, name):
        method = getattr(self.fs, name)
        if name not in ("cat_file", "pipe_file", "exists"):
            return method

        def call(*arguments, **named):
            self.calls += 1
            if self.left:
                self.left -= 1
                raise self.error("storage is away")
            return method(*arguments, **named)

        return call


@pytest.fixture
def store(monkeypatch):
    """Makes the memory file system flaky, and the pauses short."""

    def make(failures: int, error: Callable[[str], Exception]) -> Flaky:
        flaky = Flaky(fsspec.filesystem("memory"), failures, error)
        monkeypatch.setattr(storage, "filesystem", lambda url: (flaky, url.partition("://")[2]))
        return flaky

    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.001)
    return make


def test_storage_that_is_away_for_a_moment_is_tried_again(store):
    store(3, ConnectionError)
    storage.write_bytes("memory://x/a", b"1")
    flaky = store(storage.ATTEMPTS - 1, TimeoutError)
    assert storage.read_bytes("memory://x/a") == b"1" and flaky.calls == storage.ATTEMPTS


LOST = [
    EndpointConnectionError(endpoint_url="x"),
    ConnectionClosedError(endpoint_url="x"),
    ResponseStreamingError(error="x"),
    ServerDisconnectedError(),
    ClientPayloadError(),
]
"""What the libraries of the stores raise where a connection is lost: none of it is an OSError."""


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
def test_a_connection_that_a_library_reports_lost_is_tried_again(store, error):
    assert not isinstance(error, OSError)
    fsspec.filesystem("memory").pipe_file("x/a", b"1")
    flaky = store(2, lambda text: error)
    assert storage.read_bytes("memory://x/a") == b"1" and flaky.calls == 3


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError, NoCredentialsError, InvalidURL])
def test_what_a_store_answers_for_good_is_an_error_at_once(store, error):
    flaky = store(1, lambda text: error() if error is NoCredentialsError else error(text))
    with pytest.raises(error):
        storage.read_bytes("memory://x/a")
    assert flaky.calls == 1


def test_storage_that_stays_away_is_given_up_after_bounded_tries(store, caplog, capsys):
    flaky = store(10**6, ConnectionError)
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        storage.read_bytes("memory://x/a")
    assert stop.value.code == 1 and flaky.calls == storage.ATTEMPTS
    assert "x/a: the store failed 6 times, at last so: storage is away; check its address" in capsys.readouterr().err
    assert caplog.text.count("x/a: storage is away; trying again in") == storage.ATTEMPTS - 1


def test_a_submitted_job_writes_nowhere_that_goes_away(monkeypatch):
    places = {"out": "runs", "runs": "s3://bucket/runs", "tracking": "sqlite:///mlflow.db"}
    check_kept(**places)  # outside of a job
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match="--out runs, --tracking sqlite:///mlflow.db: a submitted job"):
        check_kept(**places)
    check_kept(out="/shared/runs/", runs="s3://bucket/runs", tracking="sqlite:////home/me/mlflow.db")
    check_kept(tracking="http://mlflow:5000")


def test_a_place_without_a_name_is_refused_as_it_would_be_the_root_of_the_file_system():
    # `--out "$OUT"` where OUT is unset: joined to a file's name it is /model.onnx.
    with pytest.raises(UserError, match="--out is empty"):
        check_kept(out="", tracking="http://mlflow:5000")
    with pytest.raises(UserError, match="--runs is empty"):
        check_kept(runs=" ")


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("pack", "toy --count 5 --out {}"),
        ("train", "toy-cpu --shards s3://none/shards --name a --runs {}"),
        ("tune", "toy-cpu --shards s3://none/shards --name a --runs {}"),
        ("demo", "--runs {}"),
        ("compare", "--out {}"),
        ("predict", "s3://none/model s3://none/image.jpg --out {}"),
        ("export", "s3://none/model --out {}"),
        ("import_checkpoint", "s3://none/file.pth --out {}"),
    ],
)
def test_every_verb_refuses_relative_places_in_a_submitted_job(verb, arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(f"jobs.{verb}").main(arguments.format("here").split())
    assert caught.value.code == 2 and " here" in capsys.readouterr().err and not list(tmp_path.iterdir())
