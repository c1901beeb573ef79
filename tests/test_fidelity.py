"""Presets hold the published constants, and the full-size network trains with them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.shards import Descriptors, Labels
from jobs import train
from sst.data.corpus import Corpus
from sst.nn.geometry import box_to_view
from sst.nn.network import DetectorDescriptor, LandmarkDetector
from sst.nn.steps import Batch, stage1_losses, stage2_losses
from sst.nn.suppression import decode_landmarks
from sst.presets import PRESETS
from sst.train.extraction import extract_descriptors
from tests.small import SETTINGS, local_tools, train_locally, write_scenes

PUBLISHED = {
    "network": {"input_size": 256, "width": 256, "depth": 4, "groups": 32, "descriptor_size": 256},
    "keypoints": {
        "superpoint": {"threshold": 0.1, "scales": [1.0, 1.3, 1.6], "nms_radius": 6},
        "outlier_share": 0.4,
        "outlier_neighbours": 100,
        "outlier_reference": 500_000,
        "remove_background": False,
        "inside_clusters": 100,
        "outside_clusters": 250,
    },
    "cluster": {"clusters": 100, "iterations": 100, "sample": 500_000},
    "stage1": {
        "warmup_iterations": 20_000,
        "rounds": 29,
        "round_iterations": 10_000,
        "pairs": 16,
        "learning_rate": 0.0005,
        "floor_learning_rate": 0.000005,
        "cosine_steps": 5,
        "weight_decay": 0.00001,
        "min_labels": 9,
        "different_share": 0.5,
        "margin": 0.8,
        "descriptor_weight": 10,
        "detector_weight": 1,
        "detector_target": "cell",
        "detector_objective": "squared",
        "contrast": "margin",
        "warmup_classes": "clusters",
        "unite": True,
        "optimizer": "rmsprop",
        "threshold": 0.2,
        "augmentation": {
            "blur_probability": 0.3,
            "blur_sigma": 0.5,
            "contrast": [0.85, 1.3],
            "noise_probability": 0.5,
            "noise": 0.05,
            "noise_per_channel": 0.5,
            "about": "image",
            "brightness": [0.9, 1.1],
            "brightness_per_channel": 0.2,
            "colour_probability": 0.3,
            "colour": [0.5, 1.5],
            "scale": [0.8, 1.2],
            "shift": 0.05,
            "rotation": 40,
        },
    },
    "stage2": {
        "iterations": 80_000,
        "objective": "squared",
        "optimizer": "rmsprop",
        "batch": 64,
        "learning_rate": 0.0005,
        "milestones": [50_000, 65_000],
        "weight_decay": 0.00001,
        "min_population": 500,
        "merge_after": 25_000,
        "merge_every_epochs": 2,
        "merge_every": None,
        "merge_share": 0.7,
        "merge_radius": 5.7,
        "merge_confidence": 0.2,
        "visible": 0.2,
        "augmentation": {
            "blur_probability": 0.5,
            "blur_sigma": 0.5,
            "contrast": [0.75, 1.5],
            "noise_probability": 1,
            "noise": 0.05,
            "noise_per_channel": 0.5,
            "about": "image",
            "brightness": [0.8, 1.2],
            "brightness_per_channel": 0.2,
            "colour_probability": 0.5,
            "colour": [0.5, 1.5],
            "scale": [0.7, 1.3],
            "shift": 0.05,
            "rotation": 40,
        },
    },
}
"""Values of Mallis et al. 2020 and their published configuration, by stage, for faces; typed from there."""

DIFFERENT = {
    "celeba": {},
    "ls3d": {},
    "human36m": {("keypoints", "remove_background"): True, ("cluster", "clusters"): 250},
}
"""What the published experiments change for a corpus."""

NOT_PUBLISHED = {
    "seed",
    "resources",
    "keypoints.detector",
    "keypoints.superpoint.weights",
    "keypoints.features.model",
    "keypoints.features.side",
    "keypoints.patch",
    "keypoints.max_num_keypoints",
    "cluster.backend",
    "cluster.keep_identities",
    "stage1.temperature",
    "stage2.refine_iterations",
    "stage2.refine_confidence",
    "stage2.refine_radius",
}
"""Settings that have no counterpart in the paper: what the free default detector takes, how a run is run, and parts of
additions that are off."""

NEUTRAL = {
    "stage1.flip_share": 0,
    "stage2.flip_share": 0,
    "stage2.occlude_share": 0,
    "stage2.refine_rounds": 0,
    "stage2.max_landmarks": None,
    "cluster.actors": 1,
}
"""Additions of ours, with the value at which they change nothing."""


def flat(tree: dict, prefix: str = "") -> dict:
    """Nested settings as {"stage1.pairs": 16, ...}."""
    result = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result


def printed(preset: str, capsys) -> dict:
    train.main([preset, "--print-config"])
    return flat(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("preset", DIFFERENT)
def test_presets_hold_the_published_constants(preset, capsys):
    config = printed(preset, capsys)
    table = flat(PUBLISHED) | {".".join(name): value for name, value in DIFFERENT[preset].items()}
    wrong = {name: (config.get(name), value) for name, value in table.items() if config.get(name, "") != value}
    assert not wrong
    assert {name: config[name] for name in config.keys() & NEUTRAL} == {
        name: value for name, value in NEUTRAL.items() if name in config
    }
    unnamed = set(config.keys() - table.keys() - NEUTRAL.keys())
    assert {name for name in unnamed if name not in NOT_PUBLISHED and name.split(".")[0] not in NOT_PUBLISHED} == set()


@pytest.mark.parametrize("preset", PRESETS)
def test_print_config_gives_settings_that_load_again(preset, capsys):
    train.main([preset, "--print-config"])
    settings = PRESETS[preset][1]
    assert type(settings).model_validate_json(capsys.readouterr().out) == settings


def test_print_config_shows_changes_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["celeba", "--print-config", "--stage1.rounds", "7", "--keypoints", "superpoint"])
    config = json.loads(capsys.readouterr().out)
    assert config["stage1"]["rounds"] == 7 and config["keypoints"]["detector"] == "superpoint"
    assert not list(tmp_path.iterdir())


def labelled_batch(clusters: int) -> Batch:
    """Two random stored images, each with 12 labels."""
    rng = np.random.default_rng(0)
    return Batch(
        ("a", "b"),
        torch.from_numpy(rng.integers(0, 256, (2, 300, 280, 3), np.uint8)),
        torch.tensor([[280.0, 300.0]] * 2),
        torch.from_numpy(np.stack([box_to_view(np.array([10.0, 20.0, 260.0, 270.0]), 256)] * 2)).float(),
        torch.from_numpy(rng.uniform(20, 44, (2, 12, 2))).float(),
        torch.from_numpy(np.stack([np.arange(12), np.arange(12) + clusters - 18])),
    )


@pytest.mark.parametrize("preset", DIFFERENT)
def test_a_step_of_each_full_size_preset(preset):
    settings = PRESETS[preset][1]
    clusters = settings.cluster.clusters
    batch, generator = labelled_batch(clusters), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model: DetectorDescriptor | LandmarkDetector = DetectorDescriptor(settings.network.shape)
    for stage, two in ((settings.stage1, False), (settings.stage2, True)):
        if two:
            model = LandmarkDetector.from_stage1(model, clusters)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = torch.optim.RMSprop(model.parameters(), lr=stage.learning_rate, weight_decay=stage.weight_decay)
        if two:
            losses = stage2_losses(
                model, batch, torch.ones(clusters, dtype=torch.bool), settings.stage2_step(), generator
            )
        else:
            losses = stage1_losses(model, batch, settings.stage1_step(), generator)
        losses.total().backward()
        optimizer.step()
        assert all(torch.isfinite(loss) and loss > 0 for loss in (part.mean() for part in losses.parts.values()))
        moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
        assert all(moved)


def extracted(model: DetectorDescriptor, corpus: Corpus) -> list[Descriptors]:
    """Descriptors of every shard, each image with one label in the middle."""
    return [
        extract_descriptors(
            model,
            corpus.url,
            shard,
            Labels(
                np.arange(shard.samples + 1),
                np.full((shard.samples, 2), 8, np.float32),
                np.zeros(shard.samples, np.int16),
                np.zeros(shard.samples, np.float32),
            ),
            input_size=64,
            threshold=0.0,
            precision="float32",
        )[0]
        for shard in corpus.train
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("corpus"))
    write_scenes(url, 15)
    return Corpus.open(url)


def test_the_last_incomplete_batch_is_clustered_too(corpus, monkeypatch):
    torch.manual_seed(0)
    model = DetectorDescriptor(SETTINGS.network.shape).eval()
    whole = extracted(model, corpus)
    monkeypatch.setattr("sst.train.extraction.BATCH", 4)
    parts = extracted(model, corpus)
    assert [len(shard) for shard in parts] == [6, 6, 3]
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one.offsets, other.offsets)
        assert (np.diff(one.offsets) >= 1).all()
        np.testing.assert_allclose(one.descriptors, other.descriptors, atol=2e-3)


def test_zero_length_descriptors_are_left_out(corpus):
    model = DetectorDescriptor(SETTINGS.network.shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert [len(shard.points) for shard in extracted(model, corpus)] == [0, 0, 0]


@pytest.mark.parametrize(("column", "row"), [(0, 5), (0, 0), (15, 15), (15, 3)])
def test_a_landmark_at_the_border_is_decoded_in_its_own_row(column, row):
    heat = torch.zeros(1, 1, 16, 16)
    heat[0, 0, row, column] = 1.0
    points, confidence = decode_landmarks(heat)
    assert (points[0, 0] - torch.tensor([column, row])).abs().max() <= 0.5 and confidence.item() == 1.0


def test_every_test_that_the_page_names_exists():
    page = Path("docs/fidelity.md").read_text("utf-8")
    named = re.findall(r"`(test_\w+)::(test_\w+)`", page)
    assert len(named) > 30
    files = {path.stem: path.read_text("utf-8") for path in Path("tests").rglob("test_*.py")}
    missing = [(file, test) for file, test in named if f"def {test}(" not in files.get(file, "")]
    assert not missing


def test_every_row_that_claims_to_be_equal_names_its_test():
    rows = [
        row.split(" | ") for row in Path("docs/fidelity.md").read_text("utf-8").splitlines() if row.startswith("| ")
    ]
    equal = [row for row in rows if len(row) == 4 and row[2].startswith("equal")]
    assert len(equal) > 20 and all("`test_" in row[3] for row in equal)


@pytest.mark.slow
def test_a_whole_small_run_at_full_size(tmp_path):
    """Human3.6M's preset with fewer steps: round 0 with background removal, a round, a merging, the model."""
    write_scenes(str(tmp_path / "shards"), 40)
    published = PRESETS["human36m"][1]
    settings = published.changed(
        keypoints=published.keypoints.changed(max_num_keypoints=200),
        stage1=published.stage1.changed(warmup_iterations=1, rounds=1, round_iterations=1, pairs=2),
        stage2=published.stage2.changed(iterations=2, batch=2, merge_after=1, min_population=10),
        resources=published.resources.changed(workers="1"),
    )
    lines: list[dict] = []
    trainer = train_locally(str(tmp_path / "shards"), str(tmp_path / "run"), local_tools(lines, settings), settings)
    assert len(trainer.run.centroids(1)) == 250
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
