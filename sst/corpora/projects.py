"""What annotation tools keep in their projects: DeepLabCut, SLEAP, Label Studio, CVAT and NWB (ndx-pose).

Only what people annotated is read: predictions that nobody has accepted are none. DeepLabCut's, Label Studio's and
CVAT's files are plain text and read here: sleap-io (0.9) gives points to the wrong images where one of a DeepLabCut
project is missing, reads of Label Studio only what it wrote itself, and does not know CVAT. SLEAP's files are read by
sleap-io and NWB's by pynwb, which the extra `interop` brings.

Points are (x, y) in pixels with pixel centres at integers. CVAT and Label Studio measure from the corner of the first
pixel, `CORNER` away from its centre. Boxes mean the same everywhere: (0, 0, W, H) is the whole image.
"""

import csv
import importlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree as ET

import numpy as np
import yaml

from sst.corpora.annotation_files import refuse_results
from sst.corpora.annotations import Box, Tally, around
from sst.corpora.listing import is_video, listed
from sst.errors import UserError

CORNER = 0.5

RECTANGLES = ("rectanglelabels", "rectangle")
"""What Label Studio calls rectangles with and without a label of their own."""

UNREAD = "shapes of the kind {}, which are not read"
CVAT_AGAIN = "export the task anew as 'CVAT for images 1.1'"

Place = tuple[float, float]


