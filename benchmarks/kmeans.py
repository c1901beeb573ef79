"""Which k-means is how fast? `python -m benchmarks.kmeans`: ours in torch, cuML, scikit-learn, faiss, where they are.

Same rows, same start, the same most iterations, of which a method is spared those that would change nothing;
the inertias must agree. Methods take turns, so that other work on the machine slows all of them. Needs torch and
numpy alone.
"""

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.common import idle_share, machine, print_table, summed_up, wall_seconds
from cluster import kmeans

Fit = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, int]]
"""From rows, start centroids and the most iterations to centroids and iterations taken."""


def _ours(x: np.ndarray, start: np.ndarray, iterations: int, backend: kmeans.Backend) -> tuple[np.ndarray, int]:
    result = kmeans.fit(x, len(start), start=start, iterations=iterations, tolerance=0.0, backend=backend)
    return result.centroids, result.iterations


def by_torch(x: np.ndarray, start: np.ndarray, iterations: int) -> tuple[np.ndarray, int]:
    """Ours, on the GPU where there is one."""
    return _ours(x, start, iterations, "torch")


def by_cuml(x: np.ndarray, start: np.ndarray, iterations: int) -> tuple[np.ndarray, int]:
    """Ours, with cuML behind it."""
    return _ours(x, start, iterations, "cuml")


def by_sklearn(x: np.ndarray, start: np.ndarray, iterations: int) -> tuple[np.ndarray, int]:
    """scikit-learn's Lloyd."""
    from sklearn.cluster import KMeans

    model = KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
    model.fit(x)
    return np.asarray(model.cluster_centers_), int(model.n_iter_)


def by_faiss(x: np.ndarray, start: np.ndarray, iterations: int) -> tuple[np.ndarray, int]:
    """faiss, on the CPU or GPU that it was built for."""
    import faiss

    model = faiss.Kmeans(x.shape[1], len(start), niter=iterations, max_points_per_centroid=len(x))
    model.train(x, init_centroids=start)
    return np.asarray(model.centroids), iterations


METHODS: dict[str, Fit] = {"torch": by_torch, "cuml": by_cuml, "scikit-learn": by_sklearn, "faiss": by_faiss}


def inertia(x: np.ndarray, centroids: np.ndarray) -> float:
    """Mean squared distance to the nearest centroid, computed by none of the methods."""
    rows, centres = torch.from_numpy(x), torch.from_numpy(np.asarray(centroids, np.float32))
    return float(np.mean([torch.cdist(part, centres).amin(1).square().mean() for part in rows.split(10_000)]))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--width", type=int, default=256, help="columns")
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--iterations", type=int, default=100, help="most Lloyd steps")
    parser.add_argument("--repeats", type=int, default=5, help="whose median counts, after one that warms up")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 for all")
    told = parser.parse_args()
    if told.threads:
        torch.set_num_threads(told.threads)
    sizes = f"{told.rows} x {told.width}, K = {told.clusters}, {told.iterations} iterations"
    print(machine(), f"idle before: {100 * idle_share():.0f} %", sizes, sep="; ")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3 * told.clusters, told.width)).astype(np.float32)
    x = centres[rng.integers(0, len(centres), told.rows)] + rng.standard_normal((told.rows, told.width), np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    start = x[rng.choice(told.rows, told.clusters, replace=False)].copy()
    rows: list[tuple[str, ...]] = []
    taken: dict[str, list[float]] = {}
    found: dict[str, tuple[np.ndarray, int]] = {}
    for name, fit in METHODS.items():
        try:
            found[name], taken[name] = fit(x, start, told.iterations), []
        except (ImportError, RuntimeError) as error:
            rows.append((name, f"not here: {str(error)[:60]}", "", "", ""))
    for _ in range(told.repeats):
        for name, seconds in taken.items():
            seconds += wall_seconds(partial(METHODS[name], x, start, told.iterations), repeats=1, warm_up=0)
    for name, seconds in taken.items():
        centroids, steps = found[name]
        each = [1000 * one / steps for one in seconds]
        rows.append((name, summed_up(seconds), str(steps), summed_up(each), f"{inertia(x, centroids):.5f}"))
    print_table(("", "seconds", "iterations", "ms per iteration, all counted", "inertia"), rows)


if __name__ == "__main__":
    main()
