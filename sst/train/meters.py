"""What a worker counts while it trains: losses, speed, memory and skipped steps."""

import logging
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sst.train.run_directory import RunDirectory
from sst.train.schedule import Phase
from sst.train.tools import Tools
from sst.train.workers import Group

logger = logging.getLogger(__name__)

SKIP_LIMIT = 5
"""Consecutive steps without a finite gradient, after which the run stops."""


class Skips:
    """Steps that were not taken because their gradient was not finite; the device is asked by `look` only."""

    def __init__(self, group: Group, run: RunDirectory, tools: Tools) -> None:
        """Begins without any."""
        self.group, self.run, self.tools = group, run, tools
        self.noted: list[tuple[int, tuple[str, ...], Tensor]] = []
        self.in_a_row = 0

    def add(self, step: int, keys: tuple[str, ...], finite: Tensor) -> None:
        """Notes a step: the samples of this worker, and whether the gradient was finite (a scalar, equal on all)."""
        self.noted.append((step, keys, finite))

    def look(self) -> None:
        """Reports the skipped ones among the steps noted since the last look; all workers look together.

        Raises:
            FloatingPointError: at `SKIP_LIMIT` of them in a row.
        """
        noted, self.noted = self.noted, []
        taken = torch.stack([finite for _, _, finite in noted]).tolist()
        for (step, item, _), was_taken in zip(noted, taken, strict=True):
            self.in_a_row = 0 if was_taken else self.in_a_row + 1
            if was_taken:
                continue
            keys = [key for each in self.group.gather(item) for key in each]
            logger.warning("step %d skipped: gradient not finite; samples %s", step, ", ".join(keys))
            self.tools.log({"kind": "skip", "step": step, "keys": keys})
            if self.in_a_row >= SKIP_LIMIT:
                raise FloatingPointError(
                    f"{self.in_a_row} steps in a row up to step {step} had no finite gradient; the samples of the "
                    f"last one are in {self.run.metrics_url}; lower the learning rate or take "
                    "--resources.precision float32"
                )


class Meter:
    """Means of the losses and the speed since the last line; reads the device only when a line is made.

    Speed is images that passed through the network, over all workers, per second of wall clock: every second of a phase
    counts for one line, whatever it went into (steps, waiting, checkpoints).
    """

    def __init__(self, phase: Phase, workers: int) -> None:
        """Starts counting."""
        self.phase, self.workers = phase, workers
        self._reset(time.monotonic())

    def _reset(self, now: float) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps, self.waited, self.since = 0, 0.0, now

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time spent waiting for data."""
        started = time.monotonic()
        yield
        self.waited += time.monotonic() - started

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds one step's scalars."""
        self.steps += 1
        for name, value in values.items():
            seen = value.detach()
            self.sums[name] = self.sums[name] + seen if name in self.sums else seen

    def line(self, step: int, phase_step: int, present: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """The metrics since the last line, which starts a new one.

        Args:
            step: optimizer steps of the run.
            phase_step: of the phase.
            present: scalars of this moment, beside the means over the steps.
        """
        means = {name: float(total) / self.steps for name, total in self.sums.items()}
        means |= {name: float(value) for name, value in (present or {}).items()}
        if all_zero := means.pop("all_zero", 0.0):
            means["loss_of_all_zero"] = means["loss"] / all_zero
        now = time.monotonic()  # after the device was waited for, which is part of the steps
        seconds = now - self.since
        speed = {
            "images_per_second": self.steps * self.phase.views / seconds,
            "waiting_share": self.waited / seconds,
            "memory_gb": peak_memory_gb(),
            "workers": self.workers,
        }
        line = {
            "kind": "step",
            "phase": self.phase.name,
            "stage": self.phase.stage,
            "round": self.phase.round,
        }
        self._reset(now)
        return line | {"step": step, "phase_step": phase_step, "phase_steps": self.phase.steps} | means | speed


def peak_memory_gb() -> float:
    """Peak resident memory of this process, in GB (1e9 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
