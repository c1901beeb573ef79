"""Weights and optimizer state on disk: safetensors and a JSON record, complete or absent.

A checkpoint is a directory named by its optimizer step. Its record is written last and holds the hash of every
file, so the latest directory whose record and hashes agree is the one to go on from.
"""

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load, save
from torch import Tensor, nn

from cluster import storage

logger = logging.getLogger(__name__)

KEEP = 2
"""Checkpoints that are kept; the older one is there if the newer is damaged."""


LEAST_SECONDS = 30.0
"""Time between two checkpoints inside a phase, at least."""

HELD_SHARE = 0.01
"""Share of the time for which checkpoints may hold training up."""

Tensors = dict[str, dict[str, Tensor]]
"""Contents of a checkpoint: tensors by name, by file."""


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


def _plain(state: Mapping[str, Tensor], copy: bool = False) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=copy).contiguous() for name, tensor in state.items()}


def copied(model: nn.Module, optimizer: Mapping[str, Tensor]) -> Tensors:
    """What a checkpoint holds, in memory of its own, so that training may go on while it is written.

    Args:
        model: without DDP wrapper.
        optimizer: the state of its optimizer, by name.
    """
    return {
        "model.safetensors": _plain(model.state_dict(), copy=True),
        "optimizer.safetensors": _plain(optimizer, copy=True),
    }


def write_checkpoint(directory: str, contents: Tensors, **position: Any) -> CheckpointRecord:
    """Writes a checkpoint and removes those older than the last `KEEP`.

    Args:
        directory: the run's checkpoints directory.
        contents: see `copied`.
        **position: fields of `CheckpointRecord`, without files.
    """
    url = storage.join(directory, f"{position['step']:010d}")
    hashes = {name: _write_file(storage.join(url, name), tensors) for name, tensors in contents.items()}
    record = CheckpointRecord(files=hashes, **position)
    storage.write_json(storage.join(url, "record.json"), record.model_dump())
    _tidy(directory, f"{record.step:010d}")
    return record


def _write_file(url: str, tensors: dict[str, Tensor]) -> str:
    """Writes a file of a checkpoint; returns its sha256."""
    data = save(tensors)
    storage.write_bytes(url, data)
    return storage.sha256(data)


class CheckpointWriter:
    """Writes a run's checkpoints, while inside: those inside a phase beside training, from a copy."""

    def __init__(self, directory: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Takes the run's checkpoints directory, and what tells the time in seconds."""
        self._directory, self._clock = directory, clock
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[CheckpointRecord] | None = None
        self._last, self._held = clock(), 0.0

    def due(self) -> bool:
        """Whether it is time for the next one: they are to hold training up for a hundredth of the time at most."""
        if self._pending is not None and not self._pending.done():
            return False
        return self._clock() - self._last >= max(LEAST_SECONDS, self._held / HELD_SHARE)

    def write(self, model: nn.Module, optimizer: Mapping[str, Tensor], *, beside: bool, **position: Any) -> None:
        """Writes a checkpoint; see `copied` and `write_checkpoint`.

        Args:
            model: without DDP wrapper.
            optimizer: the state of its optimizer, by name.
            beside: whether this returns as soon as there is a copy, and not when it is written.
            **position: fields of `CheckpointRecord`, without files.

        Raises:
            Exception: what went wrong in writing this one or, beside training, the one before.
        """
        began = self._clock()
        self.settle()
        self._pending = self._pool.submit(write_checkpoint, self._directory, copied(model, optimizer), **position)
        if not beside:
            self.settle()
        self._last = self._clock()
        self._held = self._last - began

    def settle(self) -> None:
        """Returns when what was begun is written; raises what went wrong in it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()


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
