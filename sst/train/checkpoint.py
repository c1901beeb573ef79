"""Weights and optimizer state on disk: safetensors and a JSON record, complete or absent.

A checkpoint is a directory named by its optimizer step. Its record is written last and holds the hash of every
file, so the latest directory whose record and hashes agree is the one to go on from.
"""

import logging
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load, save
from torch import Tensor, nn

from cluster import storage

logger = logging.getLogger(__name__)

KEEP = 2
"""Checkpoints that are kept; the older one is there if the newer is damaged."""


class CheckpointRecord(BaseModel):
    """Where training stood.

    Attributes:
        step: optimizer steps taken in the whole run.
        phase: index of the phase in the run's plan.
        phase_step: steps taken in that phase.
        stage: 1 or 2.
        settings: sha256 of the run's settings.
        files: name to sha256.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    phase: int
    phase_step: int
    stage: int
    settings: str
    files: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], str]


def weights_hash(model: nn.Module) -> str:
    """sha256 of a model's weights."""
    return storage.sha256(save(_plain(model.state_dict())))


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def write_checkpoint(
    directory: str, model: nn.Module, optimizer: Mapping[str, Tensor], **position: Any
) -> CheckpointRecord:
    """Writes a checkpoint and removes those older than the last `KEEP`.

    Args:
        directory: the run's checkpoints directory.
        model: without DDP wrapper.
        optimizer: the state of its optimizer, by name.
        **position: fields of `CheckpointRecord`, without files.
    """
    url = storage.join(directory, f"{position['step']:010d}")
    contents = {
        "model.safetensors": save(_plain(model.state_dict())),
        "optimizer.safetensors": save(_plain(optimizer)),
    }
    for name, data in contents.items():
        storage.write_bytes(storage.join(url, name), data)
    hashes = {name: storage.sha256(data) for name, data in contents.items()}
    record = CheckpointRecord(files=hashes, **position)
    storage.write_json(storage.join(url, "record.json"), record.model_dump())
    _tidy(directory, f"{record.step:010d}")
    return record


def _tidy(directory: str, latest: str) -> None:
    """Removes what is no longer needed beside the checkpoint just written.

    That is: all complete ones but the last `KEEP`, left-overs of a crash, and later ones, which were damaged or
    else training would have gone on from them.
    """
    names = [name for name in storage.list_names(directory) if name.isdigit()]
    complete = [n for n in names if n <= latest and storage.exists(storage.join(directory, n, "record.json"))]
    for name in names:
        if name not in complete[-KEEP:]:
            storage.remove(storage.join(directory, name))


def latest_checkpoint(directory: str) -> tuple[CheckpointRecord, dict[str, dict[str, Tensor]]] | None:
    """The newest checkpoint that is complete and undamaged, with its tensors by file name.

    Damaged ones are named in a warning and passed over.
    """
    for name in reversed(storage.list_names(directory)):
        url = storage.join(directory, name)
        if not storage.exists(storage.join(url, "record.json")):
            continue
        try:
            record = CheckpointRecord.model_validate(storage.read_json(storage.join(url, "record.json")))
            return record, {file: _load_checked(url, file, digest) for file, digest in record.files.items()}
        except (ValueError, ValidationError, FileNotFoundError) as error:
            logger.warning("checkpoint %s is passed over: %s", url, error)
    return None


def _load_checked(url: str, file: str, digest: str) -> dict[str, Tensor]:
    data = storage.read_bytes(storage.join(url, file))
    if storage.sha256(data) != digest:
        raise ValueError(f"{file} does not match its recorded hash")
    tensors: dict[str, Tensor] = load(data)
    return tensors
