"""Annotations of objects in images: boxes and points, and what of a file could not be used.

`sst.corpora.annotation_files` parses a file; `checked` and `place_annotations` hold what is common to every kind of
file. The latter lays it on the pictures that there are: names, sizes, and whether boxes and points are possible. All
count what they leave out or change, in `Annotations.notes`, and refuse a file most of which is unusable.

Conventions as of `sst.corpora.packing`: (x, y) in pixels of the upright image, pixel centres at integers.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np

from sst.corpora.listing import listed, same_name, shown
from sst.corpora.packing import usable_box
from sst.corpora.pictures import Frame, picture_frame
from sst.errors import UserError

Id = int | str
"""Identifier of an image or a category in a COCO file."""

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the image."""

ALL = "all"
"""As a category: those of every name."""

SHARES = 1.5
"""Coordinates up to this can't be pixels of an object, but shares of the image's sides, rounded or a little beyond."""

MOSTLY = 0.5
"""A file of which a larger share is unusable is refused, since then it was made otherwise than it is read."""


MIN_FOR_SHAPES = 5
SHAPES_DIFFER = 0.3
"""How far shapes (logarithm of width by height) of boxes spread at least to be odd for one kind of object: a third.
4,227 faces of all poses and ages spread by 0.09."""


@dataclass(frozen=True)
class Category:
    """A kind of object: its identifier (None where a file has only names), its name, and the names of its points."""

    identifier: Id | None
    name: str
    points: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Row:
    """Annotation of one object in one image file.

    Attributes:
        file: name of the image as the file has it; after `place_annotations` as the pictures have it.
        split: "train", "test", or "" where nothing is said.
        subject: who or what is seen, where known.
        box: x0, y0, x1, y1; None where there is none.
        points: float64 (L, 2), NaN where unknown or not annotated; or None.
        visible: bool (L,); None for all.
        size: width and height of the image that the coordinates are of, where the file says so.
        category: of the object; None where the file says none.
    """

    file: str
    split: str = ""
    subject: str | None = None
    box: Box | None = None
    points: np.ndarray | None = None
    visible: np.ndarray | None = None
    size: tuple[float, float] | None = None
    category: Category | None = None


@dataclass(frozen=True, eq=False)
class Annotations:
    """What an annotation file holds.

    Attributes:
        path: the file.
        rows: one for each object; for an image that is listed without any, one without box and points where the file
            says something else of it.
        point_names: of the L points; empty where there are none.
        image_ids: of every image that the file lists, by name (as of `Row.file`); empty where it has no ids.
        file_names: what the file calls an image, by `Row.file`, where `place_annotations` found it under another name.
        notes: what was left out, changed or doubtful, counted, a line each.
        doubtful_corners: whether the boxes' columns have names under which people also give width and height.
    """

    path: str
    rows: tuple[Row, ...]
    point_names: tuple[str, ...] = ()
    image_ids: Mapping[str, Id] = field(default_factory=dict)
    file_names: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    doubtful_corners: bool = False

    def by_file(self) -> dict[str, list[Row]]:
        """The rows of each image."""
        rows: dict[str, list[Row]] = {}
        for row in self.rows:
            rows.setdefault(row.file, []).append(row)
        return rows


class Tally:
    """Counts what befell an annotation file, by kind, and keeps the first names of each."""

    def __init__(self) -> None:
        """Begins with nothing."""
        self.names: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, name: str) -> None:
        """Counts one case."""
        self.names[kind].append(name)

    def count(self, *kinds: str) -> int:
        """Cases of these kinds."""
        return sum(len(self.names[kind]) for kind in kinds if kind in self.names)

    def lines(self, *kinds: str) -> tuple[str, ...]:
        """A line for each kind (of all, if none is given) with the first three names."""
        return tuple(
            f"{kind}: {len(names)} ({listed(names, 3)})"
            for kind, names in self.names.items()
            if names and (not kinds or kind in kinds)
        )


def around(box: Box, degrees: float, name: str, tally: Tally) -> Box:
    """The upright rectangle around a box that is turned about its centre; it is counted that it is turned."""
    if degrees % 180 == 0:
        return box
    tally.add("rotated boxes, taken by the upright rectangle around them", name)
    corners = np.array(box, np.float64).reshape(2, 2)
    cosine, sine = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    middle, half = corners.mean(0), np.array([[cosine, sine], [sine, cosine]]) @ np.diff(corners, axis=0)[0] / 2
    x0, y0, x1, y1 = map(float, (*(middle - half), *(middle + half)))
    return x0, y0, x1, y1


