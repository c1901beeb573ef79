"""Predicts on what was named and writes tables and pictures."""

import errno
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import cv2
import numpy as np
import simplejpeg
import torch
import tyro
from pydantic import BaseModel, ConfigDict, Field

from cluster import storage
from sst.corpora.listing import shown
from sst.data.shards import MANIFEST
from sst.errors import GivenPath, UserError
from sst.outputs import Outputs, refuse_overlap
from sst.predict.naming import NamedPoints, load_names
from sst.predict.overlay import draw_landmarks
from sst.predict.predictor import Found, Unreadable, needs_boxes, open_model, predict, white_of
from sst.predict.projects import FILES, Media, Tool, check_tools, project_files
from sst.predict.sources import find_sources
from sst.predict.tables import Rows, as_coco, as_csv
from sst.progress import with_progress

STEM_BYTES = 200
"""Bytes of an image's name that a picture's name takes up; file systems permit 255 in all."""

OUTPUTS = (
    *("predictions.json", "predictions.csv", "named.json", "named.csv", "pictures", "named_pictures", "video.mp4"),
    *FILES,
)


class Predict(BaseModel):
    """What is predicted with what, and where it is written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[GivenPath, tyro.conf.Positional]
    """Run directory of `landmarks train`, or the model/ directory in it."""
    images: Annotated[tuple[GivenPath, ...], tyro.conf.Positional]
    """Image files, folders and patterns; or one directory of shards; or one video file."""
    out: GivenPath
    """Directory or URL that the predictions are written to."""
    boxes: GivenPath | None = None
    """CSV or COCO file with boxes of the objects, as for `landmarks pack`; without it images are seen whole."""
    category: str | None = None
    """Category of the objects in --boxes, where it has several; or "all"."""
    visible: Annotated[float | None, Field(ge=0, le=1)] = None
    """Confidence from which a landmark counts as visible, instead of the model's own."""
    pictures: Annotated[int, Field(ge=0)] = 200
    """At most so many pictures are drawn; every frame of a video is."""
    projects: tuple[Tool, ...] = ()
    """Annotation tools that the predictions are also written for; the named points, where there are names."""
    overwrite: bool = False
    """Replace earlier predictions in --out."""


class Pictures:
    """Writes drawn images one by one, as files or as frames of a video."""

    def __init__(self, outputs: Outputs, maximum: int, frames_per_second: float | None, video: str) -> None:
        """Begins; a video is drawn into the local file `video` first."""
        self._outputs, self._maximum, self._rate, self._video = outputs, maximum, frames_per_second, video
        self._writer: Any = None
        self._frames = self.drawn = 0

    def add(self, folder: str, name: str, image: np.ndarray) -> None:
        """Writes one image, as the next frame or as FOLDER/NUMBER_NAME.jpg while there are not too many."""
        if self._rate is None:
            data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), 90, colorsubsampling="420")
            self._outputs.write(f"{folder}/{self.drawn:05d}_{file_stem(name)}.jpg", data)
            return
        if self._writer is None:
            size = (image.shape[1], image.shape[0])
            self._writer = cv2.VideoWriter(self._video, cv2.VideoWriter.fourcc(*"mp4v"), self._rate, size)
        self._writer.write(np.ascontiguousarray(image[:, :, ::-1]))
        self._frames += 1

    @property
    def is_video(self) -> bool:
        """Whether the images are frames of one video."""
        return self._rate is not None

    @property
    def wanted(self) -> bool:
        """Whether there may be more."""
        return self._rate is not None or self.drawn < self._maximum

    def close(self) -> None:
        """Hands a video over.

        Raises:
            OSError: if it could not be written whole, of which OpenCV says nothing.
        """
        if self._writer is None:
            return
        self._writer.release()
        video = cv2.VideoCapture(self._video)
        whole = self._frames == int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        video.release()
        if not whole:
            raise OSError(errno.ENOSPC, f"no room for a video of {self._frames} frames", self._video)
        self._outputs.write("video.mp4", Path(self._video).read_bytes())


def file_stem(name: str) -> str:
    """The name of a file or frame without folder and ending, short enough to be a part of another file's name."""
    stem = shown(PurePosixPath(name).stem).encode()
    return stem[:STEM_BYTES].decode(errors="ignore")


@contextmanager
def opened(config: Predict, outputs: Outputs, frames_per_second: float | None) -> Iterator[Pictures]:
    """The writer of pictures."""
    with tempfile.TemporaryDirectory() as scratch:
        pictures = Pictures(outputs, config.pictures, frames_per_second, str(Path(scratch, "video.mp4")))
        yield pictures
        pictures.close()


