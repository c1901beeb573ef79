"""Annotation files as tools write them: what is read, what is said, what is refused."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from sst.corpora.annotation_files import read_annotations
from sst.corpora.annotations import Annotations, match_names, place_annotations, scale_of
from sst.corpora.masks import mask_box
from sst.corpora.pictures import picture_frame
from sst.errors import UserError

BOXES = [(49.34, 90.27, 167.62, 163.62), (52.96, 91.68, 168.85, 157.02), (37.45, 59.5, 100.1, 119.0),
         (22.7, 78.3, 106.6, 110.6), (23.15, 82.2, 102.7, 106.4), (23.15, 65.4, 102.7, 100.8),
         (19.7, 57.2, 106.6, 106.4), (17.75, 83.2, 97.5, 92.4), (60.9, 70.06, 134.95, 149.02),
         (57.39, 60.29, 134.95, 145.33)]  # fmt: skip
"""x, y, width and height of one object in each of ten pictures."""
CORNERS = [(x, y, x + w, y + h) for x, y, w, h in BOXES]
NAMES = [f"p{n}.jpg" for n in range(10)]
POINTS = [[x + 10, y + 20, 2, x + 60, y + 30, 2] for x, y, _, _ in BOXES]


def pictures(root: Path, size: tuple[int, int], names: list[str] = NAMES) -> dict[str, Path]:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "grey").save(path, "JPEG")
    return {name: root / name for name in names}


@pytest.fixture
def squares(tmp_path):
    return pictures(tmp_path / "pics", (256, 256))


@pytest.fixture
def faces(tmp_path):
    return pictures(tmp_path / "pics", (250, 300))


def table(header: str, rows: list[tuple[float, ...]], names: list[str] = NAMES, separator: str = ",") -> str:
    lines = [separator.join([name, *map(str, row)]) for name, row in zip(names, rows, strict=True)]
    return "\n".join([header, *lines])


def placed(path: Path, text: str, files: dict[str, Path], category: str | None = None) -> Annotations:
    path.write_text(text)
    return place_annotations(read_annotations(str(path), category), files, "here")


def boxes_of(found: Annotations) -> list[tuple[float, ...] | None]:
    return [None if row.box is None else tuple(round(v, 4) for v in row.box) for row in found.rows]


WANTED = [tuple(round(v, 4) for v in box) for box in CORNERS]


@pytest.mark.parametrize(
    "header",
    [
        "file,box_x0,box_y0,box_x1,box_y1",
        "file, box_x0, box_y0, box_x1, box_y1",
        "filename,xmin,ymin,xmax,ymax",
        "image_path,x1,y1,x2,y2",
        "Image,Left,Top,Right,Bottom",
        "image_name,bbox_x1,bbox_y1,bbox_x2,bbox_y2",
        "path,X_Min,Y_Min,X_Max,Y_Max",
        "file;xmin;ymin;xmax;ymax",
        "file\txmin\tymin\txmax\tymax",
    ],
)
def test_corners_are_understood_under_the_names_that_tools_give_them(tmp_path, squares, header):
    separator = next(each for each in ";\t," if each in header)
    found = placed(tmp_path / "a.csv", table(header, CORNERS, separator=separator), squares)
    assert boxes_of(found) == WANTED and found.notes == ()


@pytest.mark.parametrize(
    "header",
    ["file,x,y,width,height", "file,x0,y0,w,h", "file,x_1,y_1,width,height", "file,bbox_x,bbox_y,bbox_w,bbox_h",
     "file,x,y,w,h", "file,left,top,width,height", "file,box_x0,box_y0,box_w,box_h"],
)  # fmt: skip
def test_a_corner_with_width_and_height_is_understood(tmp_path, squares, header):
    assert boxes_of(placed(tmp_path / "a.csv", table(header, BOXES), squares)) == WANTED


def test_a_centre_with_width_and_height_is_understood(tmp_path, squares):
    rows = [(x + w / 2, y + h / 2, w, h) for x, y, w, h in BOXES]
    for header in ("file,cx,cy,w,h", "file,x_center,y_center,width,height"):
        assert boxes_of(placed(tmp_path / "a.csv", table(header, rows), squares)) == WANTED


def test_blanks_and_commas_of_other_countries_do_not_count(tmp_path, squares):
    text = table("file , xmin, ymin, xmax, ymax", CORNERS).replace(",", " , ")
    assert boxes_of(placed(tmp_path / "a.csv", text, squares)) == WANTED
    text = table("file;xmin;ymin;xmax;ymax", CORNERS, separator=";").replace(".", ",").replace(",jpg", ".jpg")
    assert boxes_of(placed(tmp_path / "a.csv", text, squares)) == WANTED


def test_a_table_as_excel_saves_it(tmp_path, squares):
    unicode_text = table("file\txmin\tymin\txmax\tymax", CORNERS, separator="\t").encode("utf-16")
    (tmp_path / "a.txt").write_bytes(unicode_text)
    found = place_annotations(read_annotations(str(tmp_path / "a.txt")), squares, "here")
    assert boxes_of(found) == WANTED
    text = "sep=;\n" + table("file;xmin;ymin;xmax;ymax", CORNERS, separator=";")
    assert boxes_of(placed(tmp_path / "a.csv", text, squares)) == WANTED


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("file,a,b,c,d", "no column of boxes or points; its columns are file, a, b, c, d; understood are file; box_x0"),
        ("file,xmin,ymin,xmax,split", "the columns xmin, ymin, xmax are no whole box"),
        ("name,xmin,ymin,xmax,ymax", "no column 'file'"),
        ("file,x0,y0,x2,y2", "columns of points are missing: x1, y1"),
        ("file,x_0,x0,y0,b", "the columns x_0 and x0 are called alike"),
    ],
)
def test_a_table_that_is_not_understood_is_refused_with_what_is(tmp_path, squares, header, said):
    with pytest.raises(UserError, match=said):
        placed(tmp_path / "a.csv", table(header, CORNERS), squares)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([tuple(v / 256 for v in box) for box in CORNERS], "10 of 10 boxes can't be meant so: boxes in shares"),
        ([(c, d, a, b) for a, b, c, d in CORNERS], "boxes whose second corner lies left of or above the first: 10"),
        (
            [tuple(v * 2 for v in box) for box in CORNERS],
            "lies outside their images|boxes outside their",
        ),
        (BOXES, "look like a corner, width and height"),
    ],
)
def test_a_file_most_of_whose_boxes_are_unusable_is_refused(tmp_path, squares, rows, said):
    with pytest.raises(UserError, match=said):
        placed(tmp_path / "a.csv", table("file,box_x0,box_y0,box_x1,box_y1", rows), squares)


def test_a_few_unusable_boxes_are_counted_and_named(tmp_path, squares):
    rows: list = list(CORNERS)
    rows[1], rows[2], rows[3] = (0.1, 0.2, 0.8, 0.9), (200, 200, 100, 100), ("", 1, 50, 60)
    found = placed(tmp_path / "a.csv", table("file,xmin,ymin,xmax,ymax", rows), squares)
    assert boxes_of(found) == [WANTED[0], None, None, None, *WANTED[4:]]
    assert found.notes == (
        "boxes in shares of the image's sides instead of pixels: 1 (p1.jpg)",
        "boxes whose second corner lies left of or above the first: 1 (p2.jpg)",
        "boxes with a missing or infinite number: 1 (p3.jpg)",
    )


def test_corners_whose_columns_say_so_are_never_doubted(tmp_path, squares):
    text = table("file,xmin,ymin,xmax,ymax", BOXES)
    assert boxes_of(placed(tmp_path / "a.csv", text, squares)) == [tuple(box) for box in BOXES]


def test_an_image_may_have_several_lines_and_a_line_twice_counts_once(tmp_path, squares):
    text = "file,xmin,ymin,xmax,ymax\np0.jpg,1,2,30,40\np0.jpg,50,60,90,99\np0.jpg,1,2,30,40\np1.jpg,5,5,9,9\n"
    found = placed(tmp_path / "a.csv", text, squares)
    assert [(row.file, row.box) for row in found.rows] == [
        ("p0.jpg", (1, 2, 30, 40)), ("p0.jpg", (50, 60, 90, 99)), ("p1.jpg", (5, 5, 9, 9)),
    ]  # fmt: skip
    assert found.notes == (
        "objects given twice, used once: 1 (p0.jpg)",
        "images without an object in it, seen whole: 8 (p2.jpg, p3.jpg, p4.jpg, ...)",
    )


def test_points_that_stand_for_nothing_are_no_places(tmp_path, squares):
    text = "file,x0,y0,x1,y1,x2,y2\np0.jpg,-1,-1,0,0,30,40\np1.jpg,0,7,nan,,NA,NA\n"
    first, second = placed(tmp_path / "a.csv", text, squares).rows
    np.testing.assert_array_equal(first.points, [[math.nan] * 2, [math.nan] * 2, [30, 40]])
    np.testing.assert_array_equal(np.isfinite(second.points).all(1), [True, False, False])
    assert (
        "points at 0, 0 or -1, -1 taken as not annotated: 2 (p0.jpg)" in read_annotations(str(tmp_path / "a.csv")).notes
    )


def test_a_column_says_which_points_are_annotated_and_visible(tmp_path, squares):
    (row,) = placed(tmp_path / "a.csv", "file,x0,y0,v0,x1,y1,v1,x2,y2,v2\np0.jpg,5,6,0,7,8,1,9,9,2\n", squares).rows
    np.testing.assert_array_equal(row.points, [[math.nan] * 2, [7, 8], [9, 9]])
    assert row.visible is not None and row.visible.tolist() == [False, False, True]
    text = "file,nose_x,nose_y,nose_visible,left ear_x,left ear_y,left ear_visible\np0.jpg,5,6,1,7,8,0\n"
    found = placed(tmp_path / "a.csv", text, squares)
    assert found.point_names == ("nose", "left ear")
    np.testing.assert_array_equal(found.rows[0].points, [[5, 6], [math.nan] * 2])
    assert found.rows[0].visible is not None and found.rows[0].visible.tolist() == [True, False]


def test_points_counted_from_one_are_points_too(tmp_path, squares):
    (row,) = placed(tmp_path / "a.csv", "file,x1,y1,x2,y2,x3,y3\np0.jpg,5,6,7,8,9,9\n", squares).rows
    np.testing.assert_array_equal(row.points, [[5, 6], [7, 8], [9, 9]])
    assert row.box is None


def test_points_that_can_not_be_are_counted_and_most_of_them_refused(tmp_path, squares):
    text = "file,x0,y0,x1,y1,x2,y2\np0.jpg,300,40,9,9,30,40\n"
    assert "points outside their images: 1 (p0.jpg)" in placed(tmp_path / "a.csv", text, squares).notes
    with pytest.raises(UserError, match="3 of 3 points can't be meant so: points in shares"):
        placed(tmp_path / "a.csv", "file,x0,y0,x1,y1,x2,y2\np0.jpg,0.3,0.4,0.9,0.9,0.2,0.4\n", squares)
    with pytest.raises(UserError, match="2 of 3 points can't be meant so: points outside their images: 2"):
        placed(tmp_path / "a.csv", "file,x0,y0,x1,y1,x2,y2\np0.jpg,300,40,900,900,30,40\n", squares)


def test_width_and_height_beside_corners_are_the_images(tmp_path, squares):
    rows = [(512, 512, *(2 * v for v in box)) for box in CORNERS]
    found = placed(tmp_path / "a.csv", table("filename,width,height,xmin,ymin,xmax,ymax", rows), squares)
    assert boxes_of(found) == WANTED and "annotated at another size (512 x 512, ...) were scaled: 10" in found.notes[0]
    own = [(*box, box[2] - box[0], box[3] - box[1]) for box in CORNERS]
    assert boxes_of(placed(tmp_path / "a.csv", table("file,xmin,ymin,xmax,ymax,w,h", own), squares)) == WANTED


def test_columns_without_use_are_named(tmp_path, squares):
    (tmp_path / "a.csv").write_text("file,xmin,ymin,xmax,ymax,weather\np0.jpg,1,1,50,50,rain\n")
    assert read_annotations(str(tmp_path / "a.csv")).notes == ("columns not used: weather",)


def test_lines_that_are_cut_or_too_long_are_not_misread(tmp_path, squares):
    found = placed(tmp_path / "a.csv", "file,xmin,ymin,xmax,ymax\np0.jpg,1,1,50,50\n,1,1,9,9\np1.jpg,1,1,50\n", squares)
    assert boxes_of(found) == [(1, 1, 50, 50), None]
    assert "lines without a file's name left out: 1 (line 3)" in found.notes
    assert "lines with fewer cells than the header: 1 (line 4)" in found.notes
    with pytest.raises(UserError, match="line 2: 6 cells, and the header has 5"):
        placed(tmp_path / "a.csv", "file,xmin,ymin,xmax,ymax\np0.jpg,1,5,1,50,50\n", squares)


# COCO


def coco() -> dict:
    return {
        "images": [{"id": 100 + 7 * n, "file_name": name, "width": 250, "height": 300} for n, name in enumerate(NAMES)],
        "annotations": [
            {"id": n + 1, "image_id": 100 + 7 * n, "category_id": 1, "iscrowd": 0, "bbox": list(BOXES[n]),
             "keypoints": POINTS[n]} for n in range(10)
        ],
        "categories": [{"id": 1, "name": "face", "keypoints": ["right", "left"]},
                       {"id": 2, "name": "hand", "keypoints": ["thumb", "palm"]}],
    }  # fmt: skip


def changed(change) -> str:
    content = copy.deepcopy(coco())
    change(content)
    return json.dumps(content)


def test_coco_as_it_should_be(tmp_path, faces):
    found = placed(tmp_path / "a.json", changed(lambda c: None), faces)
    assert boxes_of(found) == WANTED and found.notes == () and found.point_names == ("right", "left")
    assert found.image_ids == {name: 100 + 7 * n for n, name in enumerate(NAMES)}
    np.testing.assert_allclose(found.rows[2].points, np.array(POINTS[2]).reshape(-1, 3)[:, :2])


@pytest.mark.parametrize("nothing", [None, [], [0, 0, 0, 0], [-1, -1, -1, -1]])
def test_a_box_that_is_not_there_is_not_there(tmp_path, faces, nothing):
    found = placed(tmp_path / "a.json", changed(lambda c: c["annotations"][2].update(bbox=nothing)), faces)
    assert found.notes == ("objects without a box, seen whole: 1 (p2.jpg)",)
    assert boxes_of(found) == [*WANTED[:2], None, *WANTED[3:]]
    assert found.rows[2].points is not None


@pytest.mark.parametrize("nothing", [None, []])
def test_an_annotation_without_keypoints_is_not_annotated(tmp_path, faces, nothing):
    found = placed(tmp_path / "a.json", changed(lambda c: c["annotations"][2].update(keypoints=nothing)), faces)
    assert boxes_of(found) == WANTED and found.rows[2].points is None and found.rows[3].points is not None
    assert found.notes == ("objects without points: 1 (p2.jpg)",)


def test_a_track_outside_of_the_picture_is_no_object(tmp_path, faces):
    nothing = {"bbox": [0, 0, 0, 0], "keypoints": [], "num_keypoints": 0}
    found = placed(tmp_path / "a.json", changed(lambda c: c["annotations"][3].update(nothing)), faces)
    assert [row.file for row in found.rows] == NAMES[:3] + NAMES[4:] and boxes_of(found) == WANTED[:3] + WANTED[4:]
    assert found.notes == (
        "objects without box and points left out: 1 (annotation 4)",
        "images without an object in it, seen whole: 1 (p3.jpg)",
    )


@pytest.mark.parametrize("nothing", [None, [], [0, 0, 0, 0]])
@pytest.mark.parametrize("nested", [True, False])
def test_an_outline_without_a_box_gives_the_box_around_it(tmp_path, faces, nothing, nested):
    """In two parts, as COCO has objects that something covers."""
    x, y, width, height = BOXES[2]
    parts: list = [[x, y + 9, x + 20, y, x + 20, y + 30], [x + 30, y + height, x + width, y + 40, x + 30, y + 20]]

    def change(content):
        content["annotations"][2].update(bbox=nothing, segmentation=parts if nested else [*parts[0], *parts[1]])

    found = placed(tmp_path / "a.json", changed(change), faces)
    assert boxes_of(found) == WANTED
    assert found.notes == ("boxes taken from the outline, as there is no bbox: 1 (annotation 3)",)


@pytest.mark.parametrize("mask", [{"size": [300, 250], "counts": "abc"}, {"size": [300, 250], "counts": [5, 9]}])
def test_damaged_masks_without_a_box_are_counted_and_most_of_them_refused(tmp_path, faces, mask):
    def change(content, count, *removed):
        for entry in content["annotations"][:count]:
            entry["segmentation"] = mask
            for name in removed:
                del entry[name]

    said = (
        "masks (RLE) that are damaged or of another size than the image, without a bbox: 2 (annotation 1, annotation 2)"
    )
    found = placed(tmp_path / "a.json", changed(lambda c: change(c, 2, "bbox", "keypoints")), faces)
    assert said in found.notes and boxes_of(found) == WANTED[2:]
    found = placed(tmp_path / "a.json", changed(lambda c: change(c, 2, "bbox")), faces)
    assert said in found.notes and found.rows[0].points is not None
    assert placed(tmp_path / "a.json", changed(lambda c: change(c, 10)), faces).notes == ()
    with pytest.raises(UserError, match=r"10 of 10 objects have only a mask \(RLE\).*; give each a bbox"):
        placed(tmp_path / "a.json", changed(lambda c: change(c, 10, "bbox", "keypoints")), faces)


@pytest.mark.parametrize("as_text", [True, False])
def test_a_mask_without_a_box_gives_the_box_around_it(tmp_path, faces, as_text):
    masks, wanted = {}, list(WANTED)
    for number in (0, 2):
        mask = np.zeros((300, 250), bool)
        x, y, width, height = (int(side) for side in BOXES[number])
        mask[y : y + height // 2, x : x + width], mask[y : y + height, x + 5 : x + 9] = True, True
        wanted[number] = (x, y, x + width, y + height)
        masks[number] = {"size": [300, 250], "counts": text_of(runs_of(mask)) if as_text else runs_of(mask)}

    def change(content):
        for number, mask in masks.items():
            content["annotations"][number].update(bbox=None, segmentation=mask)

    found = placed(tmp_path / "a.json", changed(change), faces)
    assert boxes_of(found) == wanted
    assert found.notes == ("boxes taken from the mask (RLE), as there is no bbox: 2 (annotation 1, annotation 3)",)


def runs_of(mask: np.ndarray) -> list[int]:
    """Run lengths by a plain loop over the columns."""
    runs, last = [0], False
    for value in mask.ravel(order="F").tolist():
        if value is not last:
            runs.append(0)
        runs[-1], last = runs[-1] + 1, value
    return runs


def text_of(runs: list[int]) -> str:
    """As cocoapi's rleToString writes it."""
    text = ""
    for number, run in enumerate(runs):
        rest = run - (runs[number - 2] if number > 2 else 0)
        more = True
        while more:
            bits, rest = rest & 31, rest >> 5
            more = rest != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
    return text


