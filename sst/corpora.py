"""From source images to stored samples: where images and annotations come from, and how one image is packed.

Conventions: points and boxes are (x, y) in pixels with pixel centres at integers, of the upright image (a
rotation noted in EXIF is applied first). Shape letters: L landmarks.
"""

import csv
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sst.errors import UserError
from sst.geometry import resize_matrix, transform_points
from sst.shards import SampleMeta, ShardWriter, Split

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 64_000_000
"""Larger images are refused before they are decoded, as a guard against decompression bombs."""
MIN_SIDE = 8
"""Images whose shorter side has fewer pixels are refused: there is nothing to learn from."""
JPEG_QUALITY = 95

T = TypeVar("T")
R = TypeVar("R")


class UnusableImage(ValueError):
    """An image that is left out of the corpus; the message is the reason."""


@dataclass(frozen=True, eq=False)
class Annotated:
    """A source image and what is annotated on it.

    Attributes:
        image: RGB uint8 (H, W, 3).
        box: x0, y0, x1, y1, or None for the whole image.
        points: float64 (L, 2), NaN where unknown; or None.
        visible: bool (L,); None for all.
    """

    image: np.ndarray
    box: tuple[float, float, float, float] | None = None
    points: np.ndarray | None = None
    visible: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Item:
    """An image with so many annotated points; `load` reads or draws it and raises `UnusableImage`."""

    source: str
    split: Split
    subject: str | None
    load: Callable[[], Annotated]
    landmarks: int | None = None


@dataclass(frozen=True, eq=False)
class Row:
    """Annotation of one object in one image file; fields as of `Annotated` and `Item`."""

    file: str
    split: str = ""
    subject: str | None = None
    box: tuple[float, float, float, float] | None = None
    points: np.ndarray | None = None
    visible: np.ndarray | None = None


@dataclass(frozen=True)
class Packed:
    """A sample to be stored, or why there is none, and which rules had to be applied."""

    jpeg: bytes
    meta: SampleMeta | None
    reason: str = ""
    notes: tuple[str, ...] = ()


def split_of(source: str, test_share: float) -> Split:
    """The split of an image that brings none: by a hash of its name, so independent of all other images."""
    number = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big")
    return "test" if number < test_share * 2.0**64 else "train"


def folder(images: str, annotations: str | None = None, test_share: float = 0.1) -> list[Item]:
    """Image files of a folder and of all folders in it, sorted by name.

    Args:
        images: the folder.
        annotations: CSV (columns file, and optionally split, subject, box_x0 to box_y1, x0, y0, x1, y1, ...;
            others are ignored), or COCO keypoints (.json). Files that it does not name have no annotation.
        test_share: share of the images without a split that become test images.

    Raises:
        UserError: if there is no such folder, no image in it, or the annotation file is unusable.
    """
    root = Path(images)
    if not root.is_dir():
        raise UserError(f"{images}: {'not a folder' if root.exists() else 'no such folder'}; give a folder of images")
    names = sorted(
        Path(base, name).relative_to(root).as_posix()
        for base, _, files in os.walk(root, followlinks=True)
        for name in files
        if name.lower().endswith(IMAGE_SUFFIXES)
    )
    if not names:
        raise UserError(f"{images}: no image in it (looked for {' '.join(IMAGE_SUFFIXES)}, in subfolders too)")
    rows: dict[str, list[Row]] = {}
    if annotations is not None:
        for row in read_annotations(annotations):
            rows.setdefault(row.file, []).append(row)
        if missing := sorted(set(rows) - set(names)):
            raise UserError(
                f"{annotations}: {len(missing)} of {len(rows)} files named there are not in {images}: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
            )
    return [
        _folder_item(root, row, name if len(found) == 1 else f"{name}#{number}", test_share)
        for name in names
        for found in [rows.get(name, [Row(name)])]
        for number, row in enumerate(found)
    ]


def _folder_item(root: Path, row: Row, source: str, test_share: float) -> Item:
    def load() -> Annotated:
        return Annotated(read_image(root / row.file), row.box, row.points, row.visible)

    # All objects of one image belong to one split, hence the hash of the file's name.
    split: Split = split_of(row.file, test_share) if not row.split else "test" if row.split == "test" else "train"
    return Item(source, split, row.subject, load, None if row.points is None else len(row.points))


def toy(count: int, seed: int, size: int, test_share: float = 0.1) -> list[Item]:
    """Images of the embedded corpus, drawn only when loaded.

    Args:
        count: number of images.
        seed: names the corpus.
        size: height and width in pixels.
        test_share: share of test images.

    Raises:
        UserError: if there would be no image.
    """
    if count < 1:
        raise UserError(f"count: at least 1 image is needed, got {count}")

    def load(index: int) -> Annotated:
        from sst.toy import draw

        drawn = draw(seed, index, size)
        return Annotated(drawn.image, drawn.box, drawn.points, drawn.visible)

    names = [f"toy-{seed}-{index:07d}" for index in range(count)]
    return [Item(name, split_of(name, test_share), None, partial(load, i)) for i, name in enumerate(names)]


