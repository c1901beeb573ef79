"""From discovered landmarks to named points, learnt from a handful of annotated images.

The landmarks of every image are laid onto their mean shape by an affine map; there, a named point is its mean place
plus a ridge regression on what of the landmarks' movement the map leaves over. One annotated image gives the mean
place; the more there are, the more the regression may say, and how much is settled by leaving images out.

Shape letters: N images, K landmarks, L named points. Points are (x, y) in pixels of a 256 px view.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Annotated
from unicodedata import normalize

import numpy as np
import tyro
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.table import Table

from cluster import storage
from sst.corpora import interop
from sst.corpora.annotation_files import read_annotations
from sst.corpora.annotations import Box, Row, is_inside, place_annotations
from sst.corpora.listing import Listing, sort_in
from sst.corpora.packing import UnusableImage
from sst.corpora.pictures import several_note, white_level
from sst.errors import GivenPath, UserError
from sst.predict.predictor import Found, in_image, in_view, needs_boxes, open_model, predict, white_of
from sst.predict.shape import VIEW, _map_back, affine_maps, lay_on, left_over, mean_shape
from sst.predict.sources import Target
from sst.progress import with_progress
from sst.train.model import record_url

MIN_FOR_REGRESSION = 5
"""With fewer images a named point only follows the affine map."""


RIDGES = tuple(10.0**power for power in range(0, 8))
"""Ridge weights among which leaving images out decides; the last leaves next to nothing of the regression."""


REACH = 25.0
"""A named point's confidence is that of the landmarks around it, weighted by exp(-distance / REACH)."""

FAINT = 0.1
"""Landmarks below this confidence are not used."""


class NamedPoints(BaseModel):
    """The regression, as it is stored in names.json beside the model.

    Attributes:
        names: of the L points.
        images: annotated images that it was learnt from.
        model: sha256 of the weights that it belongs to.
        used: (K,) whether a landmark was seen on any annotated image; the others are left alone.
        shape: (K, 2) mean shape of the landmarks.
        places: (L, 2) mean places of the points on that shape.
        weights: (2K, 2L) from left-over movements of the landmarks to those of the points.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    names: list[str]
    images: int
    model: str = ""
    used: list[bool]
    shape: list[tuple[float, float]]
    places: list[tuple[float, float]]
    weights: list[list[float]]

    def apply(self, points_NK2: np.ndarray, confidence_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Named points of images.

        Args:
            points_NK2: landmarks.
            confidence_NK: how sure the network is of them.

        Returns:
            float64 (N, L, 2) and confidences (N, L).
        """
        shape, places = np.array(self.shape), np.array(self.places)
        surety = sureties(confidence_NK) * np.array(self.used)
        maps = affine_maps(points_NK2, surety, shape)
        moved = left_over(maps, points_NK2, surety, shape) @ np.array(self.weights)
        named = _map_back(maps, places + moved.reshape(len(points_NK2), -1, 2))
        near = np.exp(-np.linalg.norm(places[:, None] - shape, axis=-1) / REACH) * np.array(self.used) + 1e-12
        return named, confidence_NK @ (near / near.sum(1, keepdims=True)).T

    def on_image(self, points_K2: np.ndarray, confidence_K: np.ndarray, box: Box) -> tuple[np.ndarray, np.ndarray]:
        """Named points (L, 2) and confidences (L,) of one object; points in pixels of its image."""
        points, confidence = self.apply(in_view(points_K2, box, VIEW)[None], confidence_K[None])
        return in_image(points[0] / VIEW, box), confidence[0]


def sureties(confidence_NK: np.ndarray) -> np.ndarray:
    """Weight of every landmark: its confidence, or none where it is faint."""
    return np.where(confidence_NK >= FAINT, confidence_NK, 0.0).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Examples:
    """Annotated images.

    Attributes:
        points: (N, K, 2) landmarks.
        confidence: (N, K).
        targets: (N, L, 2) named points, NaN where unknown.
    """

    points: np.ndarray
    confidence: np.ndarray
    targets: np.ndarray

    def subset(self, rows: np.ndarray) -> "Examples":
        """Some of the images."""
        return Examples(self.points[rows], self.confidence[rows], self.targets[rows])


