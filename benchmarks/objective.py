"""Which label-free figure ranks runs as annotations do? `python -m benchmarks.objective SWEEP...`.

Spearman's rank correlation of each figure, over the finished trials of a sweep, with forward and backward error.
Figures of which more is better count with a minus, so that 1 is always perfect. A trial without a landmark that could
be scored is worse than any other, and so is one without a figure.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from sst.tune.objective import round_error
from sst.tune.sweep import REDUCTION

MORE_IS_BETTER = ("label_persistence", "visible_share", "repeatability", "landmarks", "labels_per_image")


def metrics_of(sweep: Path) -> dict[str, dict[str, float]]:
    """Figures of each finished trial, and of its rounds of stage 1."""
    found = {}
    for path in sorted(sweep.glob("trials/*/trial.json")):
        record = json.loads(path.read_text())
        if record["status"] != "finished":
            continue
        clusters = json.loads((path.parent / "settings.json").read_text())["settings"]["cluster"]["clusters"]
        rounds = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        each = [line for line in rounds if line.get("made_by") == "correspondence"]
        metrics = dict(record["metrics"])
        for number, line in enumerate(each, 1):
            for name in ("equivariance_error", "label_persistence", "labels_per_image"):
                if name in line:
                    metrics[f"round {number}/{name}"] = line[name]
            metrics[f"round {number}/error to the clusters' distance"] = round_error(line, clusters)
        found[path.parent.name] = metrics
    return found


def stopped(sweep: Path, trials: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Trials that early stopping would have ended, had they come in this order."""
    rounds = json.loads((sweep / "sweep.json").read_text())["settings"]["stage1"]["rounds"]
    name = f"round {1 + max(1, rounds // 3)}/error to the clusters' distance"
    ended: list[str] = []
    earlier: list[float] = []
    for number, metrics in trials.items():
        if earlier and metrics[name] > np.percentile(earlier, 100 / REDUCTION):
            ended.append(number)
        earlier.append(metrics[name])
    return ended


def candidates(metrics: Mapping[str, float]) -> dict[str, float]:
    """Each figure as something to be made small, and small combinations of them."""
    each = {
        name: -value if name.rpartition("/")[2] in MORE_IS_BETTER else value
        for name, value in metrics.items()
        if "score" not in name
    }
    error, seen = metrics.get("model/equivariance_error"), metrics.get("model/visible_share", 0.0)
    again, loose = metrics.get("model/repeatability", 0.0), metrics.get("model/looseness")
    if error is not None and seen:
        each["equivariance error / visible share"] = error / seen
    if error is not None and again:
        each["equivariance error / repeatability"] = error / again
    if error is not None and loose is not None:
        each["equivariance error x off its place"] = error * loose
    return each


def main(sweeps: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Prints a table for each sweep.

    Args:
        sweeps: directories of sweeps.
    """
    for sweep in sweeps:
        found = metrics_of(sweep)
        trials = list(found.values())
        rows = [candidates(metrics) for metrics in trials]
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = Table("figure", "trials with it", "forward", "backward", title=f"{sweep.name}: rank correlation")
        for name in names:
            shown = []
            for score in ("score/forward", "score/backward"):
                ours = [row.get(name, math.inf) for row in rows]
                theirs = [given.get(score, math.inf) for given in trials]
                value = float(spearmanr(ours, theirs).statistic) if len(trials) > 2 else math.nan
                shown.append("-" if math.isnan(value) else f"{value:+.2f}")
            count = sum(name in row for row in rows)
            table.add_row(name, str(count), *shown)
        Console(width=100).print(table)
        print("early stopping ends trials", ", ".join(stopped(sweep, found)) or "none", "\n")


if __name__ == "__main__":
    tyro.cli(main)
