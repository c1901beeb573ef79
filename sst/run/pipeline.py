"""A whole run as one job: first keypoints, training on workers, scores, pictures, tracking.

What a worker does is in `sst.train.trainer`; here is the order of things around it, in the process that was started.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from cluster import storage
from sst.config import SAFE_TO_CHANGE, TrainSettings
from sst.errors import UserError
from sst.predict.export import as_onnx, exported_program, mlflow_files
from sst.progress import Show, clock
from sst.report.advice import LandmarkFacts, landmark_facts, warnings_of
from sst.report.evaluate_run import Annotated, score_run
from sst.report.evaluation import Scores
from sst.report.pictures import all_predictions, draw_all, draw_round
from sst.report.report import write_report
from sst.run.distributed import check_local_cpus, kmeans_backend, ray_tools, start_kmeans, start_ray, train_on_workers
from sst.run.interrupt import terminable
from sst.run.lock import RunHeldError, RunLock
from sst.run.metrics import MetricsFile, MetricsReader
from sst.run.preflight import check_disk, check_nodes
from sst.run.tracking import Tracker, absolute_uri, provenance
from sst.train.first_round import find_keypoints, make_first_round
from sst.train.keypoints import generic_detector
from sst.train.model import ModelRecord, load_model
from sst.train.rounds import Corpus, Tools
from sst.train.run_directory import RunDirectory
from sst.train.schedule import plan

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Time between two looks at the metrics file."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        run: its directory.
        scores: against annotations; None where the corpus has none.
        landmarks: number of landmarks the model gives.
        report: URL of the report.
    """

    run: RunDirectory
    scores: Scores | None
    landmarks: int
    report: str


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Fields in which two nested settings differ, as "path: before -> after"."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        return [d for k in keys for d in differences(before.get(k), after.get(k), f"{path}.{k}" if path else k)]
    return [] if before == after else [f"{path}: {before} -> {after}"]


def claim(run: RunDirectory, settings: TrainSettings, corpus: Corpus) -> bool:
    """Writes what the run was told, or checks that it was told the same before.

    Returns:
        Whether the run is new.

    Raises:
        UserError: if a run of that name exists with other settings or data; the message has the differences.
    """
    url = run.settings_url
    told = {"settings": settings.model_dump(mode="json"), "manifest": corpus.manifest_hash, "shards": corpus.url}
    if storage.exists(url):
        before = storage.read_json(url)
        with suppress(ValidationError):  # a setting that an earlier version did not know has its default
            before["settings"] = TrainSettings.model_validate(before["settings"]).model_dump(mode="json")
        # The same corpus may have moved: its manifest tells.
        safe = tuple(f"settings.resources.{name}:" for name in SAFE_TO_CHANGE)
        changed = [line for line in differences(before | {"shards": corpus.url}, told) if not line.startswith(safe)]
        if changed:
            raise UserError(
                f"{run.url} is a run with other settings or data ({'; '.join(changed)}); take another --name, or "
                "the old settings to go on with it"
            )
        return False
    storage.write_json(url, told)
    return True


def as_begun(run: RunDirectory, settings: TrainSettings) -> TrainSettings:
    """The settings, with the arithmetic that the run began with where they leave it open."""
    begun = run.noted_precision()
    if settings.resources.precision != "auto" or begun is None:
        return settings
    return settings.with_precision(begun)


def with_absolute_weights(settings: TrainSettings) -> TrainSettings:
    """The settings with a file name that holds in any working directory."""
    keypoints = settings.keypoints
    if keypoints.superpoint.weights is None:
        return settings
    superpoint = keypoints.superpoint.model_copy(update={"weights": storage.absolute(keypoints.superpoint.weights)})
    return settings.model_copy(update={"keypoints": keypoints.model_copy(update={"superpoint": superpoint})})


def open_corpus(url: str) -> Corpus:
    """The corpus at a URL, checked against its manifest.

    Raises:
        UserError: if there is none, it does not match its manifest, or has no training images.
    """
    try:
        corpus = Corpus.open(url)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not corpus.train:
        raise UserError(f"{url}: no shard of the training split; pack again with a smaller --test-share")
    return corpus


@dataclass(frozen=True)
class Tracking:
    """Where MLflow is and what it is told.

    Attributes:
        uri: MLflow tracking URI.
        experiment: MLflow experiment.
        name: the run's name in MLflow.
        parent: directory of the sweep that the run is a trial of.
        register: name under which the finished model is registered.
    """

    uri: str
    experiment: str
    name: str
    parent: str | None = None
    register: str | None = None

    def open(self, run_url: str) -> Tracker:
        """Begins to send what the run directory has."""
        return Tracker(run_url, absolute_uri(self.uri), self.experiment, self.name, self.parent)


