"""What can be packed: one configuration for each source, and the packing itself."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from cluster import storage
from sst.corpora import bbcpose, celeba, folder, human36m, ls3d, packing, toy
from sst.corpora.packing import Item
from sst.corpora.validation import validate
from sst.data.shards import MANIFEST, Manifest, ShardWriter
from sst.errors import GivenPath, UserError
from sst.outputs import refuse_overlap
from sst.progress import with_progress


class Pack(BaseModel):
    """What all sources have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: GivenPath = Field(description="Directory or URL that the shards and the manifest are written to.")
    protocol: str | None = Field(None, description="Scoring protocol, where not the one that the data suggest.")
    context: float = Field(2.0, ge=1, le=10, description="Sides of the stored crop as a multiple of the box's.")
    seed: int = Field(0, ge=0, description="Seed of the order of the samples (and of the drawings).")
    shard_samples: int = Field(256, ge=1, description="Samples per shard.")
    max_skipped: float = Field(0.01, ge=0, lt=1, description="Share of unusable images that is tolerated.")
    overwrite: bool = Field(False, description="Replace the corpus that is at --out.")
    repair: bool = Field(False, description="Rebuild only the damaged shards of the corpus at --out, from its source.")


class Folder(Pack):
    """A folder of images, with or without annotations."""

    images: GivenPath = Field(description="Folder of images; subfolders are searched too.")
    annotations: GivenPath | None = Field(
        None,
        description="CSV, COCO keypoints (.json), or a project of DeepLabCut (config.yaml), SLEAP (.slp), Label Studio "
        "(.json), CVAT (.xml) or NWB (.nwb); points are for scoring only.",
    )
    category: str | None = Field(None, description="Category of the objects in --annotations, if several; or all.")
    size: int = Field(256, ge=16, description="Pixels that the longer side of the box is shrunk to, if longer.")
    test_share: float = Field(0.1, ge=0, lt=1, description="Share of test images among those without a split.")


class Toy(Pack):
    """The embedded corpus of drawings."""

    count: int = Field(ge=1, description="Number of images.")
    size: int = Field(128, ge=32, description="Height and width of the drawings.")
    test_share: float = Field(0.1, ge=0, lt=1, description="Share of test images among those without a split.")


Boxes = Literal["annotations", "detector"]
BOXES = "detector: refuse training images without a box in --annotations; else it may come from their annotated points."


class Published(Pack):
    """What the published corpora have in common; docs/corpora.md shows the layout of each."""

    root: GivenPath = Field(description="Folder that the owners' archives are unpacked in.")
    context: float = Field(10.0, ge=1, le=10, description="As above; by default the whole image, as was published.")
    size: int | None = Field(
        None, ge=16, description="Pixels that the longer side of the box is shrunk to, if longer; None: as it is."
    )


class CelebA(Published):
    """CelebA's aligned training images, and MAFL's test images."""

    annotations: GivenPath | None = Field(
        None, description="CSV with face boxes, the 68 points of MAFL images, or both."
    )
    boxes: Boxes = Field("annotations", description=BOXES)


class Ls3d(Published):
    """300W-LP to train on, LS3D-W balanced as test images."""

    annotations: GivenPath | None = Field(None, description="CSV with face boxes of 300W-LP images.")
    boxes: Boxes = Field("annotations", description=BOXES)


class Human36m(Published):
    """Human3.6M: six actions, every 10th frame of six subjects, every 50th of the test subject."""


class BbcPose(Published):
    """BBC Pose: frames of the training videos, hand-annotated frames of the test videos."""

    every: int = Field(10, ge=1, description="Of so many annotated training frames one is taken.")
    annotations: GivenPath | None = Field(None, description="CSV with boxes of signers.")
    boxes: Boxes = Field("annotations", description=BOXES)
    context: float = Field(2.0, ge=1, le=10, description="Sides of the stored crop as a multiple of the box's.")
    size: int | None = Field(256, ge=16, description="Pixels that the longer side of the box is shrunk to, if longer.")


Source = (
    Folder
    | Toy
    | Annotated[CelebA, tyro.conf.subcommand("celeba")]
    | Annotated[Ls3d, tyro.conf.subcommand("ls3d")]
    | Annotated[Human36m, tyro.conf.subcommand("human36m")]
    | Annotated[BbcPose, tyro.conf.subcommand("bbcpose")]
)


def print_note(note: str) -> None:
    """Tells the person at the command line what is odd about the input."""
    print(f"note: {note}")


Images = tuple[Iterable[Item], str, str | None, int | None]
"""Images, name of the corpus, the protocol that its data suggest, and the size to shrink boxes to."""


