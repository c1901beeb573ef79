"""First keypoints: where training starts, before any network has learnt anything.

A detector takes an image and returns points in its pixels and L2-normalised descriptors. The default, upright
RootSIFT, needs no download and beats SuperPoint on small crops (docs/method.md).
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


class KeypointDetector(Protocol):
    """Finds and describes generic keypoints."""

    @property
    def descriptor_size(self) -> int:
        """Width D of the descriptors."""
        ...

    @property
    def sees_view(self) -> bool:
        """Whether it is shown the box stretched to `VIEW` pixels, or else the stored image as it is."""
        ...

    def __call__(self, image_HW3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Detects keypoints.

        Args:
            image_HW3: uint8 RGB, sides of at least 8 px.

        Returns:
            Points float32 (N, 2), pixels of the image, and descriptors float32 (N, D) of unit length; N may be 0.
        """
        ...


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

    def __call__(self, image_HW3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `KeypointDetector`."""
        # Without the precise way all points lie a quarter of a pixel too far right and down.
        sift = cv2.SIFT_create(enable_precise_upscale=True)  # type: ignore[attr-defined]
        grey = cv2.cvtColor(image_HW3, cv2.COLOR_RGB2GRAY)
        strongest = sorted(sift.detect(grey, None), key=lambda keypoint: -keypoint.response)
        kept = self._apart(strongest)[: self.max_num_keypoints]
        upright = [cv2.KeyPoint(k.pt[0], k.pt[1], self.patch, 0.0, 0.0, DESCRIBED_OCTAVE) for k in kept]
        if not upright:
            return np.zeros((0, 2), np.float32), np.zeros((0, self.descriptor_size), np.float32)
        upright, raw = sift.compute(grey, upright)
        points = np.array([keypoint.pt for keypoint in upright], np.float32).reshape(-1, 2)
        total = raw.sum(1, keepdims=True)
        described = total[:, 0] > 0
        return points[described], np.sqrt(raw[described] / total[described])

    def _apart(self, strongest: Sequence[cv2.KeyPoint]) -> list[cv2.KeyPoint]:
        """Those that no stronger one suppresses. SIFT also lists a place once per orientation and scale."""
        taken: set[tuple[int, int]] = set()
        kept = []
        for keypoint in strongest:
            column, row = round(keypoint.pt[0] / self.cell), round(keypoint.pt[1] / self.cell)
            if taken.isdisjoint(product(range(column - 1, column + 2), range(row - 1, row + 2))):
                taken.add((column, row))
                kept.append(keypoint)
        return kept


def generic_detector(settings: KeypointSettings, input_size: int) -> KeypointDetector:
    """The detector that the settings name.

    Args:
        settings: which one.
        input_size: side of the network's view, which sets how near to each other first keypoints may lie.

    Raises:
        UserError: if SuperPoint's weights are not given or not usable.
    """
    if settings.detector == "rootsift":
        return RootSift(settings.patch, STRIDE * VIEW / input_size, settings.max_num_keypoints)
    from sst.train.superpoint import SuperPoint, load_superpoint

    each = settings.superpoint
    return SuperPoint(load_superpoint(each.weights), each.threshold, each.scales, each.nms_radius)
