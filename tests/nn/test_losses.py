"""Losses against the definitions, written as loops over points."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sst.nn.losses import (
    Labelled,
    descriptor_loss,
    detector_target,
    heatmap_loss,
    landmark_loss,
    landmark_target,
    sample_descriptors,
    softmax_loss,
)


def everywhere(cluster):
    return Labelled(cluster, torch.ones_like(cluster, dtype=torch.bool))


def test_descriptor_loss_does_not_depend_on_the_order_of_the_points():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(3, 6, 4, generator=generator), torch.rand(3, 5, 4, generator=generator)
    # A cluster occurs at most once per view; -1 is padding.
    c1 = torch.stack([torch.randperm(8, generator=generator)[:6] - 2 for _ in range(3)]).clamp_min(-1)
    c2 = torch.stack([torch.randperm(8, generator=generator)[:5] - 2 for _ in range(3)]).clamp_min(-1)
    order = torch.randperm(6, generator=generator)
    ours = descriptor_loss(first, second, everywhere(c1), everywhere(c2), 0.8)
    turned = descriptor_loss(first[:, order], second, everywhere(c1[:, order]), everywhere(c2), 0.8)
    assert float(turned.mean()) == pytest.approx(float(ours.mean()), abs=1e-6) and turned.terms == ours.terms > 0


def test_descriptor_loss_without_pairs_is_zero_with_finite_gradient():
    first = torch.zeros(2, 3, 4, requires_grad=True)
    none, some = everywhere(torch.full((2, 3), -1)), everywhere(torch.zeros(2, 2).long())
    loss = descriptor_loss(first, torch.zeros(2, 2, 4), none, some, 0.8).mean()
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert torch.isfinite(first.grad).all()


def test_coinciding_negatives_have_finite_gradient():
    first = torch.zeros(1, 2, 4, requires_grad=True)
    clusters = everywhere(torch.tensor([[0, 1]]))
    descriptor_loss(first, torch.zeros(1, 2, 4), clusters, clusters, 0.8).mean().backward()
    assert torch.isfinite(first.grad).all()


def test_bump_on_the_grid_is_the_published_one():
    target, labelled = landmark_target(torch.tensor([[[3.0, 2.0]]]), torch.tensor([[1]]), 2, 6, 8)
    expected = torch.zeros(6, 8)
    expected[1:4, 2:5] = torch.tensor([[0.169, 0.411, 0.169], [0.411, 1.0, 0.411], [0.169, 0.411, 0.169]])
    torch.testing.assert_close(target[0, 1], expected, atol=1e-3, rtol=0)
    assert labelled.tolist() == [[False, True]]
    assert target[0, 0].abs().sum() == 0


@given(st.floats(1, 6), st.floats(1, 4))
def test_bump_follows_its_point_between_cells(x, y):
    target, _ = landmark_target(torch.tensor([[[x, y]]]), torch.tensor([[0]]), 1, 6, 8)
    for row in range(6):
        for column in range(8):
            near = abs(column - x) <= 1.5 and abs(row - y) <= 1.5
            value = np.exp(-((column - x) ** 2 + (row - y) ** 2) / (2 * 0.5625)) if near else 0.0
            on_edge = min(abs(abs(column - x) - 1.5), abs(abs(row - y) - 1.5)) < 1e-5
            assert on_edge or float(target[0, 0, row, column]) == pytest.approx(value, abs=1e-4)


def test_detector_target_marks_labelled_cells_only():
    points = torch.tensor([[[1.2, 0.6], [3.0, 3.0], [9.0, 9.0]]])
    target = detector_target(points, torch.tensor([[4, -1, 2]]), 4, 5)
    expected = torch.zeros(4, 5)
    expected[1, 1] = 1
    expected[3, 4] = 1  # outside points are clamped: a step marks those that left the view with -1
    assert torch.equal(target[0, 0], expected)


def test_detector_bump_target_is_the_highest_of_all_bumps():
    points = torch.tensor([[[1.0, 1.0], [2.0, 1.0], [4.0, 3.0]]])
    target = detector_target(points, torch.tensor([[0, 5, -1]]), 5, 6, "bump")
    assert target[0, 0, 1, 1] == 1 and target[0, 0, 1, 2] == 1
    assert float(target[0, 0, 1, 0]) == pytest.approx(0.411, abs=1e-3)
    assert float(target[0, 0, 3, 4]) == 0.0


def test_landmark_loss_counts_active_labelled_channels_only():
    heat = torch.zeros(2, 3, 4, 4)
    points = torch.tensor([[[1.0, 1.0], [2.0, 2.0]], [[1.0, 1.0], [0.0, 0.0]]])
    cluster = torch.tensor([[0, 1], [2, -1]])
    active = torch.tensor([True, False, True])
    bump = 1 + 4 * 0.411112**2 + 4 * 0.169013**2
    # Image 0 has channel 0 (1 is inactive), image 1 has channel 2: two channels, each with one whole bump.
    assert float(landmark_loss(heat, points, cluster, active)[0].mean()) == pytest.approx(bump / 16, rel=1e-4)
    assert float(landmark_loss(heat, points, torch.full((2, 2), -1), active)[0].mean()) == 0.0


def test_descriptors_are_read_bilinearly_at_heatmap_points():
    y, x = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")
    maps = torch.stack([x, y, 2 * x - y])[None]
    points = torch.tensor([[[0.0, 0.0], [2.25, 3.5], [6.0, 4.0]]])
    read = sample_descriptors(maps, points)[0]
    torch.testing.assert_close(read, torch.tensor([[0.0, 0, 0], [2.25, 3.5, 1.0], [6.0, 4.0, 8.0]]))


def test_focal_loss_is_that_of_center_points_written_as_a_loop():
    generator = torch.Generator().manual_seed(3)
    heat = torch.rand(2, 3, 7, 9, generator=generator)
    points = torch.tensor([[[2.3, 3.4], [6.0, 1.0], [-3.0, 2.0]], [[4.45, 4.45], [0.0, 6.0], [8.2, 5.6]]])
    target, _ = landmark_target(points, torch.arange(3).expand(2, 3), 3, 7, 9)
    ours = heatmap_loss(heat, target, "focal")
    for image in range(2):
        for channel in range(3):
            x, y = points[image, channel].tolist()
            tops = [(round(y), round(x))] if x >= 0 else []
            total = 0.0
            for row in range(7):
                for column in range(9):
                    p, t = float(heat[image, channel, row, column]), float(target[image, channel, row, column])
                    if (row, column) in tops:
                        total -= (1 - p) ** 2 * math.log(p)
                    else:
                        total -= (1 - t) ** 4 * p**2 * math.log(1 - p)
            assert float(ours[image, channel]) == pytest.approx(total, rel=1e-4)


def test_focal_loss_of_a_detector_counts_every_label_of_an_image():
    points = torch.tensor([[[2.0, 2.0], [6.3, 1.2], [4.0, 5.0]]])
    target = detector_target(points, torch.tensor([[0, 1, -1]]), 8, 8, "bump")
    heat = torch.full((1, 1, 8, 8), 0.1)
    heat[0, 0, 2, 2], heat[0, 0, 1, 6] = 0.9, 0.5
    background = sum(
        (1 - float(t)) ** 4 * 0.1**2 * -math.log(0.9)
        for place, t in np.ndenumerate(target[0, 0].numpy())
        if place not in {(2, 2), (1, 6)}
    )
    expected = (0.1**2 * -math.log(0.9) + 0.5**2 * -math.log(0.5) + background) / 2
    assert float(heatmap_loss(heat, target, "focal")) == pytest.approx(expected, rel=1e-4)


def test_softmax_loss_is_that_of_supervised_contrast_written_as_a_loop():
    """Over the whole batch; points outside of their view and padding neither name others nor are named."""
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 4, 4, generator=generator)
    c1, c2 = torch.tensor([[0, 1, -1], [2, 0, 5]]), torch.tensor([[1, 0, 3, -1], [0, 2, 1, 4]])
    in1 = torch.tensor([[True, True, True], [True, False, True]])
    in2 = torch.tensor([[True, True, True, True], [True, True, False, True]])
    ours = softmax_loss(first, second, Labelled(c1, in1), Labelled(c2, in2), 0.3)
    candidates = [(b, m) for b in range(2) for m in range(4) if c2[b, m] >= 0 and in2[b, m]]
    terms = []
    for b in range(2):
        for n in range(3):
            if c1[b, n] < 0 or not in1[b, n]:
                continue
            cosines = {
                place: float(torch.cosine_similarity(first[b, n], second[place], dim=0)) / 0.3 for place in candidates
            }
            whole = math.log(sum(map(math.exp, cosines.values())))
            named = [place for place in candidates if c2[place] == c1[b, n]]
            if named:
                terms.append(-sum(cosines[place] - whole for place in named) / len(named))
    assert int(ours.terms) == len(terms) == 3
    assert float(ours.mean()) == pytest.approx(np.mean(terms), rel=1e-5)
