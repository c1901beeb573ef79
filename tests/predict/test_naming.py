"""jobs.name: from discovered landmarks to named points."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge

from jobs import name as job
from jobs import pack as pack_job
from jobs import predict as predict_job
from sst.corpora.drawings import draw
from sst.errors import UserError
from sst.nn.network import LandmarkDetector
from sst.predict.naming import Examples, curve, learn, left_out_errors, load_names, save_names
from sst.predict.shape import VIEW
from sst.train.model import save_model
from tests.predict.test_predictor import NETWORK


def faces_of_a_flexible_kind(count: int, seed: int = 0, noise: float = 1.0) -> Examples:
    """12 landmarks and 5 points that turn, shift and flex together; some landmarks are unseen and then anywhere."""
    fixed, rng = np.random.default_rng(99), np.random.default_rng(seed)
    shape, modes = fixed.uniform(60, 200, (17, 2)), fixed.normal(0, 10, (3, 17, 2))
    points = shape + np.tensordot(rng.normal(size=(count, 3)), modes, 1)
    turn = np.eye(2) + rng.normal(0, 0.1, (count, 2, 2))
    points = (points - 128) @ turn + 128 + rng.normal(0, 12, (count, 1, 2))
    landmarks = points[:, :12] + rng.normal(0, noise, (count, 12, 2))
    seen = rng.random((count, 12)) < 0.85
    landmarks = np.where(seen[..., None], landmarks, rng.uniform(0, 256, landmarks.shape))
    return Examples(landmarks, np.where(seen, 0.7, 0.02), points[:, 12:])


NAMES = ["a", "b", "c", "d", "e"]


def error(examples: Examples, out: Examples) -> float:
    named, _ = learn(examples, NAMES).apply(out.points, out.confidence)
    return float(np.linalg.norm(named - out.targets, axis=-1).mean())


def test_more_annotated_images_give_smaller_errors_and_a_few_beat_the_mean_place():
    out = faces_of_a_flexible_kind(200, seed=1)
    errors = {count: error(faces_of_a_flexible_kind(count, seed=2), out) for count in (1, 5, 20, 100, 300)}
    constant = np.linalg.norm(out.targets - out.targets.mean(0), axis=-1).mean()
    assert errors[300] < errors[100] < errors[20] < errors[5] < errors[1]
    assert errors[5] < 0.8 * constant and errors[300] < 0.35 * constant


def test_the_order_of_the_annotated_images_does_not_matter():
    examples, out = faces_of_a_flexible_kind(30), faces_of_a_flexible_kind(5, seed=3)
    shuffled = examples.subset(np.random.default_rng(1).permutation(30))
    one, two = (learn(own, NAMES).apply(out.points, out.confidence)[0] for own in (examples, shuffled))
    np.testing.assert_allclose(one, two, atol=0.02)


def test_an_unseen_landmark_may_lie_anywhere():
    examples, out = faces_of_a_flexible_kind(40), faces_of_a_flexible_kind(6, seed=4)
    named = learn(examples, NAMES)
    elsewhere = np.where(out.confidence[..., None] < 0.1, 999.0, out.points)
    np.testing.assert_array_equal(named.apply(out.points, out.confidence)[0], named.apply(elsewhere, out.confidence)[0])


def test_a_landmark_that_no_annotated_image_shows_is_left_alone_later():
    examples, out = faces_of_a_flexible_kind(40), faces_of_a_flexible_kind(6, seed=4)
    examples.confidence[:, 3] = 0
    named = learn(examples, NAMES)
    sure = out.confidence.copy()
    sure[:, 3] = 0.9
    faint = out.confidence.copy()
    faint[:, 3] = 0
    np.testing.assert_allclose(named.apply(out.points, sure)[0], named.apply(out.points, faint)[0])


def test_without_any_visible_landmark_the_points_are_finite_and_without_confidence():
    named, confidence = learn(faces_of_a_flexible_kind(10), NAMES).apply(np.zeros((1, 12, 2)), np.zeros((1, 12)))
    assert np.isfinite(named).all() and confidence.max() == 0


def test_confidence_of_a_point_is_that_of_landmarks_near_it():
    examples = faces_of_a_flexible_kind(10)
    _, confidence = learn(examples, NAMES).apply(examples.points[:1], np.full((1, 12), 0.6))
    np.testing.assert_allclose(confidence, 0.6, atol=1e-6)


def test_left_out_errors_are_those_of_fitting_without_each_image():
    rng = np.random.default_rng(0)
    features, target = rng.normal(size=(9, 4)), rng.normal(size=(9, 2))
    for ridge, errors in zip((0.5, 20.0), left_out_errors(features, target, (0.5, 20.0)), strict=True):
        for out in range(9):
            rest = np.arange(9) != out
            fitted = Ridge(alpha=ridge).fit(features[rest], target[rest])
            np.testing.assert_allclose(errors[out], target[out] - fitted.predict(features[[out]])[0], atol=1e-8)


def test_a_point_may_be_unknown_on_some_images_but_not_on_all():
    examples = faces_of_a_flexible_kind(30)
    examples.targets[3:20, 2] = np.nan
    assert np.isfinite(learn(examples, NAMES).apply(examples.points, examples.confidence)[0]).all()
    examples.targets[:, 2] = np.nan
    with pytest.raises(UserError, match="c: annotated on no image"):
        learn(examples, NAMES)


def test_the_curve_has_the_counts_that_there_are_images_for():
    examples, out = faces_of_a_flexible_kind(12), faces_of_a_flexible_kind(8, seed=5)
    errors = curve(examples, out, (1, 5, 10, 50), draws=3)
    assert list(errors) == [1, 5, 10] and all(own.shape == (8, 5) for own in errors.values())


@pytest.fixture
def model_url(tmp_path):
    torch.manual_seed(0)
    url = str(tmp_path / "model")
    save_model(url, LandmarkDetector(NETWORK.shape, 6).eval(), network=NETWORK, clusters=list(range(6)), visible=0.0)
    return url


def annotate(folder, count: int) -> str:
    """Drawings whose two annotated points lie at fixed places of the box."""
    folder.mkdir()
    images, annotations = [], []
    for number in range(count):
        drawn = draw(1, number, 96)
        Image.fromarray(drawn.image).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png"})
        annotations.append({"image_id": number, "category_id": 1, "keypoints": [24, 48, 2, 72, 24, 2]})
    categories = [{"id": 1, "name": "thing", "keypoints": ["left end", "right end"]}]
    path = folder / "few.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return str(path)


def test_named_points_appear_in_predictions(model_url, tmp_path, capsys):
    path = annotate(tmp_path / "few", 8)
    job.main([model_url, "--annotations", path])
    said = capsys.readouterr().out
    assert "2 named points learnt from 8 images" in said and "held-out images" in said
    predict_job.main([model_url, str(tmp_path / "few" / "0.png"), "--out", str(tmp_path / "out")])
    coco = json.loads((tmp_path / "out" / "named.json").read_text())
    assert coco["categories"][0]["keypoints"] == ["left end", "right end"]
    keypoints = np.array(coco["annotations"][0]["keypoints"]).reshape(-1, 3)
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"][0]
    landmarks, names = np.array(found["keypoints"]).reshape(-1, 3)[:, :2], load_names(model_url)
    assert names is not None
    wanted, _ = names.on_image(landmarks, np.array(found["keypoint_scores"]), (0.0, 0.0, 96.0, 96.0))
    np.testing.assert_allclose(keypoints[:, :2], wanted, atol=0.01)
    assert (tmp_path / "out" / "named_pictures").is_dir()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path, content: path.unlink(), "can't read the annotations"),
        (lambda path, content: path.write_text("{}"), "not COCO keypoints JSON"),
        (lambda path, content: content["annotations"].clear() or path.write_text(json.dumps(content)), "no annotated"),
        (lambda path, content: (path.parent / "3.png").unlink(), "1 of 8 annotated images are not in"),
        (lambda path, content: (path.parent / "3.png").write_bytes(b"x"), "3.png: unreadable"),
    ],
)
def test_mistakes_are_named(model_url, tmp_path, capsys, damage, said):
    path = tmp_path / "few" / "few.json"
    annotate(tmp_path / "few", 8)
    damage(path, json.loads(path.read_text()))
    with pytest.raises(SystemExit) as exit_:
        job.main([model_url, "--annotations", str(path)])
    assert exit_.value.code == 2 and said in capsys.readouterr().err
    assert load_names(model_url) is None


def test_what_can_not_be_used_is_said_and_folders_of_the_tool_do_not_matter(model_url, tmp_path, capsys):
    path = tmp_path / "few" / "few.json"
    annotate(tmp_path / "few", 8)
    content = json.loads(path.read_text())
    for entry in content["images"]:
        entry["file_name"] = f"images/default/{entry['file_name']}"
    content["annotations"][1]["keypoints"] = [24, 48, 2, 0, 0, 2]
    content["annotations"][2]["keypoints"] = [24, 480, 2, 72, 24, 2]
    content["annotations"] += [{"image_id": 77, "category_id": 1, "keypoints": [24, 48, 2, 72, 24, 2]},
                               {"image_id": 3, "category_id": 2, "keypoints": [1, 1, 2, 2, 2, 2]}]  # fmt: skip
    content["categories"].append({"id": 2, "name": "other", "keypoints": ["one", "two"]})
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        job.main([model_url, "--annotations", str(path)])
    assert "objects of 2 categories: thing (8), other (1)" in capsys.readouterr().err
    job.main([model_url, "--annotations", str(path), "--category", "thing"])
    said = capsys.readouterr().out
    for note in (
        "annotations of images that the file does not list left out: 1 (annotation number 8)",
        "objects of other categories left out: 1",
        "points at 0, 0 or -1, -1 taken as not annotated: 1",
        "points outside their images: 1 (2.png)",
    ):
        assert note in said
    names = load_names(model_url)
    assert names is not None and names.names == ["left end", "right end"]


def test_of_a_partly_unusable_file_naming_and_packing_say_the_same(model_url, tmp_path, capsys):
    annotate(tmp_path / "few", 8)
    rows = [f"{number}.png,5,5,90,90,24,48,72,24," for number in range(8)]
    rows[1] = "x/1.png,0.1,0.1,0.9,0.9,24,48,72,24,"
    rows[2], rows[3] = "2.png,90,90,5,5,24,48,0,0,", "3.png,5,5,,90,24,480,72,24,"
    rows[4], rows[5] = "4.png,80,80,300,300,24,48,72,24,", "5,5,5,90,90,24,48,72,24,"
    header = "image,xmin,ymin,xmax,ymax,nose_x,nose_y,tail_x,tail_y,weather"
    path = tmp_path / "few" / "few.csv"
    path.write_text("\n".join([header, *rows, rows[0], "", ",1,2,3,4"]))

    def notes() -> set[str]:
        return {line for line in capsys.readouterr().out.splitlines() if line.startswith(f"note: {path}")}

    images = ["--images", str(path.parent), "--annotations", str(path)]
    pack_job.main(["folder", *images, "--out", str(tmp_path / "out"), "--test-share", "0"])
    wanted = notes()
    job.main([model_url, *images])
    assert notes() == wanted and len(wanted) == 12
    predict_job.main([model_url, str(path.parent), "--boxes", str(path), "--out", str(tmp_path / "found")])
    assert notes() == wanted


def test_names_without_ending_are_found_beside_other_files_and_two_pictures_are_refused(model_url, tmp_path, capsys):
    path = tmp_path / "few" / "few.json"
    annotate(tmp_path / "few", 8)
    path.write_text(path.read_text().replace(".png", ""))
    (tmp_path / "few" / "3.json").write_text("{}")
    job.main([model_url, "--annotations", str(path)])
    assert "names without ending taken for the picture called so: 8 (0, 1, 2, ...)" in capsys.readouterr().out
    assert load_names(model_url) is not None
    Image.new("RGB", (96, 96)).save(tmp_path / "few" / "3.jpg")
    with pytest.raises(SystemExit):
        job.main([model_url, "--annotations", str(path)])
    assert "3 (3.jpg or 3.png)" in capsys.readouterr().err


def test_points_of_a_table_have_the_names_of_their_columns(model_url, tmp_path):
    annotate(tmp_path / "few", 8)
    lines = [f"{number}.png;24,5;48;72;24,5" for number in range(8)]
    (tmp_path / "few" / "few.csv").write_text("\n".join(["image; nose_x; nose_y; tail_x; tail_y", *lines]))
    job.main([model_url, "--annotations", str(tmp_path / "few" / "few.csv")])
    names = load_names(model_url)
    assert names is not None and names.names == ["nose", "tail"]


@pytest.mark.parametrize(("share", "boxed", "asks"), [(0.3, False, True), (0.3, True, False), (1.0, False, False)])
def test_a_model_that_learnt_from_boxes_misses_them_in_the_annotations(tmp_path, capsys, share, boxed, asks):
    url, detector = str(tmp_path / "model"), LandmarkDetector(NETWORK.shape, 6).eval()
    fields = {"network": NETWORK, "clusters": list(range(6)), "visible": 0.0, "metrics": {"box_share": share}}
    save_model(url, detector, **fields)
    path = Path(annotate(tmp_path / "few", 3))
    if boxed:
        content = json.loads(path.read_text())
        content["annotations"][0]["bbox"] = [10, 10, 70, 70]
        path.write_text(json.dumps(content))
    job.main([url, "--annotations", str(path)])
    assert ("learnt from boxes" in capsys.readouterr().out) == asks


def test_names_of_another_model_are_refused(model_url):
    save_names(model_url, learn(faces_of_a_flexible_kind(10), NAMES, model="0" * 64))
    with pytest.raises(UserError, match="learnt for another model"):
        load_names(model_url)


def test_names_survive_storage(model_url):
    weights = json.loads(open(f"{model_url}/model.json").read())["weights"]
    named, out = learn(faces_of_a_flexible_kind(10), NAMES, weights), faces_of_a_flexible_kind(3, seed=9)
    save_names(model_url, named)
    loaded = load_names(model_url)
    assert loaded is not None and VIEW == 256
    np.testing.assert_array_equal(
        loaded.apply(out.points, out.confidence)[0], named.apply(out.points, out.confidence)[0]
    )
