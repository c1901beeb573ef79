"""Reads annotation files: CSV under the column names that tools use, and COCO JSON."""

import codecs
import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sst.corpora.annotations import MOSTLY, Annotations, Box, Category, Id, Row, Tally, around, checked
from sst.corpora.listing import listed
from sst.corpora.masks import mask_box
from sst.errors import UserError


def read_annotations(path: str, category: str | None = None) -> Annotations:
    """Reads a CSV or COCO file, told apart by ending and content.

    Args:
        path: the file.
        category: name or identifier of the category whose objects are wanted, or "all"; needed where there are several.

    Raises:
        UserError: if it is missing or unusable, or has several categories; the message names file and place.
    """
    try:
        data = Path(path).read_bytes()
        # Excel's "Unicode text" and PowerShell's redirection begin with the mark of UTF-16.
        marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16" if marked else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't read the annotations ({error}); expected CSV or COCO JSON in UTF-8") from error
    if not text.strip():
        raise UserError(f"{path}: an empty file; expected CSV or COCO JSON")
    tally = Tally()
    is_json = path.lower().endswith(".json") or text.lstrip()[:1] in ("{", "[")
    return checked(parse_coco(path, text, tally) if is_json else parse_csv(path, text, tally), tally, category)


# CSV

FILES = ("file", "filename", "filepath", "image", "imagename", "imagepath", "imagefile", "img", "imgname", "imgpath",
         "path", "imageid")  # fmt: skip
