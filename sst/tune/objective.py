"""What a sweep makes small: how good a run is, with and without annotations."""

import math
from collections.abc import Mapping
from typing import Any, Literal

Objective = Literal["label-free", "forward", "backward"]


def round_error(line: Mapping[str, Any], clusters: int) -> float:
    """Equivariance error of a round of stage 1, from its metrics, in per cent of the mean distance between clusters.

    So many clusters in a view lie about 1 / sqrt(clusters) of its side apart: without that, many clusters would look
    better than few merely for having less room to be wrong in. Where nothing is found on both copies of
    an image, the error counts as the whole view. It tells hopeless trials from others, and does not rank those.
    """
    return float(line.get("equivariance_error", 100.0)) * math.sqrt(clusters)


def final_objective(objective: Objective, metrics: Mapping[str, float]) -> float | None:
    """Of a finished run, from its metrics; in per cent, None where they do not give it.

    Without annotations: the share of landmarks, over all images, that are not found again at their place after a random
    warp, which is small only for landmarks that are steady and seen. The equivariance error alone prefers a
    model that sees hardly anything; docs/tuning.md has the metrics.
    """
    if objective == "label-free":
        again = metrics.get("model/repeatability")
        return None if again is None else 100 * (1 - again)
    value = metrics.get(f"score/{objective}")
    return None if value is None or value != value else 100 * value