@dataclass(frozen=True)
class Labelled:
    """One object as a project has it.

    Attributes:
        image: the image as the project names it, with / between folders, or the video.
        frame: which frame of a video.
        places: of the points that are annotated, by name.
        hidden: names of those among them that are covered by something.
        box: x0, y0, x1, y1 of the object.
        size: width and height of the image that the places were found on, where the project says so.
    """

    image: str
    frame: int | None = None
    places: Mapping[str, Place] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    box: Box | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Project:
    """What a project has.

    Attributes:
        names: of its points, in its order.
        objects: those with a point or a box.
        pictures: frames that lie in the project's own file, by image and number; each is RGB or grey (H, W, C).
        notes: what was left out, for the reader of the command's output.
    """

    names: list[str]
    objects: list[Labelled]
    pictures: Mapping[tuple[str, int], Callable[[], np.ndarray]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def reader(path: str) -> Callable[[str], Project] | None:
    """What reads the file or folder; None for annotations that are no project (CSV of our own form, COCO)."""
    place = Path(path)
    if place.is_dir():
        return read_deeplabcut
    suffix = place.suffix.lower()
    if suffix == ".csv" and place.is_file():
        with open(place, encoding="utf-8-sig", errors="replace") as file:
            return read_deeplabcut if file.readline().startswith("scorer,") else None
    if suffix == ".json" and place.is_file():
        with open(place, encoding="utf-8-sig", errors="replace") as file:
            return read_label_studio if file.read(1000).lstrip().startswith("[") else None
    return READERS.get(suffix)


def read_project(path: str) -> Project:
    """Reads a project.

    Raises:
        UserError: if it is not there, is none, is damaged, or has nothing that people annotated.
    """
    read = reader(path)
    if read is None or not Path(path).exists():
        raise UserError(f"{path}: {'no project of an annotation tool' if Path(path).exists() else 'no such file'}")
    try:
        project = read(path)
    except UserError:
        raise
    except Exception as error:  # the libraries raise many types on damaged input
        raise UserError(f"{path}: not as {TITLES[read]} writes it ({type(error).__name__}: {error})") from error
    if not project.objects:
        if project.notes:
            raise UserError(f"{path}: no points or boxes in it ({'; '.join(project.notes)})")
        raise UserError(
            f"{path}: nothing in it was annotated by a person; predictions count once they are corrected or accepted"
        )
    return project


def files_of(path: str) -> list[Path]:
    """The files that hold a project's annotations, or the given file: of DeepLabCut its tables beside its settings."""
    place = Path(path)
    if reader(path) is not read_deeplabcut or place.suffix.lower() == ".csv":
        return [place]
    config = place / "config.yaml" if place.is_dir() else place
    return [config, *sorted(config.parent.glob("labeled-data/*/CollectedData_*.csv"))]


def needed(name: str) -> Any:
    """A library of the extra `interop`.

    Raises:
        UserError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name}, which SLEAP's and NWB's files need, is not installed: "
            "pip install 'self-training-landmarks[interop]'"
        ) from error


def read_deeplabcut(path: str) -> Project:
    """A project folder, its config.yaml, or one table CollectedData_*.csv.

    An animal is an object. Points of no animal (DeepLabCut's unique bodyparts) are left out, and it is said.
    """
    place = Path(path)
    if place.suffix.lower() == ".csv":
        tables = [place]
    else:
        config = place / "config.yaml" if place.is_dir() else place
        if not config.is_file():
            raise UserError(f"{path}: no config.yaml in it, so no DeepLabCut project")
        scorer = _scorer(path, config)
        tables = sorted(config.parent.glob(f"labeled-data/*/CollectedData_{scorer}.csv"))
        if not tables:
            raise UserError(f"{path}: no labeled-data/*/CollectedData_{scorer}.csv; label images in DeepLabCut first")
    found = [_deeplabcut_table(table) for table in tables]
    names = dict.fromkeys(name for each, _, _ in found for name in each)
    left = sum(number for _, _, number in found)
    notes = (f"{left} points of no animal (unique bodyparts) are left out",) if left else ()
    return Project(list(names), [each for _, objects, _ in found for each in objects], notes=notes)


def _scorer(path: str, config: Path) -> str:
    """Who labelled a DeepLabCut project, as its settings say."""
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise UserError(f"{config}: not YAML ({line}{error.problem}); mend it, or give a table of labels") from error
    if isinstance(content, dict) and "scorer" in content:
        return str(content["scorer"])
    has = f"has no scorer, but {listed(content)}" if isinstance(content, dict) else "has no scorer"
    raise UserError(
        f"{path}: no DeepLabCut project: {config.name} {'is empty' if content is None else has}; give the config.yaml "
        "that DeepLabCut wrote, or a table of labels (CollectedData_*.csv)"
    )


def _deeplabcut_table(path: Path) -> tuple[list[str], list[Labelled], int]:
    """Names of the points, objects, and how many points belong to no animal."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    header = {row[0]: row for row in rows[:4] if row[0] in ("scorer", "individuals", "bodyparts", "coords")}
    if missing := [line for line in ("bodyparts", "coords") if line not in header]:
        raise UserError(
            f"{path}: no line {missing[0]!r} at its beginning, so no table of DeepLabCut's labels, separated by commas"
        )
    coords, parts = header["coords"], header["bodyparts"]
    first = coords.index("x")  # what stands before is the image, in one column or in three
    animals = header.get("individuals", [""] * len(coords))
    columns = [
        (animals[at], parts[at], at) for at in range(first, len(coords)) if coords[at] == "x" and coords[at + 1] == "y"
    ]
    alone = {"single"} if len({animal for animal, _, _ in columns}) > 1 else set()
    objects, left = [], 0
    for row in rows[len(header) :]:
        image = "/".join(cell.strip("/") for cell in row[:first]).replace("\\", "/")
        animal_places: dict[str, dict[str, Place]] = {}
        for animal, part, at in columns:
            x, y = (_cell(f"{path}, {image}: {part}", cell) for cell in row[at : at + 2])
            if math.isfinite(x) and math.isfinite(y):
                animal_places.setdefault(animal, {})[part] = (x, y)
        left += sum(len(places) for animal, places in animal_places.items() if animal in alone)
        objects += [Labelled(image, places=each) for animal, each in animal_places.items() if animal not in alone]
    return list(dict.fromkeys(part for animal, part, _ in columns if animal not in alone)), objects, left


def _cell(place: str, text: str) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        raise UserError(f"{place}: {text!r} is not a number; decimal points are expected") from None


def read_label_studio(path: str) -> Project:
    """An export in the format JSON: of each task the last annotation that was not cancelled."""
    tasks = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    refuse_results(path, tasks)
    if not tasks:
        raise UserError(f"{path}: an empty list, so neither COCO nor a project of Label Studio")
    tally = Tally()
    objects: list[Labelled] = []
    for task in tasks:
        if not isinstance(task, dict) or "data" not in task:
            raise UserError(
                f"{path}: a list that is not Label Studio's JSON; export the project as JSON, not JSON-MIN, or give "
                "COCO with images and annotations"
            )
        given = task.get("annotations") or task.get("completions") or ()
        done = [each for each in given if not each.get("was_cancelled")]
        if done:
            place, image = f"{path}, task {task.get('id', len(objects))}", _task_image(task)
            rectangles = {each["id"] for each in done[-1]["result"] if each["type"] in RECTANGLES}
            for result in done[-1]["result"]:
                repeats = result["type"] == "labels" and result.get("id") in rectangles
                if result["type"] not in ("keypointlabels", *RECTANGLES, "relation") and not repeats:
                    tally.add(UNREAD.format(result["type"]), image)
            objects += _task(place, image, done[-1]["result"], tally)
    names = dict.fromkeys(name for each in objects for name in each.places)
    return Project(list(names), objects, notes=tally.lines())


def _task_image(task: Mapping[str, Any]) -> str:
    """The task's image: the path in a URL, without what Label Studio puts before it."""
    texts = [value for value in (task["data"].get("image"), *task["data"].values()) if isinstance(value, str)]
    if not texts:
        raise ValueError(f"task {task.get('id')} names no image")
    parts = urlsplit(next((text for text in texts if "/" in text or "." in text), texts[0]))
    local = parse_qs(parts.query).get("d")
    path = local[0] if local else unquote(parts.path)
    return re.sub(r"(/upload/(?:.*/)?)[0-9a-f]{8}-", r"\1", path).lstrip("/")


def _task(place: str, image: str, results: Sequence[Mapping[str, Any]], tally: Tally) -> Iterator[Labelled]:
    """Objects of a task: a rectangle with the points that are joined to it, and all other points as one object.

    An only rectangle has all points. Its size and place are percentages of the image's sides, as theirs are.
    """
    points = {each["id"]: each for each in results if each["type"] == "keypointlabels"}
    rectangles = {each["id"]: each for each in results if each["type"] in RECTANGLES}
    regions = [*rectangles.values(), *points.values()]
    if any(each.get("image_rotation") for each in regions):
        raise UserError(f"{place}: a rotated image; turn the image itself before annotating")
    joined = [(each["from_id"], each["to_id"]) for each in results if each["type"] == "relation"]
    joined += [(key, each["parentID"]) for key, each in points.items() if each.get("parentID")]
    owner = {
        one: other for pair in joined for one, other in (pair, pair[::-1]) if one in points and other in rectangles
    }
    alone = next(iter(rectangles)) if len(rectangles) == 1 else None
    grouped: dict[str | None, dict[str, Place]] = {key: {} for key in rectangles}
    for key, each in points.items():
        if not each["value"].get("keypointlabels"):
            raise UserError(f"{place}: a point without a label; give it one, or delete it")
        name, places = each["value"]["keypointlabels"][0], grouped.setdefault(owner.get(key, alone), {})
        if name in places:
            raise UserError(f"{place}: two points {name!r} of one object; join each to its rectangle by a relation")
        x, y = _percent(each, "x", "y")
        places[name] = (x - CORNER, y - CORNER)
    for rectangle, places in grouped.items():
        size = (round(regions[0]["original_width"]), round(regions[0]["original_height"]))
        box = None if rectangle is None else _rectangle(rectangles[rectangle], image, tally)
        yield Labelled(image, places=places, box=box, size=size)


def _rectangle(region: Mapping[str, Any], name: str, tally: Tally) -> Box:
    """The box of a rectangle, which may be turned, clockwise about its upper left corner."""
    (x, y), (width, height) = _percent(region, "x", "y"), _percent(region, "width", "height")
    degrees = region["value"].get("rotation") or 0
    if not degrees:
        return x, y, x + width, y + height
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    across, down = x + (cosine * width - sine * height) / 2, y + (sine * width + cosine * height) / 2
    box = (across - width / 2, down - height / 2, across + width / 2, down + height / 2)
    return around(box, degrees, name, tally)


def _percent(region: Mapping[str, Any], across: str, down: str) -> Place:
    value = region["value"]
    return value[across] / 100 * region["original_width"], value[down] / 100 * region["original_height"]


def read_cvat(path: str) -> Project:
    """An export "CVAT for images 1.1" (annotations.xml).

    A skeleton is an object; so are all shapes of points with the same group, and those of an image without a group. A
    rectangle of the same group is the object's box, as is an image's only rectangle beside its only object.
    """
    root = ET.parse(path).getroot()
    if root.tag != "annotations":
        raise UserError(f"{path}: not CVAT's XML; export the task as 'CVAT for images 1.1'")
    if root.find("track") is not None:
        raise UserError(f"{path}: tracks of a video; export the task as 'CVAT for images 1.1', with its images")
    kinds = sorted({str(each.get("label")) for each in root.iter("skeleton")})
    if len(kinds) > 1:
        raise UserError(f"{path}: skeletons of several labels ({', '.join(kinds)}); export those of one label alone")
    tally = Tally()
    images = [(f"{path}: image {image.get('name')}", image) for image in root.iter("image")]
    objects = [each for place, image in images for each in _cvat_image(place, image, tally)]
    points = [(place, element) for place, image in images for element in image.iter("points")]
    names = dict.fromkeys(name for place, element in points for name, _ in _cvat_places(place, element))
    return Project(list(names), objects, notes=tally.lines())


def _cvat_text(place: str, element: ET.Element, attribute: str) -> str:
    if (text := element.get(attribute)) is None:
        raise UserError(f"{place}: <{element.tag}> without {attribute}; {CVAT_AGAIN}")
    return text


def _cvat_number(place: str, element: ET.Element, attribute: str) -> float:
    text = _cvat_text(place, element, attribute)
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{place}: {attribute} of <{element.tag}> is {text!r}, not a number; {CVAT_AGAIN}") from None


def _cvat_places(place: str, element: ET.Element) -> list[tuple[str, Place]]:
    """Names and places of a shape of points: its label, numbered if it has several."""
    label, text = _cvat_text(place, element, "label"), _cvat_text(place, element, "points")
    try:
        pairs = [(float(x) - CORNER, float(y) - CORNER) for x, y in (pair.split(",") for pair in text.split(";"))]
    except ValueError:
        raise UserError(f"{place}: points are {text[:60]!r}; x,y;x,y;... with decimal points is expected; {CVAT_AGAIN}"
                        ) from None  # fmt: skip
    names = [label] if len(pairs) == 1 else [f"{label}_{number}" for number in range(len(pairs))]
    return list(zip(names, pairs, strict=True))


def _cvat_box(place: str, name: str, element: ET.Element, tally: Tally) -> Box:
    x0, y0, x1, y1 = (_cvat_number(place, element, side) for side in ("xtl", "ytl", "xbr", "ybr"))
    degrees = _cvat_number(place, element, "rotation") if "rotation" in element.attrib else 0.0
    return around((x0, y0, x1, y1), degrees, name, tally)


def _cvat_image(place: str, image: ET.Element, tally: Tally) -> Iterator[Labelled]:
    name = _cvat_text(place, image, "name")
    size = (round(_cvat_number(place, image, "width")), round(_cvat_number(place, image, "height")))
    for element in image:
        if element.tag not in ("skeleton", "points", "box"):
            tally.add(UNREAD.format(element.tag), name)
    groups: dict[Any, list[ET.Element]] = {}
    for number, skeleton in enumerate(image.findall("skeleton")):
        groups[skeleton.get("group_id") or f"skeleton {number}"] = skeleton.findall("points")
    for element in image.findall("points"):
        groups.setdefault(element.get("group_id"), []).append(element)
    boxes: dict[Any, Box] = {}
    for number, element in enumerate(image.findall("box")):
        boxes[element.get("group_id") or f"box {number}"] = _cvat_box(place, name, element, tally)
    if len(boxes) == len(groups) == 1 and not boxes.keys() & groups.keys():
        boxes = {next(iter(groups)): next(iter(boxes.values()))}
    for group in dict.fromkeys((*groups, *boxes)):
        places: dict[str, Place] = {}
        hidden = set()
        for element in groups.get(group, ()):
            for label, each in _cvat_places(place, element):
                if element.get("outside") == "1":
                    continue
                if label in places:
                    raise UserError(f"{place}: two points {label!r} of one object; group each object's points")
                places[label] = each
                if element.get("occluded") == "1":
                    hidden.add(label)
        if places or group in boxes:
            yield Labelled(name, places=places, hidden=frozenset(hidden), box=boxes.get(group), size=size)


def read_sleap(path: str) -> Project:
    """A .slp file, also one with its images in it: the instances that people placed."""
    labels = needed("sleap_io").load_slp(path, open_videos=False)
    names = _one_skeleton(path, {tuple(skeleton.node_names) for skeleton in labels.skeletons})
    objects: list[Labelled] = []
    pictures: dict[tuple[str, int], Callable[[], np.ndarray]] = {}
    for frame in labels.labeled_frames:
        files = frame.video.filename
        if isinstance(files, list):
            image, number = files[frame.frame_idx], None
        else:
            embedded = Path(files).absolute() == Path(path).absolute()
            source = frame.video.source_video.filename if embedded and frame.video.source_video else files
            image, number = (source[frame.frame_idx] if isinstance(source, list) else source), frame.frame_idx
            if embedded:
                pictures[_slashes(image), number] = _embedded(frame)
        for instance in frame.user_instances:
            places = _finite(names, instance.numpy())
            if places:
                objects.append(Labelled(_slashes(image), number, places))
    return Project(names, objects, pictures)


def _embedded(frame: Any) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        if frame.video.backend is None:
            frame.video.open()
        return np.asarray(frame.video[frame.frame_idx])

    return read


def read_nwb(path: str) -> Project:
    """An NWB file with PoseTraining of ndx-pose, which is what people annotated; PoseEstimation holds predictions."""
    needed("ndx_pose")  # it makes its types known to pynwb
    objects: list[Labelled] = []
    found: set[tuple[str, ...]] = set()
    with needed("pynwb").NWBHDF5IO(path, mode="r") as file:
        modules = file.read().processing.values()
        for training in (each for module in modules for each in module.data_interfaces.values()):
            if training.neurodata_type != "PoseTraining":
                continue
            for frame in training.training_frames.training_frames.values():
                files, number = list(frame.source_video.external_file[:]), int(frame.source_video_frame_index)
                alone = len(files) == 1 and (number > 0 or is_video(files[0]))
                image, number_in = (files[0], number) if alone else (files[number], None)
                for instance in frame.skeleton_instances.skeleton_instances.values():
                    names = [str(name) for name in instance.skeleton.nodes[:]]
                    found.add(tuple(names))
                    points = np.array(instance.node_locations[:], np.float64)
                    if instance.node_visibility is not None:
                        points[~np.array(instance.node_visibility[:], bool)] = np.nan
                    if places := _finite(names, points):
                        objects.append(Labelled(_slashes(image), number_in, places))
    return Project(_one_skeleton(path, found), objects)


def _one_skeleton(path: str, skeletons: Iterable[tuple[str, ...]]) -> list[str]:
    kinds = list(skeletons)
    if len(kinds) > 1:
        raise UserError(f"{path}: {len(kinds)} skeletons; keep the objects of one in a file of its own")
    return list(kinds[0]) if kinds else []


def _finite(names: Sequence[str], points_L2: np.ndarray) -> dict[str, Place]:
    return {
        name: (float(x), float(y))
        for name, (x, y) in zip(names, points_L2, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    }


def _slashes(path: str) -> str:
    return str(path).replace("\\", "/")


def _refuse(reason: str) -> Callable[[str], Project]:
    def read(path: str) -> Project:
        raise UserError(f"{path}: {reason}")

    return read


_zip = _refuse("unpack it first, and give the file of annotations in it (CVAT: annotations.xml)")
_table = _refuse("give DeepLabCut's table as .csv, which lies beside it, or the project's config.yaml")

READERS: dict[str, Callable[[str], Project]] = {
    ".yaml": read_deeplabcut,
    ".yml": read_deeplabcut,
    ".h5": _table,
    ".xml": read_cvat,
    ".zip": _zip,
    ".slp": read_sleap,
    ".nwb": read_nwb,
}
"""By the file's ending; .csv and .json are told from our own by their first bytes."""

TITLES: dict[Callable[[str], Project], str] = {
    read_deeplabcut: "DeepLabCut",
    read_label_studio: "Label Studio",
    read_cvat: "CVAT",
    read_sleap: "SLEAP",
    read_nwb: "NWB",
}
