"""A labelled frame of a video is the one of that number in the undamaged video, or it is said why there is none."""

import struct
from pathlib import Path

import pytest

from sst.corpora import videos
from sst.corpora.avi import readable
from sst.corpora.packing import UnusableImage
from sst.corpora.videos import frame_of
from tests.corpora.test_avi import FRAMES, numbered, overwritten, shown


def frames_of(path: Path) -> tuple[dict[int, int], dict[int, str]]:
    """What each frame that is asked for shows, and why others could not be had."""
    found, refused = {}, {}
    for number in range(FRAMES):
        try:
            found[number] = shown(frame_of(path, number))
        except UnusableImage as error:
            refused[number] = str(error)
    return found, refused


@pytest.mark.parametrize(("name", "code"), [("a.mp4", "mp4v"), ("a.mkv", "MJPG"), ("a.webm", "VP80"),
                                            ("a.ts", "MPG2"), ("a.flv", "FLV1"),
                                            ("a.avi", "XVID")])  # fmt: skip
def test_every_frame_of_an_undamaged_video_is_the_one_that_is_asked_for(tmp_path, name, code):
    numbered(tmp_path / name, code)
    assert frames_of(tmp_path / name) == ({each: each for each in range(FRAMES)}, {})


@pytest.mark.parametrize(("name", "code"), [("a.mkv", "MJPG"), ("a.webm", "VP80"), ("a.ts", "MPG2")])
def test_frames_after_damage_are_those_that_are_asked_for_and_lost_ones_are_named(tmp_path, name, code):
    path = tmp_path / name
    data = numbered(path, code)
    path.write_bytes(overwritten(data, len(data) // 2, len(data) // 10))
    found, refused = frames_of(path)
    lost = min(refused)
    # After a loss, frames of MPEG-2 are made of what came before it, until the next key frame (every 12th).
    sound = [each for each in found if each < lost - 1 or each > max(refused) + 12 or code != "MPG2"]
    assert [found[each] for each in sound] == sound
    assert 1 <= len(refused) < 20 and 0 in sound and FRAMES - 1 in found
    assert refused[lost] == f"frame {lost} of {name} can't be read: it is lost, since the file is damaged or cut"


def at_two_rates(data: bytes) -> bytes:
    """An MP4 file whose second half is shown twice as fast, by its table of durations (ISO/IEC 14496-12, stts)."""
    at = data.index(b"stts")
    entries, count, step = struct.unpack(">III", data[at + 8 : at + 20])
    assert (entries, count) == (1, FRAMES) and data.index(b"mdat") < at  # what moves holds no frames
    table = struct.pack(">IIIII", 2, FRAMES // 2, step, FRAMES // 2, step // 2)
    longer = data[: at + 8] + table + data[at + 20 :]
    for box in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stts"):
        place = longer.index(box) - 4
        size = int.from_bytes(longer[place : place + 4], "big") + 8
        longer = longer[:place] + size.to_bytes(4, "big") + longer[place + 4 :]
    return longer


def test_frames_of_a_varying_rate_are_those_that_are_asked_for(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(at_two_rates(numbered(path, "mp4v")))
    times = videos.packet_times(str(path))
    assert times[20] - times[19] == pytest.approx(100) and times[30] - times[29] == pytest.approx(50)
    assert frames_of(path) == ({each: each for each in range(FRAMES)}, {})


def test_a_frame_that_the_video_does_not_have_is_named(tmp_path):
    numbered(tmp_path / "a.mp4", "mp4v")
    with pytest.raises(UnusableImage, match=r"frame 40 of a.mp4 can't be read: it has only 40 frames"):
        frame_of(tmp_path / "a.mp4", FRAMES)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(UnusableImage, match=r"frame 3 of b.mp4 can't be read: OpenCV can't open the file"):
        frame_of(tmp_path / "b.mp4", 3)


def test_a_video_is_gone_through_for_its_times_once_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.mkv"
    numbered(path, "MJPG")
    asked = []
    monkeypatch.setattr(videos, "packet_times", lambda name: asked.append(name) or [100.0 * n for n in range(FRAMES)])
    assert [shown(frame_of(path, number)) for number in (30, 3, 12)] == [30, 3, 12] and len(asked) == 1
    path.write_bytes(path.read_bytes() + b"\0")
    assert shown(frame_of(path, 7)) == 7 and len(asked) == 2


def test_many_gaps_may_be_a_varying_rate_so_frames_are_numbered_in_their_order_and_it_is_said(tmp_path, monkeypatch):
    times = [100.0 * n for n in range(20)] + [2000.0 + 200 * n for n in range(20)]
    numbers = videos.FrameNumbers.of(times, 59, 10.0, timed=True)
    assert [numbers.next(time) for time in times] == list(range(40))
    assert (numbers.known, numbers.first_gap) == (False, 21)
    few = videos.FrameNumbers.of([*times[:10], *times[14:20]], 20, 10.0, timed=True)
    assert [few.next(time) for time in [*times[:10], *times[14:20]]] == [*range(10), *range(14, 20)]
    assert (few.known, few.first_gap) == (True, None)
    dropped = videos.FrameNumbers.of(times, 59, 10.0, counted=True)  # of an AVI file, which has no varying rate
    assert [dropped.next(time) for time in times] == [*range(20), *range(20, 60, 2)]
    assert (dropped.known, dropped.first_gap) == (True, None)
    path = tmp_path / "a.mkv"
    numbered(path, "MJPG")
    monkeypatch.setattr(videos, "packet_times", lambda name: times)
    monkeypatch.setattr(videos, "COUNTED_SUFFIXES", (".mkv",))
    announced = videos.FrameNumbers.of
    monkeypatch.setattr(
        videos.FrameNumbers, "of", lambda times, count, rate, timed, counted: announced(times, 59, 10.0, timed, counted)
    )
    with readable(str(path)) as best:
        assert videos.Video.of(str(path), best).sure == 21
    with pytest.raises(UnusableImage, match="damaged or of varying rate: which frame is number 21 is not known"):
        frame_of(path, 21)
