"""Which k-means is how fast? `python -m benchmarks.kmeans`: ours in torch, cuML, scikit-learn, faiss, where they are.

Same rows, same start, the same most iterations, of which a method is spared those that would change nothing;
the inertias must agree. Methods take turns, so that other work on the machine slows all of them. Needs torch and
numpy alone.

`--quality` measures instead how good our own start is, against ten fits by scikit-learn from its own, and whether
descriptors in a narrow cone should be prepared: inertia, and agreement with the true groups.
"""

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.common import idle_share, machine, print_table, summed_up, wall_seconds
from cluster import lloyd, rapids
from cluster.kmeans import KMeansSettings, column_variance, fit, solve

Fit = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, int]]
"""From rows, start centroids and the most iterations to centroids and iterations taken."""


def _ours(x: np.ndarray, start: np.ndarray, iterations: int, backend: rapids.Backend) -> tuple[np.ndarray, int]:
    rows = torch.from_numpy(x).to("cuda" if torch.cuda.is_available() else "cpu")
    total, square = lloyd.moments(rows)
    origin, by_cuml = total / len(x), None
    if rapids.choose_backend(backend) == "cuml":
        by_cuml = partial(rapids.fit_alone, rows)
    result = solve(
        lloyd.Rows(rows, torch.from_numpy(origin)).sums,
        start,
        origin,
        column_variance(len(x), total, square),
        KMeansSettings(len(start), iterations, tolerance=0.0),
        np.random.default_rng(0),
        by_cuml=by_cuml,
        device=rows.device,
    )
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


def cone(groups: int, rows: int, width: int, inertia: float, between: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows about a common direction, as float16 keeps them, and their groups.

    `inertia` is their squared distance to their mean, of which the share `between` lies between groups.
    """
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(groups + 1, width))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    group = rng.choice(groups, rows, p=rng.dirichlet(np.full(groups, 3.0)))
    noise = rng.normal(size=(rows, width)) * np.sqrt(inertia * (1 - between) / width)
    x = directions[-1] + np.sqrt(inertia * between) * directions[group] + noise
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float16).astype(np.float32), group


def centred(x: np.ndarray) -> np.ndarray:
    """Less the mean."""
    return (x - x.mean(axis=0, dtype=np.float64)).astype(np.float32)


def centred_to_unit(x: np.ndarray) -> np.ndarray:
    """Less the mean, and to length 1 again."""
    away = centred(x)
    return away / np.linalg.norm(away, axis=1, keepdims=True)


def quality(rows: int, width: int, clusters: int) -> None:
    """Prints how good starts are, and what preparing descriptors in a cone would do."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score

    table: list[tuple[str, ...]] = []
    for spread, share, groups in [
        *((spread, 0.7, clusters) for spread in (5e-3, 5e-4, 5e-5, 5e-6)),
        *((5e-4, share, clusters) for share in (0.3, 0.5, 0.9)),
        (5e-4, 0.7, 3 * clusters),
    ]:
        x, group = cone(groups, rows, width, spread, share)
        best = min(float(KMeans(clusters, n_init=1, random_state=seed).fit(x).inertia_) for seed in range(10)) / rows
        for name, prepare in (("as they are", np.asarray), ("less the mean", centred), ("to unit", centred_to_unit)):
            prepared = prepare(x)
            fits = [fit(prepared, KMeansSettings(clusters, seed=seed)) for seed in range(3)]
            nearest = [torch.cdist(*map(torch.from_numpy, (prepared, one.centroids))).argmin(1) for one in fits]
            agreed = [adjusted_rand_score(group, each.numpy()) for each in nearest]
            means = [np.stack([x[each.numpy() == k].mean(0) for k in range(clusters)]) for each in nearest]
            above = [100 * (inertia(x, each) / best - 1) for each in means]
            table.append((
                f"{spread:.0e}, {share:.0%}, {groups}", name, f"{min(above):+.2f} to {max(above):+.2f} %",
                f"{min(agreed):.3f} to {max(agreed):.3f}", str(max(one.empty for one in fits)),
            ))  # fmt: skip
    print_table(("inertia, between groups, groups", "rows", "above best of ten", "agreement", "empty"), table)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--width", type=int, default=256, help="columns")
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--iterations", type=int, default=100, help="most Lloyd steps")
    parser.add_argument("--repeats", type=int, default=5, help="whose median counts, after one that warms up")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 for all")
    parser.add_argument("--quality", action="store_true", help="of the start, instead of speed; wants scikit-learn")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    sizes = f"{given.rows} x {given.width}, K = {given.clusters}, {given.iterations} iterations"
    print(machine(), f"idle before: {100 * idle_share():.0f} %", sizes, sep="; ")
    if given.quality:
        quality(given.rows, given.width, given.clusters)
        return
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3 * given.clusters, given.width)).astype(np.float32)
    x = centres[rng.integers(0, len(centres), given.rows)] + rng.standard_normal((given.rows, given.width), np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    start = x[rng.choice(given.rows, given.clusters, replace=False)].copy()
    rows: list[tuple[str, ...]] = []
    taken: dict[str, list[float]] = {}
    found: dict[str, tuple[np.ndarray, int]] = {}
    for name, method in METHODS.items():
        try:
            found[name], taken[name] = method(x, start, given.iterations), []
        except (ImportError, RuntimeError) as error:
            rows.append((name, f"not here: {str(error)[:60]}", "", "", ""))
    for _ in range(given.repeats):
        for name, seconds in taken.items():
            seconds += wall_seconds(partial(METHODS[name], x, start, given.iterations), repeats=1, warm_up=0)
    for name, seconds in taken.items():
        centroids, steps = found[name]
        each = [1000 * one / steps for one in seconds]
        rows.append((name, summed_up(seconds), str(steps), summed_up(each), f"{inertia(x, centroids):.5f}"))
    print_table(("", "seconds", "iterations", "ms per iteration, all counted", "inertia"), rows)


if __name__ == "__main__":
    main()
