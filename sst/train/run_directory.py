"""A run's directory: settings, rounds, checkpoints, predictions.

RUN/settings.json                what the run was told, and the arithmetic that it settled on
RUN/rounds/0003/record.json      written last: a round without it does not exist
RUN/rounds/0003/labels/shard-00000.npz, centroids.npz
RUN/checkpoints/0000012000/      see sst.train.checkpoint
RUN/model/, RUN/predictions/     the result
RUN/landmarks.json               how steady each landmark is, and left/right pairs
RUN/metrics.jsonl, RUN/report.html, RUN/figures/
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster import storage
from cluster.correspondence import labels_url
from cluster.shards import Labels
from sst.nn.precision import Precision


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
        partner: of every cluster in mirrored images, see `sst.nn.symmetry.Symmetry`; None if it was not sought.
        figures: the round's numbers, as shown in the report.
        seconds: time by phase.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    kind: Literal["keypoints", "correspondence", "merge"]
    step: int
    weights: str | None
    manifest: str
    seed: int
    backend: str | None
    thresholds: list[float] | None
    active: list[bool]
    population: list[int]
    partner: list[int] | None = None
    figures: dict[str, float]
    seconds: dict[str, float]

    def line(self) -> dict[str, Any]:
        """The round as one line of figures."""
        seconds = {f"{name}_seconds": round(value, 1) for name, value in self.seconds.items()}
        return {"kind": "round", "round": self.number, "made_by": self.kind} | self.figures | seconds


class LandmarkRecord(BaseModel):
    """What is known of each landmark of a finished model without annotations, from the images of one shard.

    Attributes:
        images: their number.
        repeatability: (K,), see `sst.train.consistency.repeatability`.
        partner: (K,), see `sst.nn.symmetry.Symmetry`.
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
        """What the run was told, and which data it reads."""
        return storage.join(self.url, "settings.json")

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
        told = storage.read_json(self.settings_url)
        told["settings"]["resources"]["precision"] = precision
        storage.write_json(self.settings_url, told)

    def round_url(self, number: int) -> str:
        """Directory of a round."""
        return storage.join(self.url, "rounds", f"{number:04d}")

    def has_round(self, number: int) -> bool:
        """Whether a round is complete."""
        return storage.exists(storage.join(self.round_url(number), "record.json"))

    def record(self, number: int) -> RoundRecord:
        """The record of a complete round.

        Raises:
            ValueError: if the record is damaged; the message names it.
        """
        url = storage.join(self.round_url(number), "record.json")
        try:
            return RoundRecord.model_validate(storage.read_json(url))
        except ValidationError as error:
            raise ValueError(f"{url}: not a round record ({error.error_count()} problems)") from error

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

    def landmarks(self) -> LandmarkRecord | None:
        """What is known of each landmark; None for a run of a version that did not note it."""
        url = storage.join(self.url, "landmarks.json")
        return LandmarkRecord.model_validate(storage.read_json(url)) if storage.exists(url) else None

    def predictions_url(self, shard: str) -> str:
        """Where the final predictions on an image shard lie."""
        return storage.join(self.url, "predictions", shard.removesuffix(".tar") + ".npz")
