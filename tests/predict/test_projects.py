"""Projects of annotation tools: what predict writes, what pack and name read back, what other programs see in it."""

import csv
import json
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree as ET

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from jobs import name as name_job
from jobs import pack as pack_job
from jobs import predict as job
from sst.corpora import interop
from sst.corpora.drawings import draw
from sst.data.shards import Manifest, read_shard
from sst.nn.network import LandmarkDetector
from sst.train.model import save_model
from tests.corpora.test_interop import packed
from tests.predict.test_predictor import NETWORK

TOOLS = ("deeplabcut", "sleap", "label-studio", "cvat", "nwb")
NAMES = [f"landmark_{number}" for number in range(4)]
LIMIT = 0.006
"""Pixels: CVAT's files have two decimals."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images in two folders and of two sizes, one with two objects, and their predictions for every tool."""
    root = tmp_path_factory.mktemp("world")
    (root / "images" / "more").mkdir(parents=True)
    for number, file in enumerate(["0.png", "1.png", "more/1.png", "more/ä 2.png"]):
        side = 120 if file == "1.png" else 96
        Image.fromarray(draw(1, number, side).image).save(root / "images" / file)
    torch.manual_seed(0)
    detector = LandmarkDetector(NETWORK.shape, len(NAMES)).eval()
    save_model(str(root / "model"), detector, network=NETWORK, clusters=[0, 1, 2, 3], visible=0.0)
    boxes = {
        "images": [{"id": n, "file_name": f} for n, f in enumerate(["0.png", "1.png", "more/1.png", "more/ä 2.png"])],
        "annotations": [
            {"image_id": n, "bbox": box}
            for n, box in [(0, [8, 9, 70, 60]), (1, [0, 0, 120, 120]), (2, [1, 2, 40, 50]), (2, [40, 30, 50, 60])]
        ],
    }
    (root / "boxes.json").write_text(json.dumps(boxes))
    given = [str(root / "model"), str(root / "images"), "--projects", *TOOLS]
    job.main([*given, "--out", str(root / "whole"), "--visible", str(threshold(root))])
    job.main([*given, "--out", str(root / "boxed"), "--visible", "0", "--boxes", str(root / "boxes.json")])
    return root


def threshold(root: Path) -> float:
    """A confidence that hides some points of some images, and none of all."""
    job.main([str(root / "model"), str(root / "images"), "--out", str(root / "first"), "--visible", "0"])
    rows = list(csv.DictReader((root / "first" / "predictions.csv").open()))
    best = {name: max(float(row["confidence"]) for row in rows if row["landmark"] == name) for name in NAMES}
    return min(best.values()) - 1e-3


def wanted(out: Path) -> dict[str, list[tuple[np.ndarray, list[float]]]]:
    """Points (NaN where not visible) and box of every object of an image, from the COCO file."""
    coco = json.loads((out / "predictions.json").read_text())
    files = {image["id"]: image["file_name"] for image in coco["images"]}
    found: dict[str, list[tuple[np.ndarray, list[float]]]] = {}
    for each in coco["annotations"]:
        triples = np.array(each["keypoints"], float).reshape(-1, 3)
        points = np.where(triples[:, 2:] > 0, triples[:, :2], np.nan)
        x, y, width, height = each["bbox"]
        found.setdefault(files[each["image_id"]], []).append((points, [x, y, x + width, y + height]))
    return found


def accepted(tool: str, out: Path) -> str:
    """The project after a person has accepted every prediction, as the tool itself then keeps it."""
    if tool == "deeplabcut":
        return str(out / "deeplabcut" / "config.yaml")
    if tool == "label-studio":
        tasks = json.loads((out / "label_studio.json").read_text())
        for number, task in enumerate(tasks):
            task |= {
                "id": number,
                "annotations": [{"result": task["predictions"][0]["result"], "was_cancelled": False}],
            }
        (out / "export.json").write_text(json.dumps(tasks))
        return str(out / "export.json")
    if tool == "sleap":
        import sleap_io as sio

        labels = sio.load_slp(str(out / "predictions.slp"))
        for frame in labels:
            frame.instances = [sio.Instance.from_numpy(own.numpy(), labels.skeleton) for own in frame.instances]
        labels.save(str(out / "accepted.slp"), verbose=False)
        return str(out / "accepted.slp")
    return str(out / ("cvat.xml" if tool == "cvat" else "predictions.nwb"))


