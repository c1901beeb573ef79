"""Published checkpoints: our networks against the published one spelt out, and files that must be refused."""

import collections
import math
import os
import pickle
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

import sst
from jobs import import_checkpoint
from sst.errors import UserError
from sst.nn.network import DetectorDescriptor, LandmarkDetector
from sst.predict.published import load_stage1, read_published
from sst.train.model import load_model
from tests.published_network import published_network, published_shapes, random_weights

LANDMARKS = 12
ACTIVE = [1, 4, 5, 11]
CENTROIDS = np.random.default_rng(0).normal(size=(7, 256)).astype(np.float32)


def count(shapes):
    return sum(map(math.prod, shapes))


def optimizer_state():
    """As torch writes it, once with the numbers of today, once with the memory addresses of torch before 1.5."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.RMSprop([parameter], lr=5e-4, weight_decay=1e-5)
    parameter.grad = torch.ones(3)
    optimizer.step()
    state = optimizer.state_dict()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1).state_dict()
    return state | {"state": state["state"] | {140_234_567_890_123: {"step": 7}}}, schedule


def state_dict(weights):
    """As `Module.state_dict` returns it: ordered, with a hidden attribute."""
    state = collections.OrderedDict(weights)
    state._metadata = collections.OrderedDict({"": {"version": 1}})
    return state


def checkpoint(weights, stage, **changes):
    """What the published code saves; a change to `...` leaves an entry out."""
    optimizer, schedule = optimizer_state()
    content = {"state_dict": state_dict(weights), "optimizer": optimizer, "iteration": 80_000}
    content |= {"centroid": CENTROIDS} if stage == 1 else {"active_channels": np.array(ACTIVE), "schedualer": schedule}
    return {name: value for name, value in (content | changes).items() if value is not ...}


@pytest.fixture(scope="module")
def weights():
    """Of both stages."""
    return {1: random_weights(256, seed=1), 2: random_weights(LANDMARKS, seed=2)}


@pytest.fixture
def saved(weights, tmp_path):
    """Writes a checkpoint of a stage with changes and returns its path."""

    def write(stage, state=None, zipped=True, **changes):
        path = tmp_path / f"stage{stage}.pth"
        content = checkpoint(weights[stage] if state is None else state, stage, **changes)
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        return path

    return write


def replace_in_pickle(path, old, new):
    """Changes the pickle inside a zipped checkpoint."""
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in entries.items():
            if name.endswith("/data.pkl"):
                assert old in data
                data = data.replace(old, new)
            file.writestr(name, data)


def refusal(path):
    with pytest.raises(UserError) as error:
        read_published(path)
    assert str(path) in str(error.value)
    return str(error.value)


def job(capsys, *arguments, code=0):
    """Standard output, or standard error where the exit code is not 0."""
    if code == 0:
        import_checkpoint.main([str(argument) for argument in arguments])
        return capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        import_checkpoint.main([str(argument) for argument in arguments])
    assert stop.value.code == code
    return capsys.readouterr().err


def image(side, batch=1):
    return torch.rand((batch, 3, side, side), generator=torch.Generator().manual_seed(3))


def same(ours, published):
    assert ours.shape == published.shape
    assert published.std() > 1e-2  # or agreement says nothing
    assert (ours - published).abs().max() <= 1e-4


# The network.


def test_stage_1_equals_the_published_network_at_full_size(saved, weights):
    model = sst.import_published(saved(1))
    assert isinstance(model, DetectorDescriptor) and not model.training
    with torch.no_grad():
        detector, descriptors = model(image(256, 2))
    assert detector.shape == (2, 1, 64, 64) and descriptors.shape == (2, 256, 64, 64)
    expected = published_network(weights[1], image(256, 2))
    same(detector, expected[0])
    same(descriptors, expected[1])


def test_stage_2_equals_the_published_network_at_full_size(saved, weights):
    model = sst.import_published(str(saved(2)))
    assert isinstance(model, LandmarkDetector) and not model.training
    with torch.no_grad():
        heat = model(image(256, 2))
    assert heat.shape == (2, LANDMARKS, 64, 64)
    same(heat, published_network(weights[2], image(256, 2))[1])


def test_parameter_for_parameter(saved):
    used = {name: shape for name, shape in published_shapes(256).items() if not name.startswith("m0.b4_")}
    ours = [tuple(p.shape) for p in sst.import_published(saved(1)).parameters()]
    assert sorted(ours) == sorted(used.values())
    assert count(ours) == 6_770_945
    assert count(published_shapes(256).values()) == 8_396_545  # with the unused blocks: the 8.4 million

    landmark = {
        name: shape
        for name, shape in published_shapes(LANDMARKS).items()
        if not name.startswith(("m0.b4_", "top_m_0.", "conv_last0.", "bn_end0.", "l0."))
    }
    ours = [tuple(p.shape) for p in sst.import_published(saved(2)).parameters()]
    assert sorted(ours) == sorted(landmark.values())


def test_unused_blocks_are_named_and_may_be_absent(saved, weights):
    b4 = [name for name in weights[1] if name.startswith("m0.b4_")]
    assert len(b4) == 36
    with_them = read_published(saved(1))
    assert sorted(with_them.unused) == sorted(b4)
    without = read_published(saved(1, {name: value for name, value in weights[1].items() if name not in b4}))
    assert without.unused == []
    for one, other in zip(with_them.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(one, other)


# Files as they come.


def same_weights(path, stage, weights):
    """Every used weight of the file is in the model: sums tell as much, as no two weights are alike."""
    used = [v for k, v in weights[stage].items() if not k.startswith("m0.b4_")]
    model = read_published(path).model
    assert sorted(float(p.sum()) for p in model.state_dict().values()) == sorted(float(v.sum()) for v in used)


def test_format_of_torch_before_1_6(saved, weights):
    path = saved(1, zipped=False)
    assert not zipfile.is_zipfile(path)
    same_weights(path, 1, weights)
    assert np.array_equal(read_published(path).centroids_KD, CENTROIDS)


def test_saved_from_a_gpu(saved, weights):
    path = saved(1)
    replace_in_pickle(path, b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    same_weights(path, 1, weights)


NUMPY_1 = (
    b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x00cnumpy\nndarray\nq\x01K\x00\x85q\x02c_codecs\nencode\n"
    b"q\x03X\x01\x00\x00\x00bq\x04X\x06\x00\x00\x00latin1q\x05\x86q\x06Rq\x07\x87q\x08Rq\t(K\x01K\x02\x85q\n"
    b"cnumpy\ndtype\nq\x0bX\x02\x00\x00\x00i8q\x0c\x89\x88\x87q\rRq\x0e(K\x03X\x01\x00\x00\x00<q\x0fNNN"
    b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x10b\x89h\x03X\x10\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00"
    b"\x05\x00\x00\x00\x00\x00\x00\x00q\x11h\x05\x86q\x12Rq\x13tq\x14b."
)
"""pickle.dumps(np.array([3, 5]), protocol=2) of numpy 1.26.4."""


def test_numpy_1_and_2_differ_only_in_a_name():
    assert pickle.dumps(np.array([3, 5]), protocol=2).replace(b"numpy._core.", b"numpy.core.") == NUMPY_1


@pytest.mark.parametrize("core", [b"numpy.core.", b"numpy._core."])
def test_arrays_written_by_numpy_1_and_2(saved, core):
    path = saved(2, iteration=np.int64(12))
    replace_in_pickle(path, b"numpy._core.multiarray\n_reconstruct", core + b"multiarray\n_reconstruct")
    replace_in_pickle(path, b"numpy._core.multiarray\nscalar", core + b"multiarray\nscalar")
    found = read_published(path)
    assert (found.active, found.iteration) == (ACTIVE, 12)


@pytest.mark.parametrize(
    "array",
    [
        CENTROIDS,
        CENTROIDS.astype(np.float64),
        CENTROIDS.astype(">f4"),
        np.asfortranarray(CENTROIDS),
        CENTROIDS[::2],
        torch.from_numpy(CENTROIDS),
    ],
)
def test_any_layout_of_an_array(saved, array):
    centroids_KD = read_published(saved(1, centroid=array)).centroids_KD
    assert centroids_KD.dtype == np.float32 and centroids_KD.dtype.isnative
    assert np.array_equal(centroids_KD, np.asarray(array))


@pytest.mark.parametrize("active", [ACTIVE, torch.tensor(ACTIVE), np.array(ACTIVE, np.int32), np.array(ACTIVE, ">i8")])
def test_any_way_to_write_the_active_channels(saved, active):
    assert read_published(saved(2, active_channels=active)).active == ACTIVE


# Files that are refused.


class Run:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Bare:
    """A class of someone's own."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["centroid", "optimizer", "state_dict"])