def learn(examples: Examples, names: list[str], model: str = "") -> NamedPoints:
    """Learns the named points.

    Args:
        examples: at least one image, on which every point is known at least once.
        names: of the L points.
        model: sha256 of the detector's weights.

    Raises:
        UserError: if a point is annotated on no image.
    """
    known = np.isfinite(examples.targets).all(-1)
    if missing := [name for name, seen in zip(names, known.any(0), strict=True) if not seen]:
        raise UserError(
            f"{', '.join(missing[:5])}: annotated on no image, so it can't be learnt; leave it out or add it"
        )
    surety = sureties(examples.confidence)
    shape = mean_shape(examples.points, surety)
    maps = affine_maps(examples.points, surety, shape)
    features = left_over(maps, examples.points, surety, shape)
    targets = lay_on(maps, np.where(known[..., None], examples.targets, 0.0))
    ridge = best_ridge(features, targets, known)
    places, weights = zip(
        *(_regress(features, targets, known, point, ridge) for point in range(len(names))), strict=True
    )
    return NamedPoints(
        names=names,
        images=len(examples.points),
        model=model,
        used=[bool(each.any()) for each in surety.T],
        shape=[(x, y) for x, y in shape.round(4).tolist()],
        places=[(x, y) for x, y in np.stack(places).round(4).tolist()],
        weights=np.stack(weights, 1).reshape(features.shape[1], -1).round(6).tolist(),
    )


