"""What comes from outside can't run code, write elsewhere or fill the memory; secrets stay out of all that is kept."""

import ast
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch

from cluster import storage
from jobs import pack, predict, train
from sst.config import TrainSettings
from sst.corpora.packing import UnusableImage, read_image
from sst.data.corpus import open_corpus
from sst.data.jpeg import decode_jpeg_scaled
from sst.data.shards import read_shard
from sst.errors import UserError
from sst.run.claim import claim
from sst.train.model import load_model
from sst.train.run_directory import RunDirectory
from tests.small import SETTINGS, write_toy

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for room in ("cluster", "sst", "jobs") for path in (ROOT / room).rglob("*.py"))

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangers(source: str) -> list[str]:
    """What in a piece of source could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"imports {name}" for name in names if name.partition(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name, options = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}

        def is_(option: str, value: object, options=options) -> bool:
            return isinstance(options.get(option), ast.Constant) and options[option].value is value

        if name in FORBIDDEN_CALLS:
            found.append(f"calls {name}")
        if name == "torch.load" and not is_("weights_only", True):
            found.append("torch.load without weights_only=True")
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            found.append(name)
        if name in ("np.load", "numpy.load", "np.savez", "numpy.savez") and not is_("allow_pickle", False):
            found.append(f"{name} without allow_pickle=False")
        if "shell" in options and not is_("shell", False):
            found.append("shell=True")
        if name.endswith(".extractall") or (name.endswith(".extract") and "tar" in name):
            found.append(f"{name}: unpacks an archive onto the disk")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_can_run_what_it_reads(path):
    assert dangers(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from cloudpickle import loads", "import joblib.externals", "torch.load(f)", "eval('1')",
        "torch.load(f, weights_only=False)", "yaml.load(f)", "subprocess.run('x', shell=True)", "np.load(f)",
        "np.load(f, allow_pickle=True)", "tar.extractall('.')", "os.system('x')",
    ],
)  # fmt: skip
def test_the_scan_sees_what_it_should(source):
    assert len(dangers(source)) == 1


class Hostile:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_pickle_offered_as_model_run_or_array_is_refused_and_does_nothing(tmp_path):
    trap = tmp_path / "trap"
    data = pickle.dumps(Hostile(trap))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(data)
    record = {
        "network": SETTINGS.network.model_dump(),
        "clusters": [0],
        "visible": 0.2,
        "weights": storage.sha256(data),
    }
    (tmp_path / "model" / "model.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="model.safetensors"):
        load_model(str(tmp_path / "model"))
    (tmp_path / "x.npz").write_bytes(data)
    np.savez(tmp_path / "y.npz", a=np.array([Hostile(trap)], object))
    for name in ("x.npz", "y.npz"):
        with pytest.raises(ValueError, match=name):
            storage.load_npz(str(tmp_path / name))
    torch.save({"a": Hostile(trap)}, tmp_path / "superpoint.pth")
    write_toy(str(tmp_path / "shards"), train=16, test=4)
    told = f"toy-cpu --shards {tmp_path}/shards --name x --runs {tmp_path}/runs --keypoints superpoint"
    with pytest.raises(SystemExit) as exit_:
        train.main([*told.split(), "--superpoint-weights", str(tmp_path / "superpoint.pth")])
    assert exit_.value.code == 2 and not trap.exists()


def tar_with(path: Path, *members: tuple[str, bytes, bytes]) -> None:
    """A tar of (name, type, contents or link target)."""
    with tarfile.open(path, "w") as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.linkname = content.decode()
                tar.addfile(info)


@pytest.mark.parametrize(
    "members",
    [
        [("../000000000.jpg", tarfile.REGTYPE, b"x"), ("../000000000.json", tarfile.REGTYPE, b"{}")],
        [("/tmp/000000000.jpg", tarfile.REGTYPE, b"x")],
        [("000000000.jpg", tarfile.SYMTYPE, b"/etc/passwd"), ("000000000.json", tarfile.REGTYPE, b"{}")],
        [("000000000.jpg", tarfile.LNKTYPE, b"/etc/passwd")],
        [("000000000.jpg", tarfile.FIFOTYPE, b"")],
        [("000000000.py", tarfile.REGTYPE, b"raise SystemExit"), ("000000000.json", tarfile.REGTYPE, b"{}")],
        [("000000000.pkl", tarfile.REGTYPE, pickle.dumps(Hostile(Path("trap"))))],
    ],
)  # fmt: skip
def test_a_hostile_tar_member_is_refused_and_nothing_is_written(tmp_path, members, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    tar_with(tmp_path / "corpus" / "shard.tar", *members)
    with pytest.raises(ValueError, match="damaged shard"):
        list(read_shard(str(tmp_path / "corpus" / "shard.tar")))
    assert [path.name for path in tmp_path.rglob("*")] == ["corpus", "shard.tar"]


def jpeg_of_size(width: int, height: int) -> bytes:
    """A tiny JPEG whose header claims another size."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


