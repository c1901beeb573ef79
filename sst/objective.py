"""What a sweep makes small: how good a run is, with and without annotations."""

from collections.abc import Mapping
from typing import Any, Literal

Objective = Literal["label-free", "forward", "backward"]


def round_objective(line: Mapping[str, Any]) -> float:
    """Of a round of stage 1, from its figures: what `final_objective` without annotations is for landmarks.

    The share of clusters, over some images, that are not found again at their place after a random warp.
    """
    return 100.0 * (1.0 - float(line.get("repeatability", 0.0)))


def final_objective(objective: Objective, figures: Mapping[str, float]) -> float | None:
    """Of a finished run, from its figures; in per cent, None where they do not give it.

    Without annotations: the share of landmarks, over all images, that are not found again at their place after a random
    warp, which is small only for landmarks that are steady and seen. The equivariance error alone prefers a
    model that sees hardly anything; docs/tuning.md has the figures.
    """
    if objective == "label-free":
        again = figures.get("model/repeatability")
        return None if again is None else 100 * (1 - again)
    value = figures.get(f"score/{objective}")
    return None if value is None or value != value else 100 * value
