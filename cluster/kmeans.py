"""k-means over a sample of descriptors: cuML on a GPU, torch everywhere, one interface and one start for both.

Shape letters: N rows, K clusters, D descriptor size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from cluster import rapids
from cluster.lloyd import Rows, Sums, lloyd, moments
from cluster.rapids import Backend
from cluster.seeding import distinct_rows, find_start, seeding_rows

CumlFit = Callable[[np.ndarray, np.ndarray, float, int, float], tuple[np.ndarray, int]]
"""From start, origin, scale, iterations and tolerance to centroids and steps taken; see `cluster.rapids.fit_alone`."""


@dataclass(frozen=True)
class KMeansSettings:
    """What a fit needs to know, besides its rows.

    Attributes:
        clusters: K.
        iterations: most Lloyd steps.
        tolerance: Lloyd's algorithm stops when the summed squared shift of the centroids is at most this share of the
            mean variance of a column.
        seed: of the seeding, any integer from 0 on.
        backend: see `cluster.rapids.choose_backend`.
    """

    clusters: int
    iterations: int = 100
    tolerance: float = 1e-4
    seed: int = 0
    backend: Backend = "auto"


@dataclass(frozen=True)
class KMeansResult:
    """A fitted clustering.

    Attributes:
        centroids: float32 (K, D).
        inertia: mean squared L2 distance of a row to its nearest centroid.
        counts: int64 (K,): rows nearest to each centroid.
        iterations: Lloyd steps taken.
        backend: "torch" or "cuml".
        empty: clusters without a row; 0 unless rows differ by less than float32 resolves.
    """

    centroids: np.ndarray
    inertia: float
    counts: np.ndarray
    iterations: int
    backend: str
    empty: int

    def renumbered(self, number_K: np.ndarray) -> "KMeansResult":
        """The same clusters under other numbers: `number_K[c]`, a permutation, is what cluster c is called then."""
        order = np.argsort(number_K)
        return replace(self, centroids=self.centroids[order], counts=self.counts[order])


def fit(x_ND: np.ndarray, settings: KMeansSettings) -> KMeansResult:
    """Clusters rows by Lloyd's algorithm, from a start of its own; no cluster is left empty.

    On the CPU the result is a function of the arguments and the number of threads.

    Args:
        x_ND: rows, any float type; computed in float32.
        settings: of the fit.

    Raises:
        ValueError: if there are fewer distinct rows than clusters, a row is not finite, or shapes disagree.
        RuntimeError: if cuML is asked for where it cannot run, or fails; with "auto" torch takes over, after a warning.

    Source: Mallis et al. 2020, section 3.2; the start: `cluster.seeding.find_start`.
    """
    x_ND = np.ascontiguousarray(x_ND, dtype=np.float32)
    if x_ND.ndim != 2:
        raise ValueError(f"k-means needs rows (N, D), not an array of shape {x_ND.shape}")
    if settings.clusters < 1:
        raise ValueError(f"k-means needs at least 1 cluster, not {settings.clusters}")
    x = torch.from_numpy(x_ND).to("cuda" if torch.cuda.is_available() else "cpu")
    total_D, square = moments(x)
    broken = 0 if np.isfinite(square) else count_broken(x_ND)
    check_rows(len(x_ND), broken, len(distinct_rows(x_ND, settings.clusters)), settings.clusters)
    chosen = rapids.choose_backend(settings.backend)
    rng = np.random.default_rng(settings.seed)
    start_KD = find_start(seeding_rows(len(x_ND), x_ND.__getitem__, settings.clusters, rng), settings.clusters, rng)
    origin_D = total_D / len(x_ND)
    rows = Rows(x, torch.from_numpy(origin_D))

    variance = column_variance(len(x_ND), total_D, square)
    solved = partial(solve, rows.sums, start_KD, origin_D, variance, settings, rng, device=x.device)
    if chosen == "cuml":
        try:
            return solved(by_cuml=partial(rapids.fit_alone, x))
        except rapids.CumlError as error:
            if settings.backend == "cuml":
                raise
            rapids.give_up(str(error))
    return solved()


def solve(
    sums_at: Callable[[torch.Tensor], Sums],
    start_KD: np.ndarray,
    origin_D: np.ndarray,
    variance: float,
    settings: KMeansSettings,
    rng: np.random.Generator,
    *,
    by_cuml: CumlFit | None = None,
    device: torch.device | str = "cpu",
) -> KMeansResult:
    """Lloyd's algorithm from a start, by cuML where it is given; what cuML leaves empty is refilled from sums.

    Args:
        sums_at: the rows' sums for given centroids.
        start_KD: centroids to start from.
        origin_D: the rows' mean.
        variance: mean variance of a column; cuML is spared rows without any.
        settings: of the fit.
        rng: of the fit.
        by_cuml: runs cuML on the same rows.
        device: where the sums are.

    Raises:
        CumlError: what `by_cuml` raises.
    """
    backend, taken = "torch", 0
    start_KD = np.ascontiguousarray(start_KD, dtype=np.float32)
    if by_cuml and variance > 0:
        given = origin_D, float(np.sqrt(variance)), settings.iterations, settings.tolerance
        start_KD, taken = by_cuml(start_KD, *given)
        backend = "cuml"
    centroids, found, more = lloyd(
        sums_at,
        torch.from_numpy(start_KD).to(device),
        iterations=settings.iterations - taken,
        small=settings.tolerance * variance,
        rng=rng,
        settled=backend == "cuml",
    )
    counts = found.counts.cpu().numpy()
    return KMeansResult(
        centroids=centroids.cpu().numpy(),
        inertia=float(found.errors.sum()) / int(counts.sum()),
        counts=counts,
        iterations=taken + more,
        backend=backend,
        empty=int((counts == 0).sum()),
    )


def sample_rows(rows_per_shard: Sequence[int], size: int, seed: int, max_shards: int | None = None) -> list[np.ndarray]:
    """Draws rows uniformly without replacement over all shards, needing the memory of one shard.

    Args:
        rows_per_shard: rows that each shard has.
        size: rows to draw; all rows where there are no more.
        seed: of the draw.
        max_shards: rows come from at most so many shards, drawn first, so that not all need be read; None: from all.

    Returns:
        For each shard its sorted row indices, int64.

    Raises:
        ValueError: if the size is negative.
    """
    if size < 0:
        raise ValueError(f"a sample of {size} rows cannot be drawn")
    if max_shards is not None and len(rows_per_shard) > max_shards:
        read = set(np.random.default_rng([seed, 1]).choice(len(rows_per_shard), max_shards, replace=False).tolist())
        rows_per_shard = [rows if number in read else 0 for number, rows in enumerate(rows_per_shard)]
    if size >= sum(rows_per_shard):
        return [np.arange(rows, dtype=np.int64) for rows in rows_per_shard]
    rng = np.random.default_rng(seed)
    shares = rng.multivariate_hypergeometric(list(rows_per_shard), size)
    return [
        np.sort(rng.choice(rows, share, replace=False, shuffle=False)).astype(np.int64)
        for rows, share in zip(rows_per_shard, shares, strict=True)
    ]


def column_variance(rows: int, total_D: np.ndarray, square: float) -> float:
    """Mean variance of a column, from `cluster.lloyd.moments` of all rows; 0 where it is float64's rounding."""
    spread = square / rows - float(np.square(total_D / rows).sum())
    return spread / len(total_D) if spread > 1e-12 * square / rows else 0.0


def check_rows(rows: int, broken: int, distinct: int, clusters: int) -> None:
    """Refuses what can't be clustered.

    Args:
        rows: number of rows.
        broken: rows that are not finite.
        distinct: distinct rows, counted to `clusters` at most.
        clusters: K.

    Raises:
        ValueError: naming the numbers.
    """
    if broken:
        raise ValueError(f"{broken} of {rows} descriptors are not finite; drop them before k-means")
    if distinct < clusters:
        raise ValueError(
            f"{clusters} clusters need at least as many distinct descriptors, and there are only {distinct} "
            f"({rows} in all); take fewer clusters or find more keypoints"
        )


def count_broken(x_ND: np.ndarray) -> int:
    """Rows that are not finite."""
    return len(x_ND) - int(np.isfinite(x_ND).all(axis=1).sum())
