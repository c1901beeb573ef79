"""Does any reader answer damage with anything but its documented errors? `python -m benchmarks.fuzz --inputs 5000`.

Gives every reader of bytes from outside so many damaged files and prints what came of them; ends with an error at
the first undocumented one.
"""

import logging
import tempfile
import time
import warnings
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from tests.fuzzing import fuzz


def main(inputs: int = 5_000, seed: int = 1) -> None:
    """Prints the table.

    Args:
        inputs: damaged files for each reader.
        seed: of the damage.
    """
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = fuzz(Path(folder), inputs, seed)
    table = Table("reader", "inputs", "accepted", "documented errors")
    for name, each in counts.items():
        errors = ", ".join(f"{error} {count}" for error, count in sorted(each.items()) if error != "accepted")
        table.add_row(name, str(sum(each.values())), str(each.get("accepted", 0)), errors)
    Console().print(table)
    total = sum(sum(each.values()) for each in counts.values())
    print(f"{total} inputs, {time.monotonic() - started:.0f} s, nothing but documented errors")


if __name__ == "__main__":
    tyro.cli(main)
