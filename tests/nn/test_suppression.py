"""Suppression against the greedy definition; decoding against known peaks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sst.nn.losses import landmark_target
from sst.nn.suppression import decode_keypoints, decode_landmarks, free_of, suppress


def greedy(heat, threshold, radius):
    """Visits cells from high to low; keeps each that no kept one is near."""
    cells = [(-heat[r, c], r, c) for r in range(heat.shape[0]) for c in range(heat.shape[1])]
    kept = []
    for negative, r, c in sorted(cells):
        if -negative > threshold and all(max(abs(r - a), abs(c - b)) > radius for a, b in kept):
            kept.append((r, c))
    return kept


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(2, 40))
def test_equals_greedy(seed, radius, levels):
    # Few levels make ties; those go to the first cell in reading order in both.
    heat = np.random.default_rng(seed).integers(0, levels, (2, 9, 11)) / levels
    kept = suppress(torch.from_numpy(heat), 0.3, radius)
    for image in range(2):
        found = {tuple(cell) for cell in kept[image].nonzero().tolist()}
        assert found == set(greedy(heat[image], 0.3, radius))


@given(st.integers(0, 2**32 - 1))
def test_idempotent(seed):
    heat = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(seed))
    kept = suppress(heat, 0.2)
    assert torch.equal(suppress(heat * kept, 0.2), kept)


def test_nothing_above_threshold():
    assert not suppress(torch.zeros(2, 4, 4), 0.2).any()


@given(st.floats(2, 9), st.floats(2, 7))
def test_decodes_a_gaussian_to_a_fraction_of_a_cell(x, y):
    target, _ = landmark_target(torch.tensor([[[x, y]]]), torch.tensor([[0]]), 1, 10, 12)
    points, confidence = decode_landmarks(target)
    # The bump is cut to three cells; halfway between two cells the far neighbour is just cut off.
    np.testing.assert_allclose(points[0, 0].numpy(), [x, y], atol=0.06)
    assert 0.6 < float(confidence[0, 0]) <= 1.0


def test_peaks_on_the_border_stay_inside_half_a_cell():
    heat = torch.zeros(1, 2, 5, 6)
    heat[0, 0, 0, 0] = heat[0, 1, 4, 5] = 1.0
    points, _ = decode_landmarks(heat)
    assert (points[0] - torch.tensor([[0.0, 0.0], [5.0, 4.0]])).abs().max() <= 0.5


def test_keypoints_come_grouped_by_image_with_confidence():
    heat = torch.zeros(3, 1, 6, 6)
    heat[0, 0, 1, 2] = 0.9
    heat[2, 0, 4, 4], heat[2, 0, 0, 0] = 0.5, 0.3
    image, points, confidence = decode_keypoints(heat, 0.2)
    assert image.tolist() == [0, 2, 2]
    assert points.round().tolist() == [[2, 1], [0, 0], [4, 4]]
    assert confidence.tolist() == pytest.approx([0.9, 0.3, 0.5])


def test_suppression_on_the_grid_is_three_by_three() -> None:
    label = torch.tensor([[5.0, 5.0]])
    grid = torch.cartesian_prod(torch.arange(11.0), torch.arange(11.0))
    near = (grid - label).abs().amax(1) <= 1
    assert torch.equal(free_of(grid, label, radius=1), ~near)


def test_overlap_limit_is_of_the_union() -> None:
    """Squares of side 1 that share a strip w have IoU w / (2 - w), above 0.01 from w = 0.0198 on."""
    new = torch.tensor([[1 - 0.0199, 0.0], [1 - 0.0197, 0.0]])
    assert free_of(new, torch.zeros(1, 2), radius=0.5).tolist() == [False, True]
