"""Projects as the tools themselves write them, found on a folder's images."""

import cmath
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import pack as job
from sst.corpora import folder, interop
from sst.corpora.packing import Item
from sst.corpora.projects import read_project
from sst.errors import UserError


def images(root: Path, *names: str, size: tuple[int, int] = (60, 40)) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (len(name), 80, 90)).save(root / name)
    return root


def packed(root: Path, path: Path) -> list[Item]:
    names = folder.pictures_of(str(root), str(path)).names
    return folder.items(str(root), names, str(path), 0.0)


def points(root: Path, path: Path) -> dict[str, list]:
    found = interop.annotated(str(path), root).annotations
    return {row.file: np.round(row.points, 3).tolist() for row in found.rows}


NAN = pytest.approx([np.nan, np.nan], nan_ok=True)

SINGLE = """scorer,Ada,Ada,Ada,Ada
bodyparts,tail,tail,ear,ear
coords,x,y,x,y
"""


def deeplabcut(root: Path, table: str, folder: str = "day1") -> Path:
    place = root / "labeled-data" / folder
    place.mkdir(parents=True, exist_ok=True)
    (place / "CollectedData_Ada.csv").write_text(table)
    (root / "config.yaml").write_text("Task: mice\nscorer: Ada\nbodyparts: [tail, ear]\n")
    return root / "config.yaml"


def test_a_deeplabcut_project_with_old_paths_keeps_its_order_of_points(tmp_path):
    config = deeplabcut(tmp_path, SINGLE + "labeled-data\\day1\\img1.png,1,2,3.5,4\nlabeled-data/day1/img2.png,5,6,,\n")
    images(tmp_path, "labeled-data/day1/img1.png", "labeled-data/day1/img2.png")
    assert read_project(str(config)).names == ["tail", "ear"]
    expected = {"labeled-data/day1/img1.png": [[1, 2], [3.5, 4]], "labeled-data/day1/img2.png": [[5, 6], NAN]}
    assert points(tmp_path, config) == expected
    # The same from the project's folder, from the table alone, and with the folder of the images given.
    assert points(tmp_path, tmp_path) == expected
    place = tmp_path / "labeled-data" / "day1"
    assert list(points(place, place / "CollectedData_Ada.csv")) == ["img1.png", "img2.png"]


def test_points_stay_on_their_image_where_another_is_missing(tmp_path):
    rows = "".join(f"labeled-data/day1/img{n}.png,{n},{n},{n},{n}\n" for n in range(3))
    config = deeplabcut(tmp_path, SINGLE + rows)
    images(tmp_path, "labeled-data/day1/img0.png", "labeled-data/day1/img2.png")
    with pytest.raises(
        UserError, match=r"1 of 3 images named there are not in the folder: labeled-data/day1/img1\.png"
    ):
        points(tmp_path, config)


def test_animals_are_objects_and_points_of_none_are_counted(tmp_path):
    header = "scorer,,,Ada,Ada,Ada,Ada,Ada,Ada\nindividuals,,,m1,m1,m2,m2,single,single\n"
    header += "bodyparts,,,ear,ear,ear,ear,corner,corner\ncoords,,,x,y,x,y,x,y\n"
    config = deeplabcut(
        tmp_path, header + "labeled-data,day1,img1.png,1,2,3,4,9,9\nlabeled-data,day1,img2.png,5,6,,,,\n"
    )
    images(tmp_path, "labeled-data/day1/img1.png", "labeled-data/day1/img2.png")
    found = interop.annotated(str(config), tmp_path).annotations
    assert list(found.point_names) == ["ear"] and [row.points.tolist() for row in found.rows] == [
        [[1, 2]],
        [[3, 4]],
        [[5, 6]],
    ]
    assert any("1 points of no animal" in note for note in found.notes)