@pytest.mark.parametrize("kind", ["whole", "boxed"])
@pytest.mark.parametrize("tool", TOOLS)
def test_what_is_written_for_a_tool_is_read_back(tool, kind, world):
    found = interop.annotated(accepted(tool, world / kind), world / "images")
    rows = found.annotations.rows
    assert list(found.annotations.point_names) == NAMES and not found.frames
    objects = [(file, *each) for file, own in wanted(world / kind).items() for each in own]
    objects = [each for each in objects if np.isfinite(each[1]).any()]
    assert kind == "boxed" or any(np.isnan(points).any() for _, points, _ in objects)
    for file, points, box in objects:
        [row] = [own for own in rows if own.file == file and np.allclose(own.points, points, 0, LIMIT, equal_nan=True)]
        if tool in ("cvat", "label-studio") and box[:2] != [0, 0]:
            np.testing.assert_allclose(row.box, box, atol=LIMIT)
    assert len(rows) == len(objects)


@pytest.mark.parametrize("tool", TOOLS)
def test_pack_keeps_the_points_of_a_project_and_name_learns_from_it(tool, world, tmp_path, capsys):
    project = accepted(tool, world / "whole")
    out = str(tmp_path / "shards")
    pack_job.main(
        ["folder", "--images", str(world / "images"), "--annotations", project, "--out", out, "--size", "256"]
    )
    manifest = Manifest.load(out)
    stored = {
        s.meta.source: s.meta for shard in manifest.shards for s in read_shard(f"{out}/{shard.file}", shard.sha256)
    }
    sizes = {file: Image.open(world / "images" / file).size for file in stored}
    assert len(stored) == 4
    for file, [(points, _)] in wanted(world / "whole").items():
        if not np.isfinite(points).any():
            continue
        inside = (points >= -0.5).all(1) & (points <= np.array(sizes[file]) - 0.5).all(1)
        assert list(stored[file].visible) == inside.tolist()
        seen = np.isfinite(points).all(1)
        np.testing.assert_allclose(np.array(stored[file].points)[seen], points[seen], atol=LIMIT)
    model = tmp_path / "model"
    model.mkdir()
    for file in (world / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    name_job.main([str(model), "--annotations", accepted(tool, world / "boxed"), "--images", str(world / "images")])
    assert json.loads((model / "names.json").read_text())["names"] == NAMES


def test_pandas_and_sleap_io_see_our_points_in_a_deeplabcut_project(world):
    import sleap_io as sio

    root = world / "whole" / "deeplabcut"
    config = yaml.safe_load((root / "config.yaml").read_text())
    assert config["bodyparts"] == NAMES and config["scorer"] == "landmarks" and not config["multianimalproject"]
    table = pd.read_csv(
        root / "labeled-data" / "more" / "CollectedData_landmarks.csv", header=[0, 1, 2], index_col=[0, 1, 2]
    )
    for file in ("1.png", "ä 2.png"):
        own = table.loc[("labeled-data", "more", file)].to_numpy().reshape(-1, 2)
        np.testing.assert_allclose(own, wanted(world / "whole")[f"more/{file}"][0][0], atol=1e-3)
        assert (root / "labeled-data" / "more" / file).read_bytes() == (world / "images" / "more" / file).read_bytes()
    labels = sio.load_dlc_project(str(root))
    names = labels.skeleton.node_names
    for frame in labels:
        place = Path(frame.video.filename[frame.frame_idx])
        file = place.name if place.parent.name == "images" else f"more/{place.name}"
        if frame.instances:
            read = frame.instances[0].numpy()[[names.index(name) for name in NAMES]]
            np.testing.assert_allclose(read, wanted(world / "whole")[file][0][0], atol=1e-3)
    several = yaml.safe_load((world / "boxed" / "deeplabcut" / "config.yaml").read_text())
    assert several["multianimalproject"] and several["individuals"] == ["object1", "object2"]


def test_cvat_gets_all_that_its_importer_asks_for(world):
    root = ET.parse(world / "whole" / "cvat.xml").getroot()
    labels = json.loads((world / "whole" / "cvat_labels.json").read_text())
    assert [each["name"] for each in labels] == ["object"] and labels[0]["type"] == "skeleton"
    circles = ET.fromstring(f"<svg>{labels[0]['svg']}</svg>")
    assert [c.get("data-label-name") for c in circles] == NAMES == [s["name"] for s in labels[0]["sublabels"]]
    assert all(0 <= float(c.get(side)) <= 100 for c in circles for side in ("cx", "cy"))
    assert root.findtext("version") == "1.1"
    for image in root.iter("image"):
        [(points, _)] = wanted(world / "whole")[image.get("name")]
        assert (
            image.get("id").isdigit()
            and int(image.get("width")) == Image.open(world / "images" / image.get("name")).width
        )
        [skeleton] = image
        for element, place in zip(skeleton, points, strict=True):
            assert element.get("occluded") == "0" and element.get("label") in NAMES
            assert (element.get("outside") == "1") == bool(np.isnan(place).any())
            if np.isfinite(place).all():  # CVAT counts from the corner of the first pixel, COCO from its centre
                x, y = map(float, element.get("points").split(","))
                np.testing.assert_allclose([x - 0.5, y - 0.5], place, atol=LIMIT)


def test_label_studio_gets_places_in_percent_of_the_image(world):
    interface = ET.parse(world / "whole" / "label_studio.xml").getroot()
    assert [label.get("value") for label in interface.find("KeyPointLabels")] == NAMES
    controls = {element.get("name") for element in interface if element.get("toName") == "image"}
    for task in json.loads((world / "whole" / "label_studio.json").read_text()):
        file = unquote(task["data"]["image"].removeprefix("/data/local-files/?d="))
        [(points, _)] = wanted(world / "whole")[file]
        width, height = Image.open(world / "images" / file).size
        results = task["predictions"][0]["result"]
        assert len(results) == np.isfinite(points).all(1).sum() and len({each["id"] for each in results}) == len(
            results
        )
        for each in results:
            value = each["value"]
            assert each["from_name"] in controls and each["original_width"] == width and each["image_rotation"] == 0
            x, y = value["x"] / 100 * width - 0.5, value["y"] / 100 * height - 0.5
            np.testing.assert_allclose([x, y], points[NAMES.index(value["keypointlabels"][0])], atol=1e-3)


def test_sleap_gets_confidences_and_videos_of_one_size(world):
    import sleap_io as sio

    labels = sio.load_slp(str(world / "whole" / "predictions.slp"))
    assert labels.skeleton.node_names == NAMES and len(labels.videos) == 2
    rows = list(csv.DictReader((world / "whole" / "predictions.csv").open()))
    for frame in labels:
        file = Path(frame.video.filename[frame.frame_idx]).relative_to(world / "images").as_posix()
        [instance] = frame.predicted_instances
        np.testing.assert_allclose(instance.numpy(), wanted(world / "whole")[file][0][0], atol=1e-3)
        sure = [float(row["confidence"]) for row in rows if row["file"] == file]
        np.testing.assert_allclose(instance.points["score"], sure, atol=1e-4)


@pytest.fixture(scope="module")
def filmed(world):
    video = world / "film.mp4"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 96))
    for number in range(3):
        writer.write(draw(1, number, 96).image)
    writer.release()
    tools = ["deeplabcut", "sleap", "cvat", "nwb"]
    job.main([str(world / "model"), str(video), "--out", str(world / "film"), "--projects", *tools])
    return video, np.array([objects[0][0] for objects in wanted(world / "film").values()])


