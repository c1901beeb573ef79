"""Human3.6M: people from its videos, cut out by the published boxes.

Layout, below the root (or its `training`, `subjects` or `training/subjects`), for each subject and video:
`S1/Videos/ACTION N.CAMERA.mp4`, `S1/MySegmentsMat/ground_truth_bb/ACTION N.CAMERA.mat` (MATLAB 7.3, which is HDF5:
cell array Masks with one W x H mask of the box per frame) and `S1/MyPoseFeatures/D2_Positions/ACTION N.CAMERA.cdf`
(variable Pose, 1 x frames x 64: 32 joints).

Source of the rules: Mallis et al. 2020, published code. One rule departs from it: there, "Walking" is looked for
anywhere in the name and also finds S1's WalkingDog; here the action's name must be equal.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sst.corpora.files import find, names_in, refuse_missing
from sst.corpora.packing import Item, SourceImage, UnusableImage
from sst.data.shards import Split
from sst.errors import UserError
from sst.nn.geometry import transform_points

SUBJECTS: dict[str, Split] = {
    "S1": "train",
    "S5": "train",
    "S6": "train",
    "S7": "train",
    "S8": "train",
    "S9": "train",
    "S11": "test",
}
EVERY = {"train": 10, "test": 50}
"""Of how many frames one is taken, the first included."""
ACTIONS = ("Directions", "Discussion", "Greeting", "Posing", "Waiting", "Walking")
JOINTS = 32
CROP = 450
"""Side of the person crop in pixels; it shows a square of `CROP_REACH` box heights about the box's middle."""
CROP_REACH = 1.5
ZOOM = 1.4
"""The view is the crop magnified so much about its middle."""

_VIDEOS, _BOXES, _JOINTS = "Videos", "MySegmentsMat/ground_truth_bb", "MyPoseFeatures/D2_Positions"
_HIPS_AND_ARMS = np.array([[1, 25, 26, 27, 28, 29, 30, 31], [6, 17, 18, 19, 20, 21, 22, 23]])
"""Right hip and arm (shoulder first), and their left counterparts."""
_LEGS = np.array([[2, 3, 4, 5], [7, 8, 9, 10]])
"""Right knee and downwards, and their left counterparts."""


@dataclass(frozen=True, eq=False)
class Clip:
    """One video and its annotations.

    Attributes:
        subject: S1, ...
        split: of the subject.
        name: of its files, without their endings.
        folder: of the subject.
        frames: numbers of the frames that are taken, ascending.
        points: float32 (frames taken, 32, 2), pixels of the video.
    """

    subject: str
    split: Split
    name: str
    folder: Path
    frames: range
    points: np.ndarray


def clips(root: str) -> list[Clip]:
    """All videos of the six actions, in order of subject and name; annotations of joints are read, no video is.

    Raises:
        UserError: if a file is missing or odd.
    """
    base = Path(root)
    first = find(base, [f"{place}S1" for place in ("", "training/", "subjects/", "training/subjects/")], "subject S1")
    found = []
    for subject, split in SUBJECTS.items():
        folder = first.parent / subject
        for name in _names(folder):
            count = _frames_of(folder / _BOXES / f"{name}.mat")
            frames = range(0, count, EVERY[split])
            points = _read_joints(folder / _JOINTS / f"{name}.cdf", frames)
            found.append(Clip(subject, split, name, folder, frames, points))
    return found


def _names(folder: Path) -> list[str]:
    """Names of a subject's videos; each must have all three files."""
    endings = {_VIDEOS: ".mp4", _BOXES: ".mat", _JOINTS: ".cdf"}
    there = {
        place: {
            name.removesuffix(ending)
            for name in names_in(folder / place, f"ACTION N.CAMERA{ending} of {folder.name}")
            if name.endswith(ending) and name.split(".")[0].split(" ")[0] in ACTIONS
        }
        for place, ending in endings.items()
    }
    names = set().union(*there.values())
    missing = [f"{place}/{name}{ending}" for place, ending in endings.items() for name in names - there[place]]
    refuse_missing(folder, missing, "expected video, box and joints of every recording")
    if absent := sorted(set(ACTIONS) - {name.split(".")[0].split(" ")[0] for name in names}):
        raise UserError(f"{folder / _VIDEOS}: no video of {', '.join(absent)}; expected {absent[0]}.CAMERA.mp4")
    return sorted(names)


