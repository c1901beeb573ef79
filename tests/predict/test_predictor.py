"""jobs.predict: from files, folders, patterns, shards and videos to COCO, CSV and pictures."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jobs import predict as job
from sst.config import NetworkSettings
from sst.corpora.drawings import draw
from sst.nn.network import LandmarkDetector
from sst.predict.overlay import draw_landmarks
from sst.predict.predictor import ImageLandmarks, in_image, in_view, open_model, resampling, view_of_box
from sst.predict.sources import find_sources
from sst.train.model import save_model
from tests.small import write_toy

NETWORK = NetworkSettings(input_size=64, width=16, depth=2, groups=2, descriptor_size=16)
LANDMARKS = 5


@pytest.fixture(scope="module")
def model_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    url = str(tmp_path_factory.mktemp("run") / "model")
    detector = LandmarkDetector(NETWORK.shape, LANDMARKS).eval()
    save_model(url, detector, network=NETWORK, clusters=list(range(LANDMARKS)), visible=0.0)
    return url


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    (root / "more").mkdir()
    for number in range(5):
        drawn = draw(1, number, 96)
        Image.fromarray(drawn.image).save(root / ("more" if number > 2 else "") / f"{number}.png")
    (root / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    return root


def predicted(out: Path, name: str = "predictions") -> tuple[dict, list[dict[str, str]]]:
    with (out / f"{name}.csv").open() as file:
        return json.loads((out / f"{name}.json").read_text()), list(csv.DictReader(file))


@given(
    length=st.integers(8, 200),
    size=st.sampled_from([16, 64, 96]),
    first=st.floats(-20, 20),
    extent=st.floats(4, 200),
)
def test_resampling_reads_a_linear_ramp_where_the_view_convention_says(length, size, first, extent):
    weight = resampling(torch.arange(length).float(), torch.tensor(first), torch.tensor(first + extent), size).double()
    read = (weight @ torch.arange(length).double()).numpy()
    wanted = first + np.arange(size) * extent / size
    margin = max(1.0, extent / size)
    inside = (wanted >= margin) & (wanted <= length - 1 - margin)
    # A triangle filter that samples at whole pixels reproduces a ramp up to the sampling of its flanks.
    np.testing.assert_allclose(read[inside], wanted[inside], atol=0.26 if extent > size else 2e-3)
    np.testing.assert_allclose(weight.sum(1)[inside], 1, atol=1e-5)


def test_the_view_of_a_box_is_the_image_itself_where_nothing_is_scaled():
    image = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    view = view_of_box(image, torch.tensor([0.0, 0.0, 64.0, 64.0]), 64)
    torch.testing.assert_close(view, image.permute(0, 3, 1, 2).float() / 255)


@given(st.tuples(st.floats(-50, 50), st.floats(-50, 50), st.floats(2, 300), st.floats(2, 300)), st.integers(0, 9))
def test_points_go_into_the_view_and_back(corner, seed):
    box = (corner[0], corner[1], corner[0] + corner[2], corner[1] + corner[3])
    points = np.random.default_rng(seed).uniform(-1, 300, (7, 2))
    np.testing.assert_allclose(in_image(in_view(points, box, 256.0) / 256, box), points, atol=1e-3)


def test_landmarks_within_a_box_are_those_of_the_cropped_image(model_url):
    detector, record, _ = open_model(model_url)
    whole = ImageLandmarks(detector, record.network.input_size)
    image = torch.from_numpy(draw(3, 0, 128).image)[None]
    with torch.inference_mode():
        points, confidence = whole.in_box(image, torch.tensor([20.0, 30.0, 84.0, 94.0]))
        cropped, same = whole(image[:, 30:94, 20:84])
    torch.testing.assert_close(confidence, same)
    torch.testing.assert_close(points, cropped + torch.tensor([20.0, 30.0]))


def test_a_folder_gives_coco_csv_and_pictures_and_lists_what_is_unreadable(model_url, images, tmp_path, capsys):
    job.main([model_url, str(images), "--out", str(tmp_path / "out")])
    coco, rows = predicted(tmp_path / "out")
    names = [entry["file_name"] for entry in coco["images"]]
    assert names == ["0.png", "1.png", "2.png", "more/3.png", "more/4.png"]
    assert [entry["file_name"] for entry in coco["unreadable"]] == ["cut.jpg"]
    assert "unreadable cut.jpg" in capsys.readouterr().out
    assert len(rows) == 5 * LANDMARKS and len(list((tmp_path / "out" / "pictures").iterdir())) == 5
    assert coco["categories"][0]["keypoints"] == [f"landmark_{k}" for k in range(LANDMARKS)]
    for annotation in coco["annotations"]:
        keypoints = np.array(annotation["keypoints"]).reshape(-1, 3)
        own = [row for row in rows if row["file"] == names[annotation["image_id"] - 1]]
        np.testing.assert_allclose(keypoints[:, :2], [[float(row["x"]), float(row["y"])] for row in own], atol=1e-3)
        assert (keypoints[:, 2] == 2).all() and annotation["num_keypoints"] == LANDMARKS


def test_a_landmark_below_the_threshold_is_not_labelled_in_coco_but_stands_in_the_csv(model_url, images, tmp_path):
    job.main([model_url, str(images / "0.png"), "--out", str(tmp_path), "--visible", "1", "--pictures", "0"])
    coco, rows = predicted(tmp_path)
    assert coco["annotations"][0]["keypoints"] == [0] * 3 * LANDMARKS and coco["annotations"][0]["score"] == 0
    assert all(row["visible"] == "0" and float(row["x"]) != 0 for row in rows)
    assert not (tmp_path / "pictures").exists()


def test_boxes_of_several_objects_in_one_image_give_an_object_each(model_url, images, tmp_path):
    boxes = {"images": [{"id": 1, "file_name": "0.png"}], "annotations": [
        {"image_id": 1, "bbox": [0, 0, 60, 60]}, {"image_id": 1, "bbox": [30, 30, 66, 66]},
    ]}  # fmt: skip
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    job.main([model_url, str(images), "--out", str(tmp_path / "out"), "--boxes", str(tmp_path / "boxes.json")])
    coco, rows = predicted(tmp_path / "out")
    own = [entry for entry in coco["annotations"] if entry["image_id"] == 1]
    assert [entry["bbox"] for entry in own] == [[0, 0, 60, 60], [30, 30, 66, 66]]
    assert {row["object"] for row in rows if row["file"] == "0.png"} == {"0", "1"}


def test_files_patterns_and_folders_mix(images):
    sources = find_sources([str(images / "0.png"), str(images / "more"), str(images / "*.jpg")])
    assert [Path(target.file).name for target in sources.targets] == ["0.png", "3.png", "4.png", "cut.jpg"]


def test_shards_are_predicted_within_their_boxes(model_url, tmp_path):
    write_toy(str(tmp_path / "shards"), 3, 2)
    job.main([model_url, str(tmp_path / "shards"), "--out", str(tmp_path / "out")])
    coco, _ = predicted(tmp_path / "out")
    x0, y0, x1, y1 = map(float, draw(5, 0, 96).box)
    assert len(coco["annotations"]) == 5
    np.testing.assert_allclose(coco["annotations"][0]["bbox"], [x0, y0, x1 - x0, y1 - y0], atol=1e-3)


def test_a_video_becomes_a_video_with_as_many_frames(model_url, tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "in.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 64))
    for number in range(7):
        writer.write(draw(2, number, 96).image[:64])
    writer.release()
    job.main([model_url, str(tmp_path / "in.mp4"), "--out", str(tmp_path / "out")])
    video = cv2.VideoCapture(str(tmp_path / "out" / "video.mp4"))
    frames = 0
    while video.read()[0]:
        frames += 1
    coco, _ = predicted(tmp_path / "out")
    assert frames == 7 == len(coco["annotations"])
    assert coco["images"][6] == {"id": 7, "file_name": "frame_000006", "width": 96, "height": 64}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "IMAGES"], "nowhere: no such directory; give a run directory of `landmarks train`"),
        (["MODEL", "nothing"], "nothing: no such file or folder"),
        (["MODEL", "IMAGES/*.gif"], "no image matches this pattern"),
        (["MODEL", "IMAGES/cut.jpg"], "none of 1 images is readable: cut.jpg: unreadable"),
        (["MODEL", "gone.mp4"], "gone.mp4: no such file"),
        (["MODEL", "IMAGES", "--boxes", "no.csv"], "no.csv: can't read the annotations"),
        (["MODEL", "IMAGES", "--visible", "2"], "less than or equal to 1"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(model_url, images, tmp_path, capsys, arguments, said):
    told = [part.replace("MODEL", model_url).replace("IMAGES", str(images)) for part in arguments]
    with pytest.raises(SystemExit) as exit_:
        job.main([*told, "--out", str(tmp_path / "out")])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert said in captured.err + captured.out
    assert not list(tmp_path.iterdir())


def test_earlier_predictions_are_replaced_only_when_asked(model_url, images, tmp_path, capsys):
    job.main([model_url, str(images), "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        job.main([model_url, str(images / "0.png"), "--out", str(tmp_path)])
    assert "holds predictions.json already" in capsys.readouterr().err
    job.main([model_url, str(images / "0.png"), "--out", str(tmp_path), "--overwrite"])
    assert len(list((tmp_path / "pictures").iterdir())) == 1


def test_a_run_that_has_not_finished_says_so(tmp_path, capsys):
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(SystemExit):
        job.main([str(tmp_path), "x.jpg", "--out", str(tmp_path / "out")])
    assert "training has not finished" in capsys.readouterr().err


def test_marks_are_drawn_at_the_visible_landmarks_and_nowhere_else():
    image = np.full((100, 120, 3), 40, np.uint8)
    drawn = draw_landmarks(image, np.array([[30.0, 20.0], [90.0, 80.0]]), np.array([True, False]))
    changed = np.argwhere((drawn != image).any(-1))
    assert tuple(drawn[20, 30]) == (0xE6, 0x9F, 0x00)
    assert np.abs(changed - [20, 30]).max() <= 4 and (image == 40).all()


def test_a_model_that_learnt_from_boxes_asks_for_them(images, tmp_path, capsys):
    detector = LandmarkDetector(NETWORK.shape, LANDMARKS)
    fields = {"network": NETWORK, "clusters": list(range(LANDMARKS)), "visible": 0.0, "metrics": {"box_share": 0.3}}
    save_model(str(tmp_path / "model"), detector, **fields)
    (tmp_path / "boxes.csv").write_text("file,box_x0,box_y0,box_x1,box_y1\n0.png,1,1,60,60\n")
    for more, asks in (([], True), (["--boxes", str(tmp_path / "boxes.csv"), "--overwrite"], False)):
        job.main([str(tmp_path / "model"), str(images), "--out", str(tmp_path / "out"), *more])
        assert ("give its box in each by --boxes" in capsys.readouterr().err) == asks
