"""A folder of image files, with or without annotations in a CSV or COCO file."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from sst.corpora import interop
from sst.corpora.annotation_files import read_annotations
from sst.corpora.annotations import Annotations, Row, place_annotations
from sst.corpora.listing import Listing, copies, listed, pictures_in, same_name, shown
from sst.corpora.packing import Item, SourceImage, read_image, split_of
from sst.corpora.pictures import several_note, white_level, white_note
from sst.data.shards import Split


def items(
    images: str,
    names: Sequence[str],
    annotations: str | None = None,
    test_share: float = 0.1,
    category: str | None = None,
    say: Callable[[str], None] = lambda note: None,
) -> list[Item]:
    """Pictures of a folder, those of equal content in one split.

    Args:
        images: the folder.
        names: of the pictures in it, as of `sst.corpora.listing.pictures_in`.
        annotations: CSV or COCO file, as of `sst.corpora.annotation_files`, or a project of another tool, as of
            `sst.corpora.interop`, whose labelled frames of videos are items too. Files that it does not name have no
            annotation.
        test_share: share of the images without a split that become test images.
        category: of the annotated objects that are wanted.
        say: is told what of annotations and pictures was left out, changed or doubtful.

    Raises:
        UserError: if the annotation file is unusable.
    """
    root = Path(images)
    rows: dict[str, list[Row]] = {}
    frames: Mapping[str, Callable[[], np.ndarray]] = {}
    if annotations is not None:
        if interop.is_project(annotations):
            project = interop.annotated(annotations, root, names, category)
            found, frames, names = project.annotations, project.frames, project.names
        else:
            found = read_annotations(annotations, category)
        placed = _placed(found, frames, {name: root / name for name in names}, f"in {images}")
        rows = placed.by_file()
        for note in placed.notes:
            say(f"{annotations}: {note}")
        if not rows:
            say(f"{annotations}: no object in it, so all images are seen whole")
    for note in several_note({name: root / name for name in names}):
        say(note)
    if (white := white_level(root / name for name in names)) is not None:
        say(white_note(white))
    each = [(name, n, row) for name in (*names, *sorted(frames)) for n, row in enumerate(rows.get(name, [Row(name)]))]
    splits = _splits(root, each, test_share, say)
    return [
        _folder_item(
            frames.get(name) or partial(read_image, root / name, white),
            row,
            shown(name) if len(rows.get(name, [])) < 2 else f"{shown(name)}#{number}",
            split,
            white,
        )
        for (name, number, row), split in zip(each, splits, strict=True)
    ]


def _placed(found: Annotations, frames: Collection[str], pictures: Mapping[str, Path], where: str) -> Annotations:
    """The annotations laid on the pictures; those of frames, which are no files, as they are."""
    still = tuple(row for row in found.rows if row.file not in frames)
    placed = place_annotations(replace(found, rows=still), pictures, where)
    return replace(placed, rows=(*placed.rows, *(row for row in found.rows if row.file in frames)))


def _splits(
    root: Path, each: Sequence[tuple[str, int, Row]], test_share: float, say: Callable[[str], None]
) -> list[Split]:
    """The split of every item: what is equal, and all objects of one picture, are test images if one of them is."""
    first = copies(root, list(dict.fromkeys(name for name, _, _ in each)))
    if again := [name for name, other in first.items() if name != other]:
        say(
            f"{len(again)} pictures are links to others or copies of them, and are used too: {listed(sorted(again), 3)}"
        )
    same = [first.get(name, name) for name, _, _ in each]
    splits = [row.split or split_of(same_name(shown(name)), test_share) for name, _, row in each]
    tested = {name for name, split in zip(same, splits, strict=True) if split == "test"}
    moved = [own[0] for own, name, split in zip(each, same, splits, strict=True) if split == "train" and name in tested]
    if moved:
        say(
            f"{len(moved)} pictures for training are equal to test pictures, so they are test pictures too: "
            f"{listed(moved, 3)}"
        )
    return ["test" if name in tested else "train" for name in same]


def _folder_item(read: Callable[[], np.ndarray], row: Row, source: str, split: Split, white: int | None) -> Item:
    def load() -> SourceImage:
        return SourceImage(read(), row.box, row.points, row.visible)

    return Item(source, split, row.subject, load, None if row.points is None else len(row.points), white)


def pictures_of(images: str, annotations: str | None) -> Listing:
    """The pictures of a folder; none need be there where the annotations are a project, perhaps of videos.

    Raises:
        UserError: if there is no such folder, or no picture in it.
    """
    return pictures_in(images, or_none=annotations is not None and interop.is_project(annotations))
