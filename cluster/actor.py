"""Where correspondence meets Ray: an actor that fits k-means, and the task that assigns one shard.

Both are thin shells over `cluster.kmeans` and `cluster.assignment`. Descriptors never pass through Ray: each
process reads the shards that it needs.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from cluster.assignment import NearestStatistics, assign_shard
from cluster.kmeans import KMeansResult, KMeansSettings, fit
from cluster.matching import shared_labels
from cluster.pool import PoolMember, fit_pool
from cluster.rapids import Backend, CumlError, choose_backend, give_up, given_up
from cluster.shards import Descriptors, Labels, widened

POOL_ATTEMPTS = 4
"""How often a fit over several actors is begun, if one of them is lost each time."""

NOTHING = (
    "no descriptor in any shard: no keypoints were found, so nothing can be clustered; the images may be blank, or the "
    "detector was trained too little (more --stage1.warmup-iterations, a lower --stage1.threshold)"
)


class KMeansActor:
    """Fits centroids on rows that it reads from the descriptor shards itself.

    It keeps no state, so a restarted actor gives the same answer. With several members it spreads the rows over
    further actors, each with a GPU of its own where there are any.
    """

    def __init__(self, members: int = 1, member_gpus: float = 0) -> None:
        """Takes the number of actors that share a sample, and the GPUs of each."""
        self._members, self._member_gpus = members, member_gpus

    def backend(self, requested: Backend = "auto") -> str:
        """What would compute: "cuml" or "torch", to be shown before the first fit."""
        if self._members == 1:
            return choose_backend(requested)
        if requested == "auto" and given_up():
            return "torch"
        import ray

        # This actor has no GPU then: a member must tell.
        task: Any = ray.remote(_choose_for_pool)
        chosen, reason = ray.get(task.options(num_gpus=self._member_gpus, num_cpus=0).remote(requested))
        if reason:
            give_up(reason)
        return str(chosen)

    def given_up(self) -> str | None:
        """For what reason torch computes beside a GPU that is there; None where it does not.

        The actor's own log is seen by nobody, so whoever started it asks.
        """
        return given_up()

    def fit(self, sample: Sequence[tuple[str, np.ndarray]], settings: KMeansSettings) -> KMeansResult:
        """Reads the sample, given as (descriptor shard, row indices) pairs, and clusters it.

        Args:
            sample: rows from `cluster.kmeans.sample_rows`.
            settings: of the fit.

        Raises:
            ValueError: if the sample is empty or `cluster.kmeans.fit` refuses it.
        """
        return self._fit_pool(sample, settings) if self._members > 1 else fit(read_sample(sample), settings)

    def _fit_pool(self, sample: Sequence[tuple[str, np.ndarray]], settings: KMeansSettings) -> KMeansResult:
        """Fits over actors that live as long as the fit; where one is lost or cuML fails, the fit begins again."""
        import ray

        actor: Any = ray.remote(SampleMember)
        again: tuple[type[Exception], ...] = (ray.exceptions.RayActorError,)
        if settings.backend == "auto":
            again += (CumlError,)
        for attempt in Retrying(
            retry=retry_if_exception_type(again), stop=stop_after_attempt(POOL_ATTEMPTS), reraise=True
        ):
            with attempt, ExitStack() as stack:
                nccl = self.backend(settings.backend) == "cuml"
                members = []
                for part in even_parts(sample, self._members):
                    members.append(actor.options(num_gpus=self._member_gpus, num_cpus=0).remote(part))
                    stack.callback(ray.kill, members[-1])
                try:
                    return fit_pool(partial(_call_all, members), len(members), settings, nccl=nccl)
                except CumlError as error:
                    if settings.backend == "auto":
                        give_up(str(error))  # the next attempt takes torch
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")


def _choose_for_pool(requested: Backend) -> tuple[str, str | None]:
    return choose_backend(requested, several=True), given_up()


def _call_all(members: Sequence[Any], method: str, given: Sequence[tuple[Any, ...]]) -> list[Any]:
    import ray

    results: list[Any] = ray.get([getattr(one, method).remote(*each) for one, each in zip(members, given, strict=True)])
    return results


class SampleMember(PoolMember):
    """A member of the pool that reads its part of the sample itself."""

    def __init__(self, sample: Sequence[tuple[str, np.ndarray]]) -> None:
        """Reads the rows, given as (descriptor shard, row indices) pairs."""
        super().__init__(read_sample(sample))


def even_parts(sample: Sequence[tuple[str, np.ndarray]], parts: int) -> list[list[tuple[str, np.ndarray]]]:
    """Splits a sample into parts of as many rows each, in its order; fewer parts where there are fewer rows.

    Raises:
        ValueError: if there is no row at all.
    """
    counts = [len(rows) for _, rows in sample]
    total, ends = sum(counts), np.cumsum([0, *counts])
    parts = min(parts, total)
    if not parts:
        raise ValueError(NOTHING)
    split: list[list[tuple[str, np.ndarray]]] = []
    for part in range(parts):
        first, last = total * part // parts, total * (part + 1) // parts
        each = [
            (url, rows[max(0, first - begin) : last - begin])
            for (url, rows), begin, count in zip(sample, ends, counts, strict=False)
            if begin < last and begin + count > first
        ]
        split.append(each)
    return split


def read_sample(sample: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """The sampled descriptors, float32 (N, D), holding one shard at a time.

    Raises:
        ValueError: if there is no row at all, or a shard is damaged.
    """
    sampled = [(url, rows) for url, rows in sample if len(rows)]
    if not sampled:
        raise ValueError(NOTHING)
    result, first = np.empty((0, 0), np.float32), 0
    for url, rows in sampled:
        part = widened(Descriptors.load(url).descriptors[rows])
        if not len(result):
            result = np.empty((sum(len(each) for _, each in sampled), part.shape[1]), np.float32)
        result[first : first + len(rows)] = part
        first += len(rows)
    return result


def assign_shard_task(descriptors_url: str, labels_url: str, centroids_KD: np.ndarray) -> NearestStatistics:
    """Assigns one descriptor shard and writes its label shard; run again, it writes the same file."""
    labels, statistics = assign_shard(Descriptors.load(descriptors_url), centroids_KD)
    labels.save(labels_url)
    return statistics


def shared_labels_task(
    descriptors_url: str, labels_url: str, threshold_K: np.ndarray, centroids_KD: np.ndarray, radius: float
) -> np.ndarray:
    """What one shard's new clusters share with its previous labels; see `cluster.matching.shared_labels`."""
    previous = Labels.load(labels_url).below(threshold_K)
    return shared_labels(previous, Descriptors.load(descriptors_url), centroids_KD, radius)


def start_actor(*, num_gpus: float = 0, num_cpus: float = 1, members: int = 1) -> Any:
    """Starts the k-means actor on the running Ray cluster; with several members, each of them has the GPUs.

    A killed actor is restarted and its fit repeated. It ends with the process that started it.

    Returns:
        The handle, which may be sent to other processes: `ray.get(handle.fit.remote(sample, settings))`.
    """
    import ray

    actor = ray.remote(KMeansActor)
    each = num_gpus if members == 1 else 0
    options = actor.options(num_gpus=each, num_cpus=num_cpus, max_restarts=3, max_task_retries=3)
    return options.remote(members, num_gpus)
