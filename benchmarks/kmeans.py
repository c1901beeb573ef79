"""Which k-means is how fast? `python -m benchmarks.kmeans`: ours in torch, cuML, scikit-learn, faiss, where they are.

Same rows, same start, same number of iterations; the inertias must agree. Needs torch and numpy alone.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.common import idle_share, machine, print_table, summed_up, wall_seconds
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


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--width", type=int, default=256, help="columns")
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--iterations", type=int, default=100, help="Lloyd steps, all of which are taken")
    parser.add_argument("--repeats", type=int, default=3, help="whose median counts, after one that warms up")
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
    rows: list[tuple[str, str, str]] = []
    for name, fit in METHODS.items():
        found: list[np.ndarray] = []

        def work(fit: Fit = fit, found: list[np.ndarray] = found) -> None:
            found[:] = [fit(x, start, told.iterations)]

        try:
            taken = wall_seconds(work, told.repeats)
        except (ImportError, RuntimeError) as error:
            rows.append((name, f"not here: {str(error)[:60]}", ""))
            continue
        rows.append((name, summed_up(taken), f"{inertia(x, found[0]):.5f}"))
    print_table(("", "seconds", "inertia"), rows)


if __name__ == "__main__":
    main()
