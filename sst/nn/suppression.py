"""From heatmaps to points: non-maximum suppression, batched, and sub-cell decoding.

B batch, K landmarks, H W heatmap. Points are (x, y) in heatmap units.
"""

import torch
from torch import Tensor
from torch.nn import functional

WITHIN_CELL = 0.499
"""Cells that a decoded point lies from the middle of its own at most, so that rounding gives its cell back."""


def suppress(heat_BHW: Tensor, threshold: float, radius: int = 1) -> Tensor:
    """Greedy non-maximum suppression with square neighbourhoods, for all images at once.

    Same result as visiting the cells above `threshold` in descending order and dropping each that lies within
    `radius` (Chebyshev distance) of one kept before: in every pass the highest remaining cell of each
    neighbourhood is kept and its neighbours fall. Of equal neighbouring cells the first in reading order is
    kept.

    Args:
        heat_BHW: heatmaps.
        threshold: cells must be above it.
        radius: 1 for the published squares of half side 1 with IoU above 0.01.

    Returns:
        bool (B, H, W), true at kept cells.
    """
    side = 2 * radius + 1

    def widest(x: Tensor) -> Tensor:
        return functional.max_pool2d(x[:, None], side, stride=1, padding=radius)[:, 0]

    # Ranks are distinct whole numbers, so ties cannot leave two neighbours both kept.
    flat = heat_BHW.flatten(1).float()
    order = torch.argsort(flat, dim=1, descending=True, stable=True)
    steps = torch.arange(flat.shape[1], 0, -1, device=flat.device, dtype=torch.float32)
    rank = torch.zeros_like(flat).scatter_(1, order, steps.expand_as(flat)).view_as(heat_BHW)
    alive = heat_BHW > threshold
    kept = torch.zeros_like(alive)
    while bool(alive.any()):
        remaining = torch.where(alive, rank, 0.0)
        kept |= alive & (widest(remaining) == remaining)
        alive &= widest(kept.float()) == 0
    return kept


def free_of(new_M2: Tensor, previous_MP2: Tensor, radius: float, iou: float = 0.01) -> Tensor:
    """Which new points no previous point suppresses, bool (M,).

    Two points suppress each other where the squares of half side `radius` around them overlap by more than
    `iou` (intersection over union).

    Args:
        new_M2: points.
        previous_MP2: the previous points with which each competes, or (P, 2) where all compete with the same; NaN
            suppresses nothing.
        radius: in the points' unit.
        iou: 0.01 in the paper.
    """
    side = 2 * radius
    gap_MP2 = (new_M2[:, None].double() - previous_MP2).abs()
    common_MP = (side - gap_MP2).clamp_min(0).prod(-1)
    # common / (2 side^2 - common) > iou, solved for what is common
    return ~(common_MP > 2 * side**2 * iou / (1 + iou)).any(-1)


def unite(previous_BP2: Tensor, image_M: Tensor, found_M2: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """What is left of every image's previous labels and new keypoints after one suppression over both, on whole cells.

    A previous label beats every new point, and of previous labels in one square the one that is listed first stays.

    Args:
        previous_BP2: previous labels, padded with NaN, in heatmap units.
        image_M: image of each new keypoint.
        found_M2: the new keypoints, already suppressed among themselves.
        height: rows of the heatmap.
        width: its columns.

    Returns:
        Image index (N,) and points (N, 2) with their fractions of a cell: grouped by image, previous labels first.

    Source: Mallis et al. 2020, section 3.2, and its published code.
    """
    image, slot = previous_BP2[..., 0].isfinite().nonzero(as_tuple=True)
    image_N, points_N2 = torch.cat([image, image_M]), torch.cat([previous_BP2[image, slot], found_M2])
    column_N, row_N = (points_N2[:, i].round().long().clamp(0, side - 1) for i, side in enumerate((width, height)))
    rank_N = torch.arange(len(points_N2), 0, -1, device=points_N2.device, dtype=torch.float32)
    cell_N = (image_N * height + row_N) * width + column_N
    heat = rank_N.new_zeros(len(previous_BP2) * height * width).scatter_reduce_(0, cell_N, rank_N, reduce="amax")
    kept = suppress(heat.view(-1, height, width), 0.0).flatten()
    stays_N = kept[cell_N] & (heat[cell_N] == rank_N)
    order = image_N[stays_N].argsort(stable=True)
    return image_N[stays_N][order], points_N2[stays_N][order]


def refine(heat_BKHW: Tensor, column_BK: Tensor, row_BK: Tensor) -> Tensor:
    """Sub-cell position of a peak: the vertex of the parabola through the logarithm of its cell and neighbours.

    Exact for a Gaussian. On the border, and where a neighbour is not below the peak, the offset is bounded to
    half a cell.

    Args:
        heat_BKHW: heatmaps.
        column_BK: peak column of each map.
        row_BK: peak row.

    Returns:
        (B, K, 2) in heatmap units.
    """
    height, width = heat_BKHW.shape[-2:]
    flat = heat_BKHW.flatten(2).float()

    def read(column: Tensor, row: Tensor) -> Tensor:
        index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
        return flat.gather(2, index[..., None])[..., 0].clamp_min(1e-3).log()

    centre = read(column_BK, row_BK)

    def vertex(before: Tensor, after: Tensor) -> Tensor:
        curvature = (2 * centre - before - after).clamp_min(1e-3)
        return (0.5 * (after - before) / curvature).clamp(-WITHIN_CELL, WITHIN_CELL)

    x = vertex(read(column_BK - 1, row_BK), read(column_BK + 1, row_BK))
    y = vertex(read(column_BK, row_BK - 1), read(column_BK, row_BK + 1))
    return torch.stack([column_BK + x, row_BK + y], -1)


def decode_landmarks(heat_BKHW: Tensor) -> tuple[Tensor, Tensor]:
    """The peak of every channel.

    Returns:
        Points (B, K, 2) in heatmap units and confidences (B, K), the heatmap's maximum.
    """
    confidence, index = heat_BKHW.flatten(2).float().max(2)
    width = heat_BKHW.shape[-1]
    # Truncated, which is the same for what is not negative; // and % become operators that TensorRT may not know.
    row = torch.div(index, width, rounding_mode="trunc")
    return refine(heat_BKHW, index - row * width, row), confidence


def decode_keypoints(heat_B1HW: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Keypoints of a detector heatmap.

    Returns:
        Image index (N,), points (N, 2) in heatmap units and confidences (N,), grouped by image, reading order.
    """
    heat = heat_B1HW[:, 0].float()
    image, row, column = suppress(heat, threshold).nonzero(as_tuple=True)
    points = refine(heat[image][:, None], column[:, None], row[:, None])[:, 0]
    return image, points, heat[image, row, column]