def checked(found: Annotations, tally: Tally, category: str | None = None) -> Annotations:
    """What every kind of file has in common: one category, equally many points, known splits, nothing twice.

    Args:
        found: as parsed.
        tally: what was counted while parsing; its lines become notes.
        category: name or identifier of the category whose objects are wanted, or `ALL`; needed where there are several.

    Raises:
        UserError: if the file can't be used as it is.
    """
    rows = _without_repeats((_annotated(row, tally) for row in _of_category(found, tally, category)), tally)
    counts = {len(row.points) for row in rows if row.points is not None}
    if len(counts) > 1:
        raise UserError(f"{found.path}: all objects need equally many points, found {sorted(counts)}")
    if counts:
        tally.names["objects without points"] += [
            row.file for row in rows if row.points is None and row.box is not None
        ]
    splits: dict[str, str] = {}
    for row in rows:
        if row.split not in ("", "train", "test"):
            raise UserError(f"{found.path}: {row.file}: split is {row.split!r}; train, test or nothing is possible")
        if splits.setdefault(row.file, row.split) != row.split:
            raise UserError(f"{found.path}: {row.file} is in the split {row.split!r} and in {splits[row.file]!r}")
    told = {row.category.points for row in rows if row.category is not None} | {found.point_names}
    names = [each for each in sorted(told) if {len(each)} == counts] or [
        tuple(f"point_{number}" for number in range(max(counts, default=0)))
    ]
    if len(names) > 1:
        raise UserError(f"{found.path}: its categories call their points differently; choose one by --category NAME")
    return replace(found, rows=rows, point_names=names[0], notes=(*found.notes, *tally.lines()))


def _of_category(found: Annotations, tally: Tally, wanted: str | None) -> list[Row]:
    """The rows of the category that is wanted; those without an object belong to each."""
    objects = [row for row in found.rows if row.box is not None or row.points is not None]
    names = Counter("(none)" if row.category is None else row.category.name for row in objects)
    if wanted == ALL or (wanted is None and len(names) < 2):
        return list(found.rows)
    there = listed((f"{name} ({count})" for name, count in names.most_common()), 20) or "none"
    if wanted is None:
        raise UserError(
            f"{found.path}: objects of {len(names)} categories: {there}; choose one by --category NAME, or take those "
            f"of every name by --category {ALL}"
        )

    def is_wanted(row: Row) -> bool:
        return row.category is not None and wanted in (row.category.name, str(row.category.identifier))

    if not any(map(is_wanted, objects)):
        raise UserError(f"{found.path}: no object of the category {wanted!r}; there are {there}")
    others = {id(row) for row in objects if not is_wanted(row)}
    for row in objects:
        if id(row) in others:
            tally.add("objects of other categories left out", row.file)
    return [row for row in found.rows if id(row) not in others]


def _annotated(row: Row, tally: Tally) -> Row:
    """Without what stands for nothing: a box of zeros or of -1, points at (0, 0) or (-1, -1)."""
    box, points = row.box, row.points
    if box is not None and (box in ((0, 0, 0, 0), (-1, -1, -1, -1)) or np.isnan(box).all()):
        box = None
    if points is not None:
        nothing = (points == 0).all(1) | (points == -1).all(1)
        for _ in range(int(nothing.sum())):
            tally.add("points at 0, 0 or -1, -1 taken as not annotated", row.file)
        points = np.where(nothing[:, None], np.nan, points)
    return replace(row, box=box, points=points)


def _without_repeats(rows: Iterable[Row], tally: Tally) -> tuple[Row, ...]:
    """Leaves out objects that are given a second time, with the same box and points in the same image."""
    kept: dict[tuple[object, ...], Row] = {}
    for row in rows:
        points = b"" if row.points is None else row.points.tobytes()
        key = (row.file, row.split, row.subject, str(row.box), points, row.category)
        if key in kept:
            tally.add("objects given twice, used once", row.file)
        kept.setdefault(key, row)
    return tuple(kept.values())


