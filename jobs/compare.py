"""Compares runs: `python -m jobs.compare --experiment NAME`, or with names or ids of runs or sweeps.

Writes one HTML page with the settings that differ, the figures of the models and the curves, and makes it an artifact
in MLflow.
"""

from collections.abc import Sequence
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict

from cluster import storage
from sst.errors import exit_on_user_error
from sst.run.preflight import check_kept
from sst.run.tracking import DEFAULT_URI
from sst.tune.comparison import comparison_page, fetch_runs, track_page


class CompareCommand(BaseModel):
    """Which runs, and where the page goes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names or ids of runs; a sweep stands for its trials. All of the experiment's runs if none is given."""
    experiment: str = "landmarks"
    """MLflow experiment."""
    tracking: str = DEFAULT_URI
    """MLflow tracking URI; MLFLOW_TRACKING_URI gives another default."""
    out: str = "comparison.html"
    """File or URL of the page."""
    track: bool = True
    """Make the page an artifact in MLflow: of the sweep if all are its trials, else of a run named comparison."""


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page and says where it is; mistakes exit with code 2."""
    command = tyro.cli(CompareCommand, prog="jobs.compare", description=__doc__, args=arguments)
    check_kept(out=command.out, tracking=command.tracking)
    runs = fetch_runs(command.tracking, command.experiment, command.runs)
    title = ", ".join(command.runs) or command.experiment
    page = comparison_page(f"Comparison of {title}", runs)
    storage.write_bytes(command.out, page.encode())
    print(f"comparison of {len(runs)} runs  {command.out}")
    if command.track:
        run_id = track_page(command.tracking, command.experiment, runs, page)
        print(f"artifact comparison.html of MLflow run {run_id}")


if __name__ == "__main__":
    main()