def test_a_video_gives_a_deeplabcut_table_and_sleap_frames(filmed, world):
    import sleap_io as sio

    video, points = filmed
    table = pd.read_csv(world / "film" / "deeplabcut" / "filmDLC_landmarks.csv", header=[0, 1, 2], index_col=0)
    assert table.index.tolist() == [0, 1, 2] and table.columns.names[2] == "coords"
    read = table.to_numpy().reshape(3, len(NAMES), 3)
    np.testing.assert_allclose(read[..., :2], points, atol=1e-3)
    assert ((read[..., 2] >= 0) & (read[..., 2] <= 1)).all()
    labels = sio.load_slp(str(world / "film" / "predictions.slp"))
    assert [frame.frame_idx for frame in labels] == [0, 1, 2] and labels.video.filename == str(video)
    np.testing.assert_allclose([frame[0].numpy() for frame in labels], points, atol=1e-3)


def test_a_video_gives_nwb_pose_estimation_with_confidence_and_time(filmed, world):
    import ndx_pose  # noqa: F401
    import pynwb

    path = str(world / "film" / "predictions.nwb")
    problems = pynwb.validate(path=path)
    assert not problems, problems
    with pynwb.NWBHDF5IO(path, "r") as file:
        pose = file.read().processing["behavior"]["PoseEstimation"]
        for index, name in enumerate(NAMES):
            series = pose[name]
            np.testing.assert_allclose(series.data[:], filmed[1][:, index], atol=1e-3)
            np.testing.assert_allclose(series.timestamps[:], [0, 0.1, 0.2])
            assert series.confidence.shape == (3,)
        assert list(pose.skeleton.nodes[:]) == NAMES


