"""What stands in for cuML, cupy and NCCL where there is no GPU: it computes on the CPU, and is as strict as they are.

Rules of cuML 26.10 and cuVS, read in their source:

- `KMeans` takes keywords alone. `random_state` is an integer in 0 ... 2^32 - 1 (`check_random_seed`), `n_clusters` is
  positive, and there are at least as many rows. Rows are finite. Start centroids have the shape (K, D) exactly.
- RAFT refuses `tol <= 0`, whatever the data.
- An empty cluster keeps its centroid; nothing refills it.
- Lloyd's algorithm stops when the summed squared shift is below `tol`, or, from the second step on, when inertia is
  more than `1 - tol` of that of the step before.
- `KMeansMG` takes a handle besides, into which an initialised communicator must have been put, and wants a
  `random_state` and no "k-means++". Rank and size must be those that the communicator was given, start and options the
  same everywhere.
- `output_type` is one of a few names; "numpy" makes results NumPy's. A cupy array does not turn into NumPy's by itself.

Stricter than cuML, which would copy: rows and start must be float32 and C-contiguous.
"""

import sys
import threading
from numbers import Integral
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

PATIENCE = 20.0
"""Seconds after which a rank that waits for others gives up, so that a test fails instead of hanging."""


class Array:
    """A cupy array: its values are out of NumPy's reach but by `get`."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.dtype, self.shape, self.flags = values.dtype, values.shape, values.flags

    def get(self) -> np.ndarray:
        return self.values.copy()

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")


def checked(array: Any, what: str) -> np.ndarray:
    values = array.values if isinstance(array, Array) else array
    if not isinstance(values, np.ndarray):
        raise TypeError(f"{what}: {type(array).__name__} is neither cupy's nor NumPy's")
    if values.dtype != np.float32 or not values.flags.c_contiguous or values.ndim != 2:
        raise TypeError(f"{what}: {values.dtype} {values.shape} is not float32, C-contiguous and two-dimensional")
    if not np.isfinite(values).all():
        raise ValueError(f"{what} contains NaN or infinity")
    return values


class KMeans:
    """See the module's docstring."""

    fits: ClassVar[list[dict[str, Any]]] = []
    """Options of every fit, for tests that ask whether and how cuML was called."""
    fail: ClassVar[Exception | None] = None
    """What the next fits raise."""

    def __init__(
        self,
        *,
        n_clusters: int = 8,
        max_iter: int = 300,
        tol: float = 1e-4,
        verbose: bool = False,
        random_state: Any = None,
        init: Any = "scalable-k-means++",
        n_init: Any = "auto",
        output_type: str | None = None,
    ) -> None:
        if output_type not in (None, "input", "cupy", "numpy", "cudf", "pandas"):
            raise ValueError(f"output_type {output_type!r} is unknown")
        self.n_clusters, self.max_iter, self.tol, self.random_state = n_clusters, max_iter, tol, random_state
        self.init, self.n_init, self.output_type = init, n_init, output_type

    def fit(self, x: Any) -> "KMeans":
        if KMeans.fail:
            raise KMeans.fail
        KMeans.fits.append(vars(self).copy())
        if not isinstance(self.n_clusters, Integral) or self.n_clusters <= 0:
            raise ValueError(f"n_clusters={self.n_clusters} should be a positive integer.")
        rows = checked(x, "X")
        self._check(len(rows))
        if self.tol <= 0:
            raise RuntimeError("RAFT failure at file=kmeans.cuh: invalid parameter (tol<=0)")
        centres = self._start(rows)
        self.n_iter_ = self.max_iter
        prior = np.inf
        for step in range(1, self.max_iter + 1):
            sums, counts, cost = self._added(*assigned(rows, centres))
            moved = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centres).astype(np.float32)
            shift, centres = float(np.square(moved - centres).sum()), moved
            if shift < self.tol or (step > 1 and cost and cost / prior > 1 - self.tol):
                self.n_iter_ = step
                break
            prior = cost
        self.cluster_centers_ = centres if self.output_type == "numpy" else Array(centres)
        return self

    def _check(self, rows: int) -> None:
        if rows < self.n_clusters:
            raise ValueError(f"n_samples={rows} should be >= n_clusters={self.n_clusters}.")
        if self.random_state is not None and not isinstance(self.random_state, Integral):
            raise TypeError(f"`random_state` must be an `int`. Got {self.random_state!r} instead.")
        if self.random_state is not None and not 0 <= self.random_state < 2**32:
            raise ValueError(f"Expected `0 <= random_state <= 2**32 - 1`, got {self.random_state}")

    def _start(self, rows: np.ndarray) -> np.ndarray:
        if isinstance(self.init, str):
            raise NotImplementedError("the stand-in has no seeding: the project brings its own")
        start = checked(self.init, "init")
        if start.shape != (self.n_clusters, rows.shape[1]):
            raise ValueError(f"The shape of the initial centers {start.shape} does not match the number of clusters")
        return start.copy()

    def _added(self, *parts: Any) -> tuple[Any, ...]:
        return parts


