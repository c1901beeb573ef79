"""How a device computes a network fast: precision and memory layout. The results agree up to rounding.

Needs torch alone.
"""

import ctypes
import platform
from typing import Literal, TypeVar

import torch
from torch import nn

Precision = Literal["auto", "bf16", "float32"]

Model = TypeVar("Model", bound=nn.Module)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bfloat16; emulated, it was nine times slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def uses_bf16(device: torch.device, precision: Precision) -> bool:
    """Whether convolutions are computed in bfloat16: as told, and by "auto" where the device has it."""
    return precision == "bf16" or (precision == "auto" and has_bf16(device))


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The arithmetic of convolutions; weights, losses and optimizer are always float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device, precision))


def keep_freed_memory() -> None:
    """Tells the C library to keep what this process frees, for the next step takes the same again.

    Otherwise glibc gives large arrays back to the system, and fetching them anew took 5 to 10 % of a step on a CPU.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    if platform.libc_ver()[0] == "glibc":  # other C libraries have other habits
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, 2**30)
        library.mallopt(mmap_threshold, 2**25)  # a round's larger arrays go back at once, or they would leave gaps


def laid_out(model: Model, device: torch.device) -> Model:
    """The model on the device, in the memory format in which it is to be computed there.

    The matrix units of GPUs read channels last; on CPUs this form is slow.
    """
    model.to(device)
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