def train_run(
    settings: TrainSettings, shards: str, run_url: str, tracking: Tracking, *, keypoints: str | None = None
) -> Outcome:
    """Runs what is left of a run, from first keypoints to the report.

    Args:
        settings: the method.
        shards: directory or URL of the image shards.
        run_url: directory or URL of the run.
        tracking: what MLflow gets.
        keypoints: folder of the first keypoints, where several runs share them.

    Raises:
        UserError: if the corpus, the resources or an earlier run of that name do not permit it.
    """
    started = time.monotonic()
    settings = with_absolute_weights(settings)
    generic_detector(settings.keypoints)
    check_local_cpus(settings.resources)
    corpus, run = open_corpus(storage.absolute(shards)), RunDirectory(storage.absolute(run_url))
    check_disk(settings, sum(shard.samples for shard in corpus.manifest.shards), run.url)
    with terminable(), RunLock(run.url):
        settings = as_begun(run, settings)
        is_new = claim(run, settings, corpus)
        try:
            return tracked_run(settings, corpus, run, tracking, keypoints, started)
        except UserError:
            if is_new:
                storage.remove(run.url)  # the name is free for corrected settings
            raise


def tracked_run(
    settings: TrainSettings,
    corpus: Corpus,
    run: RunDirectory,
    tracking: Tracking,
    keypoints: str | None,
    started: float,
) -> Outcome:
    """What is left of a run that is claimed; the tracker learns how it ended."""
    tracker = tracking.open(run.url)
    tracker.log_settings(settings.model_dump(mode="json"))
    tracker.log_tags(provenance(corpus.manifest_hash))
    status = "FAILED"
    try:
        with showing(run, settings, corpus, tracker) as show:
            gpu = start_ray(settings.resources)
            check_nodes()
            actor = start_kmeans(settings, gpu)
            show.say(describe(settings, corpus, gpu, kmeans_backend(actor, settings)))
            metrics = MetricsFile(run.url)
            try:
                tools = ray_tools(settings, actor, metrics.write, "keypoints")
                if keypoints is not None:
                    share_keypoints(settings, corpus, keypoints, tools)
                make_first_round(settings, corpus, run, tools, keypoints)
            except ValueError as error:
                raise UserError(str(error)) from error
            if not storage.exists(storage.join(run.model_url, "model.json")):
                train_on_workers(settings, corpus.url, run.url, actor, gpu)
        outcome = finish_run(run, corpus, settings, tracker, time.monotonic() - started)
        track_model(run, tracker, tracking.register)
        status = "FINISHED"
        return outcome
    except KeyboardInterrupt:
        status = "KILLED"
        print("the same command goes on from the last checkpoint", flush=True)
        raise
    finally:
        tracker.close(status)


def share_keypoints(settings: TrainSettings, corpus: Corpus, folder: str, tools: Tools) -> None:
    """Makes the first keypoints in a folder of several runs, unless one of them has; waits while one is at it."""
    while True:
        try:
            with RunLock(folder):
                find_keypoints(settings, corpus, folder, tools)
                return
        except RunHeldError:
            time.sleep(POLL_SECONDS)


def describe(settings: TrainSettings, corpus: Corpus, gpu: bool, kmeans: str) -> str:
    """What the run works with, in one line."""
    images, workers = corpus.manifest.samples_of("train"), settings.resources.workers.replace(":", " to ")
    return (
        f"{images} training images in {len(corpus.train)} shards; {workers} workers on {'GPUs' if gpu else 'CPUs'}; "
        f"k-means by {kmeans}"
    )


@contextmanager
def showing(run: RunDirectory, settings: TrainSettings, corpus: Corpus, tracker: Tracker) -> Iterator[Show]:
    """While inside, new lines of the metrics file are shown and sent to MLflow."""
    reader, stop = MetricsReader(run.url, skip_present=True), threading.Event()
    size = settings.network.input_size
    show = Show(plan(settings, corpus.manifest.samples_of("train")))

    def draw(number: int) -> None:
        try:
            picture = draw_round(run, corpus, number, size)
        except Exception as error:  # a picture must not end a run of days
            logger.warning("round %d could not be drawn: %s", number, error)
        else:
            tracker.log_files({f"rounds/{number:04d}.png": picture})

    def forward() -> None:
        for line in reader.new_lines():
            show.line(line)
            if line["kind"] == "round":
                drawing.submit(draw, line["round"])

    def watch() -> None:
        while not stop.wait(POLL_SECONDS):
            forward()

    thread = threading.Thread(target=watch, name="show", daemon=True)
    with ThreadPoolExecutor(1, "draw") as drawing:  # progress does not wait for pictures
        thread.start()
        try:
            yield show
        finally:
            stop.set()
            thread.join()
            forward()
            show.close()


