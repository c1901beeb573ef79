"""Group normalisation with ReLU on a GPU, in few passes over memory: Triton kernels for arrays with channels last.

torch's own kernels want channels first, take a pass more for the ReLU and compute in float32, which would be two thirds
of the time of a step. Here x is read twice and written once forwards; x and its gradient are read twice backwards. What
they compute is `torch.relu(torch.group_norm(x))` in x's own type, with sums and factors in float32.

Needs torch and, on a GPU, Triton, which comes with torch there.

Shapes: N images, R rows (pixels) of an image, C channels.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Numbers that a program holds at once: 16 for each of its 256 threads."""

MOST_PARTS = 16
"""Parts of an image that are summed up apart, a power of two: 32 images then fill a GPU."""


@triton.jit  # type: ignore[untyped-decorator]
def _tile(first, image, pixels, CHANNELS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Places of a tile's numbers, and which are there."""
    row = first + tl.arange(0, ROWS)
    place = (image.to(tl.int64) * pixels + row)[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return place, (row < pixels)[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def _by_group(x, CHANNELS: tl.constexpr, EACH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum over the channels of each one's group; (C,)."""
    group = tl.arange(0, CHANNELS) // EACH
    return tl.sum(tl.where(group[:, None] == group[None, :], x[None, :], 0.0), axis=1)


@triton.jit  # type: ignore[untyped-decorator]
def _sums(  # type: ignore[no-untyped-def]
    x, gradient, factors, parts, pixels,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Per part of an image and channel: sums of x and x^2; backwards of the gradient g before the ReLU and of g x."""
    image, part, channel = tl.program_id(1), tl.program_id(0), tl.arange(0, CHANNELS)
    first_sum, second_sum = tl.zeros([ROWS, CHANNELS], tl.float32), tl.zeros([ROWS, CHANNELS], tl.float32)
    if BACKWARD:
        scale = tl.load(factors + image * 4 * CHANNELS + channel)[None, :]
        shift = tl.load(factors + image * 4 * CHANNELS + CHANNELS + channel)[None, :]
    for tile in range(TILES):
        place, there = _tile((part * TILES + tile) * ROWS, image, pixels, CHANNELS, ROWS)
        value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        if BACKWARD:
            g = tl.load(gradient + place, mask=there, other=0.0).to(tl.float32)
            g = tl.where(value * scale + shift > 0, g, 0.0)
            first_sum += g
            second_sum += g * value
        else:
            first_sum += value
            second_sum += value * value
    place = (image * tl.num_programs(0) + part) * 2 * CHANNELS + channel
    tl.store(parts + place, tl.sum(first_sum, axis=0))
    tl.store(parts + place + CHANNELS, tl.sum(second_sum, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _whole(parts, image, count, CHANNELS: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both sums over all parts of an image; (C,) each."""
    part = tl.arange(0, PARTS)
    place = ((image * count + part) * 2 * CHANNELS)[:, None] + tl.arange(0, CHANNELS)[None, :]
    there = (part < count)[:, None]
    first = tl.sum(tl.load(parts + place, mask=there, other=0.0), axis=0)
    return first, tl.sum(tl.load(parts + place + CHANNELS, mask=there, other=0.0), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _forward_factors(  # type: ignore[no-untyped-def]
    parts, weight, bias, factors, pixels, count, eps,
    CHANNELS: tl.constexpr, EACH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Per image and channel: scale and shift of x; mean and 1 / deviation of its group."""
    image, channel = tl.program_id(0), tl.arange(0, CHANNELS)
    total, square = _whole(parts, image, count, CHANNELS, PARTS)
    number = pixels * EACH * 1.0
    mean = _by_group(total, CHANNELS, EACH) / number
    variance = tl.maximum(_by_group(square, CHANNELS, EACH) / number - mean * mean, 0.0)
    inverse = 1.0 / tl.sqrt(variance + eps)
    scale = inverse * tl.load(weight + channel)
    place = factors + image * 4 * CHANNELS + channel
    tl.store(place, scale)
    tl.store(place + CHANNELS, tl.load(bias + channel) - mean * scale)
    tl.store(place + 2 * CHANNELS, mean)
    tl.store(place + 3 * CHANNELS, inverse)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_factors(  # type: ignore[no-untyped-def]
    parts, weight, factors, found, pixels, count,
    CHANNELS: tl.constexpr, EACH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Per image and channel: factor of x and summand in its gradient; and the gradients of weight and bias."""
    image, channel = tl.program_id(0), tl.arange(0, CHANNELS)
    gradient, product = _whole(parts, image, count, CHANNELS, PARTS)
    place = factors + image * 4 * CHANNELS + channel
    mean, inverse, w = tl.load(place + 2 * CHANNELS), tl.load(place + 3 * CHANNELS), tl.load(weight + channel)
    by_weight, number = (product - mean * gradient) * inverse, pixels * EACH * 1.0
    of_x = -inverse * inverse * _by_group(w * by_weight, CHANNELS, EACH) / number
    place = found + image * 4 * CHANNELS + channel
    tl.store(place, of_x)
    tl.store(place + CHANNELS, -inverse * _by_group(w * gradient, CHANNELS, EACH) / number - mean * of_x)
    tl.store(place + 2 * CHANNELS, by_weight)
    tl.store(place + 3 * CHANNELS, gradient)


@triton.jit  # type: ignore[untyped-decorator]
def _apply(  # type: ignore[no-untyped-def]
    x, gradient, factors, found, out, pixels,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Writes y, or the gradient of x."""
    image, channel = tl.program_id(1), tl.arange(0, CHANNELS)
    place, there = _tile(tl.program_id(0) * ROWS, image, pixels, CHANNELS, ROWS)
    scale = tl.load(factors + image * 4 * CHANNELS + channel)[None, :]
    shift = tl.load(factors + image * 4 * CHANNELS + CHANNELS + channel)[None, :]
    value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    before = value * scale + shift
    if BACKWARD:
        of_x = tl.load(found + image * 4 * CHANNELS + channel)[None, :]
        summand = tl.load(found + image * 4 * CHANNELS + CHANNELS + channel)[None, :]
        g = tl.load(gradient + place, mask=there, other=0.0).to(tl.float32)
        result = tl.where(before > 0, g, 0.0) * scale + value * of_x + summand
    else:
        result = tl.maximum(before, 0.0)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=there)


def can_normalise(x: Tensor, groups: int) -> bool:
    """Whether the kernels take this array: channels last, and powers of two as numbers of channels and groups."""
    powers = all(not number & (number - 1) for number in (x.shape[1], groups))
    return powers and x.shape[1] <= TILE and x.is_contiguous(memory_format=torch.channels_last)


class NormReluFunction(torch.autograd.Function):
    """relu(group_norm(x)); see the module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        """(N, C, H, W), channels last, to the same."""
        count, channels, height, width = x.shape
        factors = torch.empty(count, 4, channels, device=x.device)
        ctx.save_for_backward(x, weight, factors)
        ctx.groups, pixels = groups, height * width
        with torch.cuda.device_of(x):  # Triton launches where torch's current device is
            parts = _parts(x, x, factors, pixels, backward=False)
            given = parts, weight, bias, factors, pixels, parts.shape[1], eps
            _forward_factors[(count,)](*given, channels, channels // groups, MOST_PARTS)
            return _applied(x, x, factors, factors, pixels, backward=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Of x, weight and bias."""
        x, weight, factors = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        count, channels, height, width = x.shape
        pixels, found = height * width, torch.empty_like(factors)
        parts = _parts(x, gradient, factors, pixels, backward=True)
        given = parts, weight, factors, found, pixels, parts.shape[1]
        _backward_factors[(count,)](*given, channels, channels // ctx.groups, MOST_PARTS)
        of_weight, of_bias = found[:, 2:].sum(0).unbind()
        return _applied(x, gradient, factors, found, pixels, backward=True), of_weight, of_bias, None, None


def split(channels: int, pixels: int) -> tuple[int, int]:
    """Rows of a tile, and tiles of a part, of which an image has `MOST_PARTS` at most."""
    rows = TILE // channels
    return rows, triton.cdiv(pixels, MOST_PARTS * rows)


def _parts(x: Tensor, gradient: Tensor, factors: Tensor, pixels: int, *, backward: bool) -> Tensor:
    """Sums of the parts of each image; (N, parts, 2, C)."""
    count, channels = x.shape[:2]
    rows, tiles = split(channels, pixels)
    number = triton.cdiv(pixels, tiles * rows)
    parts = torch.empty(count, number, 2, channels, device=x.device)
    _sums[(number, count)](x, gradient, factors, parts, pixels, channels, rows, tiles, backward, num_warps=8)
    return parts


def _applied(x: Tensor, gradient: Tensor, factors: Tensor, found: Tensor, pixels: int, *, backward: bool) -> Tensor:
    """What `_apply` writes."""
    count, channels = x.shape[:2]
    rows, out = TILE // channels, torch.empty_like(x)
    grid = triton.cdiv(pixels, rows), count
    _apply[grid](x, gradient, factors, found, out, pixels, channels, rows, backward, num_warps=8)
    return out
