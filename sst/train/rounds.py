"""Between two phases: the next round's labels, by correspondence (stage 1) or by merging (stage 2).

Every worker computes its shards; rank 0 collects per-shard numbers, runs k-means and assignment through the tools that
it was given, and writes the round's record last.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from operator import add

import numpy as np
import torch
from torch import nn

from cluster import storage
from cluster.correspondence import (
    SAME_PLACE,
    Correspondence,
    PreviousLabels,
    correspond,
    descriptors_folder,
    descriptors_url,
    labels_url,
)
from cluster.merging import apply_merge, count_overlaps, merge_plan
from cluster.shards import Labels
from sst.config import TrainSettings
from sst.data.corpus import Corpus
from sst.data.loader import balanced, shard_batches
from sst.data.shards import ShardInfo
from sst.nn.augment import Augmentation, random_affine
from sst.nn.geometry import SCORING_SIZE, transform
from sst.nn.network import DetectorDescriptor, LandmarkDetector
from sst.nn.symmetry import mirror_matrix
from sst.train.checkpoint import weights_hash
from sst.train.consistency import equivariance_error, label_persistence
from sst.train.extraction import (
    agreed_answers,
    extract_descriptors,
    found_clusters,
    predict_shard,
    shard_symmetry,
)
from sst.train.health import kept_shares
from sst.train.refinement import Agreement, agreement, kept_landmarks, labels_of, points_of, set_back
from sst.train.run_directory import RoundRecord, RunDirectory
from sst.train.schedule import derived_seed
from sst.train.symmetry import find_symmetry
from sst.train.tools import Tools
from sst.train.workers import Group

EQUIVARIANCE_IMAGES = 64
"""Images per worker on which a round's equivariance error is measured."""

ROUND_SEED = 1
"""Purpose number in `derived_seed`."""


