"""Batched augmentation on the training device: one warp moves an image and its points.

B batch, N points, S side of the view. Points are in heatmap units of the un-augmented view; see `sst.geometry`.
Source: Mallis et al. 2020, supplementary material (augmentation ranges).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sst.geometry import STRIDE, sampling_grid, transform


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes; the defaults are the published ones of stage 1.

    Attributes:
        blur_probability: share of images blurred, with sigma up to `blur_sigma` pixels of the view.
        contrast: range of the factor about mid grey.
        noise_probability: share of images with Gaussian noise of standard deviation up to `noise`.
        brightness: range of the factor, drawn per channel in `brightness_per_channel` of the images.
        colour_probability: share of images whose hue and saturation are multiplied by factors from `colour`.
        scale: range of the factor of each axis.
        shift: largest shift, as a share of the view.
        rotation: largest rotation in degrees.
    """

    blur_probability: float = 0.3
    blur_sigma: float = 0.5
    contrast: tuple[float, float] = (0.85, 1.3)
    noise_probability: float = 0.5
    noise: float = 0.05
    brightness: tuple[float, float] = (0.9, 1.1)
    brightness_per_channel: float = 0.2
    colour_probability: float = 0.3
    colour: tuple[float, float] = (0.5, 1.5)
    scale: tuple[float, float] = (0.8, 1.2)
    shift: float = 0.05
    rotation: float = 40.0


STRONGER = Augmentation(
    blur_probability=0.5,
    contrast=(0.75, 1.5),
    brightness=(0.8, 1.2),
    colour_probability=0.5,
    scale=(0.7, 1.3),
)
"""The published augmentation of stage 2."""


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.rand(shape, generator=generator, device=like.device) * (high - low) + low


