"""Checks that are reported whether they hold or not: rows of a table, and commands run as a user runs them.

A check is a function that returns what it saw, or raises: `DidNotHold` with what it saw instead, `NotRunHere` with what
is missing, anything else for a failure that nobody foresaw. None of them stops the checks after it.
"""

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

Outcome = Literal["held", "did not hold", "not run here"]

LONGEST = 300
"""Characters of what a row says; the rest is in the logs."""

GRACE_SECONDS = 60.0
"""What a command that is told to end has for its checkpoint before it is killed."""


class DidNotHold(Exception):
    """What a check saw was not what it must see."""


class NotRunHere(Exception):
    """What a check needs is not here."""


@dataclass(frozen=True)
class Row:
    """How a check ended.

    Attributes:
        name: of the check.
        outcome: whether it held.
        seen: by it, in a line.
        seconds: that it took.
    """

    name: str
    outcome: Outcome
    seen: str
    seconds: float


def checked(name: str, check: Callable[[], str]) -> Row:
    """Runs a check and says so; whatever it raises becomes its row."""
    started = time.monotonic()
    print(f"--- {name}", flush=True)
    outcome: Outcome = "held"
    try:
        seen = check()
    except NotRunHere as error:
        outcome, seen = "not run here", str(error)
    except DidNotHold as error:
        outcome, seen = "did not hold", str(error)
    except Exception as error:
        outcome, seen = "did not hold", f"{type(error).__name__}: {error}"
    row = Row(name, outcome, " ".join(seen.split())[:LONGEST], time.monotonic() - started)
    print(f"    {row.outcome}, {row.seconds:.0f} s: {row.seen}", flush=True)
    return row


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| | | seconds | seen |", "|---|---|---|---|"]
    for row in rows:
        outcome = row.outcome if row.outcome == "held" else f"**{row.outcome}**"
        lines.append(f"| {row.name} | {outcome} | {row.seconds:.0f} | {row.seen.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def report(rows: Sequence[Row], title: str, out: Path) -> int:
    """Prints the table and writes it as Markdown; returns the exit code, 1 if anything did not hold."""
    counts = {outcome: sum(row.outcome == outcome for row in rows) for outcome in ("held", "did not hold")}
    counts["not run here"] = len(rows) - sum(counts.values())
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    text = f"{title}\n\n{said}; {sum(row.seconds for row in rows):.0f} s\n\n{table(rows)}"
    out.write_text(text)
    print(f"\n{text}\nwritten to {out}", flush=True)
    return 1 if counts["did not hold"] else 0


def job(verb: str, words: Sequence[str], log: Path, seconds: float, look: Callable[[], bool] | None = None) -> bool:
    """Runs `python -m jobs.VERB` as a user does, and waits for its good end.

    Args:
        verb: such as "train".
        words: its arguments.
        log: file that its output is added to.
        seconds: after which it is told to end.
        look: asked every second; when it answers True, all processes of the command are killed at once.

    Returns:
        Whether it ended by itself, rather than killed by `look`.

    Raises:
        DidNotHold: if it ends with an error or takes too long; with the end of its output.
    """
    command = [sys.executable, "-m", f"jobs.{verb}", *words]
    log.parent.mkdir(parents=True, exist_ok=True)
    began, deadline = log.stat().st_size if log.exists() else 0, time.monotonic() + seconds
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                if look is not None and look():
                    kill_tree(process.pid)
                    process.wait()
                    return False
                if time.monotonic() > deadline:
                    _end(process)
                    raise DidNotHold(f"jobs.{verb} was not done after {seconds:.0f} s; {_last_line(log, began)}")
                time.sleep(1)
        except BaseException:
            kill_tree(process.pid)
            raise
    if process.returncode != 0:
        raise DidNotHold(f"jobs.{verb} ended with exit code {process.returncode}: {_last_line(log, began)}")
    return True


def isolated(function: Callable[..., str], *given: Any, seconds: float) -> str:
    """Runs a function in a process of its own: a GPU library that crashes takes nothing else with it.

    Raises:
        DidNotHold: if it raises, dies or takes too long.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, given))
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            raise DidNotHold(f"no answer after {seconds:.0f} s")
        fine, seen = ours.recv()
    except EOFError:
        process.join(10)
        raise DidNotHold(f"its process died with exit code {process.exitcode}") from None
    finally:
        process.terminate()
        process.join(10)
    if not fine:
        raise DidNotHold(seen)
    return str(seen)


def _answer(pipe: Any, function: Callable[..., str], given: Sequence[Any]) -> None:
    try:
        pipe.send((True, function(*given)))
    except DidNotHold as error:
        pipe.send((False, str(error)))
    except Exception as error:
        pipe.send((False, f"{type(error).__name__}: {error}"))


def kill_tree(pid: int) -> None:
    """Kills a process and all below it; nothing where it has ended."""
    try:
        process = psutil.Process(pid)
        every = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for each in every:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)


def _last_line(log: Path, began: int) -> str:
    """The last line that a command wrote, to begin with, and where the others are."""
    lines = [line for line in log.read_bytes()[began:].decode(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1].strip()[: LONGEST - 100] if lines else 'no output'} ({log.name})"
