"""Scores landmarks against annotations: a finished run beside its baselines, or predictions from anywhere."""

from collections.abc import Sequence

import tyro

from sst.errors import exit_on_user_error
from sst.report.evaluate_run import (
    Predictions,
    Run,
    evaluate_predictions,
    evaluate_run,
)


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and scores."""
    config = tyro.cli(Run | Predictions, prog="jobs.evaluate", description=__doc__, args=arguments)
    if isinstance(config, Run):
        evaluate_run(config)
    else:
        evaluate_predictions(config)


if __name__ == "__main__":
    main()
