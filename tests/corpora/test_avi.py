"""Damaged AVI files: frames keep their numbers where the file's index tells them, and else it is said."""

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from sst.corpora.avi import readable
from sst.corpora.packing import UnusableImage
from sst.corpora.videos import frame_of
from sst.predict.sources import find_sources

FRAMES, BITS = 40, 6


def numbered(path: Path, code: str) -> bytes:
    """A video of noise whose frames show their number: bit b is white above black in column b, or black above white."""
    writer, rng = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), 10, (192, 160)), np.random.default_rng(0)
    for number in range(FRAMES):
        frame = rng.integers(60, 195, (160, 192, 3), np.uint8)
        for bit in range(BITS):
            upper = 255 * (number >> bit & 1)
            frame[:40, 32 * bit : 32 * bit + 32], frame[40:80, 32 * bit : 32 * bit + 32] = upper, 255 - upper
        writer.write(frame)
    writer.release()
    return path.read_bytes()


def shown(frame: np.ndarray) -> int:
    """The number that a frame shows."""
    halves = frame[:80].reshape(2, 40, BITS, 32, 3)[:, 8:32, :, 8:24].mean((1, 3, 4))
    return sum(1 << bit for bit in range(BITS) if halves[0, bit] > halves[1, bit])


def read(path: Path) -> tuple[dict[int, int], list[str]]:
    """What each frame shows, by the number that it got, and what is said."""
    sources = find_sources([str(path)])
    found = {int(target.file.removeprefix("frame_")): shown(target.source) for target in sources.targets}
    return found, [note.partition(": ")[2] for note in sources.notes]


def starts_of(data: bytes) -> list[int]:
    """Where the chunks of frames begin."""
    at, found = data.index(b"movi") + 4, []
    while data[at : at + 4] == b"00dc":
        found.append(at)
        size = struct.unpack("<I", data[at + 4 : at + 8])[0]
        at += 8 + size + size % 2
    assert len(found) == FRAMES
    return found


def overwritten(data: bytes, at: int, count: int, zeros: bool = False) -> bytes:
    rubbish = bytes(count) if zeros else np.random.default_rng(1).integers(0, 256, count, np.uint8).tobytes()
    return data[:at] + rubbish + data[at + count :]


