"""The detector for other programs: ONNX, torch.export and an MLflow model, each with everything before and after it.

All take images as uint8 RGB (B, H, W, 3), of any number and size, and give `points` (B, K, 2) in pixels of these
images and `confidence` (B, K). An object that fills only a part of its image is cropped by the caller. A second ONNX
file, for one number and size of images, has no shape that is known only when it runs, as TensorRT likes it.
"""

import io
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sst.environment import MLFLOW_ENVIRONMENT, set_environment
from sst.nn.network import LandmarkDetector
from sst.outputs import Outputs
from sst.predict.predictor import ImageLandmarks
from sst.train.model import ModelRecord

LARGEST_BATCH, SMALLEST_SIDE, LARGEST_SIDE = 4096, 8, 16384
"""Bounds of the shapes that the exported programs take."""

OPSET = 18
"""ONNX operators of the fixed file: TensorRT 10 reads versions 9 to 20, and onnxruntime any of these."""

INPUT, POINTS, CONFIDENCE = "images", "points", "confidence"


def exported_program(model: LandmarkDetector, size: int) -> torch.export.ExportedProgram:
    """The detector with its pre- and post-processing as a graph, for any batch, height and width.

    Args:
        model: the detector; it is moved to the CPU.
        size: side S of its view.
    """
    whole = ImageLandmarks(model.cpu().eval(), size).eval()
    shapes = {
        0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH),
        1: torch.export.Dim("height", min=SMALLEST_SIDE, max=LARGEST_SIDE),
        2: torch.export.Dim("width", min=SMALLEST_SIDE, max=LARGEST_SIDE),
    }
    # Sizes that are unequal and above 1, since a size of 1 would be taken for a constant.
    example = torch.zeros(2, 130, 170, 3, dtype=torch.uint8)
    with torch.no_grad():
        return torch.export.export(whole, (example,), dynamic_shapes=(shapes,))


class FixedImages(nn.Module):
    """The detector for a fixed number and size of images."""

    def __init__(self, whole: ImageLandmarks, height: int, width: int) -> None:
        """Takes the detector and the images' sides."""
        super().__init__()
        self.whole, self.box = whole, (0.0, 0.0, float(width), float(height))

    def forward(self, image_BHW3: Tensor) -> tuple[Tensor, Tensor]:
        """As `ImageLandmarks`; the images become floats first, since TensorRT takes uint8 as an input alone."""
        return self.whole.in_box(image_BHW3.float(), torch.tensor(self.box, device=image_BHW3.device))


def fixed_program(model: LandmarkDetector, size: int, shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """The detector as a graph without dynamic shapes.

    Args:
        model: the detector; it is moved to the CPU.
        size: side S of its view.
        shape: number, height and width of the images.
    """
    whole = FixedImages(ImageLandmarks(model.cpu().eval(), size), *shape[1:]).eval()
    with torch.no_grad():
        return torch.export.export(whole, (torch.zeros(*shape, 3, dtype=torch.uint8),))


def about(record: ModelRecord) -> dict[str, str]:
    """What a user of an exported file must know, as text."""
    return {
        "input": "uint8 RGB images (batch, height, width, 3)",
        "points": f"float32 (batch, {len(record.clusters)}, 2): x, y in pixels of the image, centres at integers",
        "confidence": f"float32 (batch, {len(record.clusters)}): from {record.visible} on a landmark is visible",
        "visible": str(record.visible),
        "weights_sha256": record.weights,
    }


def as_pt2(program: torch.export.ExportedProgram, record: ModelRecord) -> bytes:
    """The graph as a torch.export archive, with `about` as its extra file about.json."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"about.json": json.dumps(about(record))})
    return buffer.getvalue()


def as_onnx(program: torch.export.ExportedProgram, record: ModelRecord, opset: int | None = None) -> Any:
    """The graph as an `onnx.ModelProto`, with `about` as its metadata; None for the opset that torch prefers."""
    import onnx

    # It warns that torchvision's operators, which no detector of ours has, can't be converted.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=[POINTS, CONFIDENCE],
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    assert converted is not None
    proto = converted.model_proto
    onnx.helper.set_model_props(proto, about(record))
    onnx.checker.check_model(proto)
    return proto


def write_mlflow(folder: Path, proto: Any, record: ModelRecord) -> None:
    """Writes an MLflow model with signature and input example, which `mlflow models serve` can serve.

    It needs onnxruntime where it is served, and nothing of this project.
    """
    set_environment(MLFLOW_ENVIRONMENT)
    import mlflow.onnx
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    landmarks = len(record.clusters)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3), INPUT)]),
        outputs=Schema(
            [
                TensorSpec(np.dtype(np.float32), (-1, landmarks, 2), POINTS),
                TensorSpec(np.dtype(np.float32), (-1, landmarks), CONFIDENCE),
            ]
        ),
    )
    mlflow.onnx.save_model(
        proto,
        str(folder),
        signature=signature,
        input_example={INPUT: np.zeros((1, 32, 32, 3), np.uint8)},
        metadata=about(record),
    )


def mlflow_files(proto: Any, record: ModelRecord) -> dict[str, bytes]:
    """The files of an MLflow model, by path."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "mlflow")
        write_mlflow(folder, proto, record)
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


EXPORTED = ("model.pt2", "model.onnx", "mlflow", "model_fixed.onnx", "card")
"""What `landmarks export` may write."""


def export(
    model: LandmarkDetector, record: ModelRecord, outputs: Outputs, fixed: tuple[int, int, int] | None = None
) -> list[str]:
    """Writes model.onnx, model.pt2 and mlflow/, and on request model_fixed.onnx.

    Args:
        model: the detector.
        record: its record.
        outputs: where they are written.
        fixed: number, height and width of the images that model_fixed.onnx takes.

    Returns:
        What was written.
    """
    program = exported_program(model, record.network.input_size)
    outputs.write("model.pt2", as_pt2(program, record))
    proto = as_onnx(program, record)
    outputs.write("model.onnx", proto.SerializeToString())
    for path, data in mlflow_files(proto, record).items():
        outputs.write(f"mlflow/{path}", data)
    if fixed is None:
        return ["model.pt2", "model.onnx", "mlflow"]
    proto = as_onnx(fixed_program(model, record.network.input_size, fixed), record, OPSET)
    proto.metadata_props.add(key="shape", value=" ".join(map(str, (*fixed, 3))))
    outputs.write("model_fixed.onnx", proto.SerializeToString())
    return ["model.pt2", "model.onnx", "mlflow", "model_fixed.onnx"]