@given(st.integers(1, 7), st.integers(1, 7), st.data())
def test_the_box_of_a_mask_is_that_of_its_pixels(height, width, data):
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width)))
    mask = mask.reshape(height, width)
    wanted = None
    if mask.any():
        rows, columns = np.nonzero(mask)
        wanted = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert mask_box((height, width), runs_of(mask)) == wanted
    assert mask_box((height, width), text_of(runs_of(mask))) == wanted


@pytest.mark.parametrize(("size", "text", "box"), [
    ((2, 2), "04", (0, 0, 2, 2)),  # 0, 4
    ((2, 2), "4", None),
    ((3, 3), "324", (1, 0, 2, 2)),  # 3, 2, 4
    ((10, 10), "X15g1", (4, 0, 5, 5)),  # 40 = 8 + 32, 5, 55 = 23 + 32
    ((3, 3), "123OO", (0, 0, 3, 3)),  # 1, 2, 3, 2 - 1, 3 - 1
])  # fmt: skip
def test_masks_written_by_hand(size, text, box):
    assert mask_box(size, text) == box


@pytest.mark.parametrize(
    "counts", ["", "3", "05", "0X", "0 4", "0é", "o" * 1_000_000, [], [0, 5], [5, -1], [2.5, None]]
)
def test_counts_that_are_no_mask_of_this_size(counts):
    with pytest.raises((ValueError, TypeError)):
        mask_box((2, 2), counts)


