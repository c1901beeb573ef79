"""Frames of videos and their numbers: the place of each in the order in which the undamaged video shows them.

Who asks OpenCV for a frame by its number gets another where frames are lost, where a container has no index, and where
frames do not follow one another at one rate. So a frame's number is told by the time at which it is shown.
"""

import os
import threading
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sst.corpora.avi import Readable, readable
from sst.corpora.packing import UnusableImage

if TYPE_CHECKING:
    import cv2

COUNTED_SUFFIXES = (".mp4", ".mov", ".m4v", ".3gp", ".avi")
"""Containers that store the number of frames; others derive it from their duration, and may be one off."""

TIMED_SUFFIXES = (".mp4", ".mov", ".m4v", ".3gp", ".mkv", ".webm", ".wmv", ".asf", ".flv")
"""Containers that store when each frame is shown, so that those before the first loss have no gap, and others one."""

MANY_GAPS = 8
"""More gaps between frames than this are taken for a varying rate rather than for damage."""


@dataclass(frozen=True, eq=False)
class Video:
    """A video that is open, and how its frames are numbered.

    Attributes:
        capture: OpenCV's reader, before the first frame.
        numbers: gives the frames their numbers.
        stored: how many frames are stored.
        announced: how many the file says that it has.
        rate: frames per second, as the file says.
        is_avi: whether it is an AVI file.
        sure: how many first frames get numbers that are known to be right; None for all.
    """

    capture: "cv2.VideoCapture"
    numbers: "FrameNumbers"
    stored: int
    announced: int
    rate: float
    is_avi: bool
    sure: int | None

    @classmethod
    def of(cls, name: str, best: Readable) -> "Video | None":
        """Opens a video.

        Args:
            name: of the file.
            best: as of `readable`; its copy may be gone once the video is open.

        Returns:
            None if OpenCV can't read it.
        """
        import cv2

        video, stored = cv2.VideoCapture(best.path), _times(name)
        if not video.isOpened():
            return None
        rate = video.get(cv2.CAP_PROP_FPS)
        rate = rate if 0 < rate < 1e4 else 25.0
        announced = max(0, int(min(video.get(cv2.CAP_PROP_FRAME_COUNT), 1e9)))
        if not name.lower().endswith(COUNTED_SUFFIXES) and announced == len(stored) + 1:
            announced = len(stored)
        timed = name.lower().endswith(TIMED_SUFFIXES) and not best.is_avi
        numbers = FrameNumbers.of(stored, announced, rate, timed, counted=best.is_avi)
        unsure = None if numbers.known else (numbers.first_gap or 0)
        return cls(video, numbers, len(stored), announced, rate, best.is_avi, best.sure if best.is_avi else unsure)

    @property
    def told(self) -> int:
        """How many frames there should be."""
        return max(self.announced, self.stored)

    def frames(self) -> Iterator[tuple[int, np.ndarray]]:
        """Number and picture, BGR, of each frame that can be decoded, from the first on; to be asked for once."""
        import cv2

        attempts = read = 0
        while True:
            attempts += 1
            good, frame = self.capture.read()
            if good:
                time = self.capture.get(cv2.CAP_PROP_POS_MSEC)
                if read == 0 and self.is_avi:
                    self.numbers.begin(time, attempts - 1)
                read += 1
                yield self.numbers.next(time), frame
            elif attempts >= self.stored:  # a frame that can't be decoded is passed over, the next may be whole
                break

    def jump(self, number: int) -> np.ndarray | None:
        """A frame by a jump to where it should be, BGR; None where that does not surely lead to it.

        OpenCV lands before the frame, at it or after it; in the last case it jumps to a place farther ahead.
        """
        import cv2

        if self.is_avi:  # how late its times are is told by its first frame
            next(self.frames(), None)
        place = round(self.numbers.time(number) * self.rate / 1000)
        back = self.numbers.late
        while place > back:
            self.capture.set(cv2.CAP_PROP_POS_FRAMES, place - back)
            if (frame := self._read_on_to(number)) is not None:
                return frame
            back = 4 * back + 16
        return None

    def _read_on_to(self, number: int) -> np.ndarray | None:
        """The frame of that number, if the next frames lead to it in the order of their numbers."""
        import cv2

        last, unbroken = -1, 0
        while self.capture.grab():
            now = self.numbers.at(self.capture.get(cv2.CAP_PROP_POS_MSEC))
            if now is None or not last < now <= number:
                return None
            unbroken = unbroken + 1 if now == last + 1 else 0
            last = now
            if now == number:
                good, frame = self.capture.retrieve()
                return frame if good and unbroken >= self.numbers.late else None
        return None

    def walk(self, number: int) -> np.ndarray | None:
        """A frame by reading all before it, BGR; None if it is not there, or may be another."""
        last, gap = -1, 0
        for now, frame in self.frames():
            if now > last + 1:
                gap = now
            if now >= number:
                # After a gap, times that are late tell of the gap too early.
                sure = now == number and (gap == 0 or now - gap >= self.numbers.late)
                return frame if sure else None
            last = now
        return None


