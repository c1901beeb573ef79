"""Kernels for a GPU, without one: their results by Triton's interpreter, and whether its compiler takes them.

Both run in processes of their own, since Triton decides at import whether it interprets.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

INTERPRETED = """
import json, torch
from torch.nn import functional
from sst.nn.kernels import NormReluFunction, can_normalise

cases = [(2, 64, 20, 20, 32, "float32"), (2, 256, 16, 16, 32, "float32"), (3, 32, 4, 4, 8, "float32"),
         (1, 128, 33, 31, 32, "float32"), (2, 16, 1, 1, 2, "float32"), (2, 64, 24, 24, 32, "bfloat16")]
found = []
for count, channels, height, width, groups, kind in cases:
    torch.manual_seed(0)
    x = (torch.randn(count, channels, height, width) * 2 + 1).to(getattr(torch, kind))
    x = x.contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(count, channels, height, width).to(x.dtype)
    given = [each.requires_grad_() for each in (x, torch.randn(channels), torch.randn(channels))]
    exact = [each.detach().double().requires_grad_() for each in given]
    assert can_normalise(x, groups)
    y = NormReluFunction.apply(*given, groups, 1e-5)
    theirs = functional.relu(functional.group_norm(exact[0], groups, exact[1], exact[2], 1e-5))
    y.backward(gradient)
    theirs.backward(gradient.double())
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == x.dtype
    pairs = [(y, theirs), *((ours.grad, their.grad) for ours, their in zip(given, exact))]
    found.append([kind, [float((a.double() - b).norm() / b.norm().clamp_min(1e-9)) for a, b in pairs]])
refused = [torch.randn(2, 64, 4, 4), torch.randn(2, 48, 4, 4).contiguous(memory_format=torch.channels_last)]
assert not any(can_normalise(x, 16) for x in refused)
print(json.dumps(found))
"""

COMPILED = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sst.nn import kernels
from sst.nn.network import DetectorDescriptor, NetworkShape, NormRelu

sizes, TYPES = {}, {"weight": "*fp32", "bias": "*fp32", "parts": "*fp32", "factors": "*fp32", "found": "*fp32",
                    "pixels": "i32", "count": "i32", "eps": "fp32", "x": "*bf16", "gradient": "*bf16", "out": "*bf16"}

def note(module, inputs, output):
    sizes[inputs[0].shape[1], module.num_groups, inputs[0].shape[2] * inputs[0].shape[3]] = None

network = DetectorDescriptor(NetworkShape())
for module in network.modules():
    if isinstance(module, NormRelu):
        module.register_forward_hook(note)
with torch.inference_mode():
    network(torch.zeros(1, 3, 256, 256))

def compiled(kernel, constants, warps):
    names = kernel.arg_names
    types = {name: TYPES.get(name, "constexpr") for name in names if name not in constants}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if types[name][0] == "*"}
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": warps})
    return made.asm["ptx"]

seen = set()
for channels, groups, pixels in sizes:
    rows, tiles = kernels.split(channels, pixels)
    once = {"CHANNELS": channels, "EACH": channels // groups, "PARTS": kernels.MOST_PARTS}
    for kernel in (kernels._forward_factors, kernels._backward_factors):
        if (kernel, tuple(once.values())) not in seen:
            compiled(kernel, once, 4)
        seen.add((kernel, tuple(once.values())))
    for backward in (False, True):
        many = {"CHANNELS": channels, "ROWS": rows, "BACKWARD": backward}
        for kernel, more in ((kernels._sums, {"TILES": tiles}), (kernels._apply, {})):
            key = kernel, *many.values(), *more.values()
            if key not in seen:
                ptx = compiled(kernel, many | more, 8)
                assert "ld.global.v4" in ptx, (kernel, "reads narrow pieces")
            seen.add(key)
print(len(sizes), len(seen))
"""


def output(code: str, *arguments: str, interpret: bool) -> str:
    """What a process prints."""
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpret)), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, *arguments]
    told = {"capture_output": True, "text": True, "env": environment, "cwd": Path(__file__).parents[2]}
    done = subprocess.run(command, check=False, **told)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_normalisation_with_relu_is_torchs_forwards_and_backwards() -> None:
    """Against float64. In bfloat16 the result and the gradient of x are rounded once, by 2^-9 on average."""
    for kind, (y, x, weight, bias) in json.loads(output(INTERPRETED, interpret=True)):
        rounding = 1e-6 if kind == "float32" else 4e-3
        assert y < rounding and x < rounding and weight < 1e-6 and bias < 1e-6, (kind, y, x, weight, bias)


def test_the_compiler_takes_every_kernel_of_the_published_network() -> None:
    """For every size that the network at 256 px has, on an H100. Arrays are read 16 bytes at a time."""
    sizes, kernels = map(int, output(COMPILED, "90", interpret=False).split())
    assert sizes >= 12 and kernels >= 20
