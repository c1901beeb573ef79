"""Where k-means starts: k-means++ with several candidates per step, then a local search that swaps centroids.

The start decides how good the end is: a group that no centroid starts in is not found by Lloyd's algorithm. Nothing
here makes the host wait for a GPU.

Shape letters: N rows, K clusters, D descriptor size, T candidates.
"""

from collections.abc import Callable

import numpy as np
import torch

SEEDING_ROWS = 50_000  # seeding looks at no more rows than this

SEARCH_ENTRIES = 2**28
"""Distances (K x N) up to which centroids are swapped: 1 GB; past it, with thousands of clusters, k-means++ is all."""

ROUNDING = 4e-6
"""Squared distances below this share of the two squares are rounding: copies of a chosen row are at distance 0."""


def seeding_rows(
    rows: int, take: Callable[[np.ndarray], np.ndarray], clusters: int, rng: np.random.Generator
) -> np.ndarray:
    """The rows that seeding looks at.

    Args:
        rows: how many there are.
        take: gives those of the given sorted numbers.
        clusters: K, of which the drawn rows must have as many distinct ones; else all rows are taken.
        rng: draws.
    """
    if rows > SEEDING_ROWS:
        drawn = take(np.sort(rng.choice(rows, SEEDING_ROWS, replace=False, shuffle=False)))
        if len(distinct_rows(drawn, clusters)) == clusters:
            return drawn
    return take(np.arange(rows))


def distinct_rows(x_ND: np.ndarray, enough: int) -> set[bytes]:
    """Distinct rows, sought no further than `enough`, so that real data is hardly looked at."""
    seen: set[bytes] = set()
    for row_D in x_ND:
        seen.add((row_D + 0).tobytes())  # + 0 makes -0.0 equal 0.0
        if len(seen) >= enough:
            break
    return seen


def find_start(x_ND: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Rows to start from, float32 (K, D).

    Sources: Arthur and Vassilvitskii 2007; several candidates: the same, section 5; swaps: Lattanzi and Sohler 2019,
    here with several candidates too.
    """
    x = torch.from_numpy(x_ND).to("cuda" if torch.cuda.is_available() else "cpu")
    x = x - x.mean(dim=0)  # distances stay, and rounding is far smaller where rows have much in common
    square_N = x.square().sum(dim=1)
    candidates = 2 + int(np.log(clusters))  # as scikit-learn takes
    chosen_K = plus_plus(x, square_N, clusters, candidates, rng)
    if clusters > 1 and clusters * len(x) <= SEARCH_ENTRIES:
        chosen_K = swap(x, square_N, chosen_K, candidates, rng)
    start_KD: np.ndarray = x_ND[chosen_K.cpu().numpy()]
    return start_KD


def plus_plus(
    x_ND: torch.Tensor, square_N: torch.Tensor, clusters: int, candidates: int, rng: np.random.Generator
) -> torch.Tensor:
    """k-means++, int64 (K,) row numbers: of candidates drawn by squared distance the one that helps most stays."""
    marks_KT = torch.from_numpy(rng.random((clusters, candidates))).to(x_ND.device)
    chosen_K = torch.full((clusters,), int(rng.integers(len(x_ND))), device=x_ND.device)
    nearest_N = _squared(x_ND, square_N, chosen_K[:1])[0]
    for step in range(1, clusters):
        drawn_T = _draw(nearest_N, marks_KT[step])
        nearest_TN = torch.minimum(nearest_N, _squared(x_ND, square_N, drawn_T))
        best = nearest_TN.sum(dim=1, dtype=torch.float64).argmin(keepdim=True)
        chosen_K[step : step + 1] = drawn_T.index_select(0, best)
        nearest_N = nearest_TN.index_select(0, best)[0]
    return chosen_K


def swap(
    x_ND: torch.Tensor, square_N: torch.Tensor, chosen_K: torch.Tensor, candidates: int, rng: np.random.Generator
) -> torch.Tensor:
    """Gives up one chosen row for a drawn one wherever that lowers the summed squared distance; K / 2 attempts.

    With so many, inertia is below that of the best of ten starts by k-means++ alone; see `benchmarks.kmeans --quality`.
    """
    clusters = len(chosen_K)
    marks = torch.from_numpy(rng.random((max(1, clusters // 2), candidates))).to(x_ND.device)
    chosen_K, distance_KN = chosen_K.clone(), _squared(x_ND, square_N, chosen_K)
    for marks_T in marks:
        first_N = distance_KN.amin(dim=0)  # arg min and top k are five and fifty times as slow on a CPU
        nearest_KN = distance_KN == first_N  # of equally near ones each, which overrates what giving one up costs
        second_N = distance_KN.masked_fill(nearest_KN, torch.inf).amin(dim=0)
        drawn_T = _draw(first_N, marks_T)
        drawn_TN = _squared(x_ND, square_N, drawn_T)
        kept_TN = torch.minimum(first_N, drawn_TN)  # to the nearest if none is given up
        lost_TN = torch.minimum(second_N, drawn_TN) - kept_TN  # and what is added if its nearest is
        lost_KT = nearest_KN.to(lost_TN.dtype) @ lost_TN.T
        total_KT = lost_KT.double() + kept_TN.sum(dim=1, dtype=torch.float64)
        best = total_KT.flatten().argmin(keepdim=True)
        out, into = best // candidates, best % candidates
        better = total_KT.flatten().index_select(0, best) < first_N.sum(dtype=torch.float64)
        row = torch.where(better, drawn_T.index_select(0, into), chosen_K.index_select(0, out))
        distance = torch.where(better[:, None], drawn_TN.index_select(0, into), distance_KN.index_select(0, out))
        chosen_K.index_copy_(0, out, row)
        distance_KN.index_copy_(0, out, distance)
    return chosen_K


def _squared(x_ND: torch.Tensor, square_N: torch.Tensor, rows_T: torch.Tensor) -> torch.Tensor:
    """Squared L2 distances of all rows to the given ones, (T, N)."""
    squares_TN = square_N.index_select(0, rows_T)[:, None] + square_N
    distance_TN = squares_TN - 2 * (x_ND.index_select(0, rows_T) @ x_ND.T)
    return torch.where(distance_TN > ROUNDING * squares_TN, distance_TN, 0)


def _draw(weight_N: torch.Tensor, marks_T: torch.Tensor) -> torch.Tensor:
    """Row numbers (T,) in proportion to the weights; marks are uniform in [0, 1)."""
    cumulative_N = weight_N.cumsum(0, dtype=torch.float64)
    drawn_T = torch.searchsorted(cumulative_N, cumulative_N[-1:] * marks_T, right=True)
    return drawn_T.clamp_(max=len(weight_N) - 1)
