"""Predictions as projects of annotation tools, to be corrected or used there.

SLEAP's file, and NWB's for images, are written by sleap-io, which the extra `interop` brings; it writes no
DeepLabCut project and no CVAT file, its Label Studio tasks name no image, and its NWB predictions need a video without
gaps, so these are written here. Points below the model's threshold are left out, or marked as outside where a tool can
say so. What each tool takes for the origin stands in `sst.corpora.projects`.
"""

import csv
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import quote
from xml.etree import ElementTree as ET

import numpy as np
import yaml

from sst.corpora.projects import CORNER, needed
from sst.errors import UserError
from sst.predict.tables import Rows

Tool = Literal["deeplabcut", "sleap", "label-studio", "cvat", "nwb"]

OBJECT, BOX = "object", "object_box"
"""What the object and its box are called where a tool wants a label for them."""

SCORER = "landmarks"
"""Who placed the points, as DeepLabCut asks."""


@dataclass(frozen=True)
class Media:
    """Where the images of the rows are.

    Attributes:
        files: of each row; empty for a video.
        video: the video, or None.
        frames_per_second: of it.
    """

    files: Sequence[Path]
    video: Path | None = None
    frames_per_second: float | None = None


def project_files(tool: Tool, rows: Rows, media: Media) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files that a tool's project is made of.

    Args:
        tool: which.
        rows: the predictions.
        media: what they were made on.

    Raises:
        UserError: if the tool can't have them, or a library for it is missing.
    """
    return WRITERS[tool](rows, media)


def check_tools(tools: Sequence[Tool], shards: bool, video: bool) -> None:
    """Refuses what can't be written, before anything is predicted.

    Raises:
        UserError: naming the tool and the reason.
    """
    if tools and shards:
        raise UserError(
            "--projects: shards hold no image files that a tool could open; predict on the images themselves"
        )
    if video and "label-studio" in tools:
        raise UserError("--projects: Label Studio has no points in videos; take cvat, sleap or deeplabcut")
    for tool in {"sleap", "nwb"}.intersection(tools):
        needed("sleap_io" if tool == "sleap" else "ndx_pose")


def files_of(rows: Rows) -> list[str]:
    """Name of the image of each row."""
    return [target.file for target in rows.targets]


def by_image(rows: Rows) -> dict[str, list[int]]:
    """Numbers of the rows of each image, in their order."""
    found: dict[str, list[int]] = {}
    for number, file in enumerate(files_of(rows)):
        found.setdefault(file, []).append(number)
    return found


def frame_number(file: str) -> int:
    """Of a frame called frame_NUMBER."""
    return int(file.rpartition("_")[2])


def has_box(rows: Rows, number: int) -> bool:
    """Whether a row's object was sought in a part of its image only."""
    return rows.boxes[number] != (0.0, 0.0, *map(float, rows.sizes[number]))


def cvat(rows: Rows, media: Media) -> Iterator[tuple[str, bytes]]:
    """`cvat.xml`, to be uploaded as "CVAT 1.1", and `cvat_labels.json`, the labels of a task for it (Raw)."""
    root = ET.Element("annotations")
    ET.SubElement(root, "version").text = "1.1"
    for index, (file, numbers) in enumerate(by_image(rows).items()):
        width, height = rows.sizes[numbers[0]]
        image = ET.SubElement(root, "image", id=str(index), name=file, width=str(width), height=str(height))
        for group, number in enumerate(numbers, start=1):
            common = {"source": "auto", "z_order": "0", "group_id": str(group)}
            skeleton = ET.SubElement(image, "skeleton", {"label": OBJECT, **common})
            for name, (x, y), sure in zip(rows.names, rows.points[number], rows.confidence[number], strict=True):
                place = f"{x + CORNER:.2f},{y + CORNER:.2f}"
                outside = str(int(sure < rows.visible))
                ET.SubElement(
                    skeleton, "points", label=name, source="auto", outside=outside, occluded="0", points=place
                )
            if has_box(rows, number):
                sides = dict(zip(("xtl", "ytl", "xbr", "ybr"), rows.boxes[number], strict=True))
                measures = {side: f"{value:.2f}" for side, value in sides.items()}
                ET.SubElement(image, "box", {"label": BOX, "occluded": "0", **common, **measures})
    yield "cvat.xml", _xml(root)
    labels: list[dict[str, Any]] = [
        {
            "name": OBJECT,
            "type": "skeleton",
            "attributes": [],
            "sublabels": [{"name": name, "type": "points", "attributes": []} for name in rows.names],
            "svg": _template(rows),
        }
    ]
    if any(has_box(rows, number) for number in range(len(rows.targets))):
        labels.append({"name": BOX, "type": "rectangle", "attributes": []})
    yield "cvat_labels.json", _json(labels)


