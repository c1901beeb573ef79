"""`import sst`: the same points as the commands give, in pixels of the images that are handed over."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sst
from jobs import name as name_job
from jobs import predict as predict_job
from jobs import train as train_job
from sst.config import NetworkSettings
from sst.corpora.drawings import draw
from sst.errors import UserError
from sst.nn.network import LandmarkDetector
from sst.predict.predictor import ImageLandmarks, open_model
from sst.train.model import save_model

NETWORK = NetworkSettings(input_size=64, width=16, depth=2, groups=2, descriptor_size=16)
FILES = [f"{number}.png" for number in range(4)]
SIZES = [(96, 96), (64, 80), (120, 70), (300, 200)]
"""Height and width of the images."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model with random weights, images of several sizes, boxes, and a few annotated points."""
    root = tmp_path_factory.mktemp("api")
    torch.manual_seed(0)
    model = LandmarkDetector(NETWORK.shape, 5).eval()
    (root / "images").mkdir()
    for number, (height, width) in enumerate(SIZES):
        image = draw(1, number, 300).image[:height, :width]
        Image.fromarray(image).save(root / "images" / FILES[number])
    kept = {"network": NETWORK, "clusters": list(range(5))}
    save_model(str(root / "model"), model, **kept, visible=0.5)
    sure = [one.confidence for one in sst.load(root)([root / "images" / file for file in FILES])]
    save_model(str(root / "model"), model, **kept, visible=float(np.median(sure)))  # some are visible, others not
    (root / "boxes.csv").write_text(
        "file,box_x0,box_y0,box_x1,box_y1\n" + "".join(f"{file},{n}.5,2,60,50\n" for n, file in enumerate(FILES))
    )
    annotations = [{"image_id": n, "keypoints": [10 + n, 20, 2, 30, 40 - n, 2]} for n in range(3)]
    (root / "images" / "few.json").write_text(
        json.dumps(
            {
                "images": [{"id": n, "file_name": FILES[n]} for n in range(3)],
                "annotations": annotations,
                "categories": [{"keypoints": ["nose", "chin"]}],
            }
        )
    )
    return root


def exported(world: Path, out: Path, *options: str, table: str = "predictions") -> list[list[tuple[str, ...]]]:
    """What the command writes, image by image."""
    predict_job.main([str(world / "model"), str(world / "images"), "--out", str(out), "--pictures", "0", *options])
    rows: dict[str, list[tuple[str, ...]]] = {file: [] for file in FILES}
    with (out / f"{table}.csv").open() as file:
        for row in csv.DictReader(file):
            rows[row["file"]].append(tuple(row[name] for name in ("landmark", "x", "y", "confidence", "visible")))
    return list(rows.values())


def as_written(found: sst.Landmarks) -> list[tuple[str, ...]]:
    parts = zip(found.names, found.points, found.confidence, found.visible, strict=True)
    return [(name, f"{x:.3f}", f"{y:.3f}", f"{sure:.4f}", str(int(seen))) for name, (x, y), sure, seen in parts]


def test_a_predictor_gives_what_the_command_writes(world, tmp_path):
    found = sst.load(world / "model")([world / "images" / file for file in FILES])
    assert [as_written(one) for one in found] == exported(world, tmp_path)
    seen = np.stack([one.visible for one in found])
    assert seen.any() and not seen.all()


def test_with_boxes_and_another_threshold_too(world, tmp_path):
    files = [str(world / "images" / file) for file in FILES]
    found = sst.load(str(world), visible=0.02)(files, [(n + 0.5, 2, 60, 50) for n in range(4)])
    assert found[1].box == (1.5, 2.0, 60.0, 50.0)
    written = exported(world, tmp_path, "--boxes", str(world / "boxes.csv"), "--visible", "0.02")
    assert [as_written(one) for one in found] == written


def test_arrays_and_files_alone_or_in_a_list_give_the_same(world):
    predictor = sst.load(world)
    files = [world / "images" / file for file in FILES]
    arrays = [np.array(Image.open(file)) for file in files]
    listed, mixed = predictor(files), predictor([*arrays[:2], *files[2:]])
    backwards = predictor(arrays[0][:, :, ::-1][:, :, ::-1])  # as from OpenCV: negative strides
    for one, other, alone in zip(listed, mixed, map(predictor, arrays), strict=True):
        np.testing.assert_array_equal(one.points, other.points)
        np.testing.assert_allclose(one.points, alone.points, atol=1e-3)
        np.testing.assert_allclose(one.confidence, alone.confidence, atol=1e-5)
        assert one.points.dtype == one.confidence.dtype == np.float32 and one.points.shape == (5, 2)
    np.testing.assert_allclose(backwards.points, listed[0].points, atol=1e-3)
    assert predictor([]) == [] and listed[0].named is None


