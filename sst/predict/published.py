"""The authors' published checkpoints: read into our networks, and stage 1 kept in our own format.

A published file is a pickled dictionary. It is read with torch's restricted unpickler, which makes tensors, plain
containers and whatever `ALLOWED` lists: numpy arrays of plain numbers.

Shape letters: K clusters, D descriptor size.
Source: the layout of github.com/malldimi1/UnsupervisedLandmarks (FanModel.py: names; FanClass.py: the dictionary),
see docs/fidelity.md.
"""

import io
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load, save
from torch import Tensor, nn

from cluster import storage
from sst.config import NetworkSettings, Stage2Settings
from sst.errors import UserError, readable
from sst.nn.network import DetectorDescriptor, LandmarkDetector, NetworkShape
from sst.outputs import NewDirectory, staging_name
from sst.train.model import keep_landmarks, save_model

UNUSED = "m0.b4_"
"""Published parameters under this name take no part in the forward pass; our network has none of them."""

DETECTOR_HEAD = ("top_m_0", "conv_last0", "bn_end0", "l0")
DESCRIPTOR_HEAD = ("top_m_1", "conv_last1", "bn_end1", "l1")

FILES = RECORD, WEIGHTS, CENTROIDS = "model.json", "model.safetensors", "centroids.npz"

NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
"""Element types, in numpy's codes, that an array in a published file may have."""


@dataclass(frozen=True, eq=False)
class Published:
    """What a published checkpoint holds.

    Attributes:
        model: in eval mode on the CPU; in stage 2 with all K channels, in the published order.
        iteration: optimizer steps of its stage, where the file says.
        centroids_KD: stage 1, once clustered: the cluster centres, float32.
        active: stage 2: channels that are landmarks; the others were merged or too small.
        unused: parameters that the published forward pass never uses.
        left_out: what else the file holds and we don't take.
    """

    model: DetectorDescriptor | LandmarkDetector
    iteration: int | None
    centroids_KD: np.ndarray | None
    active: list[int]
    unused: list[str]
    left_out: list[str]


