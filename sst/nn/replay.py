"""A training step recorded once, as one CUDA graph, and replayed: the host launches one thing instead of thousands.

Needs torch alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sst.nn.optimizer import Update
from sst.nn.steps import Batch, Losses

Step = Callable[[Batch, torch.Generator], dict[str, Tensor]]
"""Takes a training step on a batch; gives scalars by name. It may not wait for the device, and its shapes may depend on
the batch's shapes alone."""

IMAGE_MULTIPLE, LABEL_MULTIPLE = 64, 16
"""Sides of images and numbers of labels are padded to multiples of these, so that few shapes occur."""

PLAIN_STEPS = 3
"""Steps of a shape that are taken as they are before one is recorded: libraries choose their kernels meanwhile."""

MOST_SHAPES = 8
"""Shapes that are recorded at most; each keeps its input."""


class Tape(Protocol):
    """What records device work and plays it again: a CUDA graph."""

    def record(self, work: Callable[[], Tensor], generator: torch.Generator) -> Tensor:
        """Calls the work once, which is noted down and not done; its result is a place that playing fills.

        Args:
            work: what is recorded.
            generator: that it draws from; seeded anew before a play, it draws anew.
        """
        ...

    def play(self) -> None:
        """Does the work, on what its inputs hold now."""
        ...


class CudaTape:
    """A CUDA graph in a memory pool that it shares with others: they never run at once."""

    def __init__(self, pool: Any) -> None:
        """Takes the pool, which `torch.cuda.graph_pool_handle` gives."""
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool

    def record(self, work: Callable[[], Tensor], generator: torch.Generator) -> Tensor:
        """See `Tape`. Threads that load images meanwhile are left alone."""
        self._graph.register_generator_state(generator)
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(self._graph, self._pool, stream, capture_error_mode="thread_local"):
            return work()

    def play(self) -> None:
        """See `Tape`."""
        self._graph.replay()


