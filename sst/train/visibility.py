"""Confidences that mean something: the probability that a landmark is visible, by images whose answer is known.

An image whose landmarks the network is sure of is warped and covered in part by the system itself, so that it is known
which of them can still be seen. What tells the two apart is a logistic function of the height of a landmark's peak,
whose scale and offset go into the network's last convolution: nothing is left to be done at prediction.

Shape letters: N images, K landmarks. Points are (x, y) in pixels of a 256 px view unless said otherwise.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from sst.nn.augment import Augmentation, inside_view, occlude, random_affine, warp_images
from sst.nn.geometry import STRIDE, transform
from sst.nn.network import LandmarkDetector
from sst.nn.precision import Precision, autocast
from sst.nn.steps import Batch

SHIFTED = Augmentation(shift=0.35)
"""Shifts by up to a third of the view, so that landmarks leave it; else as in training."""

COVERED_SHARE = 0.8
"""Share of the images that are covered in part."""

LEAST_SCALE = 0.25
"""A higher peak must mean a landmark that is more likely visible, whatever few images say."""

CLOSE_TO_ONE = 20.0
"""Weight, in images, of the wish that nothing be changed: it matters where a landmark has few images."""


@dataclass(frozen=True)
class Trials:
    """Peaks on images whose answer is known.

    Attributes:
        logit: float64 (N, K), of the peak's height.
        visible: bool (N, K), whether the landmark can still be seen.
        known: bool (N, K), whether it could be seen before, so that this is known.
    """

    logit: np.ndarray
    visible: np.ndarray
    known: np.ndarray


@torch.inference_mode()
def trials(
    network: LandmarkDetector,
    batches: Iterable[Batch],
    points_NK2: np.ndarray,
    *,
    input_size: int,
    precision: Precision,
    seed: int,
) -> Trials:
    """Warps and covers images, and looks how high the peaks of their landmarks still are.

    Args:
        network: with probabilities, in eval mode.
        batches: N images in order.
        points_NK2: their landmarks in cells of the heatmap, NaN where the network is not sure.
        input_size: side S of the view.
        precision: see `sst.nn.precision`.
        seed: of warps and coverings.
    """
    device = next(network.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    first, parts = 0, []
    for batch in (batch.to(device) for batch in batches):
        points = torch.from_numpy(points_NK2[first : first + len(batch.keys)]).float().to(device)
        first += len(batch.keys)
        warp = random_affine(len(batch.keys), input_size, SHIFTED, generator)
        moved = transform(warp, points * STRIDE) / STRIDE
        views = warp_images(batch.images, warp @ batch.to_view, input_size)
        views, hidden = occlude(views, moved, COVERED_SHARE, generator)
        with autocast(device, precision):
            heat = network(views)
        peak = heat.float().amax((-2, -1)).clamp(1e-7, 1 - 1e-7)
        known = points.isfinite().all(-1)
        visible = inside_view(moved, input_size) & ~hidden & known
        parts.append([each.cpu().numpy() for each in (torch.logit(peak).double(), visible, known)])
    return Trials(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def logistic(found: Trials) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset by which logits of peaks become those of visibility; float64 (K,) each, scale above 0.

    Landmarks that are visible and hidden ones weigh the same, however many there are: so 0.5 is where a peak of this
    height is as common among the ones as among the others. Fitted by likelihood (Platt, 1999), the parameters drawn
    towards 1 and 0.
    """
    landmarks = found.logit.shape[1]
    scale, offset = np.ones(landmarks), np.zeros(landmarks)
    for k in range(landmarks):
        known = found.known[:, k]
        x, visible = found.logit[known, k], found.visible[known, k]
        if not visible.any() or visible.all():
            continue
        weight = np.where(visible, 0.5 / visible.mean(), 0.5 / (1 - visible.mean()))
        sign = np.where(visible, 1.0, -1.0)

        def cost(
            parameters: np.ndarray, x: np.ndarray = x, sign: np.ndarray = sign, weight: np.ndarray = weight
        ) -> tuple[float, np.ndarray]:
            a, b = parameters
            z = sign * (a * x + b)
            slope = -weight * sign * expit(-z)
            pull = CLOSE_TO_ONE * np.array([a - 1, b])
            value = -(weight * log_expit(z)).sum() + 0.5 * CLOSE_TO_ONE * ((a - 1) ** 2 + b**2)
            return float(value), np.array([(slope * x).sum(), slope.sum()]) + pull

        fit = minimize(cost, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=[(LEAST_SCALE, None), (None, None)])
        scale[k], offset[k] = fit.x
    return scale, offset


@torch.no_grad()
def calibrated(network: LandmarkDetector, scale_K: np.ndarray, offset_K: np.ndarray) -> None:
    """Changes the last convolution so that every landmark's logits are scaled and offset."""
    out = network.landmark.out
    scale, offset = (torch.from_numpy(each).to(out.weight) for each in (scale_K, offset_K))
    for name, value in out.named_parameters():
        value.mul_(scale.reshape(-1, *[1] * (value.dim() - 1)))
        if name == "bias":
            value.add_(offset)
