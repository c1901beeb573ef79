"""cuML: whether it can run here, and k-means by it, in one process or in several over NCCL.

What it asks for (26.10, from its source): a seed in 0 ... 2^32 - 1; a tolerance above 0; finite float32 rows, which are
copied unless they lie row by row; as many rows as clusters; start centroids (K, D). Over NCCL besides: a seed that all
agree on, a communicator in the handle, and no "k-means++". It stops where the summed squared shift of the centroids, or
the relative gain in inertia, is below the tolerance: so it is given rows of unit variance, for which both are shares.
"""

import logging
from importlib import metadata
from typing import Any, Literal

import numpy as np
import torch

Backend = Literal["auto", "torch", "cuml"]

logger = logging.getLogger(__name__)

_given_up: list[str] = []
"""Why this process no longer tries cuML, once it has failed."""


class CumlError(RuntimeError):
    """cuML failed on rows that are sound."""


def choose_backend(requested: Backend = "auto", several: bool = False) -> Literal["torch", "cuml"]:
    """Decides what computes: "auto" takes cuML where it and a GPU are usable, torch elsewhere.

    Where there is a GPU and cuML cannot use it, "auto" warns, once in a process.

    Args:
        requested: a backend's name.
        several: whether several processes are to compute together, over NCCL.

    Raises:
        ValueError: if the name is unknown.
        RuntimeError: if cuML is asked for where it cannot run; the message says why.
    """
    if requested not in ("auto", "torch", "cuml"):
        raise ValueError(f"k-means backend {requested!r} is unknown; take auto, torch or cuml")
    if requested == "torch" or (requested == "auto" and _given_up):
        return "torch"
    found = obstacle(several)
    if found is None:
        return "cuml"
    if requested == "cuml":
        raise RuntimeError(f"k-means backend cuml cannot run here: {found}; take backend torch or auto")
    if gpu_here():
        give_up(found)
    return "torch"


def give_up(reason: str) -> None:
    """Takes torch from now on where the backend is "auto"; says so the first time."""
    if not _given_up:
        logger.warning("k-means is computed by torch, since cuML cannot run beside a GPU that is there: %s", reason)
        _given_up.append(reason)


def given_up() -> str | None:
    """For what reason this process takes torch beside a GPU that is there; None where it does not."""
    return _given_up[0] if _given_up else None


def gpu_here() -> bool:
    """Whether this process sees a GPU, by torch or by cupy."""
    if torch.cuda.is_available():
        return True
    try:
        import cupy

        return bool(cupy.cuda.is_available())
    except Exception:  # a broken installation raises whatever it likes
        return False


def obstacle(several: bool = False) -> str | None:
    """Why cuML can't run here, as it is, or None. It imports without a GPU, so the import alone decides nothing."""
    try:
        import cupy

        if not cupy.cuda.is_available():
            return "no usable GPU"
    except Exception as error:  # an undefined symbol is an ImportError, a missing driver is of cupy's own kind
        return _not_usable("cupy", error)
    try:
        import cuml.cluster  # noqa: F401
    except Exception as error:
        return _not_usable("cuml", error)
    if several:
        try:
            import raft_dask.common.comms_utils
            import raft_dask.common.nccl  # noqa: F401
        except Exception as error:
            return _not_usable("raft-dask", error)
    return None


def _not_usable(package: str, error: Exception) -> str:
    installed = [
        f"{name} {metadata.version(name)}"
        for name in sorted({found.metadata["Name"] for found in metadata.distributions()} - {None})
        if name.startswith(package)
    ]
    root = package.replace("-", "_")
    if isinstance(error, ModuleNotFoundError) and not installed and error.name and error.name.split(".")[0] == root:
        return f"{package} is not installed (extra gpu)"
    text = f"{', '.join(installed) or package} does not work: {type(error).__name__}: {error}"
    if "nvjitlink" in text.lower():
        text += " (an nvJitLink older than 13.3 was loaded first: upgrade nvidia-nvjitlink)"
    return text


