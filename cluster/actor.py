"""Where correspondence meets Ray: an actor that fits k-means, and the task that assigns one shard.

Both are thin shells over `cluster.kmeans` and `cluster.assignment`. Descriptors never pass through Ray: each
process reads the shards that it needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.assignment import NearestStatistics, assign_shard
from cluster.kmeans import Backend, KMeansResult, choose_backend, fit
from cluster.shards import Descriptors


@dataclass(frozen=True)
class KMeansSettings:
    """What a fit is told, besides its sample; see `cluster.kmeans.fit`."""

    clusters: int
    iterations: int = 100
    tolerance: float = 1e-4
    seed: int = 0
    backend: Backend = "auto"


class KMeansActor:
    """Fits centroids on rows that it reads from the descriptor shards itself.

    It keeps no state, so a restarted actor gives the same answer.
    """

    def backend(self, requested: Backend = "auto") -> str:
        """What would compute here: "cuml" or "torch", to be shown before the first fit."""
        return choose_backend(requested)

    def fit(
        self,
        sample: Sequence[tuple[str, np.ndarray]],
        settings: KMeansSettings,
        start: np.ndarray | None = None,
    ) -> KMeansResult:
        """Reads the sample, given as (descriptor shard, row indices) pairs, and clusters it.

        Args:
            sample: rows from `cluster.kmeans.sample_rows`.
            settings: of the fit.
            start: centroids (K, D) to start from.

        Raises:
            ValueError: if the sample is empty or `cluster.kmeans.fit` refuses it.
        """
        return fit(
            read_sample(sample),
            settings.clusters,
            iterations=settings.iterations,
            tolerance=settings.tolerance,
            seed=settings.seed,
            start=start,
            backend=settings.backend,
        )


def read_sample(sample: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """The sampled descriptors, float32 (N, D), holding one shard at a time.

    Raises:
        ValueError: if there is no row at all, or a shard is damaged.
    """
    parts = [Descriptors.load(url).descriptors[rows] for url, rows in sample if len(rows)]
    if not parts:
        raise ValueError("no descriptor in any shard: no keypoints were found, so nothing can be clustered")
    return np.concatenate(parts, dtype=np.float32)


def assign_shard_task(descriptors_url: str, labels_url: str, centroids_KD: np.ndarray) -> NearestStatistics:
    """Assigns one descriptor shard and writes its label shard; run again, it writes the same file."""
    labels, statistics = assign_shard(Descriptors.load(descriptors_url), centroids_KD)
    labels.save(labels_url)
    return statistics


def start_actor(*, num_gpus: float = 0, num_cpus: float = 1) -> Any:
    """Starts the k-means actor on the running Ray cluster.

    A killed actor is restarted and its fit repeated. It ends with the process that started it.

    Returns:
        The handle, which may be sent to other processes: `ray.get(handle.fit.remote(sample, settings, start))`.
    """
    import ray

    actor = ray.remote(KMeansActor)
    return actor.options(num_gpus=num_gpus, num_cpus=num_cpus, max_restarts=3, max_task_retries=3).remote()