def test_labelled_frames_of_a_video_are_packed(filmed, world, tmp_path):
    import sleap_io as sio

    video, points = filmed
    skeleton = sio.Skeleton(NAMES)
    own = sio.Video.from_filename("/elsewhere/film.mp4")  # as on the machine where it was annotated
    frames = [sio.LabeledFrame(own, n, [sio.Instance.from_numpy(points[n], skeleton)]) for n in (2, 1)]
    sio.save_slp(sio.Labels(frames), str(tmp_path / "own.slp"), verbose=False)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "film.mp4").write_bytes(video.read_bytes())
    found = packed(tmp_path / "videos", tmp_path / "own.slp")
    assert [item.source for item in found] == ["film/frame_000001", "film/frame_000002"]
    reader = cv2.VideoCapture(str(video))
    frames = [reader.read()[1][:, :, ::-1] for _ in range(3)]
    for item, number in zip(found, (1, 2), strict=True):
        loaded = item.load()
        np.testing.assert_array_equal(loaded.image, frames[number])
        np.testing.assert_allclose(loaded.points, points[number], atol=1e-3)


def test_frames_of_two_videos_of_the_same_name_are_told_apart(filmed, tmp_path):
    import sleap_io as sio

    skeleton = sio.Skeleton(["nose"])
    frames = []
    for number, folder in enumerate(("left", "right")):
        (tmp_path / folder).mkdir()
        writer = cv2.VideoWriter(str(tmp_path / folder / "cam.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 64))
        writer.write(np.full((64, 64, 3), 60 + 120 * number, np.uint8))
        writer.release()
        video = sio.Video.from_filename(f"/elsewhere/{folder}/cam.mp4")
        frames.append(sio.LabeledFrame(video, 0, [sio.Instance.from_numpy(np.array([[number, 5.0]]), skeleton)]))
    sio.save_slp(sio.Labels(frames), str(tmp_path / "own.slp"), verbose=False)
    found = [item.load() for item in packed(tmp_path, tmp_path / "own.slp")]
    assert [(item.points[0, 0], round(float(item.image.mean()), -1)) for item in found] == [(0, 60), (1, 180)]


@pytest.mark.parametrize(("arguments", "message"), [
    (["film.mp4", "--projects", "label-studio"], "no points in videos"),
    (["shards", "--projects", "cvat"], "shards hold no image files"),
])  # fmt: skip
def test_what_a_tool_cannot_have_is_refused_before_predicting(
    arguments, message, filmed, world, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(world)
    if not Path("shards").exists():
        pack_job.main(["folder", "--images", "images", "--out", "shards"])
    with pytest.raises(SystemExit) as exit_:
        job.main(["model", *arguments, "--out", str(tmp_path / "out")])
    assert exit_.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_without_the_extra_the_message_names_it(world, tmp_path, capsys, monkeypatch):
    import builtins
    import importlib
    import sys

    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: real("no_such_" + name if "sleap" in name else name))
    monkeypatch.delitem(sys.modules, "sleap_io", raising=False)
    assert builtins.__import__  # the lazy import is by importlib alone
    with pytest.raises(SystemExit) as exit_:
        job.main([str(world / "model"), str(world / "images"), "--projects", "sleap", "--out", str(tmp_path / "out")])
    assert exit_.value.code == 2 and "self-training-landmarks[interop]" in capsys.readouterr().err