def test_pictures_that_deeplabcut_drew_on_are_not_packed(tmp_path, capsys):
    config = deeplabcut(tmp_path, SINGLE + "labeled-data/day1/img1.png,1,2,3,4\n")
    images(tmp_path, "labeled-data/day1/img1.png", "labeled-data/day1_labeled/img1.png", "other/plain.png")
    job.main(["folder", "--images", str(tmp_path), "--annotations", str(config), "--out", f"{tmp_path}-shards"])
    said = capsys.readouterr().out
    assert "1 images in folders *_labeled" in said and "0 skipped" in said
    assert [item.source for item in packed(tmp_path, config)] == [
        "labeled-data/day1/img1.png",
        "other/plain.png",
    ]


def task(image: str, results: list, **fields) -> dict:
    return {"id": 7, "data": {"image": image}, "annotations": [{"result": results, **fields}], "predictions": []}


def keypoint(name: str, x: float, y: float, key: str = "", **fields) -> dict:
    """As in Label Studio's documentation; x and y in percent of an image of 60 x 40 pixels."""
    common = {"original_width": 60, "original_height": 40, "image_rotation": 0, "to_name": "img", "from_name": "kp"}
    value = {"x": x, "y": y, "width": 0.4, "keypointlabels": [name]}
    return {"id": key or name, "type": "keypointlabels", "value": value, **common, **fields}


def rectangle(key: str, x: float, y: float, width: float, height: float) -> dict:
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": ["fish"]}
    return {"id": key, "type": "rectanglelabels", "value": value, "original_width": 60, "original_height": 40}


def label_studio(root: Path, *tasks: dict) -> Path:
    (root / "export.json").write_text(json.dumps(tasks))
    return root / "export.json"


@pytest.mark.parametrize("url", [
    "/data/upload/3/1a2b3c4d-a%20b.png",
    "/data/local-files/?d=pictures/a%20b.png",
    "s3://bucket/pictures/a b.png",
    "http://localhost:8080/data/local-files/?d=pictures/a b.png",
])  # fmt: skip
def test_label_studio_names_images_in_many_ways(url, tmp_path):
    images(tmp_path, "pictures/a b.png")
    path = label_studio(tmp_path, task(url, [keypoint("eye", 50, 25), keypoint("fin", 0, 100)]))
    # 50 % of 60 pixels is the border between the pixels 29 and 30.
    assert points(tmp_path, path) == {"pictures/a b.png": [[29.5, 9.5], [-0.5, 39.5]]}


def test_label_studio_joins_points_to_rectangles(tmp_path):
    images(tmp_path, "a.png")
    results = [
        rectangle("r1", 0, 0, 50, 50), rectangle("r2", 50, 50, 50, 50),
        keypoint("eye", 10, 10, "k1"), keypoint("eye", 60, 60, "k2", parentID="r2"),
        {"type": "relation", "from_id": "r1", "to_id": "k1", "direction": "right"},
    ]  # fmt: skip
    found = interop.annotated(str(label_studio(tmp_path, task("/a.png", results))), tmp_path).annotations
    assert [row.box for row in found.rows] == [(0, 0, 30, 20), (30, 20, 60, 40)]
    np.testing.assert_allclose([row.points for row in found.rows], [[[5.5, 3.5]], [[35.5, 23.5]]])