def test_code_in_the_file_is_not_run(saved, tmp_path, capsys, zipped, place):
    trace = tmp_path / "trace"
    path = saved(1, zipped=zipped, **{place: {"x": Run(os.system, f"touch {trace}")}})
    text = job(capsys, path, "--out", tmp_path / "out", code=2)
    assert "posix.system" in text and "nothing in it was executed" in text
    assert not trace.exists() and not (tmp_path / "out").exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the file would have done it


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (Run(eval, "1"), "eval"),
        (Run(np.fromfile, "x"), "numpy.fromfile"),
        (Run(np.lib.format.open_memmap, "x"), "open_memmap"),
        (collections.defaultdict(int), "defaultdict"),
        (np.random.default_rng(0), "numpy.random"),
        (np.ma.masked_array([1.0]), "numpy.ma"),
    ],
)
def test_anything_but_arrays_is_refused_by_name(saved, thing, name):
    text = refusal(saved(1, optimizer=thing))
    assert re.search(rf"refers to '\S*{name}", text), text


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (np.array([{}, 1], object), "O8"),
        (np.array(["a"]), "U1"),
        (np.zeros(1, [("a", "f4")]), "V4"),
        (np.zeros(1, "M8[s]"), "M8"),
    ],
)
def test_arrays_of_anything_but_numbers_are_refused(saved, array, code):
    assert f"a numpy array of '{code}', not of plain numbers" in refusal(saved(1, optimizer=array))


