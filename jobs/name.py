"""Teaches a model your own named points from a few images.

From a handful of annotated images (5 to 50 are plenty) it learns where your points lie among the discovered landmarks,
and writes MODEL/names.json; from then on predict gives the named points too.
"""

from collections.abc import Sequence

import tyro
from rich.console import Console

from sst.errors import exit_on_user_error
from sst.predict.naming import Name, error_table, learn_names


def run(config: Name) -> None:
    """Learns, writes and prints what to expect.

    Raises:
        UserError: if there is no model or no usable annotation.
    """
    named, examples, file = learn_names(config)
    table = error_table(examples)
    if table is not None:
        Console().print(table)
    else:
        print("too few annotated images to hold some out and measure errors; with 7 or more a table is shown")
    print(f"{len(named.names)} named points learnt from {named.images} images: {file}")
    print(f"landmarks predict {config.model} IMAGES --out DIR gives them now too (DIR/named.json)")


COMMAND = Name


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None, prog: str = "python -m jobs.name") -> None:
    """Parses the command line and learns; a mistake gives a message on stderr and exit code 2."""
    run(tyro.cli(COMMAND, prog=prog, description=__doc__, args=arguments))


if __name__ == "__main__":
    main()