def _template(rows: Rows) -> str:
    """CVAT's picture of a skeleton: a circle for each point at its mean place, in a square of 100."""
    boxes = np.array(rows.boxes, np.float64)[:, None]
    shares = (rows.points - boxes[..., :2]) / (boxes[..., 2:] - boxes[..., :2])
    svg = []
    for number, (name, (x, y)) in enumerate(zip(rows.names, shares.mean(0).clip(0, 1) * 90 + 5, strict=True), start=1):
        circle = {"r": "1", "cx": f"{x:.1f}", "cy": f"{y:.1f}", "data-type": "element node", "data-label-name": name}
        circle |= {"data-element-id": str(number), "data-node-id": str(number)}
        svg.append(ET.tostring(ET.Element("circle", circle), encoding="unicode"))
    return "".join(svg)


def label_studio(rows: Rows, media: Media) -> Iterator[tuple[str, bytes]]:
    """`label_studio.json`, tasks with predictions, and `label_studio.xml`, the labelling interface for them.

    The images are asked for as local files, relative to the folder that Label Studio was told to serve.
    """
    tasks = []
    for file, numbers in by_image(rows).items():
        joined = len(numbers) > 1 or has_box(rows, numbers[0])
        results = [each for number in numbers for each in _regions(rows, number, joined)]
        prediction = {"model_version": SCORER, "score": _mean_score(rows, numbers), "result": results}
        url = f"/data/local-files/?d={quote(file)}"
        tasks.append({"data": {"image": url}, "predictions": [prediction]})
    yield "label_studio.json", _json(tasks)
    view = ET.Element("View")
    ET.SubElement(view, "Image", name="image", value="$image", zoom="true")
    for tag, name, values in (("KeyPointLabels", "points", rows.names), ("RectangleLabels", "boxes", [OBJECT])):
        control = ET.SubElement(view, tag, name=name, toName="image")
        for value in values:
            ET.SubElement(control, "Label", value=value)
    yield "label_studio.xml", _xml(view)


def _regions(rows: Rows, number: int, joined: bool) -> Iterator[dict[str, Any]]:
    """Visible points of an object and, where asked for, its rectangle and what joins them."""
    width, height = rows.sizes[number]
    common = {"to_name": "image", "original_width": width, "original_height": height, "image_rotation": 0}
    percent = 100 / np.array([width, height])
    if joined:
        low, high = np.array(rows.boxes[number]).reshape(2, 2)
        (x, y), (across, down) = low * percent, (high - low) * percent
        value = {"x": x, "y": y, "width": across, "height": down, "rotation": 0, "rectanglelabels": [OBJECT]}
        yield {"id": f"box{number}", "type": "rectanglelabels", "from_name": "boxes", "value": value, **common}
    for index in np.flatnonzero(rows.confidence[number] >= rows.visible).tolist():
        x, y = (rows.points[number, index].astype(np.float64) + CORNER) * percent
        value = {"x": x, "y": y, "width": 0.5, "keypointlabels": [rows.names[index]]}
        key = f"point{number}_{index}"
        score = round(float(rows.confidence[number, index]), 4)
        yield {"id": key, "type": "keypointlabels", "from_name": "points", "value": value, "score": score, **common}
        if joined:
            yield {"type": "relation", "from_id": key, "to_id": f"box{number}", "direction": "right"}


def _mean_score(rows: Rows, numbers: Sequence[int]) -> float:
    return round(float(rows.confidence[list(numbers)].mean()), 4)


