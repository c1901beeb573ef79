"""Pictures from arrays, touching no global state: images in a grid, and charts.

Images are put together pixel by pixel: a figure with an axis for each of a thousand of them would take a minute.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sst.predict.overlay import draw_cross, draw_landmarks, draw_points

GAP = 8
"""White pixels between the images of a grid."""

MAGNIFIED = 2
"""Pixels of a gallery for one of the view."""

LINE_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#000000")
DASHES = ("-", "--", ":", "-.")


def grid(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Images of one size beside and below each other on white.

    Args:
        images: uint8 (H, W, 3) each.
        columns: images beside each other, where there are so many.

    Returns:
        uint8 RGB.
    """
    height, width, _ = images[0].shape
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + GAP), number % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = image
    return sheet


def landmark_grid(
    images_NHW3: np.ndarray, points_NK2: np.ndarray, visible_NK: np.ndarray, columns: int = 6
) -> np.ndarray:
    """Visible landmarks on each image.

    Args:
        images_NHW3: uint8 images.
        points_NK2: pixels of the images.
        visible_NK: which landmarks are drawn.
        columns: images beside each other.
    """
    names = [str(number) for number in range(points_NK2.shape[1])]
    drawn = zip(images_NHW3, points_NK2, visible_NK, strict=True)
    return grid([draw_landmarks(image, points, visible, names) for image, points, visible in drawn], columns)


def label_grid(images: Sequence[np.ndarray], labels: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Labelled points on each image.

    Args:
        images: uint8 (H, W, 3) each.
        labels: per image points (n, 2) in its pixels, and clusters (n,).
    """
    return grid(
        [
            draw_points(image, points, cluster.tolist(), [str(number) for number in cluster])
            for image, (points, cluster) in zip(images, labels, strict=True)
        ],
        4,
    )


def cluster_gallery(crops_NHW3: np.ndarray, marks_N2: np.ndarray) -> np.ndarray:
    """Crops around one landmark, magnified, with its place marked by a cross.

    Args:
        crops_NHW3: uint8, at most 64.
        marks_N2: pixels of the crops.
    """
    height, width = (MAGNIFIED * side for side in crops_NHW3.shape[1:3])
    marked = [
        # Centres of pixels are whole numbers, so magnifying moves the first centre too.
        draw_cross(cv2.resize(crop, (width, height)), MAGNIFIED * mark + (MAGNIFIED - 1) / 2)
        for crop, mark in zip(crops_NHW3, marks_N2, strict=True)
    ]
    return grid(marked, 8)


def before_after(
    images_NHW3: np.ndarray,
    first: Sequence[tuple[np.ndarray, np.ndarray]],
    points_NK2: np.ndarray,
    visible_NK: np.ndarray,
) -> np.ndarray:
    """First keypoints above, trained landmarks below, on the same images.

    Args:
        images_NHW3: uint8 images.
        first: per image the first labels' points (n, 2) and clusters (n,).
        points_NK2: landmarks, pixels of the images.
        visible_NK: which landmarks are drawn.
    """
    above = [
        draw_points(image, points, cluster.tolist())
        for image, (points, cluster) in zip(images_NHW3, first, strict=True)
    ]
    drawn = zip(images_NHW3, points_NK2, visible_NK, strict=True)
    return grid([*above, *(draw_landmarks(*each) for each in drawn)], len(above))


def error_curves(forward_L: np.ndarray, backward_K: np.ndarray, protocol: str) -> Figure:
    """Cumulative mean errors, best landmark first, in per cent."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    panels = zip(
        figure.subplots(1, 2),
        (("forward", "annotated points", forward_L), ("backward", "discovered landmarks", backward_K)),
        strict=True,
    )
    for axis, (name, what, curve) in panels:
        axis.plot(np.arange(1, len(curve) + 1), 100 * curve, color="#0072B2", linewidth=2)
        axis.set_title(f"{name}: {100 * curve[-1]:.2f} % ({protocol})", fontsize=9)
        axis.set_xlabel(f"{what}, best first", fontsize=8)
        axis.set_ylabel("mean error, %", fontsize=8)
        axis.set_ylim(bottom=0)
        _tidy(axis)
    return figure


PANELS = {
    "labels_per_image": "labels per image",
    "clusters_in_use": "clusters in use",
    "label_persistence": "share of labels that persist",
    "inertia": "k-means inertia",
    "equivariance_error": "equivariance error, % of the view",
}
"""Round figures that are drawn, and what they are called."""


def round_statistics(rounds: Sequence[dict[str, Any]]) -> Figure:
    """Label-free figures over rounds; a round that lacks a figure has no point.

    Args:
        rounds: each with "round" and any of `PANELS`.
    """
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = list(figure.subplots(2, 3).flat)
    for axis, (key, name) in zip(axes, PANELS.items(), strict=False):
        x = [entry["round"] for entry in rounds if key in entry]
        axis.plot(x, [entry[key] for entry in rounds if key in entry], "o-", color="#0072B2", markersize=4)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("round", fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlim(-0.5, max([entry["round"] for entry in rounds], default=0) + 0.5)
        _tidy(axis)
    for axis in axes[len(PANELS) :]:
        axis.set_axis_off()
    return figure


def curves(panels: Mapping[str, Sequence[tuple[str, Sequence[float], Sequence[float]]]]) -> Figure:
    """Curves of many runs laid over each other, with one legend for all panels.

    Args:
        panels: title to (label, x, y) of each curve; a label has the same colour and dashes in all panels.
    """
    labels = list(dict.fromkeys(label for lines in panels.values() for label, _, _ in lines))
    legend_rows = -(-len(labels) // 3)
    rows = max(1, -(-len(panels) // 3))
    figure = Figure(figsize=(11, 2.6 * rows + 0.2 * legend_rows), layout="constrained")
    axes = list(figure.subplots(rows, 3, squeeze=False).flat)
    for axis in axes[len(panels) :]:
        axis.remove()
    drawn: dict[str, Any] = {}
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for label, x, y in lines:
            number = labels.index(label)
            look = {
                "color": LINE_COLOURS[number % len(LINE_COLOURS)],
                "linestyle": DASHES[number // len(LINE_COLOURS) % len(DASHES)],
            }
            (drawn[label],) = axis.plot(x, y, marker="o" if len(x) < 30 else "", markersize=3, linewidth=1.3, **look)
        axis.set_title(title, fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        _tidy(axis)
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _tidy(axis: Axes) -> None:
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
