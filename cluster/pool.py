"""k-means over a sample that is spread over several processes: for corpora past one GPU, or one machine's memory.

Each member holds a part of the rows. On CPUs, Lloyd's algorithm needs of each member only sums and counts per cluster;
on GPUs, cuML does the same over NCCL. The result is that of `cluster.kmeans.fit` on all rows, but for rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch

from cluster.kmeans import (
    SEEDING_ROWS,
    KMeansResult,
    check_rows,
    check_start,
    count_broken,
    distinct_rows,
    means,
    nearest_sums,
    plus_plus,
)

Call = Callable[[str, Sequence[tuple[Any, ...]]], list[Any]]
"""Calls a method of every member, each with arguments of its own, and gives the results in the members' order."""


@dataclass(frozen=True)
class PartFacts:
    """What is known of a member's rows.

    Attributes:
        rows: their number.
        width: D.
        broken: rows that are not finite.
        distinct: distinct rows, no more than were asked for.
        total: float64 (D,): sum of the rows.
        square: float64 (D,): sum of their squares.
    """

    rows: int
    width: int
    broken: int
    distinct: set[bytes]
    total: np.ndarray
    square: np.ndarray


@dataclass(frozen=True)
class PartSums:
    """What a Lloyd step needs of a member's rows; members add up with `+`.

    Attributes:
        sums: float64 (K, D): sum of the rows nearest to each centroid.
        counts: int64 (K,): their number.
        total: squared distance of all rows to their nearest centroid, less the rows' own squares.
    """

    sums: torch.Tensor
    counts: torch.Tensor
    total: float

    def __add__(self, other: "PartSums") -> "PartSums":
        return PartSums(self.sums + other.sums, self.counts + other.counts, self.total + other.total)


class PoolMember:
    """Holds a part of the rows; a plain class that `cluster.actor` makes an actor of."""

    def __init__(self, rows_ND: np.ndarray) -> None:
        """Takes the rows, any float type; computes in float32."""
        self._rows = np.ascontiguousarray(rows_ND, dtype=np.float32)
        self._x = torch.from_numpy(self._rows).to("cuda" if torch.cuda.is_available() else "cpu")

    def facts(self, enough: int) -> PartFacts:
        """What is known of the rows; distinct ones are sought no further than `enough`."""
        rows = self._rows.astype(np.float64)
        return PartFacts(
            len(rows),
            rows.shape[1],
            count_broken(self._rows),
            distinct_rows(self._rows, enough),
            rows.sum(axis=0),
            np.square(rows).sum(axis=0),
        )

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """Some of the rows."""
        taken: np.ndarray = self._rows[numbers]
        return taken

    def sums(self, centroids_KD: np.ndarray) -> PartSums:
        """This member's part of a Lloyd step."""
        sums, counts, total = nearest_sums(self._x, torch.from_numpy(centroids_KD).to(self._x.device))
        return PartSums(sums.cpu(), counts.cpu(), float(total))

    def unique_id(self) -> bytes:
        """Names a new NCCL group, which all members then join."""
        from raft_dask.common.nccl import nccl

        return bytes(nccl.get_unique_id())

    def fit_nccl(
        self, group: bytes, rank: int, world: int, start_KD: np.ndarray, iterations: int, tolerance: float
    ) -> tuple[np.ndarray, int]:
        """Fits together with the other members by cuML over NCCL; every member returns the same (centroids, steps)."""
        import cupy
        from cuml.cluster.kmeans_mg import KMeansMG
        from pylibraft.common.handle import Handle
        from raft_dask.common.comms_utils import inject_comms_on_handle_coll_only
        from raft_dask.common.nccl import nccl

        communicator = nccl()
        communicator.init(world, group, rank)
        handle = Handle(n_streams=0)
        inject_comms_on_handle_coll_only(handle, communicator, world, rank, True)
        model = KMeansMG(
            handle=handle,
            n_clusters=len(start_KD),
            max_iter=iterations,
            tol=tolerance,
            init=cupy.asarray(start_KD, dtype=cupy.float32),
            n_init=1,
            random_state=0,
            output_type="numpy",
        )
        model.fit(cupy.asarray(self._rows))
        return np.ascontiguousarray(model.cluster_centers_, dtype=np.float32), int(model.n_iter_)


