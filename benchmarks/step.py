"""How fast is a training step, and what does each way of computing it give? `python -m benchmarks.step`.

Steps of both stages on random images: augmentation, network, losses, gradients, optimizer. Variants take turns: float32
and bf16, contiguous and channels-last, with and without torch.compile. The share of the peak is that of the largest
matrix product measured in the same run. Needs torch and numpy alone.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.common import idle_share, machine, summed_up
from sst.config import PRESETS, TrainSettings
from sst.network import DetectorDescriptor, LandmarkDetector
from sst.own import random_batch
from sst.training import stage1_losses, stage2_losses

FULL_FLOP = 62e9
"""Of a training step for an image at full size: three times those of a forward pass."""


@dataclass(frozen=True)
class Variant:
    """A way of computing a step."""

    precision: Literal["float32", "bf16"]
    channels_last: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        """What stands in the table."""
        extras = [name for name, on in (("channels-last", self.channels_last), ("compiled", self.compiled)) if on]
        return " ".join([self.precision, *extras])


VARIANTS = [
    Variant("float32"),
    Variant("bf16"),
    Variant("float32", channels_last=True),
    Variant("bf16", channels_last=True),
    Variant("bf16", channels_last=True, compiled=True),
]


def device_of_run() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matrix_peak(precision: str) -> float:
    """FLOP/s of a large matrix product."""
    device, kind = device_of_run(), torch.bfloat16 if precision == "bf16" else torch.float32
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronise()
        started = time.perf_counter()
        a @ b
        synchronise()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def stepper(stage: int, variant: Variant, settings: TrainSettings) -> Callable[[], torch.Tensor]:
    """A function that takes one step and gives its loss."""
    device = device_of_run()
    resources = settings.resources.model_copy(update={"precision": variant.precision})
    settings = settings.model_copy(update={"resources": resources})
    torch.manual_seed(0)
    first = DetectorDescriptor(settings.network.shape)
    model: nn.Module = first if stage == 1 else LandmarkDetector.from_stage1(first, settings.cluster.clusters)
    model = model.to(device).train()
    if variant.channels_last:
        model = model.to(memory_format=torch.channels_last)
    used = torch.compile(model) if variant.compiled else model
    size = settings.stage1.pairs if stage == 1 else settings.stage2.batch
    batch, generator = random_batch(size, settings).to(device), torch.Generator(device).manual_seed(0)
    active = torch.ones(settings.cluster.clusters, dtype=torch.bool, device=device)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=5e-4, weight_decay=1e-5)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        if stage == 1:
            loss = stage1_losses(used, batch, settings, generator)["loss"]
        else:
            loss = stage2_losses(used, batch, active, settings, generator)["loss"]
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def main(
    preset: str = "faces-cpu",
    stage: Literal[1, 2] = 1,
    steps: int = 10,
    repeats: int = 5,
    losses: int = 0,
    compiled: bool = False,
) -> None:
    """Measures and prints.

    Args:
        preset: whose sizes are taken.
        stage: of training.
        steps: of a repeat.
        repeats: of each variant, in turns.
        losses: steps over which the loss is compared with float32's; 0 for none.
        compiled: whether torch.compile is tried too, which takes minutes on a CPU.
    """
    console, settings = Console(width=120), PRESETS[preset][1]
    console.print(machine(), f"idle before: {100 * idle_share():.0f} %", f"{preset}, stage {stage}")
    images = 2 * settings.stage1.pairs if stage == 1 else settings.stage2.batch
    taken: dict[Variant, list[float]] = {variant: [] for variant in VARIANTS}
    memory: dict[Variant, float] = {}
    ready = {}
    for variant in (one for one in VARIANTS if compiled or not one.compiled):
        try:
            ready[variant] = stepper(stage, variant, settings)
            for _ in range(3):
                ready[variant]()
        except Exception as error:  # torch.compile needs a compiler, which may not be there
            console.print(f"{variant}: not here: {str(error).splitlines()[0][:100]}")
            ready.pop(variant, None)
    for _ in range(repeats):
        for variant, step in ready.items():
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            synchronise()
            started = time.perf_counter()
            for _ in range(steps):
                step()
            synchronise()
            taken[variant].append((time.perf_counter() - started) / steps)
            memory[variant] = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else float("nan")
    peaks = {precision: matrix_peak(precision) for precision in ("float32", "bf16")}
    table = Table("", "ms per step", "images/s", "share of the matrix peak", "GB", "times float32's speed")
    full = settings.network.shape == TrainSettings().network.shape and settings.network.input_size == 256
    for variant in ready:
        rate = images / statistics.median(taken[variant])
        share = f"{100 * rate * FULL_FLOP / peaks[variant.precision]:.0f} %" if full else "-"
        ratios = [a / b for a, b in zip(taken[VARIANTS[0]], taken[variant], strict=True)]
        milliseconds = summed_up([1e3 * seconds for seconds in taken[variant]])
        table.add_row(str(variant), milliseconds, f"{rate:.0f}", share, f"{memory[variant]:.1f}", summed_up(ratios))
    console.print(table, *(f"matrix peak {name}: {peak / 1e12:.2f} TFLOP/s" for name, peak in peaks.items()))
    if losses:
        plain, fast = (stepper(stage, variant, settings) for variant in (VARIANTS[0], VARIANTS[3]))
        gaps = [abs(float(fast()) - value) / value for value in (float(plain()) for _ in range(losses))]
        console.print(f"loss of {VARIANTS[3]} against float32 over {losses} steps: {summed_up(gaps)} of it")


if __name__ == "__main__":
    tyro.cli(main)
