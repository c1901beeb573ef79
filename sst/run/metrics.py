"""A run's metrics as JSON lines: written by one worker, read by whoever shows or tracks them."""

import json
import os
import time
from typing import Any

from cluster import storage
from sst.train.run_directory import RunDirectory

FLUSH_SECONDS = 5.0
"""An object store cannot append: there the whole file is put again, at most this often for lines that come often."""

PROGRESS_SECONDS = 1.0
"""Time between two lines of a pass over shards, of which there may be tens of thousands."""


class MetricsFile:
    """Appends lines to RUN/metrics.jsonl; on resume it goes on where the file ends."""

    def __init__(self, run_url: str) -> None:
        """Opens or begins the file."""
        self.url = RunDirectory(run_url).metrics_url
        self._path = storage.filesystem(self.url)[1] if storage.is_local(self.url) else None
        self._text = b"" if self._path or not storage.exists(self.url) else storage.read_bytes(self.url)
        self._flushed = self._progressed = 0.0
        if self._path:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            self._end_torn_line(self._path)

    @staticmethod
    def _end_torn_line(path: str) -> None:
        """Ends a line that a crash cut short, so that the next one is not glued to it."""
        with open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line, with the time; of the shards of a pass, one a second and the last."""
        if line.get("kind") == "shards" and line["done"] < line["total"]:
            if time.monotonic() - self._progressed < PROGRESS_SECONDS:
                return
            self._progressed = time.monotonic()
        text = (json.dumps({"time": round(time.time(), 3)} | line) + "\n").encode()
        if self._path:
            with open(self._path, "ab") as file:
                file.write(text)
            return
        self._text += text
        if time.monotonic() - self._flushed > FLUSH_SECONDS or line.get("kind") not in ("step", "shards"):
            storage.write_bytes(self.url, self._text)
            self._flushed = time.monotonic()


class MetricsReader:
    """Reads the lines that came since the last look."""

    def __init__(self, run_url: str, skip_present: bool = False, offset: int = 0) -> None:
        """Begins at the file's present end, or at an offset in bytes that an earlier reader came to."""
        self.url = RunDirectory(run_url).metrics_url
        self.offset = offset
        if skip_present:
            self.new_lines()

    def new_lines(self) -> list[dict[str, Any]]:
        """Whole lines that are new; a line still being written is left for the next look, a torn one is left out."""
        if not storage.exists(self.url) or storage.size(self.url) <= self.offset:
            return []
        text = storage.read_bytes(self.url, self.offset)
        text = text[: text.rfind(b"\n") + 1]
        self.offset += len(text)
        return [line for raw in text.splitlines() if (line := _parse(raw)) is not None]


def _parse(raw: bytes) -> dict[str, Any] | None:
    """A line's object, or None where a crash left half of one."""
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