def test_an_array_that_is_never_filled(saved):
    empty = Run(np.zeros(1).__reduce__()[0], np.ndarray, (0,), b"b")
    assert "active_channels is not a list" in refusal(saved(2, active_channels=empty))


@pytest.mark.parametrize("stage", [1, 2])
def test_every_difference_is_named(saved, weights, stage):
    state = dict(weights[stage])
    state["m0.b2_plus_2.conv1.weight"] = state.pop("m0.b2_plus_1.conv1.weight")
    state["l0.scale"] = torch.ones(1)
    state["bn_end1.bias"] = torch.zeros(255)
    del state["top_m_0.bn3.bias"]
    text = refusal(saved(stage, state))
    assert f"stage {stage}" in text
    assert "missing: m0.b2_plus_1.conv1.weight, top_m_0.bn3.bias;" in text
    assert "unexpected: m0.b2_plus_2.conv1.weight, l0.scale;" in text
    assert "wrong shape: bn_end1.bias (255,) in place of (256,)" in text


def test_without_the_last_convolution(saved, weights):
    state = {name: value for name, value in weights[2].items() if not name.startswith("l1.")}
    assert "missing: l1.weight, l1.bias" in refusal(saved(2, state))
    text = refusal(saved(2, state | {"l1.bias": weights[2]["l1.bias"]}))
    assert "missing: l1.weight" in text and "wrong" not in text


def test_landmark_weights_in_a_file_of_stage_1(saved, weights):
    text = refusal(saved(1, weights[2]))
    assert f"l1.weight ({LANDMARKS}, 256, 1, 1) in place of (256, 256, 1, 1)" in text


def test_names_of_a_wrapped_network(saved, weights):
    text = refusal(saved(1, {f"module.{name}": value for name, value in weights[1].items()}))
    assert "missing: conv1.weight" in text and "unexpected: module.conv1.weight" in text


@pytest.mark.parametrize("value", [3, torch.zeros(64, dtype=torch.int64), torch.zeros(64, device="meta")])
def test_weights_that_are_no_numbers(saved, weights, value):
    assert "no plain tensors of real numbers: bn1.bias" in refusal(saved(1, weights[1] | {"bn1.bias": value}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"state_dict": ...}, "it has no state_dict, only: optimizer, iteration, centroid"),
        ({"state_dict": [1]}, "it has no state_dict"),
        ({"centroid": ...}, "cannot tell the stage"),
        ({"active_channels": np.array(ACTIVE)}, "cannot tell the stage"),
        ({"centroid": CENTROIDS[:, :9]}, r"\(K, 256\) .* float32 of shape \(7, 9\)"),
        ({"centroid": CENTROIDS.astype(np.int64)}, "real numbers but int64"),
        ({"centroid": "text"}, "centroid is not an array"),
    ],
)
def test_a_dictionary_that_is_not_stage_1(saved, changes, told):
    text = refusal(saved(1, **changes))
    assert re.search(told, text), text


@pytest.mark.parametrize(
    ("active", "told"),
    [
        (np.array([1, 12]), "from 0 to 11"),
        (np.array([-1, 2]), "from 0 to 11"),
        (np.array([2, 2]), "different numbers"),
        (np.array([1.0]), "float64"),
        (np.ones(LANDMARKS, bool), "bool"),
        ([], "not a list of channel numbers"),
        ([True], "not a list of channel numbers"),
        (None, "not a list of channel numbers"),
    ],
)
def test_active_channels_that_are_none(saved, active, told):
    assert told in refusal(saved(2, active_channels=active))