DAMAGES: dict[str, Callable[[bytes, int, int], bytes]] = {
    "name": lambda data, at, end: overwritten(data, at, 4),
    "size": lambda data, at, end: overwritten(data, at + 4, 4),
    "larger size": lambda data, at, end: data[: at + 4] + struct.pack("<I", 3 * (end - at)) + data[at + 8 :],
    "smaller size": lambda data, at, end: data[: at + 4] + struct.pack("<I", (end - at) // 2) + data[at + 8 :],
    "data": lambda data, at, end: overwritten(data, at + 8, end - at - 8),
    "all": lambda data, at, end: overwritten(data, at, end - at, zeros=True),
    "4 kB": lambda data, at, end: overwritten(data, at - 1000, 4096),
    "4 kB of zeros": lambda data, at, end: overwritten(data, at - 1000, 4096, zeros=True),
    "several frames": lambda data, at, end: overwritten(data, at - 1000, 3 * (end - at), zeros=True),
}


@pytest.mark.parametrize("code", ["MJPG", "XVID"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_frames_after_damage_keep_their_numbers(tmp_path, code, damage):
    data = numbered(tmp_path / "a.avi", code)
    starts = starts_of(data)
    for number in (5, 20, 35):
        (tmp_path / "a.avi").write_bytes(DAMAGES[damage](data, starts[number], starts[number + 1]))
        found, notes = read(tmp_path / "a.avi")
        hit = range(number - 1, number + 4)
        # Other frames than the damaged ones show their own numbers; of XVID from the next key frame (every 12th) on,
        # since until then frames are made of the ones before them.
        sound = [each for each in range(FRAMES) if each < number - 1 or each >= number + (4 if code == "MJPG" else 16)]
        assert [found.get(each) for each in sound] == sound
        assert set(range(FRAMES)) - set(found) <= set(hit)
        if len(found) < FRAMES:
            assert len(notes) == 1 and notes[0].startswith(f"{FRAMES - len(found)} of {FRAMES} frames are lost, since")
            assert notes[0].endswith("the others keep their numbers")
        if damage in ("name", "size", "larger size", "smaller size"):
            assert found == {each: each for each in range(FRAMES)} and notes == []


@pytest.mark.parametrize("damage", ["none", "name", "all"])
@pytest.mark.parametrize(("codec", "late"), [("libx264 -g 12", 2), ("mpeg4 -bf 2 -vtag XVID -q:v 5", 1)])
def test_frames_that_are_stored_in_another_order_have_their_numbers(tmp_path, codec, late, damage):
    """The decoder's times are late by as many frames as it waits for, in an undamaged file too."""
    ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    plain, path = tmp_path / "plain.avi", tmp_path / "a.avi"
    numbered(plain, "MJPG")
    codecs = ["-c:v", *codec.split(), "-pix_fmt", "yuv420p"]
    subprocess.run([ffmpeg, "-loglevel", "error", "-i", plain, *codecs, path], check=True)
    with readable(str(path)) as best:
        video = cv2.VideoCapture(best.path)
        assert video.read()[0] and round(video.get(cv2.CAP_PROP_POS_MSEC) / 100) == late
    data = path.read_bytes()
    starts = starts_of(data)
    if damage != "none":
        path.write_bytes(DAMAGES[damage](data, starts[20], starts[21]))
    found, notes = read(path)
    sound = [each for each in range(FRAMES) if damage != "all" or not 18 <= each < 36]
    assert [found.get(each) for each in sound] == sound
    assert (len(found) == FRAMES and notes == []) or damage == "all"


def test_a_first_frame_that_is_lost_moves_no_numbers(tmp_path):
    data = numbered(tmp_path / "a.avi", "MJPG")
    starts = starts_of(data)
    for first in (1, 3):
        (tmp_path / "a.avi").write_bytes(overwritten(data, starts[0] + 8, starts[first] - starts[0] - 8, zeros=True))
        assert read(tmp_path / "a.avi")[0] == {each: each for each in range(first, FRAMES)}


def test_without_an_index_it_is_said_from_where_on_numbers_are_not_known(tmp_path):
    path = tmp_path / "a.avi"
    data = numbered(path, "MJPG")
    starts = starts_of(data)
    cut = data[: starts[30] + 500]
    path.write_bytes(cut)
    found, notes = read(path)
    assert set(found) <= set(range(31)) and all(found[each] == each for each in range(30))
    assert notes[0].endswith("the others keep their numbers")
    path.write_bytes(overwritten(cut, starts[12], 8))
    found, notes = read(path)
    assert all(found[each] == each for each in range(12)) and found[12] == 13
    assert notes[0].endswith(
        "the others are numbered in their order, and the numbers after frame_000011 are not known to be right"
    )
    index = data.rindex(b"idx1")
    for rest in (b"", bytes(len(data) - index), data[index : index + 40] + bytes(64) + data[index + 104 :]):
        path.write_bytes(data[:index] + rest)
        assert read(path) == ({each: each for each in range(FRAMES)}, [])
        path.write_bytes(overwritten(data[:index] + rest, starts[12], 8))
        assert "numbers after frame_000011 are not known" in read(path)[1][0]


@pytest.mark.parametrize("change", ["removed", "added"])
def test_bytes_that_were_removed_or_added_do_not_make_the_index_lie(tmp_path, change):
    path = tmp_path / "a.avi"
    data = numbered(path, "MJPG")
    at = starts_of(data)[12] + 100
    path.write_bytes(data[:at] + (data[at + 50 :] if change == "removed" else bytes(50) + data[at:]))
    found, notes = read(path)
    assert all(found[each] == each for each in range(12))
    assert notes[0].endswith("the numbers after frame_000012 are not known to be right")


def test_a_frame_of_a_project_is_the_one_with_that_number(tmp_path):
    path = tmp_path / "a.avi"
    data = numbered(path, "MJPG")
    starts = starts_of(data)
    path.write_bytes(overwritten(data, starts[12], 8))
    assert [shown(frame_of(path, number)) for number in (3, 12, 30)] == [3, 12, 30]
    path.write_bytes(overwritten(data[: starts[35]], starts[12], 8))
    assert shown(frame_of(path, 3)) == 3
    with pytest.raises(UnusableImage, match="a.avi is damaged, and it can't be told which frame is number 30"):
        frame_of(path, 30)


def chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def open_dml(data: bytes) -> tuple[bytes, list[int]]:
    """A file in two parts (RIFF), each with its index, made of a plain one; and where its frames begin."""
    starts = [*starts_of(data), data.rindex(b"idx1")]
    frames = [data[one:two] for one, two in zip(starts, starts[1:], strict=False)]
    head = data[data.index(b"avih") : data.index(b"strl") - 8]
    stream = data[data.index(b"strh") : data.index(b"JUNK")]

    def whole(indices: list[tuple[int, int]]) -> tuple[bytes, list[int], list[tuple[int, int]]]:
        listed = b"".join(struct.pack("<QII", at, size, FRAMES // 2) for at, size in indices)
        table = struct.pack("<HBBI4s12x", 4, 0, 0, 2, b"00dc") + listed
        header = chunk(b"LIST", b"hdrl" + head + chunk(b"LIST", b"strl" + stream + chunk(b"indx", table)))
        out, places, found = b"", [], []
        for number, half in enumerate((frames[: FRAMES // 2], frames[FRAMES // 2 :])):
            kind, before = (b"AVIX", b"") if number else (b"AVI ", header)
            at = base = len(out) + 12 + len(before) + 12
            entries = b""
            for each in half:
                places.append(at)
                entries += struct.pack("<II", at + 8 - base, struct.unpack("<I", each[4:8])[0])
                at += len(each)
            index = chunk(b"ix00", struct.pack("<HBBI4sQ4x", 2, 0, 1, len(half), b"00dc", base) + entries)
            found.append((at, len(index)))
            out += chunk(b"RIFF", kind + before + chunk(b"LIST", b"movi" + b"".join(half) + index))
        return out, places, found

    _, _, indices = whole([(0, 0), (0, 0)])
    out, places, _ = whole(indices)
    return out, places


def test_files_of_several_parts_are_mended_by_the_indices_of_each(tmp_path):
    path = tmp_path / "a.avi"
    data, starts = open_dml(numbered(path, "MJPG"))
    all_right = ({each: each for each in range(FRAMES)}, [])
    path.write_bytes(data)
    assert read(path) == all_right
    path.write_bytes(overwritten(overwritten(data, starts[7], 8), starts[33], 8))
    assert read(path) == all_right
    with readable(str(path)) as best:
        assert Path(best.path).read_bytes() == data
    assert not Path(best.path).exists() and path.exists()
    second = data.rindex(b"ix00")
    path.write_bytes(overwritten(overwritten(data, starts[33], 8), second, 4))
    assert "numbers after frame_000032 are not known" in read(path)[1][0]
