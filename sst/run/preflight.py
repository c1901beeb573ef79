"""What can be known before a run starts: whether its disk is large enough, and whether all nodes run the same code."""

import os
import platform
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sst.config import TrainSettings
from sst.errors import EMPTY, UserError
from sst.nn.network import DetectorDescriptor, LandmarkDetector
from sst.run.tracking import absolute_uri

CHECKPOINTS = 3
"""Checkpoints that are there at once: the kept ones and the one that is being written."""

COMPARED = ("torch", "numpy", "ray", "webdataset", "scipy", "opencv-python-headless", "simplejpeg", "safetensors")
"""Packages whose versions must agree, since results depend on them or processes talk through them."""

OPTIONAL = ("cuml-cu13", "cupy-cuda13x")

LABEL_BYTES, PREDICTION_BYTES, PICTURES_BYTES = 20, 12, 50_000_000
"""Of a labelled point (place, cluster, distance, offset), of a predicted landmark, and of the report."""


def check_kept(**places: str) -> None:
    """Refuses to write where results would be lost.

    That is an empty path, as an unset variable of the shell gives it: joined to names of files it is the root of the
    file system. In a submitted job it is a relative path too: it lies in a copy of the working directory that goes.

    Args:
        places: option without its dashes, and the path or URL that it was given.

    Raises:
        UserError: naming the options.
    """
    if empty := [f"--{option}" for option, place in places.items() if not place.strip()]:
        raise UserError(f"{', '.join(empty)} {EMPTY}")
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # which Ray sets for the command of a job
        return
    lost = [
        f"--{option} {place}"
        for option, place in places.items()
        if (absolute_uri(place) != place if "://" in place else not os.path.isabs(place))
    ]
    if lost:
        raise UserError(
            f"{', '.join(lost)}: a submitted job works in a copy of its directory that is removed later; give a URL, "
            "or an absolute path that all machines of the cluster share"
        )


def disk_need(settings: TrainSettings, images: int) -> int:
    """Bytes that a run directory will take at most.

    Args:
        settings: of the run.
        images: training and test images.
    """
    with torch.device("meta"):
        models = (
            DetectorDescriptor(settings.network.shape),
            LandmarkDetector(settings.network.shape, settings.cluster.clusters),
        )
    weights = max(4 * sum(p.numel() for p in model.parameters()) for model in models)
    points = settings.keypoints.max_num_keypoints + settings.cluster.clusters
    descriptors = images * points * (2 * settings.network.descriptor_size + 8)
    rounds = 1 + settings.stage1.rounds + 2
    labels = images * min(points, settings.cluster.clusters) * LABEL_BYTES * rounds
    predictions = images * settings.cluster.clusters * PREDICTION_BYTES
    # Weights and RMSprop's state in every checkpoint, and the finished model.
    return CHECKPOINTS * 2 * weights + weights + descriptors + labels + predictions + PICTURES_BYTES


def check_disk(settings: TrainSettings, images: int, run_url: str) -> None:
    """Refuses a run whose local disk is too small for it; object stores are not asked.

    Raises:
        UserError: with what is needed and what is free.
    """
    if "://" in run_url:
        return
    place = Path(run_url).absolute()
    while not place.exists():
        place = place.parent
    need, free = disk_need(settings, images), shutil.disk_usage(place).free
    if free < need:
        raise UserError(
            f"{run_url}: this run may take {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there; free some, or "
            "let --runs name a larger disk"
        )


def versions() -> dict[str, str]:
    """What this process runs on: Python, the compared packages, and which of the optional ones are there."""
    found = {"python": platform.python_version()}
    for name in (*COMPARED, *OPTIONAL):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def conflicts(nodes: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Packages whose versions differ between nodes, as "torch: 2.9 on a; 2.8 on b, c".

    Args:
        nodes: name of a node to its `versions`.
    """
    found = []
    for package in sorted({package for each in nodes.values() for package in each}):
        by_version: dict[str, list[str]] = {}
        for node, each in nodes.items():
            by_version.setdefault(each.get(package, "none"), []).append(node)
        if len(by_version) > 1 and package not in OPTIONAL:
            listed = "; ".join(f"{version} on {', '.join(sorted(on))}" for version, on in sorted(by_version.items()))
            found.append(f"{package}: {listed}")
    return found


def check_nodes() -> None:
    """Asks every node of the running cluster for its versions.

    Raises:
        UserError: naming every difference and where it is.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    if len(alive) < 2:
        return
    ask = ray.remote(num_cpus=0)(versions)
    answers: dict[str, Any] = {
        f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:6]})": ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in alive
    }
    found = conflicts(dict(zip(answers, ray.get(list(answers.values())), strict=True)))
    if found:
        raise UserError(
            f"the nodes of the cluster run different versions: {'. '.join(found)}. Install the same on all "
            "(pip install -c constraints.txt -e .)"
        )
