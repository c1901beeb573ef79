"""Scores landmarks against annotations: a finished run beside its baselines, or predictions from anywhere."""

from collections.abc import Sequence
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from cluster import storage
from sst.config import TrainSettings
from sst.errors import UserError, exit_on_user_error
from sst.report.evaluate_run import Annotated as AnnotatedImages
from sst.report.evaluate_run import score_constant, score_first_keypoints, score_run
from sst.report.evaluation import Scores, evaluate
from sst.run.pipeline import open_corpus, percent
from sst.train.model import load_model
from sst.train.run_directory import RunDirectory


class Run(BaseModel):
    """A finished run beside a constant guess and its first keypoints."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: Annotated[str, tyro.conf.Positional]
    """Directory or URL of the run."""
    shards: str | None = None
    """Where its shards lie now, if they have moved."""
    visible: float | None = None
    """Confidence from which a landmark counts as visible, instead of the run's own."""


class Predictions(BaseModel):
    """Landmarks from anywhere: an npz with prediction (N, K, 2), groundtruth (N, L, 2) and is_test (N,)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Annotated[str, tyro.conf.Positional]
    """The npz; coordinates in pixels of a 256 px view, NaN = not visible."""
    protocol: str
    """Scoring protocol: mafl, ls3d, human36m, faces68 or toy."""
    out: Annotated[str | None, tyro.conf.arg(name="json")] = None
    """Where the scores are written; printed if not given."""


def evaluate_run(config: Run) -> dict[str, tuple[float, Scores | None]]:
    """Scores a run and its baselines, prints the table and returns its rows.

    Raises:
        UserError: if the run is not finished or its corpus has no annotations.
    """
    run = RunDirectory(config.run)
    told_url = storage.join(run.url, "settings.json")
    if not storage.exists(told_url):
        raise UserError(f"{run.url} is no run: it has no settings.json")
    told = storage.read_json(told_url)
    corpus = open_corpus(config.shards or told["shards"])
    try:
        _, model = load_model(run.model_url)
    except ValueError as error:
        raise UserError(f"{error}; go on with the run by the jobs.train command that began it") from error
    annotated = AnnotatedImages.of(corpus)
    if annotated is None:
        raise UserError(f"{corpus.url} has no annotated training and test images, so nothing can be scored")
    settings = TrainSettings.model_validate(told["settings"])
    first = score_first_keypoints(run, corpus, annotated, settings)
    trained = score_run(run, corpus, annotated, model.visible if config.visible is None else config.visible)
    rows: dict[str, tuple[float, Scores | None]] = {
        "constant guess": (score_constant(corpus, annotated), None),
        "first keypoints, no training": (first.forward, first),
        "trained landmarks": (trained.forward, trained),
    }
    table = Table("", "forward", "backward", "landmarks in over 80 % of images")
    for name, (forward, scores) in rows.items():
        kept = ("-", "-") if scores is None else (percent(scores.backward), str(scores.landmarks_kept))
        table.add_row(name, percent(forward), *kept)
    Console().print(table)
    return rows


def evaluate_predictions(config: Predictions) -> Scores:
    """Scores an npz; writes or prints JSON.

    Raises:
        UserError: if the file or its arrays are not as they should be.
    """
    try:
        arrays = storage.load_npz(config.file)
        missing = [name for name in ("prediction", "groundtruth", "is_test") if name not in arrays]
        if missing:
            raise ValueError(f"{config.file}: arrays {missing} are missing")
        scores = evaluate(arrays["prediction"], arrays["groundtruth"], arrays["is_test"].astype(bool), config.protocol)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    if config.out is not None:
        storage.write_json(config.out, scores.to_json())
    else:
        Console().print_json(data=scores.to_json())
    return scores


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and scores."""
    config = tyro.cli(Run | Predictions, prog="jobs.evaluate", description=__doc__, args=arguments)
    if isinstance(config, Run):
        evaluate_run(config)
    else:
        evaluate_predictions(config)


if __name__ == "__main__":
    main()
