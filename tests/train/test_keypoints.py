"""The default detector of first keypoints."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sst.train.keypoints import VIEW, RootSift


def blob(x: float, y: float, sigma: float) -> np.ndarray:
    """A bright Gaussian blob with its centre there, drawn by the definition."""
    rows, columns = np.mgrid[0:VIEW, 0:VIEW]
    image = 40 + 180 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2))
    return np.repeat(image.round().astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("sigma", [2.5, 4.0, 7.0])
def test_blobs_are_found_where_they_are(sigma):
    rng = np.random.default_rng(0)
    off = []
    for _ in range(12):
        place = rng.uniform(60, 190, 2)
        [(points, _)] = RootSift()([blob(*place, sigma)])
        off += list(points[:1] - place)
    assert len(off) >= 5
    assert np.abs(np.mean(off, axis=0)).max() < 0.05
    assert np.abs(off).max() < 0.15


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cell=st.sampled_from([4.0, 256 * 4 / 96]))
def test_no_first_keypoint_lies_in_a_cell_beside_another(seed, cell):
    noise = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    [(points, descriptors)] = RootSift(cell=cell)([np.kron(noise, np.ones((4, 4, 1), np.uint8))])
    assert 20 < len(points) == len(descriptors) <= 60
    cells = np.round(points / cell).astype(int)
    gap = np.abs(cells[:, None] - cells[None]).max(-1) + 9 * np.eye(len(cells), dtype=int)
    assert gap.min() >= 2
