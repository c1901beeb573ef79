"""The published network, spelt out under the published parameter names: an oracle, slow and obvious.

Written from the description in the paper and the published names, with nothing of `sst`. A network is a dictionary of
weights.
"""

import torch
from torch.nn import functional


def block_shapes(name, inputs, outputs):
    """Shapes of a residual block."""
    half, quarter = outputs // 2, outputs // 4
    shapes = {
        f"{name}.bn1.weight": (inputs,),
        f"{name}.bn1.bias": (inputs,),
        f"{name}.conv1.weight": (half, inputs, 3, 3),
        f"{name}.bn2.weight": (half,),
        f"{name}.bn2.bias": (half,),
        f"{name}.conv2.weight": (quarter, half, 3, 3),
        f"{name}.bn3.weight": (quarter,),
        f"{name}.bn3.bias": (quarter,),
        f"{name}.conv3.weight": (quarter, quarter, 3, 3),
    }
    if inputs != outputs:
        shapes |= {
            f"{name}.downsample.0.weight": (inputs,),
            f"{name}.downsample.0.bias": (inputs,),
            f"{name}.downsample.2.weight": (outputs, inputs, 1, 1),
        }
    return shapes


def head_shapes(number, outputs):
    """Shapes of a head."""
    return block_shapes(f"top_m_{number}", 256, 256) | {
        f"conv_last{number}.weight": (256, 256, 1, 1),
        f"conv_last{number}.bias": (256,),
        f"bn_end{number}.weight": (256,),
        f"bn_end{number}.bias": (256,),
        f"l{number}.weight": (outputs, 256, 1, 1),
        f"l{number}.bias": (outputs,),
    }


def published_shapes(outputs):
    """Every parameter of a published file; `outputs` is 256 in stage 1 and the number of clusters in stage 2."""
    shapes = {
        "conv1.weight": (64, 3, 7, 7),
        "conv1.bias": (64,),
        "bn1.weight": (64,),
        "bn1.bias": (64,),
    }
    shapes |= block_shapes("conv2", 64, 128) | block_shapes("conv3", 128, 128) | block_shapes("conv4", 128, 256)
    for name in "b1_4 b2_4 b1_3 b2_3 b1_2 b2_2 b1_1 b2_1 b2_plus_1 b3_1 b4_1 b3_2 b4_2 b3_3 b4_3 b3_4 b4_4".split():
        shapes |= block_shapes(f"m0.{name}", 256, 256)
    return shapes | head_shapes(0, 1) | head_shapes(1, outputs)


def random_weights(outputs, seed=0):
    """Weights of which no two are alike, norms included, so that a mix-up of any two shows."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in published_shapes(outputs).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            weights[name] = noise / (shape[1] * shape[2] * shape[3]) ** 0.5
        elif name.endswith("weight"):
            weights[name] = 1 + 0.3 * noise
        else:
            weights[name] = 0.3 * noise
    return weights


def group_norm(x, weights, name):
    """32 groups of channels, each with mean 0 and variance 1, then scaled and shifted per channel."""
    batch, channels, height, width = x.shape
    grouped = x.reshape(batch, 32, channels // 32 * height * width)
    mean = grouped.mean(2, keepdim=True)
    variance = ((grouped - mean) ** 2).mean(2, keepdim=True)
    normal = ((grouped - mean) / torch.sqrt(variance + 1e-5)).reshape(x.shape)
    return normal * weights[f"{name}.weight"].reshape(1, -1, 1, 1) + weights[f"{name}.bias"].reshape(1, -1, 1, 1)


def block(x, weights, name):
    """A residual block."""

    def layer(x, number):
        active = group_norm(x, weights, f"{name}.bn{number}").clamp(min=0)
        return functional.conv2d(active, weights[f"{name}.conv{number}.weight"], padding=1)

    first = layer(x, 1)
    second = layer(first, 2)
    third = layer(second, 3)
    if f"{name}.downsample.2.weight" in weights:
        x = group_norm(x, weights, f"{name}.downsample.0").clamp(min=0)
        x = functional.conv2d(x, weights[f"{name}.downsample.2.weight"])
    return torch.cat([first, second, third], 1) + x


def half_size(x):
    """Mean of each 2 x 2 square."""
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


def double_size(x):
    """Each value as a 2 x 2 square."""
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def hourglass(x, weights, level=4):
    """The hourglass from one level inwards; the b4 blocks are not called by anyone."""
    lower = block(half_size(x), weights, f"m0.b2_{level}")
    lower = block(lower, weights, "m0.b2_plus_1") if level == 1 else hourglass(lower, weights, level - 1)
    lower = block(lower, weights, f"m0.b3_{level}")
    return block(x, weights, f"m0.b1_{level}") + double_size(lower)


def head(x, weights, number):
    """A head."""
    x = block(x, weights, f"top_m_{number}")
    x = functional.conv2d(x, weights[f"conv_last{number}.weight"], weights[f"conv_last{number}.bias"])
    x = group_norm(x, weights, f"bn_end{number}").clamp(min=0)
    return functional.conv2d(x, weights[f"l{number}.weight"], weights[f"l{number}.bias"])


@torch.no_grad()
def published_network(weights, image_B3SS):
    """Detector heatmap after the sigmoid, and descriptors (stage 1) or landmark heatmaps (stage 2)."""
    x = functional.conv2d(image_B3SS, weights["conv1.weight"], weights["conv1.bias"], stride=2, padding=3)
    x = group_norm(x, weights, "bn1").clamp(min=0)
    x = half_size(block(x, weights, "conv2"))
    x = block(block(x, weights, "conv3"), weights, "conv4")
    x = hourglass(x, weights)
    return 1 / (1 + torch.exp(-head(x, weights, 0))), head(x, weights, 1)
