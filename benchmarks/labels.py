"""How good are a run's labels, round by round? `python -m benchmarks.labels RUN`, of a run on an annotated corpus.

Test images are not touched: the annotated training images, the first 1,000, are cut into halves. All errors are in per
cent of the length that the corpus's scoring protocol divides by (of faces the distance between the eyes); each is
fitted on one half and scored on the other, in turn. All regressions are those of the scores. Columns:

- *label error*: from the annotated points to a cluster's label, in the images where there is one: what does not move
  with the object. Median and mean over the clusters, and the worst of them. A cluster counts that has ten labels or
  more in each half.
- *forward from labels*: from all labels of an image to the annotated points. Missing labels are completed as missing
  landmarks are when a run is scored, so it is what the score would be if the labels were the landmarks.
- *perfect stage 2*: forward from landmarks as a detector would give them that had learnt all that the labels have in
  common, none of their errors in single images, and answers everywhere: each landmark lies where the regression that
  was fitted on the *other* half's labels puts it. The regressions that place the landmarks of the images to fit on and
  of those to score thus have no label in common. If they had, anything would look perfect: sixty coordinates that are
  made of the annotated points by whatever numbers tell these points again (labels drawn at random on the drawings:
  0.7 %, where a constant guess has 17.8 % and this column 22 %). The fewer annotated images there are, the more
  pessimistic it is: each half's regressions have errors of their own, which more labels would average away.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro

from benchmarks.common import print_table
from cluster import storage
from sst.data.corpus import Corpus, open_corpus
from sst.errors import UserError, exit_on_user_error
from sst.nn.geometry import SCORING_SIZE, STRIDE
from sst.report.evaluate_run import AnnotatedImages, protocol_of
from sst.report.evaluation import (
    MIN_TRAIN,
    Protocol,
    constant_guess,
    forward_errors,
    landmark_places,
    percent,
    protocol_named,
)
from sst.train.run_directory import RoundRecord, RunDirectory

WORST = 3
"""Clusters that a round's row names."""


@dataclass(frozen=True)
class LabelScores:
    """How good one round's labels are; errors are fractions of the protocol's length.

    Attributes:
        clusters: int (C,), the clusters that count.
        share: float64 (C,), of the annotated images that have a label of each.
        error: float64 (C,), mean label error of each.
        forward: error from labels to annotated points; NaN where no cluster counts.
        perfect: the same from the landmarks of a perfect stage 2.
    """

    clusters: np.ndarray
    share: np.ndarray
    error: np.ndarray
    forward: float
    perfect: float


def score_labels(label_NK2: np.ndarray, points_NL2: np.ndarray, rules: Protocol) -> LabelScores:
    """Scores the labels of a round against annotated points; see the top of this file.

    Args:
        label_NK2: labels, NaN where an image has none of a cluster; pixels of a 256 px view.
        points_NL2: annotated points of the same images, likewise.
        rules: how the corpus is scored.
    """
    every = np.arange(len(points_NL2))
    halves = np.array_split(every, 2)
    labelled_NK = np.isfinite(label_NK2).all(axis=2)
    clusters = np.flatnonzero(np.all([labelled_NK[half].sum(axis=0) >= MIN_TRAIN for half in halves], axis=0))
    if not len(clusters):
        return LabelScores(clusters, np.empty(0), np.empty(0), np.nan, np.nan)
    label, labelled = label_NK2[:, clusters], labelled_NK[:, clusters]
    length_N = rules.normaliser(points_NL2)
    place = np.empty_like(label)
    for fitted, asked in (halves, halves[::-1]):
        place[asked] = landmark_places(label, labelled, points_NL2, fitted, asked)
    error = np.nanmean(np.linalg.norm(label - place, axis=2) / length_N[:, None], axis=0)

    def forward(landmark_NK2: np.ndarray, visible_NK: np.ndarray) -> float:
        each = [
            forward_errors(landmark_NK2, visible_NK, points_NL2, a, b, rules.train_images, length_N[b], seed=0)
            for a, b in (halves, halves[::-1])
        ]
        return float(np.mean(each))

    everywhere = np.ones_like(labelled)
    return LabelScores(clusters, labelled.mean(axis=0), error, forward(label, labelled), forward(place, everywhere))


