"""The end of a run: scores, pictures and the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster import storage
from sst.config import TrainSettings
from sst.data.corpus import Corpus
from sst.progress import clock
from sst.report.advice import LandmarkFacts, Warned, landmark_facts, warnings_of
from sst.report.evaluate_run import AnnotatedImages, score_run
from sst.report.evaluation import Scores, percent
from sst.report.pictures import all_predictions, draw_all
from sst.report.report import write_report
from sst.train.model import ModelRecord, load_model
from sst.train.run_directory import RunDirectory


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        run: its directory.
        scores: against annotations; None where the corpus has none.
        landmarks: number of landmarks the model gives.
        report: URL of the report.
        metrics: the numbers by which finished runs are compared.
        pictures: file name and PNG of each picture of the report.
    """

    run: RunDirectory
    scores: Scores | None
    landmarks: int
    report: str
    metrics: dict[str, float]
    pictures: dict[str, bytes] = field(repr=False)


def finish_run(
    run: RunDirectory, corpus: Corpus, settings: TrainSettings, seconds: float, unwell: Sequence[Warned] = ()
) -> Outcome:
    """Scores a trained run where it has annotations, draws its pictures and writes the report.

    Args:
        run: its directory.
        corpus: what it was trained on.
        settings: of the run.
        seconds: that this start of it took.
        unwell: what the run warned of while it trained.
    """
    _, model = load_model(run.model_url)
    annotated = AnnotatedImages.of(corpus)
    scores = score_run(run, corpus, annotated, model.visible) if annotated is not None else None
    if scores is not None:
        storage.write_json(run.scores_url, scores.to_json())
    drawn = draw_all(run, corpus, model, scores)
    given, images = settings.stage2.max_landmarks, corpus.manifest.samples_of("train")
    rounds = [{k: v for k, v in record.line().items() if k != "kind"} for record in run.records()]
    facts = landmark_facts(*all_predictions(run, corpus), model.visible, run.landmarks())
    metrics = final_metrics(model, facts, rounds, scores)
    storage.write_json(run.final_metrics_url, metrics)
    report = write_report(
        run,
        title=f"Landmarks of {corpus.manifest.corpus}",
        summary=summary(model, scores, corpus, seconds),
        figures=drawn,
        rounds=rounds,
        settings=settings.model_dump(mode="json"),
        notes=notes(scores),
        facts=facts,
        warnings=[*unwell, *warnings_of(facts, rounds, given, images)],
    )
    pictures = {f"figures/{figure.name}.png": figure.png for figure in drawn}
    return Outcome(run, scores, len(model.clusters), report, metrics, pictures)


def final_metrics(
    model: ModelRecord, facts: LandmarkFacts, rounds: Sequence[Mapping[str, Any]], scores: Scores | None
) -> dict[str, float]:
    """The numbers by which finished runs are compared; the scores only where there are annotations."""
    metrics = {f"model/{name}": value for name, value in model.metrics.items()}
    metrics["model/landmarks"] = float(len(model.clusters))
    for name, each in (("looseness", facts.looseness), ("repeatability", facts.repeats)):
        if np.isfinite(each).any():
            metrics[f"model/{name}"] = float(np.nanmean(each))
    persistence = [entry["label_persistence"] for entry in rounds if "label_persistence" in entry]
    if persistence:
        metrics["model/label_persistence"] = persistence[-1]
    if scores is not None:
        numbers = {name: v for name, v in scores.to_json().items() if isinstance(v, int | float) and v == v}
        metrics |= {f"score/{name}": float(value) for name, value in numbers.items()}
    return metrics


def summary(model: ModelRecord, scores: Scores | None, corpus: Corpus, seconds: float) -> dict[str, str]:
    """The metrics that the report shows first."""
    shown = {"landmarks": str(len(model.clusters))}
    if "equivariance_error" in model.metrics:
        shown["equivariance error, of the view"] = f"{model.metrics['equivariance_error']:.2f} %"
    if "coverage" in model.metrics:
        shown["coverage of what recurs"] = f"{100 * model.metrics['coverage']:.0f} %"
    if scores is not None:
        shown |= {
            "forward error": percent(scores.forward),
            "backward error": percent(scores.backward),
            "landmarks in over 80 % of images": str(scores.landmarks_kept),
        }
    return shown | {"training images": str(corpus.manifest.samples_of("train")), "time of this start": clock(seconds)}


def notes(scores: Scores | None) -> list[str]:
    """What a reader must know beside the metrics."""
    said = []
    if scores is None:
        said.append("The corpus has no annotations, or too few, so errors could not be computed; look at the pictures.")
    elif scores.landmarks_kept == 0:
        said.append("No landmark is visible in more than 80 % of the images, so none could be scored.")
    return said
