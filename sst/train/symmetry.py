"""Left and right: which landmark takes which one's place in the mirrored image.

An object with a plane of symmetry has pairs (left eye, right eye) and landmarks on the plane (nose). They are found by
predicting on mirrored images, moving the points back and matching: the partner of a landmark is the one found there.

Shape letters: N images, K landmarks. Points are (x, y).
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

CLOSE = 0.06
"""A partner lies within this share of the view, in the median image."""


MIN_SHARE = 0.2
"""Share of the images on which both must be visible."""


@dataclass(frozen=True, eq=False)
class Symmetry:
    """What mirrored images tell.

    Attributes:
        partner: int (K,), the landmark that takes this one's place in the mirrored image: itself on the plane of
            symmetry, -1 where there is none.
        swap_share: (K,), share of the images whose mirror image gives this landmark to the same place again instead
            of to the partner: there the network takes left for right. 0 without another partner.
    """

    partner: np.ndarray
    swap_share: np.ndarray

    def pairs(self) -> list[tuple[int, int]]:
        """Left/right pairs, the smaller number first."""
        return [(k, int(j)) for k, j in enumerate(self.partner) if j > k]


def find_symmetry(plain_NK2: np.ndarray, mirrored_NK2: np.ndarray, size: float) -> Symmetry:
    """Matches the landmarks of images with those of their mirror images.

    Args:
        plain_NK2: landmarks; NaN = not visible.
        mirrored_NK2: landmarks of the mirrored images, mirrored back; NaN = not visible.
        size: side of the view in these pixels.
    """
    landmarks = plain_NK2.shape[1]
    distance = np.linalg.norm(plain_NK2[:, :, None] - mirrored_NK2[:, None], axis=-1)
    both = np.isfinite(distance)
    median = np.full((landmarks, landmarks), 2 * size)
    for k, j in np.argwhere(both.mean(0) > MIN_SHARE):
        median[k, j] = np.median(distance[both[:, k, j], k, j])
    # Mirroring twice changes nothing, so the matching is sought among symmetric costs.
    cost = (median + median.T) / 2
    _, found = linear_sum_assignment(cost)
    partner = np.full(landmarks, -1)
    for k, j in enumerate(found):
        if found[j] == k and cost[k, j] < CLOSE * size:
            partner[k] = j
    swap = np.zeros(landmarks)
    for k, j in enumerate(partner):
        if j not in (-1, k):
            seen = both[:, k, k] | both[:, k, j]
            to_itself = np.where(both[:, k, k], distance[:, k, k], np.inf)
            to_partner = np.where(both[:, k, j], distance[:, k, j], np.inf)
            # Partners that lie side by side at the plane of symmetry can't be told apart by distances.
            apart = np.linalg.norm(plain_NK2[:, k] - plain_NK2[:, j], axis=-1) > CLOSE * size
            swapped = apart & (to_itself < to_partner) & (to_itself < CLOSE * size)
            swap[k] = swapped[seen].mean() if seen.any() else 0.0
    return Symmetry(partner, swap)
