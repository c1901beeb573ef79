"""First keypoints from networks of others: tiny random ones, through the loading that real ones take."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from sst.config import FeatureSettings, KeypointSettings
from sst.data.corpus import Corpus
from sst.errors import UserError
from sst.train.extraction import first_keypoints
from sst.train.features import strongest
from sst.train.keypoints import VIEW, KeypointDetector, RootSift, generic_detector
from tests.small import write_toy

SIZE = 64
"""Of the network's view: a cell of its heatmap is 16 px of 256."""


def detector_of(kind: str, model: object, **features: object) -> KeypointDetector:
    settings = KeypointSettings(detector=kind, features=FeatureSettings(model=str(model), **features))
    return generic_detector(settings, SIZE)


def views(number: int) -> list[np.ndarray]:
    """Coloured squares at random places: SIFT finds points, and colours differ."""
    rng = np.random.default_rng(0)
    images = np.full((number, VIEW, VIEW, 3), 90, np.uint8)
    for image in images:
        for x, y in rng.integers(10, 220, (12, 2)):
            image[y : y + 20, x : x + 20] = rng.integers(0, 256, 3)
    return list(images)


def read_slowly(map_Dhw: np.ndarray, point: np.ndarray, side: int) -> np.ndarray:
    """A map that covers a view of that side, bilinearly at one point, by the definition; normalised."""
    height, width = map_Dhw.shape[1:]
    column = np.clip((point[0] + 0.5) * width / side - 0.5, 0, width - 1)
    row = np.clip((point[1] + 0.5) * height / side - 0.5, 0, height - 1)
    total = np.zeros(len(map_Dhw))
    for i in range(height):
        for j in range(width):
            total += max(0, 1 - abs(row - i)) * max(0, 1 - abs(column - j)) * map_Dhw[:, i, j]
    return total / np.linalg.norm(total)


class Pooled(nn.Module):
    """Mean colours of areas of 32 x 16 px, so that rows and columns cannot change places unseen."""

    def forward(self, images):
        return functional.avg_pool2d(images, (32, 16)) + 0.01


class Scored(nn.Module):
    """Scores for every second pixel, and mean colours."""

    def forward(self, images):
        return functional.avg_pool2d(images, 2)[:, 0], functional.avg_pool2d(images, 16) + 0.01


def exported(path, module: nn.Module, batch: int | None, side: int | None = VIEW) -> str:
    """Writes a program for a fixed number of images or any, of a fixed side or any."""
    shapes = {} if batch else {0: torch.export.Dim("batch", min=1, max=64)}
    if side is None:
        shapes |= {axis: torch.export.Dim(f"cells{axis}", min=2, max=64) * 32 for axis in (2, 3)}
    example = torch.zeros(batch or 2, 3, side or 256, side or 320)
    torch.export.save(torch.export.export(module.eval(), (example,), dynamic_shapes=(shapes or None,)), path)
    return str(path)


@pytest.mark.parametrize("batch", [None, 1, 2])
def test_features_of_a_program_are_read_at_the_points_of_sift(tmp_path, batch):
    detector = detector_of("export", exported(tmp_path / "pooled.pt2", Pooled(), batch))
    assert detector.descriptor_size == 3 and detector.sees_view
    images = views(3)
    found = detector(images)
    for image, (points, descriptors), (sift, _) in zip(images, found, RootSift(cell=16)(images), strict=True):
        assert len(points) > 5 and points.dtype == descriptors.dtype == np.float32
        np.testing.assert_array_equal(points, sift)
        colours = image.reshape(8, 32, 16, 16, 3).mean((1, 3)).transpose(2, 0, 1) / 255 + 0.01
        slow = [read_slowly(colours, point, VIEW) for point in points]
        np.testing.assert_allclose(descriptors, slow, atol=1e-5)
    assert detector([]) == []


def test_a_program_with_scores_chooses_its_points(tmp_path):
    detector = detector_of("export", exported(tmp_path / "scored.pt2", Scored(), None))
    image = np.zeros((VIEW, VIEW, 3), np.uint8)
    image[100:102, 40:42, 0] = 200  # the cell of scores (50, 20), with its centre at (40.5, 100.5)
    image[200:202, 150:152, 0] = 250
    image[200:202, 156:158, 0] = 240  # beside a higher one
    [(points, _)] = detector([image])
    np.testing.assert_allclose(points[:2], [[150.5, 200.5], [40.5, 100.5]])
    assert np.abs(points[2:] - [150.5, 200.5]).max(1).min() >= 8


def test_strongest_points_are_local_maxima_and_apart():
    scores = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    points = strongest(scores, 256, 12.0, 30)
    place = ((points + 0.5) / 4 - 0.5).round().astype(int)
    heights = scores.numpy()[place[:, 1], place[:, 0]]
    assert len(points) == 30 and (np.diff(heights) <= 0).all() and heights[0] == scores.max()
    for (x, y), height in zip(place, heights, strict=True):
        assert height == scores.numpy()[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].max()
    gap = np.abs(points[:, None] - points).max(-1) + 1000 * np.eye(30)
    assert gap.min() > 12


def test_a_view_with_context_needs_a_program_that_takes_it(tmp_path):
    write_toy(str(tmp_path / "shards"), train=3, test=0)
    corpus = Corpus.open(str(tmp_path / "shards"))
    fixed, free = (exported(tmp_path / f"{side}.pt2", Pooled(), None, side) for side in (VIEW, None))
    asked = [
        KeypointSettings(detector="export", features=FeatureSettings(model=path), remove_background=True)
        for path in (fixed, free)
    ]
    with pytest.raises(UserError, match=r"256\.pt2: .*with S = 512"):
        generic_detector(asked[0], SIZE)
    keypoints, inside = first_keypoints(
        corpus.url, corpus.train[0], generic_detector(asked[1], SIZE), SIZE, background=True
    )
    assert keypoints.descriptors.shape == (len(inside), 3) and 0 < inside.sum() < len(inside)


