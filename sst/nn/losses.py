"""Targets and losses of both stages, over padded point arrays: no loop over images or points.

A loss is a sum and the number of its terms: the mean over a whole batch takes both of all the workers that share it.

B batch, N M points of the two views, K landmarks, D descriptor size, H W heatmap. Points are (x, y) in heatmap
units; cluster -1 marks padding. Source: Mallis et al. 2020, sections 3.1 to 3.3.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sst.nn.geometry import sampling_grid

DetectorTarget = Literal["cell", "bump"]
"""What the detector learns to draw at a label: 1 in its cell, or the bump of stage 2."""

BUMP_VARIANCE = 0.5625
"""A Gaussian of this variance is the published bump: 1 at the centre, 0.411 beside it, 0.169 at the corners."""

MAX_PAIRS = 2_999
"""Pairs of points of a pair of views that are compared at most. The published arrays have room for 3,000 and are filled
but for the last; with all of 100 labels in both views there would be 10,000."""


class Sum(NamedTuple):
    """A sum over one worker's share of a batch, and how many terms it has; scalars."""

    total: Tensor
    terms: Tensor

    def mean(self) -> Tensor:
        """Over the share alone; 0 where there is nothing."""
        return self.total / self.terms.clamp_min(1)


def sample_descriptors(desc_BDHW: Tensor, points_BN2: Tensor) -> Tensor:
    """Reads a descriptor map bilinearly at points; (B, N, D)."""
    height, width = desc_BDHW.shape[-2:]
    grid_BN12 = sampling_grid(points_BN2, height, width)[:, :, None]
    sampled = functional.grid_sample(
        desc_BDHW, grid_BN12.to(desc_BDHW.dtype), align_corners=True, padding_mode="border"
    )
    return sampled[..., 0].transpose(1, 2)


def detector_target(
    points_BN2: Tensor, cluster_BN: Tensor, height: int, width: int, kind: DetectorTarget = "cell"
) -> Tensor:
    """What the detector should draw, 0 where no label is near; (B, 1, H, W).

    Args:
        points_BN2: heatmap units.
        cluster_BN: int64; -1 for padding.
        height: rows H of the heatmap.
        width: columns W of the heatmap.
        kind: "cell": 1 in the cell of each labelled point (published). "bump": the bump of `landmark_target`.
    """
    if kind == "bump":
        bumps = _bumps(points_BN2, height, width) * (cluster_BN >= 0)[..., None, None]
        return bumps.amax(1, keepdim=True)
    column = points_BN2[..., 0].round().long().clamp(0, width - 1)
    row = points_BN2[..., 1].round().long().clamp(0, height - 1)
    target = torch.zeros(len(points_BN2), height * width, device=points_BN2.device)
    target.scatter_reduce_(1, row * width + column, (cluster_BN >= 0).float(), reduce="amax")
    return target.view(-1, 1, height, width)


def detector_loss(heat_B1HW: Tensor, points_BN2: Tensor, cluster_BN: Tensor, kind: DetectorTarget = "cell") -> Tensor:
    """Mean squared error between the detector's heatmap and `detector_target`, of each image; (B,)."""
    height, width = heat_B1HW.shape[-2:]
    target = detector_target(points_BN2, cluster_BN, height, width, kind)
    return (heat_B1HW.float() - target).square().mean((1, 2, 3))


class Labelled(NamedTuple):
    """Labelled points of one view of each image.

    Attributes:
        cluster_BN: int64; -1 for padding. A cluster occurs at most once per image.
        inside_BN: bool, whether the point lies in the view.
    """

    cluster_BN: Tensor
    inside_BN: Tensor


def pair_masks(first: Labelled, second: Labelled, maximum: int = MAX_PAIRS) -> tuple[Tensor, Tensor]:
    """Which pairs of points of two views are compared.

    Both points must lie in their views, and both clusters be labelled in both images, be it outside of the views. Pairs
    of one cluster come first, then the others, a point of the first view after the other.

    Args:
        first: N points of the first view.
        second: M points of the second view.
        maximum: pairs of a pair of views at most.

    Returns:
        Two bool masks (B, N, M): compared pairs of one cluster, and all compared pairs.
    """
    same_BNM = first.cluster_BN[:, :, None] == second.cluster_BN[:, None, :]
    same_BNM = same_BNM & (first.cluster_BN >= 0)[:, :, None]
    inside_BNM = first.inside_BN[:, :, None] & second.inside_BN[:, None, :]
    shared_BNM = same_BNM.any(2)[:, :, None] & same_BNM.any(1)[:, None, :]
    positive_BNM, negative_BNM = same_BNM & inside_BNM, shared_BNM & ~same_BNM & inside_BNM
    place_BNM = negative_BNM.flatten(1).cumsum(1).view_as(negative_BNM)
    room_B11 = maximum - positive_BNM.sum((1, 2), keepdim=True)
    return positive_BNM, positive_BNM | (negative_BNM & (place_BNM <= room_B11))


