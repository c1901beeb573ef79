"""How a device computes: by its own means, the same up to rounding."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from sst.nn import network
from sst.nn.network import NetworkShape
from sst.nn.precision import autocast, has_bf16, laid_out, uses_bf16
from sst.run.console import arithmetic_line
from tests.small import local_tools, train_locally, write_toy

CPU, SHAPE = torch.device("cpu"), NetworkShape(16, 2, 2, 16)


@pytest.mark.parametrize("able", [{}, {"avx512_bf16": True}, {"amx_bf16": True}, {"bf16": True}, {"avx512_f": True}])
def test_auto_takes_bf16_only_where_the_processor_has_it(monkeypatch, able):
    """Emulated, bf16 was measured nine times slower than float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    expected = any(name.endswith("bf16") for name in able)
    assert has_bf16(CPU) == uses_bf16(CPU, "auto") == expected
    assert uses_bf16(CPU, "bf16") and not uses_bf16(CPU, "float32")


@pytest.mark.parametrize(("precision", "kind"), [("bf16", torch.bfloat16), ("float32", torch.float32)])
def test_convolutions_are_computed_as_told(precision, kind):
    layer, x = torch.nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    with autocast(CPU, precision):
        assert layer(x).dtype == kind
    assert layer.weight.dtype == torch.float32


def test_a_model_on_a_cpu_stays_as_it_is():
    layer = torch.nn.Conv2d(3, 4, 3)
    assert laid_out(layer, CPU) is layer and layer.weight.is_contiguous()


FAULTS = """
import resource, torch
from sst.nn.precision import keep_freed_memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    return [torch.ones(3_000_000 + 100_000 * number) for number in range(5)]
def counted():
    for _ in range(20): step()
    before = faults()
    for _ in range(20): step()
    return faults() - before
given_back = counted()
keep_freed_memory()
print(given_back, counted())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is told is glibc")
def test_memory_that_was_freed_is_not_fetched_from_the_system_again():
    """Page faults of steps that take and free 64 MB, in a process of its own."""
    # By itself glibc decides by what was freed before, so it is told to give everything back.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    told = {"capture_output": True, "text": True, "check": True, "env": environment}
    printed = subprocess.run([sys.executable, "-c", FAULTS], **told).stdout
    given_back, kept = map(int, printed.split())
    assert given_back > 1_000 and kept < 0.1 * given_back


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("corpus"))
    write_toy(url, train=24, test=8)
    return url


def test_a_run_says_how_it_computes(corpus, tmp_path):
    lines = []
    train_locally(corpus, str(tmp_path / "run"), local_tools(lines))
    (said,) = (line for line in lines if line["kind"] == "arithmetic")
    kind = "bf16" if has_bf16(CPU) else "float32"
    assert said == {"kind": "arithmetic", "device": "cpu", "convolutions": kind, "obstacle": None}
    assert arithmetic_line(said) == f"workers compute on cpu in {kind}"
    slower = said | {"device": "cuda:0", "obstacle": "no C compiler was found"}
    assert arithmetic_line(slower).endswith("by torch's own kernels, which is slower: no C compiler was found")


def test_without_what_own_kernels_need_torchs_are_used_and_the_reason_is_given(monkeypatch):
    """A GPU that is asked for and not there is as good a reason as a missing compiler."""
    monkeypatch.setattr(network, "_KERNELS", {"usable": False})
    assert network.use_kernels(CPU, SHAPE, 64, "float32") is None and not network._KERNELS["usable"]
    if not torch.cuda.is_available():
        obstacle = network.use_kernels(torch.device("cuda"), SHAPE, 64, "float32")
        assert obstacle is not None and "CUDA" in obstacle and not network._KERNELS["usable"]


def test_own_pooling_and_doubling_are_torchs_forwards_and_backwards():
    """What a GPU takes with channels last, in float64 on a CPU."""
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64, requires_grad=True)
    pairs = (
        (network.Halved.apply(x), functional.avg_pool2d(x, 2)),
        (network.Doubled.apply(x), functional.interpolate(x, scale_factor=2.0, mode="nearest")),
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)
        gradient = torch.randn_like(ours)
        found, expected = (torch.autograd.grad(each, x, gradient)[0] for each in (ours, theirs))
        torch.testing.assert_close(found, expected)
    assert pairs[1][0].is_contiguous(memory_format=torch.channels_last)
