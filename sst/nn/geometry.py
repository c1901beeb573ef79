"""Where a point lies in each picture of the same thing, as 3x3 matrices over homogeneous (x, y, 1).

Three frames: the *stored image* of a shard; the *view*, the network's S x S input; the *heatmap* at a quarter
of the view. Points are (x, y) with pixel centres at integers. The canonical (un-augmented) view stretches the
object box over the whole input: box corner (x0, y0) lies at view (0, 0) and (x1, y1) at (S, S). A heatmap point
(x, y) lies at view pixel (4x, 4y).
"""

import numpy as np
import torch

STRIDE = 4
"""Pixels of the view per heatmap cell."""

SCORING_SIZE = 256.0
"""Scores and pictures are given in pixels of a view of this size, whatever the network's input is."""


def box_to_view(box: np.ndarray, size: int) -> np.ndarray:
    """Matrix from the stored image to the canonical view.

    Args:
        box: (4,) x0, y0, x1, y1 in pixels of the stored image, of positive area.
        size: side S of the view.

    Returns:
        float64 (3, 3).
    """
    x0, y0, x1, y1 = (float(value) for value in box)
    scale_x, scale_y = size / (x1 - x0), size / (y1 - y0)
    return np.array([[scale_x, 0.0, -x0 * scale_x], [0.0, scale_y, -y0 * scale_y], [0.0, 0.0, 1.0]])


def resize_matrix(scale_x: float, scale_y: float) -> np.ndarray:
    """Matrix of an image resize that keeps image borders on borders: x' = (x + 0.5) * scale - 0.5."""
    return np.array([[scale_x, 0.0, 0.5 * scale_x - 0.5], [0.0, scale_y, 0.5 * scale_y - 0.5], [0.0, 0.0, 1.0]])


def transform(matrix_B33: torch.Tensor, points_BN2: torch.Tensor) -> torch.Tensor:
    """Moves points by one affine 3x3 matrix per sample.

    Args:
        matrix_B33: affine matrices (last row 0, 0, 1).
        points_BN2: (x, y) in the matrices' source frame.

    Returns:
        (B, N, 2) in the target frame.
    """
    return points_BN2 @ matrix_B33[:, :2, :2].transpose(1, 2) + matrix_B33[:, None, :2, 2]


def sampling_grid(points: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Points (..., 2) in pixels as `grid_sample` takes them: -1 and 1 are the centres of the first and last pixel."""
    # Plain numbers: a tensor made of them here would be a copy from the host, for which a GPU's host waits.
    x, y = points.unbind(-1)
    return torch.stack([x * (2.0 / max(width - 1, 1)) - 1.0, y * (2.0 / max(height - 1, 1)) - 1.0], -1)


def transform_points(matrix: np.ndarray, points_N2: np.ndarray) -> np.ndarray:
    """Moves (N, 2) points by one affine (3, 3) matrix."""
    moved: np.ndarray = points_N2 @ matrix[:2, :2].T + matrix[:2, 2]
    return moved
