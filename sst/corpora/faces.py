"""Boxes of faces, by the published rules.

Boxes are x0, y0, x1, y1 in pixels of the image. Source of the rules: Mallis et al. 2020, published code.
"""

import numpy as np

from sst.corpora.annotations import Box

_SIDE, _UP, _DOWN = 1.1, 1.6, 1.2
"""Reach of a face in distances from the middle of the eyes to the middle of the mouth."""
_TURN = 1.5
"""How far a turned head reaches behind the middle of eyes and mouth, as a multiple of the nose's reach before it.

These numbers are medians and a regression over 4,227 video frames of 347 people with 68 points (YouTube Faces), of the
box that `extent_box` gives; on these the two boxes' median overlap (intersection over union) is 0.87."""


def grown_box(box: Box, width: int, height: int) -> Box:
    """The box with its margin, in whole pixels of the image: what is stretched to the view.

    The margin is m = int(8 d / 100), or 8 where d < 20, with d = ((1.2 x1 - x0) + (2 y1 - y0)) / 2.

    Args:
        box: of the face.
        width: of the image.
        height: of the image.

    Returns:
        The box; without area where the face lies outside of the image.
    """
    x0, y0, x1, y1 = box
    scale = 0.5 * ((1.2 * x1 - x0) + (2.0 * y1 - y0))
    margin = 8 if scale < 20 else int(8 * scale / 100)
    return (
        float(int(max(x0 - margin, 0))),
        float(int(max(y0 - margin, 0))),
        float(int(min(x1 + margin, width - 1))),
        float(int(min(y1 + margin, height - 1))),
    )


def extent_box(points_L2: np.ndarray) -> Box:
    """The extent of the annotated points in whole pixels, its top raised by a third of its height."""
    x0, y0 = (int(value) for value in points_L2.min(axis=0))
    x1, y1 = (int(value) for value in points_L2.max(axis=0))
    return float(x0), y0 - (y1 - y0) / 3, float(x1), float(y1)


def box_of_five(points_52: np.ndarray) -> Box:
    """A face's box from its eyes, nose tip and mouth corners, in that order.

    It is about what `extent_box` would give. Eyes and mouth set the scale, as their distance changes least when a
    head is turned sideways.
    """
    eyes, nose, mouth = points_52[:2].mean(axis=0), points_52[2], points_52[3:].mean(axis=0)
    unit = float(np.linalg.norm(eyes - mouth))
    x, y = (float(value) for value in (eyes + mouth) / 2)
    x -= _TURN * (float(nose[0]) - x)
    return x - _SIDE * unit, y - _UP * unit, x + _SIDE * unit, y + _DOWN * unit
