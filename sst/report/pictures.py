"""A run's pictures: what is read from a finished run, cut out and given to `sst.report.plots`."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np
from matplotlib.figure import Figure

from cluster import storage
from cluster.correspondence import labels_url
from cluster.shards import Labels
from sst.data.corpus import Corpus
from sst.data.loader import decode_to_view
from sst.data.shards import RawSample, ShardInfo, read_shard
from sst.nn.geometry import SCORING_SIZE, STRIDE
from sst.report import plots
from sst.report.evaluation import Scores
from sst.report.report import ReportFigure
from sst.train.model import ModelRecord
from sst.train.run_directory import RunDirectory

SIDE = int(SCORING_SIZE)
GRID_IMAGES, PAIR_IMAGES, GALLERY_CROPS, ROUND_IMAGES = 24, 6, 64, 8

CROP = 56
"""Side of a gallery crop, in pixels of a 256 px view."""


@dataclass
class Shown:
    """Images chosen for pictures.

    Attributes:
        views: uint8 (256, 256, 3) canonical views.
        points: (K, 2) landmarks in pixels of the views.
        confidence: (K,).
        first: (n, 2) points and (n,) clusters of the first keypoints, where the image was trained on.
    """

    views: list[np.ndarray] = field(default_factory=list)
    points: list[np.ndarray] = field(default_factory=list)
    confidence: list[np.ndarray] = field(default_factory=list)
    first: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)


def view_of(sample: RawSample) -> np.ndarray:
    """The canonical view, uint8 (256, 256, 3)."""
    image, matrix = decode_to_view(sample, SIDE)
    return np.asarray(cv2.warpAffine(image, matrix[:2], (SIDE, SIDE)), np.uint8)


def spread(shard_samples: int, wanted: int) -> list[int]:
    """Sample numbers spread evenly over a shard."""
    return sorted({int(n) for n in np.linspace(0, shard_samples - 1, min(wanted, shard_samples))})


def choose(run: RunDirectory, corpus: Corpus, shard: ShardInfo, wanted: int, input_size: int) -> Shown:
    """Some images of one shard with their predictions and first keypoints."""
    arrays, shown = storage.load_npz(run.predictions_url(shard.file)), Shown()
    first = Labels.load(labels_url(run.round_url(0), shard.file)) if shard.split == "train" else None
    thresholds = run.record(0).thresholds
    if first is not None and thresholds is not None:
        first = first.below(np.array(thresholds))
    numbers = set(spread(shard.samples, wanted))
    for number, sample in enumerate(read_shard(f"{corpus.url}/{shard.file}", shard.sha256)):
        if number in numbers:
            shown.views.append(view_of(sample))
            shown.points.append(arrays["points"][number])
            shown.confidence.append(arrays["confidence"][number])
            if first is not None:
                points, cluster = first.sample(number)
                shown.first.append((points * (SIDE / input_size * STRIDE), cluster))
    return shown


def galleries(
    run: RunDirectory, corpus: Corpus, landmarks: int, visible: float
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each landmark up to 64 crops around it, over as many shards as that takes.

    Yields:
        Landmark number, crops (n, side, side, 3) and the landmark's place in each crop (n, 2).
    """
    crops: list[list[np.ndarray]] = [[] for _ in range(landmarks)]
    marks: list[list[np.ndarray]] = [[] for _ in range(landmarks)]
    for shard in corpus.manifest.shards_of("test") or corpus.train:
        arrays = storage.load_npz(run.predictions_url(shard.file))
        for number, sample in enumerate(read_shard(f"{corpus.url}/{shard.file}", shard.sha256)):
            wanted = [k for k in range(landmarks) if len(crops[k]) < GALLERY_CROPS]
            seen = [k for k in wanted if arrays["confidence"][number, k] >= visible]
            view = view_of(sample) if seen else None
            for k in seen:
                assert view is not None
                place = arrays["points"][number, k]
                corner = np.clip(np.round(place - CROP / 2), 0, SIDE - CROP).astype(int)
                crops[k].append(view[corner[1] : corner[1] + CROP, corner[0] : corner[0] + CROP])
                marks[k].append(place - corner)
        if all(len(each) >= GALLERY_CROPS for each in crops):
            break
    for k in range(landmarks):
        if crops[k]:
            yield k, np.stack(crops[k]), np.stack(marks[k])


