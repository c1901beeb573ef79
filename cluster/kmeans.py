"""k-means over a sample of descriptors: cuML on a GPU, torch everywhere, one interface.

Shape letters: N rows, K clusters, D descriptor size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn import functional

Backend = Literal["auto", "torch", "cuml"]

CHUNK = 16_384  # rows whose distances to all centroids are held at once
BLOCK = 512  # rows of a chunk that one core of a CPU works on at once
SEEDING_ROWS = 50_000  # k-means++ looks at no more rows than this


@dataclass(frozen=True)
class KMeansResult:
    """A fitted clustering.

    Attributes:
        centroids: float32 (K, D).
        inertia: mean squared L2 distance of a row to its nearest centroid.
        counts: int64 (K,): rows nearest to each centroid.
        iterations: Lloyd steps taken.
        backend: "torch" or "cuml".
        empty: clusters without a row; they keep their previous centroid.
    """

    centroids: np.ndarray
    inertia: float
    counts: np.ndarray
    iterations: int
    backend: str
    empty: int


def choose_backend(requested: Backend = "auto") -> Literal["torch", "cuml"]:
    """Decides what computes: "auto" takes cuML where a GPU is usable, torch elsewhere.

    Raises:
        ValueError: if the name is unknown.
        RuntimeError: if cuML is asked for where there is no GPU or no cuML.
    """
    if requested not in ("auto", "torch", "cuml"):
        raise ValueError(f"k-means backend {requested!r} is unknown; take auto, torch or cuml")
    if requested == "torch":
        return "torch"
    obstacle = _cuml_obstacle()
    if obstacle is None:
        return "cuml"
    if requested == "cuml":
        raise RuntimeError(f"k-means backend cuml cannot run here: {obstacle}; take backend torch or auto")
    return "torch"


def fit(
    x_ND: np.ndarray,
    clusters: int,
    *,
    iterations: int = 100,
    tolerance: float = 1e-4,
    seed: int = 0,
    start: np.ndarray | None = None,
    backend: Backend = "auto",
) -> KMeansResult:
    """Clusters rows by Lloyd's algorithm, seeded by k-means++ or by given centroids.

    On the CPU the result is a function of the arguments and the number of threads.

    Args:
        x_ND: rows, any float type; computed in float32.
        clusters: K.
        iterations: most Lloyd steps.
        tolerance: stops when the summed squared shift of the centroids is at most this share of the mean
            variance of a column.
        seed: of the seeding.
        start: centroids (K, D) to start from, such as the previous round's: clusters keep their numbers.
        backend: see `choose_backend`.

    Raises:
        ValueError: if there are fewer distinct rows than clusters, a row is not finite, or shapes disagree.
        RuntimeError: if cuML is asked for where it cannot run.

    Source: Mallis et al. 2020, section 3.2; seeding: Arthur and Vassilvitskii 2007.
    """
    x_ND = np.ascontiguousarray(x_ND, dtype=np.float32)
    _check(x_ND, clusters, start)
    chosen = choose_backend(backend)
    solve = _solve_cuml if chosen == "cuml" else _solve_torch
    centroids_KD, steps = solve(x_ND, clusters, iterations, tolerance, seed, start)

    x, centroids = _to_device(x_ND), _to_device(centroids_KD)
    _, counts, total = nearest_sums(x, centroids)
    return KMeansResult(
        centroids=centroids_KD,
        inertia=max(0.0, float(total) + total_squares(x)) / len(x_ND),
        counts=counts.cpu().numpy(),
        iterations=steps,
        backend=chosen,
        empty=int((counts == 0).sum()),
    )


def sample_rows(rows_per_shard: Sequence[int], size: int, seed: int) -> list[np.ndarray]:
    """Draws rows uniformly without replacement over all shards, needing the memory of one shard.

    Args:
        rows_per_shard: rows that each shard has.
        size: rows to draw; all rows where there are no more.
        seed: of the draw.

    Returns:
        For each shard its sorted row indices, int64.

    Raises:
        ValueError: if the size is negative.
    """
    if size < 0:
        raise ValueError(f"a sample of {size} rows cannot be drawn")
    if size >= sum(rows_per_shard):
        return [np.arange(rows, dtype=np.int64) for rows in rows_per_shard]
    rng = np.random.default_rng(seed)
    shares = rng.multivariate_hypergeometric(list(rows_per_shard), size)
    return [
        np.sort(rng.choice(rows, share, replace=False, shuffle=False)).astype(np.int64)
        for rows, share in zip(rows_per_shard, shares, strict=True)
    ]


def _check(x_ND: np.ndarray, clusters: int, start: np.ndarray | None) -> None:
    if x_ND.ndim != 2:
        raise ValueError(f"k-means needs rows (N, D), not an array of shape {x_ND.shape}")
    if clusters < 1:
        raise ValueError(f"k-means needs at least 1 cluster, not {clusters}")
    check_rows(len(x_ND), count_broken(x_ND), len(distinct_rows(x_ND, enough=clusters)), clusters)
    check_start(start, clusters, x_ND.shape[1])


def check_rows(rows: int, broken: int, distinct: int, clusters: int) -> None:
    """Refuses what can't be clustered.

    Args:
        rows: number of rows.
        broken: rows that are not finite.
        distinct: distinct rows, counted to `clusters` at most.
        clusters: K.

    Raises:
        ValueError: naming the numbers.
    """
    if broken:
        raise ValueError(f"{broken} of {rows} descriptors are not finite; drop them before k-means")
    if distinct < clusters:
        raise ValueError(
            f"{clusters} clusters need at least as many distinct descriptors, and there are only {distinct} "
            f"({rows} in all); take fewer clusters or find more keypoints"
        )


def check_start(start: np.ndarray | None, clusters: int, width: int) -> None:
    """Refuses start centroids of another shape.

    Raises:
        ValueError: naming both shapes.
    """
    if start is not None and start.shape != (clusters, width):
        raise ValueError(f"start centroids have shape {start.shape}, needed is {(clusters, width)}")


def count_broken(x_ND: np.ndarray) -> int:
    """Rows that are not finite."""
    return len(x_ND) - int(np.isfinite(x_ND).all(axis=1).sum())


def distinct_rows(x_ND: np.ndarray, enough: int) -> set[bytes]:
    """Distinct rows, sought no further than `enough`, so that real data is hardly looked at."""
    seen: set[bytes] = set()
    for row_D in x_ND:
        seen.add((row_D + 0).tobytes())  # + 0 makes -0.0 equal 0.0
        if len(seen) >= enough:
            break
    return seen


def _to_device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to("cuda" if torch.cuda.is_available() else "cpu")


def _solve_torch(
    x_ND: np.ndarray, clusters: int, iterations: int, tolerance: float, seed: int, start: np.ndarray | None
) -> tuple[np.ndarray, int]:
    if start is None:
        start = plus_plus(seeding_rows(x_ND, clusters, rng := np.random.default_rng(seed)), clusters, rng)
    x, centroids = _to_device(x_ND), _to_device(start.astype(np.float32))
    small = tolerance * total_squares(x, x.mean(dim=0)) / x.numel()
    for step in range(1, iterations + 1):
        previous = centroids
        sums, counts, _ = nearest_sums(x, previous)
        centroids = means(sums, counts, previous)
        if float((centroids - previous).square().sum()) <= small:
            return centroids.cpu().numpy(), step
    return centroids.cpu().numpy(), iterations


def nearest_sums(x_ND: torch.Tensor, centroids_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the rows nearest to each centroid: sum (K, D) float64 and number (K,) int64.

    And, as a scalar, the total squared distance less the rows' own squares, which no step changes; see `total_squares`.
    Of centroids that are equally near the first counts.
    """
    clusters = len(centroids_KD)
    sums = torch.zeros_like(centroids_KD, dtype=torch.float64)
    counts = torch.zeros(clusters, dtype=torch.int64, device=x_ND.device)
    total = torch.zeros((), dtype=torch.float64, device=x_ND.device)
    norm_K = centroids_KD.square().sum(dim=1)
    nearest_of = _nearest_on_gpu if x_ND.is_cuda else _nearest_on_cpu
    whole = len(x_ND) - len(x_ND) % BLOCK  # whole blocks first, then the rows that fill no block
    for chunk in filter(len, (*torch.split(x_ND[:whole], CHUNK), *torch.split(x_ND[whole:], CHUNK))):
        partial, nearest, order = nearest_of(chunk, centroids_KD, norm_K)
        number = torch.bincount(nearest, minlength=clusters)
        # Rows in the order of their centroids are summed bag by bag: seven times as fast as adding row by row.
        sums += functional.embedding_bag(order, chunk, number.cumsum(0) - number, mode="sum")
        counts += number
        total += partial.sum(dtype=torch.float64)
    return sums, counts, total


