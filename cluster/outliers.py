"""Keypoints that no other image repeats, and keypoints on a constant background, are left out.

Shape letters: N points, M reference points, D descriptor size.
"""

from collections.abc import Callable

import numpy as np

from cluster.assignment import squared_distances


def outlier_scores(
    desc_ND: np.ndarray, reference_MD: np.ndarray, *, neighbours: int = 100, chunk: int = 4_000_000
) -> np.ndarray:
    """How lonely each point is: the median squared L2 distance to its nearest reference descriptors.

    Args:
        desc_ND: descriptors to score. A point that is in the reference too is its own neighbour, at
            distance 0.
        reference_MD: descriptors of a sample of the corpus.
        neighbours: how many nearest ones count; all where the reference holds fewer.
        chunk: most distances held at once.

    Returns:
        float32 (N,).

    Raises:
        ValueError: if the reference is empty or the two widths differ.

    Source: Mallis et al. 2020, filtering of the generic keypoints.
    """
    if len(reference_MD) == 0:
        raise ValueError("outlier scores need at least one reference descriptor")
    reference_MD = np.asarray(reference_MD, np.float32)
    count = min(neighbours, len(reference_MD))

    def score(rows_nD: np.ndarray) -> np.ndarray:
        distance_nM = squared_distances(rows_nD, reference_MD)
        nearest = np.partition(distance_nM, count - 1, axis=1)[:, :count]
        return np.asarray(np.median(nearest, axis=1), dtype=np.float32)

    return _by_rows(score, desc_ND, chunk // len(reference_MD), np.float32)


def outlier_cut(scores_N: np.ndarray, share: float = 0.4) -> float:
    """The threshold that the `share` highest scores lie above; a point stays where score <= threshold.

    Raises:
        ValueError: if there are no scores or `share` is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"outlier share must be in [0, 1), not {share}")
    if len(scores_N) == 0:
        raise ValueError("an outlier threshold needs at least one score")
    return float(np.quantile(scores_N, 1 - share, method="inverted_cdf"))


def background_mask(
    desc_ND: np.ndarray,
    inside_KD: np.ndarray,
    outside_KD: np.ndarray,
    inside_box_N: np.ndarray,
    *,
    chunk: int = 4_000_000,
) -> np.ndarray:
    """Which points belong to the object where backgrounds are constant, bool (N,).

    Args:
        desc_ND: descriptors of an image's or a shard's points.
        inside_KD: centroids of descriptors inside the object boxes.
        outside_KD: centroids of those outside.
        inside_box_N: whether each point lies inside its object box.
        chunk: most distances held at once.

    Raises:
        ValueError: if the widths differ.

    Source: Mallis et al. 2020, background removal for Human3.6M.
    """

    def on_object(rows_nD: np.ndarray) -> np.ndarray:
        inside_n = squared_distances(rows_nD, inside_KD).min(axis=1)
        outside_n = squared_distances(rows_nD, outside_KD).min(axis=1)
        return np.asarray(inside_n < outside_n)

    rows = chunk // max(len(inside_KD), len(outside_KD))
    return np.asarray(inside_box_N & _by_rows(on_object, desc_ND, rows, bool))


def _by_rows(function: Callable[[np.ndarray], np.ndarray], desc_ND: np.ndarray, rows: int, dtype: type) -> np.ndarray:
    """The function's values for all rows, computed for a bounded number of rows at a time."""
    rows = max(rows, 1)
    parts = [function(desc_ND[first : first + rows]) for first in range(0, len(desc_ND), rows)]
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype)