def assigned(rows: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Sums, numbers and inertia of the rows nearest to each centre, by scipy and NumPy alone."""
    from scipy.cluster.vq import vq

    nearest, distance = vq(rows.astype(np.float64), centres.astype(np.float64))
    sums = np.zeros(centres.shape)
    np.add.at(sums, nearest, rows)
    return sums, np.bincount(nearest, minlength=len(centres)), float(np.square(distance).sum())


class KMeansMG(KMeans):
    """See the module's docstring."""

    def __init__(self, *, handle: "Handle", **options: Any) -> None:
        super().__init__(**options)
        self.handle = handle

    def _check(self, rows: int) -> None:
        if self.random_state is None:
            raise ValueError("KMeansMG requires `random_state != None`")
        if self.init == "k-means++" if isinstance(self.init, str) else False:
            raise ValueError("init='k-means++' is not supported for KMeansMG.")
        super()._check(self.n_clusters)  # a rank may hold fewer rows than clusters

    def _start(self, rows: np.ndarray) -> np.ndarray:
        start = super()._start(rows)
        if self.handle.communicator is None:
            raise RuntimeError("RAFT failure: communicator not initialized on handle")
        told = self.handle.communicator.gather((start.tobytes(), self.max_iter, self.tol, self.random_state))
        if len(set(told)) > 1:
            raise RuntimeError("ranks were told different things; NCCL would hang or mix them up")
        return start

    def _added(self, *parts: Any) -> tuple[Any, ...]:
        everyone = self.handle.communicator.gather(parts)
        return tuple(sum(own[place] for own in everyone) for place in range(len(parts)))


class Group:
    """What the ranks of one NCCL id share."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.values = size, threading.Barrier(size), [None] * size


class Nccl:
    """`raft_dask.common.nccl.nccl`, for ranks that are threads of one process."""

    groups: ClassVar[dict[bytes, Group]] = {}
    lock: ClassVar[Any] = threading.Lock()

    def __init__(self) -> None:
        self.group: Group | None = None

    @staticmethod
    def get_unique_id() -> bytes:
        return np.random.default_rng().bytes(128)

    def init(self, nranks: int, commId: bytes, rank: int) -> None:
        if not isinstance(commId, bytes) or len(commId) != 128:
            raise TypeError("an NCCL id has 128 bytes")
        with Nccl.lock:
            self.group = Nccl.groups.setdefault(commId, Group(nranks))
        if self.group.size != nranks or not 0 <= rank < nranks:
            raise RuntimeError(f"NCCL_ERROR: rank {rank} of {nranks} in a group of {self.group.size}")
        self.rank = rank
        self.group.barrier.wait(PATIENCE)

    def gather(self, value: Any) -> list[Any]:
        group = self.group
        assert group is not None
        group.values[self.rank] = value
        group.barrier.wait(PATIENCE)
        everyone = list(group.values)
        group.barrier.wait(PATIENCE)
        return everyone


class Handle:
    """`pylibraft.common.handle.Handle`."""

    def __init__(self, stream: Any = None, n_streams: int = 0) -> None:
        self.communicator: Nccl | None = None


def inject_comms_on_handle_coll_only(handle: Handle, nccl_inst: Nccl, size: int, rank: int, verbose: bool) -> None:
    if nccl_inst.group is None:
        raise RuntimeError("the communicator was not initialised")
    if (nccl_inst.group.size, nccl_inst.rank) != (size, rank):
        raise RuntimeError(f"rank {rank} of {size} is not what the communicator was told")
    handle.communicator = nccl_inst


def install(monkeypatch: Any) -> None:
    """Makes the stand-ins importable, as on a machine with a GPU."""
    from cluster import rapids

    def asarray(values: Any) -> Array:
        return values if isinstance(values, Array) else Array(np.array(values))

    modules = {
        "cupy": {"asarray": asarray, "ndarray": Array, "float32": np.float32},
        "cupy.cuda": {"is_available": lambda: True},
        "cuml": {},
        "cuml.cluster": {"KMeans": KMeans},
        "cuml.cluster.kmeans_mg": {"KMeansMG": KMeansMG},
        "pylibraft": {},
        "pylibraft.common": {},
        "pylibraft.common.handle": {"Handle": Handle},
        "raft_dask": {},
        "raft_dask.common": {},
        "raft_dask.common.comms_utils": {"inject_comms_on_handle_coll_only": inject_comms_on_handle_coll_only},
        "raft_dask.common.nccl": {"nccl": Nccl},
    }
    made = {name: ModuleType(name) for name in modules}
    for name, values in modules.items():
        vars(made[name]).update(values)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(made[parent], own, made[name])
        monkeypatch.setitem(sys.modules, name, made[name])
    monkeypatch.setattr(KMeans, "fits", [])
    monkeypatch.setattr(KMeans, "fail", None)
    monkeypatch.setattr(rapids, "_given_up", [])
