"""Shows all of it on embedded drawings, in six to ten minutes."""

from collections.abc import Sequence

import tyro
from pydantic import BaseModel, ConfigDict

from cluster import storage
from sst.corpora.sources import Toy, pack_source
from sst.data.shards import MANIFEST
from sst.errors import exit_on_user_error
from sst.presets import PRESETS
from sst.report.evaluate_run import Run, evaluate_run
from sst.run.console import print_outcome
from sst.run.options import RunName, RunOptions, WithRuns
from sst.run.pipeline import train_run
from sst.run.preflight import check_kept


class Demo(BaseModel):
    """Packs drawings, trains, scores, and says where the report lies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: RunName = "demo"
    """Name of the run."""
    images: int = 2000
    """Number of drawings."""
    where: WithRuns = RunOptions()


COMMAND = Demo


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None, prog: str = "python -m jobs.demo") -> None:
    """Runs the demo, or what is left of it."""
    config = tyro.cli(COMMAND, prog=prog, description=__doc__, args=arguments)
    where = config.where
    check_kept(runs=where.runs, tracking=where.tracking)
    shards = storage.join(where.runs, f"toy-{config.images}")
    if not storage.exists(storage.join(shards, MANIFEST)):
        pack_source(Toy(count=config.images, out=shards))
    run_url = storage.join(where.runs, config.name)
    outcome = train_run(PRESETS["toy-cpu"][1], shards, run_url, where.tracked_as(config.name))
    evaluate_run(Run(run=run_url))
    print_outcome(outcome, where.tracking)


if __name__ == "__main__":
    main()
