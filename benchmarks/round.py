"""What does a round take, by its parts? `python -m benchmarks.round RUN...`, with directories of runs of jobs.train.

From the times that a run itself notes: training steps, waiting for data, extraction, k-means, assignment, the metrics,
and what is left (starting the stream of images, checkpoints). The first round, before which all is loaded for the first
time, does not count. `--iterations` says what the shares would be with a round of so many steps.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import tyro

from benchmarks.common import machine, print_table, summed_up

CORRESPONDENCE = ("extract", "kmeans", "assign", "metrics")
"""Parts of the correspondence phase, as `sst.train.run_directory.RoundRecord.seconds` names them."""


def rounds_of(run: Path) -> list[dict[str, float]]:
    """Seconds of every part, of each round of stage 1 but the first."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    made = [line for line in lines if line["kind"] == "round" and line["made_by"] == "correspondence"]
    found = []
    for before, after in zip(made[:-1], made[1:], strict=True):
        steps = [line for line in lines if line["kind"] == "step" and before["time"] < line["time"] <= after["time"]]
        if not steps:
            continue  # a run that was interrupted here
        views = 2 * json.loads((run / "settings.json").read_text())["settings"]["stage1"]["pairs"]
        counted = [steps[0]["phase_step"], *(b["step"] - a["step"] for a, b in zip(steps[:-1], steps[1:], strict=True))]
        lasted = [views * number / line["images_per_second"] for number, line in zip(counted, steps, strict=True)]
        waited = sum(line["waiting_share"] * seconds for line, seconds in zip(steps, lasted, strict=True))
        parts = {name: after[f"{name}_seconds"] for name in CORRESPONDENCE}
        whole = after["time"] - before["time"]
        found.append(
            {"steps": sum(counted), "training": sum(lasted) - waited, "waiting for data": waited}
            | parts
            | {"rest": whole - sum(lasted) - sum(parts.values()), "all": whole}
        )
    return found


def main(runs: Sequence[Path], /, iterations: int | None = None) -> None:
    """Reads and prints.

    Args:
        runs: run directories.
        iterations: steps of a round for which the shares are to be given.
    """
    rounds = [each for run in runs for each in rounds_of(run)]
    if not rounds:
        raise SystemExit("no run with two rounds of correspondence among these")
    print(machine())
    rows = []
    for name in rounds[0]:
        if name == "steps":
            continue
        shares = [100 * each[name] / each["all"] for each in rounds]
        rows.append((name, summed_up([each[name] for each in rounds]), summed_up(shares)))
    print_table((f"{len(rounds)} rounds of {rounds[0]['steps']:.0f} steps", "seconds", "% of the round"), rows)
    phase = [sum(each[name] for name in CORRESPONDENCE) for each in rounds]
    kmeans = [100 * each["kmeans"] / whole for each, whole in zip(rounds, phase, strict=True)]
    print(f"correspondence: {summed_up(phase)} s; of it k-means {summed_up(kmeans)} %")
    if iterations:
        seconds = [
            (each["training"] + each["waiting for data"]) * iterations / each["steps"] + each["rest"] for each in rounds
        ]
        share = [100 * item / (item + training) for item, training in zip(phase, seconds, strict=True)]
        print(f"with {iterations} steps a round: correspondence {statistics.median(share):.1f} % of it")


if __name__ == "__main__":
    tyro.cli(main)