def finish_run(run: RunDirectory, corpus: Corpus, settings: TrainSettings, tracker: Tracker, seconds: float) -> Outcome:
    """Scores a trained run where it has annotations, draws its pictures and writes the report."""
    _, model = load_model(run.model_url)
    annotated = Annotated.of(corpus)
    scores = score_run(run, corpus, annotated, model.visible) if annotated is not None else None
    if scores is not None:
        storage.write_json(storage.join(run.url, "scores.json"), scores.to_json())
    drawn = draw_all(run, corpus, model, scores)
    told, images = settings.stage2.most_landmarks, corpus.manifest.samples_of("train")
    rounds = [{k: v for k, v in record.line().items() if k != "kind"} for record in run.records()]
    facts = landmark_facts(*all_predictions(run, corpus), model.visible, run.landmarks())
    figures = final_figures(model, facts, rounds, scores)
    storage.write_json(storage.join(run.url, "figures.json"), figures)
    tracker.log(figures, 0)
    report = write_report(
        run.url,
        title=f"Landmarks of {corpus.manifest.corpus}",
        summary=summary(model, scores, corpus, seconds),
        figures=drawn,
        rounds=rounds,
        settings=settings.model_dump(mode="json"),
        notes=notes(scores),
        facts=facts,
        warnings=warnings_of(facts, rounds, told, images),
    )
    pictures = {f"figures/{figure.name}.png": figure.png for figure in drawn}
    tracker.log_files(pictures | {"report.html": storage.read_bytes(report)})
    return Outcome(run, scores, len(model.clusters), report)


def final_figures(
    model: ModelRecord, facts: LandmarkFacts, rounds: Sequence[Mapping[str, Any]], scores: Scores | None
) -> dict[str, float]:
    """The numbers by which finished runs are compared; the scores only where there are annotations."""
    figures = {f"model/{name}": value for name, value in model.figures.items()}
    figures["model/landmarks"] = float(len(model.clusters))
    for name, each in (("looseness", facts.looseness), ("repeatability", facts.repeats)):
        if np.isfinite(each).any():
            figures[f"model/{name}"] = float(np.nanmean(each))
    persistence = [entry["label_persistence"] for entry in rounds if "label_persistence" in entry]
    if persistence:
        figures["model/label_persistence"] = persistence[-1]
    if scores is not None:
        numbers = {name: v for name, v in scores.to_json().items() if isinstance(v, int | float) and v == v}
        figures |= {f"score/{name}": float(value) for name, value in numbers.items()}
    return figures


def track_model(run: RunDirectory, tracker: Tracker, register: str | None) -> None:
    """Sends the finished model to MLflow: images in, landmarks with confidence out."""
    model, record = load_model(run.model_url)
    proto = as_onnx(exported_program(model, record.network.input_size), record)
    tracker.log_files({f"model/{path}": data for path, data in mlflow_files(proto, record).items()})
    if register is not None:
        tracker.register(register)


def summary(model: ModelRecord, scores: Scores | None, corpus: Corpus, seconds: float) -> dict[str, str]:
    """The figures that the report shows first."""
    shown = {"landmarks": str(len(model.clusters))}
    if "equivariance_error" in model.figures:
        shown["equivariance error, of the view"] = f"{model.figures['equivariance_error']:.2f} %"
    if scores is not None:
        shown |= {
            "forward error": percent(scores.forward),
            "backward error": percent(scores.backward),
            "landmarks in over 80 % of images": str(scores.landmarks_kept),
        }
    return shown | {"training images": str(corpus.manifest.samples_of("train")), "time of this start": clock(seconds)}


def percent(value: float) -> str:
    """A fraction in per cent; a dash where it could not be computed."""
    return f"{100 * value:.2f} %" if value == value else "-"


def notes(scores: Scores | None) -> list[str]:
    """What a reader must know beside the figures."""
    said = []
    if scores is None:
        said.append("The corpus has no annotations, so errors could not be computed; look at the pictures.")
    elif scores.landmarks_kept == 0:
        said.append("No landmark is visible in more than 80 % of the images, so none could be scored.")
    return said