@pytest.mark.parametrize("degrees", [0, 30, 90, 135, 180, 270, 330, -45, 400])
def test_a_rotated_rectangle_of_label_studio_is_taken_by_what_it_covers_when_upright(tmp_path, degrees):
    """It is turned clockwise about its upper left corner, in pixels, although its sides are percentages."""
    images(tmp_path, "a.png", "b.png")
    turned = rectangle("r1", 50, 50, 20, 10)
    turned["value"]["rotation"] = degrees
    tasks = [task("/a.png", [turned, keypoint("eye", 50, 50)]), task("/b.png", [rectangle("r2", 0, 0, 50, 50)])]
    found = interop.annotated(str(label_studio(tmp_path, *tasks)), tmp_path).annotations
    # Of the rectangle 12 x 4 pixels at (30, 20) every corner is a complex number, which a factor turns.
    turn = cmath.exp(1j * math.radians(degrees))
    corners = [30 + 20j + turn * corner for corner in (0, 12, 4j, 12 + 4j)]
    across, down = [corner.real for corner in corners], [corner.imag for corner in corners]
    assert found.rows[0].box == pytest.approx((min(across), min(down), max(across), max(down)), abs=1e-9)
    assert found.rows[1].box == (0, 0, 30, 20)
    np.testing.assert_allclose(found.rows[0].points, [[29.5, 19.5]])
    said = ("rotated boxes, taken by the upright rectangle around them: 1 (a.png)",)
    assert found.notes[:1] == (said if degrees % 180 else ("objects without points: 1 (b.png)",)), found.notes


def test_rectangles_of_label_studio_need_no_label(tmp_path):
    """`Rectangle` instead of `RectangleLabels`; with `Labels` beside it, the same place comes again as their result."""
    images(tmp_path, "a.png")
    plain = {**rectangle("r1", 50, 50, 20, 10), "type": "rectangle"}
    path = label_studio(tmp_path, task("/a.png", [plain, {**rectangle("r1", 50, 50, 20, 10), "type": "labels"}]))
    found = interop.annotated(str(path), tmp_path).annotations
    assert [row.box for row in found.rows] == [(30, 20, 42, 24)] and found.notes == ()


def test_a_point_of_label_studio_without_a_label_is_named(tmp_path):
    nameless = keypoint("eye", 50, 50)
    del nameless["value"]["keypointlabels"]
    with pytest.raises(UserError, match="task 7: a point without a label; give it one"):
        points(tmp_path, label_studio(tmp_path, task("/a.png", [nameless])))


def test_a_rotated_image_of_label_studio_is_refused(tmp_path):
    path = label_studio(tmp_path, task("/a.png", [keypoint("eye", 50, 50, image_rotation=90)]))
    with pytest.raises(UserError, match="task 7: a rotated image; turn the image itself before annotating"):
        points(tmp_path, path)


def test_only_annotations_that_were_kept_count(tmp_path):
    images(tmp_path, "a.png", "b.png")
    kept = task("/a.png", [keypoint("eye", 50, 50)])
    kept["annotations"].append({"result": [keypoint("eye", 0, 0)], "was_cancelled": True})
    guessed = {
        "id": 8,
        "data": {"image": "/b.png"},
        "annotations": [],
        "predictions": [{"result": [keypoint("eye", 1, 1)]}],
    }
    assert points(tmp_path, label_studio(tmp_path, kept, guessed)) == {"a.png": [[29.5, 19.5]]}
    with pytest.raises(UserError, match="nothing in it was annotated by a person"):
        points(tmp_path, label_studio(tmp_path, guessed))


CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><task><name>mice</name></task></meta>
  <image id="0" name="day1/a.png" width="60" height="40">
    <skeleton label="mouse" source="manual" z_order="0">
      <points label="ear" source="manual" outside="0" occluded="1" points="10.50,20.50"></points>
      <points label="tail" source="manual" outside="1" occluded="0" points="30.00,31.00"></points>
    </skeleton>
    <box label="box" source="manual" occluded="0" xtl="1.00" ytl="2.00" xbr="50.00" ybr="39.00" z_order="0"></box>
  </image>
  <image id="1" name="day1/b.png" width="60" height="40">
    <points label="tail" source="manual" occluded="0" points="1.50,2.50" z_order="0" group_id="1"></points>
    <points label="ear" source="manual" occluded="0" points="3.50,4.50" z_order="0" group_id="2"></points>
    <box label="box" source="manual" occluded="0" xtl="0.00" ytl="0.00" xbr="9.00" ybr="8.00" group_id="2"></box>
  </image>
  <image id="2" name="day1/c.png" width="60" height="40"></image>
