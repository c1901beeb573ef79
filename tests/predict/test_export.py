"""jobs.export: ONNX, torch.export and MLflow give what our own model gives."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import yaml
from PIL import Image

from jobs import export as job
from sst.config import NetworkSettings
from sst.corpora.drawings import draw
from sst.nn.network import LandmarkDetector
from sst.predict.card import card_files
from sst.predict.predictor import ImageLandmarks, open_model
from sst.train.model import save_model
from tests.small import write_toy

NETWORK = NetworkSettings(input_size=64, width=16, depth=2, groups=2, descriptor_size=16)
LIMIT = 1e-3
"""Pixels by which exported programs may differ from ours."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    torch.manual_seed(1)
    root = tmp_path_factory.mktemp("export")
    model = LandmarkDetector(NETWORK.shape, 7).eval()
    save_model(str(root / "model"), model, network=NETWORK, clusters=list(range(7)), visible=0.3)
    job.main([str(root / "model"), "--out", str(root / "out"), "--card", "--fixed", "2", "90", "70"])
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


TENSORRT = (
    "Abs Add ArgMax AveragePool Cast Clip Concat Conv Div Floor Gather GatherElements InstanceNormalization Log "
    "MatMul MaxPool Mul Pad ReduceMax ReduceMean Relu Reshape Resize Sign Slice Sub Transpose Unsqueeze Where"
).split()
"""Operators that NVIDIA's parser lists as supported (operators.md of onnx-tensorrt), of those that torch might write.

`Mod`, which a remainder of whole numbers becomes, is not among them in every version.
"""


def test_the_fixed_onnx_has_no_open_shape_and_gives_our_points(exported):
    import onnx
    import onnxruntime

    file = str(exported[1] / "model_fixed.onnx")
    model = onnx.shape_inference.infer_shapes(onnx.load(file), strict_mode=True)
    onnx.checker.check_model(model, full_check=True)
    assert [each.version for each in model.opset_import if each.domain == ""] == [18]
    assert {node.op_type for node in model.graph.node} <= set(TENSORRT)
    [given] = model.graph.input
    users = {node.op_type for node in model.graph.node if given.name in node.input}
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8 and users == {"Cast"}
    for value in [given, *model.graph.output, *model.graph.value_info]:
        assert all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim), value.name
    images = drawings(2, 90, 70)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    points, confidence = session.run(["points", "confidence"], {"images": images})
    own_points, own_confidence = ours(exported[0], images)
    assert np.abs(points - own_points).max() < LIMIT and np.abs(confidence - own_confidence).max() < LIMIT
    with pytest.raises(Exception, match="dimensions"):
        session.run(None, {"images": images[:1]})


def write_card(model_url: str, out: Path, licence: str) -> str:
    out.mkdir()
    for name, data in card_files(model_url, open_model(model_url)[1], licence):
        (out / name).write_bytes(data)
    return (out / "README.md").read_text()


def test_a_card_is_a_model_with_its_metrics_picture_and_licence(exported, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(exported[0], run / "model")
    (run / "figures").mkdir()
    Image.new("RGB", (8, 8)).save(run / "figures" / "landmarks.png")
    (run / "final_metrics.json").write_text(json.dumps({"score/forward": 4.321, "model/equivariance_error": 1.5}))
    write_toy(str(run / "shards"), 5, 2)
    (run / "settings.json").write_text(json.dumps({"settings": {}, "shards": str(run / "shards")}))
    card = tmp_path / "card"
    _, head, text = write_card(str(run / "model"), card, "cc-by-4.0").split("---\n", 2)
    assert (
        yaml.safe_load(head)["license"] == "cc-by-4.0" and yaml.safe_load(head)["pipeline_tag"] == "keypoint-detection"
    )
    assert "| 4.321 |" in text and "| 1.5 |" in text and "5 unlabelled images of the corpus toy" in text
    assert "(landmarks.png)" in text and (card / "landmarks.png").exists() and "## Intended use" in text
    weights = safetensors.numpy.load_file(card / "model.safetensors")
    assert weights["landmark.out.weight"].shape[0] == 7
    images = drawings(1, 64, 64)
    np.testing.assert_array_equal(ours(str(card), images)[0], ours(exported[0], images)[0])


def test_the_card_of_a_model_without_its_run_says_what_it_does_not_know(exported):
    text = (exported[1] / "card" / "README.md").read_text()
    assert "png" not in text and "must choose one" in text and "no errors against annotated points" in text
