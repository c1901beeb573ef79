"""The Python face of the commands: train on a folder, load a run, find its landmarks on images.

Shape letters: H, W image, K points. Points are (x, y) in pixels of the given image, with pixel centres at integers.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch

from sst.corpora.annotations import Box
from sst.corpora.packing import MIN_SIDE
from sst.corpora.pictures import white_level
from sst.errors import UserError
from sst.predict.naming import Name, learn_names, load_names
from sst.predict.predictor import Found, Unreadable, needs_boxes, open_model, predict, white_of
from sst.predict.published import import_published as import_published
from sst.predict.sources import Target, as_box
from sst.report.finish import Outcome
from sst.run.options import RunOptions
from sst.run.own import OwnCommand
from sst.run.own import train_own as run_own
from sst.run.tracking import DEFAULT_URI

Image = np.ndarray | str | Path
"""uint8 RGB (H, W, 3), or a file."""


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Points of one object.

    Attributes:
        points: float32 (K, 2), x and y in pixels of the given image.
        confidence: float32 (K,), 0 to 1.
        visible: bool (K,), whether the confidence reaches the predictor's `visible`.
        names: of the K points: "landmark_0", ..., as in the tables of `landmarks predict`.
        box: what the network looked at: x0, y0, x1, y1; the whole image unless a usable box was given.
        named: your own named points, where `name_landmarks` taught the model any; its `named` is None.
    """

    points: np.ndarray
    confidence: np.ndarray
    visible: np.ndarray
    names: tuple[str, ...]
    box: Box
    named: "Landmarks | None" = None


class Predictor:
    """A trained model that finds its landmarks on images; `load` makes one."""

    def __init__(self, url: str, visible: float | None = None, device: str | None = None) -> None:
        """Reads the model; see `load`."""
        model, self._record, place = open_model(url)
        self._model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._named = load_names(place)
        self.visible = self._record.visible if visible is None else visible
        self.names = tuple(f"landmark_{number}" for number in range(len(self._record.clusters)))

    @overload
    def __call__(self, images: Image, boxes: Sequence[float] | None = None) -> Landmarks: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(
        self, images: Sequence[Image], boxes: Sequence[Sequence[float] | None] | None = None
    ) -> list[Landmarks]: ...

    def __call__(self, images, boxes=None):  # type: ignore[no-untyped-def]
        """Landmarks of one image, or of each of a list, which is read and computed in batches.

        Args:
            images: an image or a list of images, each a uint8 RGB array (H, W, 3) or a file.
            boxes: x0, y0, x1, y1 of the object in the image; for a list, one (or None) for each. Without a box, or with
                one that covers less than 2 pixels of the image, the whole image is seen.

        Raises:
            TypeError: if an image is neither such an array nor a path.
            ValueError: if there are not as many boxes as images.
            UserError: if a file is no usable image, or an image has a side of less than 8 pixels.
        """
        if isinstance(images, Sequence) and not isinstance(images, str):
            return list(self._found(images, [None] * len(images) if boxes is None else boxes))
        return next(self._found([images], [boxes]))

    def _found(self, images: Sequence[Image], boxes: Sequence[Sequence[float] | None]) -> Iterator[Landmarks]:
        pairs = enumerate(zip(images, boxes, strict=True))
        white = white_of(self._record) or white_level(Path(image) for image in images if isinstance(image, str | Path))
        targets = [_target(number, image, box, white) for number, (image, box) in pairs]
        if needs_boxes(self._record) and any(box is None for box in boxes):
            warnings.warn("this model learnt from boxes around the objects, and images are seen whole; unless they are "
                          "cropped to the object, give boxes", stacklevel=3)  # fmt: skip
        for result in predict(self._model, self._record.network.input_size, targets):
            if isinstance(result, Unreadable):
                raise UserError(f"{result.file}: {result.reason}")
            yield self._landmarks(result)

    def _landmarks(self, found: Found) -> Landmarks:
        named = None
        if self._named is not None:
            points, sure = self._named.on_image(found.points, found.confidence, found.box)
            named = Landmarks(
                points, sure.astype(np.float32), sure >= self.visible, tuple(self._named.names), found.box
            )
        seen = found.confidence >= self.visible
        return Landmarks(found.points, found.confidence, seen, self.names, found.box, named)