def test_a_rotated_box_of_coco_is_taken_by_what_it_covers(tmp_path, faces):
    """As CVAT exports one: the box before it was turned, and by how much."""
    turned = {"bbox": [100, 100, 20, 10], "attributes": {"occluded": False, "rotation": 90.0}}
    found = placed(tmp_path / "a.json", changed(lambda c: c["annotations"][0].update(turned)), faces)
    assert boxes_of(found) == [(105, 95, 115, 115), *WANTED[1:]]
    assert found.notes == ("rotated boxes, taken by the upright rectangle around them: 1 (annotation 1)",)


@pytest.mark.parametrize("own", [None, [], ["red"], {"rotation": "clockwise"}, {"rotation": None}, {"rotation": 0}])
def test_attributes_of_ones_own_turn_no_box(tmp_path, faces, own):
    found = placed(tmp_path / "a.json", changed(lambda c: c["annotations"][0].update(attributes=own)), faces)
    assert boxes_of(found) == WANTED and found.notes == ()


def test_ids_may_be_text_in_one_place_and_numbers_in_another(tmp_path, faces):
    def change(content):
        for entry in content["annotations"]:
            entry["image_id"], entry["category_id"] = str(entry["image_id"]), "1"

    found = placed(tmp_path / "a.json", changed(change), faces)
    assert boxes_of(found) == WANTED and found.image_ids["p1.jpg"] == 107 and found.point_names == ("right", "left")


