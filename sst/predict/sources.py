"""What landmarks are predicted on: images, folders, shards and videos, with boxes."""

import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cluster import storage
from sst.corpora.annotation_files import read_annotations
from sst.corpora.annotations import Annotations, Box, Category, Id, Row, place_annotations
from sst.corpora.avi import readable
from sst.corpora.interop import is_project
from sst.corpora.listing import IMAGE_SUFFIXES, Listing, is_video, pictures_in, shown, sort_in
from sst.corpora.pictures import picture_count, several_note, white_level, white_note
from sst.corpora.videos import Video
from sst.data.shards import MANIFEST, Manifest, decode, read_shard
from sst.errors import UserError


@dataclass(frozen=True, eq=False)
class Target:
    """One object to find landmarks on.

    Attributes:
        file: name of its image.
        source: what the image is read from: a file, the bytes of a stored sample, or an image already decoded.
        box: x0, y0, x1, y1 of the object in pixels of the image; for None, and for one that is unusable (as of
            `sst.corpora.packing.usable_box`), the whole image is seen.
        number: which of several objects of the same image it is.
        image_id: identifier of the image in the file that gave the boxes; None for one that it does not list.
        category: of the object, likewise.
        white: value of a 16-bit image that is white, as of `sst.corpora.pictures.white_level`.
    """

    file: str
    source: Path | np.ndarray
    box: Box | None = None
    number: int = 0
    image_id: Id | None = None
    category: Category | None = None
    white: int | None = None


@dataclass(frozen=True, eq=False)
class Sources:
    """What to predict on.

    Attributes:
        targets: the objects, read as they are asked for.
        total: how many there are (for a video, as many as it says of itself).
        whole: whether no object has a box.
        frames_per_second: of a video; None for images.
        notes: what is odd about the boxes' file; of a video, about its frames, once all are read.
    """

    targets: Iterable[Target]
    total: int
    whole: bool
    frames_per_second: float | None = None
    notes: list[str] = field(default_factory=list)


def find_sources(
    images: Sequence[str], boxes: str | None = None, category: str | None = None, white: int | None = None
) -> Sources:
    """What the person at the command line means by files, folders, patterns, a corpus or a video.

    Args:
        images: image files, folders (subfolders too) and patterns in any mixture; or one directory or URL of
            shards; or one video file.
        boxes: CSV or COCO file with boxes of the objects, several per image if need be; images that it does not
            name are seen whole.
        category: of the objects that are wanted, where the file has several.
        white: of 16-bit images, where the model knows that of its corpus; else it is that of these images.

    Raises:
        UserError: if something is not there, holds no image, or can't be mixed.
    """
    if len(images) == 1 and storage.exists(storage.join(images[0], MANIFEST)):
        return _shards(images[0], boxes)
    if videos := [name for name in images if _holds_video(name)]:
        if len(images) > 1 or boxes is not None:
            raise UserError(f"{videos[0]}: a video is predicted by itself and whole: one file, no --boxes")
        return _video(videos[0])
    files: dict[str, Path] = {}
    for name in images:
        files |= _files(name, alone=len(images) == 1)
    notes = several_note(files)
    if white is None and (white := white_level(files.values())) is not None:
        notes.append(white_note(white))
    if boxes is not None and not boxes.lower().endswith(".json") and is_project(boxes):
        raise UserError(
            f"{boxes}: --boxes takes CSV or COCO JSON, no project of an annotation tool; export its boxes as COCO"
        )
    if boxes is None:
        targets = [Target(shown(name), path, white=white) for name, path in files.items()]
        return Sources(targets, len(targets), whole=True, notes=notes)
    placed = place_annotations(read_annotations(boxes, category), files, f"among the {len(files)} images")
    return _boxed(files, placed, white, notes)


def _boxed(files: Mapping[str, Path], placed: Annotations, white: int | None, notes: list[str]) -> Sources:
    """Every object of every image, called as the annotation file calls it."""
    rows = placed.by_file()
    targets = [
        Target(
            placed.file_names.get(name, shown(name)),
            path,
            row.box,
            number,
            placed.image_ids.get(name),
            row.category,
            white,
        )
        for name, path in files.items()
        for number, row in enumerate(rows.get(name, [Row(name)]))
    ]
    notes = notes + [f"{placed.path}: {note}" for note in placed.notes]
    if not any(target.box for target in targets):
        notes.append(f"{placed.path}: no box in it, so all images are seen whole")
    return Sources(targets, len(targets), whole=all(target.box is None for target in targets), notes=notes)


def _files(name: str, alone: bool) -> dict[str, Path]:
    """Files of one argument by name; relative to a folder if that is all that was asked for."""
    path = Path(name)
    if path.is_dir():
        listing = pictures_in(name)
        listing.say()
        found = {each: path / each for each in listing.names}
        return found if alone else {(path / each).as_posix(): file for each, file in found.items()}
    if path.is_file():
        return {path.name if alone else path.as_posix(): path}
    matched = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
    listing = Listing()
    for file in matched:
        if not file.is_dir():
            sort_in(file, file.as_posix(), listing)
    listing.say()
    found = {each: Path(each) for each in listing.names}
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
                yield Target(sample.meta.source, decode(sample)[0], sample.meta.box)

    return Sources(targets(), sum(shard.samples for shard in manifest.shards), whole=False)


def _holds_video(name: str) -> bool:
    """Whether a file is a video: by its ending, or since Pillow reads no single picture of it and OpenCV opens it."""
    if is_video(name):
        return not Path(name).is_dir()
    if name.lower().endswith(IMAGE_SUFFIXES) or not Path(name).is_file():
        return False
    if (frames := picture_count(Path(name))) is not None:
        return frames > 1
    import cv2

    video = cv2.VideoCapture(name)
    return bool(video.isOpened()) and video.get(cv2.CAP_PROP_FRAME_COUNT) != 1


def _video(name: str) -> Sources:
    if not Path(name).is_file():
        raise UserError(f"{name}: no such file")
    with readable(name) as best:
        video = Video.of(name, best)
    if video is None:
        raise UserError(f"{name}: not a video that OpenCV can read; convert it to MP4 (H.264) first")
    notes: list[str] = []

    def targets() -> Iterator[Target]:
        read = 0
        for number, frame in video.frames():
            read += 1
            yield Target(f"frame_{number:06d}", np.ascontiguousarray(frame[:, :, ::-1]), image_id=number + 1)
        video.capture.release()
        notes.extend(_loss(name, read, video.told, video.sure))

    return Sources(targets(), max(1, video.stored or video.announced), True, video.rate, notes)


def _loss(name: str, read: int, told: int, sure: int | None) -> Iterator[str]:
    """What is to be said of a video of which `read` of `told` frames could be read; `sure` as of `Video`."""
    lost = f"{told - read} of {told} frames are lost, since the file is damaged or cut"
    if sure is None or sure >= told:
        if read < told:
            yield f"{name}: {lost}; the others keep their numbers"
        return
    unsure = f"the numbers after frame_{sure - 1:06d}" if sure else "their numbers"
    said = f"{lost}; the others" if read < told else "the file is damaged; its frames"
    yield f"{name}: {said} are numbered in their order, and {unsure} are not known to be right"


def as_box(corners: Sequence[float] | np.ndarray) -> Box:
    """Four numbers as a box."""
    x0, y0, x1, y1 = map(float, corners)
    return x0, y0, x1, y1
