"""A run's directory: settings, rounds, checkpoints, predictions.

RUN/settings.json                the run's settings, and the arithmetic that it settled on
RUN/rounds/0003/record.json      written last: a round without it does not exist
RUN/rounds/0003/labels/shard-00000.npz, centroids.npz
RUN/checkpoints/0000012000/      see sst.train.checkpoint
RUN/model/, RUN/predictions/     the result
RUN/landmarks.json               how steady each landmark is, and left/right pairs
RUN/metrics.jsonl                one JSON object for each step shown and each round
RUN/final_metrics.json           the numbers by which finished runs are compared
RUN/report.html, RUN/figures/    what people look at
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster import storage
from cluster.correspondence import labels_url
from cluster.shards import Labels
from sst.errors import other_version
from sst.nn.precision import Precision
from sst.train.model import record_url

WRITTEN = ("rounds", "checkpoints", "model", "predictions", "landmarks.json", "metrics.jsonl", "final_metrics.json",
           "scores.json", "report.html", "figures", "ray")  # fmt: skip
"""What a run writes into its directory after its settings."""


class RoundRecord(BaseModel):
    """What is known of a complete round.

    Attributes:
        number: 0 for the first keypoints; later rounds count up, merging rounds included.
        kind: how the labels came about.
        step: optimizer step after which the round was made.
        weights: sha256 of the weights that extracted it; None for first keypoints.
        manifest: sha256 of the corpus manifest.
        seed: of the round's sample.
        backend: what ran k-means.
        thresholds: per-cluster distance thresholds, applied when labels are read; None: all labels count.
        active: clusters that may become landmarks.
        population: labels per cluster over the training images.
        partner: of every cluster in mirrored images, see `sst.train.symmetry.Symmetry`; None if it was not sought.
        metrics: the round's metrics, as shown in the report.
        seconds: time by phase.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    kind: Literal["keypoints", "correspondence", "merge", "refinement"]
    step: int
    weights: str | None
    manifest: str
    seed: int
    backend: str | None
    thresholds: list[float] | None
    active: list[bool]
    population: list[int]
    partner: list[int] | None = None
    metrics: dict[str, float]
    seconds: dict[str, float]

    def line(self) -> dict[str, Any]:
        """The round as one line of metrics."""
        seconds = {f"{name}_seconds": round(value, 1) for name, value in self.seconds.items()}
        return {"kind": "round", "round": self.number, "made_by": self.kind} | self.metrics | seconds


