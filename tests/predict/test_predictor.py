"""jobs.predict: from files, folders, patterns, shards and videos to COCO, CSV and pictures."""

import csv
import json
import shutil
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
from sst.corpora.videos import FrameNumbers
from sst.nn.network import LandmarkDetector
from sst.predict.overlay import draw_landmarks
from sst.predict.predictor import ImageLandmarks, in_image, in_view, open_model, resampling, view_of_box
from sst.predict.sources import Sources, find_sources
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


def test_ids_and_names_are_those_of_the_file_that_gave_the_boxes(model_url, images, tmp_path, capsys):
    boxes = {
        "images": [{"id": "b7", "file_name": "set/1.png"}, {"id": 70, "file_name": "set/0.png"},
                   {"id": 30, "file_name": "set/2.png"}],
        "annotations": [{"id": 1, "image_id": "b7", "category_id": 17, "bbox": [0, 0, 60, 60]},
                        {"id": 2, "image_id": 70, "category_id": 17, "bbox": [0, 0, 50, 50]},
                        {"id": 3, "image_id": "70", "category_id": 17, "bbox": [40, 30, 50, 50]}],
        "categories": [{"id": 17, "name": "owl"}, {"id": 18, "name": "cat"}],
    }  # fmt: skip
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    job.main([model_url, str(images), "--out", str(tmp_path / "out"), "--boxes", str(tmp_path / "boxes.json")])
    coco, rows = predicted(tmp_path / "out")
    named = {entry["file_name"]: entry["id"] for entry in coco["images"]}
    assert named == {"set/0.png": 70, "set/1.png": "b7", "set/2.png": 30, "more/3.png": 71, "more/4.png": 72}
    assert [(each["id"], each["name"]) for each in coco["categories"]] == [(17, "owl")]
    # As pycocotools pairs them: by image and category alone.
    for wanted in boxes["annotations"]:
        image = next(each["id"] for each in boxes["images"] if str(each["id"]) == str(wanted["image_id"]))
        own = [each["bbox"] for each in coco["annotations"] if (each["image_id"], each["category_id"]) == (image, 17)]
        assert [float(v) for v in wanted["bbox"]] in own
    assert {row["file"] for row in rows} == set(named)
    assert "images without an object in it, seen whole: 4" in capsys.readouterr().out


def test_names_of_categories_come_back_from_a_table(model_url, images, tmp_path):
    (tmp_path / "a.csv").write_text("file,class,xmin,ymin,xmax,ymax\n0.png,owl,1,1,60,60\n1.png,cat,1,1,50,50\n")
    told = ["--boxes", str(tmp_path / "a.csv"), "--category", "all", "--pictures", "0"]
    job.main([model_url, str(images / "0.png"), str(images / "1.png"), "--out", str(tmp_path / "out"), *told])
    coco, _ = predicted(tmp_path / "out")
    assert [(each["id"], each["name"]) for each in coco["categories"]] == [(1, "owl"), (2, "cat")]
    assert [each["category_id"] for each in coco["annotations"]] == [1, 2]


def test_boxes_that_can_not_be_used_are_said(model_url, images, tmp_path, capsys):
    text = "file,xmin,ymin,xmax,ymax\n0.png,1,1,60,60\n1.png,9,9,70,70\n2.png,0.1,0.1,0.9,0.9\n"
    (tmp_path / "a.csv").write_text(text)
    job.main([model_url, str(images), "--out", str(tmp_path / "out"), "--boxes", str(tmp_path / "a.csv")])
    said = capsys.readouterr().out
    assert "a.csv: boxes in shares of the image's sides instead of pixels: 1 (2.png)" in said


@pytest.mark.parametrize(("known", "level"), [({}, 224), ({"white": 4095.0}, 56)])
def test_16_bit_pictures_are_read_as_those_that_a_model_learnt_from(tmp_path, capsys, known, level):
    fields = {"network": NETWORK, "clusters": list(range(LANDMARKS)), "visible": 1.0, "metrics": known}
    save_model(str(tmp_path / "model"), LandmarkDetector(NETWORK.shape, LANDMARKS).eval(), **fields)
    cv2.imwrite(str(tmp_path / "dim.png"), np.full((96, 96), 900, np.uint16))
    job.main([str(tmp_path / "model"), str(tmp_path / "dim.png"), "--out", str(tmp_path / "out")])
    (picture,) = (tmp_path / "out" / "pictures").iterdir()
    np.testing.assert_allclose(np.asarray(Image.open(picture)), level, atol=3)
    assert ("use values up to 1023 only" in capsys.readouterr().out) == (not known)


def test_files_patterns_and_folders_mix(images):
    sources = find_sources([str(images / "0.png"), str(images / "more"), str(images / "*.jpg")])
    assert [Path(target.file).name for target in sources.targets] == ["0.png", "3.png", "4.png", "cut.jpg"]


def test_shards_are_predicted_within_their_boxes(model_url, tmp_path):
    write_toy(str(tmp_path / "shards"), 3, 2)
    job.main([model_url, str(tmp_path / "shards"), "--out", str(tmp_path / "out")])
    coco, _ = predicted(tmp_path / "out")
    x0, y0, x1, y1 = map(float, draw(5, 0, 96).box)
    assert [entry["file_name"] for entry in coco["images"]] == [f"drawing {number}" for number in range(5)]
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


