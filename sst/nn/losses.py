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

Objective = Literal["squared", "focal"]
"""How a heatmap is compared with its target: squared error (published), or cross-entropy that is weighted by how far
off a cell is, so that the many cells of background do not outweigh the few of a point."""

Contrast = Literal["margin", "softmax"]
"""How descriptors of one cluster are drawn together and others pushed apart: `descriptor_loss` or `softmax_loss`."""

BUMP_VARIANCE = 0.5625
"""A Gaussian of this variance is the published bump: 1 at the centre, 0.411 beside it, 0.169 at the corners."""

LEAST_TOP = 0.6
"""A bump is at least this high, exp(-0.5^2 / 0.5625), in the cell that its point lies in."""

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


def detector_loss(
    heat_B1HW: Tensor,
    points_BN2: Tensor,
    cluster_BN: Tensor,
    kind: DetectorTarget = "cell",
    objective: Objective = "squared",
) -> Tensor:
    """`heatmap_loss` of the detector's heatmap against `detector_target`, of each image; (B,)."""
    height, width = heat_B1HW.shape[-2:]
    target = detector_target(points_BN2, cluster_BN, height, width, kind)
    return heatmap_loss(heat_B1HW, target, objective)[:, 0]


def heatmap_loss(heat_BKHW: Tensor, target_BKHW: Tensor, objective: Objective = "squared") -> Tensor:
    """How far every heatmap is from its target; (B, K), float32.

    Args:
        heat_BKHW: heatmaps; in [0, 1] for "focal".
        target_BKHW: in [0, 1].
        objective: "squared": mean of (p - t)^2 over the cells (published). "focal": at the highest cell of every bump
            -(1 - p)^2 log p, elsewhere -(1 - t)^4 p^2 log(1 - p), added up and divided by the number of bumps (Law and
            Deng, CornerNet, ECCV 2018; Zhou et al., Objects as Points, 2019): cells beside a point cost less the
            nearer they are, and background that is known to be some costs nothing.
    """
    p, t = heat_BKHW.float(), target_BKHW
    if objective == "squared":
        return (p - t).square().mean((-2, -1))
    p = p.clamp(1e-6, 1 - 1e-6)
    top = (t > LEAST_TOP) & (t == functional.max_pool2d(t, 3, stride=1, padding=1))
    at_top, elsewhere = (1 - p).square() * p.log(), (1 - t).pow(4) * p.square() * (1 - p).log()
    return -torch.where(top, at_top, elsewhere).sum((-2, -1)) / top.sum((-2, -1)).clamp_min(1)


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


def softmax_loss(first_BND: Tensor, second_BMD: Tensor, first: Labelled, second: Labelled, temperature: float) -> Sum:
    """Normalised contrastive loss over the points of a whole share of the batch (beyond the paper).

    Every labelled point of a first view names those of the second views that have its cluster, by a softmax of the
    cosines over all labelled points of the second views. Source: Khosla et al., Supervised Contrastive Learning,
    NeurIPS 2020, with the sum outside of the logarithm; descriptors are compared as k-means will compare them.

    Args:
        first_BND: descriptors of the first views' points, raw.
        second_BMD: the same of the second views.
        first: the first views' points.
        second: the second views' points.
        temperature: by which the cosines are divided.

    Returns:
        Over the points of first views whose cluster some second view shows.
    """
    a_PD, b_QD = (functional.normalize(each.float().flatten(0, 1), dim=-1) for each in (first_BND, second_BMD))
    a_P, b_Q = first.cluster_BN.flatten(), second.cluster_BN.flatten()
    from_P, to_Q = ((each.inside_BN & (each.cluster_BN >= 0)).flatten() for each in (first, second))
    logits_PQ = (a_PD @ b_QD.T / temperature).masked_fill(~to_Q, -1e4)
    same_PQ = (a_P[:, None] == b_Q) & to_Q
    used_P = from_P & same_PQ.any(1)
    mean_P = (logits_PQ.log_softmax(1) * same_PQ).sum(1) / same_PQ.sum(1).clamp_min(1)
    return Sum(-(mean_P * used_P).sum(), used_P.sum())


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


def landmark_loss(
    heat_BKHW: Tensor,
    points_BN2: Tensor,
    cluster_BN: Tensor,
    active_K: Tensor,
    objective: Objective = "squared",
) -> tuple[Sum, dict[str, Tensor]]:
    """Loss of the active channels whose cluster is labelled in the image (paper, section 3.3).

    Returns:
        The sum of their `heatmap_loss`; and, over the same channels, what tells a network that learns landmarks from
        one that has learnt to draw nothing: "peak", the mean height of their maxima, and "all_zero", the squared error
        that a map of zeros would have ("squared" alone: the focal loss of such a map is the greatest that there is).
        Scalars.
    """
    target, labelled = landmark_target(points_BN2, cluster_BN, *heat_BKHW.shape[1:])
    used_BK = labelled & active_K
    total, terms = (heatmap_loss(heat_BKHW, target, objective) * used_BK).sum(), used_BK.sum()
    with torch.no_grad():
        count, peak_BK = terms.clamp_min(1), heat_BKHW.float().amax((-2, -1))
        seen = {"peak": (peak_BK * used_BK).sum() / count}
        if objective == "squared":
            seen["all_zero"] = (target.square().mean((-2, -1)) * used_BK).sum() / count
    return Sum(total, terms), seen
