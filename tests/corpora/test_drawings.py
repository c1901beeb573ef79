"""The embedded corpus: exact, repeatable, varied enough, and with parts that hide one another."""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sst.corpora.drawings import LANDMARK_NAMES, MIN_SIZE, ToyImage, draw

COUNT = 200


@pytest.fixture(scope="module")
def corpus() -> list[ToyImage]:
    return [draw(7, i) for i in range(COUNT)]


def in_box(drawing: ToyImage) -> np.ndarray:
    """Landmarks in box coordinates, 0..1."""
    x0, y0, x1, y1 = drawing.box
    return (drawing.points - [x0, y0]) / [x1 - x0, y1 - y0]


def patch_at(image: np.ndarray, point: np.ndarray, side: int) -> np.ndarray:
    """Grey patch with the point exactly in its middle, sub-pixel."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return cv2.getRectSubPix(grey, (side, side), (float(point[0]), float(point[1])))


def same(a: ToyImage, b: ToyImage) -> bool:
    return (
        np.array_equal(a.image, b.image)
        and np.array_equal(a.points, b.points)
        and np.array_equal(a.visible, b.visible)
        and a.box == b.box
    )


def test_form_of_a_drawing() -> None:
    drawing = draw(0, 0, 96)
    assert drawing.image.shape == (96, 96, 3) and drawing.image.dtype == np.uint8
    assert drawing.points.shape == (len(LANDMARK_NAMES), 2) and drawing.points.dtype == np.float32
    assert drawing.visible.shape == (len(LANDMARK_NAMES),) and drawing.visible.dtype == np.bool_
    assert len(LANDMARK_NAMES) >= 12 and len(set(LANDMARK_NAMES)) == len(LANDMARK_NAMES)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**40), index=st.integers(0, 2**40), size=st.integers(MIN_SIZE, 200))
def test_every_drawing_is_repeatable_and_lies_inside(seed: int, index: int, size: int) -> None:
    drawing = draw(seed, index, size)
    assert same(drawing, draw(seed, index, size))
    x0, y0, x1, y1 = drawing.box
    assert -0.5 <= x0 < x1 <= size - 0.5 + 1e-6 and -0.5 <= y0 < y1 <= size - 0.5 + 1e-6
    assert np.all(drawing.points > [x0, y0]) and np.all(drawing.points < [x1, y1])


@settings(max_examples=15, deadline=None)
@given(index=st.integers(0, 10**6), size=st.integers(MIN_SIZE, 300))
def test_size_scales_the_same_scene(index: int, size: int) -> None:
    base, scaled = draw(1, index, 128), draw(1, index, size)
    factor = size / 128  # pixel centres at integers: (x + 0.5) scales, x does not
    np.testing.assert_allclose(scaled.points + 0.5, (base.points + 0.5) * factor, atol=1e-3)
    np.testing.assert_allclose(np.add(scaled.box, 0.5), np.add(base.box, 0.5) * factor, atol=1e-6)
    np.testing.assert_array_equal(scaled.visible, base.visible)


def test_a_larger_size_draws_the_same_picture() -> None:
    # The finer drawing averaged down to the coarse one's grid: what is left is grain and anti-aliasing.
    for index in range(8):
        coarse = draw(1, index, 128).image.astype(np.float32)
        fine = cv2.resize(draw(1, index, 256).image, (128, 128), interpolation=cv2.INTER_AREA)
        other = draw(1, index + 1, 128).image.astype(np.float32)
        difference = np.abs(coarse - fine).mean()
        assert difference < 10
        assert np.abs(coarse - other).mean() > 3 * difference


def test_seeds_and_indices_give_different_drawings(corpus: list[ToyImage]) -> None:
    assert len({drawing.image.tobytes() for drawing in corpus}) == COUNT
    assert len({drawing.points.tobytes() for drawing in corpus}) == COUNT
    assert not same(draw(8, 0), corpus[0])


def test_another_process_draws_the_same() -> None:
    code = "import zlib; from sst.corpora.drawings import draw; print(zlib.crc32(draw(3, 5).image.tobytes()))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) == zlib.crc32(draw(3, 5).image.tobytes())


def test_a_constant_guess_is_poor(corpus: list[ToyImage]) -> None:
    points = np.stack([in_box(drawing) for drawing in corpus])
    from_mean = np.linalg.norm(points - points.mean(axis=0), axis=2)
    assert from_mean.mean() > 0.10
    assert from_mean.mean(axis=0).min() > 0.07  # no landmark stands still


def test_not_explained_by_one_affine_motion(corpus: list[ToyImage]) -> None:
    # The object deforms: even the best affine map of the mean shape leaves a clear rest.
    points = np.stack([in_box(drawing) for drawing in corpus])
    mean_1 = np.column_stack([points.mean(axis=0), np.ones(points.shape[1])])
    fitted = [mean_1 @ np.linalg.lstsq(mean_1, p, rcond=None)[0] for p in points]
    assert np.linalg.norm(points - fitted, axis=2).mean() > 0.03


def test_parts_hide_one_another(corpus: list[ToyImage]) -> None:
    visible = np.stack([drawing.visible for drawing in corpus])
    assert 0.7 < visible.mean() < 0.98
    assert visible.mean(axis=0).min() > 0.6
    for name in ("plain eye", "nose", "mouth corner with tooth", "spotted hand"):
        assert visible[:, LANDMARK_NAMES.index(name)].mean() < 0.97, name


def test_visible_landmarks_look_alike_and_hidden_ones_do_not(corpus: list[ToyImage]) -> None:
    def unit(patch: np.ndarray) -> np.ndarray:
        centred = patch - patch.mean()
        return centred / (np.linalg.norm(centred) + 1e-6)

    for landmark in ("plain eye", "patched eye", "nose", "mouth corner with tooth"):
        column = LANDMARK_NAMES.index(landmark)
        patches = np.stack([unit(patch_at(d.image, d.points[column], 13)) for d in corpus])
        visible = np.array([d.visible[column] for d in corpus])
        seen, hidden = patches[visible], patches[~visible]
        typical = unit(seen.mean(axis=0))
        seen_likeness = np.tensordot(seen, typical, axes=2).mean()
        assert seen_likeness > 0.4, landmark
        assert np.tensordot(hidden, typical, axes=2).mean() < seen_likeness - 0.25, landmark


@pytest.mark.parametrize("size", [64, 128, 256])
def test_annotation_is_exact(size: int) -> None:
    # The pupil is darker than the white around it: its centre of mass, averaged over images, is the landmark.
    column = LANDMARK_NAMES.index("plain eye")
    drawings = [d for d in (draw(11, i, size) for i in range(80)) if d.visible[column]]
    reach = round(0.035 * size)
    mean = np.mean([patch_at(d.image, d.points[column], 2 * reach + 1) for d in drawings], axis=0)
    at = np.arange(-reach, reach + 1)
    near = np.hypot(at, at[:, None]) <= 0.032 * size  # ends on the white
    weight = np.where(near, mean[near].max() - mean, 0.0)
    centre = np.array([(weight * at).sum(), (weight * at[:, None]).sum()]) / weight.sum()
    assert np.linalg.norm(centre) < 0.1  # pixels; a mix-up of conventions costs a quarter or more


def test_colour_does_not_give_the_object_away(corpus: list[ToyImage]) -> None:
    column = LANDMARK_NAMES.index("nose")
    hues = []
    for drawing in corpus:
        x, y = np.rint(drawing.points[column]).astype(int)
        region = drawing.image[y - 12 : y + 12, x - 12 : x + 12].reshape(-1, 3).astype(float).mean(axis=0)
        hues.append(np.argmax(region))
    assert np.bincount(hues, minlength=3).min() > COUNT * 0.15


@pytest.mark.parametrize(("arguments", "word"), [((-1, 0), "seed"), ((0, -1), "index"), ((0, 0, MIN_SIZE - 1), "size")])
def test_bad_arguments_are_refused(arguments: tuple[int, ...], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        draw(*arguments)
