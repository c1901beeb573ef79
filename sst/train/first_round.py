"""Stage 0: the first keypoints of every image, without outliers and background, clustered into the first labels.

Every step is a task per shard; what travels between them is row counts, a reference sample, centroids and masks.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pydantic import BaseModel, ConfigDict

from cluster import storage
from cluster.actor import read_sample
from cluster.correspondence import correspond, descriptors_folder, shard_url
from cluster.dispatch import ShardMap
from cluster.kmeans import sample_rows
from cluster.outliers import background_mask, outlier_cut, outlier_scores
from cluster.shards import Descriptors, widened
from sst.config import KeypointSettings, TrainSettings
from sst.data.corpus import Corpus
from sst.data.shards import ShardInfo
from sst.train.extraction import first_keypoints
from sst.train.keypoints import generic_detector
from sst.train.rounds import ROUND_SEED, correspondence_metrics
from sst.train.run_directory import RoundRecord, RunDirectory
from sst.train.schedule import derived_seed
from sst.train.tools import Tools


class KeypointsRecord(BaseModel):
    """What is known of a corpus's first keypoints; it is written when all of them are there.

    Attributes:
        found: keypoints before any were dropped.
        rows: keypoints that stay, by image shard.
        seconds: time by phase.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    found: int
    rows: dict[str, int]
    seconds: dict[str, float]


def keypoints_hash(settings: TrainSettings, corpus: Corpus) -> str:
    """Names all that the first keypoints depend on: runs for which it is equal can share them."""
    given = settings.model_dump_json(include={"seed": True, "keypoints": True, "network": {"input_size"}})
    if settings.keypoints.remove_background:  # which clusters the descriptors
        given += settings.cluster.model_dump_json(exclude={"clusters", "keep_identities"})
    return storage.sha256(f"{corpus.manifest_hash} {given}".encode())[:16]


def make_first_round(
    settings: TrainSettings, corpus: Corpus, run: RunDirectory, tools: Tools, keypoints: str | None = None
) -> RoundRecord:
    """Makes round 0, or finds it done.

    Args:
        settings: of the run.
        corpus: its training images are labelled.
        run: where the round is written.
        tools: for k-means and tasks.
        keypoints: folder of the first keypoints, where several runs share them; by default the run has its own.

    Raises:
        ValueError: if fewer distinct descriptors than clusters are found; the message has both numbers.

    Source: Mallis et al. 2020, section 3.1; the detector is a choice, see `sst.train.keypoints`.
    """
    if run.has_round(0):
        return run.record(0)
    folder = keypoints or descriptors_folder(run.round_url(0))
    first = find_keypoints(settings, corpus, folder, tools)
    seed = derived_seed(settings.seed, ROUND_SEED, 0)
    matched = correspond(
        run.round_url(0),
        folder,
        first.rows,
        lambda sample: tools.fit(sample, settings.cluster.kmeans(seed)),
        tools.run_on_shards,
        sample=settings.cluster.sample,
        seed=seed,
        previous=None,
    )
    record = RoundRecord(
        number=0,
        kind="keypoints",
        step=0,
        weights=None,
        manifest=corpus.manifest_hash,
        seed=seed,
        backend=matched.kmeans.backend,
        thresholds=matched.thresholds.tolist(),
        active=(matched.population > settings.stage2.min_population).tolist(),
        population=matched.population.tolist(),
        metrics=correspondence_metrics(matched) | {"keypoints_per_image": first.found / matched.images},
        seconds=first.seconds | matched.seconds,
    )
    run.finish_round(record, matched.kmeans.centroids)
    tools.log(record.line())
    return record


def find_keypoints(settings: TrainSettings, corpus: Corpus, folder: str, tools: Tools) -> KeypointsRecord:
    """Writes the keypoints of every training image to a folder, without outliers and background; or finds it done.

    Raises:
        ValueError: if there are none at all, or too few on one side for background removal.
    """
    done = storage.join(folder, "record.json")
    if storage.exists(done):
        return KeypointsRecord.model_validate(storage.read_json(done))
    started, shards, run_on_shards = time.monotonic(), corpus.train, tools.run_on_shards
    raw, seed = storage.join(folder, "raw"), derived_seed(settings.seed, ROUND_SEED, 0)
    found = tools.detect_on_shards(
        detect_shard, [(corpus.url, shard, shard_url(raw, shard.file), settings) for shard in shards]
    )
    if sum(found) == 0:
        raise ValueError(f"no keypoint was found on any of the {sum(s.samples for s in shards)} training images")
    detected = time.monotonic()

    keep = inliers(settings.keypoints, shards, raw, found, seed, run_on_shards)
    if settings.keypoints.remove_background:
        background = background_centroids(settings, shards, raw, seed, tools)
        on_object = run_on_shards(background_shard, [(shard_url(raw, shard.file), *background) for shard in shards])
        keep = [each & mask for each, mask in zip(keep, on_object, strict=True)]
    kept = run_on_shards(
        filter_shard,
        [
            (shard_url(raw, shard.file), each, shard_url(folder, shard.file))
            for shard, each in zip(shards, keep, strict=True)
        ],
    )
    record = KeypointsRecord(
        found=sum(found),
        rows=dict(zip((shard.file for shard in shards), kept, strict=True)),
        seconds={"extract": detected - started, "outliers": time.monotonic() - detected},
    )
    storage.write_json(done, record.model_dump())
    storage.remove(raw)
    return record


