"""How many images a second does one core assign to clusters? `python -m benchmarks.assign`.

A shard's descriptors, clustered loosely as a trained network's are, matched one to one to the centroids. Beside it the
same by the straightforward loop: distances by SciPy and the Hungarian algorithm for every image.
"""

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from threadpoolctl import threadpool_limits

from benchmarks.common import core_seconds, idle_share, machine, summed_up
from cluster.assignment import assign_shard
from cluster.shards import Descriptors


def shard(images: int, points: int, clusters: int, width: int, spread: float) -> tuple[Descriptors, np.ndarray]:
    """Descriptors of images whose points belong to different clusters, and the centroids."""
    rng = np.random.default_rng(0)
    centroids = rng.normal(size=(clusters, width)).astype(np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    each = np.concatenate([rng.permutation(clusters)[:points] for _ in range(images)])
    rows = centroids[each] + rng.normal(scale=spread / np.sqrt(width), size=(len(each), width))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    offsets = np.arange(images + 1) * points
    return Descriptors(offsets, np.zeros((len(each), 2), np.float32), rows.astype(np.float16)), centroids


def straightforward(descriptors: Descriptors, centroids: np.ndarray) -> None:
    """Image by image, in float64, as the published code does."""
    for first, last in zip(descriptors.offsets[:-1], descriptors.offsets[1:], strict=True):
        linear_sum_assignment(cdist(descriptors.descriptors[first:last].astype(np.float64), centroids, "sqeuclidean"))


def main(images: int = 1000, points: int = 40, clusters: int = 100, width: int = 256, repeats: int = 5) -> None:
    """Measures and prints.

    Args:
        images: of the shard.
        points: of each image.
        clusters: K.
        width: of a descriptor.
        repeats: whose median counts.
    """
    console = Console(width=120)
    console.print(machine(), f"idle before: {100 * idle_share():.0f} %")
    table = Table("spread about the centroids", "ours: images/s and core", "loop: images/s and core", "ratio")
    for spread in (0.5, 1.0, 1.5):
        descriptors, centroids = shard(images, points, clusters, width, spread)
        with threadpool_limits(1):  # as in a task of a round, of which there are as many as cores
            ours = core_seconds(lambda d=descriptors, c=centroids: assign_shard(d, c), repeats)
            loop = core_seconds(lambda d=descriptors, c=centroids: straightforward(d, c), repeats)
        ratios = [b / a for a, b in zip(ours, loop, strict=True)]
        rates = [[images / seconds for seconds in taken] for taken in (ours, loop)]
        table.add_row(f"{spread:g}", summed_up(rates[0]), summed_up(rates[1]), summed_up(ratios))
    console.print(table)


if __name__ == "__main__":
    tyro.cli(main)