class LandmarkRecord(BaseModel):
    """What is known of each landmark of a finished model without annotations, from the images of one shard.

    Attributes:
        images: their number.
        repeatability: (K,), see `sst.train.consistency.repeatability`.
        partner: (K,), see `sst.train.symmetry.Symmetry`.
        swap_share: (K,), likewise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    repeatability: list[float]
    partner: list[int]
    swap_share: list[float]


@dataclass(frozen=True)
class RunDirectory:
    """Paths and records of one run; `url` is a local path or any fsspec URL."""

    url: str

    @property
    def settings_url(self) -> str:
        """The settings, and which data the run reads."""
        return storage.join(self.url, "settings.json")

    @property
    def chosen_url(self) -> str:
        """What `train own` was asked for and the settings that it chose."""
        return storage.join(self.url, "own.json")

    @property
    def shards_url(self) -> str:
        """Where `train own` packs its images."""
        return storage.join(self.url, "shards")

    @property
    def packed_url(self) -> str:
        """What `train own` packed, file by file."""
        return storage.join(self.url, "packed.json")

    @property
    def checkpoints_url(self) -> str:
        """Directory of the checkpoints."""
        return storage.join(self.url, "checkpoints")

    @property
    def metrics_url(self) -> str:
        """Metrics of steps and rounds, a JSON object in each line."""
        return storage.join(self.url, "metrics.jsonl")

    @property
    def final_metrics_url(self) -> str:
        """The numbers by which finished runs are compared."""
        return storage.join(self.url, "final_metrics.json")

    @property
    def scores_url(self) -> str:
        """Errors against annotations, where the corpus has them."""
        return storage.join(self.url, "scores.json")

    @property
    def report_url(self) -> str:
        """The report, a page of HTML."""
        return storage.join(self.url, "report.html")

    def figure_url(self, name: str) -> str:
        """A picture of the report."""
        return storage.join(self.url, "figures", f"{name}.png")

    @property
    def stop_url(self) -> str:
        """A file that asks the workers to stop while it is there."""
        return storage.join(self.url, "stop")

    @property
    def failed_url(self) -> str:
        """A file in which a worker leaves an error that would come again, until the run has ended for it."""
        return storage.join(self.url, "failed")

    @property
    def mlflow_url(self) -> str:
        """The run's id in MLflow, and how much of the metrics it has."""
        return storage.join(self.url, "mlflow.json")

    def noted_precision(self) -> Precision | None:
        """The arithmetic that the run began with; None where that is still open."""
        if not storage.exists(self.settings_url):
            return None
        noted = storage.read_json(self.settings_url)["settings"]["resources"].get("precision")
        return None if noted == "auto" else cast(Precision | None, noted)

    def note_precision(self, precision: Precision) -> None:
        """Notes in the run's settings in what arithmetic it is computed; not in a directory without settings."""
        if not storage.exists(self.settings_url):
            return
        given = storage.read_json(self.settings_url)
        given["settings"]["resources"]["precision"] = precision
        storage.write_json(self.settings_url, given)

    def round_url(self, number: int) -> str:
        """Directory of a round."""
        return storage.join(self.url, "rounds", f"{number:04d}")

    def has_round(self, number: int) -> bool:
        """Whether a round is complete."""
        return storage.exists(storage.join(self.round_url(number), "record.json"))

    def record(self, number: int) -> RoundRecord:
        """The record of a complete round.

        Raises:
            ValueError: if the record is damaged or of another version; the message names it.
        """
        url = storage.join(self.round_url(number), "record.json")
        try:
            return RoundRecord.model_validate(storage.read_json(url))
        except ValidationError as error:
            raise ValueError(f"{url}: not the record of a round {other_version(error)}") from error

    def records(self) -> list[RoundRecord]:
        """All complete rounds in their order."""
        names = storage.list_names(storage.join(self.url, "rounds"))
        return [self.record(int(name)) for name in names if name.isdigit() and self.has_round(int(name))]

    def finish_round(self, record: RoundRecord, centroids: np.ndarray | None) -> None:
        """Writes centroids, then the record, which completes the round."""
        url = self.round_url(record.number)
        if centroids is not None:
            storage.save_npz(storage.join(url, "centroids.npz"), centroids=centroids)
        storage.write_json(storage.join(url, "record.json"), record.model_dump())

    def centroids(self, number: int) -> np.ndarray:
        """Centroids (K, D) of a round of correspondence."""
        return storage.load_npz(storage.join(self.round_url(number), "centroids.npz"))["centroids"]

    def labels(self, record: RoundRecord, shard: str) -> Labels:
        """The labels of an image shard that count: below their cluster's threshold."""
        labels = Labels.load(labels_url(self.round_url(record.number), shard))
        return labels if record.thresholds is None else labels.below(np.array(record.thresholds))

    @property
    def model_url(self) -> str:
        """Directory of the trained landmark model."""
        return storage.join(self.url, "model")

    def has_model(self) -> bool:
        """Whether training is over."""
        return storage.exists(record_url(self.model_url))

    @property
    def _landmarks_url(self) -> str:
        return storage.join(self.url, "landmarks.json")

    def write_landmarks(self, record: LandmarkRecord) -> None:
        """Notes what is known of each landmark."""
        storage.write_json(self._landmarks_url, record.model_dump())

    def landmarks(self) -> LandmarkRecord:
        """What is known of each landmark.

        Raises:
            FileNotFoundError: if the run has no model yet.
            ValueError: if the record is damaged.
        """
        return LandmarkRecord.model_validate(storage.read_json(self._landmarks_url))

    def predictions_url(self, shard: str) -> str:
        """Where the final predictions on an image shard lie."""
        return storage.join(self.url, "predictions", shard.removesuffix(".tar") + ".npz")
