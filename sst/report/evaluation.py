"""Scores of landmarks: against annotations (forward and backward error), and label-free metrics.

Annotations enter the system here only. Points are (x, y) in pixels of a 256 px view unless said otherwise.

Shape letters: N images, K discovered landmarks, L annotated points, F images a regression is fitted on,
T test images, P predictor columns, Q target columns.
Source: Mallis et al. 2020, section 4; singular value thresholding: Cai, Candes and Shen 2010.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.linalg.lapack import dsyevr
from threadpoolctl import threadpool_limits

TRAIN_POOL = 1000
"""The protocols use this many annotated training images, the first ones; later ones are ignored."""

MIN_TRAIN, MIN_TEST = 10, 1
VISIBLE_SHARE = 0.8
DRAWS = 10
RIDGE = 0.01
VIEW = 256.0

SVT_ITERATIONS = 1000
SVT_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Protocol:
    """How a corpus is scored.

    Attributes:
        name: key in `PROTOCOLS`.
        train_images: images each regression is fitted on; fewer where the corpus has fewer.
        min_points: annotated points that the normaliser needs.
        normaliser: from annotated points (n, L, 2) to the length (n,) that errors are divided by.
    """

    name: str
    train_images: int
    min_points: int
    normaliser: Callable[[np.ndarray], np.ndarray]


def _distance(first: int, second: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda points_NL2: np.linalg.norm(points_NL2[:, first] - points_NL2[:, second], axis=1)


def _box_side(points_NL2: np.ndarray) -> np.ndarray:
    side: np.ndarray = np.sqrt(np.prod(points_NL2.max(axis=1) - points_NL2.min(axis=1), axis=1))
    return side


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("mafl", 300, 47, _distance(41, 46)),
        Protocol("ls3d", 300, 2, _box_side),
        Protocol("human36m", 800, 26, _distance(25, 17)),
        Protocol("faces68", 300, 46, _distance(36, 45)),
        Protocol("toy", 300, 2, _box_side),
    )
}


@dataclass(frozen=True)
class Scores:
    """Forward and backward error of one set of predictions, as fractions of the protocol's length.

    Attributes:
        forward_curve: float64 (L,): mean of the 1, 2, ... L smallest errors of annotated points.
        backward_curve: float64 (landmarks_kept,): the same over the kept landmarks.
        forward: last value of its curve.
        backward: last value of its curve.
        landmarks_kept: landmarks visible in more than 80 % of the images.
        protocol: name in `PROTOCOLS`.

    Where no landmark is kept, both curves are empty and both errors NaN.
    """

    forward_curve: np.ndarray
    backward_curve: np.ndarray
    forward: float
    backward: float
    landmarks_kept: int
    protocol: str

    def to_json(self) -> dict[str, object]:
        """The same as plain JSON values; NaN becomes null."""
        return {
            "forward_curve": self.forward_curve.tolist(),
            "backward_curve": self.backward_curve.tolist(),
            "forward": self.forward if math.isfinite(self.forward) else None,
            "backward": self.backward if math.isfinite(self.backward) else None,
            "landmarks_kept": self.landmarks_kept,
            "protocol": self.protocol,
        }


def evaluate(
    prediction_NK2: np.ndarray,
    groundtruth_NL2: np.ndarray,
    is_test_N: np.ndarray,
    protocol: str,
    seed: int = 0,
) -> Scores:
    """Scores discovered landmarks against annotated points.

    Args:
        prediction_NK2: discovered landmarks; NaN (in x or y) = not visible.
        groundtruth_NL2: annotated points, all finite.
        is_test_N: which images are test images; of the others the first 1,000 are used.
        protocol: name in `PROTOCOLS`.
        seed: of the forward error's random draws.

    Raises:
        ValueError: if the protocol is unknown, or the arrays do not fit each other or the protocol.

    Source: Mallis et al. 2020, section 4.
    """
    rules = protocol_named(protocol)
    prediction = np.asarray(prediction_NK2, np.float64)
    groundtruth, train, test = _checked(groundtruth_NL2, is_test_N, rules)
    if prediction.ndim != 3 or prediction.shape[2] != 2 or len(prediction) != len(groundtruth):
        raise ValueError(f"prediction must be ({len(groundtruth)}, K, 2), not {prediction.shape}")
    visible_NK = np.asarray(np.isfinite(prediction).all(axis=2))
    kept = visible_NK[np.concatenate([train, test])].mean(axis=0) > VISIBLE_SHARE
    # A tiny corpus can have a landmark in over 80 % of the images and yet nothing to fit or test it on.
    kept &= visible_NK[train[: rules.train_images]].any(axis=0) & visible_NK[test].any(axis=0)
    if not kept.any():
        return Scores(np.empty(0), np.empty(0), math.nan, math.nan, 0, rules.name)
    prediction, visible_NK = prediction[:, kept], visible_NK[:, kept]
    length_T = rules.normaliser(groundtruth[test])
    forward_L = forward_errors(prediction, visible_NK, groundtruth, train, test, rules.train_images, length_T, seed)
    backward_K = _backward_errors(prediction, visible_NK, groundtruth, train[: rules.train_images], test, length_T)
    forward, backward = _curve(forward_L), _curve(backward_K)
    return Scores(forward, backward, float(forward[-1]), float(backward[-1]), int(kept.sum()), rules.name)


def constant_guess(groundtruth_NL2: np.ndarray, is_test_N: np.ndarray, protocol: str) -> float:
    """Forward error, as a fraction, of always answering the mean points of the first training images.

    Args:
        groundtruth_NL2: annotated points, all finite.
        is_test_N: which images are test images.
        protocol: name in `PROTOCOLS`.

    Raises:
        ValueError: as `evaluate`.
    """
    rules = protocol_named(protocol)
    groundtruth, train, test = _checked(groundtruth_NL2, is_test_N, rules)
    mean_L2 = groundtruth[train[: rules.train_images]].mean(axis=0)
    error_TL = np.linalg.norm(groundtruth[test] - mean_L2, axis=2)
    return float((error_TL / rules.normaliser(groundtruth[test])[:, None]).mean())


def protocol_named(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"scoring protocol {name!r} is unknown; known are {', '.join(sorted(PROTOCOLS))}")
    return PROTOCOLS[name]


def complete(values_FP: np.ndarray, known_FP: np.ndarray) -> np.ndarray:
    """Fills a matrix's missing entries by singular value thresholding.

    Threshold 5 (F + P) / 2, step 1.2 / known share, from zero, until the known entries are within 1 % or for
    1,000 iterations: the published protocol's settings.

    Args:
        values_FP: coordinates / 256, as they are (not centred); what stands at missing entries is ignored.
        known_FP: bool, which entries are known.

    Returns:
        float64 (F, P): the known entries as they were, the others completed.

    Source: Cai, Candes and Shen 2010, algorithm 1.
    """
    data = np.where(known_FP, values_FP, 0.0)
    scale = float(np.linalg.norm(data))
    if known_FP.all() or scale == 0.0:
        return data
    if data.shape[0] < data.shape[1]:  # the smaller side's Gram matrix gives all singular values that are not 0
        return complete(values_FP.T, known_FP.T).T
    tau, step = 5.0 * sum(data.shape) / 2.0, 1.2 * data.size / float(known_FP.sum())
    # While everything lies below the threshold the estimate stays 0, and an iteration adds step * data.
    idle = int(tau / (step * np.linalg.norm(data, 2)))
    dual, estimate, residual = idle * step * data, np.zeros(data.shape), np.empty(data.shape)
    step_FP = step * known_FP
    # On matrices this small BLAS threads mostly wait for each other: two took 14 times as long as one, on idle cores.
    with threadpool_limits(1, user_api="blas"):
        for _ in range(SVT_ITERATIONS - idle):
            # LAPACK is called directly, and np.dot for np.matmul, because with few landmarks SciPy's wrapper and
            # matmul's slow way with a single singular value, which most iterations have, took a quarter of the time.
            squares, basis, rank, _, failed = dsyevr(dual.T @ dual, range="V", vl=tau**2, vu=np.inf, overwrite_a=True)
            if failed:
                raise np.linalg.LinAlgError(f"singular value thresholding: LAPACK's dsyevr failed with {failed}")
            basis = basis[:, :rank]
            np.dot(dual @ (basis * (1.0 - tau / np.sqrt(squares[:rank]))), basis.T, out=estimate)
            np.subtract(data, estimate, out=residual)
            residual *= step_FP
            if math.sqrt(np.vdot(residual, residual)) < SVT_TOLERANCE * scale * step:
                break
            dual += residual
    return np.where(known_FP, data, estimate)


def _checked(
    groundtruth_NL2: np.ndarray, is_test_N: np.ndarray, rules: Protocol
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Annotated points as float64, numbers of the training images in use, numbers of the test images."""
    points, is_test = np.asarray(groundtruth_NL2, np.float64), np.asarray(is_test_N)
    if points.ndim != 3 or points.shape[2] != 2:
        raise ValueError(f"groundtruth must be (N, L, 2), not {points.shape}")
    if is_test.shape != (len(points),):
        raise ValueError(f"is_test must be {len(points)} truth values, not {is_test.shape}")
    if points.shape[1] < rules.min_points:
        raise ValueError(f"protocol {rules.name!r} needs at least {rules.min_points} points, found {points.shape[1]}")
    is_test = is_test.astype(bool)
    train, test = np.flatnonzero(~is_test)[:TRAIN_POOL], np.flatnonzero(is_test)
    if len(train) < MIN_TRAIN or len(test) < MIN_TEST:
        raise ValueError(
            f"scoring needs at least {MIN_TRAIN} training images and {MIN_TEST} test image "
            f"with annotations, found {len(train)} and {len(test)}"
        )
    broken = int((~np.isfinite(points[np.concatenate([train, test])]).all(axis=(1, 2))).sum())
    if broken:
        raise ValueError(f"{broken} images have annotated points that are not finite; leave these images out")
    flat = int((rules.normaliser(points[test]) <= 0).sum())
    if flat:
        raise ValueError(
            f"protocol {rules.name!r}: the length that errors are divided by is 0 in {flat} test images; "
            "leave these images out"
        )
    return points, train, test


