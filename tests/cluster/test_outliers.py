"""Outliers and constant backgrounds, against slow references."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.outliers import background_mask, outlier_cut, outlier_scores

seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=50, deadline=None)
@given(
    seed=seeds,
    points=st.integers(0, 12),
    reference=st.integers(1, 20),
    neighbours=st.integers(1, 25),
    chunk=st.sampled_from([1, 30, 10_000]),
)
def test_scores_equal_the_slow_reference(seed: int, points: int, reference: int, neighbours: int, chunk: int) -> None:
    rng = np.random.default_rng(seed)
    x, others = rng.normal(size=(points, 3)), rng.normal(size=(reference, 3))
    expected = [np.median(sorted(float(((row - other) ** 2).sum()) for other in others)[:neighbours]) for row in x]
    scores = outlier_scores(x, others, neighbours=neighbours, chunk=chunk)
    assert scores.dtype == np.float32 and scores.shape == (points,)
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_nearest_ones_are_found_among_many() -> None:
    x, others = np.array([[0.0]]), np.random.default_rng(0).normal(size=(20_000, 1))
    expected = np.median(np.sort(others[:, 0] ** 2)[:5000])
    assert outlier_scores(x, others, neighbours=5000)[0] == pytest.approx(expected, rel=1e-4)


def test_lonely_points_are_cut() -> None:
    rng = np.random.default_rng(0)
    common, lonely = (
        rng.normal(0, 0.05, (60, 4)),
        rng.uniform(-3, 3, (40, 4)) + 10 * np.eye(4)[rng.integers(0, 4, 40)],
    )
    x = np.concatenate([common, lonely])
    scores = outlier_scores(x, x, neighbours=50)
    assert np.array_equal(scores <= outlier_cut(scores, 0.4), np.arange(100) < 60)


@given(seed=seeds, count=st.integers(1, 50), share=st.floats(0, 0.99))
def test_cut_drops_the_share_and_at_most_one_point_less(seed: int, count: int, share: float) -> None:
    scores = np.random.default_rng(seed).permutation(count).astype(np.float32)
    dropped = int((scores > outlier_cut(scores, share)).sum())
    assert share * count - 1 - 1e-6 < dropped <= share * count + 1e-6


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least one reference"):
        outlier_scores(np.ones((2, 3)), np.empty((0, 3)))
    with pytest.raises(ValueError, match="at least one score"):
        outlier_cut(np.empty(0))
    with pytest.raises(ValueError, match=r"\[0, 1\), not 1"):
        outlier_cut(np.ones(3), 1.0)


@settings(max_examples=50, deadline=None)
@given(seed=seeds, points=st.integers(0, 12), chunk=st.sampled_from([1, 10_000]))
def test_background_equals_the_slow_reference(seed: int, points: int, chunk: int) -> None:
    rng = np.random.default_rng(seed)
    x, inside, outside = (rng.normal(size=(rows, 3)) for rows in (points, 4, 7))
    in_box = rng.random(points) < 0.7

    def nearest(row: np.ndarray, centroids: np.ndarray) -> float:
        return min(float(((row - centroid) ** 2).sum()) for centroid in centroids)

    expected = [bool(b) and nearest(row, inside) < nearest(row, outside) for row, b in zip(x, in_box, strict=True)]
    mask = background_mask(x, inside, outside, in_box, chunk=chunk)
    assert mask.dtype == bool and mask.tolist() == expected