def images_of(config: Source) -> Images:
    """What a configuration names; what is odd about it is printed.

    Raises:
        UserError: if the source is not as it should be.
    """
    if isinstance(config, Toy):
        return toy.items(config.count, config.seed, config.size, config.test_share), f"toy-{config.seed}", "toy", None
    if isinstance(config, CelebA):
        items = celeba.items(config.root, config.annotations, detected=config.boxes == "detector")
        return items, "celeba", "mafl" if items[-1].landmarks == celeba.LANDMARKS else None, config.size
    if isinstance(config, Ls3d):
        faces = ls3d.items(config.root, config.annotations, detected=config.boxes == "detector")
        return faces, "ls3d", "ls3d", config.size
    if isinstance(config, Human36m):
        clips = with_progress(human36m.clips(config.root), "packing")
        return (item for clip in clips for item in human36m.frames(clip)), "human36m", "human36m", config.size
    if isinstance(config, BbcPose):
        signers = bbcpose.items(config.root, config.every, config.annotations, detected=config.boxes == "detector")
        return signers, "bbcpose", None, config.size
    listing = folder.pictures_of(config.images, config.annotations)
    listing.say()
    items = folder.items(
        config.images, listing.names, config.annotations, config.test_share, config.category, print_note
    )
    root = Path(config.images).resolve()
    name = root.parent.name if root.name == "images" else root.name
    return items, name, "faces68" if any(item.landmarks == 68 for item in items) else None, config.size


def pack_source(config: Source, found: Images | None = None) -> None:
    """Packs what a configuration names, and prints a summary.

    Args:
        config: what is packed, and how.
        found: its `images_of`, where the caller has looked already.

    Raises:
        UserError: if there is nothing to pack, too much is unusable, or the place is taken.
    """
    start = time.monotonic()
    refuse_overlap(
        config.out,
        {
            "the folder": getattr(config, "images", getattr(config, "root", None)),
            "--annotations": getattr(config, "annotations", None),
        },
    )
    if config.repair:
        repair_corpus(config)
        return
    if storage.exists(storage.join(config.out, MANIFEST)) and not config.overwrite:
        raise UserError(f"{config.out}: holds a corpus already; choose another --out, or replace it by --overwrite")
    if Path(config.out).is_file():
        raise UserError(f"{config.out}: a file; --out must be a directory or URL")
    items, name, protocol, size = found or images_of(config)
    mix_seed = None if isinstance(items, list) else config.seed  # what can't be loaded in any order is mixed later
    white = items[0].white if isinstance(items, list) and items else None
    if isinstance(items, list):
        items = with_progress(packing.shuffled(items, config.seed), "packing")
    writer = ShardWriter(config.out, name, config.protocol or protocol, config.shard_samples, white)
    notes = packing.pack(items, writer, config.context, size, config.max_skipped, mix_seed)
    if (manifest := writer.manifest) is None:
        raise AssertionError("the writer leaves a manifest")
    for note, count in sorted(notes.items()):
        print(f"note: {note}: {count}")
    for skipped in manifest.skipped[:10]:
        print(f"skipped {skipped.source}: {skipped.reason}")
    if isinstance(config, Published) and manifest.protocol is None:
        print(f"note: no scoring protocol is known for {manifest.landmarks} points, so runs on it are not scored")
    print(
        f"packed {manifest.samples_of('train')} train and {manifest.samples_of('test')} test images into "
        f"{len(manifest.shards)} shards, {sum(shard.bytes for shard in manifest.shards) / 1e6:.1f} MB, "
        f"{len(manifest.skipped)} skipped, {time.monotonic() - start:.0f} s: {config.out}"
    )


def repair_corpus(config: Source) -> None:
    """Rebuilds the shards that do not match the manifest, and says which.

    Raises:
        UserError: if there is no corpus, its source can't be read in any order, or gives other images now.
    """
    try:
        manifest = Manifest.load(config.out)
    except ValueError as error:
        raise UserError(str(error)) from error
    found = validate(config.out, manifest)
    damaged = sorted({problem.shard for problem in found if problem.shard is not None})
    items, _, _, size = images_of(config)
    if not isinstance(items, list):
        raise UserError(f"{config.out}: videos can't be read in the shards' order; pack again with --overwrite")
    packing.repair(packing.shuffled(items, config.seed), config.out, manifest, damaged, config.context, size)
    for number in damaged:
        print(f"rebuilt {manifest.shards[number].file}")
    print(f"{len(damaged)} of {len(manifest.shards)} shards were damaged: {config.out}")
