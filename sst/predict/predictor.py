"""Landmarks on images from anywhere: what goes into the model, what comes out, and how it is written down.

Shape letters: B batch, H W image, S side of the network's view, K landmarks, N objects. Points are (x, y) in pixels
of the image that they were found on, with pixel centres at integers.
"""

import csv
import glob
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cluster import storage
from sst.corpora import folder
from sst.corpora.packing import UnusableImage, read_image, usable_box
from sst.data.loader import ordered_map
from sst.data.shards import MANIFEST, Manifest, decode, read_shard
from sst.errors import UserError
from sst.nn.geometry import STRIDE
from sst.nn.network import LandmarkDetector
from sst.nn.suppression import decode_landmarks
from sst.train.model import ModelRecord, load_model

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")

BATCH = 32
"""Objects per forward pass; their pictures wait in memory meanwhile."""

PICTURE_SIDES = (640, 1920)
"""Pictures with landmarks have a longer side within these, so that labels fit and memory does not burst."""

Box = tuple[float, float, float, float]


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


@dataclass(frozen=True, eq=False)
class Target:
    """One object to find landmarks on.

    Attributes:
        file: name of its image.
        source: what the image is read from: a file, the bytes of a stored sample, or an image already decoded.
        box: x0, y0, x1, y1 of the object in pixels of the image; for None, and for one that is unusable (as of
            `sst.corpora.packing.usable_box`), the whole image is seen.
        number: which of several objects of the same image it is.
    """

    file: str
    source: Path | np.ndarray
    box: Box | None = None
    number: int = 0


