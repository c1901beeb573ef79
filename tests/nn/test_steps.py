"""What happens to a batch on the device: it needs torch and numpy alone, and the host hardly waits for it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import sizes_of
from cluster.shards import Labels
from sst.nn.losses import descriptor_loss
from sst.nn.network import DetectorDescriptor, LandmarkDetector
from sst.nn.optimizer import Update
from sst.nn.steps import Batch, describe, random_batch, stage1_losses, stage2_losses
from sst.presets import PRESETS
from sst.train.extraction import padded_points
from tests.small import SETTINGS

WAITING = {
    "aten::_local_scalar_dense",  # .item(), float(), bool()
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::bincount",
    "aten::repeat_interleave.Tensor",
    "aten::lift_fresh",  # torch.tensor(...): a copy from the host
}
"""Operations whose result has a size, or a place, that a host must know: on a GPU it waits for all that came before."""


class Waits(TorchDispatchMode):
    """Counts operations for which a host waits on a GPU, also where there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        masked = name == "aten::index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING or func.name() in WAITING or masked:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class Points(torch.nn.Module):
    """A detector that finds three points in bright images and one in dark ones."""

    def forward(self, images_B3SS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heat = torch.zeros(len(images_B3SS), 1, 16, 16)
        heat[:, 0, 3, 3] = 0.9
        bright = images_B3SS.mean((1, 2, 3)) > 0.5
        heat[bright, 0, 3, 12] = heat[bright, 0, 12, 3] = 0.9
        return heat, torch.ones(len(images_B3SS), 4, 16, 16)


def test_only_an_image_with_too_few_keypoints_keeps_its_previous_labels():
    shade = torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1, 1)
    stored = torch.full((3, 2), 64.0)
    batch = Batch(("a", "b", "c"), (255 * shade).expand(3, 64, 64, 3).byte(), stored, torch.eye(3).expand(3, 3, 3),
                  torch.zeros(3, 0, 2), torch.zeros(3, 0))  # fmt: skip
    nowhere = [float("nan")] * 2
    previous = torch.tensor([[[9.0, 9.0], [3.0, 4.0]], [[9.0, 9.0], [13.0, 13.0]], [[5.0, 12.0], nowhere]])
    told = {"input_size": 64, "threshold": 0.5, "precision": "float32"}
    found = {enough: describe(Points(), batch, previous, **told, enough=enough) for enough in (None, 2, 1)}
    places = {
        enough: [{tuple(p) for p in each.round().tolist()} for each in points.split(counts.tolist())]
        for enough, (counts, points, _, _) in found.items()
    }
    alone = {(3.0, 3.0), (12.0, 3.0), (3.0, 12.0)}
    assert places[1] == [{(3.0, 3.0)}, alone, {(3.0, 3.0)}] and not found[1][3].any()
    # The label at (3, 4) beats the point beside it.
    assert places[2] == [{(9.0, 9.0), (3.0, 4.0)}, alone, {(5.0, 12.0), (3.0, 3.0)}]
    assert found[2][3].tolist() == [True, False, True]
    assert places[None] == [places[2][0], alone | {(9.0, 9.0), (13.0, 13.0)}, places[2][2]]


