"""Confidences as probabilities: what is hidden is hidden, and the fit is that of an independent library."""

import numpy as np
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from sst.nn.augment import occlude
from sst.nn.network import LandmarkDetector, NetworkShape
from sst.train.visibility import Trials, calibrated, logistic


def test_what_is_covered_shows_another_image_and_its_points_are_hidden() -> None:
    generator = torch.Generator().manual_seed(0)
    views = torch.stack([torch.full((3, 64, 64), value) for value in (0.0, 0.5, 1.0)])
    axis = torch.arange(16.0)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(1, -1, 2).expand(3, -1, 2)
    covered, hidden = occlude(views, points, 1.0, generator)
    for image, other in enumerate((1.0, 0.0, 0.5)):
        for (x, y), under in zip(points[image].long().tolist(), hidden[image].tolist(), strict=True):
            assert float(covered[image, 0, 4 * y, 4 * x]) == (other if under else float(views[image, 0, 0, 0]))
        assert 0 < hidden[image].float().mean() < 0.45**2 * 1.5
    plain, none = occlude(views, points, 0.0, generator)
    assert torch.equal(plain, views) and not none.any()


def test_the_fit_is_that_of_balanced_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    visible = rng.random((40_000, 2)) < [0.8, 0.5]
    logit = np.where(visible, rng.normal([1.0, 2.0], 1.0, (40_000, 2)), rng.normal([-1.0, 1.0], 1.0, (40_000, 2)))
    known = rng.random((40_000, 2)) < 0.9
    scale, offset = logistic(Trials(logit, visible & known, known))
    for k in range(2):
        theirs = LogisticRegression(C=1e6, class_weight="balanced").fit(
            logit[known[:, k], k, None], visible[known[:, k], k]
        )
        assert abs(scale[k] / theirs.coef_[0, 0] - 1) < 0.02 and abs(offset[k] - theirs.intercept_[0]) < 0.02


def test_a_landmark_that_was_never_hidden_keeps_its_confidence() -> None:
    one = np.ones((50, 1), bool)
    assert [float(each[0]) for each in logistic(Trials(np.full((50, 1), 3.0), one, one))] == [1.0, 0.0]


def test_a_higher_peak_never_means_less() -> None:
    """Even where few images say the contrary."""
    logit, visible = np.array([[2.0], [1.0], [-1.0], [-2.0]]), np.array([[False], [False], [True], [True]])
    scale, _ = logistic(Trials(logit, visible, np.ones((4, 1), bool)))
    assert scale[0] > 0


def test_calibration_changes_the_networks_own_heatmaps() -> None:
    torch.manual_seed(0)
    network = LandmarkDetector(NetworkShape(16, 1, 2, 16), 3, True).eval()
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before = torch.logit(network(image)).numpy()
        calibrated(network, np.array([0.5, 1.0, 2.0]), np.array([1.0, 0.0, -1.0]))
        after = network(image).numpy()
    expected = expit(before * np.array([0.5, 1.0, 2.0])[:, None, None] + np.array([1.0, 0.0, -1.0])[:, None, None])
    np.testing.assert_allclose(after, expected, atol=1e-5)