def png_of_size(side: int) -> bytes:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(10_000_000), 9)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_decompression_bombs_are_refused_before_they_unpack(tmp_path):
    before = psutil.Process().memory_info().rss
    with pytest.raises(ValueError, match="at most 64000000 are permitted"):
        decode_jpeg_scaled(jpeg_of_size(65_000, 65_000))
    (tmp_path / "bomb.png").write_bytes(png_of_size(60_000))
    with pytest.raises(UnusableImage, match="DecompressionBomb"):
        read_image(tmp_path / "bomb.png")
    assert psutil.Process().memory_info().rss - before < 300e6


def test_a_member_of_an_npz_that_is_no_array_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("a.npy", b"text")
    with pytest.raises(ValueError, match=r"x\.npz.*a: not an array"):
        storage.load_npz(str(tmp_path / "x.npz"))


def test_arrays_that_would_fill_the_memory_are_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "zeros.npz", a=np.zeros(1_000_000))
    monkeypatch.setattr(storage, "LARGEST_ARRAYS", 1_000_000)
    with pytest.raises(ValueError, match=r"zeros\.npz.*bytes when unpacked; at most 1000000"):
        storage.load_npz(str(tmp_path / "zeros.npz"))


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.mkdir [trap]", "[" * 100_000, '{"a": 1e999999}', "\ufeff{}x"]
)
def test_json_that_is_none_is_refused(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError):
        open_corpus(str(tmp_path))
    assert not (tmp_path / "trap").exists()


SECRET = "hunter2"


@pytest.mark.parametrize(
    "url", [f"s3://me:{SECRET}@bucket/x", f"https://{SECRET}@host/x", f"sftp://me:{SECRET}@host/x"]
)
def test_credentials_in_a_url_are_refused_without_showing_them(tmp_path, url, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_toy(str(tmp_path / "shards"), train=16, test=4)
    for main, told in (
        (train.main, f"toy-cpu --shards {url} --name x"),
        (train.main, f"toy-cpu --shards {tmp_path}/shards --name x --runs {url}"),
        (pack.main, f"toy --count 4 --out {url}"),
        (predict.main, f"{url} {tmp_path}/shards --out {tmp_path}/out"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(told.split())
        said = capsys.readouterr()
        assert exit_.value.code == 2 and "don't write credentials into a URL" in said.err
        assert SECRET not in said.err + said.out
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET.encode() not in kept


def test_what_a_run_keeps_and_sends_holds_nothing_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    write_toy(str(tmp_path / "shards"), train=16, test=4)
    claim(RunDirectory(str(tmp_path / "run")), SETTINGS, open_corpus(str(tmp_path / "shards")))
    kept = (tmp_path / "run" / "settings.json").read_text() + TrainSettings().model_dump_json()
    assert SECRET not in kept


def test_safetensors_of_a_wrong_shape_is_an_error_not_a_crash(tmp_path):
    data = safetensors.torch.save({"landmark.out.weight": torch.zeros(1)})
    (tmp_path / "model.safetensors").write_bytes(data)
    record = {
        "network": SETTINGS.network.model_dump(),
        "clusters": [0],
        "visible": 0.2,
        "weights": storage.sha256(data),
    }
    (tmp_path / "model.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="model.safetensors"):
        load_model(str(tmp_path))


def children(process: int) -> list[int]:
    return [each.pid for each in psutil.Process(process).children(recursive=True)]


def connections(process: int) -> list:
    try:
        return [c for c in psutil.Process(process).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    except psutil.Error:  # it has just ended
        return []


def test_nobody_else_can_use_the_cluster_that_a_run_starts():
    """Its dashboard listens on loopback only; Ray's other servers, on all interfaces, want the run's token."""
    script = (
        "from sst.run.ray_cluster import start_ray\nstart_ray()\nimport ray, sys\n"
        "@ray.remote\ndef work():\n    return 7\n"
        "assert ray.get(work.remote()) == 7\n"
        "print(ray.get_runtime_context().gcs_address)\n"
        "print(ray._private.worker._global_node.webui_url, flush=True)\nsys.stdin.read()"
    )
    hidden = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        host, _, port = process.stdout.readline().strip().rpartition(":")
        assert host == "127.0.0.1"
        listening = [c for each in [process.pid, *children(process.pid)] for c in connections(each)]
        assert {c.laddr.ip for c in listening if c.laddr.port == int(port)} == {"127.0.0.1"}
        stranger = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print(ray.cluster_resources())"
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
        tried = subprocess.run(
            [sys.executable, "-c", stranger, address], env=environment | token, capture_output=True, timeout=120
        )
        assert tried.returncode != 0 and b"CPU" not in tried.stdout
    finally:
        process.communicate("")
