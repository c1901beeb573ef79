"""Merging of clusters, against slow references."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.merging import Overlap, apply_merge, count_overlaps, merge_plan
from cluster.shards import Labels

seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, images=st.integers(0, 12), clusters=st.integers(1, 6), cut=st.integers(0, 12))
def test_counts_equal_the_slow_reference_and_add_up(seed: int, images: int, clusters: int, cut: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 15, (images, clusters, 2)).astype(np.float32)
    confidence = rng.random((images, clusters)).astype(np.float32)
    together = np.zeros((clusters, clusters), int)
    for image in range(images):
        for a in range(clusters):
            for b in range(clusters):
                dx, dy = (float(p - q) for p, q in zip(points[image, a], points[image, b], strict=True))
                sure = confidence[image, a] >= 0.2 and confidence[image, b] >= 0.2
                together[a, b] += sure and (dx**2 + dy**2) ** 0.5 < 5.7
    whole = count_overlaps(points, confidence)
    added = count_overlaps(points[:cut], confidence[:cut]) + count_overlaps(points[cut:], confidence[cut:])
    for overlap in (whole, added):
        assert overlap.together.tolist() == together.tolist()
        assert overlap.confident.tolist() == (confidence >= 0.2).sum(axis=0).tolist()


def test_confidence_limit_and_radius() -> None:
    points = np.array([[[0.0, 0.0], [5.6, 0.0], [0.0, 5.8]]])
    overlap = count_overlaps(points, np.array([[0.2, 0.9, 0.9]]))
    assert overlap.confident.tolist() == [1, 1, 1] and overlap.together.tolist() == [
        [1, 1, 0],
        [1, 1, 0],
        [0, 0, 1],
    ]
    assert count_overlaps(points, np.array([[0.19, 0.9, 0.9]])).together[0].tolist() == [0, 0, 0]


def slow_plan(confident: list[int], together: np.ndarray, population: list[int], share: float) -> list[int]:
    """The rule in words of method.md, over plain lists."""
    becomes = list(range(len(confident)))
    kept: list[int] = []
    for channel in sorted(range(len(confident)), key=lambda k: (-population[k], k)):
        for other in kept:
            if together[channel][other] > share * min(confident[channel], confident[other]):
                becomes[channel] = other
                break
        else:
            kept.append(channel)
    return becomes


@settings(max_examples=100, deadline=None)
@given(seed=seeds, clusters=st.integers(1, 8), share=st.sampled_from([0.3, 0.7]))
def test_plan_equals_the_slow_reference(seed: int, clusters: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    confident = rng.integers(0, 12, clusters)
    smaller = np.minimum.outer(confident, confident)
    together = np.triu(rng.integers(0, smaller + 1), 1)
    overlap = Overlap(confident, together + together.T + np.diag(confident))
    population = rng.integers(0, 6, clusters)
    plan = merge_plan(overlap, population, share)
    assert plan.tolist() == slow_plan(confident.tolist(), overlap.together, population.tolist(), share)
    assert np.array_equal(plan[plan], plan), "an absorber must itself be kept"


def test_absorbed_channel_does_not_absorb() -> None:
    """1 lies with 0, and 2 with 1 only: 1 is absorbed, so nothing is left for 2 to join."""
    together = np.array([[10, 8, 0, 0], [8, 9, 7, 0], [0, 7, 8, 0], [0, 0, 0, 0]])
    assert merge_plan(Overlap(np.array([10, 9, 8, 0]), together), np.array([4, 3, 2, 1])).tolist() == [0, 0, 2, 3]


def test_share_must_be_exceeded() -> None:
    for count, becomes in ((7, 1), (8, 0)):
        together = np.array([[10, count], [count, 10]])
        assert merge_plan(Overlap(np.array([10, 10]), together), np.array([5, 5])).tolist() == [0, becomes]


@settings(max_examples=80, deadline=None)
@given(seed=seeds, images=st.integers(0, 6), clusters=st.integers(1, 7))
def test_merged_labels_equal_the_slow_reference(seed: int, images: int, clusters: int) -> None:
    rng = np.random.default_rng(seed)
    per_image = [rng.choice(clusters, rng.integers(0, clusters + 1), replace=False) for _ in range(images)]
    cluster = np.concatenate([np.empty(0, int), *per_image]).astype(np.int16)
    offsets = np.cumsum([0, *map(len, per_image)])
    labels = Labels(
        offsets,
        rng.random((len(cluster), 2)).astype(np.float32),
        cluster,
        rng.random(len(cluster)).astype(np.float32),
    )
    mapping = rng.integers(0, clusters, clusters)
    population = rng.integers(0, 4, clusters)  # few values, so that ties occur

    rows, sizes, names = [], [0], []
    for image in range(images):
        best: dict[int, int] = {}
        for row in range(offsets[image], offsets[image + 1]):
            name = int(mapping[cluster[row]])
            rank = (-population[cluster[row]], cluster[row])
            if name not in best or rank < (-population[cluster[best[name]]], cluster[best[name]]):
                best[name] = row
        stays = sorted(best.values())
        rows += stays
        names += [int(mapping[cluster[row]]) for row in stays]
        sizes.append(len(rows))

    merged = apply_merge(labels, mapping, population)
    assert merged.offsets.tolist() == sizes and merged.cluster.tolist() == names
    assert merged.cluster.dtype == np.int16
    np.testing.assert_array_equal(merged.points, labels.points[rows])
    np.testing.assert_array_equal(merged.distance, labels.distance[rows])


def test_plan_that_merges_nothing_changes_nothing() -> None:
    labels = Labels(
        np.array([0, 2, 2]), np.ones((2, 2), np.float32), np.array([1, 0], np.int16), np.ones(2, np.float32)
    )
    same = apply_merge(labels, np.arange(2), np.array([5, 5]))
    assert same.cluster.tolist() == [1, 0] and same.offsets.tolist() == [0, 2, 2]


def test_labels_beyond_the_plan_are_refused() -> None:
    labels = Labels(np.array([0, 1]), np.ones((1, 2), np.float32), np.array([3], np.int16), np.ones(1, np.float32))
    with pytest.raises(IndexError):
        apply_merge(labels, np.arange(2), np.array([5, 5]))
