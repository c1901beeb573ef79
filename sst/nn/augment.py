"""Batched augmentation on the training device: one warp moves an image and its points.

B batch, N points, S side of the view. Points are in heatmap units of the un-augmented view; see `sst.nn.geometry`.
Source: Mallis et al. 2020, supplementary material (augmentation ranges).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from sst.nn.geometry import STRIDE, transform


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes; the defaults are the published ones of stage 1.

    Attributes:
        blur_probability: share of images blurred, with sigma up to `blur_sigma` pixels of the view.
        contrast: range of the factor about mid grey.
        noise_probability: share of images with Gaussian noise of standard deviation up to `noise`.
        noise_per_channel: share of the noisy images whose channels have each its own noise; in the others it is grey.
        brightness: range of the factor, drawn per channel in `brightness_per_channel` of the images.
        colour_probability: share of images whose hue and saturation are multiplied by factors from `colour`.
        about: what is scaled, rotated and shifted, about its middle: the stored image, from which the view is cut
            afterwards (published), or the view.
        scale: range of the factor of each axis.
        shift: largest shift, as a share of the sides of what is shifted.
        rotation: largest rotation in degrees.
    """

    blur_probability: float = 0.3
    blur_sigma: float = 0.5
    contrast: tuple[float, float] = (0.85, 1.3)
    noise_probability: float = 0.5
    noise: float = 0.05
    noise_per_channel: float = 0.5
    brightness: tuple[float, float] = (0.9, 1.1)
    brightness_per_channel: float = 0.2
    colour_probability: float = 0.3
    colour: tuple[float, float] = (0.5, 1.5)
    about: Literal["image", "view"] = "image"
    scale: tuple[float, float] = (0.8, 1.2)
    shift: float = 0.05
    rotation: float = 40.0


STRONGER = Augmentation(
    blur_probability=0.5,
    contrast=(0.75, 1.5),
    noise_probability=1.0,
    brightness=(0.8, 1.2),
    colour_probability=0.5,
    scale=(0.7, 1.3),
)
"""The published augmentation of stage 2."""


COVERED_SIDE = (0.15, 0.45)
"""Sides of the rectangles of `occlude`, as shares of the view: from a hand to half of the object."""

CACHED_PIXELS = 2**18
"""Pixels of the views that are changed at once on a CPU: three float32 channels of them are 3 MB."""


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.rand(shape, generator=generator, device=like.device) * (high - low) + low