class Flat(nn.Module):
    def forward(self, images):
        return images.mean((2, 3))


@pytest.mark.parametrize(
    ("name", "module", "said"),
    [("none.pt2", None, "no such file"), ("text.pt2", b"text", "not a program"), ("flat.pt2", Flat(), "(2, 3)")],
)
def test_what_is_no_program_of_features_is_refused(tmp_path, name, module, said):
    if isinstance(module, bytes):
        (tmp_path / name).write_bytes(module)
    elif module is not None:
        exported(tmp_path / name, module, None)
    with pytest.raises(UserError) as error:
        detector_of("export", tmp_path / name)
    assert name in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "wanted"), [("transformers", "hub id"), ("export", "torch.export")])
def test_a_source_without_its_model_says_what_it_needs(kind, wanted):
    with pytest.raises(UserError, match=f"--features-model.*{wanted}"):
        generic_detector(KeypointSettings(detector=kind), SIZE)


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"extra `features`.*EXTRAS=features"):
        detector_of("transformers", "owner/model")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the extra `features` is not installed")


def dinov2(transformers, folder):
    """A tiny one with random weights; returns the model."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, patch_size=16, image_size=64
    )
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("said", [None, {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}])
def test_tokens_of_dinov2_are_read_at_the_points_of_sift(transformers, tmp_path, said):
    model = dinov2(transformers, tmp_path)
    if said:
        (tmp_path / "preprocessor_config.json").write_text(
            json.dumps({"image_processor_type": "BitImageProcessor", **said})
        )
    detector = detector_of("transformers", tmp_path, side=128)
    assert detector.descriptor_size == 8
    images = views(2)
    mean, deviation = said.values() if said else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    for image, (points, descriptors) in zip(images, detector(images), strict=True):
        assert len(points) > 5
        small = functional.interpolate(
            torch.from_numpy(image).permute(2, 0, 1)[None] / 255, (128, 128), mode="bilinear", antialias=True
        )[0].numpy()
        pixels = (small - np.reshape(mean, (3, 1, 1))) / np.reshape(deviation, (3, 1, 1))
        with torch.no_grad():
            tokens = model(torch.from_numpy(pixels)[None].float()).last_hidden_state[0].numpy()
        assert len(tokens) == 1 + 8 * 8  # the class token comes first
        patches = np.array([[tokens[1 + 8 * row + column] for column in range(8)] for row in range(8)])
        slow = [read_slowly(patches.transpose(2, 0, 1), point, VIEW) for point in points]
        np.testing.assert_allclose(descriptors, slow, atol=1e-4)


def test_channels_of_a_convolutional_model_are_a_map(transformers, tmp_path):
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(
        num_stages=2, hidden_sizes=[4, 6], depths=[1, 1], patch_size=4, out_features=["stage2"]
    )
    transformers.ConvNextModel(config).save_pretrained(tmp_path)
    [(points, descriptors)] = detector_of("transformers", tmp_path, side=64)(views(1))
    assert descriptors.shape == (len(points), 6) and len(points) > 5


def test_superpoint_of_transformers_finds_its_own_points(transformers, tmp_path):
    torch.manual_seed(0)
    config = transformers.SuperPointConfig(
        encoder_hidden_sizes=[4, 4, 6, 6], decoder_hidden_size=8, descriptor_decoder_dim=5, keypoint_threshold=0.012
    )
    model = transformers.SuperPointForKeypointDetection(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            nn.init.kaiming_normal_(parameter)
    model.save_pretrained(tmp_path)
    detector = detector_of("transformers", tmp_path)
    assert detector.descriptor_size == 5
    images = views(2)
    for image, (points, descriptors) in zip(images, detector(images), strict=True):
        grey = torch.from_numpy(image @ np.array([0.299, 0.587, 0.114]) / 255).float().expand(1, 3, -1, -1)
        with torch.no_grad():
            whole = model(grey)
        places, scores = whole.keypoints[0].numpy() * VIEW, whole.scores[0].numpy()
        taken: list[int] = []
        for number in np.argsort(-scores, kind="stable"):
            cell = np.round(places[number] / 16)
            if all(np.abs(cell - np.round(places[other] / 16)).max() > 1 for other in taken) and len(taken) < 60:
                taken.append(int(number))
        assert len(places) > len(taken) > 5
        # The grey levels' rounding decides between points of nearly equal score.
        same = [np.abs(places[number] - points).max(1).min() < 1e-3 for number in taken]
        assert np.mean(same) > 0.9
        assert descriptors.shape == (len(points), 5)
        np.testing.assert_allclose(np.linalg.norm(descriptors, axis=1), 1, atol=1e-5)
    [(points, descriptors)] = detector([np.full((VIEW, VIEW, 3), 90, np.uint8)])
    assert points.shape[1:] == (2,) and descriptors.shape[1:] == (5,) and len(points) == len(descriptors)


def test_models_that_give_no_map_are_refused(transformers, tmp_path):
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no features for each place"):
        detector_of("transformers", tmp_path)
    with pytest.raises(UserError, match="can't load this model of transformers"):
        detector_of("transformers", tmp_path / "none")


def test_a_model_without_some_weights_is_refused(transformers, tmp_path):
    from safetensors.torch import load_file, save_file

    dinov2(transformers, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in tensors if "layernorm" in name)  # of the other names the library changes some
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"weights are missing.*{lost}"):
        detector_of("transformers", tmp_path)