def test_the_counter_sees_what_waits() -> None:
    with Waits() as waits:
        x = torch.ones(3)
        float(x.sum())
        x[x > 0]
        (x > 0).nonzero()
    assert waits.seen == ["aten::_local_scalar_dense", "aten::index", "aten::nonzero"]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_never_waits_for_the_device(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sst.nn.augment.free_to_look", lambda device: False)  # as on a GPU
    torch.manual_seed(0)
    model = DetectorDescriptor(SETTINGS.network.shape)
    batch, generator = (
        random_batch(4, SETTINGS.network.input_size, SETTINGS.cluster.clusters),
        torch.Generator().manual_seed(0),
    )
    active = torch.ones(SETTINGS.cluster.clusters, dtype=torch.bool)
    partner = torch.arange(SETTINGS.cluster.clusters)
    used = model if stage == 1 else LandmarkDetector.from_stage1(model, SETTINGS.cluster.clusters)
    update = Update(used, 5e-4, 1e-5)
    with Waits() as waits:
        if stage == 1:
            loss = stage1_losses(used, batch, SETTINGS.stage1_step(), generator).total()
        else:
            loss = stage2_losses(used, batch, active, SETTINGS.stage2_step(), generator, partner).total()
        loss.backward()
        update.step()
    assert waits.seen == []


def test_what_runs_on_a_bare_gpu_machine_imports_with_torch_and_numpy_alone() -> None:
    """Everything that the project's own dependencies bring beside torch and numpy is made absent."""
    absent = "cv2 fsspec mlflow psutil pydantic ray rich safetensors scipy simplejpeg sklearn tenacity tyro webdataset"
    modules = (
        "sst.nn.steps sst.nn.network cluster.kmeans "
        "benchmarks.step benchmarks.augment benchmarks.extract benchmarks.kmeans"
    )
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({absent.split()!r}))\n"
        f"for name in {modules.split()!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_benchmarks_of_the_full_size_take_what_the_published_preset_takes() -> None:
    taken, published = sizes_of("full"), PRESETS["celeba"][1]
    one, two = published.stage1, published.stage2
    assert (taken.shape, taken.clusters) == (published.network.shape, published.cluster.clusters)
    assert (taken.pairs, taken.threshold, taken.batch) == (one.pairs, one.threshold, two.batch)
    assert (taken.stage1, taken.stage2) == (published.stage1_step(), published.stage2_step())


@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=9), first=st.integers(0, 8), size=st.integers(1, 4))
def test_padding_keeps_every_image_its_own_labels(counts, first, size) -> None:
    first = min(first, len(counts) - 1)
    ends, total = np.cumsum([0, *counts]), sum(counts)
    points = np.arange(2.0 * total, dtype=np.float32).reshape(-1, 2)
    labels = Labels(ends, points, np.zeros(total, np.int16), np.zeros(total, np.float32))
    size = min(size, len(counts) - first)
    padded = padded_points(labels, first, size)
    for row in range(size):
        own = padded[row][np.isfinite(padded[row, :, 0])]
        np.testing.assert_array_equal(own, labels.sample(first + row)[0])


def test_points_that_are_their_own_classes_are_compared_within_an_image_alone(monkeypatch) -> None:
    """Two random views of one image each: N positives, and all others of the image apart, whatever their clusters."""
    torch.manual_seed(0)
    model, seen = DetectorDescriptor(SETTINGS.network.shape), []

    def record(first, second, one, other, margin):
        seen.append((one.cluster_BN, other.cluster_BN))
        return descriptor_loss(first, second, one, other, margin)

    monkeypatch.setattr("sst.nn.steps.descriptor_loss", record)
    batch = random_batch(4, SETTINGS.network.input_size, SETTINGS.cluster.clusters)
    stage1_losses(model, batch, SETTINGS.stage1_step(own_classes=True), torch.Generator().manual_seed(0))
    one, other = seen[0]
    assert torch.equal(one, torch.arange(batch.points.shape[1]).expand(4, -1)) and torch.equal(one, other)


def test_mirrored_views_have_their_points_mirrored_and_their_clusters_exchanged(monkeypatch) -> None:
    size, seen = SETTINGS.network.input_size, []

    def keep(images, stored, to_view, points, view, augmentation, generator):
        seen.append((to_view, points))
        return torch.zeros(len(images), 3, view, view), points, torch.ones(points.shape[:2], dtype=torch.bool)

    monkeypatch.setattr("sst.nn.steps.augment", keep)
    batch = random_batch(3, size, 4)
    partner = torch.tensor([1, 0, 2, -1])
    step = replace(SETTINGS.stage1_step(), flip_share=1.0, different_share=0.0)
    stage1_losses(DetectorDescriptor(SETTINGS.network.shape), batch, step, torch.Generator().manual_seed(0), partner)
    to_view, points = seen[0]
    torch.testing.assert_close(points[:3, :, 0], size / 4 - batch.points[..., 0])
    corner = torch.tensor([7.0, 5.0, 1.0])
    assert (to_view[0] @ corner).tolist() == [size - 7.0, 5.0, 1.0]