def fit_pool(
    call: Call,
    members: int,
    clusters: int,
    *,
    iterations: int = 100,
    tolerance: float = 1e-4,
    seed: int = 0,
    start: np.ndarray | None = None,
    nccl: bool = False,
) -> KMeansResult:
    """As `cluster.kmeans.fit`, over rows that the members hold.

    Args:
        call: reaches the members.
        members: their number.
        clusters: K.
        iterations: most Lloyd steps.
        tolerance: as there.
        seed: of the seeding.
        start: centroids (K, D) to start from.
        nccl: whether cuML fits over NCCL; else sums and counts are added up here.

    Raises:
        ValueError: as there.
    """
    facts: list[PartFacts] = call("facts", [(clusters,)] * members)
    rows = [part.rows for part in facts]
    distinct = set().union(*(part.distinct for part in facts))
    check_rows(sum(rows), sum(part.broken for part in facts), min(len(distinct), clusters), clusters)
    check_start(start, clusters, facts[0].width)
    if start is None:
        rng = np.random.default_rng(seed)
        start = plus_plus(_seeding_rows(call, rows, clusters, rng), clusters, rng)
    mean_D = np.sum([part.total for part in facts], axis=0) / sum(rows)
    variance_D = np.sum([part.square for part in facts], axis=0) / sum(rows) - mean_D**2
    small = tolerance * float(variance_D.mean())

    centroids, steps = np.ascontiguousarray(start, dtype=np.float32), iterations
    if nccl:
        group = call("unique_id", [()] * members)[0]
        told = [(group, rank, members, centroids, iterations, small) for rank in range(members)]
        centroids, steps = call("fit_nccl", told)[0]
    else:
        for step in range(1, iterations + 1):
            previous, centroids = centroids, _step(call, members, centroids)
            if float(np.square(centroids - previous, dtype=np.float32).sum()) <= small:
                steps = step
                break
    last: PartSums = reduce(PartSums.__add__, call("sums", [(centroids,)] * members))
    return KMeansResult(
        centroids=centroids,
        inertia=max(0.0, last.total + float(np.sum([part.square for part in facts]))) / sum(rows),
        counts=last.counts.numpy(),
        iterations=steps,
        backend="cuml" if nccl else "torch",
        empty=int((last.counts == 0).sum()),
    )


def _step(call: Call, members: int, centroids_KD: np.ndarray) -> np.ndarray:
    found: PartSums = reduce(PartSums.__add__, call("sums", [(centroids_KD,)] * members))
    return means(found.sums, found.counts, torch.from_numpy(centroids_KD)).numpy()


def _seeding_rows(call: Call, rows: list[int], clusters: int, rng: np.random.Generator) -> np.ndarray:
    """The rows that k-means++ looks at, as `cluster.kmeans.seeding_rows` draws them; all where those are too alike."""
    numbers = np.arange(sum(rows))
    if len(numbers) > SEEDING_ROWS:
        numbers = np.sort(rng.choice(len(numbers), SEEDING_ROWS, replace=False, shuffle=False))
    ends = np.cumsum(rows)
    drawn = [(own - (end - count),) for own, end, count in zip(_split(numbers, ends), ends, rows, strict=True)]
    taken = np.concatenate(call("take", drawn))
    if len(taken) < sum(rows) and len(distinct_rows(taken, clusters)) < clusters:
        taken = np.concatenate(call("take", [(np.arange(count),) for count in rows]))
    return taken


def _split(numbers: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Sorted row numbers by the member that has them."""
    return np.split(numbers, np.searchsorted(numbers, ends)[:-1])
