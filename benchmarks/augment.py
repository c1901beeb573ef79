"""How fast are random views, and what takes the time? `python -m benchmarks.augment`.

The batched augmentation of stage 1 on the training device, whole and by its parts. Needs torch and numpy alone.
"""

import argparse
import statistics

import torch

from benchmarks.common import device_of_run, idle_share, machine, print_table, sizes_of, summed_up, wall_seconds
from sst.nn import augment
from sst.nn.steps import random_batch


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "cpu"), default="full" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=32, help="of a batch")
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    device, sizes = device_of_run(), sizes_of(given.size)
    side, ranges = sizes.stage1.input_size, sizes.stage1.augmentation
    batch, generator = (
        random_batch(given.images, sizes.stage1.input_size, sizes.clusters).to(device),
        torch.Generator(device).manual_seed(0),
    )
    views = augment.warp_images(batch.images, batch.to_view, side)
    ones, colours = torch.ones(given.images, device=device), augment.Colours.draw(given.images, ranges, generator)
    work = {
        "all": lambda: augment.augment(
            batch.images, batch.stored, batch.to_view, batch.points, side, ranges, generator
        ),
        "warp": lambda: augment.warp_images(batch.images, batch.to_view, side),
        "blur, contrast, noise, brightness, colour": lambda: colours(views, generator),
        "hue and saturation of all images": lambda: augment.multiply_hue_saturation(views, ones, ones),
        "blur of all images": lambda: augment.blur(views, ones),
    }
    print(machine(), f"idle before: {100 * idle_share():.0f} %", f"{given.images} images of {side} px", sep="; ")
    rows = []
    for name, each in work.items():
        taken = wall_seconds(each, given.repeats, warm_up=3)
        rate = given.images / statistics.median(taken)
        rows.append((name, summed_up([1e3 * seconds for seconds in taken]), f"{rate:.0f}"))
    print_table(("", "ms per batch", "images/s"), rows)


if __name__ == "__main__":
    main()