def random_affine(count: int, size: int, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Random matrices from the un-augmented to the augmented view.

    Args:
        count: number of matrices B.
        size: side S of the view.
        settings: ranges of scale, shift and rotation about the centre.
        generator: source of randomness; its device is the result's.

    Returns:
        float32 (B, 3, 3).
    """
    like = torch.empty(0, device=generator.device)
    angle = _uniform((count,), -settings.rotation, settings.rotation, generator, like) * (math.pi / 180)
    scale_B2 = _uniform((count, 2), *settings.scale, generator, like)
    shift_B2 = _uniform((count, 2), -settings.shift, settings.shift, generator, like) * size
    cos, sin = torch.cos(angle), torch.sin(angle)
    rotation_B22 = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    linear_B22 = rotation_B22 * scale_B2[:, None, :]
    centre = torch.full((2,), (size - 1) / 2, device=generator.device)
    matrix = torch.zeros(count, 3, 3, device=generator.device)
    matrix[:, :2, :2] = linear_B22
    matrix[:, :2, 2] = centre + shift_B2 - linear_B22 @ centre
    matrix[:, 2, 2].fill_(1.0)
    return matrix


def warp_images(image_BHW3: Tensor, matrix_B33: Tensor, size: int) -> Tensor:
    """Samples views from stored images, bilinearly; black outside the stored image.

    Args:
        image_BHW3: uint8 RGB stored images, padded at right and bottom to one size.
        matrix_B33: matrices from stored image to view.
        size: side S of the view.

    Returns:
        float32 (B, 3, S, S) in [0, 1].
    """
    height, width = image_BHW3.shape[1:3]
    image_B3HW = image_BHW3.permute(0, 3, 1, 2).float() * (1 / 255)
    axis = torch.arange(size, device=image_BHW3.device, dtype=torch.float32)
    grid_y, grid_x = torch.meshgrid(axis, axis, indexing="ij")
    grid_1P2 = torch.stack([grid_x, grid_y], -1).reshape(1, -1, 2)
    # linalg.inv checks on the host; an affine 3x3 has a closed form without a synchronisation.
    source_BP2 = transform(invert_affine(matrix_B33), grid_1P2.expand(len(image_BHW3), -1, -1))
    normal_BP2 = sampling_grid(source_BP2, height, width)
    return functional.grid_sample(image_B3HW, normal_BP2.view(-1, size, size, 2), mode="bilinear", align_corners=True)


def invert_affine(matrix_B33: Tensor) -> Tensor:
    """Inverse of affine 3x3 matrices (last row 0, 0, 1)."""
    a, b, c, d = (matrix_B33[:, i, j] for i in (0, 1) for j in (0, 1))
    inverse_B22 = torch.stack([torch.stack([d, -b], -1), torch.stack([-c, a], -1)], -2)
    inverse_B22 = inverse_B22 / (a * d - b * c)[:, None, None]
    result = torch.zeros_like(matrix_B33)
    result[:, :2, :2] = inverse_B22
    result[:, :2, 2:] = -inverse_B22 @ matrix_B33[:, :2, 2:]
    result[:, 2, 2].fill_(1.0)
    return result


def augment(
    image_BHW3: Tensor,
    to_view_B33: Tensor,
    points_BN2: Tensor,
    cluster_BN: Tensor,
    size: int,
    settings: Augmentation,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one random view of every image.

    Args:
        image_BHW3: uint8 stored images.
        to_view_B33: matrices from stored image to canonical view.
        points_BN2: heatmap units of the canonical view.
        cluster_BN: int64; -1 marks padding.
        size: side S of the view.
        settings: ranges.
        generator: source of randomness, on the images' device.

    Returns:
        Views (B, 3, S, S) in [0, 1]; points (B, N, 2) in heatmap units of the views; clusters (B, N), -1 where
        the point is padding or has left the view.
    """
    affine = random_affine(len(image_BHW3), size, settings, generator)
    views = photometric(warp_images(image_BHW3, affine @ to_view_B33, size), settings, generator)
    moved = transform(affine, points_BN2 * STRIDE) / STRIDE
    inside = ((moved > -0.5) & (moved < size // STRIDE - 0.5)).all(-1)
    return views, moved, torch.where(inside, cluster_BN, -1)


def photometric(view_B3SS: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Blur, contrast, noise, brightness, hue and saturation; (B, 3, S, S) in [0, 1] to the same."""
    count = len(view_B3SS)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return _uniform((count, *shape), low, high, generator, view_B3SS)

    def chosen(probability: float) -> Tensor:
        return uniform(0.0, 1.0, 1, 1, 1) < probability

    sigma = torch.where(chosen(settings.blur_probability), uniform(0, settings.blur_sigma, 1, 1, 1), 0.0)
    x = blur(view_B3SS, sigma)
    x = (x - 0.5) * uniform(*settings.contrast, 1, 1, 1) + 0.5
    noise = torch.where(chosen(settings.noise_probability), uniform(0, settings.noise, 1, 1, 1), 0.0)
    x = x + noise * torch.randn(x.shape, generator=generator, device=x.device)
    factor_B3 = uniform(*settings.brightness, 3, 1, 1)
    x = x * torch.where(chosen(settings.brightness_per_channel), factor_B3, factor_B3[:, :1])
    x = x.clamp(0.0, 1.0)
    recoloured = multiply_hue_saturation(x, uniform(*settings.colour, 1, 1), uniform(*settings.colour, 1, 1))
    return torch.where(chosen(settings.colour_probability), recoloured, x)


def blur(x_B3SS: Tensor, sigma_B111: Tensor) -> Tensor:
    """Gaussian blur, 5 taps each way (ample for the published sigma of at most 0.5)."""
    offset = torch.arange(-2, 3, device=x_B3SS.device, dtype=torch.float32)
    weight_B5 = torch.exp(-0.5 * (offset / sigma_B111.reshape(-1, 1).clamp_min(1e-3)) ** 2)
    weight_B5 = weight_B5 / weight_B5.sum(1, keepdim=True)
    count, channels, height, width = x_B3SS.shape
    kernel = weight_B5.repeat_interleave(channels, 0)
    x = functional.pad(x_B3SS, (2, 2, 2, 2), mode="replicate").reshape(1, -1, height + 4, width + 4)
    x = functional.conv2d(x, kernel[:, None, :, None], groups=count * channels)
    x = functional.conv2d(x, kernel[:, None, None, :], groups=count * channels)
    return x.reshape(count, channels, height, width)


def multiply_hue_saturation(x_B3SS: Tensor, hue_B11: Tensor, saturation_B11: Tensor) -> Tensor:
    """Multiplies hue (modulo one turn) and saturation in HSV; RGB in [0, 1] to the same."""
    red, green, blue = x_B3SS.unbind(1)
    value = x_B3SS.amax(1)
    span = value - x_B3SS.amin(1)
    safe = span.clamp_min(1e-6)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    hue = ((hue / 6.0) % 1.0 * hue_B11) % 1.0 * 6.0
    saturation = (span / value.clamp_min(1e-6) * saturation_B11).clamp(0.0, 1.0)
    channels = []
    for shift in (5.0, 3.0, 1.0):
        k = (shift + hue) % 6.0
        channels.append(value - value * saturation * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0))
    return torch.stack(channels, 1)
