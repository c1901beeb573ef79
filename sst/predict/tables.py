"""Predictions as COCO keypoints and as CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sst.predict.predictor import Unreadable
from sst.predict.sources import Box


@dataclass(frozen=True, eq=False)
class Rows:
    """Points of many objects, ready to be written.

    Attributes:
        names: of the K points.
        files: image of each of N objects.
        sizes: width and height of the images.
        boxes: of the objects.
        points: (N, K, 2).
        confidence: (N, K).
        visible: confidence from which a point counts as visible.
    """

    names: Sequence[str]
    files: Sequence[str]
    sizes: Sequence[tuple[int, int]]
    boxes: Sequence[Box]
    points: np.ndarray
    confidence: np.ndarray
    visible: float


def as_coco(rows: Rows, unreadable: Sequence[Unreadable]) -> dict[str, Any]:
    """The points as a COCO keypoints data set.

    A visible point has v = 2; any other has x = y = v = 0, as COCO asks for. Beyond COCO, every object has
    `keypoint_scores` (a confidence per point) and `score` (their mean over the visible ones), and images that could
    not be read are listed under `unreadable`.
    """
    ids = {name: number for number, name in enumerate(dict.fromkeys(rows.files), start=1)}
    sizes = dict(zip(rows.files, rows.sizes, strict=True))
    annotations = []
    for number, (name, box) in enumerate(zip(rows.files, rows.boxes, strict=True)):
        confidence = rows.confidence[number]
        seen = confidence >= rows.visible
        triples = np.column_stack([rows.points[number], np.full(len(seen), 2)]) * seen[:, None]
        width, height = box[2] - box[0], box[3] - box[1]
        annotations.append(
            {
                "id": number + 1,
                "image_id": ids[name],
                "category_id": 1,
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
        "categories": [{"id": 1, "name": "object", "keypoints": list(rows.names), "skeleton": []}],
        "unreadable": [{"file_name": item.file, "reason": item.reason} for item in unreadable],
    }


def as_csv(rows: Rows) -> str:
    """One line per object and point: where it is, how sure the network is, and whether it counts as visible."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "object", "landmark", "x", "y", "confidence", "visible"])
    objects: dict[str, int] = {}
    for number, name in enumerate(rows.files):
        each = objects[name] = objects.get(name, -1) + 1
        for label, (x, y), sure in zip(rows.names, rows.points[number], rows.confidence[number], strict=True):
            writer.writerow([name, each, label, f"{x:.3f}", f"{y:.3f}", f"{sure:.4f}", int(sure >= rows.visible)])
    return text.getvalue()
