"""Puts runs side by side on one HTML page.

It shows the settings that differ, the metrics of the models and their curves. Names or ids of runs or sweeps say which
runs; by default all of an experiment. The page becomes an artifact in MLflow.
"""

from collections.abc import Sequence
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict

from cluster import storage
from sst.errors import GivenPath, UserError, exit_on_user_error
from sst.run.options import TrackingOptions, WithTracking
from sst.run.preflight import check_kept
from sst.tune.comparison import comparison_page, fetch_runs, is_page, track_page


class CompareCommand(BaseModel):
    """Which runs, and where the page goes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: Annotated[tuple[GivenPath, ...], tyro.conf.Positional] = ()
    """Names or ids of runs; a sweep stands for its trials. All of the experiment's runs if none is given."""
    out: GivenPath = "comparison.html"
    """File or URL of the page."""
    track: bool = True
    """Make the page an artifact in MLflow: of the sweep if all are its trials, else of a run named comparison."""
    where: WithTracking = TrackingOptions()


COMMAND = CompareCommand


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None, prog: str = "python -m jobs.compare") -> None:
    """Writes the page and says where it is; mistakes exit with code 2."""
    command = tyro.cli(COMMAND, prog=prog, description=__doc__, args=arguments)
    tracking, experiment = command.where.tracking, command.where.experiment
    check_kept(out=command.out, tracking=tracking)
    if storage.is_file(command.out) and not is_page(storage.read_bytes(command.out)):
        raise UserError(
            f"{command.out}: not a page of `landmarks compare`, so it is not replaced; choose another --out"
        )
    runs = fetch_runs(tracking, experiment, command.runs)
    title = ", ".join(command.runs) or experiment
    page = comparison_page(f"Comparison of {title}", runs)
    storage.write_bytes(command.out, page.encode())
    print(f"comparison of {len(runs)} runs  {command.out}")
    if command.track:
        run_id = track_page(tracking, experiment, runs, page)
        print(f"artifact comparison.html of MLflow run {run_id}")


if __name__ == "__main__":
    main()
