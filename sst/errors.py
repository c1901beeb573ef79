"""Mistakes that the person at the command line can correct."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

from pydantic import AfterValidator, ValidationError
from pydantic_core import PydanticCustomError

from cluster.storage import CredentialsInUrlError, StoreUnreachableError


class UserError(Exception):
    """A mistake in what was asked for; its message says what is wrong and what to do."""


class RunFailedError(Exception):
    """A run that began and could not be finished; its message has the worker's own."""


class UnwellError(RunFailedError):
    """A run that was to end at a sign that it comes to nothing; its message has the sign and what to do."""


EMPTY = "is empty; give a path or URL (is a variable of the shell unset?)"
"""Said of an empty path, which would be the current directory or, joined to names, the root of the file system."""


def _given(path: str) -> str:
    if not path.strip():
        raise PydanticCustomError("empty_path", EMPTY)
    return path


def problems(error: ValidationError) -> str:
    """What is wrong in a record, field by field, in one line."""
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:5])


def other_version(error: ValidationError) -> str:
    """What is wrong in a record, where it may be that of another version, and what to do."""
    return f"as this version writes it ({problems(error)}); use the version that wrote it, or train again"


GivenPath = Annotated[str, AfterValidator(_given)]
"""A path, pattern or URL of a command: not empty."""

PLACES = {
    errno.EACCES: "choose a place that you may read and write",
    errno.EPERM: "choose a place that you may read and write",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOTDIR: "a file is on the way to it; choose a place below a folder",
    errno.EISDIR: "a folder is where a file is to be; choose another name",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "links on the way to it lead in a circle",
}
"""Errors of the operating system that are a mistake in a given place, and what to do."""

FULL = {
    errno.ENOSPC: "free some room and give the same command again",
    errno.EDQUOT: "free some of your quota and give the same command again",
    errno.EFBIG: "it is larger than a file may be there (ulimit -f, or the file system)",
}
"""Errors that end what was begun well."""


def _told(error: OSError) -> str:
    remedy = (PLACES | FULL)[error.errno or 0]
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    said = error.strerror or str(error)
    return f"{where}{said}" if "; free some" in said else f"{where}{said}; {remedy}"


@contextmanager
def readable(what: str, remedy: str = "") -> Iterator[None]:
    """While inside, a file or URL that can't be read is the user's mistake.

    Args:
        what: what could not be read, with its path.
        remedy: is added after the reason.

    Raises:
        UserError: with what, the reason in brackets and the remedy.
    """
    try:
        yield
    except (OSError, ValueError, ImportError) as error:  # the latter two: URLs of an unknown or uninstalled kind
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise UserError(f"{what} ({reason}){remedy}") from error


@contextmanager
def terminable() -> Iterator[None]:
    """While inside, SIGTERM raises `Terminated` in the main thread, as Ctrl-C raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():  # a trial of a sweep; signals are not its own
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Prints a `UserError`, or every problem of a configuration, on stderr and exits with code 2.

    A run that failed on the way, or a store that can't be reached, exits with code 1; one that ended because it was
    unwell with 4; Ctrl-C with 130, SIGTERM with 143. A place that can't be written to exits with 2, a disk that is or
    got full with 1.

    Usable as a decorator too.

    Raises:
        SystemExit: with code 2, in place of a `UserError`.
    """
    try:
        with terminable():
            yield
    except (UserError, CredentialsInUrlError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        raise SystemExit(143 if isinstance(error, Terminated) else 130) from None
    except UnwellError as error:
        print(f"stopped, since the run is not well: {error}", file=sys.stderr)
        raise SystemExit(4) from None
    except RunFailedError as error:
        print(f"error: training failed; the same command goes on from the last checkpoint\n{error}", file=sys.stderr)
        raise SystemExit(1) from None
    except StoreUnreachableError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno not in PLACES | FULL:
            raise
        print(f"error: {_told(error)}", file=sys.stderr)
        raise SystemExit(1 if error.errno in FULL else 2) from None
    except ValidationError as error:
        for problem in error.errors():
            print(
                f"error: {'.'.join(map(str, problem['loc']))}: {problem['msg']}".replace(": : ", ": "), file=sys.stderr
            )
        raise SystemExit(2) from None


class Stopped(Exception):
    """Raised in a worker's loop, after its checkpoint, when it was asked to stop."""


class Leaving(Stopped):
    """The same where a machine of the group is about to be taken away; the run goes on on the others."""


class Unwell(Stopped):
    """The same where a sign that the run comes to nothing ends it; which one, the metrics file has."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: what `ray job stop`, a scheduler or a spot notice sends."""