def _regression(x_FP: np.ndarray, y_FQ: np.ndarray) -> np.ndarray:
    """R^T (P, Q) of R = (Y^T X)(X^T X + 0.01 max(X^T X) I)^-1, for centred X and Y."""
    gram = x_FP.T @ x_FP
    ridge = RIDGE * gram.max()
    if ridge <= 0.0:
        # All predictors are constant: nothing but the mean can be predicted.
        return np.zeros((x_FP.shape[1], y_FQ.shape[1]))
    gram[np.diag_indices_from(gram)] += ridge
    return np.linalg.solve(gram, x_FP.T @ y_FQ)


def forward_errors(
    prediction_NK2: np.ndarray,
    visible_NK: np.ndarray,
    groundtruth_NL2: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    count: int,
    length_T: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Error of each annotated point (L,), predicted from all landmarks; mean of the draws.

    Args:
        prediction_NK2: landmarks; what stands where one is not visible is ignored.
        visible_NK: bool; each landmark visible in one training image at least.
        groundtruth_NL2: annotated points.
        train: numbers of the images of which each draw takes `count` to fit on.
        test: numbers of the images to score.
        count: at most; fewer where there are fewer.
        length_T: what the errors in each test image are divided by.
        seed: of the draws.
    """
    x = prediction_NK2.reshape(len(prediction_NK2), -1) / VIEW
    y = groundtruth_NL2.reshape(len(groundtruth_NL2), -1) / VIEW
    known = np.repeat(visible_NK, 2, axis=1)
    x_train, y_train, y_test = complete(x[train], known[train]), y[train], y[test]
    # A missing test value is the mean of the training values that were seen.
    x_test = np.where(known[test], x[test], np.nanmean(np.where(known[train], x[train], np.nan), axis=0))
    rng = np.random.default_rng(seed)
    error_L = np.zeros(groundtruth_NL2.shape[1])
    for _ in range(DRAWS):
        rows = rng.permutation(len(train))[:count]
        x_mean, y_mean = x_train[rows].mean(axis=0), y_train[rows].mean(axis=0)
        weights = _regression(x_train[rows] - x_mean, y_train[rows] - y_mean)
        off = x_test @ weights
        off += y_mean - x_mean @ weights
        off -= y_test
        off = VIEW * off.reshape(len(test), -1, 2)
        error_L += (_lengths(off) / length_T[:, None]).mean(axis=0)
    return error_L / DRAWS


def landmark_places(
    landmark_NK2: np.ndarray, visible_NK: np.ndarray, groundtruth_NL2: np.ndarray, fitted: np.ndarray, asked: np.ndarray
) -> np.ndarray:
    """Where the annotated points say that each landmark is, by a regression fitted where it is visible.

    Args:
        landmark_NK2: landmarks; what stands where one is not visible is ignored.
        visible_NK: bool.
        groundtruth_NL2: annotated points.
        fitted: numbers of the images on which the regressions are fitted, each landmark visible in one at least.
        asked: numbers of the images in which the landmarks are sought.

    Returns:
        float64 (len(asked), K, 2).
    """
    x = groundtruth_NL2.reshape(len(groundtruth_NL2), -1) / VIEW - 0.5
    y = landmark_NK2 / VIEW - 0.5
    x_asked, places = x[asked], np.empty((len(asked), *landmark_NK2.shape[1:]))
    for k in range(places.shape[1]):
        rows = fitted[visible_NK[fitted, k]]
        x_mean, y_mean = x[rows].mean(axis=0), y[rows, k].mean(axis=0)
        weights = _regression(x[rows] - x_mean, y[rows, k] - y_mean)
        places[:, k] = VIEW * (x_asked @ weights + (y_mean - x_mean @ weights) + 0.5)
    return places


def _backward_errors(
    prediction_NK2: np.ndarray,
    visible_NK: np.ndarray,
    groundtruth_NL2: np.ndarray,
    first: np.ndarray,
    test: np.ndarray,
    length_T: np.ndarray,
) -> np.ndarray:
    """Error of each landmark (K,), predicted from all annotated points, where it is visible."""
    off = landmark_places(prediction_NK2, visible_NK, groundtruth_NL2, first, test) - prediction_NK2[test]
    error_TK, shown_TK = _lengths(off) / length_T[:, None], visible_NK[test]
    return np.array([error_TK[shown_TK[:, k], k].mean() for k in range(error_TK.shape[1])])


def _lengths(off: np.ndarray) -> np.ndarray:
    """Lengths of vectors (..., 2), without NumPy's slow reduction over an axis of two."""
    lengths: np.ndarray = np.sqrt(off[..., 0] ** 2 + off[..., 1] ** 2)
    return lengths


def _curve(errors: np.ndarray) -> np.ndarray:
    """Mean of the 1, 2, ... smallest errors."""
    curve: np.ndarray = np.cumsum(np.sort(errors)) / np.arange(1, len(errors) + 1)
    return curve


def percent(value: float) -> str:
    """A fraction in per cent; a dash where it could not be computed."""
    return f"{100 * value:.2f} %" if value == value else "-"
