"""Packs images into shards, which training reads.

Sources are a folder of images, the embedded drawings, and four published corpora in their owners' archives.
"""

from collections.abc import Sequence

import tyro

from sst.corpora.sources import Source, pack_source
from sst.errors import exit_on_user_error
from sst.run.preflight import check_kept

COMMAND = Source


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None, prog: str = "python -m jobs.pack") -> None:
    """Parses the command line and packs; a mistake gives a message on stderr and exit code 2."""
    config = tyro.cli(COMMAND, prog=prog, description=__doc__, args=arguments)
    check_kept(out=config.out)
    pack_source(config)


if __name__ == "__main__":
    main()