def training_step(
    network: nn.Module,
    update: Update,
    losses_of: Callable[[Batch, torch.Generator], Losses],
    total: Callable[[Tensor], Tensor] = lambda counts: counts,
    workers: int = 1,
) -> Step:
    """Losses, gradients and update of a batch, or of a worker's share of it.

    Args:
        network: whose weights learn.
        update: of these weights.
        losses_of: computes the losses; with other workers by DDP, which takes the mean of their gradients.
        total: adds up what all workers have.
        workers: their number.

    Returns:
        A step that gives its losses, "gradient_norm", and "finite", without which nothing has changed.
    """

    def step(batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        network.zero_grad()
        losses = losses_of(batch, generator)
        # DDP takes the mean over the workers, each of which has a summand of the loss of the whole batch.
        (losses.total(total(losses.counts)) * workers).backward()
        # DDP has averaged the gradients, so their norm, and what follows from it, is the same on all ranks.
        norm, finite = update.step()
        return losses.metrics() | {"gradient_norm": norm, "finite": finite}

    return step


def seeded(
    step: Step, weights: Sequence[nn.Parameter], recorded: bool, refused: Callable[[str], None]
) -> Callable[[Batch, int], dict[str, Tensor]]:
    """A step with a seed in place of a generator.

    Args:
        step: what is taken.
        weights: whose gradients it makes anew each time.
        recorded: whether it is recorded and replayed, for which the weights must be on a GPU.
        refused: told why it can't be recorded, where it can't.
    """
    if recorded:
        pool = torch.cuda.graph_pool_handle()
        return Replayed(step, weights, lambda: CudaTape(pool), refused)
    generator = torch.Generator(weights[0].device)
    return lambda batch, seed: step(batch, generator.manual_seed(seed))


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Runs what is within on a stream of its own, as recording needs it; on CPUs nothing changes."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


@dataclass(frozen=True)
class _Recording:
    """A recorded step, and the places that playing it fills."""

    tape: Tape
    names: tuple[str, ...]
    values: Tensor
    gradients: tuple[Tensor | None, ...]


@dataclass
class _Shape:
    """What is kept of batches of one shape: where they are put, steps taken, and what was recorded on them."""

    batch: Batch
    taken: int = 0
    recording: _Recording | None = None


class Replayed:
    """A step that is recorded for every shape of a batch, after a few plain steps of it, and replayed from then on.

    Where recording fails, this is said once and all further steps are plain.
    """

    def __init__(
        self, step: Step, weights: Sequence[nn.Parameter], blank: Callable[[], Tape], refused: Callable[[str], None]
    ) -> None:
        """Takes the step, the weights whose gradients it makes, what gives an empty tape, and whom to tell."""
        self._step, self._weights, self._blank, self._refused = step, weights, blank, refused
        self._shapes: dict[tuple[torch.Size, ...], _Shape] = {}
        self._generator = torch.Generator(weights[0].device)
        self._records = True

    def __call__(self, batch: Batch, seed: int) -> dict[str, Tensor]:
        """As the step itself with a generator of that seed; the scalars may all be float32."""
        self._generator.manual_seed(seed)
        padded = padded_shapes(batch)
        if padded not in self._shapes:
            if len(self._shapes) == MOST_SHAPES:
                return self._step(batch, self._generator)
            self._shapes[padded] = _Shape(empty(batch, padded))
        shape = self._shapes[padded]
        fill(shape.batch, batch)
        if shape.taken == PLAIN_STEPS and self._records:
            shape.recording = self._record(shape.batch, seed)
        shape.taken += 1
        if (found := shape.recording) is None:
            return self._step(shape.batch, self._generator)
        found.tape.play()
        for weight, gradient in zip(self._weights, found.gradients, strict=True):
            weight.grad = gradient
        return dict(zip(found.names, found.values.clone().unbind(), strict=True))

    def _record(self, batch: Batch, seed: int) -> _Recording | None:
        """Records the step on an input, or says why it can't be."""
        names: list[str] = []

        def work() -> Tensor:
            scalars = self._step(batch, self._generator)
            names.extend(scalars)
            return torch.stack([scalar.detach().float() for scalar in scalars.values()])

        tape = self._blank()
        for weight in self._weights:
            weight.grad = None  # what is recorded must not add to what lies elsewhere
        try:
            values = tape.record(work, self._generator)
        except RuntimeError as error:
            self._records = False
            self._generator = torch.Generator(self._generator.device).manual_seed(seed)  # the other may be unusable
            self._refused(" ".join(str(error).split())[:200])
            return None
        self._generator.manual_seed(seed)
        return _Recording(tape, tuple(names), values, tuple(weight.grad for weight in self._weights))


def padded_shapes(batch: Batch) -> tuple[torch.Size, ...]:
    """Shapes of a batch's tensors with sides of images and numbers of labels rounded up."""

    def up(length: int, multiple: int) -> int:
        return -(-length // multiple) * multiple

    count, height, width, _ = batch.images.shape
    labels = up(batch.points.shape[1], LABEL_MULTIPLE)
    shapes = {
        "images": (count, up(height, IMAGE_MULTIPLE), up(width, IMAGE_MULTIPLE), 3),
        "points": (count, labels, 2),
        "cluster": (count, labels),
    }
    return tuple(torch.Size(shapes.get(name, tensor.shape)) for name, tensor in tensors_of(batch).items())


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """A batch's tensors by name."""
    every = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in every.items() if isinstance(value, Tensor)}


def empty(batch: Batch, shapes: tuple[torch.Size, ...]) -> Batch:
    """A batch of these shapes without anything in it."""
    tensors = zip(tensors_of(batch).values(), shapes, strict=True)
    return Batch(batch.keys, *(tensor.new_zeros(shape) for tensor, shape in tensors))


def fill(held: Batch, batch: Batch) -> None:
    """Copies a batch into one that may be larger; there images are black and labels are padding."""
    for name, tensor in tensors_of(batch).items():
        place: Tensor = getattr(held, name)
        if place.shape != tensor.shape:
            place.fill_(-1 if name == "cluster" else 0)
        place[tuple(slice(length) for length in tensor.shape)].copy_(tensor)
