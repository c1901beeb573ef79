"""What landmarks are predicted on: images, folders, shards and videos, with boxes."""

import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster import storage
from sst.corpora import folder
from sst.corpora.listing import Listing, by_name, pictures_in, shown, sort_in
from sst.data.shards import MANIFEST, Manifest, decode, read_shard
from sst.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")


Box = tuple[float, float, float, float]


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
        given = folder.read_annotations(boxes)
        meant = by_name(files, {row.file for row in given})
        for row in given:
            rows.setdefault(meant.get(row.file, row.file), []).append(row.box)
        if missing := sorted(set(rows) - set(files)):
            raise UserError(
                f"{boxes}: {len(missing)} of {len(rows)} files named there are not among the {len(files)} images: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
            )
    targets = [
        Target(shown(name), path, box, number)
        for name, path in files.items()
        for number, box in enumerate(rows.get(name, [None]))
    ]
    return Sources(targets, len(targets), whole=boxes is None)


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


def as_box(corners: Sequence[float] | np.ndarray) -> Box:
    """Four numbers as a box."""
    x0, y0, x1, y1 = map(float, corners)
    return x0, y0, x1, y1
