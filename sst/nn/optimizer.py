"""The optimizer's step, which leaves no trace where a gradient is not finite, without the host waiting for the device.

Needs torch alone.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

OptimizerName = Literal["rmsprop", "adamw"]
"""rmsprop: as published, its weight decay added to the gradient. adamw: with decoupled weight decay."""

AVERAGES: dict[OptimizerName, tuple[str, ...]] = {"rmsprop": ("square_avg",), "adamw": ("exp_avg", "exp_avg_sq")}
"""Running averages that torch's optimizers keep of each weight's gradient."""

ALIGNED = 64
"""Numbers to which each tensor's place in a buffer is rounded up, so that kernels may read it in wide pieces."""


def in_one_buffer(tensors: Sequence[Tensor]) -> Tensor:
    """Moves dense tensors of one type and device into one buffer; each keeps its shape, strides and values.

    Returns:
        The buffer, one-dimensional; writing to it writes to all the tensors.
    """
    places, total = [], 0
    for tensor in tensors:
        places.append(total)
        total += -(-tensor.numel() // ALIGNED) * ALIGNED
    buffer = torch.zeros(total, dtype=tensors[0].dtype, device=tensors[0].device)
    for tensor, place in zip(tensors, places, strict=True):
        view = buffer.as_strided(tensor.shape, tensor.stride(), place)
        tensor.data = view.copy_(tensor.data)
    return buffer


class Update:
    """RMSprop (paper, section 4), or AdamW, over a model's weights.

    A step whose gradient is not finite is undone: weights and running averages are kept as they were before it, in
    one buffer each, and a single selection on the device puts them back. So the host need not know before the next
    step is on its way, and nothing is lost by looking at `finite` only now and then.

    RMSprop's weight decay is added to the gradient, as published. It divides both by the gradient's usual size, so
    where a gradient is smaller than decay x weight the decay makes full steps: it takes up to a learning rate off such
    a weight at each step, until nothing is left of it. AdamW's is decoupled: it takes learning rate x decay of each
    weight.
    """

    def __init__(
        self, model: nn.Module, learning_rate: float, weight_decay: float, kind: OptimizerName = "rmsprop"
    ) -> None:
        """Takes over the weights, which must already be on their device and in their memory format."""
        weights = list(model.parameters())
        self._names, self._decoupled = AVERAGES[kind], kind == "adamw"
        device = weights[0].device
        # On a GPU a step can be recorded and replayed (`sst.nn.replay`): then what changes between steps lies there.
        recordable = device.type == "cuda"
        rate = torch.tensor(learning_rate, device=device) if recordable else learning_rate
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(weights, lr=rate, weight_decay=weight_decay, fused=True, capturable=recordable)
            if self._decoupled
            else torch.optim.RMSprop(weights, lr=rate, weight_decay=weight_decay, capturable=recordable)
        )
        averages = [[torch.zeros_like(weight) for weight in weights] for _ in self._names]
        self._steps = torch.zeros(len(weights), device=device)  # by which AdamW corrects its averages
        self._buffers = in_one_buffer(weights), *map(in_one_buffer, averages)
        if self._decoupled:
            self._buffers += (self._steps,)
        self._before = tuple(torch.empty_like(buffer) for buffer in self._buffers)
        for weight, step, *each in zip(weights, self._steps, *averages, strict=True):
            self._optimizer.state[weight] = {"step": step} | dict(zip(self._names, each, strict=True))

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: "3.square_avg" is that average of weight 3; "steps" are those that AdamW goes by."""
        states = list(self._optimizer.state.values())
        averages = {f"{index}.{name}": each[name] for index, each in enumerate(states) for name in self._names}
        return averages | ({"steps": self._steps} if self._decoupled else {})

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave."""
        for name, average in self.state().items():
            average.copy_(state[name])

    def set_rate(self, learning_rate: float) -> None:
        """Sets the learning rate of the steps that follow."""
        group = self._optimizer.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate

    def step(self) -> tuple[Tensor, Tensor]:
        """Takes a step with the gradients that are there, without the host waiting for the device.

        Returns:
            The gradient's norm, and whether it is finite, without which nothing has changed; scalars on the device.
        """
        group = self._optimizer.param_groups[0]
        norm = nn.utils.get_total_norm([w.grad for w in group["params"] if w.grad is not None])
        finite = torch.isfinite(norm)
        for before, buffer in zip(self._before, self._buffers, strict=True):
            before.copy_(buffer)
        self._optimizer.step()
        for before, buffer in zip(self._before, self._buffers, strict=True):
            torch.where(finite, buffer, before, out=buffer)
        return norm, finite

    def decay_share(self) -> Tensor:
        """Share of the weights in which the decay outweighs the gradient; a scalar on the device.

        0 where it is decoupled: then the two do not compete.
        """
        group = self._optimizer.param_groups[0]
        weights = [weight for weight in group["params"] if weight.grad is not None]
        decay = 0.0 if self._decoupled else float(group["weight_decay"])
        more = [(weight.detach().abs() * decay > weight.grad.abs()).sum() for weight in weights]
        return torch.stack(more).sum() / float(sum(weight.numel() for weight in weights))