def labels_of(run: RunDirectory, record: RoundRecord, annotated: AnnotatedImages, input_size: int) -> np.ndarray:
    """Labels (N, K, 2) of the annotated training images, in pixels of a 256 px view, NaN where there is none."""
    parts = []
    for shard, numbers in annotated.rows:
        labels = run.labels(record, shard.file)
        points = np.full((len(labels), len(record.active), 2), np.nan)
        image = np.repeat(np.arange(len(labels)), np.diff(labels.offsets))
        points[image, labels.cluster] = labels.points * (STRIDE * SCORING_SIZE / input_size)
        parts.append(points[numbers])
    return np.concatenate(parts)


def annotated_training_images(corpus: Corpus, rules: Protocol) -> tuple[AnnotatedImages, float]:
    """The annotated training images, and the constant guess's forward error on them.

    Raises:
        UserError: if there are too few for two halves, or they do not fit the protocol.
    """
    annotated = AnnotatedImages.of(corpus, training_only=True)
    if annotated is None:
        raise UserError(f"{corpus.url} has no annotated training images, so labels cannot be scored")
    second = np.arange(len(annotated.groundtruth)) >= (len(annotated.groundtruth) + 1) // 2
    try:
        guesses = [constant_guess(annotated.groundtruth, half, rules.name) for half in (second, ~second)]
    except ValueError as error:
        raise UserError(f"{corpus.url}, of which only training images are read, in two halves: {error}") from error
    return annotated, float(np.mean(guesses))


def round_row(record: RoundRecord, scores: LabelScores) -> tuple[str, ...]:
    """The table's row of a round."""
    worst = np.argsort(-scores.error)[:WORST]
    named = ", ".join(f"{scores.clusters[each]}: {100 * scores.error[each]:.1f}" for each in worst)
    median, mean = (float(f(scores.error)) if len(scores.error) else np.nan for f in (np.median, np.mean))
    return (
        str(record.number),
        record.kind,
        f"{record.metrics['labels_per_image']:.1f}",
        f"{record.metrics['clusters_in_use']:.0f}",
        str(len(scores.clusters)),
        *(percent(each) for each in (median, mean)),
        named or "-",
        *(percent(each) for each in (scores.forward, scores.perfect)),
    )


HEADER = (
    *("round", "made by", "labels per image", "clusters in use", "scored", "label error: median", "mean"),
    *("worst clusters, %", "forward from labels", "perfect stage 2"),
)


@exit_on_user_error()
def main(run: Annotated[str, tyro.conf.Positional], clusters: bool = False, shards: str | None = None) -> None:
    """Prints the table.

    Args:
        run: directory or URL of a run, finished or not.
        clusters: print the last round's clusters too, the best first.
        shards: where the corpus lies now, if it has moved.
    """
    directory = RunDirectory(run)
    if not storage.exists(directory.settings_url):
        raise UserError(f"{run} is no run: it has no settings.json")
    given, records = storage.read_json(directory.settings_url), directory.records()
    if not records:
        raise UserError(f"{run} has no complete round yet")
    corpus = open_corpus(shards or given["shards"])
    if corpus.manifest_hash != records[0].manifest:
        raise UserError(f"{corpus.url} is not the corpus of {run}: their manifests differ")
    rules = protocol_named(protocol_of(corpus))
    annotated, guess = annotated_training_images(corpus, rules)
    found = []
    for record in records:
        labels = labels_of(directory, record, annotated, given["settings"]["network"]["input_size"])
        found.append(score_labels(labels, annotated.groundtruth, rules))
    print(f"{len(annotated.groundtruth)} annotated training images; a constant guess has {percent(guess)} forward\n")
    print_table(HEADER, [round_row(*each) for each in zip(records, found, strict=True)])
    if clusters:
        scores, active = found[-1], records[-1].active
        print()
        rows = [
            (str(number), percent(error), percent(share), "yes" if active[number] else "no")
            for error, share, number in sorted(zip(scores.error, scores.share, scores.clusters, strict=True))
        ]
        print_table((f"cluster of round {records[-1].number}", "label error", "images with it", "active"), rows)


if __name__ == "__main__":
    tyro.cli(main)