@dataclass(frozen=True)
class RoundMaker:
    """Makes rounds of one run on one worker."""

    settings: TrainSettings
    corpus: Corpus
    run: RunDirectory
    group: Group
    tools: Tools

    def correspondence(self, model: DetectorDescriptor, previous: RoundRecord, step: int) -> None:
        """Extracts every training image's descriptors, clusters them and labels the images (section 3.2).

        Args:
            model: stage-1 network without DDP wrapper, in eval mode.
            previous: record of the round whose labels were trained on.
            step: optimizer steps taken in the run.
        """
        number, started = previous.number + 1, time.monotonic()
        rows, dropped, united = self._extract(model, previous)
        extracted = time.monotonic()
        if self.group.rank == 0:
            seed = derived_seed(self.settings.seed, ROUND_SEED, number)
            before = PreviousLabels(self.run.round_url(previous.number), np.array(previous.thresholds, np.float32))
            found = correspond(
                self.run.round_url(number),
                descriptors_folder(self.run.round_url(number)),
                rows,
                lambda sample: self.tools.fit(sample, self.settings.cluster.kmeans(seed)),
                self.tools.run_on_shards,
                sample=self.settings.cluster.sample,
                seed=seed,
                previous=before if self.settings.cluster.keep_identities else None,
            )
            moved, partner = self._warped_clusters(model, found)
            found_again = self._persistence(previous, found.thresholds, number)
            metrics = correspondence_metrics(found)
            earlier = [each.metrics for each in self.run.records() if each.kind == "correspondence"]
            seconds = {"extract": extracted - started} | found.seconds
            record = RoundRecord(
                number=number,
                kind="correspondence",
                step=step,
                weights=weights_hash(model),
                manifest=self.corpus.manifest_hash,
                seed=seed,
                backend=found.kmeans.backend,
                thresholds=found.thresholds.tolist(),
                active=(found.population > self.settings.stage2.min_population).tolist(),
                population=found.population.tolist(),
                partner=partner,
                metrics=metrics
                | kept_shares(metrics, earlier)
                | {"unusable_descriptors": dropped}
                | ({} if self.settings.stage1.unite else {"first_keypoints_share": united / found.images})
                | found_again
                | moved,
                seconds=seconds | {"metrics": time.monotonic() - started - sum(seconds.values())},
            )
            self.run.finish_round(record, found.kmeans.centroids)
            self.tools.log(record.line())
            # Labels and centroids are what is left of a round; its descriptors would fill any disk over the rounds.
            for done in (previous.number, number):
                storage.remove(descriptors_folder(self.run.round_url(done)))
        self.group.wait()

    def merge(self, model: LandmarkDetector, previous: RoundRecord, step: int) -> None:
        """Joins clusters that name the same place and renames the labels (section 3.3).

        Args:
            model: stage-2 network without DDP wrapper, in eval mode.
            previous: record of the round whose labels were trained on.
            step: optimizer steps taken in the run.
        """
        number, two, started = previous.number + 1, self.settings.stage2, time.monotonic()
        overlaps = []
        for done, shard in enumerate(self._mine, start=1):
            predicted = predict_shard(model, self.corpus, shard, self.settings)
            confidence = np.where(previous.active, predicted.confidence, 0.0)
            overlaps.append(
                count_overlaps(predicted.points, confidence, confident=two.merge_confidence, radius=two.merge_radius)
            )
            self._progress("merge", done)
        shares = [reduce(add, each) for each in self.group.gather(overlaps) if each]
        if self.group.rank == 0:
            overlap = reduce(add, shares)
            population_before = np.array(previous.population)
            mapping = merge_plan(overlap, population_before, two.merge_share)
            url = self.run.round_url(number)
            shards = [shard.file for shard in self.corpus.train]
            counts = self.tools.run_on_shards(
                merge_shard,
                [(self.run, previous, s, labels_url(url, s), mapping, population_before) for s in shards],
            )
            population = np.sum([population for population, _ in counts], 0)
            active = np.array(previous.active) & (mapping == np.arange(len(mapping)))
            partner = None
            if two.flip_share:
                found = shard_symmetry(model, self.corpus, self.corpus.train[0], self.settings, two.merge_confidence)
                partner = partners_among(active, found.partner.tolist())
            record = RoundRecord(
                number=number,
                kind="merge",
                step=step,
                weights=weights_hash(model),
                manifest=previous.manifest,
                seed=previous.seed,
                backend=None,
                thresholds=None,
                active=active.tolist(),
                population=population.tolist(),
                partner=partner,
                metrics={
                    "labels_per_image": float(population.sum() / sum(images for _, images in counts)),
                    "clusters_in_use": int(active.sum()),
                    "merged": int(np.sum(previous.active) - active.sum()),
                },
                seconds={"merge": time.monotonic() - started},
            )
            self.run.finish_round(record, None)
            self.tools.log(record.line())
        self.group.wait()

    def refine(self, model: LandmarkDetector, previous: RoundRecord, step: int) -> None:
        """Makes the network's own answers the labels, where they agree under a warp; see `sst.train.refinement`.

        Landmarks that have become one place are joined, and where there are more than `stage2.max_landmarks`, those
        that agree best and lie apart are kept.

        Args:
            model: stage-2 network without DDP wrapper, in eval mode.
            previous: record of the round whose labels were trained on.
            step: optimizer steps taken in the run.
        """
        number, two, started = previous.number + 1, self.settings.stage2, time.monotonic()
        size, url = self.settings.network.input_size, self.run.round_url(number)
        active, before = np.array(previous.active), np.array(previous.population)
        seed = derived_seed(self.settings.seed, ROUND_SEED, number)
        parts = []
        for done, shard in enumerate(self._mine, start=1):
            points, error = agreed_answers(model, self.corpus, shard, self.settings, seed)
            points[:, ~active] = np.nan
            labels_of(points, size).save(labels_url(url, shard.file))
            earlier = points_of(self.run.labels(previous, shard.file), len(active), size)
            parts.append(agreement(points, earlier, error, two.merge_radius))
            self._progress("refine", done)
        shares = [reduce(add, each) for each in self.group.gather(parts) if each]
        if self.group.rank == 0:
            found = reduce(add, shares)
            kept = kept_landmarks(found, active, before, two.merge_share, two.max_landmarks)
            back = set_back(found, kept, before, two.refine_radius)
            shards = [shard.file for shard in self.corpus.train]
            population = np.sum(
                self.tools.run_on_shards(
                    refined_shard, [(self.run, previous, s, labels_url(url, s), kept, back) for s in shards]
                ),
                0,
            )
            record = RoundRecord(
                number=number,
                kind="refinement",
                step=step,
                weights=weights_hash(model),
                manifest=previous.manifest,
                seed=previous.seed,
                backend=None,
                thresholds=None,
                active=kept.tolist(),
                population=population.tolist(),
                partner=partners_among(kept, previous.partner),
                metrics=refinement_metrics(found, active, kept, back, population),
                seconds={"refine": time.monotonic() - started},
            )
            self.run.finish_round(record, None)
            self.tools.log(record.line())
        self.group.wait()

    @cached_property
    def _mine(self) -> list[ShardInfo]:
        """The training shards of this worker."""
        return balanced(self.corpus.train, self.group.world)[self.group.rank]

    def _progress(self, what: str, done: int) -> None:
        self.tools.log({"kind": "shards", "what": what, "done": done, "total": len(self._mine)})

    def _extract(self, model: nn.Module, previous: RoundRecord) -> tuple[dict[str, int], int, int]:
        """Writes the descriptor shards of this worker.

        Returns:
            Of all workers: the rows of each shard, how many descriptors were dropped as unusable, and in how many
            images earlier labels were united with keypoints.
        """
        rows, counts, one = {}, np.zeros(2, int), self.settings.stage1
        # A detector that has not learnt enough yet must not leave an image, or the run, without labels. Those of the
        # round before would become fewer from round to round, as each drops what is far from its cluster.
        earlier, enough = (previous, None) if one.unite else (self.run.record(0), one.min_labels)
        with ThreadPoolExecutor(1, thread_name_prefix="save") as pool:
            written: Future[None] | None = None
            for done, shard in enumerate(self._mine, start=1):
                descriptors, *counted = extract_descriptors(
                    model,
                    self.corpus.url,
                    shard,
                    self.run.labels(earlier, shard.file),
                    input_size=self.settings.network.input_size,
                    threshold=one.threshold,
                    precision=self.settings.resources.precision,
                    enough=enough,
                )
                # Written while the next shard is computed; no more than one waits, or memory would grow.
                if written:
                    written.result()
                url = descriptors_url(self.run.round_url(previous.number + 1), shard.file)
                written = pool.submit(descriptors.save, url)
                rows[shard.file] = len(descriptors.points)
                counts += counted
                self._progress("extract", done)
            if written:
                written.result()
        everyone = {file: count for each in self.group.gather(rows) for file, count in each.items()}
        dropped, united = np.sum(self.group.gather(counts), 0).tolist()
        return everyone, dropped, united

    def _persistence(self, previous: RoundRecord, thresholds: np.ndarray, number: int) -> dict[str, float]:
        if not self.settings.cluster.keep_identities:
            return {}  # the previous clusters had other numbers
        shards = [shard.file for shard in self.corpus.train]
        url = self.run.round_url(number)
        shares = self.tools.run_on_shards(
            shard_persistence, [(self.run, previous, s, labels_url(url, s), thresholds) for s in shards]
        )
        return {"label_persistence": float(np.average([share for share, _ in shares], weights=[n for _, n in shares]))}

    def _warped_clusters(self, forward: nn.Module, found: Correspondence) -> tuple[dict[str, float], list[int] | None]:
        """How well clusters follow a warp, and, where images are to be mirrored, their partners there."""
        size, one = self.settings.network.input_size, self.settings.stage1
        device, generator = self.group.device, torch.Generator().manual_seed(self.settings.seed)
        batch = next(shard_batches(self.corpus.url, self.corpus.train[0], size, EQUIVARIANCE_IMAGES)).to(device)
        clusters = partial(
            found_clusters,
            forward,
            batch,
            found.kmeans.centroids,
            found.thresholds,
            input_size=size,
            threshold=one.threshold,
            precision=self.settings.resources.precision,
        )
        warp = random_affine(len(batch.keys), size, Augmentation(), generator)
        plain = clusters()
        moved = transform(warp, torch.from_numpy(plain).float()).numpy()
        moved[(moved < 0).any(-1) | (moved > size - 1).any(-1)] = np.nan
        error = equivariance_error(moved, clusters(warp_B33=warp.to(device)), size)
        partner = None
        if one.flip_share:
            mirrored = clusters(warp_B33=mirror_matrix(size, device).expand(len(batch.keys), 3, 3))
            mirrored[..., 0] = size - mirrored[..., 0]
            partner = find_symmetry(plain, mirrored, size).partner.tolist()
        return {"equivariance_error": error} if np.isfinite(error) else {}, partner


