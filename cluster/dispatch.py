"""Running one pure function over many shards: in this process, or as Ray tasks on any node."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

logger = logging.getLogger(__name__)

T = TypeVar("T")

LARGE = 10_000
"""Bytes from which on an argument is worth an object of its own."""

TRIES = 3
"""How often a call that does not return is made."""


class HangError(RuntimeError):
    """A call that did not return in time, each time it was made; the message says which, and for how long."""


class ShardMap(Protocol):
    """Applies a function to argument tuples and returns the results in their order."""

    def __call__(self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
        """Runs `function(*arguments[i])` for every i."""
        ...


def map_serially(function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
    """One after the other in this process."""
    return [function(*items) for items in arguments]


class RayMap:
    """Ray tasks, retried when a node is lost, no more in flight than the cluster has CPUs.

    The bound, not the CPU share of a task, keeps memory and threads in check: while a round is computed
    the training workers wait, but Ray still counts their CPUs as taken.
    """

    def __init__(
        self,
        num_cpus: float,
        progress: Callable[[str, int, int], None] | None = None,
        num_gpus: float = 0.0,
        patience: float | None = None,
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        """Remembers what a task takes.

        Args:
            num_cpus: CPUs that Ray sets aside per task.
            progress: called with (function's name, done, total) whenever a shard is finished.
            num_gpus: share of a GPU that Ray sets aside per task; without one a task sees no GPU.
            patience: seconds after which, if no shard got done in them, those that run are begun again; None waits.
            warn: takes what is said then.
        """
        self.num_cpus = num_cpus
        self.progress = progress
        self.num_gpus = num_gpus
        self.patience = patience
        self.warn = warn

    def __call__(self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
        """See `ShardMap`.

        Raises:
            Exception: what the function raised on a shard; shards not yet begun are not run.
            HangError: if no shard gets done within `patience`, three times over.
        """
        import ray

        task = ray.remote(_call).options(
            num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_retries=3, scheduling_strategy="SPREAD"
        )
        window = max(2, int(ray.cluster_resources().get("CPU", 1)))
        results: dict[int, T] = {}
        running: dict[Any, int] = {}
        sent: dict[int, Any] = {}

        def once(given: Any) -> Any:
            """Large arrays that many shards share are sent to each node once, not with every task."""
            if not isinstance(given, np.ndarray) or given.nbytes < LARGE:
                return given
            if id(given) not in sent:
                sent[id(given)] = ray.put(given)
            return sent[id(given)]

        todo, hung = list(range(len(arguments)))[::-1], 0
        while todo or running:
            while todo and len(running) < window:
                number = todo.pop()
                running[task.remote(function, *map(once, arguments[number]))] = number
            if self._collect(function.__name__, running, results, len(arguments)):
                hung = 0
                continue
            hung += 1
            again = sorted(running.values(), reverse=True)
            for reference in running:
                ray.cancel(reference, force=True)
            said = f"{function.__name__}: none of {len(again)} shards got done in {self.patience:.0f} s"
            if hung == TRIES:
                raise HangError(f"{said}, {TRIES} times over; the first is {str(arguments[again[-1]][0])[:200]}")
            self.warn(f"{said}; they are begun again")
            running.clear()
            todo += again
            if self.progress:  # whoever watches this process sees that it does not hang itself
                self.progress(function.__name__, len(results), len(arguments))
        return [results[number] for number in range(len(arguments))]

    def _collect(self, name: str, running: dict[Any, int], results: dict[int, T], total: int) -> bool:
        """Takes the next shard that is done; whether there was one in time."""
        import ray

        done, _ = ray.wait(list(running), num_returns=1, timeout=self.patience)
        if not done:
            return False
        try:
            results[running.pop(done[0])] = ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            for reference in running:
                ray.cancel(reference)
            raise error.as_instanceof_cause() from None
        if self.progress:
            self.progress(name, len(results), total)
        return True


def _call(function: Callable[..., T], *arguments: Any) -> T:
    """Ray runs one task with a function as argument, so that Ray exports it once for all functions."""
    import torch

    torch.set_num_threads(1)
    return function(*arguments)
