"""Pictures from arrays: each function draws one figure and returns it, touching no global state.

Every landmark has a colour and a number; the colours are Okabe and Ito's, safe for colour-blind readers, and
repeat with another marker shape.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sst.predict.overlay import COLOURS

MARKERS = "osD^v<>phX"
LINE_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#000000")
DASHES = ("-", "--", ":", "-.")


def style(landmark: int) -> dict[str, Any]:
    """Colour and marker of a landmark, the same in every picture."""
    return {
        "color": COLOURS[landmark % len(COLOURS)],
        "marker": MARKERS[landmark // len(COLOURS) % len(MARKERS)],
        "markeredgecolor": "black",
        "markeredgewidth": 0.6,
        "linestyle": "none",
    }


def _grid(count: int, columns: int, side: float = 2.0) -> tuple[Figure, list[Axes]]:
    columns = max(1, min(columns, count))
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(side * columns, side * rows), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(rows, columns)).flat)
    for axis in axes:
        axis.set_axis_off()
    return figure, axes


def _show(axis: Axes, image_HW3: np.ndarray) -> None:
    axis.imshow(image_HW3)
    axis.set_autoscale_on(False)  # else a landmark outside the image would shrink it


def _draw_points(axis: Axes, points_K2: np.ndarray, numbers: Sequence[int], named: bool) -> None:
    for (x, y), number in zip(points_K2, numbers, strict=True):
        axis.plot(x, y, markersize=5, **style(number))
        if named:
            axis.annotate(
                str(number), (x, y), (3, 3), textcoords="offset points", fontsize=5, color="white",
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "black", "alpha": 0.55, "linewidth": 0},
            )  # fmt: skip


def landmark_grid(images_NHW3: np.ndarray, points_NK2: np.ndarray, visible_NK: np.ndarray, columns: int = 6) -> Figure:
    """Visible landmarks on each image.

    Args:
        images_NHW3: uint8 images.
        points_NK2: pixels of the images.
        visible_NK: which landmarks are drawn.
        columns: images beside each other.
    """
    figure, axes = _grid(len(images_NHW3), columns)
    for axis, image, points, visible in zip(axes, images_NHW3, points_NK2, visible_NK, strict=False):
        _show(axis, image)
        _draw_points(axis, points[visible], np.flatnonzero(visible).tolist(), named=True)
    return figure


def label_grid(images: Sequence[np.ndarray], labels: Sequence[tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Labelled points on each image.

    Args:
        images: uint8 (H, W, 3) each.
        labels: per image points (n, 2) in its pixels, and clusters (n,).
    """
    figure, axes = _grid(len(images), 4)
    for axis, image, (points, cluster) in zip(axes, images, labels, strict=False):
        _show(axis, image)
        _draw_points(axis, points, cluster.tolist(), named=True)
    return figure


def cluster_gallery(crops_NHW3: np.ndarray, marks_N2: np.ndarray, title: str) -> Figure:
    """Crops around one landmark with its place marked by a cross.

    Args:
        crops_NHW3: uint8, at most 64.
        marks_N2: pixels of the crops.
        title: heading.
    """
    figure, axes = _grid(len(crops_NHW3), 8, side=0.9)
    figure.suptitle(title, fontsize=10)
    for axis, crop, (x, y) in zip(axes, crops_NHW3, marks_N2, strict=False):
        _show(axis, crop)
        for colour, width in (("black", 2.4), ("#F0E442", 1.2)):
            axis.plot(x, y, marker="+", markersize=9, color=colour, markeredgewidth=width)
    return figure


def before_after(
    images_NHW3: np.ndarray,
    first: Sequence[tuple[np.ndarray, np.ndarray]],
    points_NK2: np.ndarray,
    visible_NK: np.ndarray,
) -> Figure:
    """First keypoints above, trained landmarks below, on the same images.

    Args:
        images_NHW3: uint8 images.
        first: per image the first labels' points (n, 2) and clusters (n,).
        points_NK2: landmarks, pixels of the images.
        visible_NK: which landmarks are drawn.
    """
    count = len(images_NHW3)
    figure, axes = _grid(2 * count, count)
    for column, image in enumerate(images_NHW3):
        upper, lower = axes[column], axes[count + column]
        _show(upper, image)
        _show(lower, image)
        _draw_points(upper, first[column][0], first[column][1].tolist(), named=False)
        _draw_points(lower, points_NK2[column][visible_NK[column]], np.flatnonzero(visible_NK[column]).tolist(), False)
    axes[0].set_title("first keypoints", fontsize=9, loc="left")
    axes[count].set_title("trained landmarks", fontsize=9, loc="left")
    return figure


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
