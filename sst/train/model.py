"""The trained landmark detector on disk: `model.safetensors` and `model.json`, nothing else needed to predict."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from cluster import storage
from sst.config import NetworkSettings
from sst.errors import other_version
from sst.nn.network import LandmarkDetector


class ModelRecord(BaseModel):
    """What `model.json` holds.

    Attributes:
        schema_version: of this file.
        network: size of network and input.
        clusters: cluster number behind each of the model's landmarks.
        probabilities: whether the heatmaps pass a sigmoid, see `sst.nn.network.LandmarkDetector`.
        visible: confidence from which a landmark counts as visible.
        weights: sha256 of `model.safetensors`.
        metrics: label-free metrics of the finished model, see `sst.train.finish.Finisher`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    network: NetworkSettings
    clusters: list[int]
    probabilities: bool = False
    visible: float
    weights: str
    metrics: dict[str, float] = {}


def record_url(url: str) -> str:
    """Where the record of the model in a directory lies; it is written last."""
    return storage.join(url, "model.json")


def weights_url(url: str) -> str:
    """Where the weights of the model in a directory lie."""
    return storage.join(url, "model.safetensors")


def keep_landmarks(model: LandmarkDetector, channels: list[int]) -> LandmarkDetector:
    """The same detector with only the given output channels, in that order."""
    kept = LandmarkDetector(model.shape, len(channels), model.probabilities)
    state = dict(model.state_dict())
    for name in ("landmark.out.weight", "landmark.out.bias"):
        state[name] = state[name][channels]
    kept.load_state_dict(state)
    return kept.to(next(model.parameters()).device).eval()


def save_model(url: str, model: LandmarkDetector, **fields: Any) -> ModelRecord:
    """Writes weights, then the record.

    Args:
        url: directory.
        model: the detector.
        **fields: the record's, without weights and probabilities.
    """
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
    record = ModelRecord(weights=storage.sha256(data), probabilities=model.probabilities, **fields)
    storage.write_bytes(weights_url(url), data)
    storage.write_json(record_url(url), record.model_dump())
    return record


def load_model(url: str) -> tuple[LandmarkDetector, ModelRecord]:
    """Reads a detector, on the CPU and in eval mode.

    Raises:
        ValueError: if it is not there or damaged; the message names the file.
    """
    try:
        record = ModelRecord.model_validate(storage.read_json(record_url(url)))
        data = storage.read_bytes(weights_url(url))
    except FileNotFoundError as error:
        raise ValueError(f"{url} holds no landmark model; one is written at the end of `landmarks train`") from error
    except ValidationError as error:
        raise ValueError(f"{record_url(url)}: not the record of a landmark model {other_version(error)}") from error
    if storage.sha256(data) != record.weights:
        raise ValueError(f"{weights_url(url)} does not match the hash in model.json; copy both again")
    model = LandmarkDetector(record.network.shape, len(record.clusters), record.probabilities)
    try:
        model.load_state_dict(load(data))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{weights_url(url)}: not the weights of the network in model.json ({reason})") from error
    return model.eval(), record
