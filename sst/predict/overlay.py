"""Landmarks drawn on images pixel by pixel, fast enough for the frames of a video.

Colours are those of `sst.report.plots`; every eight landmarks the shape of the mark changes too.
"""

from collections.abc import Sequence

import cv2
import numpy as np

CORNERS = (24, 4, 3, 6, 5)
"""Corners of the marks: a round one, a diamond, a triangle, ..."""

_SHIFT = 4  # OpenCV draws to 1/16 of a pixel


def draw_landmarks(
    image_HW3: np.ndarray, points_K2: np.ndarray, visible_K: np.ndarray, labels: Sequence[str] | None = None
) -> np.ndarray:
    """The image with its visible landmarks and what they are called.

    Args:
        image_HW3: uint8 RGB; not changed.
        points_K2: pixels of the image.
        visible_K: which landmarks are drawn.
        labels: text beside each mark; None for the marks alone.

    Returns:
        uint8 RGB of the same shape.
    """
    image = np.ascontiguousarray(image_HW3).copy()
    side = min(image.shape[:2])
    radius = max(2.0, side / 110)
    height = max(0.35, side / 1100)  # of the letters, in OpenCV's unit
    for number in np.flatnonzero(visible_K).tolist():
        corners = CORNERS[number // len(COLOURS) % len(CORNERS)]
        angles = np.linspace(-np.pi / 2, 3 * np.pi / 2, corners, endpoint=False)
        outline = points_K2[number] + radius * np.column_stack([np.cos(angles), np.sin(angles)])
        polygon = [np.round(outline * 2**_SHIFT).astype(np.int32)]
        cv2.fillPoly(image, polygon, _rgb(number), cv2.LINE_AA, _SHIFT)
        cv2.polylines(image, polygon, True, (0, 0, 0), max(1, round(radius / 4)), cv2.LINE_AA, _SHIFT)
    if labels is not None:
        for number in np.flatnonzero(visible_K).tolist():
            x, y = np.round(points_K2[number] + [1.3 * radius, -0.6 * radius]).astype(int).tolist()
            thick = max(1, round(1.6 * height))
            for colour, width in (((0, 0, 0), thick + 2), ((255, 255, 255), thick)):
                cv2.putText(image, labels[number], (x, y), cv2.FONT_HERSHEY_SIMPLEX, height, colour, width, cv2.LINE_AA)
    return image


def _rgb(landmark: int) -> tuple[int, int, int]:
    code = COLOURS[landmark % len(COLOURS)]
    return int(code[1:3], 16), int(code[3:5], 16), int(code[5:7], 16)


COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#FFFFFF")
