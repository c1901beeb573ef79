"""What happens to one batch on the device: the loss of a training step of either stage, and keypoints with descriptors.

Needs torch and numpy alone, like all that it calls.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from sst.nn.augment import STRONGER, Augmentation, augment, occlude, warp_images
from sst.nn.losses import (
    Contrast,
    DetectorTarget,
    Labelled,
    Objective,
    Sum,
    descriptor_loss,
    detector_loss,
    landmark_loss,
    sample_descriptors,
    softmax_loss,
)
from sst.nn.precision import Precision, autocast
from sst.nn.suppression import decode_keypoints, unite
from sst.nn.symmetry import mirror_some


@dataclass(frozen=True)
class Stage1Step:
    """What a step of stage 1 needs to know; the defaults are the published values.

    Attributes:
        input_size: side of the square view, in pixels.
        precision: arithmetic of convolutions, see `sst.nn.precision`.
        different_share: share of pairs whose views come from two different images.
        own_classes: whether each point is a class of its own, of which both views of one image show one; else clusters.
        contrast: how descriptors are compared, see `sst.nn.losses.Contrast`.
        margin: L2 distance to which descriptors of different clusters are pushed apart.
        temperature: of the "softmax" contrast.
        flip_share: share of the images that are mirrored, where partners are known (beyond the paper).
        descriptor_weight: of the descriptor loss.
        detector_weight: of the detector loss.
        detector_target: what the detector learns to draw at a label, see `sst.nn.losses.detector_loss`.
        detector_objective: how its heatmap is compared with that, see `sst.nn.losses.heatmap_loss`.
        augmentation: random changes of each view.
    """

    input_size: int = 256
    precision: Precision = "auto"
    different_share: float = 0.5
    own_classes: bool = False
    contrast: Contrast = "margin"
    margin: float = 0.8
    temperature: float = 0.1
    flip_share: float = 0.0
    descriptor_weight: float = 10.0
    detector_weight: float = 1.0
    detector_target: DetectorTarget = "cell"
    detector_objective: Objective = "squared"
    augmentation: Augmentation = Augmentation()


@dataclass(frozen=True)
class Stage2Step:
    """What a step of stage 2 needs to know; the defaults are the published values.

    Attributes:
        input_size: side of the square view, in pixels.
        precision: arithmetic of convolutions, see `sst.nn.precision`.
        objective: how heatmaps are compared with their targets, see `sst.nn.losses.heatmap_loss`.
        flip_share: share of the images that are mirrored, where partners are known (beyond the paper).
        occlude_share: share of the images that are covered in part: labels there are hidden (beyond the paper).
        augmentation: random changes of each image.
    """

    input_size: int = 256
    precision: Precision = "auto"
    objective: Objective = "squared"
    flip_share: float = 0.0
    occlude_share: float = 0.0
    augmentation: Augmentation = STRONGER


STAGE2_SCALE = 2.0
"""The published step adds the gradients of two halves of the batch, each of its mean loss: twice that of the mean over
all, which RMSprop does not see, but the weight decay beside it does."""


OUT_OF_VIEW = -1e3
"""A place at which no bump reaches the view, in heatmap units."""


@dataclass(frozen=True)
class Batch:
    """Decoded images and padded labels, on one device.

    Attributes:
        keys: sample keys.
        images: uint8 (B, H, W, 3), padded at right and bottom.
        stored: float32 (B, 2), width and height without the padding.
        to_view: float32 (B, 3, 3), stored image to canonical view.
        points: float32 (B, N, 2), heatmap units.
        cluster: int64 (B, N), -1 for padding.
    """

    keys: tuple[str, ...]
    images: Tensor
    stored: Tensor
    to_view: Tensor
    points: Tensor
    cluster: Tensor

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.images, self.stored, self.to_view, self.points, self.cluster

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device; the host does not wait where it is pinned."""
        return Batch(self.keys, *(tensor.to(device, non_blocking=True) for tensor in self._tensors))

    def pinned(self) -> "Batch":
        """The same batch in memory that a GPU can read while the host works on; needs CUDA."""
        return Batch(self.keys, *(tensor.pin_memory() for tensor in self._tensors))