def _target(number: int, image: Image, box: Sequence[float] | None, white: int | None) -> Target:
    place = None if box is None else as_box(box)
    if isinstance(image, str | Path):
        return Target(str(image), Path(image), place, white=white)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        what = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"image {number} is {what}; give a uint8 RGB array (H, W, 3), a path, or a list of these")
    if min(image.shape[:2]) < MIN_SIDE:
        raise UserError(f"image {number}: {image.shape[1]} x {image.shape[0]} pixels; {MIN_SIDE} is the least side")
    return Target(f"image {number}", np.ascontiguousarray(image), place)


def load(run: str | Path | Outcome, *, visible: float | None = None, device: str | None = None) -> Predictor:
    """A predictor from a finished run.

    Args:
        run: directory or URL of a run, or of its model; or what `train_own` gave.
        visible: confidence from which a point counts as visible, instead of the model's own.
        device: to compute on, as torch names it; by default a GPU where there is one.

    Raises:
        UserError: if there is no model, or it is damaged.
    """
    return Predictor(_url(run), visible, device)


def train_own(
    images: str | Path,
    landmarks: int = 20,
    *,
    annotations: str | Path | None = None,
    category: str | None = None,
    name: str | None = None,
    minutes: float | None = None,
    runs: str | Path = "runs",
    tracking: str = DEFAULT_URI,
    experiment: str = "landmarks",
    register: str | None = None,
    stop_when_unwell: bool = False,
    as_packed: bool = False,
) -> Outcome:
    """Trains on a folder of your own images, or goes on with that: the same as `landmarks train own`.

    It starts Ray in this process, unless it is running; `ray.shutdown()` gives its memory back.

    Args:
        images: folder of images of one kind of object; subfolders are searched too.
        landmarks: how many are wanted.
        annotations: CSV or COCO file with boxes of the objects, where they do not fill the images; points in it are
            for scoring only.
        category: of the annotated objects, where the file has several; or "all".
        name: of the run; by default that of the folder.
        minutes: how long it may take from the first keypoints to the report, 5 or more; by default as long as the
            schedule takes.
        runs: directory or URL under which runs lie.
        tracking: MLflow tracking URI.
        experiment: MLflow experiment.
        register: name under which the finished model becomes a new version in MLflow's model registry.
        stop_when_unwell: whether the run ends at a sign that it comes to nothing, not only warns.
        as_packed: whether it goes on with the pictures and boxes that it packed, although they have changed.

    Returns:
        What came out: `landmarks`, `scores`, `report` and more; `load` takes it too.

    Raises:
        ValueError: if an argument is out of its range.
        UserError: if the images or the machine do not permit it, or a run of that name was begun otherwise.
        RunFailedError: if training failed; the same call goes on from the last checkpoint.
    """
    where = RunOptions(runs=str(runs), tracking=tracking, experiment=experiment, register_as=register)
    table = None if annotations is None else str(annotations)
    return run_own(
        OwnCommand(
            images=str(images),
            landmarks=landmarks,
            annotations=table,
            category=category,
            name=name,
            minutes=minutes,
            stop_when_unwell=stop_when_unwell,
            as_packed=as_packed,
            where=where,
        )
    )


def name_landmarks(
    run: str | Path | Outcome,
    annotations: str | Path,
    images: str | Path | None = None,
    *,
    category: str | None = None,
) -> tuple[str, ...]:
    """Teaches a model your own named points, from a handful of annotated images: the same as `landmarks name`.

    Predictors that are loaded afterwards give them as `Landmarks.named`.

    Args:
        run: as `load` takes it.
        annotations: COCO keypoints (.json), or CSV (file, x0, y0, x1, y1, ...).
        images: folder of the images; by default the one that the annotation file lies in.
        category: of the annotated objects, where the file has several.

    Returns:
        The names.

    Raises:
        UserError: if there is no model, nothing is annotated, or an image is missing or unreadable.
    """
    folder = None if images is None else str(images)
    named, _, _ = learn_names(Name(model=_url(run), annotations=str(annotations), images=folder, category=category))
    return tuple(named.names)


def _url(run: str | Path | Outcome) -> str:
    return run.run.url if isinstance(run, Outcome) else str(run)
