"""Stage 0: the first keypoints of every image, without outliers, clustered into the first labels.

Every step is a task per shard; what travels between them is row counts, a reference sample and one threshold.
"""

import time

import numpy as np

from cluster import storage
from cluster.actor import read_sample
from cluster.correspondence import correspond, descriptors_url
from cluster.kmeans import sample_rows
from cluster.outliers import outlier_cut, outlier_scores
from cluster.shards import Descriptors
from sst.config import TrainSettings
from sst.extraction import first_descriptors
from sst.keypoints import RootSift
from sst.round_making import ROUND_SEED, Corpus, Tools, correspondence_figures
from sst.rounds import RoundRecord, RunDirectory
from sst.schedule import derived_seed
from sst.shards import ShardInfo


def make_first_round(settings: TrainSettings, corpus: Corpus, run: RunDirectory, tools: Tools) -> RoundRecord:
    """Makes round 0, or finds it done.

    Raises:
        ValueError: if fewer distinct descriptors than clusters are found; the message has both numbers.

    Source: Mallis et al. 2020, section 3.1; the detector is a choice, see `sst.keypoints`.
    """
    if run.has_round(0):
        return run.record(0)
    started, shards, run_on_shards = time.monotonic(), corpus.train, tools.run_on_shards
    raw = storage.join(run.round_url(0), "keypoints")
    found = run_on_shards(detect_shard, [(corpus.url, shard, raw_url(raw, shard), settings) for shard in shards])
    detected = time.monotonic()

    keypoints = settings.keypoints
    seed = derived_seed(settings.seed, ROUND_SEED, 0)
    if sum(found) == 0:
        raise ValueError(f"no keypoint was found on any of the {sum(s.samples for s in shards)} training images")
    picked = sample_rows(found, keypoints.outlier_reference, seed)
    sample = read_sample([(raw_url(raw, shard), rows) for shard, rows in zip(shards, picked, strict=True)])
    reference = storage.join(raw, "reference.npz")
    storage.save_npz(reference, descriptors=sample.astype(np.float16))
    scores = run_on_shards(
        score_shard, [(raw_url(raw, shard), reference, keypoints.outlier_neighbours) for shard in shards]
    )
    cut = outlier_cut(np.concatenate(scores), keypoints.outlier_share)
    kept = run_on_shards(
        filter_shard,
        [
            (raw_url(raw, shard), own <= cut, descriptors_url(run.round_url(0), shard.file))
            for shard, own in zip(shards, scores, strict=True)
        ],
    )
    filtered = time.monotonic()

    matched = correspond(
        run.round_url(0),
        dict(zip((shard.file for shard in shards), kept, strict=True)),
        lambda sample, start: tools.fit(sample, start, seed),
        run_on_shards,
        sample=settings.cluster.sample,
        seed=seed,
        start=None,
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
        figures=correspondence_figures(matched) | {"keypoints_per_image": sum(found) / matched.images},
        seconds={
            "extract": detected - started,
            "outliers": filtered - detected,
            "correspond": time.monotonic() - filtered,
        },
    )
    run.finish_round(record, matched.kmeans.centroids)
    tools.log(record.line())
    storage.remove(raw)
    return record


def raw_url(directory: str, shard: ShardInfo) -> str:
    """Where a shard's keypoints lie until outliers are removed."""
    return storage.join(directory, shard.file.removesuffix(".tar") + ".npz")


def detect_shard(corpus: str, shard: ShardInfo, target: str, settings: TrainSettings) -> int:
    """Writes the first keypoints of a shard; returns how many."""
    detector = RootSift(settings.keypoints.patch, settings.keypoints.most)
    descriptors = first_descriptors(corpus, shard, detector, settings.network.input_size)
    descriptors.save(target)
    return len(descriptors.points)


def score_shard(url: str, reference: str, neighbours: int) -> np.ndarray:
    """Outlier scores of a shard's keypoints, float32 (N,)."""
    sample = storage.load_npz(reference)["descriptors"].astype(np.float32)
    return outlier_scores(Descriptors.load(url).descriptors.astype(np.float32), sample, neighbours=neighbours)


def filter_shard(url: str, keep_N: np.ndarray, target: str) -> int:
    """Writes the keypoints that stay; returns how many."""
    kept = Descriptors.load(url).keep(keep_N)
    kept.save(target)
    return len(kept.points)