def place_annotations(found: Annotations, pictures: Mapping[str, Path], where: str) -> Annotations:
    """Lays annotations on the pictures that there are.

    Names are matched by `match_names`. Coordinates of another size, or of the picture as it is stored where EXIF turns
    it, are brought into the upright picture. Boxes and points that are impossible there become None and NaN; what
    lies partly or wholly outside is left to the reader.

    Args:
        found: as read.
        pictures: files by name.
        where: what the pictures are, for messages.

    Raises:
        UserError: if a file that is named is not there, a size contradicts the picture's, or most boxes or points are
            unusable.
    """
    named = dict.fromkeys(row.file for row in found.rows)
    meant = match_names([*named, *(name for name in found.image_ids if name not in named)], pictures)
    if missing := [name for name in named if name not in meant]:
        taken = set(meant.values())
        free = Ends(name for name in pictures if name not in taken)
        several = {name: " or ".join(map(shown, free.called(name)[:3])) for name in sorted(missing)}
        raise UserError(
            f"{found.path}: {len(missing)} of {len(named)} files named there are not {where}"
            f"{', or may be several' if any(several.values()) else ''}: "
            f"{listed(f'{name} ({which})' if which else name for name, which in several.items())}"
        )
    called: dict[str, str] = {}
    for name, file in meant.items():
        if called.setdefault(file, name) != name:
            raise UserError(f"{found.path}: {called[file]} and {name} are both the picture {file}; say which is which")
    matched = {name: meant[name] for name in named}
    tally = Tally()
    frames = {file: picture_frame(pictures[file]) for file in dict.fromkeys(matched.values())}
    rows = [replace(row, file=matched[row.file]) for row in found.rows]
    _refuse_sizes(found.path, rows, frames)
    rows = [_in_picture(row, frames[row.file], tally) for row in rows]
    if found.doubtful_corners:
        _refuse_sides(found.path, rows, frames)
    possible = [_possible(row, frames[row.file], tally) for row in rows]
    _refuse_most(found.path, rows, tally)
    if any(row.box is not None for row in rows):
        tally.names["objects without a box, seen whole"] += [row.file for row in rows if row.box is None]
        tally.names["images without an object in it, seen whole"] += [name for name in pictures if name not in frames]
    for name, file in matched.items():
        if PurePosixPath(_plain(name)).name != PurePosixPath(_plain(file)).name:
            tally.add("names without ending taken for the picture called so", name)
        elif name != file:
            tally.add("names taken without their leading folders", name)
    return replace(
        found,
        rows=tuple(_without_strays(rows, possible)),
        image_ids={file: found.image_ids[name] for file, name in called.items() if name in found.image_ids},
        file_names=called,
        notes=(*found.notes, *tally.lines()),
    )


def match_names(names: Sequence[str], pictures: Iterable[str]) -> dict[str, str]:
    """Which picture an annotation file means by a name.

    The same name; else one of the same text, where backslashes separate folders too, letters are composed (NFC) or not
    (NFD), and bytes that are no UTF-8 are written as `shown` does; else, where exactly one picture that is left is
    called alike, as of `Ends`.

    Returns:
        Names of pictures by the names that have one.
    """
    exact = set(pictures)
    known = {_plain(picture): picture for picture in sorted(exact, reverse=True)}
    matched = {name: name if name in exact else known[_plain(name)] for name in names if _plain(name) in known}
    taken = set(matched.values())
    left = Ends(picture for picture in exact if picture not in taken)
    alike = {name: left.called(name) for name in names if name not in matched}
    return matched | {name: found[0] for name, found in alike.items() if len(found) == 1}


class Ends:
    """Pictures by the ends of their names."""

    def __init__(self, pictures: Iterable[str]) -> None:
        """Notes their last parts, with and without their endings."""
        self._by_last: dict[str, list[tuple[tuple[str, ...], bool, str]]] = defaultdict(list)
        for picture in sorted(pictures):
            if (plain := PurePosixPath(_plain(picture))).parts:
                for parts, whole in ((plain.parts, True), (plain.with_suffix("").parts, False)):
                    self._by_last[parts[-1]].append((parts, whole, picture))

    def called(self, name: str) -> list[str]:
        """Those that are called alike but for leading folders, of which either may have more: the ones that share most.

        Tools write `images/default/1.jpg`, or a path of another machine. If there are none, a name may lack the ending.
        """
        parts = PurePosixPath(_plain(name)).parts
        alike = [
            ((whole, min(len(parts), len(other))), picture)
            for other, whole, picture in (self._by_last.get(parts[-1], ()) if parts else ())
            if parts[-len(other) :] == other[-len(parts) :]
        ]
        best = max((rank for rank, _ in alike), default=None)
        return [picture for rank, picture in alike if rank == best]


