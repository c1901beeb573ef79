"""The stacked-hourglass network with a detector head and a descriptor (later landmark) head.

Shapes: B batch, C channels, H W heatmap (a quarter of the input).
Source: Mallis et al. 2020, section 4 (implementation details); docs/fidelity.md compares.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from sst.nn.precision import Precision, autocast, laid_out


@dataclass(frozen=True)
class NetworkShape:
    """Size of the network; the defaults are the published ones (6.8 M parameters; published
    checkpoints hold 1.6 M more that are never used).

    Attributes:
        width: channels of the hourglass.
        depth: levels of the hourglass; the input must be divisible by 4 * 2**depth.
        groups: groups of every GroupNorm.
        descriptor_size: channels of the descriptor head.
    """

    width: int = 256
    depth: int = 4
    groups: int = 32
    descriptor_size: int = 256


RARE = -4.6
"""Bias of a fresh output that passes a sigmoid: 1 % everywhere, as points are rare. From 50 % a first loss of thousands
of cells of background would drown the few of points."""


class NormRelu(nn.GroupNorm):
    """Group normalisation and ReLU; on a GPU, with channels last, by kernels of our own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """(B, C, H, W) to the same; in the kernels' case of the input's type."""
        if by_kernels(input):
            from sst.nn.kernels import NormReluFunction, can_normalise  # Triton is not on CPUs

            if can_normalise(input, self.num_groups):
                given = input, self.weight, self.bias, self.num_groups, self.eps
                normalised: Tensor = NormReluFunction.apply(*given)
                return normalised
        return functional.relu(super().forward(input))


_KERNELS = {"usable": False}
"""Whether Triton works in this process, as far as `use_kernels` has seen."""


def by_kernels(x: Tensor) -> bool:
    """Whether what torch computes slowly with channels last is computed by other ways to the same result."""
    return x.is_cuda and _KERNELS["usable"]


