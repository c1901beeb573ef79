"""The end of training: the landmark model, its landmarks on every image, and what they tell without annotations."""

import math
from dataclasses import dataclass

import numpy as np

from cluster import storage
from sst.config import TrainSettings
from sst.data.corpus import Corpus
from sst.data.loader import balanced, shard_batches
from sst.data.shards import ShardInfo, read_shard
from sst.nn.geometry import SCORING_SIZE, STRIDE
from sst.nn.network import LandmarkDetector
from sst.train.consistency import coverage, equivariance_error, repeatability
from sst.train.extraction import BATCH, Predictions, agreed_answers, predict_shard, shard_symmetry
from sst.train.model import keep_landmarks, save_model
from sst.train.refinement import agreement, points_of, spread_out
from sst.train.run_directory import LandmarkRecord, RoundRecord, RunDirectory
from sst.train.tools import Tools
from sst.train.visibility import calibrated, logistic, trials
from sst.train.workers import Group

REACH = 16.0
"""Pixels of a 256 px view within which a landmark tells of a place: a sixteenth of the view, half an eye on a face."""


@dataclass(frozen=True)
class Finisher:
    """What one worker does when training is over."""

    settings: TrainSettings
    corpus: Corpus
    run: RunDirectory
    group: Group
    tools: Tools

    def __call__(self, network: LandmarkDetector, record: RoundRecord) -> None:
        """Writes the landmark model and its predictions on every image of the corpus.

        Args:
            network: as training left it, one channel per cluster, in eval mode.
            record: of the last round, which tells the clusters that are landmarks.
        """
        channels = self._chosen(network, [channel for channel, active in enumerate(record.active) if active])
        network = keep_landmarks(network, channels)
        if network.probabilities:
            self._calibrate(network)
        shards = balanced(self.corpus.manifest.shards, self.group.world)[self.group.rank]
        metrics: dict[str, float] = {}
        for done, shard in enumerate(shards, start=1):
            predicted = predict_shard(network, self.corpus, shard, self.settings)
            metrics = metrics or self._metrics(network, shard, predicted)
            storage.save_npz(
                self.run.predictions_url(shard.file), points=predicted.points, confidence=predicted.confidence
            )
            self.tools.log({"kind": "shards", "what": "predict", "done": done, "total": len(shards)})
        self.group.wait()
        if self.group.rank == 0:
            self._write_landmarks(network)
            save_model(
                self.run.model_url,
                network,
                network=self.settings.network,
                clusters=channels,
                visible=self.settings.stage2.visible,
                metrics=metrics,
            )
        self.group.wait()

    def _chosen(self, network: LandmarkDetector, channels: list[int]) -> list[int]:
        """The channels to keep; all, unless `stage2.max_landmarks` bounds them."""
        maximum = self.settings.stage2.max_landmarks
        if maximum is None or len(channels) <= maximum:
            return channels
        kept: list[int] = []
        if self.group.rank == 0:
            bounded = keep_landmarks(network, channels)
            first, second = warped_twice(bounded, self.corpus, self.corpus.train[0], self.settings)
            apart, radius = np.linalg.norm(first - second, axis=-1), self.settings.stage2.merge_radius
            points = np.where((apart < radius)[..., None], first, np.nan)
            found = agreement(points, np.full_like(points, np.nan), apart, radius)
            chosen = spread_out(found, np.ones(len(channels), bool), maximum)
            kept = [channel for channel, stays in zip(channels, chosen, strict=True) if stays]
        return list(self.group.gather(kept)[0])

    def _calibrate(self, network: LandmarkDetector) -> None:
        """Makes confidences the probability of being visible, by images of one shard; see `sst.train.visibility`."""
        found = np.ones(network.landmark.out.out_channels), np.zeros(network.landmark.out.out_channels)
        if self.group.rank == 0:
            size, shard = self.settings.network.input_size, self.corpus.train[0]
            points, _ = agreed_answers(network, self.corpus, shard, self.settings, warp_seed=1)
            tried = trials(
                network,
                shard_batches(self.corpus.url, shard, size, BATCH),
                points * (size / SCORING_SIZE / STRIDE),
                input_size=size,
                precision=self.settings.resources.precision,
                seed=self.settings.seed,
            )
            found = logistic(tried)
        calibrated(network, *self.group.gather(found)[0])

    def _repeatability(self, network: LandmarkDetector, shard: ShardInfo) -> np.ndarray:
        points = warped_twice(network, self.corpus, shard, self.settings)
        return repeatability(*points, self.settings.stage2.merge_radius)

    def _write_landmarks(self, network: LandmarkDetector) -> None:
        """Writes of each landmark its repeatability and its partner in mirrored images."""
        shard, visible = self.corpus.manifest.shards[-1], self.settings.stage2.visible
        again = self._repeatability(network, shard)
        symmetry = shard_symmetry(network, self.corpus, shard, self.settings, visible)
        record = LandmarkRecord(
            images=shard.samples,
            repeatability=again.tolist(),
            partner=symmetry.partner.tolist(),
            swap_share=symmetry.swap_share.tolist(),
        )
        self.run.write_landmarks(record)

    def _metrics(self, network: LandmarkDetector, shard: ShardInfo, predicted: Predictions) -> dict[str, float]:
        """What one shard tells without annotations: what is visible, boxes cover, follows a warp and is covered."""
        first, second = warped_twice(network, self.corpus, shard, self.settings, predicted)
        error = equivariance_error(first, second, SCORING_SIZE)
        boxes = [sample.box_share for sample in read_shard(f"{self.corpus.url}/{shard.file}", shard.sha256)]
        metrics = {
            "visible_share": float(np.isfinite(first[..., 0]).mean()) if first.size else 0.0,
            "box_share": float(np.mean(boxes)),
            "coverage": self._coverage(shard, first),
            "equivariance_error": error,
            "white": math.nan if (white := self.corpus.manifest.white) is None else white,
        }
        return {name: value for name, value in metrics.items() if np.isfinite(value)}

    def _coverage(self, shard: ShardInfo, visible_NK2: np.ndarray) -> float:
        """See `sst.train.consistency.coverage`; of the last labels that descriptors gave, NaN on test images."""
        if shard.split != "train":
            return math.nan
        last = max((each for each in self.run.records() if each.thresholds is not None), key=lambda each: each.number)
        structure = points_of(self.run.labels(last, shard.file), len(last.active), self.settings.network.input_size)
        return coverage(structure, visible_NK2, REACH)


def warped_twice(
    network: LandmarkDetector,
    corpus: Corpus,
    shard: ShardInfo,
    settings: TrainSettings,
    predicted: Predictions | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Visible landmarks of a shard's images, and of warped copies moved back; (N, K, 2), NaN = not visible."""
    plain = predicted or predict_shard(network, corpus, shard, settings)
    again = predict_shard(network, corpus, shard, settings, warp_seed=settings.seed)
    visible = settings.stage2.visible
    return plain.visible_points(visible), again.visible_points(visible)
