"""What a sweep makes small: how good a run is, with and without annotations."""

from collections.abc import Mapping
from typing import Any, Literal

Objective = Literal["label-free", "forward", "backward"]


def round_objective(line: Mapping[str, Any]) -> float:
    """Of a round of stage 1, from its figures."""
    return float(line.get("equivariance_error", float("inf")))


def final_objective(objective: Objective, figures: Mapping[str, float]) -> float | None:
    """Of a finished run, from its figures; None where they do not give it."""
    if objective == "label-free":
        return figures.get("model/equivariance_error")
    value = figures.get(f"score/{objective}")
    return None if value is None or value != value else 100 * value