def png(picture: Figure | np.ndarray) -> bytes:
    """A chart, or an image (uint8 RGB), as PNG bytes."""
    if isinstance(picture, np.ndarray):
        return cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()


def draw_round(run: RunDirectory, corpus: Corpus, number: int, input_size: int) -> bytes:
    """The labels of one round on a few training images, as PNG: what the next steps are trained on."""
    record, shard = run.record(number), corpus.train[0]
    labels, numbers = run.labels(record, shard.file), spread(shard.samples, ROUND_IMAGES)
    views, drawn = [], []
    for row, sample in enumerate(read_shard(f"{corpus.url}/{shard.file}", shard.sha256)):
        if row in numbers:
            points, cluster = labels.sample(row)
            active = np.array(record.active)[cluster]
            views.append(view_of(sample))
            drawn.append((points[active] * (SIDE / input_size * STRIDE), cluster[active]))
    return png(plots.label_grid(views, drawn))


def all_predictions(run: RunDirectory, corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Landmarks (N, K, 2) and confidences (N, K) of the test images, or of the training images where there are none."""
    shards = corpus.manifest.shards_of("test") or corpus.train
    arrays = [storage.load_npz(run.predictions_url(shard.file)) for shard in shards]
    return np.concatenate([a["points"] for a in arrays]), np.concatenate([a["confidence"] for a in arrays])


CAPTIONS = {
    "landmarks": "Landmarks on images the training has not seen. The same number and colour should sit on the same "
    "part of the object everywhere.",
    "before_after": "Above: the first keypoints and their clusters, where training started. Below: the landmarks it "
    "ended with. Compare within a row: the two rows are numbered apart, so the same colour above and below is not the "
    "same part.",
    "errors": "Errors of the best landmarks, averaged from the best to the worst. Forward: annotated points found from "
    "the landmarks. Backward: landmarks found from the annotated points. Lower is better.",
    "rounds": "Label statistics over the rounds. Persistence should rise and the equivariance error fall; a sharp fall "
    "of labels per image means that the detector loses points.",
}
"""What the report says under its pictures, but for the galleries."""


def draw_all(run: RunDirectory, corpus: Corpus, model: ModelRecord, scores: Scores | None) -> list[ReportFigure]:
    """All pictures of a finished run, in the report's order."""
    size, visible = model.network.input_size, model.visible
    test = (corpus.manifest.shards_of("test") or corpus.train)[0]
    shown = choose(run, corpus, test, GRID_IMAGES, size)
    seen = np.stack(shown.confidence) >= visible
    pictures: dict[str, Figure | np.ndarray] = {
        "landmarks": plots.landmark_grid(np.stack(shown.views), np.stack(shown.points), seen)
    }
    before = choose(run, corpus, corpus.train[0], PAIR_IMAGES, size)
    seen = np.stack(before.confidence) >= visible
    pictures["before_after"] = plots.before_after(np.stack(before.views), before.first, np.stack(before.points), seen)
    if scores is not None and scores.landmarks_kept:
        pictures["errors"] = plots.error_curves(scores.forward_curve, scores.backward_curve, scores.protocol)
    rounds = [{"round": record.number, "kind": record.kind} | record.metrics for record in run.records()]
    pictures["rounds"] = plots.round_statistics(rounds)
    drawn = [ReportFigure(name, CAPTIONS[name], png(picture)) for name, picture in pictures.items()]
    for k, crops, marks in galleries(run, corpus, len(model.clusters), visible):
        drawn.append(
            ReportFigure(
                f"landmark_{k:02d}",
                f"Landmark {k} (cluster {model.clusters[k]}) on {len(crops)} images: the mark should lie on "
                f"the same part.",
                png(plots.cluster_gallery(crops, marks)),
            )
        )
    return drawn
