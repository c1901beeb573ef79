"""The main job on the embedded corpus of drawings, in ten to fifteen minutes on two cores: `python -m jobs.demo`."""

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
from sst.run.pipeline import train_run
from sst.run.preflight import check_kept
from sst.run.tracking import DEFAULT_URI, Tracking


class Demo(BaseModel):
    """Packs drawings, trains, scores, and says where the report lies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: str = "runs"
    """Directory under which the demo's shards and run lie."""
    name: str = "demo"
    """Name of the run."""
    images: int = 2000
    """Number of drawings."""
    tracking: str = DEFAULT_URI
    """MLflow tracking URI; MLFLOW_TRACKING_URI gives another default."""


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo, or what is left of it."""
    config = tyro.cli(Demo, prog="jobs.demo", description=__doc__, args=arguments)
    check_kept(runs=config.runs, tracking=config.tracking)
    shards = storage.join(config.runs, f"toy-{config.images}")
    if not storage.exists(storage.join(shards, MANIFEST)):
        pack_source(Toy(count=config.images, out=shards))
    run_url = storage.join(config.runs, config.name)
    outcome = train_run(
        PRESETS["toy-cpu"][1],
        shards,
        run_url,
        Tracking(config.tracking, "landmarks", config.name),
    )
    evaluate_run(Run(run=run_url))
    print_outcome(outcome, config.tracking)


if __name__ == "__main__":
    main()