@dataclass
class Collected:
    """What was predicted so far: the landmarks of each image, named points where there are names, and failures."""

    names: NamedPoints | None
    visible: float
    found: list[Found] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    named: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def add(self, result: Found, pictures: Pictures) -> None:
        """Keeps an image's points, and draws them while pictures are wanted."""
        self.found.append(result.without_picture())
        if isinstance(result.target.source, Path):
            self.files.append(result.target.source)
        drawings = [("pictures", result.points, result.confidence, [str(k) for k in range(len(result.points))])]
        if self.names is not None:
            points, confidence = self.names.on_image(result.points, result.confidence, result.box)
            self.named.append((points, confidence))
            if not pictures.is_video:
                drawings.append(("named_pictures", points, confidence, self.names.names))
        if not pictures.wanted:
            return
        scale = np.array(result.picture.shape[1::-1]) / result.size  # the sides of a strip round differently
        for folder, points, confidence, labels in drawings:
            drawn = draw_landmarks(result.picture, points * scale, confidence >= self.visible, labels)
            pictures.add(folder, result.target.file, drawn)
        pictures.drawn += 1

    def tables(self) -> dict[str, Rows]:
        """The tables to be written, by file name."""
        rows = [(item.points, item.confidence) for item in self.found]
        labels = [f"landmark_{number}" for number in range(len(rows[0][0]))]
        tables = {"predictions": self._rows(labels, rows)}
        if self.names is not None:
            tables["named"] = self._rows(self.names.names, self.named)
        return tables

    def _rows(self, labels: Sequence[str], rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Rows:
        targets = [item.target for item in self.found]
        sizes, boxes = zip(*((item.size, item.box) for item in self.found), strict=True)
        points, confidence = (np.stack(each) for each in zip(*rows, strict=True))
        return Rows(labels, targets, sizes, boxes, points, confidence, self.visible)


def write_predictions(config: Predict) -> None:
    """Predicts, writes and says what it did.

    Raises:
        UserError: if there is no model, nothing to predict on, or none of it is readable.
    """
    model, record, place = open_model(config.model)
    if not config.images:
        raise UserError("no images are named; give files, folders, patterns, one directory of shards or one video")
    for name in config.images:
        refuse_overlap(config.out, {"the input": name})
    refuse_overlap(config.out, {"--boxes": config.boxes, "the model": place})
    outputs = Outputs(config.out, "predict", config.overwrite, OUTPUTS)
    sources = find_sources(config.images, config.boxes, config.category, white_of(record))
    shards = len(config.images) == 1 and storage.exists(storage.join(config.images[0], MANIFEST))
    check_tools(config.projects, shards, video=sources.frames_per_second is not None)
    told = len(sources.notes)
    for note in sources.notes:
        print(f"note: {note}")
    if sources.whole and needs_boxes(record):
        print(
            "note: this model learnt from boxes around the objects, and these images are seen whole; unless they are "
            "cropped to the object, give its box in each by --boxes",
            file=sys.stderr,
        )
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    collected = Collected(load_names(place), record.visible if config.visible is None else config.visible)
    with outputs, opened(config, outputs, sources.frames_per_second) as pictures:
        results = predict(model, record.network.input_size, sources.targets, pictures=True)
        for result in with_progress(results, "predicting", sources.total):
            if isinstance(result, Unreadable):
                collected.unreadable.append(result)
            else:
                collected.add(result, pictures)
        for note in sources.notes[told:]:
            print(f"note: {note}")
        tables = tables_of(config, collected)
        for name, table in tables.items():
            outputs.write(f"{name}.csv", as_csv(table).encode())
            outputs.write(f"{name}.json", storage.as_json(as_coco(table, collected.unreadable)))
        video = Path(config.images[0]) if sources.frames_per_second is not None else None
        media = Media(collected.files, video, sources.frames_per_second)
        for tool in config.projects:
            for name, data in project_files(tool, tables.get("named", tables["predictions"]), media):
                outputs.write(name, data)
    say(config, tables["predictions"], collected)


def tables_of(config: Predict, collected: Collected) -> dict[str, Rows]:
    """The tables to be written, by name.

    Raises:
        UserError: if there is nothing in them.
    """
    if collected.found:
        return collected.tables()
    unreadable = collected.unreadable
    raise UserError(
        f"none of {len(unreadable)} images is readable: "
        f"{'; '.join(f'{item.file}: {item.reason}' for item in unreadable[:3])}"
        if unreadable
        else f"{config.images[0]}: no frame could be read from it; convert it to MP4 (H.264) first"
    )


def say(config: Predict, table: Rows, collected: Collected) -> None:
    """Prints what was found and where it lies."""
    for item in collected.unreadable[:10]:
        print(f"unreadable {item.file}: {item.reason}")
    visible_N = (table.confidence >= collected.visible).sum(1)
    print(
        f"{len(visible_N)} objects, {visible_N.mean():.1f} of {table.confidence.shape[1]} landmarks visible on each "
        f"(confidence from {collected.visible:g}), {len(collected.unreadable)} images unreadable"
        + ("" if len(collected.unreadable) <= 10 else "; all are listed in predictions.json")
    )
    print(f"written to {config.out}: {', '.join(n for n in OUTPUTS if storage.exists(storage.join(config.out, n)))}")