def test_an_annotation_of_no_image_is_counted_and_most_of_them_refused(tmp_path, faces):
    stray = {"id": 1000, "image_id": 4242, "category_id": 1, "bbox": [1, 1, 9, 9]}
    found = placed(tmp_path / "a.json", changed(lambda c: c["annotations"].append(stray)), faces)
    assert boxes_of(found) == WANTED
    assert found.notes == ("annotations of images that the file does not list left out: 1 (annotation 1000)",)
    with pytest.raises(UserError, match="10 of 10 annotations are of images that it does not list"):
        placed(tmp_path / "a.json", changed(lambda c: [a.update(image_id=5) for a in c["annotations"]]), faces)


def test_an_image_id_given_twice_is_refused(tmp_path, faces):
    with pytest.raises(UserError, match="the image id 100 is given to p0.jpg and to p5.jpg"):
        placed(tmp_path / "a.json", changed(lambda c: c["images"][5].update(id=100)), faces)


def test_an_image_listed_twice_is_said(tmp_path, faces):
    again = {"id": 5, "file_name": "p3.jpg", "width": 250, "height": 300}
    found = placed(tmp_path / "a.json", changed(lambda c: c["images"].append(again)), faces)
    assert found.notes == ("images listed under several ids, the first kept: 1 (p3.jpg (121, 5))",)
    assert found.image_ids["p3.jpg"] == 121


