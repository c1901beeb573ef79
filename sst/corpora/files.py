"""What the published corpora share: finding their files, and boxes or points that the user adds."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sst.corpora.annotation_files import read_annotations
from sst.corpora.annotations import Row
from sst.errors import UserError


def find(root: Path, places: Sequence[str], what: str) -> Path:
    """The first of the places below `root` that exists.

    Raises:
        UserError: if none does; the message says what was looked for, and where.
    """
    if not root.is_dir():
        raise UserError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; expected {what} in it")
    for place in places:
        if (root / place).exists():
            return root / place
    raise UserError(f"{root}: {what} is missing; expected {' or '.join(places)} in it")


def names_in(folder: Path, what: str) -> set[str]:
    """Names of what lies in a folder.

    Raises:
        UserError: if it is no folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; expected {what} in it")
    return {path.name for path in folder.iterdir()}


def refuse_missing(folder: Path, names: Iterable[str], why: str) -> None:
    """Complains of missing files.

    Raises:
        UserError: if there are any names; the message has the first five.
    """
    if missing := sorted(names):
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(
            f"{folder}: {len(missing)} {'file is' if len(missing) == 1 else 'files are'} missing: {shown}; {why}"
        )


def read_lines(path: Path) -> list[str]:
    """Lines of a text file without the blanks around them, up to the last that is not empty.

    Raises:
        UserError: if it can't be read as text.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error}); expected a text file") from error


def read_mat(path: Path, name: str) -> np.ndarray:
    """One variable of a MATLAB file up to version 7.

    Raises:
        ValueError: if the file can't be read or has no such variable.
    """
    from scipy.io import loadmat

    expected = f"expected a MATLAB file of version 5 to 7 with a variable {name}"
    try:
        content: dict[str, Any] = loadmat(path, variable_names=[name])
    except Exception as error:  # scipy raises many types on damaged input
        raise ValueError(f"{path.name}: can't be read ({type(error).__name__}: {error}); {expected}") from error
    if not isinstance(value := content.get(name), np.ndarray):
        raise ValueError(f"{path.name}: no such variable; {expected}")
    return value


def additions(path: str | None, names: Collection[str], landmarks: int | None) -> dict[str, Row]:
    """Boxes and points that the user adds to a corpus, from a CSV (or COCO) file as of the folder source.

    Rows of images that the corpus does not use are passed over, as published lists cover all of an archive.

    Args:
        path: the file, or None for no additions.
        names: the corpus's images.
        landmarks: points per image that are accepted; None for none.

    Returns:
        By image name; `box` and `points` are None where a row leaves them empty.

    Raises:
        UserError: if the file is unusable, names none of the images, or has other points.
    """
    if path is None:
        return {}
    rows: dict[str, Row] = {}
    found = read_annotations(path)
    for note in found.notes:
        print(f"note: {path}: {note}")
    for row in found.rows:
        if row.file not in names:
            continue
        if row.file in rows:
            raise UserError(f"{path}: {row.file} occurs twice; these images have one object each")
        box = None if row.box is None or not np.isfinite(row.box).all() else row.box
        points = None if row.points is None or np.isnan(row.points).all() else row.points
        if points is not None and (len(points) != landmarks or not np.isfinite(points).all()):
            known = int(np.isfinite(points).all(axis=1).sum())
            raise UserError(f"{path}: {row.file} has {known} points; {landmarks or 'no points'} or none are expected")
        rows[row.file] = Row(row.file, box=box, points=points)
    if not rows:
        raise UserError(f"{path}: names none of the images, which are called like {min(names)}")
    return rows


def require_boxes(path: str | None, added: Mapping[str, Row], names: Collection[str]) -> None:
    """Refuses training images for which the user adds no box, so that none is derived from annotated points.

    Raises:
        UserError: naming one of them.
    """
    without = [name for name in names if (row := added.get(name)) is None or row.box is None]
    if without:
        raise UserError(
            f"{path or '--annotations is not given'}: no box of {without[0]} and {len(without) - 1} others; "
            "expected one for every training image, as --boxes detector asks for"
        )