class Halved(torch.autograd.Function):
    """Mean of every 2 x 2 cells, as torch's average pool, whose gradient is a slow kernel on GPUs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H/2, W/2)."""
        return functional.avg_pool2d(x, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """A quarter for each of the four."""
        return each_four_times(gradients[0] * 0.25)


class Doubled(torch.autograd.Function):
    """Every cell four times, as torch's nearest interpolation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2 H, 2 W)."""
        return each_four_times(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Sum of the four."""
        return functional.avg_pool2d(gradients[0], 2, divisor_override=1)


def each_four_times(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, C, 2 H, 2 W) with channels last, in one copy."""
    count, channels, height, width = x.shape
    x_BH1W1C = x.permute(0, 2, 3, 1)[:, :, None, :, None, :]
    wide = x_BH1W1C.expand(count, height, 2, width, 2, channels).reshape(count, 2 * height, 2 * width, channels)
    return wide.permute(0, 3, 1, 2)


def halved(x: Tensor) -> Tensor:
    """Mean of every 2 x 2 cells."""
    if not by_kernels(x):
        return functional.avg_pool2d(x, 2)
    smaller: Tensor = Halved.apply(x)
    return smaller


def doubled(x: Tensor) -> Tensor:
    """Every cell four times."""
    if not by_kernels(x):
        return functional.interpolate(x, scale_factor=2.0, mode="nearest")
    larger: Tensor = Doubled.apply(x)
    return larger


class ResidualBlock(nn.Module):
    """Three pre-activated 3x3 convolutions whose outputs (1/2, 1/4, 1/4 of the width) are concatenated."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        half, quarter = outputs // 2, outputs // 4
        self.norm1 = NormRelu(groups, inputs)
        self.conv1 = nn.Conv2d(inputs, half, 3, padding=1, bias=False)
        self.norm2 = NormRelu(groups, half)
        self.conv2 = nn.Conv2d(half, quarter, 3, padding=1, bias=False)
        self.norm3 = NormRelu(groups, quarter)
        self.conv3 = nn.Conv2d(quarter, quarter, 3, padding=1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(
                NormRelu(groups, inputs), nn.Identity(), nn.Conv2d(inputs, outputs, 1, bias=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        first = self.conv1(self.norm1(x))
        second = self.conv2(self.norm2(first))
        third = self.conv3(self.norm3(second))
        joined: Tensor = torch.cat([first, second, third], dim=1) + self.shortcut(x)
        return joined


class Hourglass(nn.Module):
    """One level: an upper block at full size beside a lower path at half size that holds the next level."""

    def __init__(self, width: int, depth: int, groups: int) -> None:
        super().__init__()
        self.upper = ResidualBlock(width, width, groups)
        self.lower_in = ResidualBlock(width, width, groups)
        self.inner: nn.Module = (
            Hourglass(width, depth - 1, groups) if depth > 1 else ResidualBlock(width, width, groups)
        )
        self.lower_out = ResidualBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) to the same shape; H and W must be even."""
        lower = self.lower_out(self.inner(self.lower_in(halved(x))))
        joined: Tensor = self.upper(x) + doubled(lower)
        return joined


class Head(nn.Module):
    """Residual block, 1x1 convolution, GroupNorm, ReLU and the output convolution."""

    def __init__(self, width: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.block = ResidualBlock(width, width, groups)
        self.conv = nn.Conv2d(width, width, 1)
        self.norm = NormRelu(groups, width)
        self.out = nn.Conv2d(width, outputs, 1)

    def start_rare(self) -> None:
        """Makes a fresh output answer `RARE` everywhere."""
        for name, bias in self.out.named_parameters():
            if name == "bias":
                nn.init.constant_(bias, RARE)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) to (B, outputs, H, W)."""
        maps: Tensor = self.out(self.norm(self.conv(self.block(x))))
        return maps


class Backbone(nn.Module):
    """Stem (stride 4) and hourglass, shared by both heads."""

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        width, groups = shape.width, shape.groups
        self.conv = nn.Conv2d(3, width // 4, 7, stride=2, padding=3)
        self.norm = NormRelu(groups, width // 4)
        self.block1 = ResidualBlock(width // 4, width // 2, groups)
        self.block2 = ResidualBlock(width // 2, width // 2, groups)
        self.block3 = ResidualBlock(width // 2, width, groups)
        self.hourglass = Hourglass(width, shape.depth, groups)

    def forward(self, image_B3SS: Tensor) -> Tensor:
        """RGB in [0, 1], (B, 3, S, S), to features (B, width, S/4, S/4)."""
        x = self.norm(self.conv(image_B3SS))
        x = self.block3(self.block2(halved(self.block1(x))))
        features: Tensor = self.hourglass(x)
        return features


class DetectorDescriptor(nn.Module):
    """Stage 1: where keypoints are, and what they look like."""

    def __init__(self, shape: NetworkShape, rare: bool = False) -> None:
        """Takes the size, and whether a fresh detector answers `RARE` everywhere, as the focal objective needs it."""
        super().__init__()
        self.shape = shape
        self.backbone = Backbone(shape)
        self.detector = Head(shape.width, 1, shape.groups)
        if rare:
            self.detector.start_rare()
        self.descriptor = Head(shape.width, shape.descriptor_size, shape.groups)

    def forward(self, image_B3SS: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the network.

        Args:
            image_B3SS: RGB in [0, 1].

        Returns:
            Detector heatmap after the sigmoid (B, 1, H, W) and raw descriptors (B, D, H, W).
        """
        features = self.backbone(image_B3SS)
        return torch.sigmoid(self.detector(features)), self.descriptor(features)


class LandmarkDetector(nn.Module):
    """Stage 2: one heatmap per cluster.

    Attributes:
        probabilities: whether a heatmap passes a sigmoid, as the focal objective needs it, or is raw (published).
    """

    def __init__(self, shape: NetworkShape, landmarks: int, probabilities: bool = False) -> None:
        super().__init__()
        self.shape, self.probabilities = shape, probabilities
        self.backbone = Backbone(shape)
        self.landmark = Head(shape.width, landmarks, shape.groups)
        if probabilities:
            self.landmark.start_rare()

    @classmethod
    def from_stage1(cls, stage1: DetectorDescriptor, landmarks: int, probabilities: bool = False) -> Self:
        """Takes over backbone and descriptor head; only the last convolution is fresh (paper, section 3.3)."""
        model = cls(stage1.shape, landmarks, probabilities)
        model.backbone.load_state_dict(stage1.backbone.state_dict())
        kept = {k: v for k, v in stage1.descriptor.state_dict().items() if not k.startswith("out.")}
        kept |= {k: v for k, v in model.landmark.state_dict().items() if k.startswith("out.")}
        model.landmark.load_state_dict(kept)
        return model

    def forward(self, image_B3SS: Tensor) -> Tensor:
        """RGB in [0, 1] (B, 3, S, S) to landmark heatmaps (B, K, H, W)."""
        heat: Tensor = self.landmark(self.backbone(image_B3SS))
        return torch.sigmoid(heat.float()) if self.probabilities else heat


def use_kernels(device: torch.device, shape: NetworkShape, input_size: int, precision: Precision) -> str | None:
    """Has this process compute by kernels of our own on a GPU, after a network of this size was seen to work with them.

    Args:
        device: without a GPU nothing is tried.
        shape: of the networks to come.
        input_size: side of their views, in pixels.
        precision: of their convolutions.

    Returns:
        Why the kernels do not work (Triton needs a C compiler), or None. Then torch's own are used.
    """
    if device.type != "cuda":
        return None
    _KERNELS["usable"] = True
    try:
        network = laid_out(DetectorDescriptor(shape), device)
        with autocast(device, precision):
            maps = network(torch.zeros(1, 3, input_size, input_size, device=device))
        sum(each.float().sum() for each in maps).backward()
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever it is, there is a way without
        _KERNELS["usable"] = False
        return " ".join(str(error).split())[:200]
    return None
