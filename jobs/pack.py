"""Packs images into WebDataset shards: `python -m jobs.pack folder|toy ... --out URL`."""

import time
from collections.abc import Sequence
from pathlib import Path

import tyro
from pydantic import BaseModel, ConfigDict, Field

from cluster import storage
from sst import corpora
from sst.errors import UserError, exit_on_user_error
from sst.progress import with_progress
from sst.shards import MANIFEST, ShardWriter


class Pack(BaseModel):
    """What both sources have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: str = Field(description="Directory or URL that the shards and the manifest are written to.")
    protocol: str | None = Field(None, description="Scoring protocol, where not the one that the data suggest.")
    context: float = Field(2.0, ge=1, le=10, description="Sides of the stored crop as a multiple of the box's.")
    seed: int = Field(0, ge=0, description="Seed of the order of the samples (and of the drawings).")
    test_share: float = Field(0.1, ge=0, lt=1, description="Share of test images among those without a split.")
    shard_samples: int = Field(256, ge=1, description="Samples per shard.")
    max_skipped: float = Field(0.01, ge=0, lt=1, description="Share of unusable images that is tolerated.")
    overwrite: bool = Field(False, description="Replace the corpus that is at --out.")


class Folder(Pack):
    """A folder of images, with or without annotations."""

    images: str = Field(description="Folder of images; subfolders are searched too.")
    annotations: str | None = Field(None, description="CSV, or COCO keypoints (.json); points are for scoring only.")
    size: int = Field(256, ge=16, description="Pixels that the longer side of the box is shrunk to, if longer.")


class Toy(Pack):
    """The embedded corpus of drawings."""

    count: int = Field(ge=1, description="Number of images.")
    size: int = Field(128, ge=32, description="Height and width of the drawings.")


def run(config: Folder | Toy) -> None:
    """Packs, and prints a summary.

    Raises:
        UserError: if there is nothing to pack, too much is unusable, or the place is taken.
    """
    start = time.monotonic()
    if storage.exists(storage.join(config.out, MANIFEST)) and not config.overwrite:
        raise UserError(f"{config.out}: holds a corpus already; choose another --out, or replace it by --overwrite")
    if Path(config.out).is_file():
        raise UserError(f"{config.out}: a file; --out must be a directory or URL")
    protocol: str | None
    size: int | None
    if isinstance(config, Toy):
        items = corpora.toy(config.count, config.seed, config.size, config.test_share)
        name, protocol, size = f"toy-{config.seed}", config.protocol or "toy", None
    else:
        items = corpora.folder(config.images, config.annotations, config.test_share)
        root = Path(config.images).resolve()
        name = root.parent.name if root.name == "images" else root.name
        faces = any(item.landmarks == 68 for item in items)
        protocol, size = config.protocol or ("faces68" if faces else None), config.size
    writer = ShardWriter(config.out, name, protocol, config.shard_samples)
    ordered = with_progress(corpora.shuffled(items, config.seed), "packing")
    notes = corpora.pack(ordered, writer, config.context, size, config.max_skipped)
    if (manifest := writer.manifest) is None:
        raise AssertionError("the writer leaves a manifest")
    for note, count in sorted(notes.items()):
        print(f"note: {note}: {count}")
    for skipped in manifest.skipped[:10]:
        print(f"skipped {skipped.source}: {skipped.reason}")
    print(
        f"packed {manifest.samples_of('train')} train and {manifest.samples_of('test')} test images into "
        f"{len(manifest.shards)} shards, {sum(shard.bytes for shard in manifest.shards) / 1e6:.1f} MB, "
        f"{len(manifest.skipped)} skipped, {time.monotonic() - start:.0f} s: {config.out}"
    )


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and packs; a mistake gives a message on stderr and exit code 2."""
    config = tyro.cli(Folder | Toy, prog="jobs.pack", description=__doc__, args=arguments)
    run(config)


if __name__ == "__main__":
    main()
