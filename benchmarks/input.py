"""What does a training example cost before the network? `python -m benchmarks.input`.

Core milliseconds for a pair of stage 1 at full size, all threads together: decoding and collating two images (ours
decodes one for each pair, since a pair's second image is another one of the batch), random views with their targets
and which points make pairs, and the same by a straightforward rendition of the published pipeline, in turns. The
host's part of views made on a GPU is seen with images of 8 px: what is left is asking for each operation. Each image
has so many points, of different clusters, drawn out of 100 for each image; half of the pairs are of one image.
"""

from dataclasses import replace

import cv2
import numpy as np
import simplejpeg
import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import core_seconds, idle_share, machine, summed_up
from benchmarks.published import pair_table, stage1_pair
from sst.corpora.drawings import draw
from sst.data.loader import collate, decode_to_view
from sst.data.shards import RawSample, SampleMeta
from sst.nn import augment as augment_module
from sst.nn.augment import Augmentation, augment
from sst.nn.losses import Labelled, detector_target, pair_masks
from sst.nn.steps import Batch

CLUSTERS = 100
"""K of the published runs on faces."""


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
    rng = np.random.default_rng(0)
    cluster = [rng.permutation(CLUSTERS)[:points].astype(np.int16) for _ in range(pairs)]
    given, generator = Augmentation(), torch.Generator().manual_seed(0)

    def load() -> Batch:
        return collate([decode_to_view(s, side) for s in stored], list(places), cluster, [s.key for s in stored])

    def views(batch: Batch, side: int) -> None:
        chosen = torch.cat([torch.arange(pairs), partner])
        _, moved, inside = augment(
            batch.images[chosen],
            batch.stored[chosen],
            batch.to_view[chosen],
            batch.points[chosen],
            side,
            given,
            generator,
        )
        each = batch.cluster[chosen]
        detector_target(moved, torch.where(inside, each, -1), side // 4, side // 4)
        pair_masks(Labelled(each[:pairs], inside[:pairs]), Labelled(each[pairs:], inside[pairs:]))

    partner = torch.where(torch.arange(pairs) % 2 == 0, torch.arange(pairs), (torch.arange(pairs) + 1) % pairs)
    labelled = [np.column_stack([4 * item, which]) for item, which in zip(places, cluster, strict=True)]

    def rendition() -> None:
        for number, other in enumerate(partner.tolist()):
            jpegs = stored[number].jpeg, stored[other].jpeg
            stage1_pair(jpegs, (labelled[number], labelled[other]), side, given, rng)

    def only_pairs() -> None:
        for number, other in enumerate(partner.tolist()):
            pair_table(*(labelled[each] / (4, 4, 1) for each in (number, other)), side // 4)

    def asking() -> None:
        free, augment_module.free_to_look = augment_module.free_to_look, lambda device: False
        views(tiny, 8)
        augment_module.free_to_look = free

    batch = load()
    tiny = replace(batch, images=batch.images[:, :8, :8].contiguous(), points=batch.points / (side / 8))
    work = (load, lambda: views(batch, side), asking, rendition, only_pairs)
    rounds = [[core_seconds(each, 1, warm_up=0)[0] for each in work] for _ in range(1 + repeats)][1:]
    loading, viewing, launching, published, pairing = (list(column) for column in zip(*rounds, strict=True))
    whole = [a + b for a, b in zip(loading, viewing, strict=True)]
    host = [a + b for a, b in zip(loading, launching, strict=True)]
    rows = {
        "ours: decode and collate two images": [2 * seconds for seconds in loading],
        "ours: decode and collate what a pair needs": loading,
        "ours: two views, targets and pairs, by torch on the CPU": viewing,
        "ours, all": whole,
        "the host's part of views on a GPU": launching,
        "ours with a GPU, all of the host": host,
        "published, straightforward": published,
        "of it the table of pairs": pairing,
    }
    console = Console(width=120)
    console.print(machine(), f"idle before: {100 * idle_share():.0f} %")
    table = Table("one thread", "core ms per pair")
    for name, seconds in rows.items():
        table.add_row(name, summed_up([1e3 * each / pairs for each in seconds]))
    images_only = [a - b for a, b in zip(published, pairing, strict=True)]
    for name, theirs, item in (
        ("ratio, with views on the CPU", published, whole),
        ("the same without the table of pairs", images_only, whole),
        ("ratio, with views on a GPU", published, host),
        ("the same without the table of pairs ", images_only, host),
    ):
        table.add_row(name, summed_up([b / a for a, b in zip(item, theirs, strict=True)]))
    console.print(table)


if __name__ == "__main__":
    tyro.cli(main)
