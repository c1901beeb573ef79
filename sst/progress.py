"""How far a job is, and how long it will still take."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

LINE_SECONDS = 5.0
"""Shortest time between two plain lines."""


def with_progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Shows how far the iteration is and the time left: a bar in a terminal, else about ten lines.

    Args:
        items: what is gone through.
        what: word before the metrics.
        total: number of items, where they have no length.
    """
    count = len(items) if isinstance(items, Sized) else (total or 1)
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, what, count, console=Console(stderr=True))
        return
    start, step, said = time.monotonic(), max(1, count // 10), time.monotonic()
    for done, item in enumerate(items):
        if done and done % step == 0 and time.monotonic() - said > 1:
            said = time.monotonic()
            left = (time.monotonic() - start) / done * max(0, count - done)
            print(f"{what} {done}/{count}, {left:.0f} s left", file=sys.stderr, flush=True)
        yield item


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: "27 minutes", "3.4 hours", "2.1 days"."""
    minutes = max(1, round(seconds / 60))
    if minutes < 100:
        return f"{minutes} minute{'s' if minutes > 1 else ''}"
    return f"{seconds / 3600:.1f} hours" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"