def frame_of(file: Path, number: int) -> np.ndarray:
    """The frame of a video that is the one of that number, counted from 0, when the undamaged video is shown.

    Returns:
        uint8 RGB (H, W, 3).

    Raises:
        UnusableImage: if the frame is lost, or it can't be known which it is.
    """
    with readable(str(file)) as best:
        if (video := Video.of(str(file), best)) is None:
            raise UnusableImage(f"frame {number} of {file.name} can't be read: OpenCV can't open the file")
        if video.stored > 0 and video.told <= number:
            raise UnusableImage(f"frame {number} of {file.name} can't be read: it has only {video.told} frames")
        if video.numbers.first_gap is not None and video.numbers.first_gap <= number:
            raise UnusableImage(
                f"{file.name} is damaged or of varying rate: which frame is number {number} is not known"
            )
        if video.stored > 0 and video.sure is not None and video.sure <= number:
            raise UnusableImage(f"{file.name} is damaged, and it can't be told which frame is number {number}")
        frame = video.jump(number) if video.numbers.holds(number) else None
        if frame is None and (again := Video.of(str(file), best)) is not None:
            frame = again.walk(number)
    if frame is None:
        raise UnusableImage(
            f"frame {number} of {file.name} can't be read: it is lost, since the file is damaged or cut"
        )
    return np.ascontiguousarray(frame[:, :, ::-1])


_LOCK = threading.Lock()


def _times(name: str) -> Sequence[float]:
    """As of `packet_times`, of a file as it is now; going through a long one takes seconds, so it is done once."""
    status = os.stat(name)
    with _LOCK:
        return _times_once(name, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _times_once(name: str, size: int, changed: int) -> Sequence[float]:
    with readable(name) as best:
        return array("d", packet_times(best.path))


def packet_times(name: str) -> list[float]:
    """When each frame of a video is shown, in milliseconds and ascending, without decoding any.

    Empty if OpenCV can't tell, as for formats that it does not read by FFmpeg.
    """
    import cv2

    video, times = cv2.VideoCapture(name, cv2.CAP_FFMPEG), []
    if video.isOpened() and video.set(cv2.CAP_PROP_FORMAT, -1):
        while video.read()[0]:
            times.append(float(video.get(cv2.CAP_PROP_POS_MSEC)))
    video.release()
    return sorted(times)


@dataclass
class FrameNumbers:
    """Gives each frame that could be decoded the number that it has in the undamaged video.

    Attributes:
        times: when the frames that are stored are shown, ascending.
        rate: frames per second, where frames are missing among the stored ones and the times show where; else None.
        known: whether numbers are those of the undamaged video.
        last: the latest number.
        late: by how many frames the decoder's times are late.
        first_gap: the first number that is not certain, where gaps are so many that they may be those of a varying
            rate; frames are numbered in their order then.
    """

    times: Sequence[float]
    rate: float | None
    known: bool
    last: int = -1
    late: int = 0
    first_gap: int | None = None

    @classmethod
    def of(
        cls, times: Sequence[float], announced: int, rate: float, timed: bool = False, counted: bool = False
    ) -> "FrameNumbers":
        """Settles how to number.

        Args:
            times: as of `packet_times`.
            announced: how many frames the file says that it has.
            rate: frames per second, as the file says.
            timed: whether the times are stored, rather than counted from frame to frame.
            counted: whether the format has one rate alone, and counts frames that the camera dropped: then gaps,
                however many, are no varying rate.
        """
        if announced <= len(times):
            return cls(times, None, known=True)
        places = np.array(times) * rate / 1000
        steady = len(times) > 0 and bool((np.abs(places - places.round()) < 0.25).all())
        gaps = np.flatnonzero(np.diff(places.round()) > 1) if steady else np.empty(0, int)
        if len(gaps) > MANY_GAPS and not counted:
            return cls(times, None, known=False, first_gap=int(gaps[0]) + 1)
        # A cut file misses its end alone, and has no gap.
        missing = steady and int(places[-1].round()) + 1 > len(times)
        return cls(times, rate if steady else None, known=missing or (steady and timed))

    def begin(self, time: float, failed: int) -> None:
        """Learns from the first frame how late its times are, of a file that does not store them.

        Where codecs store frames in another order than they are shown (B-frames), the decoder waits for those that it
        needs, and its frames get the times of the packets that it has by then.

        Args:
            time: of the first frame that could be decoded, in milliseconds.
            failed: frames before it that could not.
        """
        if self.times:
            step = (self.times[-1] - self.times[0]) / max(1, len(self.times) - 1)
            self.late = max(0, self._place(time) - self._place(self.times[0]) - failed)
            self.times = [*self.times, *(self.times[-1] + step * (n + 1) for n in range(self.late))]

    def next(self, time: float) -> int:
        """The number of the frame that is shown at `time` in milliseconds; each is given once."""
        self.last = max(self._place(time) - self.late, self.last + 1)
        return self.last

    def at(self, time: float) -> int | None:
        """The number of the frame that is shown at `time`, whatever was read before; None if that is not certain."""
        place = self._place(time)
        if self.rate is not None:
            return place - self.late if abs(time * self.rate / 1000 - place) < 0.25 else None
        near = [abs(stored - time) < 1 for stored in self.times[place : place + 2]]
        return place - self.late if near in ([True], [True, False]) else None

    def holds(self, number: int) -> bool:
        """Whether the frame of that number is among those that are stored, and can be found by its time."""
        return number < len(self.times) if self.rate is None else self.at(self.time(number)) is not None

    def time(self, number: int) -> float:
        """When the frame of that number is shown, in milliseconds."""
        return self.times[number] if self.rate is None else 1000 * number / self.rate

    def _place(self, time: float) -> int:
        if self.rate is not None:
            return round(time * self.rate / 1000)
        return bisect_left(self.times, time - 0.5) if self.times else self.last + self.late + 1
