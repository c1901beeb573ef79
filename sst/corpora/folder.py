"""A folder of image files, with or without annotations in a CSV or COCO file."""

from collections.abc import Callable, Sequence
from pathlib import Path

from sst.corpora.annotation_files import read_annotations
from sst.corpora.annotations import Row, place_annotations
from sst.corpora.listing import copies, listed, same_name, shown
from sst.corpora.packing import Item, SourceImage, read_image, split_of
from sst.corpora.pictures import white_level, white_note
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
        annotations: CSV or COCO file, as of `sst.corpora.annotation_files`. Files that it does not name have no
            annotation.
        test_share: share of the images without a split that become test images.
        category: of the annotated objects that are wanted.
        say: is told what of annotations and pictures was left out, changed or doubtful.

    Raises:
        UserError: if the annotation file is unusable.
    """
    root = Path(images)
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
    each = [(name, number, row) for name in names for number, row in enumerate(rows.get(name, [Row(name)]))]
    splits = [row.split or split_of(same_name(shown(name)), test_share) for name, _, row in each]
    first = copies(root, names)
    tested = {first.get(name, name) for (name, _, _), split in zip(each, splits, strict=True) if split == "test"}
    moved = [name for (name, _, _), split in zip(each, splits, strict=True)
             if split == "train" and first.get(name, name) in tested]  # fmt: skip
    if moved:
        say(f"{len(moved)} pictures for training are equal to test pictures, so they are test pictures too: "
            f"{listed(moved, 3)}")  # fmt: skip
    return [
        _folder_item(
            root / name,
            row,
            shown(name) if len(rows.get(name, [])) < 2 else f"{shown(name)}#{number}",
            "test" if first.get(name, name) in tested else "train",
            white,
        )
        for name, number, row in each
    ]


def _folder_item(path: Path, row: Row, source: str, split: Split, white: int | None) -> Item:
    def load() -> SourceImage:
        return SourceImage(read_image(path, white), row.box, row.points, row.visible)

    return Item(source, split, row.subject, load, None if row.points is None else len(row.points), white)
