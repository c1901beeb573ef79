"""Image shards: WebDataset tar files of JPEG and JSON members, and the manifest that vouches for them.

A tar file that was cut or altered can read without any error, so readers trust only what matches the
manifest. It is written last: a directory without one is not a corpus.
"""

import io
import math
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster import storage
from sst.data.jpeg import decode_jpeg_scaled
from sst.errors import UserError, problems
from sst.outputs import NewDirectory, record_name, recorded, staging_name, write_record

MANIFEST = "manifest.json"
VERB = "pack"
FIRST_RESERVED = 64
"""Shards whose names are noted before the first is written; most corpora have no more."""

Split = Literal["train", "test"]

_STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)
_BLOCK = 512  # tar files consist of blocks of this size and end with at least two of zeros


def _pack_again(url: str) -> str:
    return f"build the corpus again: landmarks pack ... --out {url} --overwrite"


def _remove_and_pack(url: str) -> str:
    return f"remove it and its shards, and build the corpus again: landmarks pack ... --out {url}"


def _remedy(url: str) -> str:
    return f"rebuild what is damaged by the `landmarks pack` command that wrote it: ... --out {url} --repair"


class ShardInfo(BaseModel):
    """What the manifest says of one shard.

    Attributes:
        file: its name beside the manifest.
        split: split of all its samples.
        samples: their number.
        bytes: size of the file.
        sha256: hex digest of the file.
    """

    model_config = _STRICT

    file: str = Field(pattern=r"^\w[\w.-]*$")
    split: Split
    samples: int = Field(gt=0)
    bytes: int = Field(gt=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Skipped(BaseModel):
    """A source image that was left out, and why."""

    model_config = _STRICT

    source: str
    reason: str


class SampleMeta(BaseModel):
    """What is known of a stored image.

    Attributes:
        source: name of the image that it came from.
        split: train or test.
        subject: who or what is seen, where known.
        box: x0, y0, x1, y1 of what the view shows in pixels of the stored image, of positive area.
        object_box: of the object itself where the view shows more than it; first keypoints beyond it are dropped.
        points: annotated (x, y) in pixels of the stored image, pixel centres at integers; for scoring only.
        visible: whether each point is usable; one without a known place has the box centre and is False.
    """

    model_config = _STRICT

    source: str
    split: Split
    subject: str | None = None
    box: tuple[float, float, float, float]
    object_box: tuple[float, float, float, float] | None = None
    points: tuple[tuple[float, float], ...] | None = None
    visible: tuple[bool, ...] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.box[2] <= self.box[0] or self.box[3] <= self.box[1]:
            raise ValueError(f"box {self.box} has no area")
        if (self.points is None) != (self.visible is None) or len(self.points or ()) != len(self.visible or ()):
            raise ValueError("points and visible must be equally long, or both null")
        return self


@dataclass(frozen=True)
class RawSample:
    """A sample as it is stored: key of nine digits, JPEG bytes, and what is known of the image."""

    key: str
    jpeg: bytes
    meta: SampleMeta

    @property
    def box_share(self) -> float:
        """Share of the stored image that the box covers."""
        import simplejpeg

        height, width = simplejpeg.decode_jpeg_header(self.jpeg)[:2]
        x0, y0, x1, y1 = self.meta.box
        return float((x1 - x0) * (y1 - y0) / (height * width))


class Manifest(BaseModel):
    """The record of a corpus.

    Attributes:
        schema_version: version of the format ("schema" in the file).
        corpus: its name.
        protocol: name of the scoring protocol, or None.
        landmarks: annotated points per image, or None.
        shards: the shards, in the order of the sample keys.
        skipped: source images that were left out.
        white: value that became white in 16-bit source images which use fewer bits; None where there are none.
    """

    model_config = _STRICT

    schema_version: Literal[1] = Field(default=1, alias="schema")
    corpus: str
    protocol: str | None = None
    landmarks: int | None = Field(default=None, gt=0)
    shards: tuple[ShardInfo, ...]
    skipped: tuple[Skipped, ...] = ()
    white: int | None = Field(default=None, gt=0)

    @classmethod
    def load(cls, url: str) -> Self:
        """Reads the manifest of the corpus at `url`.

        Raises:
            ValueError: if there is no readable manifest of this schema; the message names file and remedy.
        """
        path = storage.join(url, MANIFEST)
        if storage.is_file(url):
            raise ValueError(f"{url}: a file, not a directory of shards; give the directory that holds {MANIFEST}")
        if not storage.exists(path):
            what = f"no {MANIFEST} in it" if storage.exists(url) else "no such directory"
            raise ValueError(f"{url}: {what}, so this is not a (complete) corpus; {_pack_again(url)}")
        try:
            return cls.model_validate(storage.read_json(path))
        except ValidationError as error:
            raise ValueError(f"{path}: not a manifest ({problems(error)}); {_remove_and_pack(url)}") from error
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON file ({error.__cause__}); {_remove_and_pack(url)}") from error

    def check(self, url: str) -> None:
        """Looks whether every shard is there with the recorded size; cheap, reads no shard, and lists them once.

        Raises:
            ValueError: naming all shards that are missing or of another size.
        """
        wrong, listed = [], storage.sizes(url)
        for shard in self.shards:
            try:
                size = listed.get(shard.file) or storage.size(storage.join(url, shard.file))
            except FileNotFoundError:
                wrong.append(f"{shard.file} is missing ({shard.bytes} bytes expected)")
                continue
            if size != shard.bytes:
                wrong.append(f"{shard.file} has {size} bytes ({shard.bytes} expected)")
        if wrong:
            count = f"{len(wrong)} of {len(self.shards)} shards do not match the manifest"
            raise ValueError(f"{url}: {count}: {'; '.join(wrong)}; {_remedy(url)}")

    def shards_of(self, split: Split) -> tuple[ShardInfo, ...]:
        """The shards of one split, in order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def samples_of(self, split: Split) -> int:
        """Number of images of one split."""
        return sum(shard.samples for shard in self.shards_of(split))


class ShardWriter:
    """Writes a corpus shard by shard, holding one shard in memory; numbers the samples itself.

    As a context manager it writes the manifest on leaving, or, after an exception, takes back what it
    wrote. Equal samples give equal bytes. `manifest` holds the result afterwards.

    Of the files in the directory it touches only those that an earlier manifest names, or the record of shards that a
    killed writer left without one. A corpus that is there stays until the new one is complete.
    """

    def __init__(
        self, url: str, corpus: str, protocol: str | None = None, shard_samples: int = 256, white: int | None = None
    ) -> None:
        """Nothing is written yet.

        Args:
            url: directory to write to.
            corpus: name of the corpus.
            protocol: name of the scoring protocol.
            shard_samples: samples per shard; the last one of a split may hold fewer.
            white: as of `Manifest`.

        Raises:
            ValueError: if `shard_samples` is below 1.
        """
        if shard_samples < 1:
            raise ValueError(f"shard_samples must be at least 1, got {shard_samples}")
        self.url, self.corpus, self.protocol, self.shard_samples = url, corpus, protocol, shard_samples
        self.white = white
        self.manifest: Manifest | None = None
        self._samples = 0
        self._landmarks: int | None = None
        self._pending: list[RawSample] = []
        self._shards: list[ShardInfo] = []
        self._skipped: list[Skipped] = []
        self._place = url
        self._earlier: frozenset[str] = frozenset()
        self._reserved: list[str] = []
        self._directory = NewDirectory(url)

    def add(self, jpeg: bytes, meta: SampleMeta) -> None:
        """Appends a sample; a change of split begins a new shard.

        Raises:
            ValueError: if the number of annotated points differs from the earlier samples'.
        """
        if meta.points is not None:
            self._landmarks = self._landmarks or len(meta.points)
            if len(meta.points) != self._landmarks:
                raise ValueError(f"{meta.source}: {len(meta.points)} points, earlier images have {self._landmarks}")
        if self._pending and self._pending[0].meta.split != meta.split:
            self._flush()
        self._pending.append(RawSample(f"{self._samples:09d}", jpeg, meta))
        self._samples += 1
        if len(self._pending) == self.shard_samples:
            self._flush()

    def skip(self, source: str, reason: str) -> None:
        """Records a source image that is left out."""
        self._skipped.append(Skipped(source=source, reason=reason))

    def __enter__(self) -> Self:
        """Looks whether the place is free.

        Raises:
            UserError: if there is a manifest that is not one, or a shard that no manifest or record names.
        """
        killed = recorded(self.url, VERB) or frozenset()
        storage.remove(storage.join(self.url, staging_name(VERB)))
        if storage.exists(storage.join(self.url, MANIFEST)):
            self._earlier = killed | {shard.file for shard in self._manifest_there().shards}
            self._place = storage.join(self.url, staging_name(VERB))
        for name in killed - self._earlier:  # of a writer that was killed before it had a manifest
            storage.remove(storage.join(self.url, name))
        try:
            self._reserve(FIRST_RESERVED)
        except BaseException:
            self._directory.take_back()
            raise
        return self

    def _manifest_there(self) -> Manifest:
        try:
            return Manifest.load(self.url)
        except ValueError as error:
            raise UserError(
                f"{storage.join(self.url, MANIFEST)}: not a manifest of `landmarks pack`, so it is not touched; choose "
                "another --out, or remove it and the shards beside it"
            ) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        complete = False
        try:
            if kind is None:
                self._flush()
                self._finish()
                complete = True
        finally:
            if not complete:
                with suppress(OSError):  # the error that is on its way says what is wrong
                    self._take_back()

    def _finish(self) -> None:
        """Brings new shards to the places of earlier ones, and writes the manifest."""
        self.manifest = Manifest(
            corpus=self.corpus,
            protocol=self.protocol,
            landmarks=self._landmarks,
            shards=tuple(self._shards),
            skipped=tuple(self._skipped),
            white=self.white,
        )
        content = self.manifest.model_dump(mode="json", by_alias=True)
        storage.write_json(storage.join(self._place, MANIFEST), content)
        if self._place != self.url:
            # All that takes room is written by now.
            new = [shard.file for shard in self._shards]
            write_record(self.url, VERB, self._earlier.union(new))
            storage.remove(storage.join(self.url, MANIFEST))
            for name in self._earlier.difference(new):
                storage.remove(storage.join(self.url, name))
            for name in (*new, MANIFEST):
                storage.move(storage.join(self._place, name), storage.join(self.url, name))
        storage.remove(storage.join(self.url, record_name(VERB)))  # from now on the manifest names the shards
        storage.remove(storage.join(self.url, staging_name(VERB)))

    def _take_back(self) -> None:
        """Removes what this writer wrote; an earlier corpus stays."""
        storage.remove(storage.join(self.url, staging_name(VERB)))
        if self._place == self.url:
            for shard in self._shards:
                storage.remove(storage.join(self.url, shard.file))
            storage.remove(storage.join(self.url, record_name(VERB)))
        self._directory.take_back()

    def _flush(self) -> None:
        if not self._pending:
            return
        data = shard_bytes(self._pending)
        name = shard_name(len(self._shards))
        if len(self._shards) == len(self._reserved):
            self._reserve(2 * len(self._reserved))  # twice as many each time, so that long corpora cost little
        storage.write_bytes(storage.join(self._place, name), data)
        self._shards.append(
            ShardInfo(
                file=name,
                split=self._pending[0].meta.split,
                samples=len(self._pending),
                bytes=len(data),
                sha256=storage.sha256(data),
            )
        )
        self._pending = []

    def _reserve(self, count: int) -> None:
        """Notes the names of the first shards as this writer's, before there are any.

        Raises:
            UserError: if a file has one of these names already.
        """
        names = [shard_name(number) for number in range(count)]
        taken = set(storage.list_names(self.url)).difference(self._earlier, self._reserved)
        if foreign := [name for name in names if name in taken]:
            raise UserError(
                f"{self.url}: {foreign[0]} is there already, and not from `landmarks pack` (no manifest names it), so "
                "it is not touched; choose another --out"
            )
        self._reserved = names
        if self._place == self.url:
            write_record(self.url, VERB, names)


def shard_name(number: int) -> str:
    """File name of a shard of images."""
    return f"shard-{number:05d}.tar"


def shard_bytes(samples: Sequence[RawSample]) -> bytes:
    """The samples as a tar file; equal samples give equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            text = sample.meta.model_dump_json().encode()
            for suffix, data in (("jpg", sample.jpeg), ("json", text)):
                header = tarfile.TarInfo(f"{sample.key}.{suffix}")  # time, owner and mode are constants
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def read_shard(url: str, expected_sha256: str | None = None) -> Iterator[RawSample]:
    """Reads a shard whole, checks it whole, and only then yields its samples in order.

    Args:
        url: the tar file.
        expected_sha256: hex digest from the manifest; None leaves the hash unchecked, but not the structure.

    Raises:
        ValueError: if the shard is missing, does not match the hash (after a second fetch), or is not
            exactly a row of whole samples; the message names shard and remedy.
    """
    remedy = _remedy(url.rpartition("/")[0])
    try:
        data = storage.read_bytes(url)
        if expected_sha256 is not None and storage.sha256(data) != expected_sha256:
            data = storage.read_bytes(url)  # a damaged transfer is told from a damaged file
    except FileNotFoundError as error:
        raise ValueError(f"{url}: shard is missing; {remedy}") from error
    if expected_sha256 is not None and (actual := storage.sha256(data)) != expected_sha256:
        raise ValueError(f"{url}: sha256 is {actual}, the manifest says {expected_sha256}; {remedy}")
    try:
        samples = _parse(url, data)
    except (ValueError, tarfile.TarError, EOFError, OSError) as error:
        reason = problems(error) if isinstance(error, ValidationError) else str(error.args[0] if error.args else "")
        raise ValueError(f"{url}: damaged shard ({reason}); {remedy}") from error
    yield from samples


def _parse(url: str, data: bytes) -> list[RawSample]:
    import webdataset as wds

    files = wds.tariterators.tar_file_expander([{"url": url, "stream": io.BytesIO(data)}])
    samples: list[RawSample] = []
    used = 0
    for entry in wds.tariterators.group_by_keys(files):
        key, names = entry["__key__"], sorted(name for name in entry if not name.startswith("__"))
        if names != ["jpg", "json"] or not re.fullmatch(r"\d{9}", key):
            raise ValueError(f"sample {key} has the members {names}, expected jpg and json")
        if samples and key <= samples[-1].key:
            raise ValueError(f"sample {key} follows {samples[-1].key}: duplicate key or wrong order")
        samples.append(RawSample(key, entry["jpg"], SampleMeta.model_validate_json(entry["json"])))
        used += sum(_BLOCK + math.ceil(len(entry[name]) / _BLOCK) * _BLOCK for name in names)
    # What webdataset passes over (other members, all that follows a broken header) shows as bytes left over.
    if len(data) < used + 2 * _BLOCK or any(data[used:]):
        raise ValueError(f"{len(data)} bytes, but {len(samples)} whole samples end at byte {used}")
    return samples


def decode(sample: RawSample, min_scale: float = 1.0) -> tuple[np.ndarray, float, float]:
    """Decodes a sample's image, shrunk while decoding where that is enough.

    Args:
        sample: the stored image.
        min_scale: least size that is needed, as a share of the stored size.

    Returns:
        As of `decode_jpeg_scaled`: image, and height and width that it spans in pixels of the stored image.

    Raises:
        ValueError: if the image cannot be decoded; the message names sample and source.
    """
    try:
        return decode_jpeg_scaled(sample.jpeg, min_scale)
    except ValueError as error:
        raise ValueError(f"sample {sample.key} ({sample.meta.source}): {error}") from error