def test_files_that_are_no_checkpoint(saved, tmp_path, capsys):
    out = tmp_path / "out"
    assert "no such file" in job(capsys, tmp_path / "none.pth", "--out", out, code=2)
    assert "cannot read" in job(capsys, tmp_path, "--out", out, code=2)
    (tmp_path / "text.pth").write_text("hello")
    assert "not a checkpoint that can be read" in job(capsys, tmp_path / "text.pth", "--out", out, code=2)
    (tmp_path / "empty.pth").write_bytes(b"")
    assert "not a checkpoint that can be read" in job(capsys, tmp_path / "empty.pth", "--out", out, code=2)
    whole = saved(1).read_bytes()
    (tmp_path / "short.pth").write_bytes(whole[: len(whole) // 2])
    assert "fetch it again" in job(capsys, tmp_path / "short.pth", "--out", out, code=2)
    with zipfile.ZipFile(tmp_path / "download.zip", "w") as file:
        file.writestr("CelebA/x.pth", b"")
    assert "unpacked" in job(capsys, tmp_path / "download.zip", "--out", out, code=2)
    torch.save({"x": Bare()}, tmp_path / "odd.pth")
    text = job(capsys, tmp_path / "odd.pth", "--out", out, code=2)
    assert "weights_only" not in text and "safe_globals" not in text  # torch's advice to lift the restriction
    torch.save([1], tmp_path / "list.pth")
    assert "no state_dict, only: list" in job(capsys, tmp_path / "list.pth", "--out", out, code=2)
    assert not out.exists()


def test_torch_is_left_as_it_was(saved):
    before = set(torch.serialization.get_safe_globals())
    read_published(saved(1))
    refusal(saved(1, optimizer=Run(eval, "1")))
    assert set(torch.serialization.get_safe_globals()) == before


# The job.


def test_job_with_stage_1(saved, weights, tmp_path, capsys):
    out = tmp_path / "model"
    text = job(capsys, saved(1), "--out", out)
    assert "stage 1, iteration 80000, 6770945 parameters" in text and "7 centroids" in text
    assert "m0.b4_4.downsample" not in text and "m0.b4_1.bn1.weight" in text and "m0.b4_4.conv3.weight" in text
    assert "left out: optimizer\n" in text and str(out) in text
    model, centroids_KD, record = load_stage1(str(out))
    assert (record.iteration, record.centroids) == (80_000, 7)
    assert np.array_equal(centroids_KD, CENTROIDS)
    with torch.no_grad():
        detector, descriptors = model(image(64))
    expected = published_network(weights[1], image(64))
    same(detector, expected[0])
    same(descriptors, expected[1])
    with pytest.raises(ValueError, match="not the record of a landmark model"):
        load_model(str(out))


def test_job_with_stage_1_before_clustering(saved, tmp_path, capsys):
    text = job(capsys, saved(1, centroid=None, iteration=...), "--out", tmp_path / "model")
    assert "no centroids" in text and "iteration unknown" in text
    _, centroids_KD, record = load_stage1(str(tmp_path / "model"))
    assert centroids_KD is None and record.iteration is None


def test_job_with_stage_2(saved, weights, tmp_path, capsys):
    out = tmp_path / "model"
    text = job(capsys, saved(2, epoch=3), "--out", out)
    assert "stage 2, iteration 80000" in text and "12 channels, 4 of them active: [1, 4, 5, 11]" in text
    assert "left out: optimizer, schedualer, epoch, top_m_0, conv_last0, bn_end0, l0\n" in text
    model, record = load_model(str(out))
    assert record.clusters == ACTIVE and record.visible == 0.2 and record.network.input_size == 256
    with torch.no_grad():
        same(model(image(64)), published_network(weights[2], image(64))[1][:, ACTIVE])
    with pytest.raises(ValueError, match="not the record of a network of stage 1"):
        load_stage1(str(out))


def test_a_model_is_replaced_only_when_told_and_only_by_a_good_one(saved, tmp_path, capsys):
    out = tmp_path / "model"
    job(capsys, saved(1), "--out", out)
    assert "--overwrite" in job(capsys, saved(2), "--out", out, code=2)
    (tmp_path / "text.pth").write_text("hello")
    job(capsys, tmp_path / "text.pth", "--out", out, "--overwrite", code=2)
    assert load_stage1(str(out))[2].centroids == 7
    job(capsys, saved(2), "--out", out, "--overwrite")
    assert load_model(str(out))[1].clusters == ACTIVE
    assert sorted(path.name for path in out.iterdir()) == ["model.json", "model.safetensors"]


def test_job_with_a_file_as_place(saved, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert "must be a directory" in job(capsys, saved(1), "--out", tmp_path / "taken", code=2)


def test_damage_to_an_imported_stage_1_is_found(saved, tmp_path, capsys):
    out = tmp_path / "model"
    with pytest.raises(ValueError, match="landmarks import-checkpoint"):
        load_stage1(str(out))
    job(capsys, saved(1), "--out", out)
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="does not match the hash"):
        load_stage1(str(out))
    (out / "model.json").write_text("{}")
    with pytest.raises(ValueError, match="not the record"):
        load_stage1(str(out))


def test_help():
    command = [sys.executable, "-m", "jobs.import_checkpoint", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0 and "jobs.import_checkpoint" in shown.stdout