@pytest.mark.parametrize("points", [True, False])
def test_of_several_categories_one_has_to_be_chosen(tmp_path, faces, points):
    def change(content):
        content["annotations"].append({"id": 99, "image_id": 100, "category_id": 2, "bbox": [5, 5, 50, 50],
                                       "keypoints": [9, 9, 2, 8, 8, 2]})  # fmt: skip
        for entry in () if points else content["annotations"]:
            del entry["keypoints"]

    text = changed(change)
    with pytest.raises(UserError, match=r"objects of 2 categories: face \(10\), hand \(1\); choose one by --category"):
        placed(tmp_path / "a.json", text, faces)
    found = placed(tmp_path / "a.json", text, faces, "face")
    assert boxes_of(found) == WANTED and found.notes == ("objects of other categories left out: 1 (p0.jpg)",)
    hand = placed(tmp_path / "a.json", text, faces, "2")
    assert boxes_of(hand) == [(5, 5, 55, 55)]
    assert hand.point_names == (("thumb", "palm") if points else ())
    with pytest.raises(UserError, match="no object of the category 'foot'; there are face"):
        placed(tmp_path / "a.json", text, faces, "foot")
    if points:
        with pytest.raises(UserError, match="call their points differently"):
            placed(tmp_path / "a.json", text, faces, "all")
    else:
        assert len(placed(tmp_path / "a.json", text, faces, "all").rows) == 11