</annotations>
"""


def test_cvat_skeletons_points_and_boxes(tmp_path):
    images(tmp_path, "day1/a.png", "day1/b.png", "day1/c.png")
    (tmp_path / "annotations.xml").write_text(CVAT)
    found = interop.annotated(str(tmp_path / "annotations.xml"), tmp_path).annotations
    assert list(found.point_names) == ["ear", "tail"]
    assert [(row.file, row.box) for row in found.rows] == [
        ("day1/a.png", (1, 2, 50, 39)),
        ("day1/b.png", None),
        ("day1/b.png", (0, 0, 9, 8)),
    ]
    nan = [np.nan, np.nan]
    np.testing.assert_allclose([row.points for row in found.rows], [[[10, 20], nan], [nan, [1, 2]], [[3, 4], nan]])
    assert [row.visible.tolist() for row in found.rows] == [[False, False], [False, True], [True, False]]


def cvat(root: Path, *shapes: str) -> Path:
    """An export with one image of 60 x 40 pixels, and these shapes in it."""
    path = images(root, "a.png") / "shapes.xml"
    inside = "".join(shapes)
    path.write_text(f'<annotations><image name="a.png" width="60" height="40">{inside}</image></annotations>')
    return path


@pytest.mark.parametrize(("degrees", "box"), [
    ("0.00", (10, 10, 30, 20)),
    ("90", (15, 5, 25, 25)),
    ("270.00", (15, 5, 25, 25)),
    ("180", (10, 10, 30, 20)),
    ("30", (8.8397, 5.6699, 31.1603, 24.3301)),  # half sides 10 and 5: 10 cos 30 + 5 sin 30, 10 sin 30 + 5 cos 30
])  # fmt: skip
def test_a_rotated_box_is_taken_by_what_it_covers_when_upright(tmp_path, degrees, box):
    path = cvat(tmp_path, f'<box label="b" xtl="10" ytl="10" xbr="30" ybr="20" rotation="{degrees}"/>')
    (row,) = interop.annotated(str(path), tmp_path).annotations.rows
    assert row.box == pytest.approx(box, abs=1e-4)


def test_that_boxes_are_rotated_is_said(tmp_path):
    path = cvat(tmp_path, '<box label="b" xtl="10" ytl="10" xbr="30" ybr="20" rotation="30"/>',
                '<box label="b" xtl="1" ytl="1" xbr="9" ybr="9"/>')  # fmt: skip
    notes = interop.annotated(str(path), tmp_path).annotations.notes
    assert notes == ("rotated boxes, taken by the upright rectangle around them: 1 (a.png)",)


def test_shapes_that_are_not_read_are_counted_and_named(tmp_path):
    ellipse, polygon = '<ellipse label="e" cx="9" cy="9" rx="3" ry="2"/>', '<polygon label="p" points="1,1;2,2;1,2"/>'
    path = cvat(tmp_path, ellipse, polygon, ellipse, '<points label="eye" points="3,4"/>', '<tag label="day"/>')
    assert interop.annotated(str(path), tmp_path).annotations.notes == (
        "shapes of the kind ellipse, which are not read: 2 (a.png)",
        "shapes of the kind polygon, which are not read: 1 (a.png)",
        "shapes of the kind tag, which are not read: 1 (a.png)",
    )
    with pytest.raises(
        UserError, match=r"no points or boxes in it \(shapes of the kind ellipse, which are not read: 1"
    ):
        read_project(str(cvat(tmp_path, ellipse)))
    brush = keypoint("eye", 50, 50, "b")
    brush = {**brush, "type": "brushlabels", "value": {"format": "rle", "rle": [1]}}
    path = label_studio(tmp_path, task("/a.png", [keypoint("eye", 50, 50), brush]))
    assert interop.annotated(str(path), tmp_path).annotations.notes == (
        "shapes of the kind brushlabels, which are not read: 1 (a.png)",
    )


@pytest.mark.parametrize(("shape", "said"), [
    ('<box label="b" xtl="1" ytl="1" xbr="9"/>', r"image a\.png: <box> without ybr"),
    ('<box label="b" xtl="1,5" ytl="1" xbr="9" ybr="9"/>', r"image a\.png: xtl of <box> is '1,5', not a number"),
    ('<box label="b" xtl="1" ytl="1" xbr="9" ybr="9" rotation="a"/>', r"rotation of <box> is 'a', not a number"),
    ('<points label="eye" points="1,5,2,5"/>', r"image a\.png: points are '1,5,2,5'; x,y;x,y;\.\.\. with"),
    ('<points label="eye"/>', r"image a\.png: <points> without points"),
    ('<points points="1,2"/>', r"image a\.png: <points> without label"),
])  # fmt: skip
def test_what_is_wrong_with_a_shape_is_said_with_its_image(tmp_path, shape, said):
    with pytest.raises(UserError, match=said + ".*; export the task anew as 'CVAT for images 1.1'"):
        read_project(str(cvat(tmp_path, shape)))
    (tmp_path / "no.xml").write_text('<annotations><image name="a.png" height="40"/></annotations>')
    with pytest.raises(UserError, match="<image> without width"):
        read_project(str(tmp_path / "no.xml"))


def test_places_follow_an_image_that_was_annotated_at_another_size(tmp_path):
    images(tmp_path, "day1/a.png", "day1/b.png", size=(120, 80))
    (tmp_path / "annotations.xml").write_text(CVAT)
    first = interop.annotated(str(tmp_path / "annotations.xml"), tmp_path).annotations.rows[0]
    # The place (10.5, 20.5) from the corner is (21, 41) at double size, 20.5 and 40.5 from the first pixel's centre.
    np.testing.assert_allclose(first.points[0], [20.5, 40.5])
    assert first.box == (2, 4, 100, 78)
    images(tmp_path, "day1/a.png", size=(60, 60))
    with pytest.raises(UserError, match="annotated at 60 x 40 pixels and has 60 x 60"):
        interop.annotated(str(tmp_path / "annotations.xml"), tmp_path)


def test_an_upright_image_is_compared_although_it_is_stored_lying(tmp_path):
    images(tmp_path, "day1/b.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 60)).save(tmp_path / "day1/a.png", exif=exif)
    (tmp_path / "annotations.xml").write_text(CVAT)
    np.testing.assert_allclose(
        interop.annotated(str(tmp_path / "annotations.xml"), tmp_path).annotations.rows[0].points[0], [10, 20]
    )


def test_slp_files_with_images_inside_need_no_other(tmp_path):
    import sleap_io as sio

    images(tmp_path, "film/a.png", "film/b.png")
    skeleton = sio.Skeleton(["ear", "tail"])
    video = sio.Video.from_filename([str(tmp_path / "film" / name) for name in ("a.png", "b.png")])
    own = [sio.Instance.from_numpy(np.array([[n + 1.0, 2], [np.nan, np.nan]]), skeleton) for n in range(2)]
    guess = sio.PredictedInstance.from_numpy(np.array([[9.0, 9], [9, 9]]), skeleton)
    labels = sio.Labels([sio.LabeledFrame(video, 0, [own[0]]), sio.LabeledFrame(video, 1, [own[1], guess])])
    sio.save_slp(labels, str(tmp_path / "own.slp"), verbose=False)
    assert points(tmp_path, tmp_path / "own.slp") == {"film/a.png": [[1, 2], NAN], "film/b.png": [[2, 2], NAN]}
    labels.save(str(tmp_path / "own.pkg.slp"), embed=True, verbose=False)
    wanted = np.asarray(Image.open(tmp_path / "film" / "b.png"))
    for file in (tmp_path / "film").iterdir():
        file.unlink()
    found = packed(tmp_path, tmp_path / "own.pkg.slp")
    assert [item.load().points[0].tolist() for item in found] == [[1, 2], [2, 2]]
    np.testing.assert_array_equal(found[1].load().image, wanted)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("x.zip", None, "unpack it first"),
    ("CollectedData_Ada.h5", "", r"give DeepLabCut's table as \.csv"),
    ("x.xml", "<annotations><track id='0'/></annotations>", "export the task as 'CVAT for images 1.1'"),
    ("x.xml", "<html></html>", "not CVAT's XML"),
    ("x.xml", "<annotations", "not as CVAT writes it"),
    ("x.json", '[{"image": "/a.png", "kp": []}]', "export the project as JSON, not JSON-MIN"),
    ("x.json", '[{"image_id": 1, "category_id": 1, "keypoints": [1, 2, 2], "score": 0.9}]', "COCO results"),
    ("x.json", "[1, 2]", "not Label Studio's JSON"),
    ("x.json", "[]", "an empty list, so neither"),
    ("config.yaml", "", "no DeepLabCut project: config.yaml is empty"),
    ("data.yaml", "names: [a]\nnc: 1", r"no DeepLabCut project: data\.yaml has no scorer, but names, nc"),
    ("config.yaml", "- a", "no DeepLabCut project: config.yaml has no scorer"),
    ("config.yaml", "scorer: [", r"config\.yaml: not YAML \(line 1"),
    ("config.yaml", "scorer: Ada\n\tTask: x", r"config\.yaml: not YAML \(line 2"),
    ("CollectedData_Ada.csv", "scorer,Ada\nbodyparts,nose\n", "no line 'coords'"),
    ("CollectedData_Ada.csv", SINGLE + 'a.png,"1,5",2,3,4\n', r"a\.png: tail: '1,5' is not a number"),
    ("x.slp", "no HDF5", "not as SLEAP writes it"),
    ("x.nwb", "no HDF5", "not as NWB writes it"),
    ("missing.slp", None, "no such file"),
    ("config.yaml", "scorer: Ada", r"no labeled-data/\*/CollectedData_Ada\.csv"),
])  # fmt: skip
def test_what_can_not_be_read_is_refused_with_the_remedy(name, content, message, tmp_path):
    if name == "x.zip":
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            file.writestr("annotations.xml", CVAT)
    elif content is not None:
        (tmp_path / name).write_text(content)
    assert interop.is_project(str(tmp_path / name))
    with pytest.raises(UserError, match=message):
        read_project(str(tmp_path / name))


def test_our_own_forms_are_no_projects(tmp_path):
    (tmp_path / "a.csv").write_text("file,x0,y0\na.png,1,2\n")
    (tmp_path / "a.json").write_text('{"images": [], "annotations": []}')
    assert not any(interop.is_project(str(tmp_path / name)) for name in ("a.csv", "a.json", "no.csv", "no.json"))


@pytest.mark.parametrize(("wanted", "present", "expected"), [
    ({"/x/a/1.png"}, ["1.png", "a/1.png", "b/1.png"], {"/x/a/1.png": "a/1.png"}),
    ({"/x/a/1.png"}, ["1.png", "b/1.png"], {"/x/a/1.png": "1.png"}),
    ({"a/1.png", "b/1.png"}, ["p/a/1.png", "p/b/1.png"], {"a/1.png": "p/a/1.png", "b/1.png": "p/b/1.png"}),
    ({"a/1.png"}, ["b/1.png", "c/1.png"], "may be b/1.png or c/1.png"),
    ({"a/1.png", "b/1.png"}, ["1.png"], "would both be 1.png"),
])  # fmt: skip
def test_images_are_found_by_the_end_of_their_path(wanted, present, expected):
    if isinstance(expected, dict):
        assert interop.matched("p", wanted, present) == expected
    else:
        with pytest.raises(UserError, match=expected):
            interop.matched("p", wanted, present)