class Stage1Record(BaseModel):
    """What `model.json` holds beside the weights of stage 1.

    Attributes:
        schema_version: of this file.
        kind: tells it from the record of a landmark detector.
        network: size of network and input.
        iteration: optimizer steps, where known.
        centroids: number of cluster centres in `centroids.npz`; None: there is no such file.
        weights: sha256 of `model.safetensors`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    kind: Literal["stage1"] = "stage1"
    network: NetworkSettings
    iteration: int | None
    centroids: int | None
    weights: str


def import_published(path: str | Path) -> DetectorDescriptor | LandmarkDetector:
    """Reads the network of a published checkpoint; which stage it is of, the file tells.

    Args:
        path: local path or URL of the `.pth`.

    Returns:
        The network in eval mode on the CPU. In stage 2 it has every channel of the file, in the published order; only
        some of them are landmarks, see `read_published`.

    Raises:
        UserError: see `read_published`.
    """
    return read_published(path).model


def read_published(path: str | Path) -> Published:
    """Reads a published checkpoint of either stage.

    A file with `centroid` is of stage 1, one with `active_channels` of stage 2. Stage 2's file still has stage 1's
    detector head; it must be complete, but is left out, as nothing uses it any more.

    Args:
        path: local path or URL of the `.pth`; zip and older formats, saved from any device.

    Raises:
        UserError: if it cannot be read, would need anything executed that is not on the allow-list, or is not of the
            published layout; every missing, unexpected or misshapen parameter is named.
    """
    content = _read(str(path))
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        holds = _listed(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: no published checkpoint: it has no state_dict, only: {holds}")
    if ("centroid" in content) == ("active_channels" in content):
        raise UserError(
            f"{path}: cannot tell the stage: a published checkpoint has either centroid (stage 1) or active_channels "
            f"(stage 2); this one has: {_listed(content)}"
        )
    state = {str(name): value for name, value in content["state_dict"].items()}
    unused = [name for name in state if name.startswith(UNUSED)]
    both = _network(path, {name: value for name, value in state.items() if name not in unused}, "centroid" in content)
    known = ("state_dict", "iteration", "centroid", "active_channels")
    left_out = [str(key) for key in content if key not in known]
    iteration = content.get("iteration")
    model: DetectorDescriptor | LandmarkDetector = both
    centroids_KD, active = None, []
    if "centroid" in content:
        centroids_KD = _centroids(path, content["centroid"], both.shape.descriptor_size)
    else:
        active = _active(path, content["active_channels"], both.shape.descriptor_size)
        left_out += DETECTOR_HEAD
        model = LandmarkDetector(NetworkShape(), both.shape.descriptor_size)
        model.backbone, model.landmark = both.backbone, both.descriptor
    return Published(
        model=model.eval(),
        iteration=int(iteration) if isinstance(iteration, int | np.integer) else None,
        centroids_KD=centroids_KD,
        active=active,
        unused=unused,
        left_out=left_out,
    )


def save_published(url: str, published: Published) -> None:
    """Writes an import in our own format; what lies there is replaced.

    Stage 2 becomes a landmark model of the active channels only, as the end of training writes it:
    `sst.train.model` reads it. Stage 1 is read by `load_stage1`.

    Args:
        url: directory.
        published: the import.
    """
    staging = storage.join(url, staging_name("import-checkpoint"))
    storage.remove(staging)
    directory = NewDirectory(url)
    try:
        _write_published(staging, published)
        storage.remove(storage.join(url, RECORD))  # without which there is no model
        new = storage.list_names(staging)
        for name in sorted(new, key=lambda name: name == RECORD):
            storage.move(storage.join(staging, name), storage.join(url, name))
        if CENTROIDS not in new:
            storage.remove(storage.join(url, CENTROIDS))
    finally:
        with suppress(OSError):  # the error that is on its way says what is wrong
            storage.remove(staging)
        directory.take_back()


def is_model(url: str) -> bool:
    """Whether the directory holds a model of this program, of either stage."""
    try:
        record = storage.read_json(storage.join(url, RECORD))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return isinstance(record, dict) and {"network", "weights"} <= record.keys()


def _write_published(url: str, published: Published) -> None:
    if isinstance(published.model, LandmarkDetector):
        save_model(
            url,
            keep_landmarks(published.model, published.active),
            network=NetworkSettings(),
            clusters=published.active,
            visible=Stage2Settings().visible,
        )
        return
    centroids_KD = published.centroids_KD
    data = save({name: tensor.contiguous() for name, tensor in published.model.state_dict().items()})
    storage.write_bytes(storage.join(url, WEIGHTS), data)
    if centroids_KD is not None:
        storage.save_npz(storage.join(url, CENTROIDS), centroids=centroids_KD)
    record = Stage1Record(
        network=NetworkSettings(),
        iteration=published.iteration,
        centroids=None if centroids_KD is None else len(centroids_KD),
        weights=storage.sha256(data),
    )
    storage.write_json(storage.join(url, RECORD), record.model_dump())


def load_stage1(url: str) -> tuple[DetectorDescriptor, np.ndarray | None, Stage1Record]:
    """Reads what `save_published` wrote of stage 1.

    Returns:
        The network, on the CPU and in eval mode; its cluster centres (K, D) where it has any; the record.

    Raises:
        ValueError: if it is not there or damaged; the message names the file.
    """
    record_url, weights_url = storage.join(url, RECORD), storage.join(url, WEIGHTS)
    try:
        record = Stage1Record.model_validate(storage.read_json(record_url))
        data = storage.read_bytes(weights_url)
        arrays = storage.load_npz(storage.join(url, CENTROIDS)) if record.centroids is not None else {}
    except FileNotFoundError as error:
        raise ValueError(f"{url} holds no network of stage 1; `landmarks import-checkpoint` writes one") from error
    except ValidationError as error:
        raise ValueError(f"{record_url}: not the record of a network of stage 1") from error
    if storage.sha256(data) != record.weights:
        raise ValueError(f"{weights_url} does not match the hash in {RECORD}; copy both again")
    model = DetectorDescriptor(record.network.shape)
    model.load_state_dict(load(data))
    return model.eval(), arrays.get("centroids"), record


def published_names(network: DetectorDescriptor) -> dict[str, str]:
    """Published name of each of our parameters, in the published order of modules."""
    depth = network.shape.depth
    modules = {
        "conv1": "backbone.conv",
        "bn1": "backbone.norm",
        "conv2": "backbone.block1",
        "conv3": "backbone.block2",
        "conv4": "backbone.block3",
        "m0.b2_plus_1": "backbone.hourglass" + depth * ".inner",
    }
    # The published hourglass is flat and counts its levels from the innermost, 1; ours is nested, the outermost first.
    for level in range(1, depth + 1):
        ours = "backbone.hourglass" + (depth - level) * ".inner"
        modules |= {f"m0.b1_{level}": f"{ours}.upper", f"m0.b2_{level}": f"{ours}.lower_in"}
        modules[f"m0.b3_{level}"] = f"{ours}.lower_out"
    for head, names in (("detector", DETECTOR_HEAD), ("descriptor", DESCRIPTOR_HEAD)):
        modules |= {name: f"{head}.{part}" for name, part in zip(names, ("block", "conv", "norm", "out"), strict=True)}
    return {
        f"{ours}.{name}": f"{published}.{name.replace('norm', 'bn').replace('shortcut', 'downsample')}"
        for published, ours in modules.items()
        for name in network.get_submodule(ours).state_dict()
    }


def _network(path: str | Path, state: dict[str, Any], stage1: bool) -> DetectorDescriptor:
    """Both heads with the file's weights; in stage 2 the descriptor head has K outputs, otherwise 256.

    Raises:
        UserError: naming every parameter that is missing, unexpected, of another shape or no plain tensor.
    """
    odd = [name for name, value in state.items() if not _is_plain(value)]
    if odd:
        raise UserError(f"{path}: no plain tensors of real numbers: {', '.join(odd)}")
    size = NetworkShape.descriptor_size
    if not stage1:
        # The number of landmarks is the file's to say, by either parameter of the last convolution.
        size = next((len(state[name]) for name in ("l1.weight", "l1.bias") if name in state and state[name].ndim), size)
    network = DetectorDescriptor(NetworkShape(descriptor_size=size))
    names, expected = published_names(network), network.state_dict()
    problems = {
        "missing": [name for name in names.values() if name not in state],
        "unexpected": [name for name in state if name not in names.values()],
        "wrong shape": [
            f"{name} {tuple(state[name].shape)} in place of {tuple(expected[ours].shape)}"
            for ours, name in names.items()
            if name in state and state[name].shape != expected[ours].shape
        ],
    }
    if any(problems.values()):
        given = "; ".join(f"{kind}: {', '.join(found)}" for kind, found in problems.items() if found)
        raise UserError(f"{path}: not the published network of stage {1 if stage1 else 2}: {given}")
    network.load_state_dict({ours: state[name] for ours, name in names.items()})
    return network


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.is_floating_point()
    )


def _centroids(path: str | Path, value: object, size: int) -> np.ndarray | None:
    """Cluster centres (K, D) float32; None before the first clustering, when the published code writes None."""
    if value is None:
        return None
    array = _as_array(value)
    if array.ndim != 2 or array.shape[1] != size or array.dtype.kind != "f":
        raise UserError(f"{path}: centroid is not an array (K, {size}) of real numbers but {_described(array)}")
    return array.astype(np.float32)


def _active(path: str | Path, value: object, channels: int) -> list[int]:
    """Channels that are landmarks, in the file's order."""
    array = _as_array(value)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
        raise UserError(f"{path}: active_channels is not a list of channel numbers but {_described(array)}")
    active: list[int] = array.tolist()
    if len(set(active)) < len(active) or not 0 <= min(active) <= max(active) < channels:
        raise UserError(f"{path}: active_channels {active} must be different numbers from 0 to {channels - 1}")
    return active