CATEGORIES = ("category", "categoryname", "class", "classname", "label", "labelname", "categoryid", "classid")
SIZES = (("imagewidth", "imageheight"), ("imgwidth", "imgheight"), ("imagew", "imageh"), ("imgw", "imgh"))
CORNERS = (
    ("x0", "y0", "x1", "y1"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x1", "y1", "x2", "y2"),
    ("left", "top", "right", "bottom"),
    ("xtl", "ytl", "xbr", "ybr"),
    ("minx", "miny", "maxx", "maxy"),
)
STARTS = (("x", "y"), ("x0", "y0"), ("x1", "y1"), ("xmin", "ymin"), ("left", "top"))
CENTRES = (("cx", "cy"), ("xcenter", "ycenter"), ("centerx", "centery"))
SIDES = (("w", "h"), ("width", "height"))
"""Of a box; where both are there, the second are the image's."""
PREFIXES = ("box", "bbox", "")
NAMED_POINTS = (
    r"(?P<point>.*\S)[\s_.-](?P<axis>[xyXY])",
    r"(?P<axis>[xyXY])[\s_.-](?P<point>\S.*)",
    r"(?P<point>.*[a-z0-9])(?P<axis>[XY])",
)
"""A column of a point with a name: `nose_x`, `x_nose`, `noseX`."""
NO_POINTS = (*PREFIXES, "image", "img", "min", "max", "center", "centre")
UNDERSTOOD = (
    "file; box_x0,box_y0,box_x1,box_y1 or xmin,ymin,xmax,ymax or x,y,width,height; x0,y0,x1,y1,... or NAME_x,NAME_y; "
    "split; subject; category"
)
NOTHING = ("", "nan", "na", "n/a", "null", "none", "-")
"""Cells that say there is no value."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what; by their names in the header.

    Attributes:
        file: name of the image.
        box: four numbers, or none.
        kind: what they are: "corners", "sides" (a corner, width, height) or "centre" (of width and height).
        points: x, y and (or "") the visibility of each point.
        names: of the points, where the columns name them.
        size: width and height of the image, or none.
        split: of the image, or "".
        subject: of the image, or "".
        category: of the object, or "".
        unused: all others.
    """

    file: str
    box: tuple[str, ...]
    kind: str
    points: tuple[tuple[str, str, str], ...]
    names: tuple[str, ...]
    size: tuple[str, ...]
    split: str
    subject: str
    category: str
    unused: tuple[str, ...]


def _squashed(name: str) -> str:
    """A column's name as it is compared: `Box X0`, `box_x0` and `boxX0` are one."""
    return re.sub(r"[\s_.-]+", "", name.lower())


def understand(path: str, header: Sequence[str]) -> Columns:
    """Which of the columns are what.

    Raises:
        UserError: if no column names the image, or none of the others is understood.
    """
    names: dict[str, str] = {}
    alike = [(_squashed(name), name) for name in header if name]
    for squashed, name in alike:
        names.setdefault(squashed, name)
    there = listed(header, 8) or "none"
    file = next((names[each] for each in FILES if each in names), None)
    if file is None:
        raise UserError(f"{path}: no column 'file'; its columns are {there}; understood are {UNDERSTOOD}")
    box, kind = _box_columns(names)
    points, point_names = _point_columns(path, names, set(box))
    size = next((each for each in SIZES if set(each) <= names.keys()), ())
    if not size and box:
        size = next((each for each in SIDES if set(each) <= names.keys() - set(box)), ())
    category = next((each for each in CATEGORIES if each in names), "")
    said = {each: names.get(each, "") for each in ("split", "subject")}
    used = {*box, *size, *(name for point in points for name in point), category, *said, _squashed(file)}
    unused = tuple(name for each, name in names.items() if each not in used)
    if twice := [name for squashed, name in alike if squashed in used and names[squashed] is not name]:
        raise UserError(f"{path}: the columns {names[_squashed(twice[0])]} and {twice[0]} are called alike")
    if unused and not (box or points or said["split"] or said["subject"]):
        raise UserError(f"{path}: no column of boxes or points; its columns are {there}; understood are {UNDERSTOOD}")
    if not box and (half := [names[each] for each in names if each in _BOX_WORDS and each not in used]):
        raise UserError(f"{path}: the columns {', '.join(half)} are no whole box; understood are {UNDERSTOOD}")
    return Columns(
        file=file,
        box=tuple(names[each] for each in box),
        kind=kind,
        points=tuple((names[x], names[y], names.get(v, "")) for x, y, v in points),
        names=point_names,
        size=tuple(names[each] for each in size),
        split=said["split"],
        subject=said["subject"],
        category=names.get(category, ""),
        unused=unused,
    )


_BOX_WORDS = {
    f"{prefix}{word}"
    for prefix in PREFIXES
    for four in (*CORNERS, *STARTS, *CENTRES, *SIDES)
    for word in four
    if prefix or not re.fullmatch(r"[xy]\d*|width|height|w|h|left|top|right|bottom", word)
}
"""Columns that must belong to a box: one that is left over shows a box that was not understood."""


def _box_columns(names: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
    """The four columns of the box, and what they are; the first that are complete."""

    def is_points(four: tuple[str, ...]) -> bool:
        # Without "box", numbered columns are points, unless width and height follow the only one, or there are just
        # x1,y1,x2,y2: corners, as detectors write them.
        if four[2:] == ("x1", "y1"):
            return True
        if four[2:] == ("x2", "y2"):
            return "x0" in names or "x3" in names
        return (four[0] == "x0" and "x1" in names) or (four[0] == "x1" and ("x0" in names or "x2" in names))

    for prefix in PREFIXES:
        kinds = {
            "corners": CORNERS,
            "sides": [start + sides for start in STARTS for sides in SIDES],
            "centre": [centre + sides for centre in CENTRES for sides in SIDES],
        }
        for kind, choices in kinds.items():
            for four in choices:
                columns = tuple(f"{prefix}{each}" for each in four)
                if set(columns) <= names.keys() and (prefix or not is_points(four)):
                    return columns, kind
    return (), ""


def _point_columns(
    path: str, names: Mapping[str, str], box: set[str]
) -> tuple[tuple[tuple[str, str, str], ...], tuple[str, ...]]:
    """Columns (x, y, visibility or "") of each point, numbered or named, and names of named ones."""
    free = [each for each in names if each not in box]
    numbers = sorted({int(found[1]) for each in free if (found := re.fullmatch(r"[xy](\d+)", each))})
    if numbers:
        wanted = range(min(numbers[0], 1), numbers[-1] + 1)
        if missing := [f"{axis}{n}" for n in wanted for axis in "xy" if f"{axis}{n}" not in free]:
            raise UserError(f"{path}: columns of points are missing: {listed(missing)}")
        return tuple((f"x{n}", f"y{n}", _seen(names, str(n))) for n in wanted), ()
    axes: dict[str, dict[str, str]] = {}
    for each in free:
        for pattern in NAMED_POINTS:
            if found := re.fullmatch(pattern, names[each]):
                axes.setdefault(found["point"], {})[found["axis"].lower()] = each
                break
    named = {
        point: (both["x"], both["y"], _seen(names, _squashed(point)))
        for point, both in axes.items()
        if len(both) == 2 and _squashed(point) not in NO_POINTS
    }
    return tuple(named.values()), tuple(named)


def _seen(names: Mapping[str, str], point: str) -> str:
    """The column that says whether a point is visible, or ""."""
    words = ("v", "vis", "visible", "visibility")
    return next((each for word in words for each in (word + point, point + word) if each in names), "")


def parse_csv(path: str, text: str, tally: Tally) -> Annotations:
    """Parses a table with a header; a line for each object.

    Cells are separated by commas, or by semicolons or tabs where the header has these; blanks around them do not count.

    Raises:
        UserError: naming line and column.
    """
    first = text.lstrip().partition("\n")[0]
    separator = next((each for each in (",", ";", "\t") if each in first), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
    lines = [(number, cells) for number, cells in lines if any(cells)]
    if lines and lines[0][1][0].lower() == "sep=":  # by which Excel is told the separator
        del lines[0]
    header = lines[0][1] if lines else []
    columns = understand(path, header)
    if len(lines) < 2:
        raise UserError(f"{path}: a header and no line below it")
    rows = []
    for number, cells in lines[1:]:
        place = f"{path}, line {number}"
        if len(cells) > len(header) and any(cells[len(header) :]):
            raise UserError(f"{place}: {len(cells)} cells, and the header has {len(header)}; a separator in a cell?")
        values = dict(zip(header, cells, strict=False))
        name = values.get(columns.file, "")
        if len(cells) < len(header):
            tally.add("lines with fewer cells than the header", f"line {number}")
        if not name:
            tally.add("lines without a file's name left out", f"line {number}")
            continue
        rows.append(_row(_Cells(place, values, separator == ";"), columns, name))
    if any(row.visible is not None for row in rows):
        rows = [replace(row, visible=_visible(row, rows)) for row in rows]
    if columns.size and _is_size_of_box(rows):
        rows = [replace(row, size=None) for row in rows]
    notes = []
    if columns.unused:
        notes.append(f"columns not used: {listed(columns.unused, 8)}")
    if not columns.box and len(columns.points) == 2 and not columns.names:
        notes.append("x0,y0,x1,y1 are taken as two points; corners of a box are called xmin,ymin,xmax,ymax")
    doubtful = columns.kind == "corners" and [*map(_squashed, columns.box)] == ["boxx0", "boxy0", "boxx1", "boxy1"]
    return Annotations(path, tuple(rows), columns.names, notes=tuple(notes), doubtful_corners=doubtful)


@dataclass(frozen=True)
class _Cells:
    """The cells of one line by column."""

    place: str
    values: Mapping[str, str]
    decimal_comma: bool

    def number(self, name: str) -> float:
        text = self.values.get(name, "")
        if text.lower() in NOTHING:
            return math.nan
        try:
            return float(text.replace(",", ".") if self.decimal_comma else text)
        except ValueError:
            raise UserError(f"{self.place}: {name} is {text!r}, not a number") from None

    def seen(self, name: str) -> float:
        """A visibility: 2 for a point without such a column."""
        truths = {"true": 1.0, "false": 0.0}
        text = self.values.get(name, "").lower()
        return 2.0 if not name else truths[text] if text in truths else self.number(name)


def _row(cells: _Cells, columns: Columns, name: str) -> Row:
    box = points = visible = size = None
    if columns.box:
        a, b, c, d = (cells.number(each) for each in columns.box)
        if columns.kind == "centre":
            a, b = a - c / 2, b - d / 2
        box = (a, b, c, d) if columns.kind == "corners" else (a, b, a + c, b + d)
        # A box of nothing keeps its mark, which `checked` knows: 0, 0, 0, 0 and -1, -1, -1, -1.
        box = (-1.0, -1.0, -1.0, -1.0) if (a, b, c, d) == (-1, -1, -1, -1) else box
    if columns.points:
        points = np.array([[cells.number(x), cells.number(y)] for x, y, _ in columns.points])
        seen = np.array([cells.seen(v) for _, _, v in columns.points])
        points[~(seen > 0)] = np.nan
        visible = seen if any(v for _, _, v in columns.points) else None
    if columns.size:
        width, height = (cells.number(each) for each in columns.size)
        size = (width, height) if width > 0 and height > 0 else None
    kind = cells.values.get(columns.category, "") if columns.category else ""
    return Row(
        file=name,
        split=cells.values.get(columns.split, "").lower() if columns.split else "",
        subject=(cells.values.get(columns.subject) or None) if columns.subject else None,
        box=box,
        points=points,
        visible=visible,
        size=size,
        category=Category(None, kind) if kind else None,
    )


def _visible(row: Row, rows: Sequence[Row]) -> np.ndarray | None:
    """Of visibilities as COCO's (2 visible, 1 hidden), or as 1 and 0 where the file has no 2."""
    most = max(float(np.nanmax(each.visible, initial=0)) for each in rows if each.visible is not None)
    return None if row.visible is None else row.visible >= min(2.0, most)


def _is_size_of_box(rows: Sequence[Row]) -> bool:
    """Whether columns width and height beside corners repeat the sides of the box, rather than the image's."""
    sides = [(row.box[2] - row.box[0], row.box[3] - row.box[1], *row.size) for row in rows if row.box and row.size]
    return bool(sides) and all(abs(w - a) <= 1.5 and abs(h - b) <= 1.5 for w, h, a, b in sides)


# COCO

MASKS = "masks (RLE) that are damaged or of another size than the image, without a bbox"


def parse_coco(path: str, text: str, tally: Tally) -> Annotations:
    """Parses COCO keypoints or boxes. Crowds are left out; a point of visibility 0 is unknown, of 1 hidden.

    Raises:
        UserError: if it is not such a file, or an image's identifier is given twice.
    """
    try:
        content = json.loads(text)
        if not isinstance(content, dict | list):
            raise ValueError(f"a {type(content).__name__}")
        refuse_results(path, content)
        if isinstance(content, list) or "images" not in content or "annotations" not in content:
            has = f"is a list of {len(content)}" if isinstance(content, list) else f"has the keys {listed(content)}"
            raise UserError(f"{path}: not COCO keypoints JSON: it {has}; images and annotations are expected")
        images = _coco_images(path, content["images"], tally)
        categories = {_key(each.get("id")): _category(each) for each in content.get("categories") or ()}
        rows, strays = [], 0
        for number, entry in enumerate(content["annotations"]):
            name = f"annotation {entry.get('id', f'number {number}')}"
            if entry.get("iscrowd"):
                tally.add("crowds left out", name)
            elif _key(entry.get("image_id")) not in images:
                strays += 1
                tally.add("annotations of images that the file does not list left out", name)
            elif (row := _coco_row(path, name, entry, images[_key(entry["image_id"])], categories, tally)) is not None:
                rows.append(row)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path}: not COCO keypoints JSON ({type(error).__name__}: {error})") from error
    if strays > len(content["annotations"]) / 2:
        raise UserError(f"{path}: {strays} of {len(content['annotations'])} annotations are of images that it does not "
                        "list: their image_id is no id of images")  # fmt: skip
    total, masks = len(content["annotations"]), tally.count(MASKS)
    if masks > MOSTLY * total and all(row.points is None for row in rows):
        raise UserError(f"{path}: {masks} of {total} objects have only a mask (RLE) that is damaged or of another size "
                        "than the image; give each a bbox")  # fmt: skip
    ids: dict[str, Id] = {}
    for image in images.values():
        ids.setdefault(image["file_name"], image["id"])
    annotated = {row.file for row in rows}
    bare = [_image_row(each) for each in images.values() if each["file_name"] not in annotated]
    return Annotations(path, (*rows, *(row for row in bare if row.split or row.subject)), image_ids=ids)


def refuse_results(path: str, content: Any) -> None:
    """Refuses what a detector found, in COCO's form for it: a list of annotations alone.

    Raises:
        UserError: if it is such a list.
    """
    if isinstance(content, list) and content and isinstance(content[0], dict) and "image_id" in content[0]:
        raise UserError(
            f"{path}: a list of COCO results, which does not say which pictures its image ids are; give a COCO file "
            'with images and annotations: the "images" of the file that was predicted on, and this list as its '
            '"annotations"'
        )


def _key(identifier: Any) -> str:
    """An identifier as it is compared: 7, 7.0 and "7" are one."""
    return str(int(identifier)) if isinstance(identifier, float) and identifier.is_integer() else str(identifier)


def _coco_images(path: str, entries: Sequence[dict[str, Any]], tally: Tally) -> dict[str, dict[str, Any]]:
    images: dict[str, dict[str, Any]] = {}
    names: dict[str, Any] = {}
    for entry in entries:
        key, name = _key(_identifier(entry["id"])), entry.get("file_name")
        if entry["id"] is None:
            raise UserError(f"{path}: {name} has no image id")
        if not isinstance(name, str) or not name:
            raise UserError(f"{path}: image {entry['id']} has no file_name")
        if (earlier := images.get(key)) is not None and earlier["file_name"] != name:
            raise UserError(
                f"{path}: the image id {entry['id']} is given to {earlier['file_name']} and to {name}, so it can't be "
                "told what is annotated on which; number the images anew"
            )
        images.setdefault(key, entry)
        if names.setdefault(name, key) != key:
            tally.add("images listed under several ids, the first kept", f"{name} ({names[name]}, {key})")
    return images


def _numbers(values: Any, what: str) -> np.ndarray:
    """Numbers of a list, nested or not; NaN for null."""
    try:
        if not isinstance(values, list):
            raise TypeError
        return np.array(values, np.float64).ravel()
    except (TypeError, ValueError):
        raise UserError(f"{what} is {json.dumps(values)[:60]}; a list of numbers is expected") from None


def _category(entry: dict[str, Any]) -> Category:
    points = entry.get("keypoints")
    names = tuple(map(str, points)) if isinstance(points, list) else ()
    identifier = _identifier(entry.get("id"))
    return Category(identifier, str(entry.get("name") or identifier), names)


def _identifier(value: Any) -> Id | None:
    """An identifier of the file.

    Raises:
        TypeError: if it can't be one.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is not None and not isinstance(value, int | str):
        raise TypeError(f"an id is {json.dumps(value)[:60]}")
    return value


def _image_row(image: Mapping[str, Any], entry: Mapping[str, Any] | None = None) -> Row:
    """What an image says of each of its objects."""
    subject = (entry or {}).get("subject", image.get("subject"))
    try:
        size = float(image["width"]), float(image["height"])
    except (KeyError, TypeError, ValueError):
        size = (0.0, 0.0)
    return Row(
        file=image["file_name"],
        split=str(image.get("split") or ""),
        subject=None if subject is None else str(subject),
        size=size if size[0] > 0 and size[1] > 0 else None,
    )


def _coco_row(
    path: str,
    name: str,
    entry: dict[str, Any],
    image: Mapping[str, Any],
    categories: Mapping[str, Category],
    tally: Tally,
) -> Row | None:
    """One annotation; None for an object of which nothing is said."""
    points = visible = None
    box = _coco_box(path, name, entry, image, tally)
    category = next(iter(categories.values())) if len(categories) == 1 else None
    if (identifier := entry.get("category_id")) is not None:
        category = categories.get(_key(identifier), Category(_identifier(identifier), str(identifier)))
    if entry.get("keypoints"):
        triples = _numbers(entry["keypoints"], f"{path}: {name}: keypoints")
        if triples.size % 3 or (category is not None and 0 < triples.size == 2 * len(category.points)):
            raise UserError(
                f"{path}: {name}: keypoints has {triples.size} numbers; x, y and visibility of each point are expected"
            )
        triples = triples.reshape(-1, 3)
        points = np.where(triples[:, 2:] > 0, triples[:, :2], np.nan)
        visible = triples[:, 2] > 1
        if not np.isin(triples[:, 2], (0, 1, 2)).all():
            tally.add("objects with visibilities other than 0, 1, 2 (above 0 is annotated, above 1 visible)", name)
    if box is None and points is None:
        tally.add("objects without box and points left out", name)
        return None
    return replace(_image_row(image, entry), box=box, points=points, visible=visible, category=category)


def _coco_box(path: str, name: str, entry: Mapping[str, Any], image: Mapping[str, Any], tally: Tally) -> Box | None:
    """The box of an annotation, or else the one around its outline or mask, which are measured from the same corner."""
    numbers = _numbers(entry["bbox"], f"{path}: {name}: bbox").tolist() if entry.get("bbox") else []
    outline = entry.get("segmentation")
    if len(numbers) not in (0, 4):
        raise UserError(f"{path}: {name}: bbox has {len(numbers)} numbers; x, y, width and height are expected")
    if numbers and numbers not in ([0] * 4, [-1] * 4):
        x, y, width, height = numbers
        attributes = entry.get("attributes")  # of CVAT; an outline is of the rotated box already
        degrees = attributes.get("rotation") if isinstance(attributes, dict) and not outline else None
        return around((x, y, x + width, y + height), degrees if isinstance(degrees, int | float) else 0, name, tally)
    if isinstance(outline, dict):
        return _coco_mask_box(name, outline, image, tally)
    if not outline:
        return None
    parts = [_numbers(each, f"{path}: {name}: segmentation") for each in _parts(outline)]
    if odd := [part.size for part in parts if part.size % 2]:
        raise UserError(f"{path}: {name}: segmentation has {odd[0]} numbers; x and y of each corner are expected")
    tally.add("boxes taken from the outline, as there is no bbox", name)
    corners = np.concatenate(parts).reshape(-1, 2)
    (x0, y0), (x1, y1) = corners.min(0).tolist(), corners.max(0).tolist()
    return x0, y0, x1, y1


def _coco_mask_box(name: str, mask: Mapping[str, Any], image: Mapping[str, Any], tally: Tally) -> Box | None:
    try:
        height, width = (int(side) for side in mask["size"])
        if (image.get("height") or height, image.get("width") or width) != (height, width):
            raise ValueError("of another image")
        box = mask_box((height, width), mask["counts"])
    except (KeyError, TypeError, ValueError, OverflowError):
        tally.add(MASKS, name)
        return None
    if box is not None:
        tally.add("boxes taken from the mask (RLE), as there is no bbox", name)
    return box


def _parts(outline: Any) -> list[Any]:
    """The polygons of an outline, which has one, or a list of them."""
    return outline if isinstance(outline, list) and isinstance(outline[0], list) else [outline]
