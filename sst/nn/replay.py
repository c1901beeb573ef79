"""A training step recorded once, as one CUDA graph, and replayed: the host launches one thing instead of thousands.

Needs torch alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sst.nn.steps import Batch

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


def taken_on(
    device: torch.device, step: Step, weights: Sequence[nn.Parameter], refused: Callable[[str], None]
) -> Callable[[Batch, int], dict[str, Tensor]]:
    """A step as it is best taken on a device, on a batch and with a seed: on a GPU recorded and replayed.

    Args:
        device: of the weights.
        step: what is taken.
        weights: whose gradients it makes anew each time.
        refused: told why it can't be recorded, where it can't.
    """
    if device.type == "cuda":
        pool = torch.cuda.graph_pool_handle()
        return Replayed(step, weights, lambda: CudaTape(pool), refused)
    generator = torch.Generator(device)
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


@dataclass
class _Shape:
    """What is kept of batches of one shape: where they are put, and what was recorded on them."""

    batch: Batch
    taken: int = 0
    tape: Tape | None = None
    names: tuple[str, ...] = ()
    values: Tensor | None = None
    gradients: tuple[Tensor | None, ...] = ()


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
        if shape.tape is None and shape.taken == PLAIN_STEPS and self._records:
            self._record(shape, seed)
        shape.taken += 1
        if shape.tape is None or shape.values is None:
            return self._step(shape.batch, self._generator)
        shape.tape.play()
        for weight, gradient in zip(self._weights, shape.gradients, strict=True):
            weight.grad = gradient
        return dict(zip(shape.names, shape.values.clone().unbind(), strict=True))

    def _record(self, shape: _Shape, seed: int) -> None:
        """Records the step on a shape's input, or says why it can't be."""

        def work() -> Tensor:
            scalars = self._step(shape.batch, self._generator)
            shape.names = tuple(scalars)
            return torch.stack([scalar.detach().float() for scalar in scalars.values()])

        tape = self._blank()
        for weight in self._weights:
            weight.grad = None  # what is recorded must not add to what lies elsewhere
        try:
            shape.values = tape.record(work, self._generator)
        except RuntimeError as error:
            self._records = False
            self._generator = torch.Generator(self._generator.device).manual_seed(seed)  # the other may be unusable
            self._refused(" ".join(str(error).split())[:200])
            return
        self._generator.manual_seed(seed)
        shape.tape, shape.gradients = tape, tuple(weight.grad for weight in self._weights)


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