def deeplabcut(rows: Rows, media: Media) -> Iterator[tuple[str, bytes]]:
    """A project folder `deeplabcut/` with copies of the images; of a video, the table that `analyze_videos` writes."""
    if media.video is not None:
        table = [
            [str(frame_number(file)), *(cell for x, y, sure in points for cell in (x, y, sure))]
            for file, points in zip(files_of(rows), _cells(rows), strict=True)
        ]
        heads = [(part, coord) for part in rows.names for coord in ("x", "y", "likelihood")]
        header = [["scorer", *[SCORER] * len(heads)], ["bodyparts", *(part for part, _ in heads)]]
        yield (
            f"deeplabcut/{media.video.stem}DLC_{SCORER}.csv",
            _csv([*header, ["coords", *(c for _, c in heads)], *table]),
        )
        return
    images = by_image(rows)
    most = max(map(len, images.values()))
    animals = [f"{OBJECT}{number}" for number in range(1, most + 1)] if most > 1 else []
    heads3 = [(animal, part, coord) for animal in animals or [""] for part in rows.names for coord in ("x", "y")]
    header = [["scorer", "", "", *[SCORER] * len(heads3)]]
    if animals:
        header.append(["individuals", "", "", *(animal for animal, _, _ in heads3)])
    header += [["bodyparts", "", "", *(p for _, p, _ in heads3)], ["coords", "", "", *(c for *_, c in heads3)]]
    cells = _cells(rows, hide=True)
    tables: dict[str, list[list[str]]] = {}
    taken: set[str] = set()
    for file, numbers in images.items():
        place = PurePosixPath(file)
        folder = "_".join(part for part in place.parent.parts if part != "/") or "images"
        if f"{folder}/{place.name}" in taken:
            raise UserError(f"{file}: another image would get the same place in a DeepLabCut project; rename one")
        taken.add(f"{folder}/{place.name}")
        own = [cell for number in numbers for x, y, _ in cells[number] for cell in (x, y)]
        tables.setdefault(folder, []).append(
            ["labeled-data", folder, place.name, *own, *[""] * (len(heads3) - len(own))]
        )
        yield f"deeplabcut/labeled-data/{folder}/{place.name}", media.files[numbers[0]].read_bytes()
    for folder, lines in tables.items():
        yield f"deeplabcut/labeled-data/{folder}/CollectedData_{SCORER}.csv", _csv([*header, *lines])
    yield "deeplabcut/config.yaml", _deeplabcut_config(rows, list(tables), animals)


def _cells(rows: Rows, hide: bool = False) -> list[list[tuple[str, str, str]]]:
    """x, y and confidence of every point as text; places of points that are not visible may be hidden."""
    return [
        [
            ("", "", f"{sure:.4f}") if hide and sure < rows.visible else (f"{x:.3f}", f"{y:.3f}", f"{sure:.4f}")
            for (x, y), sure in zip(points, confidence, strict=True)
        ]
        for points, confidence in zip(rows.points, rows.confidence, strict=True)
    ]


def _deeplabcut_config(rows: Rows, folders: Sequence[str], animals: Sequence[str]) -> bytes:
    """What DeepLabCut asks of a project; the paths are its user's to set."""
    names = list(rows.names)
    width, height = rows.sizes[0]
    config: dict[str, Any] = {
        "Task": SCORER,
        "scorer": SCORER,
        "date": datetime.now(UTC).strftime("%b%d"),
        "multianimalproject": bool(animals),
        "identity": False,
        "project_path": ".",
        "engine": "pytorch",
        "video_sets": {f"videos/{folder}.mp4": {"crop": f"0, {width}, 0, {height}"} for folder in folders},
        **({"individuals": list(animals), "uniquebodyparts": [], "multianimalbodyparts": names} if animals else {}),
        "bodyparts": "MULTI!" if animals else names,
        "start": 0,
        "stop": 1,
        "numframes2pick": 20,
        "skeleton": [],
        "skeleton_color": "black",
        "pcutoff": 0.6,
        "dotsize": 6,
        "alphavalue": 0.7,
        "colormap": "rainbow",
        "TrainingFraction": [0.95],
        "iteration": 0,
        "default_net_type": "resnet_50",
        "default_augmenter": "default",
        "snapshotindex": -1,
        "batch_size": 8,
        "cropping": False,
        "corner2move2": [50, 50],
        "move2corner": True,
    }
    text: str = yaml.safe_dump(config, sort_keys=False)
    return text.encode()


