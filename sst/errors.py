"""Mistakes that the person at the command line can correct."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from cluster.storage import CredentialsInUrlError, StoreUnreachableError


class UserError(Exception):
    """A mistake in what was asked for; its message says what is wrong and what to do."""


class RunFailedError(Exception):
    """A run that began and could not be finished; its message has the worker's own."""


class UnwellError(RunFailedError):
    """A run that was to end at a sign that it comes to nothing; its message has the sign and what to do."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Prints a `UserError`, or every problem of a configuration, on stderr and exits with code 2.

    A run that failed on the way, or a store that can't be reached, exits with code 1; one that ended because it was
    unwell with 4; Ctrl-C with 130, SIGTERM with 143.

    Usable as a decorator too.

    Raises:
        SystemExit: with code 2, in place of a `UserError`.
    """
    try:
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
    except ValidationError as error:
        for problem in error.errors():
            print(
                f"error: {'.'.join(map(str, problem['loc']))}: {problem['msg']}".replace(": : ", ": "), file=sys.stderr
            )
        raise SystemExit(2) from None


class Stopped(Exception):
    """Raised in a worker's loop, after its checkpoint, when it was asked to stop."""


class Unwell(Stopped):
    """The same where a sign that the run comes to nothing ends it; which one, the metrics file has."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: what `ray job stop`, a scheduler or a spot notice sends."""