def correspondence_metrics(found: Correspondence) -> dict[str, float]:
    """The label-free metrics that every round of correspondence has."""
    return {
        "labels_per_image": float(found.population.sum() / max(1, found.images)),
        "clusters_in_use": int((found.population > 0).sum()),
        "inertia": found.kmeans.inertia,
        "kmeans_iterations": found.kmeans.iterations,
        "empty_clusters": found.kmeans.empty,
    }


def refinement_metrics(
    found: Agreement, active_K: np.ndarray, kept_K: np.ndarray, back_K: np.ndarray, population_K: np.ndarray
) -> dict[str, float]:
    """The label-free metrics of a refinement.

    Args:
        found: over all images.
        active_K: bool, landmarks before.
        kept_K: bool, those that go on.
        back_K: bool, those of them that were set back.
        population_K: labels of each now.
    """
    percent = 100 / SCORING_SIZE * found.error[kept_K].sum() / max(1, found.found[kept_K].sum())
    return {
        "labels_per_image": float(population_K.sum() / found.images),
        "clusters_in_use": int(kept_K.sum()),
        "merged": int(active_K.sum() - kept_K.sum()),
        "set_back": int(back_K.sum()),
        "set_back_share": float(back_K.sum() / max(1, kept_K.sum())),
        "equivariance_error": float(percent),
    }


