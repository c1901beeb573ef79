"""SuperPoint against its definition: plain convolutions by name, loops over cells, pixels and pairs of squares."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from sst.errors import UserError
from sst.train.keypoints import KeypointDetector
from sst.train.superpoint import (
    SuperPoint,
    SuperPointNetwork,
    confidence_map,
    load_superpoint,
    magnification,
    suppress_points,
)

PUBLISHED_SHAPES = {
    "conv1a": (64, 1, 3, 3),
    "conv1b": (64, 64, 3, 3),
    "conv2a": (64, 64, 3, 3),
    "conv2b": (64, 64, 3, 3),
    "conv3a": (128, 64, 3, 3),
    "conv3b": (128, 128, 3, 3),
    "conv4a": (128, 128, 3, 3),
    "conv4b": (128, 128, 3, 3),
    "convPa": (256, 128, 3, 3),
    "convPb": (65, 256, 1, 1),
    "convDa": (256, 128, 3, 3),
    "convDb": (256, 256, 1, 1),
}


def random_weights(seed=0):
    """Weights, by the names of the published file, that are sure of a pixel here and there."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in PUBLISHED_SHAPES.items():
        fan_in = shape[1] * shape[2] * shape[3]
        gain = 3.0 if name == "convPb" else 1.0
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) * gain * (2 / fan_in) ** 0.5
        weights[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.05
    return weights


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.fixture(scope="module")
def network(weights):
    network = SuperPointNetwork()
    network.load_state_dict(weights)
    return network


def picture(height, width, seed=0):
    """Coloured noise with some smoothness, so that its three channels give three different grey images."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 3 + 2, width // 3 + 2, 3), dtype=np.uint8)
    return np.ascontiguousarray(cv2.resize(small, (width, height)))


# The oracles.


def slow_network(weights, image_HW):
    """Logits (65, h, w) and raw descriptors (256, h, w), layer by layer."""

    def layer(x, name, side):
        return functional.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=side // 2)

    def half(x):
        return functional.max_pool2d(x, kernel_size=2, stride=2)

    x = torch.as_tensor(image_HW, dtype=torch.float32)[None, None]
    x = half(layer(layer(x, "conv1a", 3).clamp(min=0), "conv1b", 3).clamp(min=0))
    x = half(layer(layer(x, "conv2a", 3).clamp(min=0), "conv2b", 3).clamp(min=0))
    x = half(layer(layer(x, "conv3a", 3).clamp(min=0), "conv3b", 3).clamp(min=0))
    x = layer(layer(x, "conv4a", 3).clamp(min=0), "conv4b", 3).clamp(min=0)
    logits = layer(layer(x, "convPa", 3).clamp(min=0), "convPb", 1)
    raw = layer(layer(x, "convDa", 3).clamp(min=0), "convDb", 1)
    return logits[0].detach().numpy(), raw[0].detach().numpy()


def slow_confidence(logits):
    """Cell by cell: softmax over 65, the last dropped, the other 64 laid out as 8 rows of 8."""
    _, rows, columns = logits.shape
    heat = np.zeros((rows * 8, columns * 8))
    for i in range(rows):
        for j in range(columns):
            power = np.exp(logits[:, i, j].astype(np.float64) - logits[:, i, j].max())
            share = power / power.sum()
            for pixel in range(64):
                heat[8 * i + pixel // 8, 8 * j + pixel % 8] = share[pixel]
    return heat


def iou(a, b, half):
    """Of two squares given by their centres."""
    left, right = max(a[0] - half, b[0] - half), min(a[0] + half, b[0] + half)
    top, bottom = max(a[1] - half, b[1] - half), min(a[1] + half, b[1] + half)
    common = max(0.0, right - left) * max(0.0, bottom - top)
    return common / (2 * (2 * half) ** 2 - common)


def slow_suppression(points, confidence, half):
    kept = []
    for number in sorted(range(len(points)), key=lambda n: (-confidence[n], n)):
        if all(iou(points[number], points[other], half) <= 0.01 for other in kept):
            kept.append(number)
    return kept


def slow_descriptor(raw, x, y):
    """Bilinear between the unit descriptors of the four cells around a pixel; beyond the outermost, theirs."""
    unit = raw.astype(np.float64) / np.linalg.norm(raw.astype(np.float64), axis=0)
    # The centre of a cell of pixels 8j to 8j + 7 is at 8j + 3.5.
    column = min(max((x - 3.5) / 8, 0.0), raw.shape[2] - 1.0)
    row = min(max((y - 3.5) / 8, 0.0), raw.shape[1] - 1.0)
    total = np.zeros(len(raw))
    for i in range(raw.shape[1]):
        for j in range(raw.shape[2]):
            total += max(0.0, 1 - abs(row - i)) * max(0.0, 1 - abs(column - j)) * unit[:, i, j]
    return total / np.linalg.norm(total)


def slow_superpoint(weights, view):
    """Points with descriptors, most confident first; how many each scale and the union have; the least confidence."""
    # Channels turned round and named so: the grey image must weigh red as red.
    grey = cv2.cvtColor(np.ascontiguousarray(view[..., ::-1]), cv2.COLOR_BGR2GRAY)
    height, width = grey.shape
    centre = (width - 1) / 2, (height - 1) / 2
    points, confidences, brought = [], [], []
    for scale in (1.0, 1.3, 1.6):
        copy = cv2.warpAffine(grey, cv2.getRotationMatrix2D(centre, 0, scale), (width, height))
        heat = slow_confidence(slow_network(weights, copy / 255.0)[0])
        found = [(x, y) for y in range(heat.shape[0]) for x in range(heat.shape[1]) if heat[y, x] > 0.1]
        sure = [heat[y, x] for x, y in found]
        kept = slow_suppression(found, sure, 6)
        points += [tuple(c + (p - c) / scale for p, c in zip(found[n], centre, strict=True)) for n in kept]
        confidences += [sure[n] for n in kept]
        brought.append(len(kept))
    raw = slow_network(weights, grey / 255.0)[1]
    kept = slow_suppression(points, confidences, 6)
    descriptors = [slow_descriptor(raw, *points[n]) for n in kept]
    return np.array([points[n] for n in kept]), np.array(descriptors), [*brought, len(kept)], confidences[kept[-1]]


# The network and its decoding.


def test_names_and_shapes_are_the_published_ones():
    expected = {f"{name}.weight": shape for name, shape in PUBLISHED_SHAPES.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in PUBLISHED_SHAPES.items()}
    assert {name: tuple(tensor.shape) for name, tensor in SuperPointNetwork().state_dict().items()} == expected


@pytest.mark.parametrize("size", [(64, 80), (61, 83), (8, 15)])
def test_network_equals_plain_convolutions(network, weights, size):
    image = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits, descriptors = (x[0].numpy() for x in network(image))
    slow_logits, raw = slow_network(weights, image[0, 0].numpy())
    assert logits.shape == (65, size[0] // 8, size[1] // 8)
    np.testing.assert_allclose(logits, slow_logits, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(descriptors, raw / np.linalg.norm(raw, axis=0), atol=1e-5)


def test_network_sees_every_image_of_a_batch_alone(network):
    images = torch.rand(3, 1, 40, 32, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        together = network(images)
        alone = [network(image[None]) for image in images]
    for number, pair in enumerate(alone):
        for batch, single in zip(together, pair, strict=True):
            torch.testing.assert_close(batch[number], single[0], rtol=1e-4, atol=1e-3)


@given(st.integers(0, 2**32 - 1))
def test_confidences_are_laid_out_cell_by_cell(seed):
    logits = torch.randn(2, 65, 3, 2, generator=torch.Generator().manual_seed(seed)) * 4
    heat = confidence_map(logits).numpy()
    for image in range(2):
        np.testing.assert_allclose(heat[image], slow_confidence(logits[image].numpy()), atol=1e-6)


# Suppression.

places = st.tuples(st.integers(0, 240), st.integers(0, 240))


@given(st.lists(st.tuples(places, st.integers(1, 6)), max_size=60), st.sampled_from([1.0, 3.0, 6.0]))
def test_suppression_equals_greedy_on_squares(found, half):
    # Quarters of pixels, as mapped-back points have fractions; few confidences, so that there are ties.
    points = np.array([place for place, _ in found], np.float32).reshape(-1, 2) / 4
    confidence = np.array([level for _, level in found], np.float32) / 8
    kept = suppress_points(points, confidence, half)
    assert kept.dtype == np.int64
    assert kept.tolist() == slow_suppression(points.tolist(), confidence.tolist(), half)
    assert suppress_points(points[kept], confidence[kept], half).tolist() == list(range(len(kept)))


@pytest.mark.parametrize(("gap", "stay"), [((11, 10), 2), ((11, 9), 1), ((12, 0), 2), ((11, 0), 1), ((0, 11), 1)])
def test_published_squares_are_twelve_pixels_wide(gap, stay):
    assert len(suppress_points(np.array([(20, 20), (20 + gap[0], 20 + gap[1])]), np.array([0.5, 0.9]), 6)) == stay


# Magnified copies.


class Blobs(nn.Module):
    """Stands in for the network: the whiter a pixel, the surer; sees nothing in the first image that it is shown."""

    def __init__(self):
        super().__init__()
        self.here = nn.Parameter(torch.zeros(()))
        self.seen = 0

    def forward(self, grey):
        self.seen += 1
        white = functional.pixel_unshuffle(grey[:, :, : grey.shape[2] // 8 * 8, : grey.shape[3] // 8 * 8], 8)
        # "None of them" is so likely that the pixels of a cell hardly take anything from each other.
        pixels = 20 * white.clamp_min(1e-3).log() if self.seen > 1 else torch.full_like(white, -100)
        return torch.cat([pixels, torch.full_like(white[:, :1], 7)], 1), torch.ones(1, 256, *white.shape[2:]) / 16


@hypothesis_settings(max_examples=30)
@given(st.integers(40, 90), st.integers(40, 90), st.sampled_from([1.3, 1.6]), st.floats(0.2, 0.8), st.data())
def test_a_point_of_a_magnified_copy_is_mapped_back_to_where_it_was(height, width, scale, across, data):
    # A pixel of the copy, and where it was: drawn there, its blob is centred on exactly that pixel of the copy.
    column = int(across * (width // 8 * 8))
    row = data.draw(st.integers(8, height // 8 * 8 - 8))
    x, y = (width - 1) / 2 + (column - (width - 1) / 2) / scale, (height - 1) / 2 + (row - (height - 1) / 2) / scale
    from_x, from_y = np.arange(width) - x, np.arange(height)[:, None] - y
    blob = 255 * np.exp(-(from_x**2 + from_y**2) / 8)
    view = np.repeat(np.round(blob).astype(np.uint8)[..., None], 3, axis=2)
    [(points, descriptors)] = SuperPoint(Blobs(), threshold=1e-5, scales=(1.0, scale))([view])
    np.testing.assert_allclose(points, [[x, y]], atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(descriptors, axis=1), 1, atol=1e-6)


def test_magnification_keeps_the_centre_and_moves_all_else_away_from_it():
    matrix = magnification(1.6, 5, 9)
    np.testing.assert_allclose(matrix @ [4, 2, 1], [4, 2, 1])
    np.testing.assert_allclose(matrix @ [5, 0, 1], [5.6, -1.2, 1])


@pytest.mark.parametrize("scales", [(), (1.3, 1.0), (1.0, 0.5)])
def test_scales_begin_with_that_of_the_descriptors(scales, network):
    with pytest.raises(ValueError, match="begin with 1"):
        SuperPoint(network, scales=scales)


# All of it.


@pytest.mark.parametrize("size", [(64, 80), (83, 61), (72, 47)])
def test_detector_equals_the_slow_one(network, weights, size):
    detector: KeypointDetector = SuperPoint(network)
    view = picture(*size)
    [(points, descriptors)] = detector([view])
    slow_points, slow_descriptors, brought, least = slow_superpoint(weights, view)
    # Every scale has points, and the union has neighbours to suppress: otherwise this would show little.
    assert min(brought[:3]) > 2 and 3 < brought[3] < sum(brought[:3]) and least < 0.15
    assert points.dtype == descriptors.dtype == np.float32
    np.testing.assert_allclose(points, slow_points, atol=1e-3)
    np.testing.assert_allclose(descriptors, slow_descriptors, atol=1e-4)
    assert descriptors.shape == (len(points), detector.descriptor_size)
    assert (points >= 0).all() and (points <= np.array(size)[::-1] - 1).all()


def test_smallest_image(network):
    [(points, descriptors)] = SuperPoint(network, threshold=0.0)([picture(8, 8)])
    assert len(points) >= 1 and descriptors.shape == (len(points), 256)
    np.testing.assert_allclose(np.linalg.norm(descriptors, axis=1), 1, atol=1e-5)


def test_no_point_is_an_empty_answer(network):
    [(points, descriptors)] = SuperPoint(network, threshold=1.0)([picture(32, 24)])
    assert points.shape == (0, 2) and descriptors.shape == (0, 256)
    assert points.dtype == descriptors.dtype == np.float32


@pytest.mark.parametrize("bias", [0.0, float("nan")])
def test_points_without_a_usable_descriptor_are_dropped(weights, bias):
    network = SuperPointNetwork()
    network.load_state_dict(
        weights | {"convDb.weight": torch.zeros(256, 256, 1, 1), "convDb.bias": torch.full((256,), bias)}
    )
    [(points, descriptors)] = SuperPoint(network)([picture(64, 80)])
    assert points.shape == (0, 2) and descriptors.shape == (0, 256)


# Files.


def save_old(tensors, path):
    """As torch wrote in 2018, when the published file was made."""
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("w.pth", torch.save),
        ("old.pth", save_old),
        ("wrapped.pth", lambda tensors, path: torch.save({"state_dict": tensors, "epoch": 3}, path)),
        ("w.safetensors", save_file),
    ],
)
def test_weights_of_every_kind_of_file(weights, tmp_path, name, save):
    save(weights, tmp_path / name)
    loaded = load_superpoint(str(tmp_path / name)).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_loaded_weights_find_the_same(weights, network, tmp_path):
    torch.save(weights, tmp_path / "w.pth")
    ours, theirs = (SuperPoint(n)([picture(64, 80)])[0] for n in (load_superpoint(str(tmp_path / "w.pth")), network))
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-3)
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-4)


def refused(path):
    """The message; whatever is wrong, it says where the file is had, its licence, and what is free."""
    with pytest.raises(UserError) as error:
        load_superpoint(path)
    message = str(error.value)
    for fact in ("magicleap/SuperPointPretrainedNetwork", "superpoint_v1.pth", "non-commercial", "RootSIFT", "free"):
        assert fact in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("nothing", [None, ""])
def test_no_file_given(nothing):
    assert "--superpoint-weights" in refused(nothing)


def test_unreadable_places(tmp_path):
    assert "nowhere.pth: " in (message := refused(str(tmp_path / "nowhere.pth"))) and "no such file" in message
    assert str(tmp_path) in refused(str(tmp_path))
    assert "nosuchkind://x" in refused("nosuchkind://x")


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", bytes(range(256))])
def test_not_weights(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert f"{name}: not a file of weights" in refused(str(tmp_path / name))


@pytest.mark.parametrize("content", [torch.zeros(3), {"epoch": 3}, {"state_dict": [1]}])
def test_not_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    assert "x.pth: holds no dictionary of tensors" in refused(str(tmp_path / "x.pth"))


def test_files_that_run_code_are_refused(tmp_path):
    torch.save(SuperPointNetwork(), tmp_path / "whole.pth")
    assert "whole.pth: not a file of weights" in refused(str(tmp_path / "whole.pth"))


def test_other_names_and_shapes_are_named(weights, tmp_path):
    other = weights | {"convPb.weight": torch.zeros(33, 256, 1, 1), "bnPa.bias": torch.zeros(2)}
    del other["conv1a.weight"]
    torch.save(other, tmp_path / "x.pth")
    message = refused(str(tmp_path / "x.pth"))
    assert "missing: conv1a.weight;" in message
    assert "unknown: bnPa.bias;" in message
    assert "convPb.weight (33, 256, 1, 1) in place of (65, 256, 1, 1)" in message


def test_of_many_wrong_names_a_few_are_named(tmp_path):
    torch.save({}, tmp_path / "x.pth")
    assert "missing: conv1a.weight, conv1a.bias, conv1b.weight, conv1b.bias, ...)" in refused(str(tmp_path / "x.pth"))