def inside_url(raw: str) -> str:
    """Where it lies which keypoints of a shard are on the object."""
    return raw.removesuffix(".npz") + "-inside.npz"


def detect_shard(corpus: str, shard: ShardInfo, target: str, settings: TrainSettings) -> int:
    """Writes the first keypoints of a shard; returns how many."""
    keypoints, inside = first_keypoints(
        corpus,
        shard,
        generic_detector(settings.keypoints, settings.network.input_size),
        settings.network.input_size,
        background=settings.keypoints.remove_background,
    )
    keypoints.save(target)
    storage.save_npz(inside_url(target), inside=inside)
    return len(keypoints.points)


def inliers(
    settings: KeypointSettings,
    shards: Sequence[ShardInfo],
    raw: str,
    found: list[int],
    seed: int,
    run_on_shards: ShardMap,
) -> list[np.ndarray]:
    """Which keypoints of each shard are not outliers, bool (N,)."""
    picked = sample_rows(found, settings.outlier_reference, seed)
    sample = read_sample([(shard_url(raw, shard.file), rows) for shard, rows in zip(shards, picked, strict=True)])
    reference = storage.join(raw, "reference.npz")
    storage.save_npz(reference, descriptors=sample.astype(np.float16))
    scores = run_on_shards(
        score_shard, [(shard_url(raw, shard.file), reference, settings.outlier_neighbours) for shard in shards]
    )
    cut = outlier_cut(np.concatenate(scores), settings.outlier_share)
    return [np.asarray(each <= cut) for each in scores]


def score_shard(url: str, reference: str, neighbours: int) -> np.ndarray:
    """Outlier scores of a shard's keypoints, float32 (N,)."""
    sample = widened(storage.load_npz(reference)["descriptors"])
    return outlier_scores(widened(Descriptors.load(url).descriptors), sample, neighbours=neighbours)


def background_centroids(
    settings: TrainSettings, shards: Sequence[ShardInfo], raw: str, seed: int, tools: Tools
) -> tuple[np.ndarray, np.ndarray]:
    """Centroids of the keypoints on the objects and of those beside them.

    Raises:
        ValueError: if there are too few of either; the message has both numbers.
    """
    urls = [shard_url(raw, shard.file) for shard in shards]
    masks = [storage.load_npz(inside_url(url))["inside"] for url in urls]
    centroids = []
    for where, wanted in ((True, settings.keypoints.inside_clusters), (False, settings.keypoints.outside_clusters)):
        rows = [np.flatnonzero(mask == where) for mask in masks]
        drawn = sample_rows([len(each) for each in rows], settings.cluster.sample, seed)
        sample = [(url, each[chosen]) for url, each, chosen in zip(urls, rows, drawn, strict=True)]
        try:
            centroids.append(tools.fit(sample, replace(settings.cluster.kmeans(seed), clusters=wanted)).centroids)
        except ValueError as error:
            side = "inside" if where else "outside"
            raise ValueError(
                f"background removal, keypoints {side} the object boxes: {error}. Pack with a larger "
                f"--context, lower --keypoints.{side}-clusters, or give --keypoints.no-remove-background"
            ) from error
    return centroids[0], centroids[1]


def background_shard(url: str, inside_KD: np.ndarray, outside_KD: np.ndarray) -> np.ndarray:
    """Which keypoints of a shard belong to the object and not to the background, bool (N,)."""
    descriptors = widened(Descriptors.load(url).descriptors)
    return background_mask(descriptors, inside_KD, outside_KD, storage.load_npz(inside_url(url))["inside"])


def filter_shard(url: str, keep_N: np.ndarray, target: str) -> int:
    """Writes the keypoints that stay; returns how many."""
    kept = Descriptors.load(url).keep(keep_N)
    kept.save(target)
    return len(kept.points)