def test_points_are_pixels_of_the_given_image(world):
    model, record, _ = open_model(str(world))
    image = np.array(Image.open(world / "images" / FILES[3]))
    with torch.inference_mode():
        points, _ = ImageLandmarks(model, record.network.input_size)(torch.from_numpy(image)[None])
    np.testing.assert_allclose(sst.load(world)(image).points, points[0].numpy(), atol=1e-3)


def test_named_points_are_those_of_the_command(world, tmp_path):
    before = sst.load(world)
    names = sst.name_landmarks(world, world / "images" / "few.json")
    by_api = (world / "model" / "names.json").read_text()
    name_job.main([str(world), "--annotations", str(world / "images" / "few.json")])
    assert names == ("nose", "chin") and (world / "model" / "names.json").read_text() == by_api
    files = [world / "images" / file for file in FILES]
    found = sst.load(world)(files)
    assert [as_written(one.named) for one in found] == exported(world, tmp_path, table="named")
    assert before(files[0]).named is None  # it was loaded before
    (world / "model" / "names.json").unlink()


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (np.zeros((20, 20, 3)), r"float64 \(20, 20, 3\); give a uint8 RGB"),
        (np.zeros((20, 20), np.uint8), r"\(20, 20\)"),
        (np.zeros((3, 20, 20), np.uint8), r"\(3, 20, 20\)"),
        (np.zeros((2, 20, 20, 3), np.uint8), "or a list of these"),
        (Image.new("RGB", (20, 20)), "is Image; give a uint8 RGB array"),
        ([None], "image 0 is NoneType"),
    ],
)
def test_what_is_no_image_is_refused_with_what_to_give(world, image, told):
    with pytest.raises(TypeError, match=told):
        sst.load(world)(image)


def test_files_boxes_and_models_that_are_not_there_are_refused(world, tmp_path):
    predictor = sst.load(world)
    with pytest.raises(UserError, match=r"none\.jpg: unreadable"):
        predictor(tmp_path / "none.jpg")
    with pytest.raises(UserError, match="20 x 0 pixels"):
        predictor(np.zeros((0, 20, 3), np.uint8))
    with pytest.raises(ValueError):
        predictor([world / "images" / FILES[0]], [])
    with pytest.raises(UserError, match="no such directory"):
        sst.load(tmp_path / "none")


def test_an_empty_path_is_refused_as_by_the_commands(world, tmp_path, monkeypatch):
    monkeypatch.setattr("sst.api.run_own", pytest.fail)
    for call in (
        lambda: sst.load(""), lambda: sst.train_own(""), lambda: sst.train_own(tmp_path, runs=" "),
        lambda: sst.train_own(tmp_path, annotations=""), lambda: sst.name_landmarks("", tmp_path),
        lambda: sst.name_landmarks(world, ""), lambda: sst.name_landmarks(world, "few.json", ""),
    ):  # fmt: skip
        with pytest.raises((UserError, ValueError), match="is empty; give a path or URL"):
            call()


def test_a_model_that_learnt_from_boxes_asks_for_them(world, tmp_path):
    model, record, _ = open_model(str(world))
    kept = {"network": NETWORK, "clusters": record.clusters, "visible": 0.5}
    save_model(str(tmp_path / "model"), model, **kept, metrics={"box_share": 0.3})
    image = np.zeros((20, 20, 3), np.uint8)
    with pytest.warns(UserWarning, match="learnt from boxes"):
        sst.load(tmp_path)(image)
    sst.load(tmp_path)(image, (0, 0, 20, 20))


def test_training_from_python_is_the_command(monkeypatch, tmp_path):
    """The same configuration reaches the same function."""
    seen = []
    monkeypatch.setattr("sst.api.run_own", seen.append)
    sst.train_own(
        tmp_path, 12, annotations=tmp_path / "boxes.csv", name="owls", minutes=9, runs=tmp_path / "runs",
        tracking="sqlite:///other.db", experiment="birds", register="owl",
    )  # fmt: skip
    line = (
        f"own --images {tmp_path} --landmarks 12 --annotations {tmp_path}/boxes.csv --name owls --minutes 9 "
        f"--runs {tmp_path}/runs --tracking sqlite:///other.db --experiment birds --register owl"
    )
    sst.train_own(tmp_path)
    assert seen == [train_job.parse(line.split()), train_job.parse(["own", "--images", str(tmp_path)])]
    with pytest.raises(ValueError, match="landmarks"):
        sst.train_own(tmp_path, 1)


def test_importing_the_package_imports_nothing_slow():
    code = (
        "import sys, sst; assert 'load' in dir(sst) and 'train_own' in sst.__all__; "
        "sys.exit(', '.join({'torch', 'numpy', 'pydantic', 'ray'} & set(sys.modules)) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_every_exported_name_is_there():
    assert all(getattr(sst, name).__doc__ for name in sst.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sst.nothing  # noqa: B018
