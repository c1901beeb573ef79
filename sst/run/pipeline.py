"""A whole run as one job: first keypoints, training on workers, scores, pictures, tracking.

What a worker does is in `sst.train.trainer`; here is the order of things around it, in the process that was started.
"""

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from cluster import storage
from cluster.dispatch import HangError
from sst.config import TrainSettings
from sst.data.corpus import Corpus, open_corpus
from sst.errors import RunFailedError, UserError, terminable
from sst.outputs import NewDirectory
from sst.predict.export import as_onnx, exported_program, mlflow_files
from sst.report.advice import seen_on_the_way
from sst.report.finish import Outcome, finish_run
from sst.report.pictures import draw_round
from sst.run.claim import as_begun, claim, with_absolute_weights
from sst.run.console import Show
from sst.run.distributed import (
    beside_workers,
    detector_gpus,
    kmeans_backend,
    ray_tools,
    start_kmeans,
    train_on_workers,
)
from sst.run.lock import RunHeldError, RunLock
from sst.run.metrics import MetricsFile, MetricsReader
from sst.run.placement import Placement, place
from sst.run.preflight import check_disk, check_nodes
from sst.run.provenance import provenance
from sst.run.ray_cluster import check_local_cpus, joins_cluster, start_ray
from sst.run.tracking import Tracker, Tracking
from sst.train.first_round import find_keypoints, make_first_round
from sst.train.keypoints import generic_detector
from sst.train.model import load_model
from sst.train.run_directory import RunDirectory
from sst.train.schedule import plan
from sst.train.tools import Tools

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Time between two looks at the metrics file."""


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
    generic_detector(settings.keypoints, settings.network.input_size)
    check_local_cpus(settings.resources)
    corpus, run = open_corpus(storage.absolute(shards)), RunDirectory(storage.absolute(run_url))
    check_disk(settings, sum(shard.samples for shard in corpus.manifest.shards), run.url)
    directory = NewDirectory(run.url)
    try:
        with terminable(), RunLock(run.url):
            settings = as_begun(run, settings)
            before = set(storage.list_names(run.url))
            is_new = claim(run, settings, corpus)
            try:
                return tracked_run(settings, corpus, run, tracking, keypoints, started)
            except UserError:
                for name in set(storage.list_names(run.url)) - before if is_new else ():
                    storage.remove(storage.join(run.url, name))  # the name is free for corrected settings
                raise
    except BaseException:
        directory.take_back()  # if nothing was written into it
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
            placed = place(settings, start_ray(), joins_cluster())
            settings, gpu = settings.with_workers(placed.workers), placed.gpu
            if placed.warning:
                show.say(f"warning: {placed.warning}")
            check_nodes()
            actor = start_kmeans(settings, gpu, alone=True)
            metrics = MetricsFile(run.url)
            show.say(describe(corpus, placed, kmeans_backend(actor, settings, metrics.write)))
            try:
                tools = ray_tools(settings, actor, metrics.write, detector_gpus(settings, gpu))
                if keypoints is not None:
                    share_keypoints(settings, corpus, keypoints, tools)
                make_first_round(settings, corpus, run, tools, keypoints)
            except ValueError as error:
                raise UserError(str(error)) from error
            except HangError as error:
                advice = "if it may take that long, give a larger --resources.hang-minutes"
                raise RunFailedError(f"{error}; {advice}") from error
            if not run.has_model():
                train_on_workers(settings, corpus.url, run.url, beside_workers(actor, settings, gpu), gpu)
        unwell = seen_on_the_way(MetricsReader(run.url).new_lines())
        outcome = finish_run(run, corpus, settings, time.monotonic() - started, unwell)
        tracker.log(outcome.metrics, 0)
        tracker.log_files(outcome.pictures | {"report.html": storage.read_bytes(outcome.report)})
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


def describe(corpus: Corpus, placed: Placement, kmeans: str) -> str:
    """What the run works with, in one line."""
    images = corpus.manifest.samples_of("train")
    return f"{images} training images in {len(corpus.train)} shards; {placed.said}; k-means by {kmeans}"


@contextmanager
def showing(run: RunDirectory, settings: TrainSettings, corpus: Corpus, tracker: Tracker) -> Iterator[Show]:
    """While inside, new lines of the metrics file are shown and sent to MLflow."""
    reader, stop = MetricsReader(run.url, skip_present=True), threading.Event()
    size = settings.network.input_size
    images = corpus.manifest.samples_of("train")
    show = Show(plan(settings, images), images)

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
            elif line["kind"] == "health":
                tracker.log_tags({f"unwell/{line['sign']}": line["text"]})

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


def track_model(run: RunDirectory, tracker: Tracker, register: str | None) -> None:
    """Sends the finished model to MLflow: images in, landmarks with confidence out."""
    model, record = load_model(run.model_url)
    proto = as_onnx(exported_program(model, record.network.input_size), record)
    tracker.log_files({f"model/{path}": data for path, data in mlflow_files(proto, record).items()})
    if register is not None:
        tracker.register(register)
