"""What a sweep varies: settings by name, each with values or a range, and how trials are drawn from them."""

import difflib
import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, model_validator
from scipy.stats import qmc

from cluster import storage
from sst.config import TrainSettings
from sst.errors import UserError

Values = dict[str, Any]
"""A trial's values by the name of the setting, such as "cluster.clusters"."""


class Choice(BaseModel):
    """One of some values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    values: Annotated[tuple[Any, ...], Field(min_length=1)]

    def at(self, share: float) -> Any:
        """The value at a share of 0 to 1 of the list."""
        return self.values[min(len(self.values) - 1, int(share * len(self.values)))]

    def bounds(self) -> tuple[Any, ...]:
        """What a setting must take."""
        return self.values


class Range(BaseModel):
    """Any number from `low` to `high`; whole numbers where both are whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if not self.low < self.high:
            raise ValueError(f"{self.low} must be below {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range must begin above 0, not at {self.low}")
        return self

    def at(self, share: float) -> int | float:
        """The number at a share of 0 to 1 of the range."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        low, high = (self.low - 0.5, self.high + 0.5) if whole else (self.low, self.high)
        if self.log:
            value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        else:
            value = low + share * (high - low)
        return min(max(round(value), int(self.low)), int(self.high)) if whole else float(f"{value:.4g}")

    def bounds(self) -> tuple[int | float, ...]:
        """What a setting must take."""
        return (self.low, self.high)


class SearchSpace(RootModel[dict[str, Choice | Range]]):
    """Settings that vary, by name."""

    model_config = ConfigDict(frozen=True)


def dimension_of(given: Any) -> Any:
    """A dimension as people write it: a list or "20,30" (choice), "1e-4..1e-3" or "1e-4..1e-3:log" (range)."""
    if isinstance(given, list):
        return {"values": [_value(value) if isinstance(value, str) else value for value in given]}
    if not isinstance(given, str):
        return given if isinstance(given, Mapping) else {"values": [given]}
    low, dots, high = given.partition("..")
    if dots:
        high, _, scale = high.partition(":")
        if scale not in ("", "log"):
            raise ValueError(f"{given!r}: after the range only :log may stand")
        return {"low": _number(low), "high": _number(high), "log": scale == "log"}
    return {"values": [_value(part) for part in given.split(",")]}


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _value(text: str) -> Any:
    try:
        return _number(text)
    except ValueError:
        return yaml.safe_load(text)  # true, null and words; YAML takes 5e-4 for a word


def parse_space(given: Mapping[str, Any], settings: TrainSettings) -> SearchSpace:
    """A search space, of which every value is one that the setting takes.

    Args:
        given: name of a setting to what `dimension_of` takes.
        settings: what does not vary.

    Raises:
        UserError: naming every setting that does not exist or does not take a value.
    """
    wrong: list[str] = []
    dimensions: dict[str, Choice | Range] = {}
    for name, dimension in given.items():
        try:
            read = dimension_of(dimension)
            dimensions[name] = (Choice if "values" in read else Range).model_validate(read)
            for value in dimensions[name].bounds():
                with_values(settings, {name: value})
        except ValidationError as error:
            wrong.append(f"{name}: {error.errors()[-1]['msg']} ({dimension!r})")
        except (ValueError, yaml.YAMLError) as error:
            wrong.append(f"{name}: {error}")
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("search space: " + "; ".join(wrong))
    if not dimensions:
        raise UserError("search space: nothing varies; name settings by --vary or --space")
    return SearchSpace(dimensions)


def read_space(file: str) -> dict[str, Any]:
    """A search space file: YAML, names of settings to values or ranges.

    Raises:
        UserError: if it can't be read or is no mapping.
    """
    try:
        given = yaml.safe_load(storage.read_bytes(file))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise UserError(f"{file}: a search space maps names of settings to values, such as cluster.clusters: [20, 30]")
    return given


def with_values(settings: TrainSettings, values: Values) -> TrainSettings:
    """The settings with some of them replaced.

    Args:
        settings: what stays.
        values: by dotted name.

    Raises:
        UserError: if a setting does not exist, or the settings do not go together.
    """
    tree = settings.model_dump()
    for name, value in values.items():
        *path, last = name.split(".")
        branch: Any = tree
        for part in path:
            branch = branch.get(part) if isinstance(branch, dict) else None
        if not isinstance(branch, dict) or last not in branch or isinstance(branch[last], dict):
            near = difflib.get_close_matches(name, setting_names(tree), 1)
            raise UserError(f"{name}: there is no such setting" + (f"; did you mean {near[0]}?" if near else ""))
        branch[last] = value
    try:
        return TrainSettings.model_validate(tree)
    except ValidationError as error:
        given = ", ".join(f"{name}={value}" for name, value in values.items())
        raise UserError(f"{given}: " + "; ".join(problem["msg"] for problem in error.errors())) from error


def setting_names(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all settings."""
    return [
        name
        for key, value in tree.items()
        for name in (setting_names(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key])
    ]


def default_space(settings: TrainSettings) -> dict[str, Any]:
    """What is worth varying first: number of clusters, rounds at equal cost, learning rate, detector threshold."""
    one, clusters = settings.stage1, settings.cluster.clusters
    space: dict[str, Any] = {"cluster.clusters": [round(clusters * share) for share in (0.5, 0.75, 1, 1.5, 2)]}
    if one.warmup_iterations:
        rate = {"low": one.learning_rate / 3, "high": one.learning_rate * 3, "log": True}
        space["stage1.learning_rate"] = rate
        space["stage1.threshold"] = [round(one.threshold * share, 3) for share in (0.5, 1, 1.5)]
    return space


def draw_trials(space: SearchSpace, count: int, seed: int) -> list[Values]:
    """Different trials, spread evenly over every dimension; all combinations where there are no more.

    A Latin hypercube: each dimension is cut into `count` equal parts, and each part is used once.

    Args:
        space: what varies.
        count: trials at most.
        seed: of the draw.
    """
    dimensions = space.root
    if all(isinstance(dimension, Choice) for dimension in dimensions.values()):
        combinations = itertools.product(*(dimension.bounds() for dimension in dimensions.values()))
        first = list(itertools.islice(combinations, count + 1))
        if len(first) <= count:
            return [dict(zip(dimensions, combination, strict=True)) for combination in first]
    rng = np.random.default_rng(seed)
    drawn: list[Values] = []
    # Choices have few values, so trials may be drawn twice; these are drawn again.
    for _ in range(100):
        shares = qmc.LatinHypercube(len(dimensions), rng=rng).random(count)
        for row in shares:
            trial = {
                name: dimension.at(share) for (name, dimension), share in zip(dimensions.items(), row, strict=True)
            }
            if trial not in drawn and len(drawn) < count:
                drawn.append(trial)
    return drawn
