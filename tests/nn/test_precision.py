"""How a device computes: by its own means, the same up to rounding."""

import os
import platform
import socket
import subprocess
import sys

import pytest
import torch

from sst.nn.network import DetectorDescriptor, NetworkShape
from sst.nn.optimizer import Update
from sst.nn.precision import autocast, has_bf16, laid_out, obstacle_to_compiling, uses_bf16
from sst.nn.steps import random_batch, stage1_losses
from sst.run.console import arithmetic_line
from sst.train.trainer import settled_compiling
from sst.train.workers import Group
from tests.small import SETTINGS, local_tools, train_locally, write_toy

CPU = torch.device("cpu")


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
    assert laid_out(layer, CPU, compiled=True) is layer and layer.weight.is_contiguous()


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


def without_compiler(function):
    def fails(*arguments):
        raise RuntimeError("no C compiler\nwas found")

    return fails


def test_a_machine_that_cannot_compile_says_why(monkeypatch):
    monkeypatch.setattr(torch, "compile", without_compiler)
    assert obstacle_to_compiling(CPU) == "no C compiler was found"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("corpus"))
    write_toy(url, train=24, test=8)
    return url


def with_compile(told: bool | None):
    return SETTINGS.model_copy(update={"resources": SETTINGS.resources.model_copy(update={"compile": told})})


def test_a_run_says_how_it_computes_and_refuses_to_compile_where_it_cannot(monkeypatch, corpus, tmp_path):
    lines = []
    train_locally(corpus, str(tmp_path / "run"), local_tools(lines), with_compile(None))
    (said,) = (line for line in lines if line["kind"] == "arithmetic")
    kind = "bf16" if has_bf16(CPU) else "float32"
    settled = {"device": "cpu", "convolutions": kind, "compiled": False, "obstacle": None}
    assert said == {"kind": "arithmetic"} | settled
    assert arithmetic_line(said) == f"workers compute on cpu in {kind}"
    monkeypatch.setattr(torch, "compile", without_compiler)
    with pytest.raises(RuntimeError, match="--resources.compile: .*no C compiler was found.*leave it out"):
        train_locally(corpus, str(tmp_path / "other"), local_tools([]), with_compile(True))


def test_a_gpu_that_cannot_compile_goes_on_without_and_says_so(monkeypatch):
    monkeypatch.setattr("sst.train.trainer.obstacle_to_compiling", lambda device: "no C compiler was found")
    compiles, obstacle = settled_compiling(None, Group(device=torch.device("cuda")))
    assert compiles is False
    line = {"device": "cuda", "convolutions": "bf16", "compiled": compiles, "obstacle": obstacle}
    said = "workers compute on cuda in bf16; not compiled, which is slower: no C compiler was found"
    assert arithmetic_line(line) == said
    assert settled_compiling(False, Group(device=torch.device("cuda"))) == (False, None)


@pytest.mark.slow
def test_a_compiled_run_is_one_graph_a_model_and_begins_as_a_plain_one_does(corpus, tmp_path):
    """Float32, through all phases, rounds and the change of stages. Sums are only taken in another order, but training
    soon makes much of that; so losses are compared as long as little was trained."""
    if (obstacle := obstacle_to_compiling(CPU)) is not None:
        pytest.skip(f"torch.compile does not work here: {obstacle}")
    lines, network = {}, SETTINGS.network.model_copy(update={"depth": 1})
    for told in (False, True):
        resources = SETTINGS.resources.model_copy(update={"precision": "float32", "compile": told})
        settings = SETTINGS.model_copy(update={"resources": resources, "network": network})
        torch._dynamo.utils.counters.clear()
        train_locally(corpus, str(tmp_path / str(told)), local_tools(lines.setdefault(told, [])), settings)
    assert torch._dynamo.utils.counters["graph_break"] == {}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 3
    plain, compiled = ([line["loss"] for line in lines[told] if line["kind"] == "step"] for told in (False, True))
    assert compiled[0] == pytest.approx(plain[0], rel=1e-4) and compiled[0] != plain[0]
    assert len(compiled) == len(plain) and all(loss < 1.2 * plain[0] for loss in compiled)
    assert any(line.get("compiled") for line in lines[True]) and not any(line.get("compiled") for line in lines[False])


def _train_in_a_group(rank: int, port: int, folder: str) -> None:
    """One of two DDP workers: three steps, plain and compiled, from the same start; saves what came out."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    settings, found = SETTINGS.with_precision("float32"), []
    batch, generator = random_batch(4, settings.network.input_size, settings.cluster.clusters), torch.Generator()
    for compiled in (False, True):
        torch.manual_seed(0)
        model = DetectorDescriptor(NetworkShape(16, 1, 2, 16)).to(memory_format=torch.channels_last).train()
        update, wrapped = Update(model, 5e-4, 1e-5), Group(rank, 2).wrap(model)
        used = torch.compile(wrapped, dynamic=False) if compiled else wrapped
        norms = []
        for step in range(3):
            generator.manual_seed(10 * step + rank)
            model.zero_grad()
            stage1_losses(used, batch, settings.stage1_step(), generator).total().backward()
            norms.append(update(5e-4)[0])
        assert model.backbone.block1.conv1.weight.is_contiguous(memory_format=torch.channels_last)
        weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
        found += [torch.stack(norms), weights]
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_compiled_workers_of_a_group_take_the_steps_of_plain_ones(tmp_path):
    """As on GPUs: compiled around DDP's wrapper, channels last, weights in one buffer."""
    if (obstacle := obstacle_to_compiling(CPU)) is not None:
        pytest.skip(f"torch.compile does not work here: {obstacle}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train_in_a_group, args=(port, str(tmp_path)), nprocs=2)
    own, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(map(torch.equal, own, other))
    norms, weights, compiled_norms, compiled_weights = own
    torch.testing.assert_close(compiled_norms[0], norms[0], rtol=1e-5, atol=0)  # from equal weights
    torch.testing.assert_close(compiled_weights, weights, rtol=0, atol=2e-3)  # RMSprop's first steps magnify rounding
    assert not torch.equal(compiled_weights, weights)
