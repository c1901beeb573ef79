"""Annotations of other tools' projects on the images of a folder.

A project names its images as they lay where it was made. Here each is found below the given folder by the end of its
path: `/data/me/videos/a/img1.png` is `a/img1.png` or `img1.png`, whichever is there.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from sst.corpora.annotations import Annotations, Row, Tally, checked
from sst.corpora.listing import is_video, listed
from sst.corpora.pictures import picture_frame
from sst.corpora.projects import CORNER, Labelled, Project, read_deeplabcut, read_project, reader
from sst.corpora.videos import frame_of
from sst.errors import UserError

DRAWN = "_labeled"
"""DeepLabCut draws the labels on copies of the images, in folders whose names end so."""


@dataclass(frozen=True, eq=False)
class Annotated:
    """A project's objects on images that are there.

    Attributes:
        annotations: the objects; `file` is relative to the folder, or VIDEO/frame_NUMBER.
        frames: those of videos by `file`; uint8 RGB (H, W, 3), and each call may raise `UnusableImage`.
        names: of the folder's pictures those that belong to a corpus of the project: none where all objects are on
            frames, and not the copies that DeepLabCut draws labels on.
    """

    annotations: Annotations
    frames: Mapping[str, Callable[[], np.ndarray]]
    names: Sequence[str]


def is_project(path: str) -> bool:
    """Whether annotations are a project of another tool, rather than a CSV of our form or COCO."""
    return reader(path) is not None


def annotated(path: str, root: Path, names: Sequence[str] | None = None, category: str | None = None) -> Annotated:
    """Reads a project and finds its images.

    Args:
        path: of the project.
        root: the folder that its images, or videos, lie in.
        names: of the pictures in it that may be meant; None for every file.
        category: as of `checked`; projects name none.

    Raises:
        UserError: as `read_project`, and if an image is not there, could be one of several, or has other proportions
            than the project says.
    """
    project = read_project(path)
    inside, notes = project.pictures, project.notes
    wanted = {each.image for each in project.objects if each.frame is None or (each.image, each.frame) not in inside}
    files = [file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()]
    present = files if names is None else [*names, *filter(is_video, files)]
    if reader(path) is read_deeplabcut:
        kept = [name for name in present if not PurePosixPath(name).parent.name.endswith(DRAWN)]
        if left := len(present) - len(kept):
            notes = (*notes, f"{left} images in folders *{DRAWN}, on which labels are drawn, are left out")
        present = kept
    places = matched(path, wanted, present)
    videos = _short_names(each.image for each in project.objects if each.frame is not None)
    rows, frames = [], {}
    for each in project.objects:
        if each.frame is None:
            rows.append(_row(project, each, places[each.image], _scale(path, each, root / places[each.image])))
            continue
        name = f"{videos[each.image]}/frame_{each.frame:06d}"
        rows.append(_row(project, each, name, 1.0))
        own = inside.get((each.image, each.frame))
        frames[name] = partial(_as_rgb, own or partial(frame_of, root / places[each.image], each.frame))
    found = checked(Annotations(path, tuple(rows), tuple(project.names), notes=notes), Tally(), category)
    still = any(row.file not in frames for row in rows)
    return Annotated(found, frames, [name for name in names or () if name in set(present)] if still else [])


def _short_names(videos: Iterable[str]) -> dict[str, str]:
    """What each video is called here: its file's name without ending, numbered where several have the same."""
    names: dict[str, str] = {}
    for video in dict.fromkeys(videos):
        stem = PurePosixPath(video).stem
        same = sum(PurePosixPath(other).stem == stem for other in names)
        names[video] = f"{stem}_{same + 1}" if same else stem
    return names


def matched(path: str, wanted: Collection[str], present: Iterable[str]) -> dict[str, str]:
    """For each image of a project the file of the same name that shares the most folders with it, from the end.

    Of several such files it is the one whose whole path is the end of the image's.

    Raises:
        UserError: if there is none, several fit as well, or one fits several images.
    """
    by_name: dict[str, list[str]] = {}
    for file in present:
        by_name.setdefault(PurePosixPath(file).name, []).append(file)
    places: dict[str, str] = {}
    missing = []
    for image in sorted(wanted):
        scores = {file: _common_end(image, file) for file in by_name.get(PurePosixPath(image).name, [])}
        best = [file for file, score in scores.items() if score == max(scores.values())]
        if len(best) > 1:
            raise UserError(
                f"{path}: {image} may be {' or '.join(sorted(best)[:3])}; give a folder that holds one of them"
            )
        if best:
            places[image] = best[0]
        else:
            missing.append(image)
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(wanted)} images named there are not in the folder: "
            f"{listed(missing)}; say where they are by --images"
        )
    images = {file: image for image, file in places.items()}
    if twice := [image for image, file in places.items() if images[file] != image]:
        raise UserError(
            f"{path}: {twice[0]} and {images[places[twice[0]]]} would both be {places[twice[0]]}; "
            "give the folder that holds both of them by --images"
        )
    return places


def _common_end(image: str, file: str) -> tuple[int, bool]:
    """How many parts two paths share from the end, and whether these are all of the file's."""
    parts, own = PurePosixPath(image).parts[::-1], PurePosixPath(file).parts[::-1]
    count = next(
        (n for n, pair in enumerate(zip(parts, own, strict=False)) if pair[0] != pair[1]), min(len(parts), len(own))
    )
    return count, count == len(own)


def _scale(path: str, each: Labelled, file: Path) -> float:
    """How much larger the image is than the one that was annotated."""
    if each.size is None:
        return 1.0
    if (frame := picture_frame(file)) is None:
        return 1.0
    width, height = frame.width, frame.height
    ratio = width / each.size[0], height / each.size[1]
    # A shrunk copy's sides are whole numbers of pixels, so its ratios differ by up to a pixel's worth.
    if abs(ratio[0] - ratio[1]) > max(1 / each.size[0], 1 / each.size[1]) * max(ratio):
        raise UserError(
            f"{path}: {each.image} was annotated at {each.size[0]} x {each.size[1]} pixels and has {width} x {height}"
        )
    return width / each.size[0]


def _row(project: Project, each: Labelled, file: str, scale: float) -> Row:
    box: tuple[float, float, float, float] | None = None
    if each.box is not None:
        x0, y0, x1, y1 = (side * scale for side in each.box)
        box = (x0, y0, x1, y1)
    if not each.places:
        return Row(file, box=box)
    places = [each.places.get(name, (np.nan, np.nan)) for name in project.names]
    # Sizes scale about the corner of the first pixel, places are counted from its centre.
    points = (np.array(places, np.float64) + CORNER) * scale - CORNER
    seen = np.array([name in each.places and name not in each.hidden for name in project.names])
    return Row(file, box=box, points=points, visible=seen)


def _as_rgb(read: Callable[[], np.ndarray]) -> np.ndarray:
    image = read()
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
