"""Lloyd's algorithm from sums per cluster, which is all that it needs of the rows, wherever those lie.

Shape letters: N rows, K clusters, D descriptor size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch.nn import functional

CHUNK = 16_384  # rows whose distances to all centroids are held at once
BLOCK = 512  # rows of a chunk that one core of a CPU works on at once

REFILLS = 20
"""How often empty clusters are refilled in one fit: rows that differ by less than float32 resolves cannot be split."""

SETTLING = 10
"""Steps that a refilled cluster is given to settle, where the allowed ones are used up."""

NUDGE = 0.1
"""How far the halves of a split cluster start apart, in units of its root mean square radius: far enough that float32
tells them apart, near enough that hardly a row goes over to a neighbour."""


@dataclass(frozen=True)
class Sums:
    """What a Lloyd step needs of rows, by nearest centroid; parts of the rows add up with `+`.

    Attributes:
        sums: float64 (K, D): sum of the rows.
        counts: int64 (K,): their number.
        errors: float64 (K,): sum of their squared L2 distances to the centroid.
    """

    sums: torch.Tensor
    counts: torch.Tensor
    errors: torch.Tensor

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.sums + other.sums, self.counts + other.counts, self.errors + other.errors)

    def cpu(self) -> "Sums":
        """The same in main memory."""
        return Sums(self.sums.cpu(), self.counts.cpu(), self.errors.cpu())


class Rows:
    """Rows on the device, and what every step needs to know of them.

    Distances are taken about an origin, the rows' mean: descriptors in a narrow cone about a common direction would
    lose in float32 what tells them apart.
    """

    def __init__(self, x_ND: torch.Tensor, origin_D: torch.Tensor) -> None:
        """Takes float32 rows, which stay as they are, and the origin."""
        self.x, self._origin_D = x_ND, origin_D.to(x_ND)
        chunks = torch.split(x_ND, CHUNK)
        self._square_N = torch.cat([(chunk - self._origin_D).square_().sum(dim=1) for chunk in chunks])

    def sums(self, centroids_KD: torch.Tensor) -> Sums:
        """A Lloyd step's sums; of centroids that are equally near the first counts."""
        x_ND, clusters = self.x, len(centroids_KD)
        sums = torch.zeros_like(centroids_KD, dtype=torch.float64)
        counts = torch.zeros(clusters, dtype=torch.int64, device=x_ND.device)
        errors = torch.zeros(clusters, dtype=torch.float64, device=x_ND.device)
        offset_KD = centroids_KD - self._origin_D
        # |x - c|^2 = |x - o|^2 + (|c - o|^2 + 2 o (c - o)) - 2 x (c - o), with the origin o
        norm_K = (offset_KD * (offset_KD + 2 * self._origin_D)).sum(dim=1)
        nearest_of = _nearest_on_gpu if x_ND.is_cuda else _nearest_on_cpu
        whole = len(x_ND) - len(x_ND) % BLOCK  # whole blocks first, then the rows that fill no block
        squares = (*torch.split(self._square_N[:whole], CHUNK), *torch.split(self._square_N[whole:], CHUNK))
        chunks = (*torch.split(x_ND[:whole], CHUNK), *torch.split(x_ND[whole:], CHUNK))
        for chunk, square in zip(chunks, squares, strict=True):
            if not len(chunk):
                continue
            partial, nearest, order = nearest_of(chunk, offset_KD, norm_K)
            number = torch.bincount(nearest, minlength=clusters)
            # Rows in the order of their centroids are summed bag by bag: seven times as fast as adding row by row.
            bags = number.cumsum(0) - number
            distance = (partial + square).clamp_(min=0)
            sums += functional.embedding_bag(order, chunk, bags, mode="sum")
            errors += functional.embedding_bag(order, distance[:, None], bags, mode="sum")[:, 0]
            counts += number
        return Sums(sums, counts, errors)


