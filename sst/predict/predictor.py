"""Landmarks on images from anywhere: what goes into the model, what comes out, and how it is written down.

Shape letters: B batch, H W image, S side of the network's view, K landmarks, N objects. Points are (x, y) in pixels
of the image that they were found on, with pixel centres at integers.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cluster import storage
from sst.corpora.annotations import Box
from sst.corpora.packing import UnusableImage, read_image, usable_box
from sst.data.loader import ordered_map
from sst.errors import EMPTY, UserError
from sst.nn.geometry import STRIDE
from sst.nn.network import LandmarkDetector
from sst.nn.suppression import decode_landmarks
from sst.predict.sources import Target, as_box
from sst.train.model import ModelRecord, load_model, record_url
from sst.train.run_directory import RunDirectory

BATCH = 32
"""Objects per forward pass; their pictures wait in memory meanwhile."""

PICTURE_SIDES = (640, 1920)
"""Pictures with landmarks have a longer side within these, so that labels fit and memory does not burst."""


def resampling(length: Tensor, first: Tensor, last: Tensor, size: int) -> Tensor:
    """Weights that read a view's rows (or columns) from an image's.

    A triangle filter, as wide as a pixel of the view where that is larger than one of the image, so that nothing
    is skipped when a large image is shrunk. View pixel i lies at first + i * (last - first) / S, as in
    `sst.nn.geometry.box_to_view`.

    Args:
        length: rows of the image, 0, 1, ..., float32 (H,).
        first: side of the box at which the view begins, scalar.
        last: the opposite side.
        size: S.

    Returns:
        float32 (S, H); every row sums to 1.
    """
    scale = (last - first) / size
    centre = first + torch.arange(size, device=length.device, dtype=torch.float32) * scale
    distance = (length[None, :] - centre[:, None]).abs() / scale.clamp_min(1.0)
    weight = (1 - distance).clamp_min(0)
    return weight / weight.sum(1, keepdim=True).clamp_min(1e-6)


def view_of_box(image_BHW3: Tensor, box_4: Tensor, size: int) -> Tensor:
    """The network's input: the box of every image, stretched over the view; float32 (B, 3, S, S) in [0, 1]."""
    height, width = image_BHW3.shape[1:3]
    device = image_BHW3.device
    rows = resampling(torch.arange(height, device=device).float(), box_4[1], box_4[3], size)
    columns = resampling(torch.arange(width, device=device).float(), box_4[0], box_4[2], size)
    image_B3HW = image_BHW3.permute(0, 3, 1, 2).float() * (1 / 255)
    return torch.matmul(torch.matmul(rows, image_B3HW), columns.transpose(0, 1))


class ImageLandmarks(nn.Module):
    """The detector with everything before and after it: images in, points out."""

    def __init__(self, model: LandmarkDetector, size: int) -> None:
        """Takes the detector and the side S of its view."""
        super().__init__()
        self.model, self.size = model, size

    def forward(self, image_BHW3: Tensor) -> tuple[Tensor, Tensor]:
        """Landmarks of whole images of one size.

        Args:
            image_BHW3: uint8 RGB.

        Returns:
            Points (B, K, 2) in pixels of the images, and confidences (B, K).
        """
        # Sides as tensors, so that an exported graph takes images of any size.
        height, width = (torch.arange(n, device=image_BHW3.device)[-1:].float() + 1 for n in image_BHW3.shape[1:3])
        return self.in_box(image_BHW3, torch.cat([0 * width, 0 * height, width, height]))

    def in_box(self, image_BHW3: Tensor, box_4: Tensor) -> tuple[Tensor, Tensor]:
        """Landmarks within a box x0, y0, x1, y1 of the images."""
        points, confidence = decode_landmarks(self.model(view_of_box(image_BHW3, box_4, self.size)).float())
        return points * STRIDE * ((box_4[2:] - box_4[:2]) / self.size) + box_4[:2], confidence


NO_PICTURE = np.zeros((0, 0, 3), np.uint8)