def sleap(rows: Rows, media: Media) -> Iterator[tuple[str, bytes]]:
    """`predictions.slp`, which refers to the images or the video where they are."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch, "predictions.slp")
        needed("sleap_io").save_slp(_sleap_labels(rows, media), str(place), embed=False, verbose=False)
        yield place.name, place.read_bytes()


def _sleap_labels(rows: Rows, media: Media) -> Any:
    """sleap-io's `Labels`; images of one size are one video, since SLEAP's videos have one size."""
    sio = needed("sleap_io")
    skeleton = sio.Skeleton(list(rows.names), name=OBJECT)
    images = by_image(rows)
    sequences: dict[tuple[int, int], list[str]] = {}
    for file, numbers in images.items():
        sequences.setdefault(rows.sizes[numbers[0]], []).append(file)
    if media.video is not None:
        videos = dict.fromkeys(sequences, sio.Video.from_filename(str(media.video.absolute())))
    else:
        videos = {
            size: sio.Video.from_filename([str(media.files[images[file][0]].absolute()) for file in files])
            for size, files in sequences.items()
        }
    frames = []
    for size, files in sequences.items():
        for place, file in enumerate(files):
            at = place if media.video is None else frame_number(file)
            found = [_instance(rows, number, skeleton) for number in images[file]]
            frames.append(sio.LabeledFrame(videos[size], at, found))
    return sio.Labels(frames, skeletons=[skeleton])


def _instance(rows: Rows, number: int, skeleton: Any) -> Any:
    seen = rows.confidence[number] >= rows.visible
    points = np.where(seen[:, None], rows.points[number], np.nan)
    score = float(rows.confidence[number][seen].mean()) if seen.any() else 0.0
    confidence = rows.confidence[number].astype(np.float64)
    kind = needed("sleap_io").PredictedInstance
    return kind.from_numpy(points.astype(np.float64), skeleton, point_scores=confidence, score=score)


def nwb(rows: Rows, media: Media) -> Iterator[tuple[str, bytes]]:
    """`predictions.nwb`: PoseTraining for images; PoseEstimation, with confidences, for a video."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch, "predictions.nwb")
        if media.video is None:
            needed("sleap_io").save_nwb(_sleap_labels(rows, media), str(place), nwb_format="annotations")
        else:
            _write_pose_estimation(place, rows, media)
        yield place.name, place.read_bytes()


def _write_pose_estimation(place: Path, rows: Rows, media: Media) -> None:
    pynwb, pose = needed("pynwb"), needed("ndx_pose")
    now = datetime.now(UTC)
    identifier = f"{SCORER} {now.isoformat()}"
    file = pynwb.NWBFile(session_description="predicted landmarks", identifier=identifier, session_start_time=now)
    skeleton = pose.Skeleton(name=OBJECT, nodes=list(rows.names))
    seconds = np.array([frame_number(name) for name in files_of(rows)]) / (media.frames_per_second or 25.0)
    series = [
        pose.PoseEstimationSeries(
            name=name,
            data=rows.points[:, index].astype(np.float64),
            unit="pixels",
            reference_frame="(0,0) is the centre of the top left pixel; x to the right, y down",
            timestamps=seconds,
            confidence=rows.confidence[:, index].astype(np.float64),
            confidence_definition="maximum of the landmark's heatmap",
        )
        for index, name in enumerate(rows.names)
    ]
    behaviour = file.create_processing_module("behavior", "predicted landmarks")
    behaviour.add(pose.Skeletons(skeletons=[skeleton]))
    behaviour.add(
        pose.PoseEstimation(
            name="PoseEstimation",
            pose_estimation_series=series,
            original_videos=[str(media.video)],
            source_software="self-training-landmarks",
            skeleton=skeleton,
        )
    )
    with pynwb.NWBHDF5IO(str(place), "w") as writer:
        writer.write(file)


def _xml(root: ET.Element) -> bytes:
    ET.indent(root)
    return f"{ET.tostring(root, encoding='unicode')}\n".encode()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _csv(lines: Sequence[Sequence[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()


WRITERS = {"deeplabcut": deeplabcut, "sleap": sleap, "label-studio": label_studio, "cvat": cvat, "nwb": nwb}

FILES = (
    "deeplabcut",
    "predictions.slp",
    "label_studio.json",
    "label_studio.xml",
    "cvat.xml",
    "cvat_labels.json",
    "predictions.nwb",
)
"""What the writers leave, by its first part."""
