"""Faces in all poses: 300W-LP to train on, LS3D-W balanced to be scored on.

Layout, below the root: `300W_LP/{AFW,HELEN,IBUG,LFPW}/NAME.jpg` with `300W_LP/landmarks/{AFW,...}/NAME_pts.mat`
(variable pts_3d, 68 x 2), and `LS3D-W-balanced*/new_dataset/NAME.jpg`, each with a `NAME.t7` (a Torch7 tensor,
68 x 2) beside it.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from sst.corpora import torch7
from sst.corpora.annotations import Box
from sst.corpora.faces import extent_box, grown_box
from sst.corpora.files import additions, find, names_in, read_mat, refuse_missing, require_boxes
from sst.corpora.packing import Item, SourceImage, UnusableImage, read_image
from sst.data.shards import Split
from sst.errors import UserError

LANDMARKS = 68
PARTS = ("AFW", "HELEN", "IBUG", "LFPW")
TRAIN = ("300W_LP", "300W-LP")
TEST = ("LS3D*/new_dataset", "LS3D*/LS3D*/new_dataset", "new_dataset", "LS3D*balanced*")


def items(root: str, annotations: str | None = None, *, detected: bool = False) -> list[Item]:
    """All images of 300W-LP but its mirrored copies (`*_Flip`), and all of LS3D-W balanced.

    Points are the image positions of the face's 68 points in space (`pts_3d`): that is what LS3D-W marks too.

    Args:
        root: folder of both archives.
        annotations: CSV as of the folder source with boxes of 300W-LP faces (file as AFW/NAME.jpg), before the
            margin. An image without one, and every test image, gets the extent of its points as of `extent_box`.
        detected: refuse training images without a box of their own.

    Raises:
        UserError: if a file is missing.
    """
    base = Path(root)
    train = find(base, TRAIN, "the folder of 300W-LP")
    names = [name for part in PARTS for name in _training_images(train, part)]
    added = additions(annotations, set(names), None)
    if detected:
        require_boxes(annotations, added, names)
    boxes = {name: row.box for name, row in added.items()}

    def item(source: str, split: Split, read: Callable[[Path], np.ndarray], image: Path, landmarks: Path) -> Item:
        return Item(source, split, None, partial(load, image, landmarks, read, boxes.get(source)), LANDMARKS)

    return [item(name, "train", read_pts, train / name, _pts_of(train, name)) for name in names] + [
        item(path.relative_to(base).as_posix(), "test", read_t7, path, path.with_suffix(".t7"))
        for path in _test_images(base)
    ]


def _pts_of(train: Path, name: str) -> Path:
    return train / "landmarks" / (name.removesuffix(".jpg") + "_pts.mat")


def _training_images(train: Path, part: str) -> list[str]:
    """The images of a part as PART/NAME.jpg; each must have its annotation."""
    there = names_in(train / part, "the images of 300W-LP")
    names = sorted(f"{part}/{name}" for name in there if name.endswith(".jpg"))
    if not names:
        raise UserError(f"{train / part}: no image in it; expected NAME.jpg")
    annotated = names_in(train / "landmarks" / part, f"NAME_pts.mat for each image of {part}")
    missing = {path.name for path in (_pts_of(train, name) for name in names)} - annotated
    refuse_missing(train / "landmarks" / part, missing, f"expected one for each image of {part}")
    return names


def _test_images(base: Path) -> list[Path]:
    folders = next((found for pattern in TEST if (found := sorted(base.glob(pattern)))), [])
    images = sorted(path for folder in folders for path in folder.rglob("*.jpg"))
    if not images:
        raise UserError(f"{base}: LS3D-W balanced is missing; expected NAME.jpg and NAME.t7 in {' or '.join(TEST)}")
    annotations = {path.with_suffix(".t7") for path in images}
    missing = {path.relative_to(base).as_posix() for path in annotations if not path.is_file()}
    refuse_missing(base, missing, "expected one beside each image")
    return images


def load(image: Path, landmarks: Path, read: Callable[[Path], np.ndarray], box: Box | None) -> SourceImage:
    """Reads an image, its points, and derives its box.

    Raises:
        UnusableImage: if the image can't be read, or the annotation is not what it should be.
    """
    try:
        points = read(landmarks)
        if points.shape != (LANDMARKS, 2) or not np.isfinite(points).all():
            raise ValueError(
                f"{landmarks.name}: array of shape {points.shape}; expected {LANDMARKS} x 2 finite numbers"
            )
    except (OSError, ValueError) as error:
        raise UnusableImage(str(error)) from error
    pixels = read_image(image)
    box = box or extent_box(points)
    return SourceImage(pixels, grown_box(box, pixels.shape[1], pixels.shape[0]), points, object_box=box)


def read_pts(path: Path) -> np.ndarray:
    """The points of a 300W-LP image, float64.

    Raises:
        ValueError: if the file is not as expected.
    """
    points = read_mat(path, "pts_3d")
    if not np.issubdtype(points.dtype, np.number):
        raise ValueError(f"{path.name}: pts_3d holds {points.dtype}; expected numbers")
    return points.astype(np.float64)


def read_t7(path: Path) -> np.ndarray:
    """The points of an LS3D-W image, float64.

    Raises:
        ValueError: if the file is not as expected.
    """
    if path.stat().st_size > torch7.MAX_BYTES:
        raise ValueError(f"{path.name}: {path.stat().st_size} bytes; expected a Torch7 tensor of {LANDMARKS} x 2")
    try:
        return torch7.parse_tensor(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
