"""A folder of image files, with or without annotations in a CSV or COCO file."""

import os
from collections.abc import Callable
from pathlib import Path

from sst.corpora.annotation_files import read_annotations
from sst.corpora.annotations import Row, place_annotations
from sst.corpora.packing import Item, SourceImage, read_image, split_of
from sst.corpora.pictures import white_level, white_note
from sst.data.shards import Split
from sst.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def items(
    images: str,
    annotations: str | None = None,
    test_share: float = 0.1,
    category: str | None = None,
    say: Callable[[str], None] = lambda note: None,
) -> list[Item]:
    """Image files of a folder and of all folders in it, sorted by name.

    Args:
        images: the folder.
        annotations: CSV or COCO file, as of `sst.corpora.annotation_files`. Files that it does not name have no
            annotation.
        test_share: share of the images without a split that become test images.
        category: of the annotated objects that are wanted.
        say: is told what of the annotations was left out, changed or doubtful.

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
        placed = place_annotations(
            read_annotations(annotations, category), {name: root / name for name in names}, f"in {images}"
        )
        rows = placed.by_file()
        for note in placed.notes:
            say(f"{annotations}: {note}")
    if (white := white_level(root / name for name in names)) is not None:
        say(white_note(white))
    return [
        _folder_item(root, row, name if len(found) == 1 else f"{name}#{number}", test_share, white)
        for name in names
        for found in [rows.get(name, [Row(name)])]
        for number, row in enumerate(found)
    ]


def _folder_item(root: Path, row: Row, source: str, test_share: float, white: int | None) -> Item:
    def load() -> SourceImage:
        return SourceImage(read_image(root / row.file, white), row.box, row.points, row.visible)

    # All objects of one image belong to one split, hence the hash of the file's name.
    split: Split = split_of(row.file, test_share) if not row.split else "test" if row.split == "test" else "train"
    return Item(source, split, row.subject, load, None if row.points is None else len(row.points), white)