def _nearest_on_gpu(
    x_ND: torch.Tensor, centroids_KD: torch.Tensor, norm_K: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row: squared distance to the nearest centroid less its own square, that centroid; and rows by centroid.

    All three are (N,): float32, int64, and int64 row numbers, which within a centroid ascend.
    """
    distance_N, nearest_N = torch.addmm(norm_K, x_ND, centroids_KD.T, alpha=-2).min(dim=1)
    return distance_N, nearest_N, nearest_N.argsort(stable=True)


def _nearest_on_cpu(
    x_ND: torch.Tensor, centroids_KD: torch.Tensor, norm_K: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `_nearest_on_gpu`, block by block (B), each of N rows that stay in a core's cache."""
    clusters, width = centroids_KD.shape
    blocks_BND = x_ND.view(-1, min(BLOCK, len(x_ND)), width)
    centroids_BKD = centroids_KD.expand(len(blocks_BND), clusters, width)
    closeness_BKN = torch.baddbmm(-norm_K[:, None], centroids_BKD, blocks_BND.mT, alpha=2)
    # Torch's only vectorised arg max on CPUs is the pooling of channels-last images: here K high, a row a channel.
    images_BNK1 = closeness_BKN[:, :, None].movedim(3, 1)
    best, nearest = functional.max_pool2d(images_BNK1, (clusters, 1), return_indices=True)
    # NumPy sorts integers of up to 16 bits by radix, seven times as fast as torch.
    small = nearest.flatten().numpy().astype(np.min_scalar_type(clusters))
    return -best.flatten(), nearest.flatten(), torch.from_numpy(np.argsort(small, kind="stable"))


def total_squares(x_ND: torch.Tensor, origin_D: torch.Tensor | None = None) -> float:
    """Sum of the rows' squared distances to a point, or to 0, in float64."""
    origin_D = x_ND.new_zeros(()) if origin_D is None else origin_D
    chunks = torch.split(x_ND, CHUNK)
    return sum(float((chunk - origin_D).square_().sum(dim=1).sum(dtype=torch.float64)) for chunk in chunks)


def means(sums_KD: torch.Tensor, counts_K: torch.Tensor, centroids_KD: torch.Tensor) -> torch.Tensor:
    """The new centroids, float32; one without rows stays where it is."""
    return torch.where((counts_K > 0)[:, None], (sums_KD / counts_K.clamp(min=1)[:, None]).float(), centroids_KD)


def seeding_rows(x_ND: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """The rows that k-means++ looks at."""
    if len(x_ND) <= SEEDING_ROWS:
        return x_ND
    drawn = x_ND[np.sort(rng.choice(len(x_ND), SEEDING_ROWS, replace=False, shuffle=False))]
    return drawn if len(distinct_rows(drawn, clusters)) == clusters else x_ND


def plus_plus(x_ND: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++: each further centroid is a row drawn in proportion to its squared distance."""
    x = _to_device(x_ND)
    chosen = [int(rng.integers(len(x)))]
    nearest = torch.full((len(x),), torch.inf, device=x.device)
    while len(chosen) < clusters:
        # without a matrix product a copy of a chosen row is at distance 0 exactly, so it's never drawn
        latest = torch.cdist(x, x[chosen[-1], None], compute_mode="donot_use_mm_for_euclid_dist")
        nearest = torch.minimum(nearest, latest[:, 0].square())
        cumulative = nearest.cumsum(0, dtype=torch.float64)
        mark = cumulative[-1:] * rng.random()
        chosen.append(min(int(torch.searchsorted(cumulative, mark, right=True)), len(x) - 1))
    return x_ND[chosen]


def _cuml_obstacle() -> str | None:
    """Why cuML can't run here, or None. It imports without a GPU, so the import alone decides nothing."""
    try:
        import cupy
    except ImportError:
        return "cupy is not installed (extra gpu)"
    if not cupy.cuda.is_available():
        return "no usable GPU"
    try:
        import cuml  # noqa: F401
    except ImportError:
        return "cuml is not installed (extra gpu)"
    return None


def _solve_cuml(
    x_ND: np.ndarray, clusters: int, iterations: int, tolerance: float, seed: int, start: np.ndarray | None
) -> tuple[np.ndarray, int]:
    from cuml.cluster import KMeans

    # cuML compares the summed squared shift with `tol` itself, so the data's scale is put in here
    model = KMeans(
        n_clusters=clusters,
        max_iter=iterations,
        tol=tolerance * float(x_ND.var(axis=0).mean()),
        random_state=seed,
        init="scalable-k-means++" if start is None else np.ascontiguousarray(start, dtype=np.float32),
        n_init=1,
        output_type="numpy",
    )
    model.fit(x_ND)
    centroids_KD = np.ascontiguousarray(model.cluster_centers_, dtype=np.float32)
    return centroids_KD, int(model.n_iter_)
