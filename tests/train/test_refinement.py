"""Landmarks that refine themselves: which answers become labels, which landmarks stay, and which are set back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.shards import Labels
from sst.train.refinement import agreed, agreement, kept_landmarks, labels_of, points_of, set_back, settled, spread_out

NAN = float("nan")


def counted(points: np.ndarray, before: np.ndarray | None = None, radius: float = 6.0):
    """What answers of a few images add up to."""
    return agreement(points, np.full_like(points, NAN) if before is None else before, np.ones(points.shape[:2]), radius)


def wandering(images: int, *offsets: tuple[float, float]) -> np.ndarray:
    """Landmarks at fixed offsets from a point that is elsewhere in every image."""
    middle = np.random.default_rng(0).uniform(80, 176, (images, 1, 2))
    return (middle + np.array(offsets)).astype(np.float32)


def test_an_answer_counts_where_it_is_sure_twice_and_follows_the_warp():
    plain = np.array([[[10.0, 20.0], [50.0, 50.0], [90.0, 90.0], [30.0, 40.0]]])
    warped = plain + np.array([[[2.0, 0.0], [0.0, 7.0], [0.0, 0.0], [0.0, 0.0]]])
    sure, again = np.array([[True, True, False, True]]), np.array([[True, True, True, False]])
    points = agreed(plain, sure, warped, again, radius=6.0)
    assert points[0, 0].tolist() == [11.0, 20.0]
    assert np.isnan(points[0, 1:]).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from([64, 96, 256]))
def test_labels_and_points_are_each_others_inverse(seed, size):
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 255, (4, 5, 2)).astype(np.float32)
    points[rng.random((4, 5)) < 0.5] = NAN
    back = points_of(labels_of(points, size), 5, size)
    np.testing.assert_allclose(back, points, rtol=1e-5)


def test_labels_lie_on_the_heatmap_grid():
    labels = labels_of(np.array([[[NAN, NAN], [128.0, 64.0]]], np.float32), 96)
    assert labels.points.tolist() == [[12.0, 6.0]]  # 96 px have 24 cells: half and a quarter of the side
    assert labels.cluster.tolist() == [1] and labels.offsets.tolist() == [0, 1]


def test_of_landmarks_that_become_one_place_the_one_with_most_labels_stays():
    found = counted(wandering(20, (0, 0), (3, 0), (30, 0)))
    kept = kept_landmarks(found, np.ones(3, bool), np.array([10, 18, 12]), 0.5, None)
    assert kept.tolist() == [False, True, True]


def test_landmarks_that_were_given_up_do_not_come_back():
    found = counted(wandering(20, (0, 0), (3, 0), (30, 0)))
    kept = kept_landmarks(found, np.array([True, False, True]), np.array([10, 18, 12]), 0.5, None)
    assert kept.tolist() == [True, False, True]


def test_a_choice_of_landmarks_covers_the_object_instead_of_crowding():
    """Four sure ones within 10 px and two less sure ones far off: of three, two are the far ones."""
    points = wandering(40, (0, 0), (10, 0), (0, 10), (10, 10), (60, 0), (0, 60))
    points[::4, 4:] = NAN
    kept = spread_out(counted(points), np.ones(6, bool), 3)
    assert kept.sum() == 3 and kept[4] and kept[5]


@pytest.mark.parametrize("wanted", [1, 4, 9])
def test_as_many_landmarks_stay_as_are_wanted_and_there(wanted):
    points = wandering(10, (0, 0), (10, 0), (0, 10), (10, 10), (60, 0), (0, 60))
    kept = spread_out(counted(points), np.array([True] * 5 + [False]), wanted)
    assert kept.sum() == min(wanted, 5) and not kept[5]


def test_a_landmark_that_stays_where_it_is_slides_or_is_lost_is_set_back():
    before = wandering(30, (0, 0), (30, 0), (0, 30), (30, 30))
    answers = before.copy()
    answers[:, 1] += (0, 9)  # slid to a place beside
    answers[10:, 2] = NAN  # lost in most images
    answers[:, 3] += np.random.default_rng(1).normal(0, 4, (30, 2))  # noisy, but on average where it was
    found = counted(answers, before)
    back = set_back(found, np.ones(4, bool), np.full(4, 30), radius=6.0)
    assert back.tolist() == [False, True, True, False]


def test_a_landmark_at_a_constant_place_of_the_view_does_not_agree_with_itself():
    """A warp of 10 px and more moves the image under it, so that moving the answer back gives other places."""
    plain = np.full((30, 1, 2), 128.0)
    moved_back = plain + np.random.default_rng(0).choice([-15.0, 15.0], (30, 1, 2))
    sure = np.ones((30, 1), bool)
    points = agreed(plain, sure, moved_back, sure, radius=6.0)
    assert np.isnan(points).all()
    assert set_back(counted(points), np.ones(1, bool), np.array([25]), 6.0).tolist() == [True]


def test_shards_add_up_to_the_whole():
    points = wandering(12, (0, 0), (4, 0), (40, 0))
    points[::3, 0] = NAN
    whole, parts = counted(points), counted(points[:5]) + counted(points[5:])
    for name in whole.__dataclass_fields__:
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name))


def test_an_image_without_labels_is_one():
    assert len(labels_of(np.full((3, 2, 2), NAN, np.float32), 96)) == 3
    assert np.isnan(
        points_of(Labels(np.zeros(4, np.int64), np.zeros((0, 2), np.float32), *[np.zeros(0, np.int16)] * 2), 2, 96)
    ).all()


@pytest.mark.parametrize(
    ("errors", "ends"),
    [
        ([], False),
        ([3.0], False),
        ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], False),
        ([0.9, 0.8, 0.81, 0.80, 0.80], False),  # the best is among the last four
        ([0.9, 0.8, 0.81, 0.80, 0.80, 0.799], True),
        ([0.9, 0.8, 0.81, 0.80, 0.80, 0.78], False),
    ],
)
def test_refinements_end_when_four_in_a_row_bring_nothing(errors, ends):
    assert settled(errors) == ends
