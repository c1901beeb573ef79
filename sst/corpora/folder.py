"""A folder of image files, with or without annotations in a CSV or COCO file."""

import csv
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sst.corpora.packing import Item, SourceImage, read_image, split_of
from sst.data.shards import Split
from sst.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class Row:
    """Annotation of one object in one image file; fields as of `SourceImage` and `Item`."""

    file: str
    split: str = ""
    subject: str | None = None
    box: tuple[float, float, float, float] | None = None
    points: np.ndarray | None = None
    visible: np.ndarray | None = None


def items(images: str, annotations: str | None = None, test_share: float = 0.1) -> list[Item]:
    """Image files of a folder and of all folders in it, sorted by name.

    Args:
        images: the folder.
        annotations: CSV (columns file, and optionally split, subject, box_x0 to box_y1, x0, y0, x1, y1, ...;
            others are ignored), COCO keypoints (.json), or a project of another tool (`sst.corpora.interop`).
            Files that it does not name have no annotation.
        test_share: share of the images without a split that become test images.

    Raises:
        UserError: if there is no such folder, no image in it, or the annotation file is unusable.
    """
    from sst.corpora import interop  # which reads folders too

    root = Path(images)
    if not root.is_dir():
        raise UserError(f"{images}: {'not a folder' if root.exists() else 'no such folder'}; give a folder of images")
    if annotations is not None and interop.is_project(annotations):
        return interop.items(images, annotations, test_share)
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
    def load() -> SourceImage:
        return SourceImage(read_image(root / row.file), row.box, row.points, row.visible)

    # All objects of one image belong to one split, hence the hash of the file's name.
    split: Split = split_of(row.file, test_share) if not row.split else "test" if row.split == "test" else "train"
    return Item(source, split, row.subject, load, None if row.points is None else len(row.points))


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


def point_names(path: str, count: int) -> list[str]:
    """What the annotated points are called: as a COCO file's categories say, else "point_0", "point_1", ..."""
    if path.lower().endswith(".json"):
        categories = json.loads(Path(path).read_text(encoding="utf-8-sig")).get("categories")
        for category in categories if isinstance(categories, list) else ():
            names = category.get("keypoints") if isinstance(category, dict) else None
            if isinstance(names, list) and len(names) == count:
                return [str(name) for name in names]
    return [f"point_{number}" for number in range(count)]


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
