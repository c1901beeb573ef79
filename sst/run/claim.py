"""Whether a run directory may be gone on with: the settings and data that it began with."""

from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from cluster import storage
from sst.config import SAFE_TO_CHANGE, TrainSettings, differences
from sst.data.corpus import Corpus
from sst.errors import UserError
from sst.train.run_directory import RunDirectory


def claim(run: RunDirectory, settings: TrainSettings, corpus: Corpus) -> bool:
    """Writes the run's settings, or checks that they are those it began with.

    Returns:
        Whether the run is new.

    Raises:
        UserError: if a run of that name exists with other settings or data; the message has the differences.
    """
    url = run.settings_url
    given = {"settings": settings.model_dump(mode="json"), "manifest": corpus.manifest_hash, "shards": corpus.url}
    if storage.exists(url):
        before = storage.read_json(url)
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
    storage.write_json(url, given)
    return True


def as_begun(run: RunDirectory, settings: TrainSettings) -> TrainSettings:
    """The settings, with the arithmetic that the run began with where they leave it open."""
    begun = run.noted_precision()
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
