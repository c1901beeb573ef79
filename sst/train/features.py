"""First keypoints from a network that somebody trained: a model of transformers, or a program of torch.export.

Most such networks describe every place of an image and find none. Their features are read at SIFT's points, which lie
where something is; a network with a score for every place, or with keypoints of its own, chooses its points itself.

Shape letters: B batch, S side of the view, h w cells of a map, D descriptor size, N points. Points are (x, y) with
pixel centres at integers. A map of h x w cells covers the view evenly: cell (i, j) has its centre at pixel
((j + 0.5) S / w - 0.5, (i + 0.5) S / h - 0.5).
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cluster import storage
from sst.config import KeypointSettings
from sst.errors import UserError, readable
from sst.nn.losses import sample_descriptors
from sst.train.keypoints import VIEW, KeypointDetector, Keypoints, RootSift, apart

CANDIDATES = 16
"""Local maxima of a score map that compete for each place among the keypoints; most lie beside a higher one."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What nearly all image models were trained with; for those that do not say."""

CONTRACT = (
    "a program of torch.export takes float32 RGB images (B, 3, S, S) in [0, 1], with S = {side}, and gives features "
    "(B, D, h, w), or a tuple of scores (B, h, w) and features (B, D, h, w)"
)

Maps = tuple[Tensor | None, Tensor]
"""Scores (B, h, w), higher for better places, or none; and features (B, D, h, w)."""

Network = Callable[[Tensor], Maps]
"""Sees float32 RGB views (B, 3, S, S) in [0, 1], on its device."""


@dataclass(frozen=True, eq=False)
class MappedFeatures:
    """Keypoints of a network that gives maps; a `sst.train.keypoints.KeypointDetector`.

    Attributes:
        network: gives features and perhaps scores.
        sift: where features are read if there are no scores; with scores its cell and number of points count.
        descriptor_size: channels of the features.
        device: of the network.
    """

    network: Network
    sift: RootSift
    descriptor_size: int
    device: torch.device
    sees_view: bool = True

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> list[Keypoints]:
        """See `KeypointDetector`."""
        if not images:
            return []
        views = _views(images, self.device)
        scores, features = self.network(views)
        side = views.shape[-1]
        if scores is None:
            points = [self.sift.points(image) for image in images]
        else:
            points = [strongest(each, side, self.sift.cell, self.sift.max_num_keypoints) for each in scores]
        return [self._described(features[row : row + 1], each, side) for row, each in enumerate(points)]

    def _described(self, features_1Dhw: Tensor, points_N2: np.ndarray, side: int) -> Keypoints:
        cells = torch.from_numpy(points_N2).to(self.device) + 0.5
        cells = cells * cells.new_tensor([features_1Dhw.shape[-1] / side, features_1Dhw.shape[-2] / side]) - 0.5
        return usable_keypoints(points_N2, sample_descriptors(features_1Dhw.float(), cells[None])[0])


