"""How fast is a training step, and what does each way of computing it give? `python -m benchmarks.step`.

Steps of both stages on random images: augmentation, network, losses, gradients, optimizer. images/s are those that pass
through the network, so both views of a pair count, as in the lines of `jobs.train`. Variants take turns: float32
and bf16 (left out where it is emulated, unless asked for), contiguous and channels-last, with and without
torch.compile, on a GPU recorded as a graph. The share of the peak is that of the largest matrix product measured in the
same run. At full size it also says how long the published schedule's steps would take. Needs torch and numpy alone.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from benchmarks.common import (
    Size,
    device_of_run,
    idle_share,
    machine,
    print_table,
    sizes_of,
    summed_up,
    synchronise,
    wall_seconds,
)
from sst.nn.network import DetectorDescriptor, LandmarkDetector, use_kernels
from sst.nn.optimizer import Update
from sst.nn.precision import has_bf16, keep_freed_memory
from sst.nn.replay import PLAIN_STEPS, own_stream, seeded, training_step
from sst.nn.steps import Batch, Losses, random_batch, stage1_losses, stage2_losses

FULL_FLOP = 62e9
"""Of a training step for an image at full size: three times those of a forward pass."""

PUBLISHED_STEPS = {1: 310_000, 2: 80_000}
"""Of the published schedule."""


@dataclass(frozen=True)
class Variant:
    """A way of computing a step."""

    precision: Literal["float32", "bf16"]
    channels_last: bool = False
    compiled: bool = False
    recorded: bool = False

    def __str__(self) -> str:
        """What stands in the table."""
        named = ("channels-last", self.channels_last), ("compiled", self.compiled), ("recorded", self.recorded)
        return " ".join([self.precision, *(name for name, on in named if on)])


PLAIN = Variant("float32")
"""What the others are compared with."""


def variants_of(device: torch.device, compiled: bool, emulated: bool) -> list[Variant]:
    """The one that training takes on the device is last."""
    precisions: list[Literal["float32", "bf16"]] = ["float32", "bf16"] if emulated or has_bf16(device) else ["float32"]
    found = [Variant(each, channels_last) for channels_last in (False, True) for each in precisions]
    gpu = device.type == "cuda"
    if compiled:
        found += [Variant(precisions[-1], channels_last, True, gpu) for channels_last in (False, True)]
    taken = Variant(precisions[-1], gpu, False, gpu)
    return [each for each in found if each != taken] + [taken]


def matrix_peak(precision: str) -> float:
    """FLOP/s of a large matrix product."""
    device, kind = device_of_run(), torch.bfloat16 if precision == "bf16" else torch.float32
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    return 2 * side**3 / min(wall_seconds(lambda: a @ b, repeats=10))


def stepper(stage: int, variant: Variant, size: Size, images: int | None = None) -> Callable[[], torch.Tensor]:
    """A function that takes one step and gives its loss."""
    device, sizes = device_of_run(), sizes_of(size, variant.precision)
    torch.backends.cudnn.benchmark = True  # this and the next as in training
    keep_freed_memory()
    torch.manual_seed(0)
    first = DetectorDescriptor(sizes.shape)
    model: nn.Module = first if stage == 1 else LandmarkDetector.from_stage1(first, sizes.clusters)
    model = model.to(device).train()
    if variant.channels_last:
        model = model.to(memory_format=torch.channels_last)
    used = torch.compile(model, dynamic=False) if variant.compiled else model
    batch = random_batch(images or batch_of(stage, size), sizes.stage1.input_size, sizes.clusters).to(device)
    active = torch.ones(sizes.clusters, dtype=torch.bool, device=device)
    update = Update(model, learning_rate=5e-4, weight_decay=1e-5)

    def losses_of(given: Batch, generator: torch.Generator) -> Losses:
        if stage == 1:
            return stage1_losses(used, given, sizes.stage1, generator)
        return stage2_losses(used, given, active, sizes.stage2, generator)

    take = seeded(training_step(model, update, losses_of), list(model.parameters()), variant.recorded, refused)
    seeds = itertools.count()
    return lambda: take(batch, next(seeds))["loss"].detach()


def refused(obstacle: str) -> None:
    """A variant that can't be recorded is not measured."""
    raise RuntimeError(f"not recorded: {obstacle}")


