"""Packs images into WebDataset shards: `python -m jobs.pack SOURCE ... --out URL`.

Sources are a folder of images, the embedded drawings, and four published corpora in their owners' archives.
"""

from collections.abc import Sequence

import tyro

from sst.corpora.sources import Source, pack_source
from sst.errors import exit_on_user_error
from sst.run.preflight import check_kept


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and packs; a mistake gives a message on stderr and exit code 2."""
    config = tyro.cli(Source, prog="jobs.pack", description=__doc__, args=arguments)
    check_kept(out=config.out)
    pack_source(config)


if __name__ == "__main__":
    main()
