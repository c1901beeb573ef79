"""Scores a run or predictions against annotations.

A finished run is put beside its baselines; predictions may come from anywhere.
"""

from collections.abc import Sequence

import tyro

from sst.errors import exit_on_user_error
from sst.report.evaluate_run import (
    Predictions,
    Run,
    evaluate_predictions,
    evaluate_run,
)

COMMAND = Run | Predictions


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None, prog: str = "python -m jobs.evaluate") -> None:
    """Parses the command line and scores."""
    config = tyro.cli(COMMAND, prog=prog, description=__doc__, args=arguments)
    if isinstance(config, Run):
        evaluate_run(config)
    else:
        evaluate_predictions(config)


if __name__ == "__main__":
    main()
