"""Shapes in common coordinates: affine maps between sets of points, and the mean shape."""

import numpy as np

VIEW = 256.0


STIFFNESS = 20.0
"""Pull of the affine map towards none, in sureties of one landmark; it matters where few landmarks are visible."""


ALIGNMENTS = 5
"""Times that the mean shape is found again."""


def affine_maps(
    points_NK2: np.ndarray, surety_NK: np.ndarray, shape_K2: np.ndarray, stiffness: float = STIFFNESS
) -> np.ndarray:
    """The affine map of each image that lays its landmarks onto the shape best (weighted least squares).

    The linear part is drawn towards the identity, so that it is defined for any number of visible landmarks.

    Returns:
        float64 (N, 3, 2): (x, y, 1) of the image times this gives the place on the shape.
    """
    maps = np.zeros((len(points_NK2), 3, 2))
    for number, (points, surety) in enumerate(zip(points_NK2.astype(np.float64), surety_NK, strict=True)):
        total = max(surety.sum(), 1e-9)
        centre = surety @ points / total if surety.any() else np.full(2, VIEW / 2)
        target = surety @ shape_K2 / total if surety.any() else centre
        each, aim = points - centre, shape_K2 - target
        spread = stiffness * (VIEW / 8) ** 2
        gram = each.T @ (surety[:, None] * each) + spread * np.eye(2)
        linear = np.linalg.solve(gram, each.T @ (surety[:, None] * aim) + spread * np.eye(2))
        maps[number] = np.vstack([linear, target - centre @ linear])
    return maps


def lay_on(maps_N32: np.ndarray, points_NX2: np.ndarray) -> np.ndarray:
    """Points of the images on the shape, by their maps."""
    return np.asarray(points_NX2 @ maps_N32[:, :2] + maps_N32[:, 2:])


def _map_back(maps_N32: np.ndarray, places_NX2: np.ndarray) -> np.ndarray:
    return np.asarray((places_NX2 - maps_N32[:, 2:]) @ np.linalg.inv(maps_N32[:, :2]))


def left_over(maps_N32: np.ndarray, points_NK2: np.ndarray, surety_NK: np.ndarray, shape_K2: np.ndarray) -> np.ndarray:
    """What the maps leave between landmarks and shape, by surety: float64 (N, 2K), 0 for an unseen landmark."""
    off = (lay_on(maps_N32, points_NK2) - shape_K2) * np.minimum(1.0, 2 * surety_NK)[..., None]
    return np.asarray(off.reshape(len(points_NK2), -1))


def mean_shape(points_NK2: np.ndarray, surety_NK: np.ndarray, stiffness: float = STIFFNESS) -> np.ndarray:
    """Mean place of every landmark after all images are laid onto each other; (K, 2)."""
    total = surety_NK.sum(0)

    def mean(points: np.ndarray) -> np.ndarray:
        summed = (points * surety_NK[..., None]).sum(0)
        return np.where(total[:, None] > 0, summed / np.maximum(total, 1e-9)[:, None], VIEW / 2)

    shape = mean(points_NK2.astype(np.float64))
    for _ in range(ALIGNMENTS):
        shape = mean(lay_on(affine_maps(points_NK2, surety_NK, shape, stiffness), points_NK2))
    return shape