@dataclass(frozen=True, eq=False)
class Found:
    """Landmarks of one object.

    Attributes:
        target: the object.
        size: width and height of its image.
        box: what the network looked at.
        points: float32 (K, 2).
        confidence: float32 (K,).
        picture: the image to draw on, uint8 (H', W', 3), resized as `PICTURE_SIDES` says.
    """

    target: Target
    size: tuple[int, int]
    box: Box
    points: np.ndarray
    confidence: np.ndarray
    picture: np.ndarray

    def without_picture(self) -> "Found":
        """The same, for keeping many of them."""
        return replace(self, target=replace(self.target, source=Path()), picture=np.zeros((0, 0, 3), np.uint8))


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be used, and why."""

    file: str
    reason: str


@dataclass(frozen=True, eq=False)
class Sources:
    """What to predict on.

    Attributes:
        targets: the objects, read as they are asked for.
        total: how many there are (for a video, as many as it says of itself).
        whole: whether no object has a box.
        frames_per_second: of a video; None for images.
    """

    targets: Iterable[Target]
    total: int
    whole: bool
    frames_per_second: float | None = None


def find_model(url: str) -> str:
    """The directory of the model of a run, or the model directory itself.

    Raises:
        UserError: if neither is there.
    """
    for place in (url, storage.join(url, "model")):
        if storage.exists(storage.join(place, "model.json")):
            return place
    if storage.exists(storage.join(url, "settings.json")):
        raise UserError(f"{url}: training has not finished, so there is no model yet; run its jobs.train command again")
    what = "no landmark model in it" if storage.exists(url) else "no such directory"
    raise UserError(f"{url}: {what}; give a run directory of jobs.train, or its model/ directory")


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


def find_sources(images: Sequence[str], boxes: str | None = None) -> Sources:
    """What the person at the command line means by files, folders, patterns, a corpus or a video.

    Args:
        images: image files, folders (subfolders too) and patterns in any mixture; or one directory or URL of
            shards; or one video file.
        boxes: CSV or COCO file with boxes of the objects, several per image if need be; images that it does not
            name are seen whole.

    Raises:
        UserError: if something is not there, holds no image, or can't be mixed.
    """
    if len(images) == 1 and storage.exists(storage.join(images[0], MANIFEST)):
        return _shards(images[0], boxes)
    if videos := [name for name in images if name.lower().endswith(VIDEO_SUFFIXES)]:
        if len(images) > 1 or boxes is not None:
            raise UserError(f"{videos[0]}: a video is predicted by itself and whole: one file, no --boxes")
        return _video(videos[0])
    files: dict[str, Path] = {}
    for name in images:
        files |= _files(name, alone=len(images) == 1)
    rows: dict[str, list[Box | None]] = {}
    if boxes is not None:
        for row in folder.read_annotations(boxes):
            rows.setdefault(row.file, []).append(row.box)
        if missing := sorted(set(rows) - set(files)):
            raise UserError(
                f"{boxes}: {len(missing)} of {len(rows)} files named there are not among the {len(files)} images: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
            )
    targets = [
        Target(name, path, box, number)
        for name, path in files.items()
        for number, box in enumerate(rows.get(name, [None]))
    ]
    return Sources(targets, len(targets), whole=boxes is None)


def _files(name: str, alone: bool) -> dict[str, Path]:
    """Files of one argument by name; relative to a folder if that is all that was asked for."""
    path = Path(name)
    if path.is_dir():
        found = {item.source: path / item.source for item in folder.items(name)}
        return found if alone else {(path / own).as_posix(): file for own, file in found.items()}
    if path.is_file():
        return {path.name if alone else path.as_posix(): path}
    matched = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
    found = {file.as_posix(): file for file in matched if file.suffix.lower() in folder.IMAGE_SUFFIXES}
    if not found:
        is_pattern = glob.has_magic(name)
        raise UserError(
            f"{name}: {'no image matches this pattern' if is_pattern else 'no such file or folder'}; "
            "give image files, folders, patterns, one directory of shards or one video"
        )
    return found


def _shards(url: str, boxes: str | None) -> Sources:
    if boxes is not None:
        raise UserError(f"{url}: shards hold the boxes of their images; leave --boxes out")
    try:
        manifest = Manifest.load(url)
        manifest.check(url)
    except ValueError as error:
        raise UserError(str(error)) from error

    def targets() -> Iterator[Target]:
        for shard in manifest.shards:
            for sample in read_shard(storage.join(url, shard.file), shard.sha256):
                yield Target(f"{sample.key}.jpg", decode(sample)[0], sample.meta.box)

    return Sources(targets(), sum(shard.samples for shard in manifest.shards), whole=False)


def _video(name: str) -> Sources:
    import cv2

    if not Path(name).is_file():
        raise UserError(f"{name}: no such file")
    video = cv2.VideoCapture(name)
    if not video.isOpened():
        raise UserError(f"{name}: not a video that OpenCV can read; convert it to MP4 (H.264) first")

    def targets() -> Iterator[Target]:
        number = 0
        while True:
            good, frame = video.read()
            if not good:
                video.release()
                return
            yield Target(f"frame_{number:06d}", np.ascontiguousarray(frame[:, :, ::-1]))
            number += 1

    total = max(1, int(video.get(cv2.CAP_PROP_FRAME_COUNT)))
    return Sources(targets(), total, True, video.get(cv2.CAP_PROP_FPS) or 25.0)


@dataclass(frozen=True, eq=False)
class _Loaded:
    target: Target
    size: tuple[int, int]
    box: Box
    view: Tensor
    picture: np.ndarray


def _load(target: Target, view_size: int) -> "_Loaded | Unreadable":
    try:
        image = target.source if isinstance(target.source, np.ndarray) else read_image(target.source)
    except UnusableImage as error:
        return Unreadable(target.file, str(error))
    height, width = image.shape[:2]
    clipped = None if target.box is None else usable_box(target.box, width, height)
    box = (0.0, 0.0, float(width), float(height)) if clipped is None else as_box(clipped)
    view = view_of_box(torch.tensor(image)[None], torch.tensor(box), view_size)[0]
    return _Loaded(target, (width, height), box, view, _picture(image))


def as_box(corners: Sequence[float] | np.ndarray) -> Box:
    """Four numbers as a box."""
    x0, y0, x1, y1 = map(float, corners)
    return x0, y0, x1, y1


def _picture(image: np.ndarray) -> np.ndarray:
    import cv2

    side = max(image.shape[:2])
    factor = min(max(side, PICTURE_SIDES[0]), PICTURE_SIDES[1]) / side
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return image if factor == 1 else np.asarray(cv2.resize(image, None, fx=factor, fy=factor, interpolation=how))


@torch.inference_mode()
def predict(model: LandmarkDetector, view_size: int, targets: Iterable[Target]) -> Iterator[Found | Unreadable]:
    """Landmarks of every object, in order; images are read in threads while the network works.

    Args:
        model: the detector, on the device to work on.
        view_size: side S of its view.
        targets: the objects.
    """
    device = next(model.parameters()).device
    loaded = ordered_map(lambda target: _load(target, view_size), targets)
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
                    in_image(own * (STRIDE / view_size), item.box),
                    sure,
                    item.picture,
                )
                for item, own, sure in zip(usable, points, confidence, strict=True)
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


@dataclass(frozen=True, eq=False)
class Rows:
    """Points of many objects, ready to be written.

    Attributes:
        names: of the K points.
        files: image of each of N objects.
        sizes: width and height of the images.
        boxes: of the objects.
        points: (N, K, 2).
        confidence: (N, K).
        visible: confidence from which a point counts as visible.
    """

    names: Sequence[str]
    files: Sequence[str]
    sizes: Sequence[tuple[int, int]]
    boxes: Sequence[Box]
    points: np.ndarray
    confidence: np.ndarray
    visible: float


def as_coco(rows: Rows, unreadable: Sequence[Unreadable]) -> dict[str, Any]:
    """The points as a COCO keypoints data set.

    A visible point has v = 2; any other has x = y = v = 0, as COCO asks for. Beyond COCO, every object has
    `keypoint_scores` (a confidence per point) and `score` (their mean over the visible ones), and images that could
    not be read are listed under `unreadable`.
    """
    ids = {name: number for number, name in enumerate(dict.fromkeys(rows.files), start=1)}
    sizes = dict(zip(rows.files, rows.sizes, strict=True))
    annotations = []
    for number, (name, box) in enumerate(zip(rows.files, rows.boxes, strict=True)):
        confidence = rows.confidence[number]
        seen = confidence >= rows.visible
        triples = np.column_stack([rows.points[number], np.full(len(seen), 2)]) * seen[:, None]
        width, height = box[2] - box[0], box[3] - box[1]
        annotations.append(
            {
                "id": number + 1,
                "image_id": ids[name],
                "category_id": 1,
                "bbox": [round(float(v), 3) for v in (box[0], box[1], width, height)],
                "area": round(float(width * height), 3),
                "iscrowd": 0,
                "keypoints": [int(v) if i % 3 == 2 else round(float(v), 3) for i, v in enumerate(triples.ravel())],
                "num_keypoints": int(seen.sum()),
                "keypoint_scores": [round(float(v), 4) for v in confidence],
                "score": round(float(confidence[seen].mean()), 4) if seen.any() else 0.0,
            }
        )
    return {
        "images": [
            {"id": number, "file_name": name, "width": sizes[name][0], "height": sizes[name][1]}
            for name, number in ids.items()
        ],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object", "keypoints": list(rows.names), "skeleton": []}],
        "unreadable": [{"file_name": item.file, "reason": item.reason} for item in unreadable],
    }


def as_csv(rows: Rows) -> str:
    """One line per object and point: where it is, how sure the network is, and whether it counts as visible."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "object", "landmark", "x", "y", "confidence", "visible"])
    objects: dict[str, int] = {}
    for number, name in enumerate(rows.files):
        own = objects[name] = objects.get(name, -1) + 1
        for label, (x, y), sure in zip(rows.names, rows.points[number], rows.confidence[number], strict=True):
            writer.writerow([name, own, label, f"{x:.3f}", f"{y:.3f}", f"{sure:.4f}", int(sure >= rows.visible)])
    return text.getvalue()
