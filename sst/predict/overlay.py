"""Landmarks drawn on images pixel by pixel, fast enough for the frames of a video: in predictions and in reports.

Every landmark has a colour and a number; the colours are Okabe and Ito's, safe for colour-blind readers, and repeat
with another shape of the mark.
"""

from collections.abc import Sequence

import cv2
import numpy as np

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#FFFFFF")

SHAPES = ((24, 0), (4, 45), (4, 0), (3, 0), (3, 180), (3, 270), (3, 90), (5, 0), (6, 30), (5, 36))
"""Corners of the marks, and degrees by which they are turned: round, square, diamond, triangles, ..."""

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
    shown = np.flatnonzero(visible_K).tolist()
    called = None if labels is None else [labels[number] for number in shown]
    return draw_points(image_HW3, points_K2[shown], shown, called)


def draw_points(
    image_HW3: np.ndarray, points_N2: np.ndarray, numbers: Sequence[int], labels: Sequence[str] | None = None
) -> np.ndarray:
    """The image with points, each in the look of its landmark or cluster.

    Args:
        image_HW3: uint8 RGB; not changed.
        points_N2: pixels of the image.
        numbers: which landmark or cluster each is.
        labels: text beside each mark; None for the marks alone.

    Returns:
        uint8 RGB of the same shape.
    """
    image = np.ascontiguousarray(image_HW3).copy()
    side = min(image.shape[:2])
    radius = max(2.0, side / 110, min(4.5, side / 48))
    height = max(0.4, side / 1100)  # of the letters, in OpenCV's unit
    for point, number in zip(points_N2, numbers, strict=True):
        colour, corners, turn = look(number)
        angles = np.linspace(0, 2 * np.pi, corners, endpoint=False) + np.deg2rad(turn - 90)
        outline = point + radius * np.column_stack([np.cos(angles), np.sin(angles)])
        polygon = [np.round(outline * 2**_SHIFT).astype(np.int32)]
        cv2.fillPoly(image, polygon, _rgb(colour), cv2.LINE_AA, _SHIFT)
        cv2.polylines(image, polygon, True, (0, 0, 0), max(1, round(radius / 4)), cv2.LINE_AA, _SHIFT)
    thick = max(1, round(1.6 * height))
    for point, text in zip(points_N2, labels or (), strict=labels is not None):
        x, y = np.round(point + [1.3 * radius, -0.6 * radius]).astype(int).tolist()
        for shade, width in (((0, 0, 0), thick + 2), ((255, 255, 255), thick)):
            cv2.putText(image, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, height, shade, width, cv2.LINE_AA)
    return image


def draw_cross(image_HW3: np.ndarray, point: np.ndarray) -> np.ndarray:
    """The image with a yellow cross of a fifth of its side, centred on a point (x, y) in its pixels."""
    image, half = np.ascontiguousarray(image_HW3).copy(), min(image_HW3.shape[:2]) / 10
    for shade, width in (((0, 0, 0), 5), (_rgb(COLOURS[3]), 2)):
        for arm in (np.array([half, 0.0]), np.array([0.0, half])):
            ends = [np.round((point + side * arm) * 2**_SHIFT).astype(int).tolist() for side in (-1, 1)]
            cv2.line(image, ends[0], ends[1], shade, width, cv2.LINE_AA, _SHIFT)
    return image


def look(number: int) -> tuple[str, int, int]:
    """Colour, corners and turn of a landmark's mark, the same in every picture."""
    return (COLOURS[number % len(COLOURS)], *SHAPES[number // len(COLOURS) % len(SHAPES)])


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
