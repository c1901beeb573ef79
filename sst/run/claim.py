"""Whether a run directory may be gone on with: the settings and data that it began with."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster import storage
from sst.config import SAFE_TO_CHANGE, TrainSettings, differences
from sst.data.corpus import Corpus
from sst.errors import UserError
from sst.train.run_directory import WRITTEN, RunDirectory


def claim(run: RunDirectory, settings: TrainSettings, corpus: Corpus) -> bool:
    """Writes the run's settings, or checks that they are those it began with.

    Returns:
        Whether the run is new.

    Raises:
        UserError: if a run of that name exists with other settings or data, the message has the differences; or the
            directory holds files of others that the run would replace.
    """
    url = run.settings_url
    given = {"settings": settings.model_dump(mode="json"), "manifest": corpus.manifest_hash, "shards": corpus.url}
    if (before := _begun(run)) is not None:
        with suppress(ValidationError):  # a setting that an earlier version did not know has its default
            before["settings"] = TrainSettings.model_validate(before["settings"]).model_dump(mode="json")
        # The same corpus may have moved: its manifest tells.
        safe = tuple(f"settings.resources.{name}:" for name in SAFE_TO_CHANGE)
        changed = [line for line in differences(before | {"shards": corpus.url}, given) if not line.startswith(safe)]
        if changed:
            raise UserError(
                f"{run.url} is a run with other settings or data ({'; '.join(changed)}); take another --name, or "
                "the old settings to go on with it"
            )
        return False
    if foreign := sorted(set(WRITTEN).intersection(storage.list_names(run.url))):
        raise UserError(
            f"{run.url} holds {foreign[0]}, and is no run (no settings.json); nothing in it is touched: take another "
            "--name or --runs"
        )
    storage.write_json(url, given)
    return True


def _begun(run: RunDirectory) -> dict[str, Any] | None:
    """What the run's settings.json holds; None where there is none.

    Raises:
        UserError: if it is another program's.
    """
    url = run.settings_url
    if not storage.exists(url):
        return None
    content = storage.read_json(url)
    if isinstance(content, dict) and {"settings", "manifest", "shards"} <= content.keys():
        return content
    raise UserError(f"{url}: not the settings of a run, so nothing there is touched; take another --name or --runs")


def as_begun(run: RunDirectory, settings: TrainSettings) -> TrainSettings:
    """The settings, with the arithmetic that the run began with where they leave it open.

    Raises:
        UserError: if the directory is another program's.
    """
    begun = None if _begun(run) is None else run.noted_precision()
    if settings.resources.precision != "auto" or begun is None:
        return settings
    return settings.with_precision(begun)


def with_absolute_weights(settings: TrainSettings) -> TrainSettings:
    """The settings with file names that hold in any working directory."""
    keypoints = settings.keypoints
    weights, model = keypoints.superpoint.weights, keypoints.features.model
    if weights is not None:
        keypoints = keypoints.changed(superpoint=keypoints.superpoint.changed(weights=storage.absolute(weights)))
    # What is no folder here is a hub id.
    if model is not None and (keypoints.detector == "export" or Path(model).is_dir()):
        keypoints = keypoints.changed(features=keypoints.features.changed(model=storage.absolute(model)))
    return settings.changed(keypoints=keypoints)
