"""Which k-means is how fast? `python -m benchmarks.kmeans`: ours in torch, cuML, scikit-learn, faiss, where they are.

Same rows, same start, same number of iterations; the inertias must agree. Needs torch and numpy alone.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import machine, summed_up
from cluster import kmeans

Fit = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def by_torch(x: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
    """Ours, on the GPU where there is one."""
    return kmeans.fit(x, len(start), start=start, iterations=iterations, tolerance=-1.0, backend="torch").centroids


def by_cuml(x: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
    """Ours, with cuML behind it."""
    return kmeans.fit(x, len(start), start=start, iterations=iterations, tolerance=-1.0, backend="cuml").centroids


def by_sklearn(x: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
    """scikit-learn's Lloyd."""
    from sklearn.cluster import KMeans

    model = KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
    return np.asarray(model.fit(x).cluster_centers_)


def by_faiss(x: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
    """faiss, on the CPU or GPU that it was built for."""
    import faiss

    model = faiss.Kmeans(x.shape[1], len(start), niter=iterations, max_points_per_centroid=len(x))
    model.train(x, init_centroids=start)
    return np.asarray(model.centroids)


METHODS: dict[str, Fit] = {"torch": by_torch, "cuml": by_cuml, "scikit-learn": by_sklearn, "faiss": by_faiss}


def inertia(x: np.ndarray, centroids: np.ndarray) -> float:
    """Mean squared distance to the nearest centroid, computed by none of the methods."""
    rows, centres = torch.from_numpy(x), torch.from_numpy(np.asarray(centroids, np.float32))
    return float(np.mean([torch.cdist(part, centres).amin(1).square().mean() for part in rows.split(10_000)]))


def main(
    rows: int = 500_000,
    width: int = 256,
    clusters: int = 100,
    iterations: int = 100,
    repeats: int = 3,
    threads: int = 0,
) -> None:
    """Measures and prints.

    Args:
        rows: N.
        width: D.
        clusters: K.
        iterations: Lloyd steps, all of which are taken.
        repeats: whose median counts, after one that warms up.
        threads: of the CPU; 0 for all.
    """
    if threads:
        torch.set_num_threads(threads)
    console = Console(width=120)
    console.print(machine(), f"{rows} x {width}, K = {clusters}, {iterations} iterations")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3 * clusters, width))
    x = (centres[rng.integers(0, len(centres), rows)] + rng.normal(size=(rows, width))).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    start = x[rng.choice(rows, clusters, replace=False)].copy()
    table = Table("", "seconds", "inertia")
    for name, fit in METHODS.items():
        try:
            fit(x[: 10 * clusters], start, 1)
        except (ImportError, RuntimeError) as error:
            table.add_row(name, f"not here: {str(error)[:60]}", "")
            continue
        taken = []
        for _ in range(repeats):
            started = time.perf_counter()
            centroids = fit(x, start, iterations)
            taken.append(time.perf_counter() - started)
        table.add_row(name, summed_up(taken), f"{inertia(x, centroids):.5f}")
    console.print(table)


if __name__ == "__main__":
    tyro.cli(main)