def _plain(name: str) -> str:
    return PurePosixPath(same_name(shown(name)).replace("\\", "/")).as_posix().removeprefix("./")


def scale_of(size: tuple[float, float], width: int, height: int) -> tuple[float, float] | None:
    """Factors (x, y) from an image of another size to one of width and height; None if its sides have another ratio.

    Sizes are whole numbers: whichever image was made of the other, each of its sides may be rounded up or down.
    """
    x, y = width / size[0], height / size[1]
    made = abs(x - y) <= 1 / size[0] + 1 / size[1] or abs(1 / x - 1 / y) <= 1 / width + 1 / height
    return (x, y) if made else None


def _refuse_sizes(path: str, rows: Sequence[Row], frames: Mapping[str, Frame | None]) -> None:
    wrong = {}
    for row in rows:
        frame = frames[row.file]
        if frame is None or row.size is None or scale_of(row.size, frame.width, frame.height):
            continue
        turned = frame.turned and scale_of(row.size, frame.height, frame.width)
        if not turned or not _within(row, *row.size):
            how = " when upright, as its EXIF says" if frame.turned else ""
            said = f"{row.size[0]:g} x {row.size[1]:g}"
            wrong[row.file] = f"{row.file} is {frame.width} x {frame.height}{how}, the file says {said}"
    if wrong:
        raise UserError(
            f"{path}: {len(wrong)} pictures have other proportions than the file says, so its coordinates are of "
            f"others (cropped, turned or padded): {listed(wrong.values(), 3)}; give the pictures that were annotated, "
            "or mend width and height"
        )


def _within(row: Row, width: float, height: float) -> bool:
    """Whether box and points lie in a picture of that size, or at most a pixel beyond."""
    corners = np.array(row.box or (0, 0, 0, 0), np.float64).reshape(2, 2)
    places = corners if row.points is None else np.concatenate([corners, row.points])
    known = places[np.isfinite(places).all(1)]
    return bool(((known >= -1) & (known <= np.array([width, height]) + 1)).all())


def _in_picture(row: Row, frame: Frame | None, tally: Tally) -> Row:
    """The same in pixels of the upright picture, where the file's coordinates are of another size or turned."""
    if frame is None or row.size is None or (row.box is None and row.points is None):
        return row
    scale = scale_of(row.size, frame.width, frame.height)
    turned = scale is None
    scale = scale or scale_of(row.size, frame.height, frame.width) or (1.0, 1.0)
    box = None if row.box is None else np.array(row.box, np.float64).reshape(2, 2) * scale
    points = None if row.points is None else row.points * scale
    if turned:
        tally.add("objects given in the picture as stored were turned as its EXIF says", row.file)
        # Of a box its sides are mirrored, of a point the centre of its pixel, which lies half a pixel further in.
        box = None if box is None else np.sort(frame.upright(box, 0.0), axis=0)
        points = None if points is None else frame.upright(points, 1.0)
    if (size := tuple(row.size)) not in ((frame.width, frame.height), (frame.height, frame.width)):
        tally.add(f"objects annotated at another size ({size[0]:g} x {size[1]:g}, ...) were scaled", row.file)
    corners = None if box is None else (float(box[0, 0]), float(box[0, 1]), float(box[1, 0]), float(box[1, 1]))
    return replace(row, box=corners, points=points)


INCOMPLETE = "boxes with a missing or infinite number"
AS_SHARES = "boxes in shares of the image's sides instead of pixels"
SWAPPED = "boxes whose second corner lies left of or above the first"
THIN = "boxes under 2 pixels wide or high"
ELSEWHERE = "boxes outside their images"
UNUSABLE_BOXES = (INCOMPLETE, AS_SHARES, SWAPPED, THIN, ELSEWHERE)
"""Such boxes are not used."""

BEYOND = "boxes of which more than half lies outside their images, the rest used"
POINTS_AS_SHARES = "points in shares of the image's sides instead of pixels, not used"
POINTS_OUTSIDE = "points outside their images"


