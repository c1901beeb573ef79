"""First keypoints: where training starts, before any network has learnt anything.

A detector takes images and returns points in their pixels and L2-normalised descriptors. The default, upright
RootSIFT, needs no download and beats SuperPoint on small crops (docs/method.md). Others take a network that somebody
trained (`sst.train.superpoint`, `sst.train.features`), on a GPU where this process has one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import cv2
import numpy as np

from sst.config import KeypointSettings
from sst.nn.geometry import STRIDE

VIEW = 256
"""Side of the view that detectors see, in pixels; an image with context has the same scale."""


DESCRIBED_OCTAVE = 1
"""Octave of SIFT's pyramid in which descriptors are read: the image at half its size. So large a patch has 88,000
pixels at full size, which takes seven times as long (34 ms of a core an image instead of 5) and tells no more: on faces
the first labels are off by 16.3 instead of 17.5 % of the eye distance in the median, 17.5 instead of 17.6 in the
mean."""

Keypoints = tuple[np.ndarray, np.ndarray]
"""Of one image: points float32 (N, 2) in its pixels, and descriptors float32 (N, D) of unit length; N may be 0."""


class KeypointDetector(Protocol):
    """Finds and describes generic keypoints: one function from images to points with descriptors."""

    @property
    def descriptor_size(self) -> int:
        """Width D of the descriptors."""
        ...

    @property
    def sees_view(self) -> bool:
        """Whether it is shown the box stretched to `VIEW` pixels, or else the stored image as it is."""
        ...

    def __call__(self, images: Sequence[np.ndarray]) -> list[Keypoints]:
        """Detects keypoints.

        Args:
            images: uint8 RGB (H, W, 3), sides of at least 8 px; of one size where it sees views.

        Returns:
            The keypoints of each.
        """
        ...


def apart(points: Sequence[tuple[float, float]], cell: float) -> list[int]:
    """Numbers of the points that no earlier one suppresses: those in neighbouring cells do.

    Args:
        points: (x, y), the strongest first.
        cell: side of a cell, in the points' unit.
    """
    taken: set[tuple[int, int]] = set()
    kept = []
    for number, (x, y) in enumerate(points):
        column, row = round(x / cell), round(y / cell)
        if taken.isdisjoint(product(range(column - 1, column + 2), range(row - 1, row + 2))):
            taken.add((column, row))
            kept.append(number)
    return kept


@dataclass(frozen=True)
class RootSift:
    """SIFT points with upright RootSIFT descriptors of one size.

    SIFT's own orientation and scale make descriptors of one object part on different images differ; for objects
    that stand mostly upright both are better fixed (Arandjelovic and Zisserman 2012 for the root).

    Attributes:
        patch: keypoint size in pixels of the view, which sets the described area.
        cell: side in pixels of the view of a cell of the network's heatmap: points in neighbouring cells suppress each
            other, the stronger one stays.
        max_num_keypoints: at most this many points per image, the strongest first.
    """

    patch: float = 28.0
    cell: float = 4.0
    max_num_keypoints: int = 60
    descriptor_size: int = 128
    sees_view: bool = True

    def __call__(self, images: Sequence[np.ndarray]) -> list[Keypoints]:
        """See `KeypointDetector`."""
        return [self._described(image) for image in images]

    def points(self, image_HW3: np.ndarray) -> np.ndarray:
        """The points alone, float32 (N, 2), the strongest first."""
        _, _, points = self._found(image_HW3)
        return np.array(points, np.float32).reshape(-1, 2)

    def _found(self, image_HW3: np.ndarray) -> tuple[cv2.SIFT, np.ndarray, list[tuple[float, float]]]:
        """SIFT, the grey image, and the strongest points apart from each other. SIFT lists a place repeatedly."""
        # Without the precise way all points lie a quarter of a pixel too far right and down.
        sift = cv2.SIFT_create(enable_precise_upscale=True)  # type: ignore[attr-defined]
        grey = cv2.cvtColor(image_HW3, cv2.COLOR_RGB2GRAY)
        strongest = sorted(sift.detect(grey, None), key=lambda keypoint: -keypoint.response)
        points = [(keypoint.pt[0], keypoint.pt[1]) for keypoint in strongest]
        return sift, grey, [points[number] for number in apart(points, self.cell)[: self.max_num_keypoints]]

    def _described(self, image_HW3: np.ndarray) -> Keypoints:
        sift, grey, found = self._found(image_HW3)
        if not found:
            return np.zeros((0, 2), np.float32), np.zeros((0, self.descriptor_size), np.float32)
        upright, raw = sift.compute(
            grey, [cv2.KeyPoint(x, y, self.patch, 0.0, 0.0, DESCRIBED_OCTAVE) for x, y in found]
        )
        points = np.array([keypoint.pt for keypoint in upright], np.float32).reshape(-1, 2)
        total = raw.sum(1, keepdims=True)
        described = total[:, 0] > 0
        return points[described], np.sqrt(raw[described] / total[described])


def generic_detector(settings: KeypointSettings, input_size: int) -> KeypointDetector:
    """The detector that the settings name.

    Args:
        settings: which one.
        input_size: side of the network's view, which sets how near to each other first keypoints may lie.

    Raises:
        UserError: if the weights or the model that it needs are not given or not usable.
    """
    points = RootSift(settings.patch, STRIDE * VIEW / input_size, settings.max_num_keypoints)
    if settings.detector == "rootsift":
        return points
    if settings.detector == "superpoint":
        from sst.train.superpoint import SuperPoint, load_superpoint

        each = settings.superpoint
        return SuperPoint(load_superpoint(each.weights), each.threshold, each.scales, each.nms_radius)
    from sst.train.features import load_features

    return load_features(settings, points)
