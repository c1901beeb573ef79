"""How fast are keypoints and descriptors extracted, and what takes the time? `python -m benchmarks.extract`.

Batches of a round's extraction on the training device: forward pass, suppression, uniting with the previous labels,
sampling of descriptors, the way to the host. The detector's threshold is set to what gives 30 keypoints an image, and
each image has 30 previous labels. Needs torch and numpy alone.
"""

import argparse
import statistics

import torch
from torch import nn

from benchmarks.common import device_of_run, idle_share, machine, print_table, sizes_of, summed_up, wall_seconds
from sst.nn.losses import sample_descriptors
from sst.nn.network import DetectorDescriptor, use_kernels
from sst.nn.precision import laid_out
from sst.nn.steps import describe, keypoint_maps, random_batch
from sst.nn.suppression import decode_keypoints, unite

POINTS = 30
"""Keypoints and previous labels of an image."""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "cpu"), default="full" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=64, help="of a batch")
    parser.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto")
    parser.add_argument("--repeats", type=int, default=10)
    given = parser.parse_args()
    device, sizes = device_of_run(), sizes_of(given.size)
    side, images = sizes.stage1.input_size, given.images
    torch.manual_seed(0)
    if obstacle := use_kernels(device, sizes.shape, side, given.precision):
        print(f"without own kernels: {obstacle}")
    model: nn.Module = laid_out(DetectorDescriptor(sizes.shape), device).eval()
    batch = random_batch(images, sizes.stage1.input_size, sizes.clusters).to(device)
    labels = torch.rand(images, POINTS, 2, device=device) * (side // 4 - 1)
    with torch.inference_mode():
        heat, desc = keypoint_maps(model, batch, side, given.precision)
        every = decode_keypoints(heat, 0.0)[2].sort(descending=True).values
        threshold = float(every[min(len(every) - 1, POINTS * images)])
        image, found, _ = decode_keypoints(heat, threshold)
    padded = torch.rand(images, 2 * POINTS, 2, device=device) * (side // 4 - 1)
    described = torch.rand(images * 2 * POINTS, desc.shape[1], device=device).half()
    work = {
        "all, and to the host": lambda: [
            part.cpu()
            for part in describe(model, batch, labels, input_size=side, threshold=threshold, precision=given.precision)
        ],
        "views and forward pass": lambda: keypoint_maps(model, batch, side, given.precision),
        "suppression and decoding": lambda: decode_keypoints(heat, threshold),
        "uniting with the previous labels": lambda: unite(labels, image, found, side // 4, side // 4),
        "sampling of descriptors": lambda: sample_descriptors(desc, padded),
        "descriptors to the host": lambda: described.cpu(),
    }
    print(machine(), f"idle before: {100 * idle_share():.0f} %", f"{images} images of {side} px", sep="; ")
    rows, whole = [], 0.0
    with torch.inference_mode():
        for name, each in work.items():
            taken = wall_seconds(each, given.repeats, warm_up=3)
            middle = statistics.median(taken)
            whole = whole or middle
            milliseconds = summed_up([1e3 * seconds for seconds in taken])
            rows.append((name, milliseconds, f"{100 * middle / whole:.1f} %", f"{images / middle:.0f}"))
    print_table(("", "ms per batch", "of all", "images/s"), rows)


if __name__ == "__main__":
    main()
