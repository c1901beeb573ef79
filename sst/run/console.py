"""A run's progress as lines of text."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from sst.progress import LINE_SECONDS, clock
from sst.report.evaluation import percent
from sst.report.finish import Outcome
from sst.run.tracking import redact
from sst.train.schedule import Phase


def step_line(line: dict[str, Any], left: str) -> str:
    """One fixed-width line of a step's metrics; img/s: images through the network per second of wall clock."""
    losses = " ".join(f"{name} {line[name]:8.5f}" for name in ("loss", "detector", "descriptor") if name in line)
    if "loss_of_all_zero" in line:
        losses += f" ({100 * line['loss_of_all_zero']:3.0f} % of all-zero)"
    if "peak" in line:
        losses += f"  peak {line['peak']:5.3f}"
    done = f"{line['phase_step']:>6}/{line['phase_steps']:<6}"
    return (
        f"{line['phase']:<10} {done} {losses}  |g| {line['gradient_norm']:7.3f}  "
        f"{line['images_per_second']:7.1f} img/s  "
        f"wait {100 * line['waiting_share']:3.0f} %  {line['memory_gb']:5.2f} GB  left {left}"
    )


def round_line(line: dict[str, Any]) -> str:
    """One line of a round's metrics."""
    names = {
        "labels_per_image": "labels/image",
        "clusters_in_use": "clusters",
        "label_persistence": "persist",
        "equivariance_error": "equivariance %",
        "inertia": "inertia",
        "merged": "merged",
    }
    metrics = "  ".join(f"{short} {line[name]:.4g}" for name, short in names.items() if name in line)
    return f"round {line['round']} ({line['made_by']})  {metrics}"


def arithmetic_line(line: dict[str, Any]) -> str:
    """How the workers compute, and what they could not do."""
    text = f"workers compute on {line['device']} in {line['convolutions']}"
    return f"{text}; by torch's own kernels, which is slower: {line['obstacle']}" if line["obstacle"] else text


class TimeLeft:
    """Estimates a run's remaining time from its measured speed in each stage.

    Passes over the images between two phases are counted with what the last ones took.
    """

    def __init__(self, phases: Sequence[Phase], images: int) -> None:
        """Begins without any measurement.

        Args:
            phases: of the run.
            images: that each pass goes over.
        """
        self._phases, self._images = phases, images
        self._step_seconds: dict[int, float] = {}
        self._between: dict[int, float] = {}
        self._last: tuple[float, int, int] | None = None

    def update(self, line: dict[str, Any]) -> str:
        """Takes a step's line; returns the time left, or "?" before there is an estimate."""
        now, phase, step = line["time"], line["round"], line["step"]
        if self._last is not None and self._last[1] == phase and step > self._last[2]:
            # A median would be steadier, but must not lag when another job takes the machine.
            latest = (now - self._last[0]) / (step - self._last[2])
            before = self._step_seconds.get(line["stage"], latest)
            self._step_seconds[line["stage"]] = 0.8 * before + 0.2 * latest
        elif self._last is not None and phase != self._last[1]:
            trained = line["phase_step"] * self._step_seconds.get(line["stage"], 0.0)
            self._between[line["stage"]] = max(0.0, now - self._last[0] - trained)
        self._last = (now, phase, step)
        if not self._step_seconds:
            return "?"
        # Without gradients an image takes a third of its time in a step, and it is seen twice.
        guess = 2 / 3 * self._images / line["images_per_second"]
        other, pause, seconds = max(self._step_seconds.values()), max(self._between.values(), default=guess), 0.0
        for ahead in self._phases[phase:]:
            todo = ahead.steps - (line["phase_step"] if ahead.round == phase else 0)
            seconds += todo * self._step_seconds.get(ahead.stage, other) + self._between.get(ahead.stage, pause)
        return clock(seconds)


class Show:
    """Shows a run's metrics: a live line in a terminal, plain lines elsewhere."""

    def __init__(self, phases: Sequence[Phase], images: int) -> None:
        """Begins; see `TimeLeft`."""
        self._left = TimeLeft(phases, images)
        self._live = sys.stdout.isatty()
        self._printed = 0.0
        if self._live:
            from rich.console import Console

            self._status = Console().status("starting")
            self._status.start()

    def line(self, line: dict[str, Any]) -> None:
        """Takes one line of the metrics file."""
        kind = line["kind"]
        if kind == "step":
            text = step_line(line, self._left.update(line))
            whole = line["phase_step"] == line["phase_steps"]
        elif kind == "shards":
            text = f"{line['what']:<10} {line['done']:>6}/{line['total']:<6} shards"
            whole = line["done"] == line["total"]
        elif kind == "round":
            text, whole = round_line(line), True
        elif kind == "arithmetic":
            text, whole = arithmetic_line(line), True
        elif kind == "health":
            text, whole = f"warning: {line['text']} {line['advice']}", True
        elif kind == "hang":
            text, whole = f"warning: {line['text']}", True
        elif kind == "leaving":
            saved = f"saved after step {line['step']}"
            text, whole = f"a machine is about to be taken away: {saved}; training goes on on those that stay", True
        elif kind == "settled":
            text, whole = f"refinements no longer gain after round {line['round']}; the rest is left out", True
        elif kind == "not_recorded":
            cause = f"training steps can't be recorded as a CUDA graph, so they take longer: {line['obstacle']}"
            text, whole = f"warning: {cause}", True
        elif kind == "resume":
            text, whole = f"resumed after step {line['step']}", True
        else:
            text, whole = " ".join(f"{name} {value}" for name, value in line.items() if name != "time"), True
        self.say(text, whole)

    def say(self, text: str, important: bool = True) -> None:
        """Shows a text; unimportant ones at most every few seconds."""
        if self._live:
            if important:
                self._status.console.print(text, highlight=False, markup=False)
            self._status.update(escape(text))
        elif important or time.monotonic() - self._printed > LINE_SECONDS:
            print(text, flush=True)
            self._printed = time.monotonic()

    def close(self) -> None:
        """Gives the terminal back."""
        if self._live:
            self._status.stop()


def print_outcome(outcome: Outcome, tracking: str) -> None:
    """Says what came out and where to look at it."""
    if outcome.scores is not None:
        print(f"forward error   {percent(outcome.scores.forward)}")
        print(f"backward error  {percent(outcome.scores.backward)}")
        print(f"landmarks       {outcome.landmarks}, {outcome.scores.landmarks_kept} in over 80 % of the images")
    else:
        print(f"landmarks       {outcome.landmarks}; the corpus has no annotations, or too few, to score them with")
    print(f"report          {outcome.report}")
    print(f"MLflow          {Path(sys.executable).parent}/mlflow ui --backend-store-uri {redact(tracking)}")
