"""jobs.export: ONNX, torch.export and MLflow give what our own model gives."""

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import export as job
from sst.config import NetworkSettings
from sst.corpora.drawings import draw
from sst.nn.network import LandmarkDetector
from sst.predict.predictor import ImageLandmarks, open_model
from sst.train.model import save_model

NETWORK = NetworkSettings(input_size=64, width=16, depth=2, groups=2, descriptor_size=16)
LIMIT = 1e-3
"""Pixels by which exported programs may differ from ours."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    torch.manual_seed(1)
    root = tmp_path_factory.mktemp("export")
    model = LandmarkDetector(NETWORK.shape, 7).eval()
    save_model(str(root / "model"), model, network=NETWORK, clusters=list(range(7)), visible=0.3)
    job.main([str(root / "model"), "--out", str(root / "out")])
    return str(root / "model"), root / "out"


def ours(model_url: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    detector, record, _ = open_model(model_url)
    with torch.inference_mode():
        points, confidence = ImageLandmarks(detector, record.network.input_size)(torch.from_numpy(images))
    return points.numpy(), confidence.numpy()


def drawings(count: int, height: int, width: int) -> np.ndarray:
    side = max(height, width)
    return np.stack([draw(4, number, side).image[:height, :width] for number in range(count)])


SHAPES = [(1, 64, 64), (3, 97, 61), (2, 50, 211)]


@pytest.mark.parametrize("shape", SHAPES)
def test_onnx_gives_our_points_for_any_batch_and_size(exported, shape):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(exported[1] / "model.onnx"), providers=["CPUExecutionProvider"])
    images = drawings(*shape)
    points, confidence = session.run(["points", "confidence"], {"images": images})
    own_points, own_confidence = ours(exported[0], images)
    assert np.abs(points - own_points).max() < LIMIT and np.abs(confidence - own_confidence).max() < LIMIT
    assert session.get_modelmeta().custom_metadata_map["visible"] == "0.3"


@pytest.mark.parametrize("shape", SHAPES)
def test_torch_export_gives_our_points(exported, shape):
    program = torch.export.load(io.BytesIO((exported[1] / "model.pt2").read_bytes()))
    images = drawings(*shape)
    points, confidence = program.module()(torch.from_numpy(images))
    own_points, own_confidence = ours(exported[0], images)
    assert np.abs(points.detach().numpy() - own_points).max() < LIMIT
    assert np.abs(confidence.detach().numpy() - own_confidence).max() < LIMIT


def test_an_earlier_export_is_replaced_only_when_asked(exported, capsys):
    with pytest.raises(SystemExit) as exit_:
        job.main([exported[0], "--out", str(exported[1])])
    assert exit_.value.code == 2 and "holds model.pt2 already" in capsys.readouterr().err


def test_mlflow_serves_the_model_over_http(exported):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["mlflow", "models", "serve", "-m", str(exported[1] / "mlflow"), "--env-manager", "local"]
    server = subprocess.Popen(
        [*command, "--port", str(port)], env=os.environ | {"PATH": path}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    images = drawings(2, 70, 64)
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps({"inputs": images.tolist()}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        for _ in range(120):
            assert server.poll() is None, server.stdout and server.stdout.read()
            try:
                answer = json.load(urllib.request.urlopen(request, timeout=60))["predictions"]
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        else:
            raise AssertionError("the server never answered")
    finally:
        os.killpg(server.pid, 9)
        server.wait()
    points, confidence = ours(exported[0], images)
    assert np.abs(np.array(answer["points"]) - points).max() < LIMIT
    assert np.abs(np.array(answer["confidence"]) - confidence).max() < LIMIT