@dataclass(frozen=True, eq=False)
class Found:
    """Landmarks of one object.

    Attributes:
        target: the object.
        size: width and height of its image.
        box: what the network looked at.
        points: float32 (K, 2).
        confidence: float32 (K,).
        picture: the image to draw on, uint8 (H', W', 3), resized as `PICTURE_SIDES` says; empty if not asked for.
    """

    target: Target
    size: tuple[int, int]
    box: Box
    points: np.ndarray
    confidence: np.ndarray
    picture: np.ndarray

    def without_picture(self) -> "Found":
        """The same, for keeping many of them."""
        return replace(self, target=replace(self.target, source=Path()), picture=NO_PICTURE)


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be used, and why."""

    file: str
    reason: str


def find_model(url: str) -> str:
    """The directory of the model of a run, or the model directory itself.

    Raises:
        UserError: if neither is there.
    """
    if not url.strip():
        raise UserError(f"the path of the model {EMPTY}")
    for place in (url, RunDirectory(url).model_url):
        if storage.exists(record_url(place)):
            return place
    if storage.exists(RunDirectory(url).settings_url):
        raise UserError(
            f"{url}: training has not finished, so there is no model yet; run its `landmarks train` command again"
        )
    what = "no landmark model in it" if storage.exists(url) else "no such directory"
    raise UserError(f"{url}: {what}; give a run directory of `landmarks train`, or its model/ directory")


WHOLE = 0.8
"""A model whose training boxes covered less of the stored images than this share has to be told the boxes."""


def needs_boxes(record: ModelRecord) -> bool:
    """Whether a model expects images cropped to the object, or its box in them."""
    return record.metrics.get("box_share", 1.0) < WHOLE


def white_of(record: ModelRecord) -> int | None:
    """Value that was white in the 16-bit images that a model learnt from; None if they used all bits, or were none."""
    white = record.metrics.get("white")
    return None if white is None else int(white)


def open_model(url: str) -> tuple[LandmarkDetector, ModelRecord, str]:
    """The detector, its record, and the directory that it lies in.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    place = find_model(url)
    try:
        return *load_model(place), place
    except ValueError as error:
        raise UserError(str(error)) from error


@dataclass(frozen=True, eq=False)
class _Loaded:
    target: Target
    size: tuple[int, int]
    box: Box
    view: Tensor
    picture: np.ndarray


def _load(target: Target, view_size: int, pictures: bool) -> "_Loaded | Unreadable":
    try:
        image = target.source if isinstance(target.source, np.ndarray) else read_image(target.source, target.white)
    except UnusableImage as error:
        return Unreadable(target.file, str(error))
    height, width = image.shape[:2]
    clipped = None if target.box is None else usable_box(target.box, width, height)
    box = (0.0, 0.0, float(width), float(height)) if clipped is None else as_box(clipped)
    view = view_of_box(torch.tensor(image)[None], torch.tensor(box), view_size)[0]
    return _Loaded(target, (width, height), box, view, _picture(image) if pictures else NO_PICTURE)


def _picture(image: np.ndarray) -> np.ndarray:
    import cv2

    side = max(image.shape[:2])
    factor = min(max(side, PICTURE_SIDES[0]), PICTURE_SIDES[1]) / side
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    size = [max(1, round(side * factor)) for side in image.shape[1::-1]]
    return image if factor == 1 else np.asarray(cv2.resize(image, size, interpolation=how))


@torch.inference_mode()
def predict(
    model: LandmarkDetector, view_size: int, targets: Iterable[Target], pictures: bool = False
) -> Iterator[Found | Unreadable]:
    """Landmarks of every object, in order; images are read in threads while the network works.

    Args:
        model: the detector, on the device to work on.
        view_size: side S of its view.
        targets: the objects.
        pictures: whether images to draw on are wanted too.
    """
    device = next(model.parameters()).device
    loaded = ordered_map(lambda target: _load(target, view_size, pictures), targets)
    while group := list(islice(loaded, BATCH)):
        usable = [item for item in group if isinstance(item, _Loaded)]
        rows: Iterator[Found] = iter(())
        if usable:
            heat = model(torch.stack([item.view for item in usable]).to(device)).float()
            points, confidence = (tensor.cpu().numpy() for tensor in decode_landmarks(heat))
            rows = (
                Found(
                    item.target,
                    item.size,
                    item.box,
                    in_image(each * (STRIDE / view_size), item.box),
                    sure,
                    item.picture,
                )
                for item, each, sure in zip(usable, points, confidence, strict=True)
            )
        yield from (item if isinstance(item, Unreadable) else next(rows) for item in group)


def in_image(share_K2: np.ndarray, box: Box) -> np.ndarray:
    """Points given in sides of a box (0 to 1), in pixels of the image; float32 (K, 2)."""
    low, high = np.array(box[:2]), np.array(box[2:])
    return np.asarray(share_K2 * (high - low) + low, np.float32)


def in_view(points_K2: np.ndarray, box: Box, size: float) -> np.ndarray:
    """Pixels of the image in pixels of the view of its box; the inverse of `in_image`."""
    low, high = np.array(box[:2]), np.array(box[2:])
    return np.asarray((points_K2 - low) / (high - low) * size, np.float64)
