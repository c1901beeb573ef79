"""k-means by every backend: alone or in parts, by torch or by cuML."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from cluster import KMeansResult, KMeansSettings, fit, fit_pool
from cluster.pool import PoolMember

Fit = Callable[[np.ndarray, KMeansSettings], KMeansResult]

BACKENDS = ("torch", "cuml", "pool", "nccl")


def fit_in_parts(x: np.ndarray, settings: KMeansSettings, parts: int = 3, nccl: bool = False) -> KMeansResult:
    """By members that compute at the same time, as actors do."""
    members = [PoolMember(part) for part in np.array_split(x, parts)]

    def call(method, arguments):
        assert len(arguments) == len(members)
        with ThreadPoolExecutor(len(members)) as pool:
            running = [pool.submit(getattr(one, method), *own) for one, own in zip(members, arguments, strict=True)]
            return [each.result() for each in running]

    return fit_pool(call, parts, settings, nccl=nccl)


def fit_by(name: str) -> Fit:
    """The backend's fit; cuML's need `stand_in.install`."""
    if name in ("torch", "cuml"):
        return lambda x, settings: fit(x, replace(settings, backend=name))  # type: ignore[arg-type]
    return lambda x, settings: fit_in_parts(x, settings, nccl=name == "nccl")
