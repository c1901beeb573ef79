"""How one source image becomes a stored sample, and how many of them become a corpus.

Where images and annotations come from is the business of `sst.corpora`.

Conventions: points and boxes are (x, y) in pixels with pixel centres at integers, of the upright image (a
rotation noted in EXIF is applied first). Shape letters: L landmarks.
"""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster import storage
from sst.corpora.listing import shown
from sst.corpora.pictures import FULL, stretched
from sst.data.jpeg import MAX_PIXELS
from sst.data.loader import ordered_map
from sst.data.shards import Manifest, RawSample, SampleMeta, ShardWriter, Split, shard_bytes
from sst.errors import UserError
from sst.nn.geometry import resize_matrix, transform_points

MIN_SIDE = 8
"""Images whose shorter side has fewer pixels are refused: there is nothing to learn from."""
JPEG_QUALITY = 95


class UnusableImage(ValueError):
    """An image that is left out of the corpus; the message is the reason."""


@dataclass(frozen=True, eq=False)
class SourceImage:
    """A source image and what is annotated on it.

    Attributes:
        image: RGB uint8 (H, W, 3).
        box: what the view shows, x0, y0, x1, y1, or None for the whole image.
        object_box: of the object itself, where that is tighter.
        points: float64 (L, 2), NaN where unknown; or None.
        visible: bool (L,); None for all.
    """

    image: np.ndarray
    box: tuple[float, float, float, float] | None = None
    points: np.ndarray | None = None
    visible: np.ndarray | None = None
    object_box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True, eq=False)
class Item:
    """An image with so many annotated points; `load` reads or draws it and raises `UnusableImage`.

    `white` is that of its corpus, as of `sst.corpora.pictures.white_level`.
    """

    source: str
    split: Split
    subject: str | None
    load: Callable[[], SourceImage]
    landmarks: int | None = None
    white: int | None = None


@dataclass(frozen=True)
class Packed:
    """A sample to be stored, or why there is none, and which rules had to be applied."""

    jpeg: bytes
    meta: SampleMeta | None
    reason: str = ""
    notes: tuple[str, ...] = ()


def split_of(source: str, test_share: float) -> Split:
    """The split of an image that brings none: by a hash of its name, so independent of all other images."""
    number = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big")
    return "test" if number < test_share * 2.0**64 else "train"


