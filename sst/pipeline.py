"""A whole run as one job: first keypoints, training on workers, scores, pictures, tracking.

What a worker does is in `sst.training`; here is the order of things around it, in the process that was started.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from cluster import storage
from sst.advice import landmark_facts, warnings_of
from sst.config import SAFE_TO_CHANGE, TrainSettings
from sst.distributed import check_local_cpus, kmeans_backend, ray_tools, start_kmeans, start_ray, train_on_workers
from sst.errors import UserError
from sst.evaluation import Scores
from sst.first_round import make_first_round
from sst.interrupt import terminable
from sst.keypoints import generic_detector
from sst.lock import RunLock
from sst.metrics import MetricsFile, MetricsReader
from sst.model import ModelRecord, load_model
from sst.pictures import all_predictions, draw_all, draw_round
from sst.preflight import check_disk, check_nodes
from sst.progress import Show, clock
from sst.report import write_report
from sst.round_making import Corpus
from sst.rounds import RunDirectory
from sst.schedule import plan
from sst.scoring import Annotated, score_run
from sst.tracking import Tracker

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
    url = storage.join(run.url, "settings.json")
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


def train_run(
    settings: TrainSettings, shards: str, run_url: str, *, tracking: str, experiment: str, name: str
) -> Outcome:
    """Runs what is left of a run, from first keypoints to the report.

    Args:
        settings: the method.
        shards: directory or URL of the image shards.
        run_url: directory or URL of the run.
        tracking: MLflow tracking URI.
        experiment: MLflow experiment.
        name: the run's name in MLflow.

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
        is_new = claim(run, settings, corpus)
        try:
            return tracked_run(settings, corpus, run, Tracker(run.url, tracking, experiment, name), started)
        except UserError:
            if is_new:
                storage.remove(run.url)  # the name is free for corrected settings
            raise


def tracked_run(
    settings: TrainSettings, corpus: Corpus, run: RunDirectory, tracker: Tracker, started: float
) -> Outcome:
    """What is left of a run that is claimed; the tracker learns how it ended."""
    tracker.log_settings(settings.model_dump(mode="json"))
    status = "FAILED"
    try:
        with showing(run, settings, corpus, tracker) as show:
            gpu = start_ray(settings.resources)
            check_nodes()
            actor = start_kmeans(settings, gpu)
            show.say(describe(settings, corpus, gpu, kmeans_backend(actor, settings)))
            metrics = MetricsFile(run.url)
            try:
                make_first_round(settings, corpus, run, ray_tools(settings, actor, metrics.write, "keypoints"))
            except ValueError as error:
                raise UserError(str(error)) from error
            if not storage.exists(storage.join(run.model_url, "model.json")):
                train_on_workers(settings, corpus.url, run.url, actor, gpu)
        outcome = finish_run(run, corpus, settings, tracker, time.monotonic() - started)
        status = "FINISHED"
        return outcome
    except KeyboardInterrupt:
        status = "KILLED"
        print("the same command goes on from the last checkpoint", flush=True)
        raise
    finally:
        tracker.close(status)


def describe(settings: TrainSettings, corpus: Corpus, gpu: bool, kmeans: str) -> str:
    """What the run works with, in one line."""
    images, workers = corpus.manifest.samples_of("train"), settings.resources.workers
    return (
        f"{images} training images in {len(corpus.train)} shards; {workers} workers on {'GPUs' if gpu else 'CPUs'}, "
        f"{settings.resources.precision}; k-means by {kmeans}"
    )


@contextmanager
def showing(run: RunDirectory, settings: TrainSettings, corpus: Corpus, tracker: Tracker) -> Iterator[Show]:
    """While inside, new lines of the metrics file are shown and sent to MLflow."""
    reader, stop = MetricsReader(run.url, skip_present=True), threading.Event()
    size = settings.network.input_size
    show = Show(plan(settings, corpus.manifest.samples_of("train")))

    def forward() -> None:
        for line in reader.new_lines():
            show.line(line)
            if line["kind"] == "round":
                try:
                    picture = draw_round(run, corpus, line["round"], size)
                except Exception as error:  # a picture must not end a run of days
                    logger.warning("round %d could not be drawn: %s", line["round"], error)
                else:
                    tracker.log_files({f"rounds/{line['round']:04d}.png": picture})

    def watch() -> None:
        while not stop.wait(POLL_SECONDS):
            forward()

    thread = threading.Thread(target=watch, name="show", daemon=True)
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
        numbers = {name: v for name, v in scores.to_json().items() if isinstance(v, int | float)}
        tracker.log({f"score/{name}": value for name, value in numbers.items()}, 0)
    tracker.log({f"model/{name}": value for name, value in model.figures.items()}, 0)
    drawn = draw_all(run, corpus, model, scores)
    told, images = settings.stage2.most_landmarks, corpus.manifest.samples_of("train")
    rounds = [{k: v for k, v in record.line().items() if k != "kind"} for record in run.records()]
    facts = landmark_facts(*all_predictions(run, corpus), model.visible, run.landmarks())
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
