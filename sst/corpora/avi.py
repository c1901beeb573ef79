"""Damaged AVI files: their frames' headers restored, and how many of the frames have numbers that are right.

An AVI file does not number its frames: they are chunks, one after the other, and FFmpeg counts those that it finds.
Where a chunk's header is damaged, every later frame would get too low a number. The file's index says where each chunk
begins and how long it is, so the headers can be restored, in a copy.

Source: Microsoft, "AVI RIFF File Reference" (idx1); OpenDML AVI M-JPEG File Format Subcommittee, "OpenDML AVI File
Format Extensions", 1.02 (indx and ix##).
"""

import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO

HEADER = 8
"""Bytes of a chunk's name and size, before its data."""

UNFINISHED = (0, 2**32 - 1)
"""Sizes of a file whose recorder was killed."""

LARGEST = 2**24
"""Bytes of a frame that may be missing at the end of such a file."""

INTACT = 0.5
"""Share of chunks that must be where an index says; else bytes were added or removed, or it is an unusual index."""

Chunk = tuple[int, bytes]
"""Where a chunk begins, and its header."""


@dataclass(frozen=True)
class Readable:
    """A video as it is best read.

    Attributes:
        path: of the file, or of a copy of it in which headers are restored.
        is_avi: whether it is an AVI file.
        sure: how many of an AVI file's first frames get their right numbers by counting those stored; None for all.
    """

    path: str
    is_avi: bool = False
    sure: int | None = None


@contextmanager
def readable(name: str) -> Iterator[Readable]:
    """The video itself or, of an AVI file with damaged headers that its index can restore, a copy.

    The copy is removed at the end; who has opened it before that can still read it. Where there is no room for it the
    file itself is given. A file that is cut, and whole up to there, has the numbers right that it has.
    """
    with open(name, "rb") as file:
        start = _read(file, 0, 12)
        if start[:4] != b"RIFF" or start[8:] != b"AVI ":
            yield Readable(name)
            return
        course = _walk(file)
        chunks = [] if course.whole else _indexed(file, course)
        wrong = {at: header for at, header in chunks if _read(file, at, HEADER) != header}
    if course.whole or (chunks and not wrong):  # some writers string them otherwise, but where their index says
        yield Readable(name, is_avi=True)
    elif len(wrong) > (1 - INTACT) * len(chunks) or not chunks:
        yield Readable(name, True, course.frames)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            copy = os.path.join(scratch, "video.avi")
            yield _restored(name, wrong, copy) or Readable(name, True, course.frames)


def _restored(name: str, headers: Mapping[int, bytes], copy: str) -> Readable | None:
    """Writes a copy with those headers at their places; None if there is no room for it."""
    try:
        shutil.copyfile(name, copy)
        with open(copy, "r+b") as file:
            for at, header in headers.items():
                file.seek(at)
                file.write(header)
            file.flush()
            course = _walk(file)
    except OSError:
        return None
    return Readable(copy, True, None if course.whole else course.frames)


@dataclass
class _Course:
    """What was met on the way from header to header.

    Attributes:
        frames: how many chunks of the first video stream.
        whole: whether the headers lead to the end of the file, or to where it is cut.
        list_start: where the name of the first list of frames stands, from which idx1 may count.
        list_end: where that list ends and idx1 stands; 0 if it was not met.
        supers: where the data of OpenDML's indices of indices begin.
    """

    frames: int = 0
    whole: bool = False
    list_start: int = 0
    list_end: int = 0
    supers: list[int] = field(default_factory=list)


def _walk(file: BinaryIO) -> _Course:
    """Goes from header to header, into lists, as far as they lead."""
    course = _Course()
    streams: list[bytes] = []
    names: tuple[bytes, ...] = ()
    at, end, length = 0, 0, file.seek(0, os.SEEK_END)
    while at + HEADER <= length:
        name, size = struct.unpack("<4sI", _read(file, at, HEADER))
        after = at + HEADER + size + size % 2
        if name == b"RIFF":
            end = length + LARGEST if size in UNFINISHED else after
        elif not all(32 <= byte < 127 for byte in name) or (after > end and name != b"LIST"):
            return course
        elif name == b"strh":
            streams.append(_read(file, at + HEADER, 4))
            number = b"%02d" % streams.index(b"vids") if b"vids" in streams else b"-"
            names = (number + b"dc", number + b"db")
        elif name == b"indx":
            course.supers.append(at + HEADER)
        elif name == b"LIST" and not course.list_end and _read(file, at + HEADER, 4) == b"movi":
            course.list_start, course.list_end = at + HEADER, after
        course.frames += name in names
        at = at + HEADER + 4 if name in (b"RIFF", b"LIST") else after
    course.whole = True
    return course


def _indexed(file: BinaryIO, course: _Course) -> list[Chunk]:
    """The chunks that the file's index lists, ascending; none if it is not there or damaged.

    Where there is an OpenDML index it is taken, since idx1 knows only the first part of a long file.
    """
    found = sorted(chunk for at in course.supers for chunk in _opendml(file, at)) or sorted(_idx1(file, course))
    ends = [at + HEADER + _size(header) for at, header in found]
    apart = all(end <= at for end, (at, _) in zip(ends, found[1:], strict=False))
    return found if apart and all(re.fullmatch(rb"\d\d[\w ]{2}", header[:4]) for _, header in found) else []


def _idx1(file: BinaryIO, course: _Course) -> list[Chunk]:
    """What the index after the first list of frames lists."""
    start = _read(file, course.list_end, HEADER)
    data = _read(file, course.list_end + HEADER, _size(start)) if start[:4] == b"idx1" else b""
    if not data or len(data) != _size(start) or len(data) % 16:
        return []
    entries = [
        (at, name + struct.pack("<I", size))
        for name, _, at, size in struct.iter_unpack("<4sIII", data)
        if name != b"rec "  # a list of chunks
    ]
    # Some writers count from the beginning of the file, most from that of the list.
    counted = [[(base + at, header) for at, header in entries] for base in (course.list_start, 0)]
    return max(counted, key=lambda chunks: sum(_read(file, at, HEADER) == header for at, header in chunks))


def _opendml(file: BinaryIO, at: int) -> list[Chunk]:
    """What a stream's indices list, by the index of these indices whose data begin at that place."""
    found: list[Chunk] = []
    kind, count = struct.unpack("<3xBI", _read(file, at, HEADER).ljust(HEADER, b"\0"))
    data = _read(file, at + 24, 16 * count) if kind == 0 else b""
    for place, _, _ in struct.iter_unpack("<QII", data[: len(data) // 16 * 16]):
        index = _read(file, place, HEADER + 24).ljust(HEADER + 24, b"\0")
        kind, number, name, base = struct.unpack("<3xBI4sQ4x", index[HEADER:])
        entries = _read(file, place + HEADER + 24, 8 * number)
        if index[:2] != b"ix" or kind != 1 or len(entries) != 8 * number:
            return []
        # It says where the data begin; the highest bit of the size marks frames that are no key frames.
        found += [
            (base + start - HEADER, name + struct.pack("<I", size & 0x7FFFFFFF))
            for start, size in struct.iter_unpack("<II", entries)
        ]
    return found


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)


def _size(header: bytes) -> int:
    return int.from_bytes(header[4:HEADER], "little")