def read_annotations(path: str) -> list[Row]:
    """Reads a CSV or, by its ending, COCO file.

    Raises:
        UserError: if it is missing or unusable; the message names file and place.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't read the annotations ({error})") from error
    rows = _coco(path, text) if path.lower().endswith(".json") else _csv(path, text)
    if len(counts := {len(row.points) for row in rows if row.points is not None}) > 1:
        raise UserError(f"{path}: all objects need equally many points, found {sorted(counts)}")
    if wrong := [row for row in rows if row.split not in ("", "train", "test")]:
        raise UserError(f"{path}: {wrong[0].file}: split is {wrong[0].split!r}; train, test or nothing is possible")
    return rows


def _csv(path: str, text: str) -> list[Row]:
    reader = csv.DictReader(text.splitlines())
    columns = reader.fieldnames or []
    if "file" not in columns:
        raise UserError(f"{path}: no column 'file'; its columns are {', '.join(columns[:8]) or 'none'}")
    landmarks = next(n for n in range(len(columns) + 1) if not {f"x{n}", f"y{n}"} <= set(columns))
    box_names = [f"box_{corner}" for corner in ("x0", "y0", "x1", "y1")]
    point_names = [f"{axis}{n}" for n in range(landmarks) for axis in "xy"]
    rows, seen = [], set[str]()
    for cells in reader:
        place = f"{path}, line {reader.line_num}"
        if cells["file"] in seen:
            raise UserError(f"{place}: {cells['file']} occurs twice")
        seen.add(cells["file"])
        box = [_number(place, name, cells.get(name)) for name in box_names]
        values = [_number(place, name, cells.get(name)) for name in point_names]
        rows.append(
            Row(
                file=cells["file"],
                split=cells.get("split") or "",
                subject=cells.get("subject") or None,
                box=(box[0], box[1], box[2], box[3]) if box_names[0] in columns else None,
                points=np.array(values).reshape(-1, 2) if landmarks else None,
            )
        )
    return rows


def _number(place: str, name: str, text: str | None) -> float:
    try:
        return float(text) if text else math.nan
    except ValueError:
        raise UserError(f"{place}: {name} is {text!r}, not a number") from None


def _coco(path: str, text: str) -> list[Row]:
    """Crowds are left out; a point of visibility 0 is unknown, of visibility 1 hidden."""
    try:
        content = json.loads(text)
        images: dict[Any, dict[str, Any]] = {image["id"]: image for image in content["images"]}
        rows = []
        for entry in content["annotations"]:
            if entry.get("iscrowd"):
                continue
            image, box, points, visible = images[entry["image_id"]], None, None, None
            if "bbox" in entry:
                x, y, width, height = map(float, entry["bbox"])
                box = (x, y, x + width, y + height)
            if "keypoints" in entry:
                triples = np.array(entry["keypoints"], np.float64).reshape(-1, 3)
                points = np.where(triples[:, 2:] > 0, triples[:, :2], np.nan)
                visible = triples[:, 2] > 1
            subject = entry.get("subject", image.get("subject"))
            subject = None if subject is None else str(subject)
            rows.append(Row(str(image["file_name"]), str(image.get("split") or ""), subject, box, points, visible))
        return rows
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not COCO keypoints JSON ({type(error).__name__}: {error})") from error


def read_image(path: Path) -> np.ndarray:
    """Reads an image file as RGB uint8 (H, W, 3), upright.

    Rules: an EXIF rotation is applied; grey becomes three equal channels; CMYK is converted by its plain
    inverse; 16-bit grey is divided by 257, and 32-bit integer grey likewise after clipping; transparency is
    laid over white; of an animation the first picture is taken. Refused: floating-point pixels, more than
    `MAX_PIXELS`, a side below `MIN_SIDE`.

    Raises:
        UnusableImage: if the file is refused, cut short or not an image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            if file.width * file.height > MAX_PIXELS:
                raise UnusableImage(f"{file.width} x {file.height} pixels; at most {MAX_PIXELS} are permitted")
            if min(file.width, file.height) < MIN_SIDE:
                raise UnusableImage(f"{file.width} x {file.height} pixels; {MIN_SIDE} is the least side")
            return _to_rgb(ImageOps.exif_transpose(file))
    except UnusableImage:
        raise
    except Exception as error:  # Pillow raises many types on damaged input
        reason = str(error).replace(str(path), path.name)  # a manifest should name no path of a machine
        raise UnusableImage(f"unreadable ({type(error).__name__}: {reason})") from error


def _to_rgb(image: Any) -> np.ndarray:
    from PIL import Image

    if image.mode == "F":
        raise UnusableImage("floating-point pixels have no stated range")
    if image.mode.startswith("I"):
        grey = np.rint(np.clip(np.asarray(image).astype(np.int64), 0, 65535) / 257)
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(image.convert("RGB"))