def _frames_of(path: Path) -> int:
    """Number of frames that have a box."""
    h5py = _library("h5py")
    expected = "expected a MATLAB 7.3 file with a cell array Masks, one cell per frame"
    try:
        with h5py.File(path) as file:
            masks = file["Masks"]
            cells = h5py.check_ref_dtype(masks.dtype) is h5py.Reference
            if masks.ndim != 2 or masks.shape[1] != 1 or len(masks) < 1 or not cells:
                raise UserError(f"{path}: Masks has shape {masks.shape} of {masks.dtype}; {expected}")
            return len(masks)
    except (OSError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: can't be read ({error}); {expected}") from error


def _read_joints(path: Path, frames: range) -> np.ndarray:
    """Joints in the frames that are taken, float32 (frames, 32, 2)."""
    cdflib = _library("cdflib")
    expected = f"expected a CDF file with a variable Pose of 1 x frames x {2 * JOINTS}"
    try:
        pose = np.asarray(cdflib.CDF(str(path)).varget("Pose"))
    except Exception as error:  # cdflib raises many types on damaged input
        raise UserError(f"{path}: can't be read ({type(error).__name__}: {error}); {expected}") from error
    if pose.ndim != 3 or pose.shape[0] != 1 or pose.shape[2] != 2 * JOINTS:
        raise UserError(f"{path}: Pose has the shape {pose.shape}; {expected}")
    if pose.shape[1] <= frames[-1]:
        raise UserError(f"{path}: {pose.shape[1]} frames; expected joints of frame {frames[-1]} too, which has a box")
    return pose[0, frames].reshape(-1, JOINTS, 2).astype(np.float32)


def frames(clip: Clip) -> Iterator[Item]:
    """The frames that are taken of one video, which is read once from its beginning; they are ready to be packed.

    A frame that can't be decoded, or has no usable box, becomes an unusable image.
    """
    h5py = _library("h5py")
    video = clip.folder / _VIDEOS / f"{clip.name}.mp4"
    with h5py.File(clip.folder / _BOXES / f"{clip.name}.mat") as file:
        for (number, image), points in zip(decode(video, clip.frames), clip.points, strict=True):
            try:
                annotated = person(image, box_of(file, number), points)
                load = partial(_give, annotated)
            except UnusableImage as error:
                load = partial(_refuse, str(error))
            yield Item(f"{clip.subject}/{clip.name}/{number:06d}", clip.split, clip.subject, load, JOINTS)


def _give(annotated: SourceImage) -> SourceImage:
    return annotated


def _refuse(reason: str) -> SourceImage:
    raise UnusableImage(reason)


def decode(video: Path, numbers: range) -> Iterator[tuple[int, np.ndarray | None]]:
    """Frames of a video as RGB uint8 (H, W, 3), or None where it can't be decoded so far.

    All frames are decoded one after the other: seeking is inexact in many containers.
    """
    import cv2

    capture = cv2.VideoCapture(str(video))
    try:
        good = capture.isOpened()
        for number in range(numbers[-1] + 1):
            good = good and capture.grab()
            if number in numbers:
                read, image = capture.retrieve() if good else (False, None)
                yield number, cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if read and image is not None else None
    finally:
        capture.release()


def box_of(file: Any, number: int) -> tuple[int, int, int, int]:
    """First and last column and row, as x0, y0, x1, y1, of a frame's box mask.

    Raises:
        UnusableImage: if it can't be read or is empty.
    """
    try:
        mask = file[file["Masks"][number, 0]][()].T == 1
        if mask.ndim != 2:
            raise ValueError(f"{mask.ndim} dimensions")
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise UnusableImage(f"box of frame {number} can't be read ({error})") from error
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if len(columns) == 0 or rows[-1] == rows[0]:
        raise UnusableImage(f"box of frame {number} is empty")
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def crop_matrix(box: tuple[float, float, float, float]) -> np.ndarray:
    """Matrix (3, 3) from the frame to the person crop: the box's middle comes to the crop's."""
    x0, y0, x1, y1 = box
    scale = CROP / (CROP_REACH * (y1 - y0))
    shift = [CROP / 2 - scale * (x0 + x1) / 2, CROP / 2 - scale * (y0 + y1) / 2]
    return np.array([[scale, 0.0, shift[0]], [0.0, scale, shift[1]], [0.0, 0.0, 1.0]])


def view_box() -> tuple[float, float, float, float]:
    """The part of the person crop that is stretched to the view."""
    low, high = CROP / 2 - CROP / ZOOM / 2, CROP / 2 + CROP / ZOOM / 2
    return low, low, high, high


def person(image: np.ndarray | None, box: tuple[int, int, int, int], points_L2: np.ndarray) -> SourceImage:
    """The person crop, black where it reaches out of the frame, with view-consistent points.

    Raises:
        UnusableImage: if there is no image.
    """
    import cv2

    if image is None:
        raise UnusableImage("the video can't be decoded up to here")
    matrix = crop_matrix(box)
    crop = cv2.warpAffine(image, matrix[:2], (CROP, CROP), flags=cv2.INTER_LINEAR)
    points = transform_points(matrix, points_L2.astype(np.float64))
    x0, y0, x1, y1 = transform_points(matrix, np.array(box, np.float64).reshape(2, 2)).ravel().tolist()
    return SourceImage(crop, view_box(), view_consistent(points), object_box=(x0, y0, x1, y1))


def view_consistent(points_L2: np.ndarray) -> np.ndarray:
    """Joints renamed by what the picture shows, as if everyone faced the camera.

    Where the right hip lies right of the left one (the person faces away), right and left swap names at hips and
    arms; where the right knee lies right of the left one, at knees, ankles and feet.

    Args:
        points_L2: the 32 joints.

    Returns:
        A renamed copy.

    Source: Mallis et al. 2020, published code of the evaluation.
    """
    points = points_L2.copy()
    for rights, lefts in (_HIPS_AND_ARMS, _LEGS):
        if points_L2[rights[0], 0] > points_L2[lefts[0], 0]:
            points[rights], points[lefts] = points_L2[lefts], points_L2[rights]
    return points


def _library(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"Human3.6M needs {name}; install the extra: pip install -e '.[corpora]'") from error