def test_annotated_at_double_size_is_scaled_and_at_other_proportions_refused(tmp_path, faces):
    def double(content):
        for image in content["images"]:
            image.update(width=500, height=600)
        for entry in content["annotations"]:
            entry["bbox"] = [2 * v for v in entry["bbox"]]
            entry["keypoints"] = [v if n % 3 == 2 else 2 * v for n, v in enumerate(entry["keypoints"])]

    found = placed(tmp_path / "a.json", changed(double), faces)
    assert boxes_of(found) == WANTED
    np.testing.assert_allclose(found.rows[4].points, np.array(POINTS[4]).reshape(-1, 3)[:, :2])
    assert found.notes == (
        "objects annotated at another size (500 x 600, ...) were scaled: 10 (p0.jpg, p1.jpg, p2.jpg, ...)",
    )
    with pytest.raises(
        UserError, match="1 pictures have other proportions .* p6.jpg is 250 x 300, the file says 300 x 300"
    ):
        placed(tmp_path / "a.json", changed(lambda c: c["images"][6].update(width=300)), faces)


@given(st.integers(8, 3000), st.integers(8, 3000), st.floats(0.05, 8))
def test_a_picture_resized_and_rounded_has_the_same_proportions(width, height, factor):
    resized = max(1, round(width * factor)), max(1, round(height * factor))
    if min(resized) >= 8:
        scale = scale_of(resized, width, height)
        assert scale is not None and scale == pytest.approx((width / resized[0], height / resized[1]))


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_coordinates_of_a_picture_as_stored_are_turned_with_it(tmp_path, orientation):
    """One bright pixel, found again where Pillow's own turning puts it."""
    stored = np.zeros((40, 60), np.uint8)
    stored[7, 22] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "p0.png", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "p0.png")))
    (y,), (x,) = np.nonzero(upright)
    frame = picture_frame(tmp_path / "p0.png")
    assert frame is not None and (frame.width, frame.height) == upright.shape[::-1]
    if orientation < 5:
        return  # sides alone do not tell these from upright ones
    content = {
        "images": [{"id": 1, "file_name": "p0.png", "width": 60, "height": 40}],
        "annotations": [{"id": 1, "image_id": 1, "bbox": [20, 5, 5, 5], "keypoints": [22, 7, 2, 30, 30, 2]}],
    }
    (row,) = placed(tmp_path / "a.json", json.dumps(content), {"p0.png": tmp_path / "p0.png"}).rows
    assert row.points is not None and row.points[0].tolist() == [x, y]
    assert row.box is not None and row.box[2] - row.box[0] == 5 == row.box[3] - row.box[1]
    assert (row.box[0] + row.box[2]) / 2 == x + 0.5 and (row.box[1] + row.box[3]) / 2 == y + 0.5
    content["annotations"][0]["keypoints"][4] = 55  # below the picture as stored, so given in the upright one
    with pytest.raises(UserError, match="40 x 60 when upright, as its EXIF says, the file says 60 x 40"):
        placed(tmp_path / "a.json", json.dumps(content), {"p0.png": tmp_path / "p0.png"})


