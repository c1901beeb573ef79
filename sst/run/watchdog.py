"""Ending a group of workers that hangs.

A worker that was stopped, a message between workers that never arrives, a stream that gives nothing: the others wait
for it, and nobody raises. So every worker says where it is. When none of them has got any further for a while, each
ends its own process, and Ray Train starts the group again from the last checkpoint; who was where is kept for whoever
shows the run.
"""

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, Self

logger = logging.getLogger(__name__)

SIGNS = 8
"""Signs of life in the time after which a group counts as hung; who misses three of them is called silent."""

ANSWER_SECONDS = 10.0
"""How long an answer of the attendance may take; without it a worker judges by itself alone."""


@dataclass(frozen=True)
class Sign:
    """A worker's last sign of life.

    Attributes:
        worker: a name that no other process has.
        moves: how often it has got further.
        place: where it is.
        time: when the sign came, by the attendance's clock.
    """

    worker: str
    moves: int
    place: str
    time: float


class Roll(Protocol):
    """What workers report to."""

    def sign(self, rank: int, world: int, worker: str, moves: int, place: str) -> float:
        """Takes a sign of life; returns for how many seconds no worker has got any further."""
        ...

    def describe(self, silent: float) -> str:
        """Where every worker is; who has given no sign of life for `silent` seconds is called so."""
        ...

    def note(self, text: str) -> None:
        """Keeps a hang, for `take`."""
        ...


class Attendance:
    """Where every worker of a run is; made an actor of. All times are by one clock, its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begins with nobody."""
        self._clock = clock
        self._last: dict[int, Sign] = {}
        self._moved = clock()
        self._noted: list[str] = []

    def sign(self, rank: int, world: int, worker: str, moves: int, place: str) -> float:
        """See `Roll`; a process that is new in its rank has got further."""
        now, before = self._clock(), self._last.get(rank)
        if before is None or (before.worker, before.moves) != (worker, moves):
            self._moved = now
        self._last = {known: each for known, each in self._last.items() if known < world}
        self._last[rank] = Sign(worker, moves, place, now)
        return now - self._moved

    def quiet(self) -> float:
        """Seconds in which no worker has got any further."""
        return self._clock() - self._moved

    def describe(self, silent: float) -> str:
        """See `Roll`."""
        now = self._clock()
        return "; ".join(
            f"rank {rank} has given no sign of life for {now - each.time:.0f} s, last {each.place}"
            if now - each.time > silent
            else f"rank {rank} {each.place}"
            for rank, each in sorted(self._last.items())
        )

    def note(self, text: str) -> None:
        """See `Roll`; the workers of one group say it once."""
        if text not in self._noted:
            self._noted.append(text)

    def take(self) -> list[str]:
        """The hangs since the last call."""
        taken, self._noted = self._noted, []
        return taken


class RemoteRoll:
    """The attendance, reached through Ray."""

    def __init__(self, actor: Any) -> None:
        """Takes the actor's handle."""
        self._actor = actor

    def _ask(self, method: str, *given: Any) -> Any:
        import ray

        return ray.get(getattr(self._actor, method).remote(*given), timeout=ANSWER_SECONDS)

    def sign(self, rank: int, world: int, worker: str, moves: int, place: str) -> float:
        """See `Roll`.

        Raises:
            ray.exceptions.RayError: if the actor does not answer.
        """
        return float(self._ask("sign", rank, world, worker, moves, place))

    def describe(self, silent: float) -> str:
        """See `Roll`; raises as `sign` does."""
        return str(self._ask("describe", silent))

    def note(self, text: str) -> None:
        """See `Roll`; raises as `sign` does."""
        self._ask("note", text)

    def quiet(self) -> float:
        """See `Attendance`; raises as `sign` does."""
        return float(self._ask("quiet"))

    def take(self) -> list[str]:
        """See `Attendance`; raises as `sign` does."""
        return list(self._ask("take"))


def start_attendance() -> Any:
    """Starts the attendance on this node of the running Ray cluster; it ends with the process that started it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Attendance)
    return actor.options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()


def end_process(text: str) -> None:
    """Ends this process at once: whatever hangs outside Python answers nothing else."""
    logger.error("%s", text)
    os._exit(1)


class Watchdog:
    """Watches one worker and its group, while inside, from a thread of its own."""

    def __init__(
        self, rank: int, world: int, seconds: float, roll: Roll, end: Callable[[str], None] = end_process
    ) -> None:
        """Takes whom to watch.

        Args:
            rank: of this worker.
            world: number of workers.
            seconds: for which no worker may get any further.
            roll: what workers report to.
            end: ends this worker, given the reason.
        """
        self._rank, self._world, self.seconds, self._roll, self._end = rank, world, seconds, roll, end
        self._worker = uuid.uuid4().hex
        self._moves, self._place = 0, "starting"
        self._seen, self._since = -1, time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, place: str) -> None:
        """This worker has got further, and is at a place; as in "in step 12"."""
        self._place = place
        self._moves += 1

    def look(self) -> str | None:
        """Gives a sign of life; what to say where the group hangs, else None."""
        moves, now = self._moves, time.monotonic()
        if moves != self._seen:
            self._seen, self._since = moves, now
        alone = now - self._since
        try:
            quiet = self._roll.sign(self._rank, self._world, self._worker, moves, self._place)
        except Exception as error:  # where the roll is out of reach, so may be everything else
            logger.warning("no answer of the attendance: %s", type(error).__name__)
            quiet = alone
        if quiet < self.seconds:
            return None
        try:
            where = self._roll.describe(3 * self.seconds / SIGNS)
        except Exception:
            where = f"rank {self._rank} {self._place}"
        return f"no worker has got any further for {self.seconds:.0f} s ({where}); the workers are started again"

    def _watch(self) -> None:
        while not self._over.wait(self.seconds / SIGNS):
            if (text := self.look()) is None:
                continue
            with suppress(Exception):  # as above
                self._roll.note(text)
            self._end(text)
            return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
