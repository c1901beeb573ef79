"""What does a training example cost before the network? `python -m benchmarks.input`.

Core milliseconds for a pair of stage 1 at full size, all threads together: decoding and collating two images (ours
decodes one for each pair, since a pair's second image is another one of the batch), random views with their targets,
and the same by a straightforward rendition of the published pipeline, in turns.
"""

import cv2
import numpy as np
import simplejpeg
import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import core_seconds, machine, summed_up
from benchmarks.published import stage1_pair
from sst.augment import Augmentation, augment
from sst.batch import Batch
from sst.data import collate, decode_to_view
from sst.losses import detector_target
from sst.shards import RawSample, SampleMeta
from sst.toy import draw


def samples(count: int, side: int, points: int) -> tuple[list[RawSample], np.ndarray]:
    """Drawings as stored JPEG bytes, and points on them in heatmap units."""
    rng = np.random.default_rng(0)
    stored = []
    for number in range(count):
        image = cv2.resize(draw(0, number, 96).image, (side, side), interpolation=cv2.INTER_CUBIC)
        image = np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)  # as detailed as a photo
        meta = SampleMeta(source=str(number), split="train", box=(0.0, 0.0, float(side), float(side)))
        stored.append(RawSample(str(number), simplejpeg.encode_jpeg(image, 90), meta))
    return stored, rng.uniform(2, side / 4 - 2, (count, points, 2)).astype(np.float32)


def main(pairs: int = 16, side: int = 256, points: int = 40, repeats: int = 7) -> None:
    """Measures and prints.

    Args:
        pairs: of a step.
        side: of the stored image and of the view.
        points: on each image.
        repeats: whose median counts.
    """
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    stored, places = samples(pairs, side, points)
    cluster = [np.arange(points, dtype=np.int16)] * pairs
    told, generator, rng = Augmentation(), torch.Generator().manual_seed(0), np.random.default_rng(0)

    def load() -> Batch:
        return collate([decode_to_view(s, side) for s in stored], list(places), cluster, [s.key for s in stored])

    def views(batch: Batch) -> None:
        chosen = torch.cat([torch.arange(pairs), torch.randperm(pairs)])
        _, moved, own = augment(
            batch.images[chosen],
            batch.to_view[chosen],
            batch.points[chosen],
            batch.cluster[chosen],
            side,
            told,
            generator,
        )
        detector_target(moved, own, side // 4, side // 4)

    as_pixels = [[(4 * float(x), 4 * float(y)) for x, y in own] for own in places]

    def rendition() -> None:
        for number in range(pairs):
            other = (number + 1) % pairs
            jpegs = stored[number].jpeg, stored[other].jpeg
            stage1_pair(jpegs, (as_pixels[number], as_pixels[other]), side, told, rng)

    batch = load()
    loading, viewing, published = (core_seconds(work, repeats) for work in (load, lambda: views(batch), rendition))
    whole = [a + b for a, b in zip(loading, viewing, strict=True)]
    rows = {
        "ours: decode and collate two images": [2 * seconds for seconds in loading],
        "ours: decode and collate what a pair needs": loading,
        "ours: two views and targets, by torch on the CPU": viewing,
        "ours, all": whole,
        "published, straightforward": published,
    }
    console = Console(width=120)
    console.print(machine())
    table = Table("one thread", "core ms per pair")
    for name, seconds in rows.items():
        table.add_row(name, summed_up([1e3 * each / pairs for each in seconds]))
    table.add_row("ratio, with views on the CPU", summed_up([b / a for a, b in zip(whole, published, strict=True)]))
    table.add_row("ratio, with views on a GPU", summed_up([b / a for a, b in zip(loading, published, strict=True)]))
    console.print(table)


if __name__ == "__main__":
    tyro.cli(main)