# Names


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("a/1.jpg", "a/1.jpg"), ("./a/1.jpg", "a/1.jpg"), ("a\\1.jpg", "a/1.jpg"), ("images/a/1.jpg", "a/1.jpg"),
        ("C:\\data\\a\\1.jpg", "a/1.jpg"), ("/data/set/b/1.jpg", "b/1.jpg"), ("2.jpg", "b/2.jpg"),
        ("caf\u00e9.jpg", "cafe\u0301.jpg"), ("1.jpg", None), ("c/1.jpg", None), ("3.jpg", None),
    ],
)  # fmt: skip
def test_a_name_means_the_one_picture_that_is_called_so(name, wanted):
    there = ["a/1.jpg", "b/1.jpg", "b/2.jpg", "cafe\u0301.jpg"]
    assert match_names([name], there).get(name) == wanted


def test_a_picture_is_first_the_one_that_is_called_exactly_so():
    assert match_names(["old/1.jpg", "1.jpg", "new/2.jpg"], ["1.jpg", "2.jpg"]) == {
        "1.jpg": "1.jpg", "new/2.jpg": "2.jpg",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("p0", "p0.jpg"), ("set/p0", "p0.jpg"), ("b/1", "b/1.png"), ("1", None), ("frame.0001", "frame.0001.jpg"),
     ("frame", None), ("p0.png", None), ("x/2.jpg", "2.jpg"), ("cafe\u0301", "caf\u00e9.jpg")],
)  # fmt: skip
def test_a_name_without_ending_means_the_one_picture_that_is_called_so(name, wanted):
    there = ["p0.jpg", "a/1.jpg", "b/1.png", "2.jpg", "2.jpg.png", "frame.0001.jpg", "caf\u00e9.jpg"]
    assert match_names([name], there).get(name) == wanted


def test_names_without_ending_are_used_and_it_is_said(tmp_path, squares):
    names = [name.removesuffix(".jpg") for name in NAMES]
    found = placed(tmp_path / "a.csv", table("image_id,xmin,ymin,xmax,ymax", CORNERS, names), squares)
    assert boxes_of(found) == WANTED and [row.file for row in found.rows] == NAMES
    assert found.notes == ("names without ending taken for the picture called so: 10 (p0, p1, p2, ...)",)


@pytest.mark.parametrize("name", ["p0", "x/p0"])
def test_a_name_that_may_be_one_of_two_pictures_is_refused_with_both(tmp_path, name):
    files = pictures(tmp_path / "pics", (256, 256), ["p0.jpg", "p0.png", "p1.jpg"])
    with pytest.raises(UserError, match=f"1 of 2 files .*: {name} \\(p0.jpg or p0.png\\)"):
        placed(tmp_path / "a.csv", f"file,xmin,ymin,xmax,ymax\n{name},1,1,9,9\np1,1,1,9,9\n", files)
    files = pictures(tmp_path / "other", (256, 256), ["a/1.jpg", "b/1.jpg"])
    with pytest.raises(UserError, match=r"1 of 1 files .*: 1.jpg \(a/1.jpg or b/1.jpg\)"):
        placed(tmp_path / "a.csv", "file,xmin,ymin,xmax,ymax\n1.jpg,1,1,9,9\n", files)


