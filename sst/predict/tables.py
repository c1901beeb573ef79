"""Predictions as COCO keypoints and as CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from sst.corpora.annotations import Box, Id
from sst.predict.predictor import Unreadable
from sst.predict.sources import Target


@dataclass(frozen=True, eq=False)
class Rows:
    """Points of many objects, ready to be written.

    Attributes:
        names: of the K points.
        targets: the N objects: their images' names and identifiers.
        sizes: width and height of the images.
        boxes: of the objects.
        points: (N, K, 2).
        confidence: (N, K).
        visible: confidence from which a point counts as visible.
    """

    names: Sequence[str]
    targets: Sequence[Target]
    sizes: Sequence[tuple[int, int]]
    boxes: Sequence[Box]
    points: np.ndarray
    confidence: np.ndarray
    visible: float


def as_coco(rows: Rows, unreadable: Sequence[Unreadable]) -> dict[str, Any]:
    """The points as a COCO keypoints data set.

    A visible point has v = 2; any other has x = y = v = 0, as COCO asks for. Beyond COCO, every object has
    `keypoint_scores` (a confidence per point) and `score` (their mean over the visible ones), and images that could
    not be read are listed under `unreadable`. Identifiers of images and categories are those of the file that gave the
    boxes, so that evaluation against that file needs no mapping.
    """
    ids = _identifiers(rows.targets)
    sizes = dict(zip((target.file for target in rows.targets), rows.sizes, strict=True))
    categories = _categories(rows.targets)
    annotations = []
    for number, (target, box) in enumerate(zip(rows.targets, rows.boxes, strict=True)):
        confidence = rows.confidence[number]
        seen = confidence >= rows.visible
        triples = np.column_stack([rows.points[number], np.full(len(seen), 2)]) * seen[:, None]
        width, height = box[2] - box[0], box[3] - box[1]
        annotations.append(
            {
                "id": number + 1,
                "image_id": ids[target.file],
                "category_id": _category_of(target, categories),
                "bbox": [round(float(v), 3) for v in (box[0], box[1], width, height)],
                "area": round(float(width * height), 3),
                "iscrowd": 0,
                "keypoints": [int(v) if i % 3 == 2 else round(float(v), 3) for i, v in enumerate(triples.ravel())],
                "num_keypoints": int(seen.sum()),
                "keypoint_scores": [round(float(v), 4) for v in confidence],
                "score": round(float(confidence[seen].mean()), 4) if seen.any() else 0.0,
            }
        )
    return {
        "images": [
            {"id": number, "file_name": name, "width": sizes[name][0], "height": sizes[name][1]}
            for name, number in ids.items()
        ],
        "annotations": annotations,
        "categories": [
            {"id": identifier, "name": name, "keypoints": list(rows.names), "skeleton": []}
            for name, identifier in categories.items()
        ],
        "unreadable": [{"file_name": item.file, "reason": item.reason} for item in unreadable],
    }


def _identifiers(targets: Sequence[Target]) -> dict[str, Id]:
    """Of each image the identifier that it has already, or a number that is free."""
    given = {target.file: target.image_id for target in targets}
    taken = {value for value in given.values() if isinstance(value, int)}
    free = count(max(taken, default=0) + 1)
    return {name: next(free) if value is None else value for name, value in given.items()}


def _categories(targets: Sequence[Target]) -> dict[str, Id]:
    """The identifier of each category by name; where a file has only names, or nothing, they are numbered."""
    found = {target.category.name: target.category.identifier for target in targets if target.category is not None}
    if not found:
        return {"object": 1}
    taken = {value for value in found.values() if isinstance(value, int)}
    free = count(max(taken, default=0) + 1)
    return {name: next(free) if value is None else value for name, value in found.items()}


def _category_of(target: Target, categories: dict[str, Id]) -> Id:
    """That of the object; an image that was seen whole has the first, since it was looked at for such an object."""
    return next(iter(categories.values())) if target.category is None else categories[target.category.name]


def as_csv(rows: Rows) -> str:
    """One line per object and point: where it is, how sure the network is, and whether it counts as visible."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "object", "landmark", "x", "y", "confidence", "visible"])
    objects: dict[str, int] = {}
    for number, target in enumerate(rows.targets):
        name = target.file
        each = objects[name] = objects.get(name, -1) + 1
        for label, (x, y), sure in zip(rows.names, rows.points[number], rows.confidence[number], strict=True):
            writer.writerow([name, each, label, f"{x:.3f}", f"{y:.3f}", f"{sure:.4f}", int(sure >= rows.visible)])
    return text.getvalue()
