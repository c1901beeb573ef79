"""Gives the landmarks names: `python -m jobs.name MODEL --annotations FEW.json`.

From a handful of annotated images (5 to 50 are plenty) it learns where your named points lie among the discovered
landmarks, and writes MODEL/names.json; from then on jobs.predict gives the named points too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from cluster import storage
from sst.corpora import folder
from sst.errors import UserError, exit_on_user_error
from sst.predict.naming import VIEW, Examples, curve, learn, save_names
from sst.predict.predictor import Found, Target, in_view, open_model, predict
from sst.progress import with_progress

COUNTS = (1, 5, 10, 50, 300)
HELD_OUT = 0.3
"""Share of the images that errors are measured on, when there are enough."""


class Name(BaseModel):
    """Which model gets names, and from what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[str, tyro.conf.Positional]
    """Run directory of jobs.train, or the model/ directory in it."""
    annotations: str
    """COCO keypoints (.json), or CSV (file, x0, y0, x1, y1, ...); boxes in it are used as by jobs.pack."""
    images: str | None = None
    """Folder of the images; by default the one that the annotation file lies in."""


def annotated_examples(config: Name) -> tuple[Examples, list[str], str, str]:
    """Landmarks and annotated points of the images that are annotated.

    Returns:
        The examples, the points' names, the model's directory and the hash of its weights.

    Raises:
        UserError: if nothing is annotated, or an image is missing or unreadable.
    """
    model, record, place = open_model(config.model)
    root = Path(config.images or Path(config.annotations).parent)
    rows = [row for row in folder.read_annotations(config.annotations) if row.points is not None]
    rows = [row for row in rows if row.points is not None and np.isfinite(row.points).all(-1).any()]
    if not rows:
        raise UserError(f"{config.annotations}: no annotated points in it; annotate a handful of images")
    if missing := [row.file for row in rows if not (root / row.file).is_file()]:
        raise UserError(
            f"{config.annotations}: {len(missing)} of {len(rows)} annotated images are not in {root}: "
            f"{', '.join(missing[:5])}; say where they are by --images"
        )
    targets = [Target(row.file, root / row.file, row.box) for row in rows]
    results = predict(model, record.network.input_size, targets)
    points, confidence, wanted = [], [], []
    for row, found in zip(rows, with_progress(results, "finding landmarks", len(rows)), strict=True):
        if not isinstance(found, Found):
            raise UserError(f"{found.file}: {found.reason}; mend it or take it out of {config.annotations}")
        assert row.points is not None
        points.append(in_view(found.points, found.box, VIEW))
        confidence.append(found.confidence)
        wanted.append(in_view(row.points, found.box, VIEW))
    examples = Examples(np.stack(points), np.stack(confidence), np.stack(wanted))
    names = folder.point_names(config.annotations, examples.targets.shape[1])
    return examples, names, place, record.weights


def error_table(examples: Examples, seed: int = 0) -> Table | None:
    """Errors by number of annotated images, on images that were held out; None where there are too few to tell."""
    order = np.random.default_rng(seed).permutation(len(examples.points))
    held = int(HELD_OUT * len(order))
    if held < 2:
        return None
    rest, out = examples.subset(order[held:]), examples.subset(order[:held])
    counts = (*(count for count in COUNTS if count < len(rest.points)), len(rest.points))
    table = Table(
        "annotated images", "mean error", "worst point", title=f"errors on {held} held-out images, % of the box's side"
    )
    for count, errors in curve(rest, out, counts).items():
        by_point = np.nanmean(errors, 0)
        table.add_row(str(count), f"{100 * np.nanmean(errors) / VIEW:.2f}", f"{100 * np.nanmax(by_point) / VIEW:.2f}")
    return table


def run(config: Name) -> None:
    """Learns, writes and prints what to expect.

    Raises:
        UserError: if there is no model or no usable annotation.
    """
    examples, names, place, weights = annotated_examples(config)
    named = learn(examples, names, weights)
    save_names(place, named)
    table = error_table(examples)
    if table is not None:
        Console().print(table)
    else:
        print("too few annotated images to hold some out and measure errors; with 7 or more a table is shown")
    print(f"{len(names)} named points learnt from {named.images} images: {storage.join(place, 'names.json')}")
    print(f"python -m jobs.predict {config.model} IMAGES --out DIR gives them now too (DIR/named.json)")


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and learns; a mistake gives a message on stderr and exit code 2."""
    run(tyro.cli(Name, prog="jobs.name", description=__doc__, args=arguments))


if __name__ == "__main__":
    main()
