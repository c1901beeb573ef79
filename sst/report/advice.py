"""What a finished run's metrics say about it, without annotations: facts about each landmark, and warnings with advice.

Shape letters: N images, K landmarks. Points are (x, y) in pixels of a 256 px view.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial import Delaunay, QhullError

from sst.nn.geometry import SCORING_SIZE
from sst.predict.shape import affine_maps, lay_on, mean_shape
from sst.train.run_directory import LandmarkRecord

RARE = 0.3
"""Share of the images below which a landmark is rarely seen."""

STIFFNESS = 1.0
"""As of `sst.predict.shape.affine_maps`; lower, since what the map follows is no looseness."""

LOOSE = 0.03
"""Share of the view: a landmark whose median distance from its place on the mean shape is larger does not move with the
others. On faces, landmarks on eyes, nose and mouth have 0.006 to 0.017, those sliding along outlines 0.056 to 0.09."""

REWEIGHTINGS = 6

SWAPS = 0.05
"""Share of the images in which a pair takes left for right."""

REPEATS = 0.7
"""Share of the images in which a steady landmark is found again after a random warp."""

LABELS_FELL = 0.5
"""Labels per image at the end of stage 1 as a share of their first number."""

TWIN_SHARE = 0.5
"""Share of the images in which two landmarks that name one place lie within `TWIN_RADIUS`."""
TWIN_RADIUS = 5.7

LOW_PERSISTENCE = 0.5
"""Share of the labels that outlive the last round of stage 1."""

FEW_IMAGES = 250
"""Training images below which results are poor."""


@dataclass(frozen=True, eq=False)
class LandmarkFacts:
    """Metrics of each landmark over the images it was predicted on.

    Attributes:
        visible: (K,) share of the images on which it is visible.
        confidence: (K,) mean confidence there; 0 if nowhere.
        looseness: (K,) median distance from its place on the mean shape, as a share of the view, after an affine map
            has laid the visible landmarks onto it; NaN if never visible.
        outside: (K,) share of the images in which it lies outside of the hull of the steady landmarks.
        repeats: (K,) share of the images in which it is found again after a random warp; NaN where not measured.
        partner: (K,) its partner in mirrored images, -1 for none.
        swaps: (K,) share of the images in which it is taken for its partner.
    """

    visible: np.ndarray
    confidence: np.ndarray
    looseness: np.ndarray
    outside: np.ndarray
    repeats: np.ndarray
    partner: np.ndarray
    swaps: np.ndarray
    twins: tuple[tuple[int, int], ...] = ()


def landmark_facts(
    points_NK2: np.ndarray, confidence_NK: np.ndarray, visible: float, record: LandmarkRecord | None
) -> LandmarkFacts:
    """Facts from predictions, and from what the end of training has noted.

    Args:
        points_NK2: landmarks.
        confidence_NK: how sure the network is of them.
        visible: confidence from which a landmark counts as visible.
        record: from the run directory, where there is one.
    """
    landmarks = points_NK2.shape[1]
    seen = confidence_NK >= visible
    surety = np.where(seen, confidence_NK, 0.0).astype(np.float64)
    weight = np.ones(landmarks)
    for _ in range(REWEIGHTINGS):  # loose landmarks should not draw the map along
        shape = mean_shape(points_NK2, surety * weight, STIFFNESS)
        placed = lay_on(affine_maps(points_NK2, surety * weight, shape, STIFFNESS), points_NK2)
        off = np.linalg.norm(placed - shape, axis=-1) / SCORING_SIZE
        looseness = np.array([np.median(off[seen[:, k], k]) if seen[:, k].any() else np.nan for k in range(landmarks)])
        weight = 1 / (1 + (np.nan_to_num(looseness) / LOOSE) ** 4)
    steady = (seen.mean(0) > RARE) & (looseness < LOOSE)
    outside = np.zeros(landmarks)
    for k in np.flatnonzero(seen.any(0)).tolist():
        outside[k] = _outside(placed[seen[:, k], k], shape[steady]).mean()
    twins = []
    for k in range(landmarks):
        for j in range(k + 1, landmarks):
            both = seen[:, k] & seen[:, j]
            near = np.linalg.norm(points_NK2[both, k] - points_NK2[both, j], axis=-1) < TWIN_RADIUS
            if both.mean() > RARE and near.mean() > TWIN_SHARE:
                twins.append((k, j))
    return LandmarkFacts(
        visible=seen.mean(0),
        confidence=(confidence_NK * seen).sum(0) / np.maximum(1, seen.sum(0)),
        looseness=looseness,
        outside=outside,
        repeats=np.full(landmarks, np.nan) if record is None else np.array(record.repeatability),
        partner=np.full(landmarks, -1) if record is None else np.array(record.partner),
        swaps=np.zeros(landmarks) if record is None else np.array(record.swap_share),
        twins=tuple(twins),
    )


def _outside(points_N2: np.ndarray, corners_X2: np.ndarray) -> np.ndarray:
    """Which points lie outside of the hull; all inside where there is no hull."""
    try:
        return np.asarray(Delaunay(corners_X2).find_simplex(points_N2) < 0)
    except (QhullError, ValueError):  # fewer than three points, or all on a line
        return np.zeros(len(points_N2), bool)


@dataclass(frozen=True)
class Warned:
    """Something to look at, what to do about it, and the landmarks it is about."""

    text: str
    advice: str
    landmarks: tuple[int, ...] = ()


def seen_on_the_way(lines: Iterable[Mapping[str, Any]]) -> list[Warned]:
    """What a run warned of while it trained, each sign where it was first seen.

    Args:
        lines: of the metrics file.
    """
    first: dict[str, Warned] = {}
    for line in lines:
        if line["kind"] == "health":
            first.setdefault(line["sign"], Warned(f"While training, {line['text']}", line["advice"]))
    return list(first.values())


def warnings_of(
    facts: LandmarkFacts, rounds: Sequence[Mapping[str, Any]], wanted: int | None, images: int
) -> list[Warned]:
    """What to look at, the most important first.

    Args:
        facts: of the landmarks.
        rounds: metrics of every round, with "round" and "made_by".
        wanted: how many landmarks were asked for.
        images: training images.
    """
    if not (facts.visible > 0).any():
        return [
            Warned(
                "No landmark is visible on any image.",
                "The network never became confident: train longer (stage2.iterations), or look at the first "
                "keypoints in the second picture: if they miss the object, give boxes around it.",
            )
        ]
    found = [] if wanted is None else _of_number(len(facts.visible), wanted)
    found += [*_of_rounds(rounds), *_of_places(facts), *_of_certainty(facts)]
    if images < FEW_IMAGES:
        found.append(
            Warned(
                f"{images} training images are few.",
                "More images are the surest way to steadier landmarks.",
            )
        )
    return found


def _of_number(landmarks: int, wanted: int) -> list[Warned]:
    """Warns of fewer landmarks than were wanted."""
    if landmarks >= wanted:
        return []
    return [
        Warned(
            f"{landmarks} landmarks came out where {wanted} were wanted.",
            "Begin with more clusters (cluster.clusters), keep smaller ones (stage2.min_population), or give "
            "more images.",
        )
    ]


def _of_rounds(rounds: Sequence[Mapping[str, Any]]) -> list[Warned]:
    """Warns of labels that grew fewer or did not settle in stage 1."""
    found = []
    labels = [entry["labels_per_image"] for entry in rounds if entry["made_by"] in ("keypoints", "correspondence")]
    if len(labels) > 1 and labels[-1] < LABELS_FELL * labels[0]:
        found.append(
            Warned(
                f"Labels per image fell from {labels[0]:.0f} to {labels[-1]:.0f} during stage 1.",
                "The detector lost points: lower stage1.threshold, or make rounds longer (stage1.round_iterations).",
            )
        )
    persistence = [entry["label_persistence"] for entry in rounds if "label_persistence" in entry]
    if persistence and persistence[-1] < LOW_PERSISTENCE:
        found.append(
            Warned(
                f"Only {100 * persistence[-1]:.0f} % of the labels outlived the last round of stage 1.",
                "Labels had not settled: more rounds (stage1.rounds) or longer ones should help.",
            )
        )
    return found


def _of_places(facts: LandmarkFacts) -> list[Warned]:
    """Warns of landmarks that are not at a place of their own: loose ones, swapped ones, twins."""
    found = []
    if loose := np.flatnonzero((facts.looseness > LOOSE) & (facts.visible > 0)).tolist():
        outside = 100 * facts.outside[loose].mean()
        found.append(
            Warned(
                f"{_each(loose, facts.looseness)} of the view off their typical place: they do not move with the "
                f"others, and lie outside the steady landmarks in {outside:.0f} % of the images.",
                "They sit on a limb that moves by itself, slide along an outline, or lie in the background. Against "
                "the last two help tighter boxes, more varied images or a higher stage2.visible; don't measure with "
                "them.",
                tuple(loose),
            )
        )
    swaps = {
        (k, int(j)): max(facts.swaps[k], facts.swaps[j])
        for k, j in enumerate(facts.partner)
        if j > k and max(facts.swaps[k], facts.swaps[j]) > SWAPS
    }
    if swaps:
        listed = ", ".join(f"{k} and {j} ({100 * share:.0f} % of the images)" for (k, j), share in swaps.items())
        found.append(
            Warned(
                f"Left/right pairs that swap: {listed}.",
                "Train with mirrored images: stage2.flip_share 0.5.",
                tuple(k for pair in swaps for k in pair),
            )
        )
    if facts.twins:
        listed = ", ".join(f"{k} and {j}" for k, j in facts.twins)
        found.append(
            Warned(
                f"Landmarks that name the same place in most images: {listed}.",
                "Merge sooner or more often: lower stage2.merge_share, or larger stage2.merge_radius.",
                tuple(dict.fromkeys(k for pair in facts.twins for k in pair)),
            )
        )
    return found


def _of_certainty(facts: LandmarkFacts) -> list[Warned]:
    """Warns of landmarks that are not found again, or hardly ever seen."""
    found = []
    if unsure := np.flatnonzero((facts.visible > 0) & (facts.repeats < REPEATS)).tolist():
        found.append(
            Warned(
                f"{_each(unsure, facts.repeats)} of warped images only: found again so often at the same place.",
                "They are unsure; a longer stage 2 may settle them.",
                tuple(unsure),
            )
        )
    if rare := np.flatnonzero(facts.visible < RARE).tolist():
        found.append(
            Warned(
                f"{_each(rare, facts.visible)} of the images only: visible so seldom.",
                "Either their part is often hidden, or the network has learnt it poorly: a longer stage 2 may bring "
                "them; fewer clusters would do without them.",
                tuple(rare),
            )
        )
    return found


def _each(landmarks: Sequence[int], shares: np.ndarray) -> str:
    """Landmarks with a share each, as the beginning of a sentence that goes on with what it is a share of."""
    listed = ", ".join(f"{k}: {100 * shares[k]:.1f} %" for k in landmarks)
    return f"Landmark{'s' if len(landmarks) > 1 else ''} {listed}"