def random_affine(count: int, size: int | Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Random matrices from a picture to the same, scaled, rotated and shifted.

    Args:
        count: number of matrices B.
        size: side of the pictures, or width and height of each (B, 2).
        settings: ranges of scale, shift and rotation about the centre.
        generator: source of randomness; its device is the result's.

    Returns:
        float32 (B, 3, 3).
    """
    like = torch.empty(0, device=generator.device)
    angle = _uniform((count,), -settings.rotation, settings.rotation, generator, like) * (math.pi / 180)
    scale_B2 = _uniform((count, 2), *settings.scale, generator, like)
    side_B2 = torch.zeros(count, 2, device=generator.device) + size
    shift_B2 = _uniform((count, 2), -settings.shift, settings.shift, generator, like) * side_B2
    cos, sin = torch.cos(angle), torch.sin(angle)
    rotation_B22 = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    linear_B22 = rotation_B22 * scale_B2[:, None, :]
    centre_B21 = (side_B2[..., None] - 1) / 2
    matrix = torch.zeros(count, 3, 3, device=generator.device)
    matrix[:, :2, :2] = linear_B22
    matrix[:, :2, 2:] = centre_B21 + shift_B2[..., None] - linear_B22 @ centre_B21
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
    image_B3HW = image_BHW3.permute(0, 3, 1, 2).float().mul_(1 / 255)
    # linalg.inv checks on the host; an affine 3x3 has a closed form without a synchronisation.
    source_B23 = invert_affine(matrix_B33)[:, :2]
    axis = torch.arange(size, device=image_BHW3.device, dtype=torch.float32)
    # The source of view pixel (x, y) is a sum of what x gives and what y gives; so no matrix product over all pixels.
    by_x_B2S = source_B23[:, :, :1] * axis
    by_y_B2S = source_B23[:, :, 1:2] * axis + source_B23[:, :, 2:]
    grid_BSS2 = torch.empty(len(image_BHW3), size, size, 2, device=image_BHW3.device)
    for i, length in enumerate((width, height)):
        per_pixel = 2.0 / max(length - 1, 1)  # as in `sampling_grid`
        by_x_BS, by_y_BS = by_x_B2S[:, i] * per_pixel, by_y_B2S[:, i] * per_pixel - 1.0
        torch.add(by_x_BS[:, None, :], by_y_BS[:, :, None], out=grid_BSS2[..., i])
    return functional.grid_sample(image_B3HW, grid_BSS2, mode="bilinear", align_corners=True)


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
    stored_B2: Tensor,
    to_view_B33: Tensor,
    points_BN2: Tensor,
    size: int,
    settings: Augmentation,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one random view of every image.

    Args:
        image_BHW3: uint8 stored images, padded at right and bottom to one size.
        stored_B2: width and height of each without the padding.
        to_view_B33: matrices from stored image to canonical view.
        points_BN2: heatmap units of the canonical view.
        size: side S of the view.
        settings: ranges.
        generator: source of randomness, on the images' device.

    Returns:
        Views (B, 3, S, S) in [0, 1]; points (B, N, 2) in heatmap units of the views; and whether each lies in a cell of
        its view, bool (B, N).
    """
    count, device = len(image_BHW3), image_BHW3.device
    if settings.about == "image":
        matrix_B33 = to_view_B33 @ random_affine(count, stored_B2, settings, generator)
    else:
        matrix_B33 = random_affine(count, size, settings, generator) @ to_view_B33
    colours = Colours.draw(count, settings, generator)
    # On a CPU a few images at a time, so that they are still in the cache when the next change comes.
    step = max(1, CACHED_PIXELS // size**2) if device.type == "cpu" else count
    views = torch.empty(count, 3, size, size, device=device)
    for rows in (slice(first, first + step) for first in range(0, count, step)):
        views[rows] = colours[rows](warp_images(image_BHW3[rows], matrix_B33[rows], size), generator)
    moved = transform(matrix_B33 @ invert_affine(to_view_B33), points_BN2 * STRIDE) / STRIDE
    return views, moved, inside_view(moved, size)


def inside_view(points_BN2: Tensor, size: int) -> Tensor:
    """Whether points, in heatmap units, lie in a cell of a view of that side; bool (B, N), False for NaN."""
    return ((points_BN2 > -0.5) & (points_BN2 < size // STRIDE - 0.5)).all(-1)


@dataclass(frozen=True)
class Colours:
    """What blur, contrast, noise, brightness, hue and saturation do to each image of a batch.

    Attributes:
        contrast_B111: factor about mid grey.
        brightness_B311: factor of each channel.
        blurred_B: bool; with `sigma_B` in pixels of the view.
        noisy_B: bool; with `noise_B111`, the standard deviation, and `grey_noise_B`, whether channels share it.
        recoloured_B: bool; with `hue_B` and `saturation_B`, factors.
    """

    contrast_B111: Tensor
    brightness_B311: Tensor
    blurred_B: Tensor
    sigma_B: Tensor
    noisy_B: Tensor
    noise_B111: Tensor
    grey_noise_B: Tensor
    recoloured_B: Tensor
    hue_B: Tensor
    saturation_B: Tensor

    @classmethod
    def draw(cls, count: int, settings: Augmentation, generator: torch.Generator) -> Self:
        """Random ones for so many images, on the generator's device."""
        like = torch.empty(0, device=generator.device)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return _uniform((count, *shape), low, high, generator, like)

        def chosen(probability: float) -> Tensor:
            return uniform(0.0, 1.0) < probability

        brightness_B311 = uniform(*settings.brightness, 3, 1, 1)
        per_channel_B111 = chosen(settings.brightness_per_channel)[:, None, None, None]
        return cls(
            contrast_B111=uniform(*settings.contrast, 1, 1, 1),
            brightness_B311=torch.where(per_channel_B111, brightness_B311, brightness_B311[:, :1]),
            blurred_B=chosen(settings.blur_probability),
            sigma_B=uniform(0, settings.blur_sigma),
            noisy_B=chosen(settings.noise_probability),
            noise_B111=uniform(0, settings.noise, 1, 1, 1),
            grey_noise_B=~chosen(settings.noise_per_channel),
            recoloured_B=chosen(settings.colour_probability),
            hue_B=uniform(*settings.colour),
            saturation_B=uniform(*settings.colour),
        )

    def __getitem__(self, rows: slice) -> "Colours":
        """Those of some of the images."""
        return Colours(*(getattr(self, field.name)[rows] for field in fields(self)))

    def __call__(self, view_B3SS: Tensor, generator: torch.Generator) -> Tensor:
        """Changes the images, (B, 3, S, S) in [0, 1] to the same; the noise itself comes from the generator.

        The order is blur, contrast, noise, brightness, colour, and what leaves [0, 1] is cut off after each. Contrast
        comes before blur here, which changes nothing: they commute, and what is cut off is cut off after both.
        """
        x = torch.addcmul(0.5 * (1 - self.contrast_B111), view_B3SS, self.contrast_B111)
        x = _change_some(x, self.blurred_B, blur, self.sigma_B).clamp_(0.0, 1.0)
        x = _add_noise(x, self.noisy_B, self.noise_B111, self.grey_noise_B, generator).clamp_(0.0, 1.0)
        x = x.mul_(self.brightness_B311).clamp_(0.0, 1.0)
        return _change_some(x, self.recoloured_B, multiply_hue_saturation, self.hue_B, self.saturation_B)


def occlude(view_B3SS: Tensor, points_BN2: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Covers part of some images with a rectangle of the next image, upside down (beyond the paper).

    Args:
        view_B3SS: views.
        points_BN2: points in them, heatmap units.
        share: of the images that are covered in part.
        generator: source of randomness, on the views' device.

    Returns:
        The views, and which points lie under a rectangle; bool (B, N).
    """
    count, size = len(view_B3SS), view_B3SS.shape[-1]
    side_B2 = _uniform((count, 2), *COVERED_SIDE, generator, view_B3SS) * size
    corner_B2 = _uniform((count, 2), 0.0, 1.0, generator, view_B3SS) * (size - side_B2)
    chosen_B = _uniform((count,), 0.0, 1.0, generator, view_B3SS) < share

    def under(place: Tensor, axis: int) -> Tensor:
        first = corner_B2[:, axis, None]
        return (place >= first) & (place < first + side_B2[:, axis, None])

    pixel_1S = torch.arange(size, device=view_B3SS.device)[None]
    covered_BSS = under(pixel_1S, 1)[:, :, None] & under(pixel_1S, 0)[:, None, :] & chosen_B[:, None, None]
    points = points_BN2 * STRIDE
    hidden_BN = under(points[..., 0], 0) & under(points[..., 1], 1) & chosen_B[:, None]
    return torch.where(covered_BSS[:, None], view_B3SS.roll(1, 0).flip(-2), view_B3SS), hidden_BN


def free_to_look(device: torch.device) -> bool:
    """Whether the host may ask for values on the device; where it is a GPU it would wait for all that came before."""
    return device.type == "cpu"


def _change_some(x_B3SS: Tensor, chosen_B: Tensor, change: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """Changes the chosen images, in place where it can; `change` takes images and their rows of the parameters.

    All are changed, and the chosen ones taken, where asking for their number would make the host wait.
    """
    if not free_to_look(x_B3SS.device):
        return torch.where(chosen_B[:, None, None, None], change(x_B3SS, *parameters), x_B3SS)
    rows = chosen_B.nonzero()[:, 0]
    return x_B3SS.index_copy_(0, rows, change(x_B3SS[rows], *(each[rows] for each in parameters)))


def _add_noise(
    x_B3SS: Tensor, chosen_B: Tensor, deviation_B111: Tensor, grey_B: Tensor, generator: torch.Generator
) -> Tensor:
    """Adds Gaussian noise to the chosen images, in place; see `_change_some`."""
    if not free_to_look(x_B3SS.device):
        noise = torch.randn(x_B3SS.shape, generator=generator, device=x_B3SS.device)
        noise = torch.where(grey_B[:, None, None, None], noise[:, :1], noise)
        return x_B3SS.addcmul_(noise, deviation_B111 * chosen_B[:, None, None, None])
    rows = chosen_B.nonzero()[:, 0]
    noise = torch.randn(len(rows), *x_B3SS.shape[1:], generator=generator).mul_(deviation_B111[rows])
    noise = torch.where(grey_B[rows][:, None, None, None], noise[:, :1], noise)
    return x_B3SS.index_add_(0, rows, noise)


def blur(x_B3SS: Tensor, sigma_B: Tensor) -> Tensor:
    """Gaussian blur, 5 taps each way (ample for the published sigma of at most 0.5)."""
    height, width = x_B3SS.shape[-2:]
    offset = torch.arange(3, device=x_B3SS.device, dtype=torch.float32)
    weight_B3 = torch.exp(-0.5 * (offset / sigma_B[:, None].clamp_min(1e-3)) ** 2)
    weight_B3 = weight_B3 / (2 * weight_B3.sum(1, keepdim=True) - weight_B3[:, :1])
    middle, near, far = weight_B3[:, :, None, None, None].unbind(1)
    x = functional.pad(x_B3SS, (2, 2, 2, 2), mode="replicate")
    for axis, length in ((-2, height), (-1, width)):
        taps = [x.narrow(axis, start, length) for start in range(5)]
        x = (taps[2] * middle).addcmul_(taps[1] + taps[3], near).addcmul_(taps[0] + taps[4], far)
    return x


def multiply_hue_saturation(x_B3SS: Tensor, hue_B: Tensor, saturation_B: Tensor) -> Tensor:
    """Multiplies hue (modulo one turn) and saturation in HSV; RGB in [0, 1] to the same.

    Without a choice between cases, which is what is slow: channels are sorted by minima and maxima, and masks are
    numbers.
    """
    red, green, blue = x_B3SS.unbind(1)
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    blue_leads, red_trails = (green < blue).float(), (red < high).float()
    value, second = torch.maximum(red, high), torch.minimum(red, high)
    span = value - torch.minimum(second, low)
    # In turns. Where red is largest the hue is near 0, or 1 if blue is second; else it lies about a third.
    hue = second.sub_(low).div_(6.0 * span.clamp_min(1e-6))
    hue.sub_(blue_leads).addcmul_(red_trails, blue_leads.mul_(2.0).sub_(1 / 3)).abs_()
    hue.mul_(hue_B[:, None, None])
    hue.sub_(hue.floor()).mul_(6.0)
    # What saturation takes from the largest channel: span / value times the factor, at most all.
    taken = torch.minimum(span.mul_(saturation_B[:, None, None]), value)
    result = torch.empty_like(x_B3SS)
    # Nothing is taken from a channel within a sixth of a turn of its own hue, all from two sixths on.
    taken_by = ((hue - 3.0).abs_().sub_(2.0), (hue - 2.0).abs_().sub_(1.0).neg_(), (hue - 4.0).abs_().sub_(1.0).neg_())
    for channel, share in enumerate(taken_by):
        torch.addcmul(value, taken, share.clamp_(-1.0, 0.0), out=result[:, channel])
    return result
