"""The stacked-hourglass network with a detector head and a descriptor (later landmark) head.

Shapes: B batch, C channels, H W heatmap (a quarter of the input).
Source: Mallis et al. 2020, section 4 (implementation details); docs/fidelity.md compares.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional


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


class ResidualBlock(nn.Module):
    """Three pre-activated 3x3 convolutions whose outputs (1/2, 1/4, 1/4 of the width) are concatenated."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        half, quarter = outputs // 2, outputs // 4
        self.norm1 = nn.GroupNorm(groups, inputs)
        self.conv1 = nn.Conv2d(inputs, half, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, half)
        self.conv2 = nn.Conv2d(half, quarter, 3, padding=1, bias=False)
        self.norm3 = nn.GroupNorm(groups, quarter)
        self.conv3 = nn.Conv2d(quarter, quarter, 3, padding=1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.GroupNorm(groups, inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 1, bias=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        first = self.conv1(functional.relu(self.norm1(x)))
        second = self.conv2(functional.relu(self.norm2(first)))
        third = self.conv3(functional.relu(self.norm3(second)))
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
        lower = self.lower_out(self.inner(self.lower_in(functional.avg_pool2d(x, 2))))
        joined: Tensor = self.upper(x) + functional.interpolate(lower, scale_factor=2.0, mode="nearest")
        return joined


class Head(nn.Module):
    """Residual block, 1x1 convolution, GroupNorm, ReLU and the output convolution."""

    def __init__(self, width: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.block = ResidualBlock(width, width, groups)
        self.conv = nn.Conv2d(width, width, 1)
        self.norm = nn.GroupNorm(groups, width)
        self.out = nn.Conv2d(width, outputs, 1)

    def start_rare(self) -> None:
        """Makes a fresh output answer `RARE` everywhere."""
        for name, bias in self.out.named_parameters():
            if name == "bias":
                nn.init.constant_(bias, RARE)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) to (B, outputs, H, W)."""
        maps: Tensor = self.out(functional.relu(self.norm(self.conv(self.block(x)))))
        return maps


class Backbone(nn.Module):
    """Stem (stride 4) and hourglass, shared by both heads."""

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        width, groups = shape.width, shape.groups
        self.conv = nn.Conv2d(3, width // 4, 7, stride=2, padding=3)
        self.norm = nn.GroupNorm(groups, width // 4)
        self.block1 = ResidualBlock(width // 4, width // 2, groups)
        self.block2 = ResidualBlock(width // 2, width // 2, groups)
        self.block3 = ResidualBlock(width // 2, width, groups)
        self.hourglass = Hourglass(width, shape.depth, groups)

    def forward(self, image_B3SS: Tensor) -> Tensor:
        """RGB in [0, 1], (B, 3, S, S), to features (B, width, S/4, S/4)."""
        x = functional.relu(self.norm(self.conv(image_B3SS)))
        x = self.block3(self.block2(functional.avg_pool2d(self.block1(x), 2)))
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
