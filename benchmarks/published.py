"""A straightforward rendition of the published input pipeline: sample by sample, on the CPU, by OpenCV and NumPy.

Written from the method's description (Mallis et al. 2020, supplementary material) and from what the published training
takes for an example: two views (decode, resize, blur, contrast, noise, brightness, hue and saturation, one warp of
image and points), a target of each, for which every point is drawn on a map of its own, and a table of the pairs of
points between the views whose clusters occur in both, gathered point by point. `benchmarks.input` compares it with
ours.
"""

import cv2
import numpy as np

from sst.nn.augment import Augmentation

MAX_PAIRS = 3_000
"""Rows of the table of pairs."""


def view(jpeg: bytes, size: int) -> np.ndarray:
    """The image, float32 RGB in [0, 1]."""
    image = cv2.cvtColor(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    return cv2.resize(image, (size, size)).astype(np.float32) / 255


def augmented(
    image: np.ndarray, points_N3: np.ndarray, given: Augmentation, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One random view of an image and its points (x, y, cluster), in pixels."""
    size = image.shape[0]
    if rng.random() < given.blur_probability:
        image = cv2.GaussianBlur(image, (5, 5), max(1e-3, rng.uniform(0, given.blur_sigma)))
    image = (image - 0.5) * rng.uniform(*given.contrast) + 0.5
    if rng.random() < given.noise_probability:
        image = image + rng.normal(0, rng.uniform(0, given.noise) + 1e-9, image.shape)
    per_channel = rng.random() < given.brightness_per_channel
    factor = rng.uniform(*given.brightness, 3) if per_channel else rng.uniform(*given.brightness)
    image = np.clip(image * factor, 0, 1).astype(np.float32)
    if rng.random() < given.colour_probability:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = hsv[..., 0] * rng.uniform(*given.colour) % 360
        hsv[..., 1] = np.clip(hsv[..., 1] * rng.uniform(*given.colour), 0, 1)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    angle = np.deg2rad(rng.uniform(-given.rotation, given.rotation))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = turn * rng.uniform(*given.scale, 2)
    centre = np.full(2, (size - 1) / 2)
    shift = centre + rng.uniform(-given.shift, given.shift, 2) * size - linear @ centre
    moved = np.column_stack([points_N3[:, :2] @ linear.T + shift, points_N3[:, 2:]])
    return cv2.warpAffine(image, np.column_stack([linear, shift]), (size, size)), moved


def drawn_target(points_N3: np.ndarray, side: int) -> np.ndarray:
    """1 in the cell of every point (heatmap units): the largest of as many maps as there are points."""
    maps = np.zeros((len(points_N3), side, side), np.float32)
    for each, (x, y, _) in zip(maps, points_N3, strict=True):
        if 0 <= x < side and 0 <= y < side:
            each[int(y), int(x)] = 1
    return maps.max(axis=0)


def pair_table(first_N3: np.ndarray, second_M3: np.ndarray, side: int) -> np.ndarray:
    """The pairs of points (x1, y1, x2, y2, 1 for the same cluster) inside both heatmaps; unused rows are -1."""
    table, count = -np.ones((MAX_PAIRS, 5)), 0

    def inside(point: np.ndarray) -> bool:
        return not ((point < 0).any() or (point > side - 1).any())

    for same in (True, False):
        for one in first_N3:
            if one[2] not in second_M3[:, 2]:
                continue
            for other in second_M3[(second_M3[:, 2] == one[2]) == same]:
                shared = other[2] in first_N3[:, 2]
                if shared and inside(one[:2]) and inside(other[:2]) and count < MAX_PAIRS:
                    table[count] = *one[:2], *other[:2], same
                    count += 1
    return table


def stage1_pair(
    jpegs: tuple[bytes, bytes],
    points: tuple[np.ndarray, np.ndarray],
    size: int,
    given: Augmentation,
    rng: np.random.Generator,
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """A training example of stage 1: two views, their targets, and the table of pairs; points (x, y, cluster)."""
    seen = [augmented(view(jpeg, size), each, given, rng) for jpeg, each in zip(jpegs, points, strict=True)]
    cells = [np.column_stack([np.round(moved[:, :2] / 4), moved[:, 2]]) for _, moved in seen]
    views = [np.ascontiguousarray(image.transpose(2, 0, 1)) for image, _ in seen]
    return views, [drawn_target(each, size // 4) for each in cells], pair_table(*cells, size // 4)
