"""What must a training step at least compute and move? `python -m benchmarks.layers`.

By kind of layer of the published network in stage 1: FLOP, bytes, and the time that either takes at a peak and a
bandwidth. Every kind is counted as one kernel that reads what it needs once and writes its result once; values have two
bytes (bf16):

- convolution: forward reads input and weights; backward reads gradient and weights, then gradient and input;
- normalisation with ReLU: statistics first, so the input is read twice forward, and input and gradient twice backward;
- joining: three parts and the shortcut are read, and their sum written; backward each part's gradient is copied out;
- halving and doubling with the addition to the upper path.

What is left out: views, losses, the update (each about a millisecond in the measured step), and the additions of
gradients where paths fork. Nothing is computed: the network runs on shapes alone.
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.common import print_table, sizes_of
from sst.nn.network import DetectorDescriptor, Hourglass, NetworkShape, NormRelu, ResidualBlock

VALUE = 2
"""Bytes."""


@dataclass
class Cost:
    """FLOP and bytes of an image, forward and backward, and how many layers have them."""

    flop: float = 0.0
    moved: float = 0.0
    layers: int = 0

    def add(self, flop: float, values: float) -> None:
        """One layer more."""
        self.flop, self.moved, self.layers = self.flop + flop, self.moved + VALUE * values, self.layers + 1


def convolution(layer: nn.Conv2d, inputs: int, outputs: int, images: int) -> tuple[float, float]:
    """FLOP and values moved for an image; weights are shared by the images of a step."""
    kernel = layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
    weights = layer.out_channels * kernel / images
    return 3 * 2 * outputs * kernel, 3 * (inputs + outputs + weights)


def costs_of(shape: NetworkShape, size: int, images: int) -> dict[str, Cost]:
    """Costs of an image by kind of layer, from one pass over shapes."""
    with torch.device("meta"):
        network = DetectorDescriptor(shape)
    costs: dict[str, Cost] = defaultdict(Cost)

    def note(layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        inputs, outputs = given[0][0].numel(), out[0].numel()
        if isinstance(layer, nn.Conv2d):
            side = layer.kernel_size[0]
            costs[f"convolution {side} x {side}"].add(*convolution(layer, inputs, outputs, images))
        elif isinstance(layer, NormRelu):
            costs["normalisation with ReLU"].add(0, (2 + 1) * inputs + (2 + 2 + 1) * inputs)
        elif isinstance(layer, ResidualBlock):
            costs["joining"].add(0, (2 + 1) * outputs + 2 * outputs)
        elif isinstance(layer, Hourglass):
            costs["halving"].add(0, 2 * 1.25 * inputs)
            costs["doubling with addition"].add(0, (1.25 + 1) * outputs + 1.25 * outputs)

    for layer in network.modules():
        layer.register_forward_hook(note)
    network(torch.zeros(1, 3, size, size, device="meta"))
    return costs


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="in a step")
    parser.add_argument("--peak", type=float, default=700, help="TFLOP/s in bf16 that convolutions can reach")
    parser.add_argument("--bandwidth", type=float, default=4.0, help="TB/s of the memory")
    given = parser.parse_args()
    sizes = sizes_of("full")
    rows, total, floor = [], Cost(), 0.0
    for kind, cost in costs_of(sizes.shape, sizes.stage1.input_size, given.images).items():
        computing = given.images * cost.flop / given.peak / 1e9
        moving = given.images * cost.moved / given.bandwidth / 1e9
        floor += max(computing, moving)
        total = Cost(total.flop + cost.flop, total.moved + cost.moved, total.layers + cost.layers)
        of_image = f"{cost.flop / 1e9:.2f}", f"{cost.moved / 1e6:.0f}"
        rows.append((kind, str(cost.layers), *of_image, f"{computing:.2f}", f"{moving:.2f}"))
    rows.append(("all", str(total.layers), f"{total.flop / 1e9:.2f}", f"{total.moved / 1e6:.0f}", "", ""))
    print_table(("layer", "number", "GFLOP an image", "MB an image", "ms computing", "ms moving"), rows)
    speed = 1000 * given.images / floor
    print(f"\nThe larger of both, summed up: {floor:.2f} ms for {given.images} images, {speed:.0f} images/s.")


if __name__ == "__main__":
    main()