def read_image(path: Path, white: int | None = None) -> np.ndarray:
    """Reads an image file as RGB uint8 (H, W, 3), upright.

    Rules: an EXIF rotation is applied; grey becomes three equal channels; CMYK is converted by its plain
    inverse; 16-bit values are divided by 257, or so that `white` becomes 255, and 32-bit integer grey likewise, after
    clipping; transparency is laid over white; of an animation the first picture is taken. Refused: floating-point
    pixels, more than `MAX_PIXELS`, a side below `MIN_SIDE`.

    Args:
        path: the file.
        white: of pictures with 16 bits, which value is white, as of `sst.corpora.pictures.white_level`.

    Raises:
        UnusableImage: if the file is refused, cut short or not an image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            if file.width * file.height > MAX_PIXELS:
                raise UnusableImage(f"{file.width} x {file.height} pixels; at most {MAX_PIXELS} are permitted")
            if min(file.width, file.height) < MIN_SIDE:
                raise UnusableImage(f"{file.width} x {file.height} pixels; {MIN_SIDE} is the least side")
            return _to_rgb(ImageOps.exif_transpose(stretched(file, path, white or FULL)))
    except UnusableImage:
        raise
    except Exception as error:  # Pillow raises many types on damaged input
        reason = str(error)
        for written in (str(path), repr(str(path))[1:-1]):  # a manifest should name no path of a machine
            reason = reason.replace(written, path.name)
        reason = shown(reason)
        raise UnusableImage(f"unreadable ({type(error).__name__}: {reason})") from error


def _to_rgb(image: Any) -> np.ndarray:
    from PIL import Image

    if image.mode == "F":
        raise UnusableImage("floating-point pixels have no stated range")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(image.convert("RGB"))


def usable_box(box: Sequence[float], width: int, height: int) -> np.ndarray | None:
    """The box x0, y0, x1, y1 clipped to its image; None if it is then under 2 pixels wide or high, or has a NaN."""
    clipped = np.clip(np.array(box, np.float64), 0, [width, height, width, height])
    return clipped if np.isfinite(clipped).all() and (clipped[2:] - clipped[:2] >= 2).all() else None


def pack_item(item: Item, context: float = 2.0, size: int | None = 256) -> Packed:
    """Loads an image, crops it to its box with context, and shrinks it to what is needed.

    The box is clipped to the image; without a box, or with one under 2 pixels wide or high or with a NaN, the
    whole image (0, 0, W, H) is taken. A point that is NaN is stored at the box centre, not visible; one
    outside the stored image is not visible.

    Args:
        item: the image.
        context: sides of the crop as a multiple of the box's, about its centre, clipped to the image.
        size: pixels that the longer side of the box is shrunk to where it is longer; None for never.

    Returns:
        The sample; without `meta` but with a reason where the image can't be used.
    """
    import simplejpeg

    try:
        source = item.load()
    except UnusableImage as error:
        return Packed(b"", None, str(error))
    notes: list[str] = []
    height, width = source.image.shape[:2]
    box = None if source.box is None else usable_box(source.box, width, height)
    if source.box is not None and box is None:
        notes.append("box unusable, whole image taken")
    image, matrix = _cropped(source.image, box, context, size)
    if box is None:
        stored_box = np.array([0.0, 0.0, image.shape[1], image.shape[0]])
    else:
        stored_box = transform_points(matrix, box.reshape(2, 2)).ravel()
    points = visible = None
    if source.points is not None:
        known = np.isfinite(source.points).all(axis=1)
        points = transform_points(matrix, np.where(known[:, None], source.points, 0.0))
        points[~known] = (stored_box[:2] + stored_box[2:]) / 2
        inside = ((points >= -0.5) & (points <= np.array(image.shape[1::-1]) - 0.5)).all(axis=1)
        visible = known & inside & (True if source.visible is None else source.visible)
        notes += ["point unknown"] * int((~known).sum()) + ["point outside"] * int((~inside).sum())
    object_box = None
    if source.object_box is not None and np.isfinite(source.object_box).all():
        object_box = _corners(transform_points(matrix, np.array(source.object_box, np.float64).reshape(2, 2)))
    meta = SampleMeta(
        source=item.source,
        split=item.split,
        subject=item.subject,
        box=_corners(stored_box),
        object_box=object_box,
        points=None if points is None else tuple((x, y) for x, y in points.round(4).tolist()),
        visible=None if visible is None else tuple(visible.tolist()),
    )
    jpeg = simplejpeg.encode_jpeg(image, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")
    return Packed(jpeg, meta, notes=tuple(notes))


def _cropped(
    image: np.ndarray, box: np.ndarray | None, context: float, size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The part of an image round a box, shrunk as `pack_item` says, and the matrix (3, 3) from image to part."""
    import cv2

    height, width = image.shape[:2]
    box = np.array([0.0, 0.0, width, height]) if box is None else box
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * max(1.0, context)
    left, top = (int(v) for v in np.maximum(0, np.floor(centre - half)))
    right, bottom = (int(v) for v in np.minimum([width, height], np.ceil(centre + half)))
    part = np.ascontiguousarray(image[top:bottom, left:right])
    factor = min(1.0, size / (box[2:] - box[:2]).max()) if size else 1.0
    matrix = np.array([[1.0, 0.0, -left], [0.0, 1.0, -top], [0.0, 0.0, 1.0]])
    if factor < 1:
        new = [max(1, round((right - left) * factor)), max(1, round((bottom - top) * factor))]
        # The matrix follows the whole number of pixels per axis, not the factor, so points stay exact.
        matrix = resize_matrix(new[0] / (right - left), new[1] / (bottom - top)) @ matrix
        part = cv2.resize(part, (new[0], new[1]), interpolation=cv2.INTER_AREA)
    return part, matrix


def _corners(box: np.ndarray) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box.ravel().round(4).tolist()
    return x0, y0, x1, y1


def shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """Training items, then test items, each in a random order, so that shards are alike."""
    order = np.random.default_rng(seed).permutation(len(items))
    return sorted((items[i] for i in order), key=lambda item: item.split == "test")