def descriptor_loss(
    first_BND: Tensor, second_BMD: Tensor, first: Labelled, second: Labelled, margin: float, maximum: int = MAX_PAIRS
) -> Sum:
    """Contrastive loss over the pairs of points that `pair_masks` gives.

    Same cluster: d^2. Different clusters: max(0, margin - d)^2, with d the L2 distance.

    Args:
        first_BND: descriptors of the first view's points, raw.
        second_BMD: the same of the second view.
        first: the first view's points.
        second: the second view's points.
        margin: 0.8 in the paper.
        maximum: see `pair_masks`.
    """
    same_BNM, compared_BNM = pair_masks(first, second, maximum)
    square_BNM = (first_BND.float()[:, :, None] - second_BMD.float()[:, None, :]).square().sum(-1)
    # The root has no gradient at 0, so what is published adds a little; a pair at distance 0 is not pushed.
    distance_BNM = (square_BNM + 1e-9).sqrt()
    loss_BNM = torch.where(same_BNM, square_BNM, (margin - distance_BNM).clamp_min(0).square())
    return Sum((loss_BNM * compared_BNM).sum(), compared_BNM.sum())


def landmark_target(
    points_BN2: Tensor, cluster_BN: Tensor, landmarks: int, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Bumps at the labelled points, one channel per cluster.

    The published 3 x 3 bump is a Gaussian sampled around a rounded point; here it is sampled around the point
    itself, so nothing of the point's precision is lost. At points on the grid both are equal.

    Args:
        points_BN2: heatmap units.
        cluster_BN: int64; -1 for padding. A cluster occurs at most once per image.
        landmarks: number of channels K.
        height: rows H of the heatmap.
        width: columns W of the heatmap.

    Returns:
        Target (B, K, H, W) and the mask (B, K) of labelled channels. A label outside of the view is one too: what its
        bump leaves within, mostly nothing, is its target.
    """
    count = len(points_BN2)
    labelled = torch.zeros(count, landmarks + 1, device=points_BN2.device, dtype=torch.bool)
    slot_BN = torch.where(cluster_BN >= 0, cluster_BN, landmarks)
    labelled.scatter_(1, slot_BN, True)
    place_BK2 = torch.zeros(count, landmarks + 1, 2, device=points_BN2.device)
    place_BK2.scatter_(1, slot_BN[..., None].expand(-1, -1, 2), points_BN2)
    place_BK2, labelled = place_BK2[:, :landmarks], labelled[:, :landmarks]
    return _bumps(place_BK2, height, width) * labelled[..., None, None], labelled


def _bumps(points_BN2: Tensor, height: int, width: int) -> Tensor:
    """A bump around every point, cut to a square of three cells; (B, N, H, W)."""

    def falloff(length: int, centre_BN: Tensor) -> Tensor:
        offset = torch.arange(length, device=points_BN2.device) - centre_BN[..., None]
        return torch.exp(-offset.square() / (2 * BUMP_VARIANCE)) * (offset.abs() <= 1.5)

    return falloff(height, points_BN2[..., 1])[..., None] * falloff(width, points_BN2[..., 0])[..., None, :]


def landmark_loss(heat_BKHW: Tensor, points_BN2: Tensor, cluster_BN: Tensor, active_K: Tensor) -> Sum:
    """Mean squared error of the active channels whose cluster is labelled in the image (paper, section 3.3)."""
    target, labelled = landmark_target(points_BN2, cluster_BN, *heat_BKHW.shape[1:])
    used_BK = labelled & active_K
    error_BK = (heat_BKHW.float() - target).square().mean((-2, -1))
    return Sum((error_BK * used_BK).sum(), used_BK.sum())


@torch.no_grad()
def landmark_levels(heat_BKHW: Tensor, points_BN2: Tensor, cluster_BN: Tensor, active_K: Tensor) -> dict[str, Tensor]:
    """What tells a network that learns landmarks from one that has learnt to draw nothing.

    Returns:
        Over the channels that `landmark_loss` takes: "peak", the mean height of their maxima, and "all_zero", the loss
        that a map of zeros would have. Scalars.
    """
    target, labelled = landmark_target(points_BN2, cluster_BN, *heat_BKHW.shape[1:])
    used_BK = labelled & active_K
    count = used_BK.sum().clamp_min(1)
    peak_BK, zero_BK = heat_BKHW.float().amax((-2, -1)), target.square().mean((-2, -1))
    return {"peak": (peak_BK * used_BK).sum() / count, "all_zero": (zero_BK * used_BK).sum() / count}
