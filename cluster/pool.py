"""k-means over a sample that is spread over several processes: for corpora past one GPU, or one machine's memory.

Each member holds a part of the rows. On CPUs, Lloyd's algorithm needs of each member only sums and counts per cluster;
on GPUs, cuML does the same over NCCL. The result is that of `cluster.kmeans.fit` on all rows, but for rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch

from cluster import rapids
from cluster.kmeans import KMeansResult, KMeansSettings, check_rows, column_variance, count_broken, solve
from cluster.lloyd import Rows, Sums, moments
from cluster.seeding import distinct_rows, find_start, seeding_rows

Call = Callable[[str, Sequence[tuple[Any, ...]]], list[Any]]
"""Calls a method of every member, each with arguments of its own, and gives the results in the members' order."""


@dataclass(frozen=True)
class PartFacts:
    """What is known of a member's rows.

    Attributes:
        rows: their number.
        broken: rows that are not finite.
        distinct: distinct rows, no more than were asked for.
        total: float64 (D,): sum of the rows.
        square: sum of all their squares.
    """

    rows: int
    broken: int
    distinct: set[bytes]
    total: np.ndarray
    square: float


class PoolMember:
    """Holds a part of the rows; a plain class that `cluster.actor` makes an actor of."""

    def __init__(self, rows_ND: np.ndarray) -> None:
        """Takes the rows, any float type; computes in float32."""
        self._rows_ND = np.ascontiguousarray(rows_ND, dtype=np.float32)
        self._x = torch.from_numpy(self._rows_ND).to("cuda" if torch.cuda.is_available() else "cpu")
        self._rows: Rows | None = None

    def facts(self, enough: int) -> PartFacts:
        """What is known of the rows; distinct ones are sought no further than `enough`."""
        total_D, square = moments(self._x)
        broken = 0 if np.isfinite(square) else count_broken(self._rows_ND)
        return PartFacts(len(self._x), broken, distinct_rows(self._rows_ND, enough), total_D, square)

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """Some of the rows."""
        taken: np.ndarray = self._rows_ND[numbers]
        return taken

    def sums(self, centroids_KD: np.ndarray, origin_D: np.ndarray) -> Sums:
        """This member's part of a Lloyd step, about the mean of all members' rows."""
        if self._rows is None:
            self._rows = Rows(self._x, torch.from_numpy(origin_D))
        return self._rows.sums(torch.from_numpy(centroids_KD).to(self._x.device)).cpu()

    def group_id(self) -> bytes:
        """Names a new NCCL group, which all members then join."""
        return rapids.group_id()

    def fit_together(self, *given: Any) -> tuple[np.ndarray, int]:
        """Fits together with the other members; see `cluster.rapids.fit_together`."""
        return rapids.fit_together(self._x, *given)


def fit_pool(call: Call, members: int, settings: KMeansSettings, *, nccl: bool = False) -> KMeansResult:
    """As `cluster.kmeans.fit`, over rows that the members hold.

    Args:
        call: reaches the members.
        members: their number.
        settings: of the fit.
        nccl: whether cuML fits over NCCL; else sums and counts are added up here.

    Raises:
        ValueError: as there.
        CumlError: if cuML fails in a member; others may wait for it then, so that none of them can be asked again.
    """
    clusters = settings.clusters
    facts: list[PartFacts] = call("facts", [(clusters,)] * members)
    rows = sum(part.rows for part in facts)
    distinct = set().union(*(part.distinct for part in facts))
    check_rows(rows, sum(part.broken for part in facts), min(len(distinct), clusters), clusters)
    rng = np.random.default_rng(settings.seed)
    ends = np.cumsum([part.rows for part in facts])

    def take(numbers: np.ndarray) -> np.ndarray:
        return np.concatenate(call("take", [(each,) for each in _split(numbers, ends)]))

    def sums_at(centroids_KD: torch.Tensor) -> Sums:
        parts: list[Sums] = call("sums", [(centroids_KD.numpy(), origin_D)] * members)
        return reduce(add, parts)

    def by_cuml(*given: Any) -> tuple[np.ndarray, int]:
        group = call("group_id", [()] * members)[0]
        fitted: tuple[np.ndarray, int] = call(
            "fit_together", [(*given, group, rank, members) for rank in range(members)]
        )[0]
        return fitted

    start_KD = find_start(seeding_rows(rows, take, clusters, rng), clusters, rng)
    total_D = np.sum([part.total for part in facts], axis=0)
    origin_D = total_D / rows
    variance = column_variance(rows, total_D, sum(part.square for part in facts))
    return solve(sums_at, start_KD, origin_D, variance, settings, rng, by_cuml=by_cuml if nccl else None)


def _split(numbers: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Sorted row numbers by the member that has them, as that member counts."""
    parts = np.split(numbers, np.searchsorted(numbers, ends)[:-1])
    return [part - first for part, first in zip(parts, (0, *ends[:-1]), strict=True)]
