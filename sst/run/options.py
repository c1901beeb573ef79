"""Options that several commands share, each with its meaning and default in one place."""

from typing import Annotated, TypeVar

import tyro
from pydantic import BaseModel, ConfigDict, Field

from sst.errors import GivenPath
from sst.presets import PRESETS
from sst.run.tracking import DEFAULT_URI, Tracking

CommandT = TypeVar("CommandT", bound=BaseModel)

RunName = Annotated[str, Field(pattern=r"^[\w.-]+$")]
"""A name that can be a directory's."""


class TrackingOptions(BaseModel):
    """Where MLflow is, and what belongs together in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tracking: GivenPath = DEFAULT_URI
    """MLflow tracking URI; MLFLOW_TRACKING_URI gives another default."""
    experiment: str = "landmarks"
    """MLflow experiment."""


class RunOptions(TrackingOptions):
    """Where runs lie, and what MLflow gets of them."""

    runs: GivenPath = "runs"
    """Directory or URL under which runs lie."""
    register_as: Annotated[str | None, tyro.conf.arg(name="register")] = None
    """Name under which the finished (of a sweep: the best) model becomes a new version in MLflow's model registry."""

    def tracked_as(self, name: str) -> Tracking:
        """What MLflow gets of the run of that name."""
        return Tracking(self.tracking, self.experiment, name, register=self.register_as)


# Held as a field, not as a base class, since help lists a base's options before those that matter most.
WithTracking = Annotated[TrackingOptions, tyro.conf.arg(name="")]
"""A command's field for `TrackingOptions`, without a prefix of its own on the command line."""

WithRuns = Annotated[RunOptions, tyro.conf.arg(name="")]
"""A command's field for `RunOptions`."""


def one_per_preset(command: type[CommandT], anything: object = tyro.MISSING) -> type[CommandT]:
    """A command with a subcommand for every preset, which gives its `settings` their defaults.

    Args:
        command: has the fields shards, name and settings.
        anything: default of shards and name, which are required otherwise.
    """
    return tyro.extras.subcommand_type_from_defaults(
        {
            preset: command.model_construct(shards=anything, name=anything, settings=settings)
            for preset, (_, settings) in PRESETS.items()
        },
        {preset: about for preset, (about, _) in PRESETS.items()},
        sort_subcommands=False,
    )