def _box_fault(box: tuple[float, float, float, float], frame: Frame) -> str:
    """Which of the kinds above a box is; "" for none."""
    corners = np.array(box, np.float64)
    if not np.isfinite(corners).all():
        return INCOMPLETE
    if np.abs(corners).max() <= SHARES:
        return AS_SHARES
    width, height = corners[2:] - corners[:2]
    if width < 0 or height < 0:
        return SWAPPED
    if width < 2 or height < 2:
        return THIN
    inside = usable_box(box, frame.width, frame.height)
    if inside is None:
        return ELSEWHERE
    return BEYOND if np.prod(inside[2:] - inside[:2]) < width * height / 2 else ""


def _possible(row: Row, frame: Frame | None, tally: Tally) -> Row:
    """The row without a box, or points, that can't be meant; what is odd is counted."""
    box, points = row.box, row.points
    if frame is None:
        return row  # whoever reads the picture says what is wrong with it
    if box is not None and (fault := _box_fault(box, frame)):
        tally.add(fault, row.file)
        box = None if fault in UNUSABLE_BOXES else box
    if points is not None:
        known = np.isfinite(points).all(1)
        if known.any() and np.abs(points[known]).max() <= SHARES:
            tally.names[POINTS_AS_SHARES] += [row.file] * int(known.sum())
            points = np.full_like(points, np.nan)
        elif outside := int((known & ~is_inside(points, frame.width, frame.height)).sum()):
            tally.names[POINTS_OUTSIDE] += [row.file] * outside
    return replace(row, box=box, points=points)


def is_inside(points: np.ndarray, width: float, height: float) -> np.ndarray:
    """Whether points (..., 2) lie on a pixel of an image; False where they are NaN."""
    return np.asarray(((points >= -0.5) & (points <= np.array([width, height]) - 0.5)).all(-1))


def _without_strays(given: Sequence[Row], possible: Sequence[Row]) -> Iterator[Row]:
    """The rows, save objects that have lost their box in an image where others have one: they would be that image."""
    boxed = {row.file for row in possible if row.box is not None}
    for before, after in zip(given, possible, strict=True):
        lost = before.box is not None and after.box is None and after.points is None
        if not (lost and after.file in boxed):
            yield after


def _refuse_most(path: str, rows: Sequence[Row], tally: Tally) -> None:
    """Refuses a file of which most boxes, or most points, can't be used."""
    boxes = sum(row.box is not None for row in rows)
    points = sum(int(np.isfinite(row.points).all(1).sum()) for row in rows if row.points is not None)
    for what, given, kinds, expected in (
        ("boxes", boxes, (*UNUSABLE_BOXES, BEYOND), "corners x0 < x1 and y0 < y1"),
        ("points", points, (POINTS_AS_SHARES, POINTS_OUTSIDE), "places"),
    ):
        if (bad := tally.count(*kinds)) > MOSTLY * given:
            raise UserError(
                f"{path}: {bad} of {given} {what} can't be meant so: {'; '.join(tally.lines(*kinds))}; expected are "
                f"{expected} in pixels of these images"
            )


def _refuse_sides(path: str, rows: Sequence[Row], frames: Mapping[str, Frame | None]) -> None:
    """Refuses boxes in columns named as corners that are, by all signs, a corner and two sides.

    The signs: read as a corner and sides all lie within their images and have nearly one shape; read as two corners
    their shapes differ widely. Objects of one category are alike in shape, so this tells the two apart where numbers
    alone do not.
    """
    boxes = [(row.box, frame) for row in rows if row.box is not None and (frame := frames[row.file]) is not None]
    if len(boxes) < MIN_FOR_SHAPES:
        return
    values = np.array([box for box, _ in boxes], np.float64)
    limits = np.array([(frame.width, frame.height) for _, frame in boxes], np.float64)
    sides, corners = values[:, 2:], values[:, 2:] - values[:, :2]
    if not (np.isfinite(values).all() and (sides > 0).all() and (values[:, :2] + sides <= limits + 1).all()):
        return
    if (corners > 0).all():
        spread = np.log(corners[:, 0] / corners[:, 1]).std()
        if spread < SHAPES_DIFFER or np.log(sides[:, 0] / sides[:, 1]).std() > spread / 3:
            return
    raise UserError(
        f"{path}: the boxes look like a corner, width and height: read so, all have nearly one shape, read as two "
        "corners they do not; name the columns x,y,width,height if that is so, and xmin,ymin,xmax,ymax if these are "
        "corners"
    )