@dataclass(frozen=True, eq=False)
class FoundKeypoints:
    """Keypoints of a model of transformers that finds and describes them; a `sst.train.keypoints.KeypointDetector`.

    Attributes:
        model: its kind is keypoint detection, such as SuperPoint's.
        sift: its cell and number of points count.
        descriptor_size: width of the model's descriptors.
        device: of the model.
    """

    model: Callable[[Tensor], Any]
    sift: RootSift
    descriptor_size: int
    device: torch.device
    sees_view: bool = True

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> list[Keypoints]:
        """See `KeypointDetector`."""
        if not images:
            return []
        views = _views(images, self.device)
        # Such models take grey images in three equal channels; the weights are those of ITU-R BT.601.
        grey = (views * views.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
        found = self.model(grey.expand(-1, 3, -1, -1))
        side = views.shape[-1]
        results = []
        for points, scores, descriptors, mask in zip(
            found.keypoints, found.scores, found.descriptors, found.mask.bool(), strict=True
        ):
            order = scores[mask].argsort(descending=True, stable=True)
            pixels = (points[mask][order] * side).float().cpu().numpy()
            kept = apart(pixels.tolist(), self.sift.cell)[: self.sift.max_num_keypoints]
            results.append(usable_keypoints(pixels[kept], descriptors[mask][order][kept]))
        return results


def _views(images: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Images of one size as a network sees them; float32 (B, 3, S, S) in [0, 1]."""
    return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 255


def usable_keypoints(points_N2: np.ndarray, descriptors_ND: Tensor) -> Keypoints:
    """Those whose descriptors can be compared, neither zero nor NaN; normalised."""
    rows = functional.normalize(descriptors_ND.float(), dim=1).cpu().numpy()
    described = np.square(rows).sum(1) > 0.5
    return points_N2[described], rows[described]


def strongest(scores_hw: Tensor, side: int, cell: float, number: int) -> np.ndarray:
    """The highest local maxima of a score map, apart from each other by a cell; float32 (N, 2) in pixels of the view.

    Args:
        scores_hw: the map.
        side: of the view.
        cell: of `sst.train.keypoints.apart`, in pixels of the view.
        number: N at most.
    """
    scores = scores_hw.float()
    width = scores.shape[-1]
    highest = functional.max_pool2d(scores[None], 3, stride=1, padding=1)[0]
    peaks = (scores == highest).flatten().nonzero()[:, 0]
    order = scores.flatten()[peaks].argsort(descending=True, stable=True)[: CANDIDATES * number]
    place = peaks[order].cpu().numpy()
    scale = np.array([side / width, side / scores.shape[0]])
    points = (np.stack([place % width, place // width], 1) + 0.5) * scale - 0.5
    kept: np.ndarray = points[apart(points.tolist(), cell)[:number]].astype(np.float32)
    return kept


def load_features(settings: KeypointSettings, sift: RootSift) -> KeypointDetector:
    """The detector with the network that the settings name, tried on an empty view.

    Args:
        settings: which network, and from where.
        sift: points for features without any.

    Raises:
        UserError: if no model is given, it can't be read, or it is none that gives features of places.
    """
    each = settings.features
    if not each.model:
        raise UserError(
            f"--keypoints {settings.detector} needs a model, by --features-model "
            + ("FILE, a program of torch.export" if settings.detector == "export" else "FOLDER or a hub id")
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sides = (VIEW, 2 * VIEW) if settings.remove_background else (VIEW,)
    if settings.detector == "export":
        return _tried(load_program(each.model, device), sift, device, sides, f"{each.model}: {CONTRACT}")
    model, finds = load_transformer(each.model, device)
    if finds:
        return FoundKeypoints(model, sift, model.config.descriptor_decoder_dim, device)
    network = mapped(model, *preparation(each.model), each.side)
    return _tried(network, sift, device, sides, f"{each.model}: this model has no features for each place of an image")


def _tried(
    network: Network, sift: RootSift, device: torch.device, sides: tuple[int, ...], expected: str
) -> MappedFeatures:
    """The detector, if the network takes views of these sides and gives maps."""
    width = 0
    for side in sides:
        try:
            with torch.inference_mode():
                scores, features = network(torch.zeros(2, 3, side, side, device=device))
            if features.dim() != 4 or len(features) != 2 or (scores is not None and scores.dim() != 3):
                shapes = [tuple(each.shape) for each in (scores, features) if each is not None]
                raise ValueError(f"gave shapes {shapes} for two views")
        except Exception as error:  # whatever a network of somebody's raises
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{expected.format(side=side)}; it {reason or type(error).__name__}") from error
        width = features.shape[1]
    return MappedFeatures(network, sift, width, device)


def load_program(path: str, device: torch.device) -> Network:
    """Reads a program of torch.export. It is code: a file from somebody else can do what its author wanted.

    Args:
        path: local path or URL.
        device: to which it is moved.

    Raises:
        UserError: if it can't be read.
    """
    from torch.export.passes import move_to_device_pass

    with readable(f"{path}: can't read the program of torch.export"):
        data = storage.read_bytes(path)
    try:
        program = move_to_device_pass(torch.export.load(io.BytesIO(data)), device)
        inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
        batch = inputs[0].meta["val"].shape[0]
        module = program.module()
    except Exception as error:  # torch raises many types on damaged input
        raise UserError(
            f"{path}: not a program of torch.export ({type(error).__name__}); write one by torch.export.save"
        ) from error

    def see(views_B3SS: Tensor) -> Maps:
        # A program exported for a fixed number of images gets as many, the last one repeated.
        number = batch if isinstance(batch, int) else len(views_B3SS)
        parts = []
        for start in range(0, len(views_B3SS), number):
            part = views_B3SS[start : start + number]
            filled = torch.cat([part, part[-1:].expand(number - len(part), -1, -1, -1)])
            found = module(filled)
            parts.append([each[: len(part)] for each in (found if isinstance(found, tuple | list) else [found])])
        maps = [torch.cat(each) for each in zip(*parts, strict=True)]
        return (None, maps[0]) if len(maps) == 1 else (maps[0], maps[1])

    return see


def load_transformer(model: str, device: torch.device) -> tuple[Any, bool]:
    """Reads a model of Hugging Face transformers, in safetensors only and without code of its own.

    Args:
        model: folder, or id on the hub, from where the library fetches it.
        device: to which it is moved.

    Returns:
        The model, and whether it finds keypoints itself.

    Raises:
        UserError: if transformers is not installed, or the model can't be had or is incomplete.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "--keypoints transformers needs the extra `features`: make install EXTRAS=features, or "
            "pip install 'self-training-landmarks[features]'"
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
        finds = type(config) in transformers.MODEL_FOR_KEYPOINT_DETECTION_MAPPING
        kind = transformers.AutoModelForKeypointDetection if finds else transformers.AutoModel
        network, state = kind.from_pretrained(
            model, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # transformers raises many types on damaged input
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{model}: can't load this model of transformers ({reason}); give a folder that save_pretrained wrote, or "
            "a hub id, with safetensors"
        ) from error
    # A pooled answer for the whole image is not needed, and many files are without its weights.
    if missing := sorted(name for name in state["missing_keys"] if "pooler" not in name):
        raise UserError(f"{model}: weights are missing, the first of {len(missing)}: {', '.join(missing[:3])}")
    return network.to(device).eval(), finds


def preparation(model: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by which a model's images are normalised, as its folder says; else ImageNet's."""
    from transformers import ImageProcessingMixin

    try:
        said, _ = ImageProcessingMixin.get_image_processor_dict(model)
    except OSError:  # a folder with a model alone
        said = {}
    if not said.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return tuple(said.get("image_mean", IMAGENET_MEAN)), tuple(said.get("image_std", IMAGENET_STD))


def mapped(model: Any, mean: tuple[float, ...], deviation: tuple[float, ...], side: int) -> Network:
    """The last layer of a model as a map: its patches' tokens, or its channels.

    Args:
        model: of transformers.
        mean: of the images' channels, which is subtracted.
        deviation: by which they are divided.
        side: at which the model sees a view of `VIEW` pixels.
    """
    centre, spread = (torch.tensor(each, device=model.device)[:, None, None] for each in (mean, deviation))
    patch = getattr(model.config, "patch_size", None)

    def see(views_B3SS: Tensor) -> Maps:
        scaled = side * views_B3SS.shape[-1] // VIEW
        views = functional.interpolate(views_B3SS, (scaled, scaled), mode="bilinear", antialias=True)
        last = model(pixel_values=(views - centre) / spread).last_hidden_state
        if last.dim() == 3:
            # Tokens of the whole image, such as the class token and registers, come before those of the patches.
            if patch is None:
                raise ValueError("gave tokens, and its configuration has no patch_size")
            cells = scaled // (patch if isinstance(patch, int) else patch[0])
            last = last[:, -(cells**2) :].transpose(1, 2).unflatten(2, (cells, cells))
        return None, last

    return see
