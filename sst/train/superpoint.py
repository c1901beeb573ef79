"""SuperPoint as the generic detector of first keypoints: the published choice, with weights that the user brings.

Shape letters: B batch, H W image, h w cells of 8 x 8 pixels (H // 8, W // 8), D = 256 descriptor size, N points.
Points are (x, y) with pixel centres at integers. A cell's descriptor lies at its centre: cell (i, j) at pixel
(8j + 3.5, 8i + 3.5).

Source: DeTone, Malisiewicz and Rabinovich 2018 (SuperPoint); Mallis et al. 2020, section 3.1, and its published code.

Equal to the published code: the network and its parameter names, brightness in [0, 1], the threshold, squares and
IoU of both suppressions, their order (each scale by itself, then the union, the more confident point first), no
margin at the border, rows and columns beyond a multiple of 8 without points, descriptors normalised per cell, read
bilinearly from scale 1 and normalised again.

Different on purpose: the published code weighs red and blue the wrong way round in the grey image, maps points of
the magnified copies back around a centre half a pixel off (0.1 to 0.2 px), and reads descriptors half a pixel off (more
where the sides are no multiples of 8).
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn import functional

from cluster import storage
from sst.errors import UserError, readable
from sst.nn.geometry import transform_points
from sst.nn.losses import sample_descriptors
from sst.nn.suppression import free_of

CELL = 8
"""Pixels per cell, in each direction."""

DESCRIPTOR_SIZE = 256

CONVOLUTIONS = {
    "conv1a": (1, 64, 3),
    "conv1b": (64, 64, 3),
    "conv2a": (64, 64, 3),
    "conv2b": (64, 64, 3),
    "conv3a": (64, 128, 3),
    "conv3b": (128, 128, 3),
    "conv4a": (128, 128, 3),
    "conv4b": (128, 128, 3),
    "convPa": (128, 256, 3),
    "convPb": (256, CELL * CELL + 1, 1),
    "convDa": (128, 256, 3),
    "convDb": (256, DESCRIPTOR_SIZE, 1),
}
"""Name in the published file: input channels, output channels, kernel size. P is the detector, D the descriptor."""

WHERE_FROM = (
    "the file is superpoint_v1.pth of the repository magicleap/SuperPointPretrainedNetwork on GitHub, and its licence "
    "allows academic, non-commercial research only; RootSIFT, the default, is free: leave --keypoints away"
)


class SuperPointNetwork(nn.ModuleDict):
    """The network; its state dict has the names and shapes of the published file."""

    def __init__(self) -> None:
        super().__init__(
            {name: nn.Conv2d(wide, out, side, padding=side // 2) for name, (wide, out, side) in CONVOLUTIONS.items()}
        )

    def forward(self, grey_B1HW: Tensor) -> tuple[Tensor, Tensor]:
        """Sees grey images.

        Args:
            grey_B1HW: brightness in [0, 1]; sides of at least 8 px.

        Returns:
            Detector logits (B, 65, h, w): a channel per pixel of the cell in reading order, the last one for "none of
            them". Descriptors (B, D, h, w) of unit length.
        """
        x = grey_B1HW
        for level in "1234":
            if level != "1":
                x = functional.max_pool2d(x, 2)
            x = functional.relu(self[f"conv{level}b"](functional.relu(self[f"conv{level}a"](x))))
        logits, descriptors = (self[f"conv{head}b"](functional.relu(self[f"conv{head}a"](x))) for head in "PD")
        return logits, functional.normalize(descriptors, dim=1)


def load_superpoint(path: str | None) -> SuperPointNetwork:
    """Reads SuperPoint's weights.

    Args:
        path: local path or URL of the published file, or of the same tensors as safetensors (by the name's ending).
            A dictionary that holds them as `state_dict` is understood too: the authors' code reads that.

    Raises:
        UserError: if none is given, it cannot be read, or names or shapes of the tensors differ.
    """
    if not path:
        raise UserError(f"SuperPoint needs its weights, by --superpoint-weights FILE: {WHERE_FROM}")
    tensors = _read_tensors(path)
    network = SuperPointNetwork()
    if wrong := _differences(tensors, network.state_dict()):
        raise UserError(f"{path}: not the weights of SuperPoint ({wrong}); {WHERE_FROM}")
    network.load_state_dict(tensors)
    # Channels last saves half of the convolutions' time on a CPU.
    nn.utils.convert_conv2d_weight_memory_format(network, torch.channels_last)
    return network.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _read_tensors(path: str) -> dict[str, Tensor]:
    with readable(f"{path}: can't read SuperPoint's weights", f"; {WHERE_FROM}"):
        data = storage.read_bytes(path)
    try:
        if path.endswith(".safetensors"):
            content = load_safetensors(data)
        else:
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many types on damaged input
        raise UserError(f"{path}: not a file of weights ({type(error).__name__}); {WHERE_FROM}") from error
    tensors = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{path}: holds no dictionary of tensors; {WHERE_FROM}")
    return {str(name): tensor for name, tensor in tensors.items()}


def _differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """Which names and shapes differ, the first few of each kind; empty where none does."""
    shapes = [
        f"{name} {tuple(found[name].shape)} in place of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "wrong shape": shapes,
    }
    return "; ".join(
        f"{kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" for kind, names in kinds.items() if names
    )


def confidence_map(logits_B65hw: Tensor) -> Tensor:
    """Probability that a keypoint lies at a pixel, (B, 8h, 8w).

    In each cell the 64 pixels and "none of them" add up to 1.
    """
    return functional.pixel_shuffle(logits_B65hw.softmax(1)[:, :-1], CELL)[:, 0]


def magnification(scale: float, height: int, width: int) -> np.ndarray:
    """Matrix (3, 3) from an image to its copy on the same canvas, magnified about the centre."""
    x, y = (width - 1) / 2, (height - 1) / 2
    return np.array([[scale, 0.0, (1 - scale) * x], [0.0, scale, (1 - scale) * y], [0.0, 0.0, 1.0]])


def suppress_points(points_N2: np.ndarray, confidence_N: np.ndarray, nms_radius: float) -> np.ndarray:
    """Greedy non-maximum suppression of points anywhere, not only on pixels.

    A point falls where its square overlaps that of a more confident point that stays, by an IoU above 0.01. Of
    equally confident points the first counts as the more confident.

    Args:
        points_N2: points.
        confidence_N: their confidences.
        nms_radius: of the squares around the points, in the points' unit.

    Returns:
        Numbers of the points that stay, int64, the most confident first.
    """
    points = torch.from_numpy(points_N2)
    remaining = np.argsort(-confidence_N, kind="stable")
    kept = []
    while len(remaining):
        best, remaining = remaining[0], remaining[1:]
        kept.append(best)
        free = free_of(points[remaining], points[best : best + 1], nms_radius)
        remaining = remaining[free.numpy()]
    return np.array(kept, np.int64)


@dataclass(frozen=True, eq=False)
class SuperPoint:
    """SuperPoint on an image and on magnified copies of it; a `sst.train.keypoints.KeypointDetector`.

    Takes images of any size from 8 x 8 px on, not only 256 x 256, and works on the device of the network's weights.

    Attributes:
        network: with weights, see `load_superpoint`.
        threshold: confidence above which a pixel is a point.
        scales: magnifications, the first of them 1: descriptors come from there.
        nms_radius: half side of the squares that must not overlap, in pixels.

    Raises:
        ValueError: if the scales do not begin with 1, or one is below 1.

    Source: Mallis et al. 2020, section 3.1 and supplementary material.
    """

    network: SuperPointNetwork
    threshold: float = 0.1
    scales: tuple[float, ...] = (1.0, 1.3, 1.6)
    nms_radius: float = 6.0
    descriptor_size: int = DESCRIPTOR_SIZE
    sees_view: bool = False

    def __post_init__(self) -> None:
        if self.scales[:1] != (1.0,) or min(self.scales) < 1.0:
            raise ValueError(f"scales {self.scales} must begin with 1 and have none below 1")

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """See `KeypointDetector`; the most confident point of an image comes first.

        One image and one scale after the other: a large image takes half a gigabyte per megapixel as it is.
        """
        return [self._keypoints(image) for image in images]

    def _keypoints(self, image_HW3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        grey = cv2.cvtColor(image_HW3, cv2.COLOR_RGB2GRAY)
        points, confidence, maps = zip(*(self._detect(grey, scale) for scale in self.scales), strict=True)
        united = np.concatenate(points)
        united = united[suppress_points(united, np.concatenate(confidence), self.nms_radius)]
        cells = (torch.from_numpy(united).to(maps[0].device) - (CELL - 1) / 2) / CELL
        rows = functional.normalize(sample_descriptors(maps[0], cells[None])[0], dim=1).cpu().numpy()
        # A zero or NaN row cannot be compared with anything.
        described = np.square(rows).sum(1) > 0.5
        return united[described], rows[described]

    def _detect(self, grey_HW: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray, Tensor]:
        """Points found at one scale, in pixels of the image itself, their confidences, and (1, D, h, w) descriptors."""
        height, width = grey_HW.shape
        to_copy = magnification(scale, height, width)
        copy = cv2.warpAffine(grey_HW, to_copy[:2], (width, height))
        device = next(self.network.parameters()).device
        logits, descriptors = self.network(torch.from_numpy(copy).to(device)[None, None].float() / 255)
        heat = confidence_map(logits)[0].cpu().numpy()
        row, column = np.nonzero(heat > self.threshold)
        points, confidence = np.stack([column, row], 1), heat[row, column]
        kept = suppress_points(points, confidence, self.nms_radius)
        each = transform_points(np.linalg.inv(to_copy), points[kept])
        return each.astype(np.float32), confidence[kept], descriptors