def pack(
    items: Iterable[Item],
    writer: ShardWriter,
    context: float,
    size: int | None,
    max_skipped: float,
    mix_seed: int | None = None,
) -> Counter[str]:
    """Packs the items in order into the writer's corpus; on failure nothing of it is left.

    Args:
        items: images; those of one split should follow one another, unless they are mixed here.
        writer: not yet entered.
        context: as of `pack_item`.
        size: as of `pack_item`.
        max_skipped: share of unusable images above which packing fails.
        mix_seed: for items that come in an order of their own (frames of videos): the samples are written in
            this random order instead, as of `mixed`.

    Returns:
        How often each rule for bad annotations had to be applied.

    Raises:
        UserError: if too many images are unusable, or all; or there is no room to mix them in.
    """
    notes: Counter[str] = Counter()
    skipped, total = [], 0
    with writer:
        results = ordered_map(lambda item: (item.source, pack_item(item, context, size)), items)
        for source, packed in results if mix_seed is None else mixed(results, mix_seed):
            total += 1
            notes.update(packed.notes)
            if packed.meta is None:
                skipped.append(f"{source}: {packed.reason}")
                writer.skip(source, packed.reason)
            else:
                writer.add(packed.jpeg, packed.meta)
        if len(skipped) > max_skipped * total or len(skipped) == total:
            raise UserError(
                f"{len(skipped)} of {total} images can't be used; --max-skipped is {max_skipped}: "
                f"{'; '.join(skipped[:5])}{'; ...' if len(skipped) > 5 else ''}"
            )
    return notes


def mixed(results: Iterable[tuple[str, Packed]], seed: int) -> Iterator[tuple[str, Packed]]:
    """Training samples, then test samples, each in a random order; unusable images at once.

    All samples are first kept in one unnamed temporary file, which the operating system removes however the
    process ends; only where each lies is kept in memory. The order is that of `shuffled` for as many samples.

    Raises:
        UserError: if the temporary file can't be written.
    """
    places: list[tuple[int, int, int, tuple[str, ...]]] = []
    tests: list[bool] = []
    end = 0
    with _spooling():
        spool = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    with spool:
        for source, packed in results:
            if packed.meta is None:
                yield source, packed
                continue
            text = packed.meta.model_dump_json().encode()
            places.append((end, len(packed.jpeg), len(text), packed.notes))
            tests.append(packed.meta.split == "test")
            rest = packed.jpeg + text
            end += len(rest)
            while rest:
                with _spooling():
                    rest = rest[spool.write(rest) :]
        order = np.random.default_rng(seed).permutation(len(places))
        for number in sorted(order, key=lambda number: tests[number]):
            offset, jpeg_bytes, text_bytes, notes = places[number]
            spool.seek(offset)
            jpeg, text = spool.read(jpeg_bytes), spool.read(text_bytes)
            meta = SampleMeta.model_validate_json(text)
            yield meta.source, Packed(jpeg, meta, notes=notes)


def repair(
    items: Sequence[Item], url: str, manifest: Manifest, damaged: Sequence[int], context: float, size: int | None
) -> None:
    """Writes damaged shards anew from their source; they must come out as the manifest says.

    Args:
        items: all images of the source, in the order in which they were packed.
        url: directory of the corpus.
        manifest: its manifest.
        damaged: numbers of the shards.
        context: as of `pack_item`, and as it was.
        size: likewise.

    Raises:
        UserError: if the source, or the settings, are not those that the corpus was packed from; shards rebuilt
            until then are written.
    """
    skipped = {entry.source for entry in manifest.skipped}
    kept = [item for item in items if item.source not in skipped]
    total = sum(shard.samples for shard in manifest.shards)
    given = "the corpus was packed from other images or with other settings; pack it again with --overwrite"
    if len(kept) != total:
        raise UserError(f"{url}: the source has {len(kept)} usable images, the manifest {total}: {given}")
    for number in damaged:
        shard, first = manifest.shards[number], sum(shard.samples for shard in manifest.shards[:number])
        samples = []
        for place, item in enumerate(kept[first : first + shard.samples], start=first):
            packed = pack_item(item, context, size)
            if packed.meta is None:
                raise UserError(f"{shard.file}: {item.source} can no longer be read: {packed.reason}")
            samples.append(RawSample(f"{place:09d}", packed.jpeg, packed.meta))
        data = shard_bytes(samples)
        if storage.sha256(data) != shard.sha256:
            raise UserError(f"{shard.file}: rebuilt from the source it differs from the manifest: {given}")
        storage.write_bytes(storage.join(url, shard.file), data)


@contextmanager
def _spooling() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{tempfile.gettempdir()}: can't hold the samples until all are read ({error}); "
            "let TMPDIR name a directory with room for the whole corpus"
        ) from error