def _nearest_on_gpu(
    x_ND: torch.Tensor, offset_KD: torch.Tensor, norm_K: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row: squared distance to the nearest centroid less its own square, that centroid; and rows by centroid.

    All three are (N,): float32, int64, and int64 row numbers, which within a centroid ascend.
    """
    distance_N, nearest_N = torch.addmm(norm_K, x_ND, offset_KD.T, alpha=-2).min(dim=1)
    return distance_N, nearest_N, nearest_N.argsort(stable=True)


def _nearest_on_cpu(
    x_ND: torch.Tensor, offset_KD: torch.Tensor, norm_K: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `_nearest_on_gpu`, block by block (B), each of N rows that stay in a core's cache."""
    clusters, width = offset_KD.shape
    blocks_BND = x_ND.view(-1, min(BLOCK, len(x_ND)), width)
    offset_BKD = offset_KD.expand(len(blocks_BND), clusters, width)
    closeness_BKN = torch.baddbmm(-norm_K[:, None], offset_BKD, blocks_BND.mT, alpha=2)
    # Torch's only vectorised arg max on CPUs is the pooling of channels-last images: here K high, a row a channel.
    images_BNK1 = closeness_BKN[:, :, None].movedim(3, 1)
    best, nearest = functional.max_pool2d(images_BNK1, (clusters, 1), return_indices=True)
    # NumPy sorts integers of up to 16 bits by radix, seven times as fast as torch.
    small = nearest.flatten().numpy().astype(np.min_scalar_type(clusters))
    return -best.flatten(), nearest.flatten(), torch.from_numpy(np.argsort(small, kind="stable"))


def moments(x_ND: torch.Tensor) -> tuple[np.ndarray, float]:
    """Sum of the rows (D,) and of all their squares, in float64; the latter is finite where every row is."""
    total = torch.zeros(x_ND.shape[1], dtype=torch.float64, device=x_ND.device)
    square = torch.zeros((), dtype=torch.float64, device=x_ND.device)
    for chunk in torch.split(x_ND, CHUNK):
        total += (wide := chunk.double()).sum(dim=0)
        square += wide.square_().sum()
    return total.cpu().numpy(), float(square)


def lloyd(
    sums_at: Callable[[torch.Tensor], Sums],
    start_KD: torch.Tensor,
    *,
    iterations: int,
    small: float,
    rng: np.random.Generator,
    settled: bool = False,
) -> tuple[torch.Tensor, Sums, int]:
    """Moves centroids to the means of their rows until they rest; an empty cluster takes half of a large one.

    Args:
        sums_at: the rows' sums for given centroids.
        start_KD: centroids to start from, float32.
        iterations: most steps; where a cluster is empty then, a few more.
        small: the centroids rest when the sum of their squared shifts is at most this.
        rng: draws the directions in which clusters are split.
        settled: whether the start is at rest already, so that only empty clusters are a reason to move.

    Returns:
        The centroids, the sums at them, and the steps taken.
    """
    centroids_KD, refills, maximum = start_KD, 0, iterations
    for taken in count():
        found = sums_at(centroids_KD)
        if refills < REFILLS and bool((found.counts == 0).any()):
            moved_KD = refilled(means(found, centroids_KD), found, rng)
            refills, maximum, settled = refills + 1, max(maximum, taken + SETTLING), False
        elif settled or taken >= maximum:
            return centroids_KD, found, taken
        else:
            moved_KD = means(found, centroids_KD)
            settled = float((moved_KD - centroids_KD).square().sum()) <= small
        centroids_KD = moved_KD
    raise AssertionError("unreachable: the count has no end")


def means(found: Sums, centroids_KD: torch.Tensor) -> torch.Tensor:
    """The new centroids, float32; one without rows stays where it is."""
    mean_KD = (found.sums / found.counts.clamp(min=1)[:, None]).float()
    return torch.where((found.counts > 0)[:, None], mean_KD, centroids_KD)


def refilled(centroids_KD: torch.Tensor, found: Sums, rng: np.random.Generator) -> torch.Tensor:
    """Centroids of which each empty one has taken half of the cluster with the largest summed squared distance.

    Both halves start a little to either side of the donor's centroid, in a random direction, so the plane between them
    goes through it.
    """
    moved_KD = centroids_KD.cpu().clone()
    errors_K, counts_K = found.errors.cpu().numpy().copy(), found.counts.cpu().numpy().astype(np.float64)
    for cluster in np.flatnonzero(counts_K == 0):
        donor = int(np.where(counts_K > 1, errors_K, 0).argmax())
        if errors_K[donor] <= 0:
            break  # every row lies on its centroid: there is nothing to share out
        direction_D = rng.standard_normal(moved_KD.shape[1])
        radius = np.sqrt(errors_K[donor] / counts_K[donor])
        shift_D = torch.from_numpy(NUDGE * radius / np.linalg.norm(direction_D) * direction_D).float()
        moved_KD[cluster] = moved_KD[donor] + shift_D
        moved_KD[donor] -= shift_D
        errors_K[cluster] = errors_K[donor] = errors_K[donor] / 2
        counts_K[cluster] = counts_K[donor] = counts_K[donor] / 2
    return moved_KD.to(centroids_KD.device)
