"""A straightforward rendition of the published input pipeline: sample by sample, on the CPU, by OpenCV and NumPy.

Written from the method's description (Mallis et al. 2020, supplementary material): decode, resize, blur, contrast,
noise, brightness, hue and saturation, one warp of image and points, and the targets drawn point by point.
`benchmarks.input` compares it with ours.
"""

import cv2
import numpy as np

from sst.augment import Augmentation


def view(jpeg: bytes, size: int) -> np.ndarray:
    """The image, float32 RGB in [0, 1]."""
    image = cv2.cvtColor(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    return cv2.resize(image, (size, size)).astype(np.float32) / 255


def augmented(
    image: np.ndarray, points: list[tuple[float, float]], told: Augmentation, rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """One random view of an image and its points, in pixels."""
    size = image.shape[0]
    if rng.random() < told.blur_probability:
        image = cv2.GaussianBlur(image, (5, 5), max(1e-3, rng.uniform(0, told.blur_sigma)))
    image = (image - 0.5) * rng.uniform(*told.contrast) + 0.5
    if rng.random() < told.noise_probability:
        image = image + rng.normal(0, rng.uniform(0, told.noise) + 1e-9, image.shape)
    per_channel = rng.random() < told.brightness_per_channel
    factor = rng.uniform(*told.brightness, 3) if per_channel else rng.uniform(*told.brightness)
    image = np.clip(image * factor, 0, 1).astype(np.float32)
    if rng.random() < told.colour_probability:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = hsv[..., 0] * rng.uniform(*told.colour) % 360
        hsv[..., 1] = np.clip(hsv[..., 1] * rng.uniform(*told.colour), 0, 1)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    angle = np.deg2rad(rng.uniform(-told.rotation, told.rotation))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = turn * rng.uniform(*told.scale, 2)
    centre = np.full(2, (size - 1) / 2)
    shift = centre + rng.uniform(-told.shift, told.shift, 2) * size - linear @ centre
    moved = []
    for x, y in points:
        x, y = linear @ (x, y) + shift
        if 0 <= x < size and 0 <= y < size:
            moved.append((x, y))
    return cv2.warpAffine(image, np.column_stack([linear, shift]), (size, size)), moved


def cell_target(points: list[tuple[float, float]], size: int) -> np.ndarray:
    """1 in the cell of every point."""
    target = np.zeros((size // 4, size // 4), np.float32)
    for x, y in points:
        target[min(size // 4 - 1, round(y / 4)), min(size // 4 - 1, round(x / 4))] = 1
    return target


def stage1_pair(
    jpegs: tuple[bytes, bytes],
    points: tuple[list[tuple[float, float]], list[tuple[float, float]]],
    size: int,
    told: Augmentation,
    rng: np.random.Generator,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """A training example of stage 1: two views with their targets."""
    pair = []
    for jpeg, own in zip(jpegs, points, strict=True):
        image, moved = augmented(view(jpeg, size), own, told, rng)
        pair.append((np.ascontiguousarray(image.transpose(2, 0, 1)), cell_target(moved, size)))
    return pair