def white_bar(path: Path, code: str, frames: int = 40) -> Path:
    """A video whose white bar stands at 2 n in frame n; dark noise keeps its packets large."""
    writer, rng = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), 10, (128, 96)), np.random.default_rng(0)
    for number in range(frames):
        frame = rng.integers(0, 15, (96, 128, 3), np.uint8)
        frame[20:60, 2 * number : 2 * number + 20] = 255
        writer.write(frame)
    writer.release()
    return path


def bars(sources: Sources) -> dict[int, float]:
    """Where the bar stands in each frame that was read, by the number that the frame got."""
    found = {}
    for target in sources.targets:
        assert isinstance(target.source, np.ndarray)
        columns = np.flatnonzero(target.source[40, :, 0] > 200)
        found[int(target.file.removeprefix("frame_"))] = columns[0] / 2 if len(columns) else -1
    return found


@pytest.mark.parametrize(("name", "code"), [("a.mp4", "mp4v"), ("a.avi", "MJPG"), ("a.wmv", "WMV2"), ("a.ts", "MPG2"),
                                            ("a.flv", "FLV1"), ("a.webm", "VP80"), ("a.data", "MJPG")])  # fmt: skip
def test_any_video_that_opencv_reads_is_read_whole(tmp_path, name, code):
    path = white_bar(tmp_path / ("a.avi" if name == "a.data" else name), code).rename(tmp_path / name)
    sources = find_sources([str(path)])
    found = bars(sources)
    assert list(found) == list(range(40)) and sources.notes == []
    np.testing.assert_allclose(list(found.values()), range(40), atol=1)


def test_a_video_with_damaged_frames_goes_on_after_them(tmp_path):
    path = white_bar(tmp_path / "a.avi", "MJPG")
    data = bytearray(path.read_bytes())
    starts = [at for at in range(len(data)) if data[at : at + 4] == b"00dc"][1:41]  # before: the index
    for number in (10, 11, 25):
        data[starts[number] + 8 : starts[number + 1]] = bytes(starts[number + 1] - starts[number] - 8)
    path.write_bytes(data)
    sources = find_sources([str(path)])
    found = bars(sources)
    assert set(range(40)) - set(found) == {10, 11, 25}
    assert all(abs(place - number) <= 1 for number, place in found.items())
    assert [note.partition(": ")[2] for note in sources.notes] == [
        "3 of 40 frames are lost, since the file is damaged or cut; the others keep their numbers"
    ]


def test_a_cut_video_says_what_it_has_lost(model_url, tmp_path, capsys):
    path = white_bar(tmp_path / "a.avi", "MJPG")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    job.main([model_url, str(path), "--out", str(tmp_path / "out")])
    coco, _ = predicted(tmp_path / "out")
    left = len(coco["images"])
    assert f"{40 - left} of 40 frames are lost" in capsys.readouterr().out and 15 < left < 30
    assert [entry["id"] for entry in coco["images"]] == list(range(1, left + 1))


def test_a_single_frame_that_is_lost_is_said_too(tmp_path):
    path = white_bar(tmp_path / "a.avi", "MJPG")
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"00dc", 0, data.rindex(b"idx1"))])  # the last frame and the index after it
    sources = find_sources([str(path)])
    assert len(bars(sources)) == 39 and "1 of 40 frames are lost" in sources.notes[0]


def test_frames_that_a_container_has_lost_leave_a_gap_in_the_numbers(tmp_path):
    path = white_bar(tmp_path / "a.flv", "FLV1")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + len(data) // 8] = bytes(len(data) // 8)
    path.write_bytes(data)
    sources = find_sources([str(path)])
    found = bars(sources)
    assert 20 < len(found) < 40 and max(found) == 39
    assert (
        sources.notes[0].endswith("keep their numbers")
        and f"{40 - len(found)} of 40 frames are lost" in sources.notes[0]
    )
    assert all(found[number] == pytest.approx(number, abs=1) for number in range(15))


def test_frames_of_a_varying_rate_are_numbered_in_order():
    times = [0.0, 33.0, 70.0, 170.0, 171.0, 260.0]
    numbers = FrameNumbers.of(times, 6, 30.0)
    assert [numbers.next(time) for time in times] == list(range(6)) and numbers.known
    numbers = FrameNumbers.of(times, 6, 30.0)
    assert [numbers.next(time) for time in (0.0, 70.0, 260.0)] == [0, 2, 5]


def test_an_animation_is_a_video_and_a_picture_with_an_unknown_ending_is_not(tmp_path):
    frames = [Image.fromarray(np.full((64, 64, 3), 20 * n, np.uint8)) for n in range(8)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    assert len(list(find_sources([str(tmp_path / "a.gif")]).targets)) == 8
    frames[0].save(tmp_path / "b.jfif", "JPEG")
    (target,) = find_sources([str(tmp_path / "b.jfif")]).targets
    assert target.source == tmp_path / "b.jfif"


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


def test_a_model_of_another_version_is_called_so(model_url, images, tmp_path, capsys):
    """Metrics were once called figures."""
    shutil.copytree(model_url, tmp_path / "model")
    (record_path,) = (tmp_path / "model").rglob("model.json")
    record = json.loads(record_path.read_text())
    record["figures"] = record.pop("metrics")
    record_path.write_text(json.dumps(record))
    with pytest.raises(SystemExit) as exit_:
        job.main([str(tmp_path / "model"), str(images), "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and len(lines) == 1
    assert lines[0].startswith(f"error: {record_path}: not the record of a landmark model as this version writes it")
    assert "figures" in lines[0] and lines[0].endswith("use the version that wrote it, or train again")


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