def partners_among(active_K: np.ndarray, partner: list[int] | None) -> list[int] | None:
    """Partners of which both are active, -1 elsewhere: an inactive channel draws nothing that could be trusted."""
    if partner is None:
        return None
    return [j if j >= 0 and active_K[k] and active_K[j] else -1 for k, j in enumerate(partner)]


def merge_shard(
    run: RunDirectory,
    previous: RoundRecord,
    shard: str,
    target: str,
    mapping: np.ndarray,
    population: np.ndarray,
) -> tuple[np.ndarray, int]:
    """Writes a shard's merged labels; returns labels per cluster and the number of images."""
    labels = apply_merge(run.labels(previous, shard), mapping, population)
    labels.save(target)
    return np.bincount(labels.cluster, minlength=len(mapping)), len(labels)


def refined_shard(
    run: RunDirectory, previous: RoundRecord, shard: str, target: str, kept: np.ndarray, back: np.ndarray
) -> np.ndarray:
    """Writes a shard's labels: the answers of the landmarks that are kept, or the labels before of those set back."""
    clusters = len(kept)
    new, old = Labels.load(target), run.labels(previous, shard)
    new, old = new.keep((kept & ~back)[new.cluster]), old.keep(back[old.cluster])
    image = [np.repeat(np.arange(len(each)), np.diff(each.offsets)) for each in (new, old)]
    order = np.argsort(np.concatenate(image), kind="stable")
    joined = Labels(
        new.offsets + old.offsets,
        np.concatenate([new.points, old.points])[order],
        np.concatenate([new.cluster, old.cluster])[order],
        np.concatenate([new.distance, old.distance])[order],
    )
    joined.save(target)
    return np.bincount(joined.cluster, minlength=clusters)


def shard_persistence(
    run: RunDirectory, previous: RoundRecord, shard: str, current: str, thresholds: np.ndarray
) -> tuple[float, int]:
    """Share of a shard's previous labels that are found again, and how many previous labels there were."""
    before = run.labels(previous, shard)
    share = label_persistence(before, Labels.load(current).below(thresholds), SAME_PLACE)
    return (share if len(before.points) else 0.0), max(1, len(before.points))