def random_batch(count: int, input_size: int, clusters: int) -> Batch:
    """Images and labels like those of training: half as large again as the view, 20 points each."""
    generator, points = torch.Generator().manual_seed(0), 20
    side = input_size * 3 // 2
    images = torch.randint(0, 256, (count, side, side, 3), generator=generator).to(torch.uint8)
    places = torch.rand(count, points, 2, generator=generator) * (input_size // 4 - 1)
    cluster = torch.randint(0, clusters, (count, points), generator=generator)
    stored, to_view = torch.full((count, 2), float(side)), torch.eye(3).expand(count, 3, 3)
    return Batch(tuple(map(str, range(count))), images, stored, to_view, places, cluster)


@dataclass(frozen=True)
class Losses:
    """What a step minimises, on one worker's share of the batch.

    Attributes:
        parts: sums and counts by name.
        weights: factor of each part's mean.
        scale: factor of the whole.
        seen: scalars that tell how it goes and that nothing is learnt from.
    """

    parts: dict[str, Sum]
    weights: dict[str, float]
    scale: float = 1.0
    seen: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def counts(self) -> Tensor:
        """Number of terms of each part, float32; to be added up over the workers."""
        return torch.stack([part.terms for part in self.parts.values()]).float()

    def total(self, counts: Tensor | None = None) -> Tensor:
        """This worker's summand of the loss of the whole batch.

        Args:
            counts: `counts` of all workers together; by default this one is alone.
        """
        whole = (self.counts if counts is None else counts).clamp_min(1).unbind()
        weighted = [self.weights[name] * part.total for name, part in self.parts.items()]
        return self.scale * torch.stack([each / count for each, count in zip(weighted, whole, strict=True)]).sum()

    def metrics(self) -> dict[str, Tensor]:
        """The loss without its scale, its parts where there are more, and what was seen, of this share alone."""
        means = {name: part.mean() for name, part in self.parts.items()}
        loss = torch.stack([self.weights[name] * mean for name, mean in means.items()]).sum()
        return {"loss": loss} | (means if len(means) > 1 else {}) | dict(self.seen)


def stage1_losses(
    model: nn.Module,
    batch: Batch,
    step: Stage1Step,
    generator: torch.Generator,
    partner_K: Tensor | None = None,
) -> Losses:
    """Losses of one step of stage 1 (paper, section 3.1).

    Args:
        model: `DetectorDescriptor`, perhaps wrapped for DDP.
        batch: B images; pair i is two views of image i, or of image i and another of the batch.
        step: what it needs to know.
        generator: source of randomness on the batch's device.
        partner_K: partner of every cluster in mirrored images; some images are then mirrored (beyond the paper).
    """
    count, device = len(batch.keys), batch.images.device
    each = torch.arange(count, device=device)
    shift = torch.randint(1, max(2, count), (), generator=generator, device=device)
    different = torch.rand(count, generator=generator, device=device) < step.different_share
    second = each if step.own_classes else torch.where(different, (each + shift) % count, each)
    chosen = torch.cat([each, second])
    to_view, points, cluster = batch.to_view[chosen], batch.points[chosen], batch.cluster[chosen]
    if step.own_classes:
        cluster = torch.where(cluster >= 0, torch.arange(cluster.shape[1], device=device), -1)
    elif partner_K is not None:
        mirrored = torch.rand(len(chosen), generator=generator, device=device) < step.flip_share
        to_view, points, cluster = mirror_some(to_view, points, cluster, mirrored, partner_K, step.input_size)
    views, points, inside = augment(
        batch.images[chosen],
        batch.stored[chosen],
        to_view,
        points,
        step.input_size,
        step.augmentation,
        generator,
    )
    with autocast(device, step.precision):
        heat, desc = model(views)
    at_points = sample_descriptors(desc.float(), points)
    # Detector losses of a pair's two views add up.
    detector = detector_loss(
        heat, points, torch.where(inside, cluster, -1), step.detector_target, step.detector_objective
    )
    one_view, other_view = (Labelled(cluster[rows], inside[rows]) for rows in (slice(count), slice(count, None)))
    both = at_points[:count], at_points[count:], one_view, other_view
    compared = (
        descriptor_loss(*both, step.margin) if step.contrast == "margin" else softmax_loss(*both, step.temperature)
    )
    parts = {"detector": Sum(detector.sum(), torch.full_like(detector[0], count)), "descriptor": compared}
    weights = {"detector": step.detector_weight, "descriptor": step.descriptor_weight}
    return Losses(parts, weights, seen={"peak": heat.detach().float().amax((-2, -1)).mean()})


def stage2_losses(
    model: nn.Module,
    batch: Batch,
    active_K: Tensor,
    step: Stage2Step,
    generator: torch.Generator,
    partner_K: Tensor | None = None,
) -> Losses:
    """Loss of one step of stage 2 (paper, section 3.3).

    A channel whose label the augmentation moves out of the view, or covers, learns to answer nothing there.

    Args:
        model: `LandmarkDetector`, perhaps wrapped for DDP.
        batch: images and labels.
        active_K: bool, clusters that are trained.
        step: what it needs to know.
        generator: source of randomness on the batch's device.
        partner_K: partner of every cluster in mirrored images; some images are then mirrored (beyond the paper).

    Returns:
        The loss, and what `landmark_loss` sees beside it.
    """
    to_view, points, cluster = batch.to_view, batch.points, batch.cluster
    if partner_K is not None:
        chosen = torch.rand(len(batch.keys), generator=generator, device=points.device) < step.flip_share
        to_view, points, cluster = mirror_some(to_view, points, cluster, chosen, partner_K, step.input_size)
    views, points, _ = augment(
        batch.images,
        batch.stored,
        to_view,
        points,
        step.input_size,
        step.augmentation,
        generator,
    )
    if step.occlude_share:
        views, hidden = occlude(views, points, step.occlude_share, generator)
        points = torch.where(hidden[..., None], OUT_OF_VIEW, points)
    with autocast(batch.images.device, step.precision):
        heat = model(views)
    loss, seen = landmark_loss(heat, points, cluster, active_K, step.objective)
    return Losses({"landmarks": loss}, {"landmarks": 1.0}, STAGE2_SCALE, seen)


def keypoint_maps(
    model: nn.Module, batch: Batch, input_size: int, precision: Precision, warp_B33: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Detector heatmap (B, 1, H, W) and raw descriptors (B, D, H, W), float32, of the views, perhaps warped."""
    to_view = batch.to_view if warp_B33 is None else warp_B33 @ batch.to_view
    with autocast(batch.images.device, precision):
        heat, desc = model(warp_images(batch.images, to_view, input_size))
    return heat.float(), desc.float()


@torch.inference_mode()
def describe(
    model: nn.Module,
    batch: Batch,
    previous_BP2: Tensor | None,
    *,
    input_size: int,
    threshold: float,
    precision: Precision,
    enough: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keypoints of the detector, united with previous labels or alone, and their descriptors (paper, section 3.2).

    Args:
        model: `DetectorDescriptor`.
        batch: B images.
        previous_BP2: previous labels in heatmap units, padded with NaN; or none.
        input_size: side S of the view.
        threshold: detector confidence above which a keypoint is taken.
        precision: see `sst.nn.precision`.
        enough: keypoints of an image from which its previous labels are left out (beyond the paper); None for none.

    Returns:
        Points of each image (B,); points (N, 2) in heatmap units, image by image, previous labels first; their
        descriptors (N, D), float16, L2-normalised; and bool (B,), which images' previous labels were united. All on the
        batch's device.
    """
    heat, desc = keypoint_maps(model, batch, input_size, precision)
    image_N, points_N2, _ = decode_keypoints(heat, threshold)
    united_B = torch.zeros(len(heat), dtype=torch.bool, device=heat.device)
    if previous_BP2 is not None:
        united_B = torch.bincount(image_N, minlength=len(heat)) < enough if enough is not None else ~united_B
        few_N = united_B[image_N]
        labels_BP2 = torch.where(united_B[:, None, None], previous_BP2, torch.nan)
        image_U, points_U2 = unite(labels_BP2, image_N[few_N], points_N2[few_N], *heat.shape[-2:])
        image_N, order = torch.cat([image_U, image_N[~few_N]]).sort(stable=True)
        points_N2 = torch.cat([points_U2, points_N2[~few_N]])[order]
    count_B = torch.bincount(image_N, minlength=len(heat))
    slot_N = torch.arange(len(image_N), device=image_N.device) - (count_B.cumsum(0) - count_B)[image_N]
    padded_BS2 = points_N2.new_zeros(len(count_B), max(1, int(count_B.max())), 2)
    padded_BS2[image_N, slot_N] = points_N2
    raw_ND = sample_descriptors(desc, padded_BS2)[image_N, slot_N]
    return count_B, points_N2, functional.normalize(raw_ND, dim=-1).half(), united_B