def batch_of(stage: int, size: Size) -> int:
    """Pairs of a step of stage 1, images of one of stage 2."""
    sizes = sizes_of(size)
    return int(sizes.pairs if stage == 1 else sizes.batch)


def compare(
    stage: int, size: Size, variants: list[Variant], steps: int, repeats: int, peaks: dict[str, float]
) -> float:
    """Measures the variants of a stage in turns and prints them; returns the best one's seconds of a step."""
    ready: dict[Variant, Callable[[], torch.Tensor]] = {}
    for variant in variants:
        try:
            ready[variant] = stepper(stage, variant, size)
            for _ in range(PLAIN_STEPS + 2):
                ready[variant]()
        except Exception as error:  # torch.compile needs a compiler, which may not be there
            print(f"{variant}: not here: {str(error).splitlines()[0][:100]}")
            ready.pop(variant, None)
    taken: dict[Variant, list[float]] = {variant: [] for variant in ready}
    memory = dict.fromkeys(ready, "-")
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
            if torch.cuda.is_available():
                memory[variant] = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"
    images, rows = (2 if stage == 1 else 1) * batch_of(stage, size), []
    for variant, seconds in taken.items():
        rate = images / statistics.median(seconds)
        share = f"{100 * rate * FULL_FLOP / peaks[variant.precision]:.0f} %" if size == "full" else "-"
        ratios = [a / b for a, b in zip(taken[PLAIN], seconds, strict=True)]
        milliseconds = summed_up([1e3 * each for each in seconds])
        rows.append((str(variant), milliseconds, f"{rate:.0f}", share, memory[variant], summed_up(ratios)))
    print(f"\nstage {stage}, {images} images a step")
    print_table(("", "ms per step", "images/s", "of the matrix peak", "GB", "times float32's speed"), rows)
    return min(statistics.median(seconds) for seconds in taken.values())


def loss_gaps(stage: int, variant: Variant, size: Size, steps: int) -> list[float]:
    """How far the loss is from the plain way's over so many steps of training, as a share of it."""
    plain, fast = (stepper(stage, each, size) for each in (PLAIN, variant))
    return [abs(float(fast()) - value) / value for value in (float(plain()) for _ in range(steps))]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "cpu"), default="full" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=10, help="of a repeat")
    parser.add_argument("--repeats", type=int, default=5, help="of each variant, in turns")
    parser.add_argument("--losses", type=int, default=0, help="steps over which the loss is compared with float32's")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too, which takes minutes on a CPU")
    parser.add_argument("--emulated", action="store_true", help="bf16 also where the device only emulates it")
    given = parser.parse_args()
    print(machine(), f"idle before: {100 * idle_share():.0f} %", f"size {given.size}", sep="; ")
    variants = variants_of(device_of_run(), given.compiled, given.emulated)
    peaks = {precision: matrix_peak(precision) for precision in sorted({variant.precision for variant in variants})}
    print(*(f"matrix peak {name}: {peak / 1e12:.2f} TFLOP/s" for name, peak in peaks.items()), sep="; ")
    size, taken = sizes_of(given.size), variants[-1].precision
    if obstacle := use_kernels(device_of_run(), size.shape, size.stage1.input_size, taken):
        print(f"without own kernels: {obstacle}")
    with own_stream(device_of_run()):
        best = {
            stage: compare(stage, given.size, variants, given.steps, given.repeats, peaks) for stage in given.stages
        }
    if given.size == "full" and set(best) == {1, 2}:
        minutes = sum(seconds * PUBLISHED_STEPS[stage] for stage, seconds in best.items()) / 60
        print(f"\nsteps of the published schedule, without its rounds: {minutes:.0f} minutes")
    for stage in given.stages if given.losses else ():
        gaps = summed_up(loss_gaps(stage, variants[-1], given.size, given.losses))
        print(f"stage {stage}: {variants[-1]} against {PLAIN} over {given.losses} steps: loss differs by {gaps} of it")


if __name__ == "__main__":
    main()
