"""The DDP group as one worker sees it."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Group:
    """The DDP group seen from one worker; alone, all of it is trivial."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def share_of(self, size: int) -> int:
        """This worker's part of a batch; the first workers take what is left over."""
        return size // self.world + (self.rank < size % self.world)

    def wait(self) -> None:
        """Returns when all workers are here."""
        if self.world > 1:
            dist.barrier()

    def total(self, values: Tensor) -> Tensor:
        """The sum of all workers' values, on every worker; the host does not wait for it."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every worker's value, in rank order, on every worker."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, with gradients averaged over the group: sent while others are computed, and not copied back.

        After its first step DDP sorts gradients anew into what it sends together, and so adds those of three workers or
        more in another order than in that step: a resumed run would differ from an undisturbed one in the last bit. Who
        asks it to look for unused parameters keeps the first order. On GPUs no two runs are equal anyway.
        """
        if self.world == 1:
            return model
        on_gpu = self.device.type == "cuda"
        devices = [self.device] if on_gpu else None
        return DistributedDataParallel(
            model, device_ids=devices, gradient_as_bucket_view=True, find_unused_parameters=not on_gpu
        )
