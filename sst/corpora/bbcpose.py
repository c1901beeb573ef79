"""BBC Pose: sign-language interpreters in frames of 20 broadcasts.

Layout, below the root: the folders `1` to `20` with frames `N.jpg`, and `bbcpose.mat` (also in `code` or
`bbcpose_extbbcpose_code_1.0`): a struct array `bbcpose` whose element n describes folder n by type (train, val, test),
train_frames and train_joints (found by a tracker), test_frames and test_joints (by hand). Joints are 2 x 7 x frames:
head, then right and left wrist, elbow, shoulder. Elements above 20 belong to the extended corpus and are not used.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from sst.corpora.annotations import Box
from sst.corpora.files import additions, find, names_in, read_mat, refuse_missing, require_boxes
from sst.corpora.packing import Item, SourceImage, read_image
from sst.data.shards import Split
from sst.errors import UserError

VIDEOS = 20
JOINTS = 7
SIDE = 300
"""Side in pixels of the square about the signer, as others cut it out; all broadcasts show signers alike in size."""
ANNOTATIONS = ("bbcpose.mat", "code/bbcpose.mat", "bbcpose_extbbcpose_code_1.0/bbcpose.mat")


def items(root: str, every: int, annotations: str | None = None, *, detected: bool = False) -> list[Item]:
    """Frames of the training videos, and the frames of the test videos that were annotated by hand.

    The validation videos are left out.

    Args:
        root: folder of the archive.
        every: of how many annotated training frames one is taken, as neighbours are nearly the same picture.
        annotations: CSV as of the folder source with boxes (file as 1/1.jpg) that replace those of the joints.
        detected: refuse training frames without a box of their own.

    Raises:
        UserError: if a file is missing or odd.
    """
    base = Path(root)
    path = find(base, ANNOTATIONS, "the file of annotations")
    expected = f"expected a struct array bbcpose of at least {VIDEOS} videos"
    try:
        videos = read_mat(path, "bbcpose").ravel()
    except ValueError as error:
        raise UserError(f"{path.parent}: {error}; {expected}") from error
    fields = {"type", "train_frames", "train_joints", "test_frames", "test_joints"}
    if lacking := sorted(fields - set(videos.dtype.names or ())):
        raise UserError(f"{path}: bbcpose has no field {', '.join(lacking)}; {expected}")
    if len(videos) < VIDEOS:
        raise UserError(f"{path}: bbcpose has {len(videos)} elements; {expected}")
    found: list[Item] = []
    for number, video in enumerate(videos[:VIDEOS], 1):
        kind = "".join(video["type"].ravel().tolist()) if video["type"].dtype.kind == "U" else ""
        if kind not in ("train", "val", "test"):
            raise UserError(f"{path}: type of video {number} is {kind!r}; expected train, val or test")
        if kind != "val":
            found += _video_items(base, path, video, number, "train" if kind == "train" else "test", every)
    added = additions(annotations, {item.source for item in found}, None)
    if detected:
        require_boxes(annotations, added, [item.source for item in found if item.split == "train"])
    boxes = {name: row.box for name, row in added.items() if row.box is not None}
    return [
        replace(item, load=partial(_with_box, item.load, boxes[item.source])) if item.source in boxes else item
        for item in found
    ]


def _with_box(load: Callable[[], SourceImage], box: Box) -> SourceImage:
    return replace(load(), box=box)


def _video_items(base: Path, path: Path, video: np.void, number: int, split: Split, every: int) -> list[Item]:
    frames, joints = video[f"{split}_frames"].ravel(), video[f"{split}_joints"]
    if frames.size == 0 or frames.dtype.kind not in "uif" or joints.size != 2 * JOINTS * frames.size:
        raise UserError(
            f"{path}: video {number} has {split}_frames of shape {frames.shape} and {split}_joints of shape "
            f"{joints.shape}; expected N numbers and 2 x {JOINTS} x N joints"
        )
    joints = joints.reshape(2, JOINTS, -1)  # MATLAB drops a last dimension of 1
    step = every if split == "train" else 1
    names = [f"{int(frame)}.jpg" for frame in frames[::step]]
    folder = base / str(number)
    missing = set(names) - names_in(folder, f"the frames of video {number}")
    refuse_missing(folder, missing, f"expected every frame that {path.name} annotates")
    # MATLAB counts pixels from 1.
    points_N72 = joints[:, :, ::step].transpose(2, 1, 0).astype(np.float64) - 1.0
    return [
        Item(f"{number}/{name}", split, None, partial(load, folder / name, points), JOINTS)
        for name, points in zip(names, points_N72, strict=True)
    ]


def load(path: Path, points_72: np.ndarray) -> SourceImage:
    """Reads a frame.

    Raises:
        UnusableImage: if it can't be read.
    """
    return SourceImage(read_image(path), signer_box(points_72), points_72)


def signer_box(points_L2: np.ndarray) -> tuple[float, float, float, float] | None:
    """A square of `SIDE` pixels about the middle of the joints' extent; None where no joint is known."""
    known = points_L2[np.isfinite(points_L2).all(axis=1)]
    if not len(known):
        return None
    x, y = (known.min(axis=0) + known.max(axis=0)) / 2
    return float(x - SIDE / 2), float(y - SIDE / 2), float(x + SIDE / 2), float(y + SIDE / 2)
