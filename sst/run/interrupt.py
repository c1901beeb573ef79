"""Stopping in order: the first Ctrl-C or SIGTERM lets the workers save, the second stops at once."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from cluster import storage
from sst.errors import Terminated
from sst.train.run_directory import RunDirectory

T = TypeVar("T")


class StopFlag:
    """A file in the run directory by which the process that was started asks its workers to stop."""

    def __init__(self, run_url: str) -> None:
        self.url = RunDirectory(run_url).stop_url

    def put_up(self) -> None:
        """Asks for a stop."""
        storage.write_bytes(self.url, b"")

    def take_down(self) -> None:
        """Nobody is asked any more."""
        storage.remove(self.url)

    def is_up(self) -> bool:
        """Whether a stop was asked for."""
        return storage.exists(self.url)


class FailureNote:
    """A file in the run directory in which a worker says that it met an error that would come again with every start.

    Ray Train starts all workers anew whatever one of them raises; they look here and end.
    """

    def __init__(self, run_url: str) -> None:
        self.url = RunDirectory(run_url).failed_url

    def write(self, error: Exception) -> None:
        """Leaves the error's message, without the remote traceback where Ray wraps it."""
        storage.write_bytes(self.url, str(getattr(error, "cause", error)).encode())

    def read(self) -> str | None:
        """The message, or None."""
        return storage.read_bytes(self.url).decode() if storage.exists(self.url) else None

    def take(self) -> str | None:
        """The message, which is removed; or None."""
        said = self.read()
        storage.remove(self.url)
        return said


def run_stoppably(work: Callable[[], T], stop: StopFlag, check: Callable[[], None] = lambda: None) -> T:
    """Runs some work, whose end the first signal asks for and the second does not wait for.

    Args:
        work: returns soon after the flag is up. It runs in a thread, so that it cannot take the signals over.
        stop: is put up by the first signal.
        check: is called again and again while the work goes on; what it raises ends the waiting for it.

    Returns:
        What the work returns.

    Raises:
        KeyboardInterrupt: after a signal, when the work has ended; at once after a second one.
        Exception: what the work raises.
    """
    stop.take_down()
    if threading.current_thread() is not threading.main_thread():
        return work()
    failures: list[BaseException] = []
    results: list[T] = []
    signals: list[int] = []
    asked = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed to the main thread
            failures.append(error)

    def on_signal(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        asked.set()
        if len(signals) > 1:
            raise interruption(number)
        print("finishing the step and saving; the same signal again stops at once", flush=True)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=run, name="work", daemon=True)
    try:
        thread.start()
        given = False
        while thread.is_alive():
            thread.join(0.2)
            check()
            if asked.is_set() and not given:
                stop.put_up()
                given = True
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop.take_down()
    if failures:
        raise failures[0]
    if signals:
        raise interruption(signals[0])
    return results[0]


def interruption(number: int) -> KeyboardInterrupt:
    """The exception that stands for a signal."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