def _regress(
    features_NF: np.ndarray, targets_NL2: np.ndarray, known_NL: np.ndarray, point: int, ridge: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean place (2,) and weights (F, 2) of one point; without a ridge the weights are zero."""
    rows = known_NL[:, point]
    each, target = features_NF[rows], targets_NL2[rows, point]
    place = target.mean(0)
    if ridge is None or len(each) < MIN_FOR_REGRESSION:
        return place, np.zeros((each.shape[1], 2))
    # The shape is the landmarks' zero, so the place is fitted with the weights (an unpenalised constant).
    centred = each - each.mean(0)
    weights = np.linalg.solve(centred.T @ centred + ridge * np.eye(each.shape[1]), centred.T @ (target - place))
    return place - each.mean(0) @ weights, weights


def best_ridge(features_NF: np.ndarray, targets_NL2: np.ndarray, known_NL: np.ndarray) -> float | None:
    """The ridge weight under which images that are left out one by one are predicted best; None for no regression.

    Left-out errors follow from the hat matrix, without fitting again (Golub, Heath and Wahba 1979).
    """
    if len(features_NF) < MIN_FOR_REGRESSION:
        return None
    errors = np.zeros(len(RIDGES) + 1)
    for point in range(targets_NL2.shape[1]):
        rows = known_NL[:, point]
        if rows.sum() >= MIN_FOR_REGRESSION:
            each = left_out_errors(features_NF[rows], targets_NL2[rows, point], (*RIDGES, np.inf))
            errors += np.linalg.norm(each, axis=-1).mean(1)
    best = int(errors.argmin())
    return RIDGES[best] if best < len(RIDGES) else None


def left_out_errors(features_NF: np.ndarray, target_N2: np.ndarray, ridges: Sequence[float]) -> np.ndarray:
    """Errors (R, N, 2) of each image's point when a ridge regression with a constant is fitted on all others."""
    count = len(features_NF)
    left, singular, _ = np.linalg.svd(features_NF - features_NF.mean(0), full_matrices=False)
    target = target_N2 - target_N2.mean(0)
    errors = []
    for ridge in ridges:
        hat = (left * (singular**2 / (singular**2 + ridge))) @ left.T + 1 / count
        errors.append((target - hat @ target) / (1 - np.diag(hat))[:, None])
    return np.stack(errors)


def curve(
    examples: Examples, held_out: Examples, counts: tuple[int, ...], draws: int = 10, seed: int = 0
) -> dict[int, np.ndarray]:
    """Errors on held-out images when learning from few, by number of images.

    Args:
        examples: images to draw from.
        held_out: images to measure on.
        counts: numbers of annotated images to try; those above N are left out.
        draws: random choices of so many images each.
        seed: of the choices.

    Returns:
        Number of images: float64 (N', L), mean distance in pixels of a 256 px view, NaN where unknown.
    """
    names = [str(number) for number in range(examples.targets.shape[1])]
    rng = np.random.default_rng(seed)
    errors = {}
    for count in (count for count in counts if count <= len(examples.points)):
        distances = []
        for _ in range(draws if count < len(examples.points) else 1):
            chosen = examples.subset(rng.choice(len(examples.points), count, replace=False))
            if not np.isfinite(chosen.targets).all(-1).any(0).all():
                continue
            named, _ = learn(chosen, names).apply(held_out.points, held_out.confidence)
            distances.append(np.linalg.norm(named - held_out.targets, axis=-1))
        if distances:
            errors[count] = np.mean(distances, 0)
    return errors


def save_names(url: str, named: NamedPoints) -> None:
    """Writes names.json beside a model."""
    storage.write_json(storage.join(url, "names.json"), named.model_dump())


def load_names(url: str) -> NamedPoints | None:
    """The named points of the model at `url`; None if `landmarks name` has not been used on it.

    Raises:
        UserError: if names.json is damaged, or was learnt for other weights.
    """
    path = storage.join(url, "names.json")
    if not storage.exists(path):
        return None
    try:
        named = NamedPoints.model_validate(storage.read_json(path))
    except (ValidationError, ValueError) as error:
        raise UserError(f"{path}: not named points ({type(error).__name__}); run `landmarks name` again") from error
    if named.model != storage.read_json(record_url(url))["weights"]:
        raise UserError(
            f"{path}: learnt for another model than the one beside it; run `landmarks name` again, or remove it"
        )
    return named


COUNTS = (1, 5, 10, 50, 300)


HELD_OUT = 0.3
"""Share of the images that errors are measured on, when there are enough."""


class Name(BaseModel):
    """Which model gets names, and from what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[GivenPath, tyro.conf.Positional]
    """Run directory of `landmarks train`, or the model/ directory in it."""
    annotations: GivenPath
    """COCO keypoints (.json), CSV (file, x0, y0, x1, y1, ...), or a project of DeepLabCut (config.yaml), SLEAP (.slp),
    Label Studio (.json), CVAT (.xml) or NWB (.nwb); boxes in it are used as by `landmarks pack`."""
    images: GivenPath | None = None
    """Folder of the images; by default the one that the annotation file lies in."""
    category: str | None = None
    """Category of the annotated objects, where the file has several."""


def annotated_examples(config: Name) -> tuple[Examples, list[str], str, str]:
    """Landmarks and annotated points of the images that are annotated.

    Returns:
        The examples, the points' names, the model's directory and the hash of its weights.

    Raises:
        UserError: if nothing is annotated, or an image is missing or unreadable.
    """
    model, record, place = open_model(config.model)
    rows, names, frames = annotated_rows(config)
    if needs_boxes(record) and all(row.box is None for row in rows):
        print(
            f"note: this model learnt from boxes around the objects, and {config.annotations} has none, so its images "
            "are seen whole; unless they are cropped to the object, annotate where boxes can be given too"
        )
    root = folder_of(config)
    white = white_of(record) or white_level(root / row.file for row in rows if row.file not in frames)
    targets = (
        Target(row.file, _frame(config, row.file, frames[row.file]), row.box)
        if row.file in frames
        else Target(row.file, root / row.file, row.box, white=white)
        for row in rows
    )
    results = predict(model, record.network.input_size, targets)
    points, confidence, wanted = [], [], []
    for row, found in zip(rows, with_progress(results, "finding landmarks", len(rows)), strict=True):
        if not isinstance(found, Found):
            raise UserError(f"{found.file}: {found.reason}; mend it or take it out of {config.annotations}")
        assert row.points is not None
        points.append(in_view(found.points, found.box, VIEW))
        confidence.append(found.confidence)
        seen = np.where(is_inside(row.points, *found.size)[:, None], row.points, np.nan)
        wanted.append(in_view(seen, found.box, VIEW))
    return Examples(np.stack(points), np.stack(confidence), np.stack(wanted)), names, place, record.weights


def folder_of(config: Name) -> Path:
    """Where the images are."""
    given = Path(config.annotations)
    return Path(config.images or (given if given.is_dir() else given.parent))


def annotated_rows(config: Name) -> tuple[list[Row], list[str], Mapping[str, Callable[[], np.ndarray]]]:
    """Objects with at least one annotated point, the points' names, and frames of videos by the rows' `file`.

    What is odd about the annotations is printed.

    Raises:
        UserError: if nothing is annotated, or an image is missing.
    """
    root = folder_of(config)
    frames: Mapping[str, Callable[[], np.ndarray]] = {}
    if interop.is_project(config.annotations):
        project = interop.annotated(config.annotations, root, category=config.category)
        read, frames = project.annotations, project.frames
    else:
        read = read_annotations(config.annotations, config.category)
    rows = [row for row in read.rows if _has_points(row)]
    if not rows:
        raise UserError(f"{config.annotations}: no annotated points in it; annotate a handful of images")
    still = tuple(row for row in rows if row.file not in frames)
    below = {row.file: _files_below(root, row.file) for row in still}
    files = {file: root / file for each in below.values() for file in each}
    if missing := [row.file for row in still if not below[row.file]]:
        raise UserError(
            f"{config.annotations}: {len(missing)} of {len(rows)} annotated images are not in {root}: "
            f"{', '.join(missing[:5])}; say where they are by --images"
        )
    placed = place_annotations(replace(read, rows=still), files, f"in {root}")
    for note in (*(f"{config.annotations}: {each}" for each in placed.notes), *several_note(files)):
        print(f"note: {note}")
    rows = [row for row in (*placed.rows, *(row for row in rows if row.file in frames)) if _has_points(row)]
    return rows, list(placed.point_names), frames


def _has_points(row: Row) -> bool:
    return row.points is not None and bool(np.isfinite(row.points).all(-1).any())


def _frame(config: Name, file: str, read: Callable[[], np.ndarray]) -> np.ndarray:
    """A frame of a video, read when it is needed."""
    try:
        return read()
    except UnusableImage as error:
        raise UserError(f"{file}: {error}; mend it or take it out of {config.annotations}") from error


def _files_below(root: Path, name: str) -> list[str]:
    """The file that an annotation means, by its name or without leading folders; else pictures without their ending.

    Only these places are looked at, since the folder of an annotation file may be a home directory.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    ends = ["/".join(parts[start:]) for start in range(len(parts))]
    choices = [normalize(form, end) for end in ends if not end.startswith("/") for form in ("NFC", "NFD")]
    if there := next((each for each in choices if (root / each).is_file()), None):
        return [there]
    for place in (root / each for each in choices):
        listing = Listing()
        for file in place.parent.glob(f"{escape(place.name)}.*"):
            if file.stem == place.name:
                sort_in(file, file.relative_to(root).as_posix(), listing)
        if listing.names:
            return listing.names
    return []


def learn_names(config: Name) -> tuple[NamedPoints, Examples, str]:
    """Learns named points and keeps them beside the model.

    Returns:
        The points, what they were learnt from, and the file that they are in.

    Raises:
        UserError: as `annotated_examples`, and if a point is annotated on no image.
    """
    examples, names, place, weights = annotated_examples(config)
    named = learn(examples, names, weights)
    save_names(place, named)
    return named, examples, storage.join(place, "names.json")


def error_table(examples: Examples, seed: int = 0) -> Table | None:
    """Errors by number of annotated images, on images that were held out; None where there are too few to tell."""
    order = np.random.default_rng(seed).permutation(len(examples.points))
    held = int(HELD_OUT * len(order))
    if held < 2:
        return None
    rest, out = examples.subset(order[held:]), examples.subset(order[:held])
    counts = (*(count for count in COUNTS if count < len(rest.points)), len(rest.points))
    table = Table(
        "annotated images", "mean error", "worst point", title=f"errors on {held} held-out images, % of the box's side"
    )
    for count, errors in curve(rest, out, counts).items():
        by_point = np.nanmean(errors, 0)
        table.add_row(str(count), f"{100 * np.nanmean(errors) / VIEW:.2f}", f"{100 * np.nanmax(by_point) / VIEW:.2f}")
    return table
