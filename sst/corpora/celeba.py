"""CelebA: the aligned faces of the training split, and those of MAFL to be scored on.

Layout, below the root (each also accepted directly in it): `Img/img_align_celeba/NNNNNN.jpg` (or
`img_align_celeba_hq`), `Eval/list_eval_partition.txt`, `Anno/list_landmarks_align_celeba.txt`, and from the MAFL
archive `MAFL/training.txt` and `MAFL/testing.txt`.
"""

import re
from functools import partial
from pathlib import Path

import numpy as np

from sst.corpora.annotations import Box
from sst.corpora.faces import box_of_five, grown_box
from sst.corpora.files import additions, find, names_in, read_lines, refuse_missing, require_boxes
from sst.corpora.packing import Item, SourceImage, UnusableImage, read_image
from sst.data.shards import Split
from sst.errors import UserError

WIDTH, HEIGHT = 178, 218
LANDMARKS = 68
IMAGES = ("Img/img_align_celeba", "img_align_celeba", "Img/img_align_celeba_hq", "img_align_celeba_hq")
PARTITION = ("Eval/list_eval_partition.txt", "list_eval_partition.txt")
FIVE_POINTS = ("Anno/list_landmarks_align_celeba.txt", "list_landmarks_align_celeba.txt")
MAFL_TRAINING = ("MAFL/training.txt", "mafl_training.txt")
MAFL_TESTING = ("MAFL/testing.txt", "mafl_testing.txt")


def items(root: str, annotations: str | None = None, *, detected: bool = False) -> list[Item]:
    """Training images: CelebA's training split without MAFL's test images. Test images: those of MAFL.

    Points, for scoring only, are given to the MAFL images: 68 where `annotations` has them, otherwise the
    archive's 5. MAFL also lists images of CelebA's other splits for training; they are left out, since what is in
    the training shards is trained on.

    Args:
        root: folder of the archives.
        annotations: CSV as of the folder source with boxes, with 68 points, or both. A box is the detected face,
            before the margin; for an image without one it is derived from the 5 points.
        detected: refuse training images without a box of their own.

    Raises:
        UserError: if a file is missing or odd.
    """
    base = Path(root)
    partition = read_partition(find(base, PARTITION, "CelebA's list of splits"))
    five = read_five_points(find(base, FIVE_POINTS, "CelebA's list of points on aligned images"))
    training_path = find(base, MAFL_TRAINING, "MAFL's list of training images")
    testing_path = find(base, MAFL_TESTING, "MAFL's list of test images")
    mafl_training, mafl_testing = set(read_names(training_path)), read_names(testing_path)
    if both := sorted(mafl_training.intersection(mafl_testing)):
        raise UserError(
            f"{training_path}: {both[0]} is in {testing_path.name} too; expected lists without common images"
        )
    held_out = set(mafl_testing)
    names = [name for name, part in partition.items() if part == 0 and name not in held_out]
    folder = find(base, IMAGES, "the folder of aligned images")
    wanted = names + mafl_testing
    refuse_missing(folder, set(wanted) - names_in(folder, "the aligned images"), "expected every image of the lists")
    if unknown := [name for name in wanted if name not in five]:
        raise UserError(f"{base}: {unknown[0]} has no points; expected {FIVE_POINTS[0]} to have a line for every image")
    added = additions(annotations, set(wanted), LANDMARKS)
    if detected:
        require_boxes(annotations, added, names)
    has_points = any(row.points is not None for row in added.values())

    def item(name: str, split: Split) -> Item:
        row = added.get(name)
        points = None if row is None else row.points
        if name not in held_out and name not in mafl_training:
            points = None
        elif not has_points:
            points = five[name]
        elif points is None and split == "test":
            raise UserError(f"{annotations}: no points of {name}; expected 68 for every test image of MAFL")
        box = row.box if row is not None and row.box is not None else box_of_five(five[name])
        count = None if points is None else len(points)
        return Item(name, split, None, partial(load, folder / name, box, points), count)

    return [item(name, "train") for name in names] + [item(name, "test") for name in mafl_testing]


def load(path: Path, box: Box, points: np.ndarray | None) -> SourceImage:
    """Reads an aligned image.

    Raises:
        UnusableImage: if it can't be read or has another size.
    """
    image = read_image(path)
    height, width = image.shape[:2]
    if (width, height) != (WIDTH, HEIGHT):
        raise UnusableImage(f"{width} x {height} pixels; aligned images have {WIDTH} x {HEIGHT}")
    return SourceImage(image, grown_box(box, width, height), points, object_box=box)


def read_partition(path: Path) -> dict[str, int]:
    """The split of each image: 0 training, 1 validation, 2 test.

    Raises:
        UserError: naming file and line, if it is not such a list.
    """
    parts: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), 1):
        if not re.fullmatch(r"\d{6}\.jpg\s+[012]", line):
            raise UserError(f"{path}, line {number}: {line[:60]!r}; expected an image name and 0, 1 or 2")
        name, part = line.split()
        parts[name] = int(part)
    if not parts:
        raise UserError(f"{path}: empty; expected lines such as '000001.jpg 0'")
    return parts


def read_names(path: Path) -> list[str]:
    """The images of a MAFL list.

    Raises:
        UserError: naming file and line, if it is not such a list.
    """
    names = read_lines(path)
    for number, name in enumerate(names, 1):
        if not re.fullmatch(r"\d{6}\.jpg", name):
            raise UserError(f"{path}, line {number}: {name[:60]!r}; expected an image name such as 000001.jpg")
    if not names:
        raise UserError(f"{path}: empty; expected an image name such as 000001.jpg on each line")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: an image occurs twice; expected each once")
    return names


def read_five_points(path: Path) -> dict[str, np.ndarray]:
    """Eyes, nose tip and mouth corners of each aligned image, float64 (5, 2).

    Raises:
        UserError: naming file and line, if it is not CelebA's list, or cut short.
    """
    lines = read_lines(path)
    if len(lines) < 2 or not lines[0].isdecimal():
        raise UserError(f"{path}, line 1: expected the number of images, then a line of column names")
    if int(lines[0]) != len(lines) - 2:
        raise UserError(f"{path}: {len(lines) - 2} images; expected the {int(lines[0])} of its first line")
    names, values = [], np.empty((len(lines) - 2, 10))
    for row, line in enumerate(lines[2:]):
        cells = line.split()
        try:
            values[row] = [float(cell) for cell in cells[1:]]
        except ValueError:  # words, or another number of them
            raise UserError(f"{path}, line {row + 3}: {line[:60]!r}; expected an image name and 10 numbers") from None
        names.append(cells[0])
    return dict(zip(names, values.reshape(-1, 5, 2), strict=True))
