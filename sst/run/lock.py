"""One live run per run directory: a lock that its owner renews and that a dead owner loses."""

import _thread
import logging
import os
import signal
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from pydantic import BaseModel, ConfigDict

from cluster import storage
from sst.errors import UserError

logger = logging.getLogger(__name__)

RENEW_SECONDS = 10.0
"""Time between two signs of life of the owner."""

STALE_SECONDS = 45.0
"""Without a sign of life for so long, an owner on another machine is taken for dead."""


class LockRecord(BaseModel):
    """Who holds a run.

    Attributes:
        owner: a name that nobody else has.
        host: host name, for people.
        machine: tells machines and process namespaces apart, where process numbers mean the same.
        process: process number on that machine.
        born: when that process was started, since numbers are used again.
        beat: number of signs of life so far; clocks of different machines are never compared.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    owner: str
    host: str
    machine: str
    process: int
    born: float
    beat: int = 0

    @classmethod
    def mine(cls) -> Self:
        """A new record of this process."""
        each = psutil.Process()
        return cls(
            owner=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=machine(),
            process=each.pid,
            born=each.create_time(),
        )

    def alive(self) -> "LockRecord":
        """The record with one more sign of life."""
        return LockRecord(
            owner=self.owner,
            host=self.host,
            machine=self.machine,
            process=self.process,
            born=self.born,
            beat=self.beat + 1,
        )

    def is_dead(self) -> bool:
        """Whether the owner is known to be gone: only a process of this machine can be."""
        if self.machine != machine():
            return False
        try:
            return bool(psutil.Process(self.process).create_time() != self.born)
        except psutil.NoSuchProcess:
            return True


def machine() -> str:
    """Names the place in which process numbers are unique: this boot of this machine, this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return f"{socket.gethostname()}/{psutil.boot_time():.0f}"


class RunHeldError(UserError):
    """Another live process holds the run."""


class RunLock:
    """Holds RUN/lock.json while inside.

    Raises:
        RunHeldError: on entering, if another live process holds the run; the message names it.
    """

    def __init__(self, run_url: str) -> None:
        """Nothing is taken yet."""
        self.run_url, self.url = run_url, storage.join(run_url, "lock.json")
        self.record = LockRecord.mine()
        self.lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)

    def __enter__(self) -> Self:
        if not storage.create_bytes(self.url, self._bytes()):
            self._take_over()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        found = self._found()
        if found is not None and found.owner == self.record.owner:
            storage.remove(self.url)

    def _take_over(self) -> None:
        """Takes the lock of an owner that is dead, or that gives no sign of life."""
        holder = self._found()
        if holder is not None and not holder.is_dead():
            if holder.machine == machine():
                self._refuse(holder)
            self._watch(holder)
        storage.remove(self.url)
        if not storage.create_bytes(self.url, self._bytes()):
            self._refuse(self._found())

    def _watch(self, holder: LockRecord) -> None:
        """Returns when an owner on another machine has given no sign of life for long enough."""
        print(
            f"{self.run_url} was last held by {holder.host}; waiting {STALE_SECONDS:.0f} s for a sign of life",
            flush=True,
        )
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, STALE_SECONDS / 4))
            now = self._found()
            if now is None:
                return
            if (now.owner, now.beat) != (holder.owner, holder.beat):
                self._refuse(now)

    def _refuse(self, holder: LockRecord | None) -> None:
        who = f"process {holder.process} on {holder.host}" if holder else "another process"
        raise RunHeldError(
            f"{self.run_url} is being worked on by {who}; wait for it, stop it, or take another --name. If you know "
            f"that it is gone, remove {self.url}"
        )

    def _found(self) -> LockRecord | None:
        """The record that is there; None for none, or one that cannot be read and so protects nobody."""
        try:
            return LockRecord.model_validate(storage.read_json(self.url))
        except (FileNotFoundError, ValueError):
            return None

    def _bytes(self) -> bytes:
        return self.record.model_dump_json().encode()

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            try:
                found = self._found()
                if found is not None and found.owner != self.record.owner:
                    # This process slept so long that another one took the run: two must not write it.
                    self.lost = True
                    # Not SIGINT, which a run in a script's background ignores; see `sst.run.interrupt.terminable`.
                    _thread.interrupt_main(signal.SIGTERM)
                    return
                self.record = self.record.alive()
                storage.write_bytes(self.url, self._bytes())
            except OSError as error:  # storage that is away for a moment; the next beat tries again
                logger.warning("%s could not be renewed: %s", self.url, type(error).__name__)
