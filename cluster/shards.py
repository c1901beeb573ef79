"""What correspondence keeps of one image shard: its descriptors and its labels, in the shard's sample order.

Points are (x, y) on the heatmap grid of the un-augmented view, float32 with sub-cell precision.
"""

from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
import torch

from cluster import storage

T = TypeVar("T")


def _check_offsets(offsets: np.ndarray, count: int, what: str) -> None:
    if offsets.ndim != 1 or len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != count:
        raise ValueError(f"{what}: offsets must run from 0 to {count}")
    if np.any(np.diff(offsets) < 0):
        raise ValueError(f"{what}: offsets must not decrease")


def widened(descriptors_ND: np.ndarray) -> np.ndarray:
    """Descriptors as float32, not to be written to; torch widens float16 sixteen times as fast as NumPy does."""
    return torch.from_numpy(np.require(descriptors_ND, requirements=("C", "W"))).float().numpy()


@dataclass(frozen=True)
class Descriptors:
    """Keypoints of a shard's S images and their descriptors.

    Attributes:
        offsets: int64 (S+1,): image i owns rows offsets[i]:offsets[i+1].
        points: float32 (N, 2).
        descriptors: float16 (N, D), L2-normalised, never a zero or NaN row.
    """

    offsets: np.ndarray
    points: np.ndarray
    descriptors: np.ndarray

    def __post_init__(self) -> None:
        _check_offsets(self.offsets, len(self.points), "descriptor shard")
        if self.points.ndim != 2 or self.points.shape[1] != 2 or self.descriptors.ndim != 2:
            raise ValueError("descriptor shard: points must be (N, 2) and descriptors (N, D)")
        if len(self.points) != len(self.descriptors):
            raise ValueError("descriptor shard: as many points as descriptors are needed")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Points (n, 2) and float32 descriptors (n, D) of image `index`."""
        rows = slice(self.offsets[index], self.offsets[index + 1])
        return self.points[rows], widened(self.descriptors[rows])

    def keep(self, mask_N: np.ndarray) -> "Descriptors":
        """The same shard with only the rows where `mask_N` is true."""
        kept = np.concatenate([[0], np.cumsum(mask_N)])
        return Descriptors(kept[self.offsets].astype(np.int64), self.points[mask_N], self.descriptors[mask_N])

    def save(self, url: str) -> None:
        """Writes the shard as npz."""
        storage.save_npz(url, offsets=self.offsets, points=self.points, descriptors=self.descriptors)

    @classmethod
    def load(cls, url: str) -> Self:
        """Reads a shard written by `save`.

        Raises:
            ValueError: if the file is damaged or of another kind; the message names it.
        """
        return _load(cls, url, ("offsets", "points", "descriptors"))


@dataclass(frozen=True)
class Labels:
    """Labelled points of a shard's S images: at most one point per cluster and image.

    Attributes:
        offsets: int64 (S+1,).
        points: float32 (N, 2).
        cluster: int16 (N,).
        distance: float32 (N,): squared L2 distance of the descriptor to its centroid.
    """

    offsets: np.ndarray
    points: np.ndarray
    cluster: np.ndarray
    distance: np.ndarray

    def __post_init__(self) -> None:
        _check_offsets(self.offsets, len(self.points), "label shard")
        if not len(self.points) == len(self.cluster) == len(self.distance):
            raise ValueError("label shard: points, cluster and distance must be equally long")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Points (n, 2) and clusters (n,) of image `index`."""
        rows = slice(self.offsets[index], self.offsets[index + 1])
        return self.points[rows], self.cluster[rows]

    def keep(self, mask_N: np.ndarray) -> "Labels":
        """The same shard with only the rows where `mask_N` is true."""
        kept = np.concatenate([[0], np.cumsum(mask_N)])
        offsets = kept[self.offsets].astype(np.int64)
        return Labels(offsets, self.points[mask_N], self.cluster[mask_N], self.distance[mask_N])

    def below(self, threshold_K: np.ndarray) -> "Labels":
        """The labels whose distance is below their cluster's threshold (paper, section 3.2)."""
        return self.keep(self.distance < threshold_K[self.cluster])

    def save(self, url: str) -> None:
        """Writes the shard as npz."""
        storage.save_npz(url, offsets=self.offsets, points=self.points, cluster=self.cluster, distance=self.distance)

    @classmethod
    def load(cls, url: str) -> Self:
        """Reads a shard written by `save`.

        Raises:
            ValueError: if the file is damaged or of another kind; the message names it.
        """
        return _load(cls, url, ("offsets", "points", "cluster", "distance"))


def _load(cls: type[T], url: str, names: tuple[str, ...]) -> T:
    arrays = storage.load_npz(url)
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ValueError(f"{url}: arrays {missing} are missing, so this is no {cls.__name__} shard")
    try:
        fields: dict[str, Any] = {name: arrays[name] for name in names}
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{url}: {error}") from error
