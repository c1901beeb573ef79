"""Left and right: pairs found by matching, and training on mirrored images."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sst.nn.augment import warp_images
from sst.nn.geometry import STRIDE
from sst.nn.symmetry import mirror_matrix, mirror_some
from sst.train.symmetry import find_symmetry

SIZE = 256.0
PARTNER = np.array([1, 0, 2, 4, 3, -1])
"""Two pairs, one landmark on the plane, and one without a partner."""


def scene(count: int = 60, seed: int = 0, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Landmarks of images, and those of their mirror images mirrored back, as a perfect network gives them."""
    rng = np.random.default_rng(seed)
    shape = np.array([[80, 90], [176, 90], [128, 130], [100, 180], [156, 180], [40, 40]], float)
    plain = shape + rng.normal(0, 15, (count, 1, 2)) + rng.normal(0, noise, (count, 6, 2))
    mirrored = np.full_like(plain, np.nan)
    for k, j in enumerate(PARTNER):
        if j >= 0:
            mirrored[:, j] = plain[:, k] + rng.normal(0, noise, (count, 2))
    return plain, mirrored


def test_pairs_and_landmarks_on_the_plane_are_found():
    found = find_symmetry(*scene(), SIZE)
    np.testing.assert_array_equal(found.partner, PARTNER)
    assert found.pairs() == [(0, 1), (3, 4)] and found.swap_share.max() == 0


def test_swaps_are_counted_where_the_network_takes_left_for_right():
    plain, mirrored = scene()
    # On the first 15 of 60 mirror images both eyes keep their numbers at their places: left is taken for right.
    mirrored[:15, [0, 1]] = mirrored[:15, [1, 0]]
    np.testing.assert_allclose(find_symmetry(plain, mirrored, SIZE).swap_share, [0.25, 0.25, 0, 0, 0, 0])


@given(st.permutations(range(6)), st.integers(0, 20))
def test_numbering_does_not_matter(order, seed):
    plain, mirrored = scene(seed=seed)
    order = np.array(order)
    found = find_symmetry(plain[:, order], mirrored[:, order], SIZE)
    place = np.append(np.argsort(order), -1)
    np.testing.assert_array_equal(found.partner, place[PARTNER[order]])


@given(st.integers(0, 10_000))
def test_a_partner_of_a_partner_is_oneself_whatever_the_points(seed):
    rng = np.random.default_rng(seed)
    plain, mirrored = rng.uniform(0, SIZE, (2, 5, 7, 2))
    plain[rng.random((5, 7)) < 0.3] = np.nan
    partner = find_symmetry(plain, mirrored, 4 * SIZE).partner
    assert all(partner[j] == k for k, j in enumerate(partner) if j >= 0)


def test_landmarks_seen_nowhere_have_no_partner():
    nothing = np.full((4, 3, 2), np.nan)
    found = find_symmetry(nothing, nothing, SIZE)
    assert (found.partner == -1).all() and (found.swap_share == 0).all()


def batch(size: int = 64):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, size, size, 3), generator=generator).to(torch.uint8)
    points = torch.rand(3, 4, 2, generator=generator) * (size // STRIDE - 1)
    cluster = torch.tensor([[0, 1, 2, -1], [3, 4, 5, 0], [2, 5, -1, -1]])
    return images, torch.eye(3).repeat(3, 1, 1), points, cluster


def test_a_mirrored_image_and_its_labels_move_together():
    images, to_view, points, cluster = batch()
    chosen = torch.tensor([True, False, True])
    matrix, moved, renamed = mirror_some(to_view, points, cluster, chosen, torch.tensor(PARTNER), 64)
    plain, mirrored = warp_images(images, to_view, 64), warp_images(images, matrix, 64)
    # View pixel x shows what was at 64 - x; column 0 would show column 64, which is outside.
    torch.testing.assert_close(mirrored[0, :, :, 1:], plain[0, :, :, 1:].flip(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(mirrored[1], plain[1])
    torch.testing.assert_close(moved[0], torch.stack([64 / STRIDE - points[0, :, 0], points[0, :, 1]], -1))
    torch.testing.assert_close(moved[1], points[1])
    assert renamed.tolist() == [[1, 0, 2, -1], [3, 4, 5, 0], [2, -1, -1, -1]]


def test_mirroring_twice_changes_nothing_but_landmarks_without_partner():
    _, to_view, points, cluster = batch()
    everything = torch.ones(3, dtype=torch.bool)
    partner = torch.tensor(PARTNER)
    once = mirror_some(to_view, points, cluster, everything, partner, 64)
    matrix, moved, renamed = mirror_some(*once, everything, partner, 64)
    torch.testing.assert_close(matrix, to_view)
    torch.testing.assert_close(moved, points)
    torch.testing.assert_close(renamed, torch.where(cluster == 5, -1, cluster))
    torch.testing.assert_close(mirror_matrix(64) @ mirror_matrix(64), torch.eye(3))