def _as_array(value: object) -> np.ndarray:
    """The file's array, tensor or list as an array; object arrays stand for what is none of these."""
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, Tensor):
        return value.detach().numpy()
    return np.array(value if isinstance(value, list) and all(type(item) is int for item in value) else None)


def _described(array: np.ndarray) -> str:
    return f"{array.dtype} of shape {array.shape}"


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, names)) or "nothing"


# Reading the file.


def _read(path: str) -> Any:
    """Unpickles nothing but tensors, plain containers and what `ALLOWED` lists.

    Raises:
        UserError: if the file cannot be read, or holds anything else.
    """
    with readable(f"{path}: cannot read the checkpoint"):
        data = storage.read_bytes(path)
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types on damaged input
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path}: refused, nothing in it was executed: it refers to {refused[1]!a}, which is neither a tensor "
                "nor a plain container nor a numpy array; weights don't need that, so do not trust the file"
            ) from error
        # Only what torch found, not its advice: that is to switch the restriction off.
        found = re.split(r"\n|\. ", str(error).rpartition("WeightsUnpickler error: ")[2].strip())[0]
        raise UserError(
            f"{path}: not a checkpoint that can be read ({type(error).__name__}: {found}); give the .pth file itself, "
            "unpacked where it came in a .zip, and fetch it again if it is damaged"
        ) from error


class _Type:
    """Stands in for `numpy.dtype`."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if code not in NUMBERS:
            raise ValueError(f"a numpy array of {code!a}, not of plain numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Takes the byte order alone: the rest says nothing about plain numbers."""
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for `numpy.ndarray`."""

    array = np.array(None)

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Type, bool, bytes]) -> None:
        """Takes (version, shape, type, whether in Fortran order, the elements' bytes)."""
        _, shape, kind, fortran, data = state
        self.array = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if fortran else "C")


def _reconstruct(kind: type[_Array], shape: tuple[int, ...], code: bytes) -> _Array:
    """Stands in for the function by which numpy begins to unpickle an array; its state follows."""
    return _Array()


def _scalar(kind: _Type, data: bytes) -> Any:
    """Stands in for the function by which numpy unpickles a single number."""
    return np.frombuffer(data, kind.dtype)[0]


# numpy's own functions take the memory layout that a file claims: an array of integers may be told that it holds
# objects. So their names, as numpy 1 and 2 write them, are bound to these few lines of ours.
ALLOWED: list[Any] = [
    (_Array, "numpy.ndarray"),
    (_Type, "numpy.dtype"),
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
"""What a published file may refer to beside tensors and plain containers."""