def test_two_names_of_one_picture_are_refused(tmp_path, squares):
    with pytest.raises(UserError, match=r"a/p0.jpg and b/p0.jpg are both the picture p0.jpg"):
        placed(tmp_path / "a.csv", "file,xmin,ymin,xmax,ymax\na/p0.jpg,1,1,9,9\nb/p0.jpg,1,1,9,9\n", squares)


# What the readers were not made for at first


@pytest.mark.parametrize("header", ["file,noseX,noseY,tailX,tailY", "file,x_nose,y_nose,x_tail,y_tail",
                                    "Image,nose x,nose y,tail x,tail y"])  # fmt: skip
def test_named_points_in_other_spellings(tmp_path, squares, header):
    found = placed(tmp_path / "a.csv", f"{header}\np0.jpg,10,20,30,40\n", squares)
    assert found.point_names == ("nose", "tail")
    np.testing.assert_array_equal(found.rows[0].points, [[10, 20], [30, 40]])


def test_a_size_of_the_image_beside_that_of_the_box(tmp_path, squares):
    rows = [(512, 512, *(2 * v for v in box)) for box in BOXES]
    found = placed(tmp_path / "a.csv", table("file,width,height,x,y,w,h", rows), squares)
    assert boxes_of(found) == WANTED


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,xmin,ymin,xmax,ymax\n", "a header and no line below it"),
        ("scorer,me,me\nbodyparts,nose,nose\n", "no column 'file'"),
        ("file,xmin,ymin,xmax,ymax,xmax\np0.jpg,1,1,9,9,9\n", "xmax and xmax are called alike"),
    ],
)
def test_tables_that_are_none(tmp_path, squares, text, said):
    with pytest.raises(UserError, match=said):
        placed(tmp_path / "a.csv", text, squares)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda c: c["annotations"][0].update(bbox="[1, 2, 3, 4]"),
            "annotation 1: bbox is .* a list of numbers is exp",
        ),
        (lambda c: c["annotations"][0].update(bbox={"x": 1}), "annotation 1: bbox is .* a list of numbers is expected"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "annotation 1: bbox has 3 numbers"),
        (lambda c: c["annotations"][0].update(keypoints=[1, 2, 3, 4]), "annotation 1: keypoints has 4 numbers"),
        (lambda c: c["annotations"][0].update(bbox=[], segmentation=[[1, 2, 3]]), "segmentation has 3 numbers"),
        (lambda c: c["images"][0].pop("file_name"), "image 100 has no file_name"),
        (lambda c: c["images"][0].update(id=None), "p0.jpg has no image id"),
        (lambda c: c["images"][0].update(file_name=None), "image 100 has no file_name"),
        (lambda c: c["annotations"].append(None), "not COCO keypoints JSON"),
    ],
)
def test_coco_that_is_none(tmp_path, faces, change, said):
    with pytest.raises(UserError, match=said):
        placed(tmp_path / "a.json", changed(change), faces)


def test_a_list_of_results_is_called_so(tmp_path, faces):
    """What detectors write, and pycocotools reads beside the file of the images."""
    results = [{"image_id": 100, "category_id": 1, "bbox": [1, 1, 9, 9], "score": 0.9}]
    with pytest.raises(UserError, match=r"a list of COCO results.*; give a COCO file with images and annotations"):
        placed(tmp_path / "a.json", json.dumps(results), faces)


def test_the_only_category_needs_no_identifier(tmp_path, faces):
    def change(content):
        content["categories"] = [{"name": "face", "keypoints": ["right", "left"]}]
        for entry in content["annotations"]:
            del entry["category_id"]

    found = placed(tmp_path / "a.json", changed(change), faces)
    assert found.point_names == ("right", "left") and boxes_of(found) == WANTED


def test_pairs_without_visibility_are_not_read_as_triples(tmp_path, faces):
    def change(content):
        content["categories"][0]["keypoints"] = ["a", "b", "c"]
        for entry in content["annotations"]:
            entry["keypoints"] = [30, 30, 40, 40, 50, 50]

    with pytest.raises(UserError, match="keypoints has 6 numbers; x, y and visibility"):
        placed(tmp_path / "a.json", changed(change), faces)


def test_a_box_with_null_in_it_is_counted(tmp_path, faces):
    found = placed(tmp_path / "a.json", changed(lambda c: c["annotations"][0].update(bbox=[1, None, 3, 4])), faces)
    assert boxes_of(found) == [None, *WANTED[1:]]
    assert found.notes == ("boxes with a missing or infinite number: 1 (p0.jpg)",)
