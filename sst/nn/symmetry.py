"""Left and right: which landmark takes which one's place in the mirrored image.

An object with a plane of symmetry has pairs (left eye, right eye) and landmarks on the plane (nose). They are found by
predicting on mirrored images, moving the points back and matching: the partner of a landmark is the one found there.

Shape letters: N images, K landmarks, B batch, P labelled points. Points are (x, y).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sst.nn.geometry import STRIDE

CLOSE = 0.06
"""A partner lies within this share of the view, in the median image."""

LEAST_SHARE = 0.2
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


def mirror_matrix(size: int, device: torch.device | None = None) -> Tensor:
    """Matrix (3, 3) that mirrors the S x S view left to right; box corner 0 becomes S."""
    matrix = torch.eye(3, device=device)
    matrix[0, 0].neg_()
    matrix[0, 2].fill_(size)
    return matrix


def find_symmetry(plain_NK2: np.ndarray, mirrored_NK2: np.ndarray, size: float) -> Symmetry:
    """Matches the landmarks of images with those of their mirror images.

    Args:
        plain_NK2: landmarks; NaN = not visible.
        mirrored_NK2: landmarks of the mirrored images, mirrored back; NaN = not visible.
        size: side of the view in these pixels.
    """
    from scipy.optimize import linear_sum_assignment  # not needed by a training step, which imports this file

    landmarks = plain_NK2.shape[1]
    distance = np.linalg.norm(plain_NK2[:, :, None] - mirrored_NK2[:, None], axis=-1)
    both = np.isfinite(distance)
    median = np.full((landmarks, landmarks), 2 * size)
    for k, j in np.argwhere(both.mean(0) > LEAST_SHARE):
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


def mirror_some(
    to_view_B33: Tensor, points_BP2: Tensor, cluster_BP: Tensor, chosen_B: Tensor, partner_K: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mirrors the chosen images of a batch, and gives their labels to the partners.

    Args:
        to_view_B33: matrices from stored image to canonical view.
        points_BP2: labelled points, heatmap units of the canonical view.
        cluster_BP: their clusters, -1 for padding.
        chosen_B: bool.
        partner_K: partner of every cluster, -1 for none: its labels are dropped, so that nothing is taught about it.
        size: side S of the view.

    Returns:
        The three, mirrored where chosen.
    """
    matrix = mirror_matrix(size, to_view_B33.device)
    x, y = points_BP2.unbind(-1)
    flipped = torch.stack([size / STRIDE - x, y], -1)
    partner = torch.where(cluster_BP >= 0, partner_K[cluster_BP.clamp_min(0)], -1)
    chosen = chosen_B[:, None]
    return (
        torch.where(chosen[..., None], matrix @ to_view_B33, to_view_B33),
        torch.where(chosen[..., None], flipped, points_BP2),
        torch.where(chosen, partner, cluster_BP),
    )