def pack_item(item: Item, context: float = 2.0, size: int | None = 256) -> Packed:
    """Loads an image, crops it to its box with context, and shrinks it to what is needed.

    The box is clipped to the image; without a box, or with one under 2 pixels wide or high or with a NaN, the
    whole image (0, 0, W, H) is taken. A point that is NaN is stored at the box centre, not visible; one
    outside the stored image is not visible.

    Args:
        item: the image.
        context: sides of the crop as a multiple of the box's, about its centre, clipped to the image.
        size: pixels that the longer side of the box is shrunk to where it is longer; None for never.

    Returns:
        The sample; without `meta` but with a reason where the image can't be used.
    """
    import cv2
    import simplejpeg

    try:
        source = item.load()
    except UnusableImage as error:
        return Packed(b"", None, str(error))
    notes = []
    height, width = source.image.shape[:2]
    whole = np.array([0.0, 0.0, width, height])
    box = whole
    if source.box is not None:
        clipped = np.clip(np.array(source.box, np.float64), 0, [width, height, width, height])
        if np.isfinite(clipped).all() and (clipped[2:] - clipped[:2] >= 2).all():
            box = clipped
        else:
            notes.append("box unusable, whole image taken")
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * max(1.0, context)
    left, top = (int(v) for v in np.maximum(0, np.floor(centre - half)))
    right, bottom = (int(v) for v in np.minimum([width, height], np.ceil(centre + half)))
    image = np.ascontiguousarray(source.image[top:bottom, left:right])
    factor = min(1.0, size / (box[2:] - box[:2]).max()) if size else 1.0
    matrix = np.array([[1.0, 0.0, -left], [0.0, 1.0, -top], [0.0, 0.0, 1.0]])
    if factor < 1:
        new = [max(1, round((right - left) * factor)), max(1, round((bottom - top) * factor))]
        # The matrix follows the whole number of pixels per axis, not the factor, so points stay exact.
        matrix = resize_matrix(new[0] / (right - left), new[1] / (bottom - top)) @ matrix
        image = cv2.resize(image, (new[0], new[1]), interpolation=cv2.INTER_AREA)
    if box is whole:
        stored_box = np.array([0.0, 0.0, image.shape[1], image.shape[0]])
    else:
        stored_box = transform_points(matrix, box.reshape(2, 2)).ravel()
    points = visible = None
    if source.points is not None:
        known = np.isfinite(source.points).all(axis=1)
        points = transform_points(matrix, np.where(known[:, None], source.points, 0.0))
        points[~known] = (stored_box[:2] + stored_box[2:]) / 2
        inside = ((points >= -0.5) & (points <= np.array(image.shape[1::-1]) - 0.5)).all(axis=1)
        visible = known & inside & (True if source.visible is None else source.visible)
        notes += ["point unknown"] * int((~known).sum()) + ["point outside"] * int((~inside).sum())
    x0, y0, x1, y1 = stored_box.round(4).tolist()
    meta = SampleMeta(
        source=item.source,
        split=item.split,
        subject=item.subject,
        box=(x0, y0, x1, y1),
        points=None if points is None else tuple((x, y) for x, y in points.round(4).tolist()),
        visible=None if visible is None else tuple(visible.tolist()),
    )
    jpeg = simplejpeg.encode_jpeg(image, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")
    return Packed(jpeg, meta, notes=tuple(notes))


def shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """Training items, then test items, each in a random order, so that shards are alike."""
    order = np.random.default_rng(seed).permutation(len(items))
    return sorted((items[i] for i in order), key=lambda item: item.split == "test")


def pack(
    items: Iterable[Item], writer: ShardWriter, context: float, size: int | None, max_skipped: float
) -> Counter[str]:
    """Packs the items in order into the writer's corpus; on failure nothing of it is left.

    Args:
        items: images; those of one split should follow one another.
        writer: not yet entered.
        context: as of `pack_item`.
        size: as of `pack_item`.
        max_skipped: share of unusable images above which packing fails.

    Returns:
        How often each rule for bad annotations had to be applied.

    Raises:
        UserError: if too many images are unusable, or all.
    """
    notes: Counter[str] = Counter()
    skipped, total = [], 0
    with writer:
        for item, packed in ordered_map(lambda item: (item, pack_item(item, context, size)), items):
            total += 1
            notes.update(packed.notes)
            if packed.meta is None:
                skipped.append(f"{item.source}: {packed.reason}")
                writer.skip(item.source, packed.reason)
            else:
                writer.add(packed.jpeg, packed.meta)
        if len(skipped) > max_skipped * total or len(skipped) == total:
            raise UserError(
                f"{len(skipped)} of {total} images can't be used; --max-skipped is {max_skipped}: "
                f"{'; '.join(skipped[:5])}{'; ...' if len(skipped) > 5 else ''}"
            )
    return notes


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int = 2, ahead: int = 16) -> Iterator[R]:
    """Maps in threads, in order, with at most `ahead` results waiting."""
    source = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="pack") as pool:
        pending = [pool.submit(function, item) for item in islice(source, ahead)]
        while pending:
            yield pending.pop(0).result()
            pending.extend(pool.submit(function, item) for item in islice(source, 1))
