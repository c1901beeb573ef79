"""Checks packed shards down to every image.

Exits with 1 if anything is wrong, and names it. Damaged shards are rebuilt by the `landmarks pack` command that wrote
the corpus, with --repair added.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict

from sst.corpora.validation import validate
from sst.data.shards import Manifest
from sst.errors import GivenPath, UserError, exit_on_user_error


class Validate(BaseModel):
    """Which corpus is checked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: Annotated[GivenPath, tyro.conf.Positional]
    """Directory or URL of the shards."""


def run(config: Validate) -> bool:
    """Names every problem; returns whether there is none.

    Raises:
        UserError: if there is no corpus.
    """
    try:
        manifest = Manifest.load(config.shards)
    except ValueError as error:
        raise UserError(str(error)) from error
    found = validate(config.shards, manifest)
    for problem in found:
        print(problem.what)
    images = sum(shard.samples for shard in manifest.shards)
    if not found:
        print(f"{images} images in {len(manifest.shards)} shards are sound: {config.shards}")
        return True
    damaged = {problem.shard for problem in found if problem.shard is not None}
    print(f"{len(found)} problems; {len(damaged)} of {len(manifest.shards)} shards are damaged: {config.shards}")
    if damaged:
        print("rebuild them by the `landmarks pack` command that wrote this corpus, with --repair added")
    return False


COMMAND = Validate


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None, prog: str = "python -m jobs.validate") -> None:
    """Parses the command line and checks; exits with 0, 1 if something is wrong, 2 for a mistake."""
    if not run(tyro.cli(COMMAND, prog=prog, description=__doc__, args=arguments)):
        sys.exit(1)


if __name__ == "__main__":
    main()