def fit_alone(
    x_ND: torch.Tensor, start_KD: np.ndarray, origin_D: np.ndarray, scale: float, iterations: int, tolerance: float
) -> tuple[np.ndarray, int]:
    """Lloyd's algorithm by cuML in this process.

    Args:
        x_ND: rows, float32.
        start_KD: centroids to start from.
        origin_D: the rows' mean.
        scale: root of the mean variance of a column, above 0.
        iterations: most steps.
        tolerance: least summed squared shift of the centroids, in units of the variance; at 0 all steps are taken
            that change anything.

    Returns:
        Centroids, float32 (K, D), and the steps taken.

    Raises:
        CumlError: whatever cuML raised.
    """
    try:
        from cuml.cluster import KMeans

        return _fitted(KMeans, x_ND, start_KD, origin_D, scale, iterations, tolerance)
    except Exception as error:  # RAFT and CUDA raise kinds of their own
        raise CumlError(f"{type(error).__name__}: {error}") from error


def fit_together(
    x_ND: torch.Tensor,
    start_KD: np.ndarray,
    origin_D: np.ndarray,
    scale: float,
    iterations: int,
    tolerance: float,
    group: bytes,
    rank: int,
    world: int,
) -> tuple[np.ndarray, int]:
    """As `fit_alone`, with rows in `world` processes, all of which return the same.

    Args:
        x_ND: this process's rows.
        start_KD: as there, the same in all processes, as are the following four.
        origin_D: mean of all rows.
        scale: as there, of all rows.
        iterations: as there.
        tolerance: as there.
        group: from `group_id`, called in one of the processes.
        rank: of this process.
        world: number of processes.

    Raises:
        CumlError: as there.
    """
    try:
        from cuml.cluster.kmeans_mg import KMeansMG
        from pylibraft.common.handle import Handle
        from raft_dask.common.comms_utils import inject_comms_on_handle_coll_only
        from raft_dask.common.nccl import nccl

        communicator = nccl()
        communicator.init(world, group, rank)
        handle = Handle(n_streams=0)
        inject_comms_on_handle_coll_only(handle, communicator, world, rank, True)
        return _fitted(KMeansMG, x_ND, start_KD, origin_D, scale, iterations, tolerance, handle=handle)
    except Exception as error:
        raise CumlError(f"{type(error).__name__}: {error}") from error


def group_id() -> bytes:
    """Names a new NCCL group.

    Raises:
        CumlError: whatever NCCL raised.
    """
    try:
        from raft_dask.common.nccl import nccl

        return bytes(nccl.get_unique_id())
    except Exception as error:
        raise CumlError(f"{type(error).__name__}: {error}") from error


def _fitted(
    kind: Any,
    x_ND: torch.Tensor,
    start_KD: np.ndarray,
    origin_D: np.ndarray,
    scale: float,
    iterations: int,
    tolerance: float,
    **more: Any,
) -> tuple[np.ndarray, int]:
    import cupy

    origin = torch.from_numpy(origin_D).to(x_ND)
    rows_ND = ((x_ND - origin) / scale).contiguous()
    if rows_ND.is_cuda:
        torch.cuda.synchronize()  # cuML reads the memory in place, on a stream of its own
    start = np.ascontiguousarray((start_KD - origin_D) / scale, dtype=np.float32)
    model = kind(
        n_clusters=len(start),
        max_iter=iterations,
        tol=max(tolerance, float(np.finfo(np.float32).tiny)),
        random_state=0,  # draws nothing, since the start is given
        init=cupy.asarray(start),
        n_init=1,
        output_type="numpy",
        **more,
    )
    model.fit(cupy.asarray(rows_ND if rows_ND.is_cuda else rows_ND.numpy()))
    centroids_KD = np.asarray(model.cluster_centers_, dtype=np.float64) * scale + origin_D
    return np.ascontiguousarray(centroids_KD, dtype=np.float32), int(model.n_iter_)
