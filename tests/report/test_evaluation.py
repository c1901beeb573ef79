"""Scores against slow oracles, laws they must obey, and the one number known from real faces."""

import csv
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.shards import Labels
from sst.data.corpus import Corpus
from sst.report.evaluate_run import AnnotatedImages
from sst.report.evaluation import PROTOCOLS, complete, constant_guess, evaluate
from sst.train.consistency import coverage, equivariance_error, label_persistence
from tests.small import write_toy

FACES = Path(__file__).parents[3] / "shared" / "data" / "faces"


def corpus(
    seed: int, images: int = 90, tests: int = 30, points: int = 68, landmarks: int = 8, missing: float = 0.1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shapes that deform in five ways; landmarks between annotated points, with 2 px of noise."""
    rng = np.random.default_rng(seed)
    mean = rng.uniform(40, 216, (points, 2))
    modes = rng.normal(0, 8, (5, points, 2))
    groundtruth = mean + np.tensordot(rng.normal(size=(images, 5)), modes, 1) + rng.normal(0, 0.5, (images, points, 2))
    mix = rng.dirichlet(np.full(points, 0.1), landmarks)
    prediction = np.einsum("kl,nlc->nkc", mix, groundtruth) + rng.normal(0, 2, (images, landmarks, 2))
    prediction[rng.random((images, landmarks)) < missing] = np.nan
    is_test = np.zeros(images, bool)
    is_test[rng.choice(images, tests, replace=False)] = True
    return prediction, groundtruth, is_test


def oracle_length(points: np.ndarray, protocol: str) -> float:
    pair = {"mafl": (41, 46), "human36m": (25, 17), "faces68": (36, 45)}.get(protocol)
    if pair:
        (ax, ay), (bx, by) = points[pair[0]], points[pair[1]]
        return float(((ax - bx) ** 2 + (ay - by) ** 2) ** 0.5)
    xs, ys = points[:, 0], points[:, 1]
    return float(((max(xs) - min(xs)) * (max(ys) - min(ys))) ** 0.5)


def oracle_predict(x: np.ndarray, y: np.ndarray, x_new: np.ndarray) -> np.ndarray:
    """Ridge regression as a least squares problem with extra rows sqrt(0.01 max(X^T X)) I."""
    xc, yc = x - x.mean(0), y - y.mean(0)
    largest = max(float(xc[:, i] @ xc[:, j]) for i in range(xc.shape[1]) for j in range(xc.shape[1]))
    rows = np.vstack([xc, np.sqrt(0.01 * largest) * np.eye(xc.shape[1])])
    weights = np.linalg.lstsq(rows, np.vstack([yc, np.zeros((xc.shape[1], yc.shape[1]))]), rcond=None)[0]
    answer: np.ndarray = (x_new - x.mean(0)) @ weights + y.mean(0)
    return answer


def oracle_curve(errors: list[float]) -> list[float]:
    ordered = sorted(errors)
    return [sum(ordered[: i + 1]) / (i + 1) for i in range(len(ordered))]


def oracle_kept(prediction: np.ndarray) -> list[int]:
    kept = []
    for k in range(prediction.shape[1]):
        found = sum(1 for p in prediction[:, k] if not np.isnan(p).any())
        if 10 * found > 8 * len(prediction):
            kept.append(k)
    return kept


def oracle_backward(
    prediction: np.ndarray, groundtruth: np.ndarray, is_test: np.ndarray, protocol: str, n: int
) -> list[float]:
    train = [i for i in range(len(is_test)) if not is_test[i]][:n]
    errors = []
    for k in oracle_kept(prediction):
        fit = [i for i in train if not np.isnan(prediction[i, k]).any()]
        x = np.array([groundtruth[i].ravel() / 256 - 0.5 for i in fit])
        y = np.array([prediction[i, k] / 256 - 0.5 for i in fit])
        shown = [i for i in range(len(is_test)) if is_test[i] and not np.isnan(prediction[i, k]).any()]
        answers = oracle_predict(x, y, np.array([groundtruth[i].ravel() / 256 - 0.5 for i in shown]))
        own = []
        for answer, i in zip(answers, shown, strict=True):
            off = float(np.hypot(*((answer + 0.5) * 256 - prediction[i, k])))
            own.append(off / oracle_length(groundtruth[i], protocol))
        errors.append(sum(own) / len(own))
    return oracle_curve(errors)


def textbook_completion(data: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Singular value thresholding with a full SVD in every iteration."""
    target = np.where(known, data, 0.0)
    tau, step = 5 * sum(data.shape) / 2, 1.2 * data.size / known.sum()
    dual = np.zeros_like(target)
    for _ in range(1000):
        u, s, vt = np.linalg.svd(dual, full_matrices=False)
        estimate = (u * np.maximum(s - tau, 0)) @ vt
        residual = np.where(known, target - estimate, 0.0)
        if np.linalg.norm(residual) < 0.01 * np.linalg.norm(target):
            break
        dual = dual + step * residual
    return np.where(known, data, estimate)


def oracle_forward(
    prediction: np.ndarray, groundtruth: np.ndarray, is_test: np.ndarray, protocol: str, n: int, draws: int
) -> list[float]:
    train, test = [i for i in range(len(is_test)) if not is_test[i]], np.flatnonzero(is_test)
    landmarks = prediction[:, oracle_kept(prediction)].reshape(len(prediction), -1) / 256
    annotated = groundtruth.reshape(len(groundtruth), -1) / 256 - 0.5
    completed = textbook_completion(landmarks[train], ~np.isnan(landmarks[train])) - 0.5
    x_test = landmarks[test] - 0.5
    for i, j in np.argwhere(np.isnan(x_test)):
        x_test[i, j] = np.nanmean(landmarks[train, j]) - 0.5
    errors = np.zeros(groundtruth.shape[1])
    for draw in range(draws):
        chosen = np.random.RandomState(draw).choice(len(train), min(n, len(train)), replace=False)
        rows, x = [train[i] for i in chosen], completed[chosen]
        answer = ((oracle_predict(x, annotated[rows], x_test) + 0.5) * 256).reshape(len(test), -1, 2)
        for point in range(groundtruth.shape[1]):
            own = [
                np.hypot(*(answer[t, point] - groundtruth[i, point])) / oracle_length(groundtruth[i], protocol)
                for t, i in enumerate(test)
            ]
            errors[point] += sum(own) / len(own) / draws
    return oracle_curve(list(errors))


@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
def test_backward_equals_the_slow_oracle(protocol: str) -> None:
    prediction, groundtruth, is_test = corpus(1)
    prediction[is_test.argmax(), 0] = np.nan
    prediction[:18, 2] = np.nan  # exactly or under 80 %: left out
    scores = evaluate(prediction, groundtruth, is_test, protocol)
    expected = oracle_backward(prediction, groundtruth, is_test, protocol, PROTOCOLS[protocol].train_images)
    assert 2 < scores.landmarks_kept == len(expected) < 8
    np.testing.assert_allclose(scores.backward_curve, expected, rtol=1e-6)
    assert scores.backward == scores.backward_curve[-1]


def test_backward_is_fitted_on_the_first_training_images_only() -> None:
    prediction, groundtruth, is_test = corpus(2, images=340, tests=20)
    scores = evaluate(prediction, groundtruth, is_test, "ls3d")
    np.testing.assert_allclose(
        scores.backward_curve, oracle_backward(prediction, groundtruth, is_test, "ls3d", 300), rtol=1e-6
    )
    all_images = oracle_backward(prediction, groundtruth, is_test, "ls3d", 320)
    assert abs(all_images[-1] / scores.backward - 1) > 1e-4


def test_forward_equals_the_slow_oracle_when_there_is_no_choice_of_images() -> None:
    prediction, groundtruth, is_test = corpus(3)
    scores = evaluate(prediction, groundtruth, is_test, "faces68")
    expected = oracle_forward(prediction, groundtruth, is_test, "faces68", 300, draws=1)
    np.testing.assert_allclose(scores.forward_curve, expected, rtol=1e-6)
    assert len(scores.forward_curve) == 68 and scores.forward == scores.forward_curve[-1]


def test_forward_without_missing_values_is_exact() -> None:
    prediction, groundtruth, is_test = corpus(4, missing=0.0)
    scores = evaluate(prediction, groundtruth, is_test, "mafl")
    expected = oracle_forward(prediction, groundtruth, is_test, "mafl", 300, draws=1)
    np.testing.assert_allclose(scores.forward_curve, expected, rtol=1e-9)


def test_forward_of_random_draws_agrees_within_one_per_cent() -> None:
    prediction, groundtruth, is_test = corpus(5, images=500, tests=60, points=46, missing=0.0)
    scores = evaluate(prediction, groundtruth, is_test, "faces68")
    expected = oracle_forward(prediction, groundtruth, is_test, "faces68", 300, draws=10)
    np.testing.assert_allclose(scores.forward, expected[-1], rtol=0.01)
    again = evaluate(prediction, groundtruth, is_test, "faces68", seed=1)
    assert again.forward != scores.forward
    np.testing.assert_allclose(again.forward, scores.forward, rtol=0.01)


@pytest.mark.parametrize(("rows", "columns", "noise"), [(60, 16, 0.01), (40, 60, 0.0), (30, 6, 0.1), (300, 40, 0.01)])
def test_completion_equals_the_textbook(rows: int, columns: int, noise: float) -> None:
    rng = np.random.default_rng(rows)
    low_rank = rng.normal(size=(rows, 3)) @ rng.normal(size=(3, columns)) * 0.1
    data = low_rank + rng.normal(0, noise, low_rank.shape) + rng.uniform(0.2, 0.8, columns)
    known = rng.random(data.shape) > 0.15
    completed = complete(np.where(known, data, np.nan), known)
    np.testing.assert_array_equal(completed[known], data[known])
    np.testing.assert_allclose(completed, textbook_completion(data, known), atol=1e-9)


def test_completion_recovers_what_a_mean_fill_does_not() -> None:
    rng = np.random.default_rng(1)
    shift = rng.normal(0, 0.1, (200, 1))
    data = rng.uniform(0.2, 0.8, 30) * (1 + shift)
    known = rng.random(data.shape) > 0.15
    hidden = np.where(known, data, np.nan)
    fill = np.where(known, data, np.nanmean(hidden, axis=0))
    assert np.abs(complete(hidden, known) - data).max() < 0.3 * np.abs(fill - data).max()


def test_landmarks_that_are_a_linear_map_of_the_points_score_near_zero() -> None:
    _, groundtruth, is_test = corpus(6, images=200, tests=50)
    scores = evaluate(groundtruth.copy(), groundtruth, is_test, "ls3d")
    assert scores.landmarks_kept == 68
    assert scores.backward < 0.006 and scores.forward < 0.006  # what the ridge leaves
    assert scores.forward < 0.1 * constant_guess(groundtruth, is_test, "ls3d")


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_names_of_landmarks_and_points_do_not_matter(seed: int) -> None:
    prediction, groundtruth, is_test = corpus(seed, images=50, tests=15, points=12, landmarks=5, missing=0.05)
    rng = np.random.default_rng(seed)
    plain = evaluate(prediction, groundtruth, is_test, "toy")
    mixed = evaluate(prediction[:, rng.permutation(5)], groundtruth[:, rng.permutation(12)], is_test, "toy")
    assert plain.landmarks_kept == mixed.landmarks_kept
    np.testing.assert_allclose(mixed.backward_curve, plain.backward_curve, rtol=1e-9)
    np.testing.assert_allclose(mixed.forward_curve, plain.forward_curve, rtol=1e-6)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_curves_ascend_and_noise_raises_both_errors(seed: int) -> None:
    prediction, groundtruth, is_test = corpus(seed, images=120, tests=40, points=12, landmarks=6, missing=0.05)
    plain = evaluate(prediction, groundtruth, is_test, "toy")
    noise = np.random.default_rng(seed).normal(0, 20, prediction.shape)
    noisy = evaluate(prediction + noise, groundtruth, is_test, "toy")
    assert noisy.forward > plain.forward and noisy.backward > plain.backward
    for curve in (plain.forward_curve, plain.backward_curve):
        assert np.all(np.diff(curve) >= 0)


def test_more_than_the_first_thousand_training_images_change_nothing() -> None:
    prediction, groundtruth, is_test = corpus(7, images=1060, tests=50, points=12, landmarks=4)
    late = np.flatnonzero(~is_test)[1000:]
    assert len(late) == 10
    plain = evaluate(prediction, groundtruth, is_test, "toy")
    prediction[late], groundtruth[late] = np.nan, np.nan
    assert evaluate(prediction, groundtruth, is_test, "toy").to_json() == plain.to_json()


def test_half_visible_points_count_as_hidden() -> None:
    prediction, groundtruth, is_test = corpus(8)
    half = prediction.copy()
    hidden = np.isnan(prediction).any(axis=2)
    half[..., 1][hidden] = 5.0
    expected = evaluate(prediction, groundtruth, is_test, "mafl")
    assert evaluate(half, groundtruth, is_test, "mafl").to_json() == expected.to_json()


def test_eighty_per_cent_is_not_enough() -> None:
    prediction, groundtruth, is_test = corpus(9, images=100, missing=0.0)
    prediction[:20, 0] = np.nan
    prediction[:19, 1] = np.nan
    assert evaluate(prediction, groundtruth, is_test, "toy").landmarks_kept == 7


@pytest.mark.parametrize("landmarks", [0, 3])
def test_no_landmark_kept_gives_null(landmarks: int) -> None:
    _, groundtruth, is_test = corpus(10)
    scores = evaluate(np.full((90, landmarks, 2), np.nan), groundtruth, is_test, "toy")
    assert np.isnan(scores.forward) and np.isnan(scores.backward)
    assert json.loads(json.dumps(scores.to_json(), allow_nan=False)) == {
        "forward_curve": [],
        "backward_curve": [],
        "forward": None,
        "backward": None,
        "landmarks_kept": 0,
        "protocol": "toy",
    }


def test_a_landmark_without_any_test_image_is_not_kept() -> None:
    prediction, groundtruth, is_test = corpus(11, images=60, tests=5, missing=0.0)
    prediction[is_test, 0] = np.nan
    scores = evaluate(prediction, groundtruth, is_test, "toy")
    assert scores.landmarks_kept == 7 and np.isfinite(scores.backward)


def test_landmarks_that_never_move_score_like_the_constant_guess() -> None:
    _, groundtruth, is_test = corpus(12)
    prediction = np.tile(np.array([[100.0, 120.0], [30.0, 40.0]]), (90, 1, 1))
    scores = evaluate(prediction, groundtruth, is_test, "ls3d")
    assert scores.forward == pytest.approx(constant_guess(groundtruth, is_test, "ls3d"), rel=1e-9)
    assert scores.backward == pytest.approx(0.0, abs=1e-9)


def test_json_holds_the_curves() -> None:
    scores = evaluate(*corpus(13), "human36m")
    text = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    assert text["protocol"] == "human36m" and text["landmarks_kept"] == scores.landmarks_kept
    assert text["forward"] == text["forward_curve"][-1] and text["backward"] == text["backward_curve"][-1]


def test_what_does_not_fit_is_refused_with_a_reason() -> None:
    prediction, groundtruth, is_test = corpus(14)
    with pytest.raises(ValueError, match="scoring protocol 'nose' is unknown.*faces68"):
        evaluate(prediction, groundtruth, is_test, "nose")
    with pytest.raises(ValueError, match="'mafl' needs at least 47 points, found 46"):
        evaluate(prediction, groundtruth[:, :46], is_test, "mafl")
    with pytest.raises(ValueError, match="10 training images .*found 9 and 1"):
        evaluate(prediction[:10], groundtruth[:10], np.arange(10) == 0, "toy")
    with pytest.raises(ValueError, match="found 90 and 0"):
        constant_guess(groundtruth, np.zeros(90, bool), "toy")
    with pytest.raises(ValueError, match="prediction must be"):
        evaluate(prediction[:50], groundtruth, is_test, "toy")
    with pytest.raises(ValueError, match="is_test must be 90"):
        evaluate(prediction, groundtruth, is_test[:80], "toy")
    with pytest.raises(ValueError, match="1 images have annotated points that are not finite"):
        broken = groundtruth.copy()
        broken[0, 3] = np.nan
        evaluate(prediction, broken, is_test, "toy")
    with pytest.raises(ValueError, match="0 in 1 test images"):
        flat = groundtruth.copy()
        flat[is_test.argmax(), :, 0] = 9.0
        evaluate(prediction, flat, is_test, "toy")


def test_constant_guess_by_hand() -> None:
    groundtruth = np.zeros((12, 2, 2))
    groundtruth[:, 1] = (100.0, 4.0)  # box of 100 x 4: length 20
    groundtruth[:10, :, 0] += np.arange(10)[:, None] - 4.5  # mean 0
    groundtruth[10, :, 0] += 3.0
    groundtruth[11, :, 0] -= 5.0
    is_test = np.arange(12) >= 10
    assert constant_guess(groundtruth, is_test, "toy") == pytest.approx((3 / 20 + 5 / 20) / 2)


@pytest.mark.skipif(not (FACES / "annotations.csv").exists(), reason="the faces are not at hand")
def test_constant_guess_on_real_faces() -> None:
    points, tests = [], []
    with open(FACES / "annotations.csv", newline="") as file:
        for row in csv.DictReader(file):
            low = np.array([float(row["box_x0"]), float(row["box_y0"])])
            high = np.array([float(row["box_x1"]), float(row["box_y1"])])
            stored = np.array([[float(row[f"x{i}"]), float(row[f"y{i}"])] for i in range(68)])
            points.append((stored - low) * 256 / (high - low))
            tests.append(row["split"] == "test")
    assert constant_guess(np.array(points), np.array(tests), "faces68") == pytest.approx(0.206, abs=0.002)


def test_published_size_is_scored_in_seconds() -> None:
    prediction, groundtruth, is_test = corpus(15, images=1300, tests=300, landmarks=100)
    begin = time.process_time()
    scores = evaluate(prediction, groundtruth, is_test, "mafl")
    assert scores.landmarks_kept == 100
    assert time.process_time() - begin < 10  # about 1.5 s on a quiet core; busy and old machines are slower


def test_equivariance_error_by_hand() -> None:
    moved = np.zeros((2, 3, 2))
    predicted = moved.copy()
    predicted[0, 0] = (3, 4)
    predicted[0, 1] = np.nan
    moved[1, 2, 0] = np.nan
    assert equivariance_error(moved, predicted, 50) == pytest.approx(100 * 5 / 4 / 50)
    assert np.isnan(equivariance_error(np.full((1, 1, 2), np.nan), np.zeros((1, 1, 2)), 50))
    with pytest.raises(ValueError, match="different shapes"):
        equivariance_error(moved, predicted[:1], 50)
    with pytest.raises(ValueError, match="positive"):
        equivariance_error(moved, predicted, 0)


def labels(images: list[dict[int, tuple[float, float]]]) -> Labels:
    rows = [(cluster, point) for image in images for cluster, point in image.items()]
    return Labels(
        np.cumsum([0, *(len(image) for image in images)]).astype(np.int64),
        np.array([point for _, point in rows], np.float32).reshape(-1, 2),
        np.array([cluster for cluster, _ in rows], np.int16),
        np.zeros(len(rows), np.float32),
    )


def test_label_persistence_by_hand() -> None:
    before = labels([{3: (1, 1), 0: (5, 5)}, {}, {3: (9, 9), 7: (2, 2)}])
    after = labels([{0: (5, 6.5), 2: (1, 1)}, {3: (9, 9)}, {3: (9, 11), 7: (2, 2)}])
    assert label_persistence(before, after, 1.5) == 0.5
    assert label_persistence(before, before, 0.0) == 1.0
    assert label_persistence(before, labels([{}, {}, {}]), 9.0) == 0.0
    assert np.isnan(label_persistence(labels([{}]), labels([{1: (0, 0)}]), 1.0))
    with pytest.raises(ValueError, match="different images"):
        label_persistence(before, labels([{}]), 1.0)


image_labels = st.dictionaries(
    st.integers(0, 5),
    st.tuples(st.integers(0, 6), st.integers(0, 6)).map(lambda p: (float(p[0]), float(p[1]))),
    max_size=4,
)


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(image_labels, image_labels), min_size=1, max_size=4), radius=st.floats(0, 5))
def test_label_persistence_equals_a_loop(
    pairs: list[tuple[dict[int, tuple[float, float]], dict[int, tuple[float, float]]]], radius: float
) -> None:
    found = total = 0
    for before, after in pairs:
        for cluster, (x, y) in before.items():
            total += 1
            if cluster in after:
                found += bool(np.hypot(x - after[cluster][0], y - after[cluster][1]) <= radius)
    share = label_persistence(labels([b for b, _ in pairs]), labels([a for _, a in pairs]), radius)
    assert np.isnan(share) if total == 0 else share == pytest.approx(found / total)


def test_coverage_is_the_share_of_what_recurs_that_a_visible_landmark_is_near():
    structure = np.array([[[10.0, 10.0], [100.0, 100.0]], [[50.0, 50.0], [np.nan, np.nan]]])
    points = np.array([[[10.0, 25.0], [np.nan, np.nan]], [[80.0, 80.0], [50.0, 53.0]]])
    assert coverage(structure, points, 16.0) == pytest.approx(2 / 3)
    assert np.isnan(coverage(np.full((1, 1, 2), np.nan), points[:1], 16.0))


@pytest.mark.parametrize(("train", "test", "scored"), [(9, 2, False), (10, 2, True), (10, 0, False)])
def test_a_handful_of_annotated_images_is_not_scored_instead_of_ending_a_run(tmp_path, train, test, scored):
    """As many as the regressions need; eight corrected predictions are what people bring first."""
    write_toy(str(tmp_path), train=train, test=test)
    assert (AnnotatedImages.of(Corpus.open(str(tmp_path))) is not None) == scored
