"""First keypoints: where training starts, before any network has learnt anything.

A detector takes an image and returns points in its pixels and L2-normalised descriptors. The default, upright
RootSIFT, needs no download and beats SuperPoint on small crops (docs/method.md).
"""

from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

from sst.config import KeypointSettings

VIEW = 256
"""Side of the view that detectors see, in pixels; an image with context has the same scale."""


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
        most: at most this many points per image, the strongest first.
    """

    patch: float = 28.0
    most: int = 60
    descriptor_size: int = 128
    sees_view: bool = True

    def __call__(self, image_HW3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `KeypointDetector`."""
        sift = cv2.SIFT_create()  # type: ignore[attr-defined]
        grey = cv2.cvtColor(image_HW3, cv2.COLOR_RGB2GRAY)
        strongest = sorted(sift.detect(grey, None), key=lambda keypoint: -keypoint.response)
        # SIFT lists a place once per orientation and scale; upright descriptors of one size would be duplicates.
        places = dict.fromkeys((round(k.pt[0], 1), round(k.pt[1], 1)) for k in strongest)
        upright = [cv2.KeyPoint(x, y, self.patch, 0.0) for x, y in list(places)[: self.most]]
        if not upright:
            return np.zeros((0, 2), np.float32), np.zeros((0, self.descriptor_size), np.float32)
        upright, raw = sift.compute(grey, upright)
        points = np.array([keypoint.pt for keypoint in upright], np.float32).reshape(-1, 2)
        total = raw.sum(1, keepdims=True)
        described = total[:, 0] > 0
        return points[described], np.sqrt(raw[described] / total[described])


def generic_detector(settings: KeypointSettings) -> KeypointDetector:
    """The detector that the settings name.

    Raises:
        UserError: if SuperPoint's weights are not given or not usable.
    """
    if settings.detector == "rootsift":
        return RootSift(settings.patch, settings.most)
    from sst.train.superpoint import SuperPoint, load_superpoint

    own = settings.superpoint
    return SuperPoint(load_superpoint(own.weights), own.threshold, own.scales, own.half_side)
