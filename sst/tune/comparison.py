"""Runs side by side: what MLflow holds of them as one HTML page, with settings that differ, metrics and curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from sst.environment import MLFLOW_ENVIRONMENT, set_environment
from sst.errors import UserError
from sst.report.pictures import png
from sst.report.plots import curves
from sst.report.report import MEANINGS, ReportFigure, short
from sst.run.tracking import other_schema, redact

METRICS = {
    "model/equivariance_error": "equivariance error, %",
    "model/label_persistence": "label persistence",
    "model/visible_share": "visible share",
    "model/repeatability": "repeatability",
    "model/looseness": "off its typical place",
    "model/landmarks": "landmarks",
    "score/forward": "forward error",
    "score/backward": "backward error",
}
"""Metrics of finished runs, in the order of the page's columns."""

CURVES = {
    "round/equivariance_error": "equivariance error, % of the view",
    "round/label_persistence": "share of labels that persist",
    "round/labels_per_image": "labels per image",
    "round/clusters_in_use": "clusters in use",
    "step/loss": "loss",
    "step/learning_rate": "learning rate",
}
"""Metrics whose curves are laid over each other."""

MAX_RUNS = 100
"""More runs than these cannot be told apart on one page."""


@dataclass(frozen=True)
class ComparedRun:
    """A run as MLflow knows it.

    Attributes:
        run_id: of MLflow.
        name: of the run.
        status: FINISHED, RUNNING, FAILED or KILLED.
        parent: MLflow run of the sweep it is a trial of.
        params: settings by dotted name.
        metrics: last value of each metric.
        curves: (steps, values) of the metrics in `CURVES`.
    """

    run_id: str
    name: str
    status: str
    parent: str | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, tuple[list[int], list[float]]] = field(default_factory=dict)


def fetch_runs(uri: str, experiment: str, given: Sequence[str] = ()) -> list[ComparedRun]:
    """The runs to compare, the oldest first.

    Args:
        uri: MLflow tracking URI.
        experiment: name of the experiment.
        given: run ids or names; a sweep stands for its trials. All of the experiment's runs where empty.

    Raises:
        UserError: if the server, the experiment or a run can't be found, or nothing was logged.
    """
    set_environment(MLFLOW_ENVIRONMENT)
    import mlflow

    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise UserError(f"MLflow at {redact(uri)} has no experiment {experiment}")
        runs: list[Any] = []
        token = None
        while token is None or token:
            page = client.search_runs([found.experiment_id], order_by=["attributes.start_time"], page_token=token or "")
            runs, token = runs + list(page), page.token or ""
        chosen = [run for run in choose(runs, given) if run.data.metrics]
        if not chosen:
            raise UserError(f"experiment {experiment} at {redact(uri)} has no run with metrics")
        if len(chosen) > MAX_RUNS:
            raise UserError(f"{len(chosen)} runs are too many for one page; name at most {MAX_RUNS}, or sweeps")
        return [_compared(client, run) for run in chosen]
    except mlflow.exceptions.MlflowException as error:
        if "database schema" in str(error):
            raise UserError(other_schema(redact(uri))) from error
        raise UserError(f"MLflow at {redact(uri)}: {' '.join(str(error).split())}") from error


def is_page(data: bytes) -> bool:
    """Whether this is a page that `comparison_page` made."""
    return b'<meta name="generator" content="landmarks compare">' in data[:1000]


def choose(runs: Sequence[Any], given: Sequence[str]) -> list[Any]:
    """Those of the runs that are meant by ids or names; a sweep stands for its trials.

    Raises:
        UserError: naming those that are not there.
    """
    if not given:
        return list(runs)
    chosen, missing = [], []
    for each in given:
        meant = [run for run in runs if each in (run.info.run_id, run.info.run_name)]
        parents = {run.info.run_id for run in meant}
        trials = [run for run in runs if run.data.tags.get("mlflow.parentRunId") in parents]
        chosen += trials or meant
        missing += [] if meant else [each]
    if missing:
        raise UserError(f"no run has the name or id {', '.join(missing)}")
    return list({run.info.run_id: run for run in chosen}.values())


def _compared(client: Any, run: Any) -> ComparedRun:
    drawn = {}
    for name in CURVES.keys() & run.data.metrics.keys():
        # A resumed run has logged some steps twice, with equal values.
        points = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
        drawn[name] = (sorted(points), [points[step] for step in sorted(points)])
    return ComparedRun(
        run.info.run_id,
        run.info.run_name,
        run.info.status,
        run.data.tags.get("mlflow.parentRunId"),
        run.data.params,
        run.data.metrics,
        drawn,
    )


def differing(runs: Sequence[ComparedRun]) -> list[str]:
    """Settings that are not the same in all runs, by name; a run without a setting differs from those with it."""
    names = sorted({name for run in runs for name in run.params})
    return [name for name in names if len({run.params.get(name) for run in runs}) > 1]


def comparison_page(title: str, runs: Sequence[ComparedRun]) -> str:
    """One HTML page that needs nothing else: a table that sorts by any column, and curves laid over each other."""
    varied = differing(runs)
    shown = {name: column for name, column in METRICS.items() if any(name in run.metrics for run in runs)}
    labels = [label(run, varied) for run in runs]
    drawn = {
        title: [(text, *run.curves[name]) for text, run in zip(labels, runs, strict=True) if name in run.curves]
        for name, title in CURVES.items()
        if any(name in run.curves for run in runs)
    }
    picture = ReportFigure("curves", "Rounds and steps of the runs that have them.", png(curves(drawn)))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["short"] = short
    template = Path(__file__).with_name("comparison.html").read_text("utf-8")
    meanings = {name: meaning for name, meaning in MEANINGS.items() if name in " ".join(shown.values())}
    return environment.from_string(template).render(
        title=title, runs=runs, varied=varied, metrics=shown, picture=picture, meanings=meanings
    )


def label(run: ComparedRun, varied: Sequence[str]) -> str:
    """A run in the curves' legend: its name, and what it varies where that is little."""
    given = [f"{name.rpartition('.')[2]} {run.params[name]}" for name in varied if name in run.params]
    return run.name if not given or len(given) > 3 else f"{run.name}: {', '.join(given)}"


def track_page(uri: str, experiment: str, runs: Sequence[ComparedRun], page: str) -> str:
    """Makes the page an artifact: of the sweep where all are its trials, else of a new run "comparison".

    Returns:
        The MLflow run that has it.
    """
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    parents = {run.parent for run in runs}
    run_id = parents.pop() if len(parents) == 1 else None
    new = run_id is None
    if run_id is None:
        found = client.get_experiment_by_name(experiment)
        assert found is not None  # the runs are from it
        run_id = client.create_run(found.experiment_id, run_name="comparison").info.run_id
    client.log_text(run_id, page, "comparison.html")
    if new:
        client.set_terminated(run_id)
    return run_id
