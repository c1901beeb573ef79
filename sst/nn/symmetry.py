"""Mirrored images: the matrix, and labels that go to their partners (see `sst.train.symmetry`).

Shape letters: B batch, P labelled points, K clusters. Points are (x, y).
"""

import torch
from torch import Tensor

from sst.nn.geometry import STRIDE


def mirror_matrix(size: int, device: torch.device | None = None) -> Tensor:
    """Matrix (3, 3) that mirrors the S x S view left to right; box corner 0 becomes S."""
    matrix = torch.eye(3, device=device)
    matrix[0, 0].neg_()
    matrix[0, 2].fill_(size)
    return matrix


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
