"""MLflow beside the run: it gets what the run directory has, and never holds the run up.

A background thread sends what is new in RUN/metrics.jsonl, and calls from a queue, each until it succeeds. How far it
came is noted in RUN/mlflow.json, so what a server that is gone did not get is sent when the run's command is given
again.
"""

import logging
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cluster import storage
from sst.environment import MLFLOW_ENVIRONMENT, set_environment
from sst.run.metrics import MetricsReader
from sst.train.run_directory import RunDirectory

logger = logging.getLogger(__name__)

DEFAULT_URI = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
"""Where runs are tracked unless told otherwise: where MLflow's own commands look too, or a file here."""

CLOSE_SECONDS = 5.0
"""Longest wait, at the end of a run, for an MLflow that takes nothing."""

POLL_SECONDS, LONGEST_PAUSE = 2.0, 30.0
"""Time between two looks at the metrics file, and the longest one between two tries to reach a server that is gone."""

BATCH = 500
"""Metrics in one call; MLflow takes 1,000."""

VALUE_LENGTH = 500
"""Longest parameter value that every MLflow backend takes."""


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as "a.b.c": text."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)[:VALUE_LENGTH]
    return flat


class Tracker:
    """One MLflow run for one run directory; a resumed run goes on with the same MLflow run."""

    def __init__(self, run_url: str, uri: str, experiment: str, name: str, parent: str | None = None) -> None:
        """Starts the background thread; nothing is waited for.

        Args:
            run_url: directory of the run.
            uri: MLflow tracking URI.
            experiment: MLflow experiment.
            name: of the MLflow run.
            parent: directory of the sweep whose MLflow run this one is nested in.
        """
        self._run_url, self._uri, self._experiment, self._name = run_url, uri, experiment, name
        self._parent = parent
        self._calls: deque[Callable[[], None]] = deque()
        self._client: Any = None
        self._run_id = ""
        self._reader = MetricsReader(run_url)
        self._noted = -1
        self._closing, self._given_up = threading.Event(), False
        self._success = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def log_settings(self, settings: Mapping[str, Any]) -> None:
        """Sends nested settings as parameters; one that a resumed run has changed becomes a tag "resumed/NAME"."""
        flat = flatten(settings)

        def send() -> None:
            from mlflow.entities import Param, RunTag

            # MLflow refuses a second value for a parameter.
            known = self._client.get_run(self._run_id).data.params
            params = [Param(name, value) for name, value in flat.items() if name not in known]
            changed = [(name, value) for name, value in flat.items() if known.get(name, value) != value]
            for start in range(0, len(params), 100):
                self._client.log_batch(self._run_id, params=params[start : start + 100])
            for start in range(0, len(changed), 100):
                tags = [RunTag(f"resumed/{name}", value) for name, value in changed[start : start + 100]]
                self._client.log_batch(self._run_id, tags=tags)

        self._calls.append(send)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Sends texts that may change, by name."""
        each = dict(tags)

        def send() -> None:
            from mlflow.entities import RunTag

            self._client.log_batch(self._run_id, tags=[RunTag(name, value) for name, value in each.items()])

        self._calls.append(send)

    def register(self, model: str) -> None:
        """Makes the artifact "model" a version of a registered model, unless it is one already."""

        def send() -> None:
            if not self._client.search_registered_models(f"name = '{model}'"):
                self._client.create_registered_model(model)
            if not self._client.search_model_versions(f"name = '{model}' and run_id = '{self._run_id}'"):
                run = self._client.get_run(self._run_id)
                self._client.create_model_version(model, f"{run.info.artifact_uri}/model", self._run_id)

        self._calls.append(send)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Sends numbers that are not lines of the metrics file, at a step."""
        now = time.time()
        numbers = [(name, float(value), now, step) for name, value in metrics.items()]
        self._calls.append(lambda: self._send_metrics(numbers))

    def log_files(self, files: Mapping[str, bytes]) -> None:
        """Sends files as artifacts, by path."""
        each = dict(files)

        def send() -> None:
            with tempfile.TemporaryDirectory() as folder:
                for path, data in each.items():
                    target = Path(folder, path)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(data)
                self._client.log_artifacts(self._run_id, folder)

        self._calls.append(send)

    def close(self, status: str) -> bool:
        """Ends the MLflow run; waits while things are being sent, but at most `CLOSE_SECONDS` while nothing is.

        Args:
            status: FINISHED, FAILED or KILLED.

        Returns:
            Whether all was sent.
        """
        self._calls.append(lambda: self._client.set_terminated(self._run_id, status))
        self._success = time.monotonic()
        self._closing.set()
        while self._thread.is_alive() and time.monotonic() - self._success < CLOSE_SECONDS:
            self._thread.join(0.1)
        if self._thread.is_alive():
            self._given_up = True
            logger.warning(
                "not all metrics reached MLflow at %s; they are in %s/metrics.jsonl, and giving the run's command "
                "again sends the rest",
                redact(self._uri),
                self._run_url,
            )
            return False
        return True

    def _work(self) -> None:
        failures = 0
        while not self._given_up:
            try:
                self._send_all()
                failures = 0
                if self._closing.is_set() and not self._calls:
                    return
            except Exception as error:  # whatever MLflow or its server raises must not reach the run
                failures += 1
                if failures == 1:
                    logger.warning("%s", why_not(self._uri, error))
            pause = POLL_SECONDS if not failures else min(LONGEST_PAUSE, 2.0 ** min(failures, 9) / 2)
            if self._closing.is_set():
                time.sleep(0.2)
            else:
                self._closing.wait(pause)

    def _send_all(self) -> None:
        if not self._run_id:
            self._open()
        while self._calls:
            self._attempt(self._calls[0])
            self._calls.popleft()
            self._success = time.monotonic()
        offset = self._reader.offset
        lines = self._reader.new_lines()
        try:
            numbers = [number for line in lines for number in as_metrics(line)]
            for start in range(0, len(numbers), BATCH):
                self._send_metrics(numbers[start : start + BATCH])
                self._success = time.monotonic()
        except Exception:
            self._reader.offset = offset  # all of them again next time; MLflow takes equal values at equal steps
            raise
        if self._reader.offset != self._noted:
            self._note()

    def _attempt(self, call: Callable[[], None]) -> None:
        """Makes a call; one that the server will never take is named and dropped, so that others get through."""
        from mlflow.exceptions import MlflowException

        try:
            call()
        except MlflowException as error:
            status = error.get_http_status_code()
            if not 400 <= status < 500 or status in (401, 403, 408, 429):
                raise
            logger.warning("MLflow at %s refuses something for good: %s", redact(self._uri), error.error_code)

    def _send_metrics(self, numbers: list[tuple[str, float, float, int]]) -> None:
        """Sends (name, value, time, step)."""
        from mlflow.entities import Metric

        metrics = [Metric(name, value, int(1000 * when), step) for name, value, when, step in numbers]
        self._client.log_batch(self._run_id, metrics=metrics)

    def _note(self) -> None:
        storage.write_json(
            RunDirectory(self._run_url).mlflow_url, {"run_id": self._run_id, "sent": self._reader.offset}
        )
        self._noted = self._reader.offset

    def _open(self) -> None:
        set_environment(MLFLOW_ENVIRONMENT)
        import mlflow

        for chatty in ("mlflow", "alembic", "urllib3"):
            logging.getLogger(chatty).setLevel(logging.ERROR)
        self._client = mlflow.MlflowClient(tracking_uri=self._uri)
        known = RunDirectory(self._run_url).mlflow_url
        if storage.exists(known):
            noted = storage.read_json(known)
            try:
                self._client.update_run(noted["run_id"], status="RUNNING")
                self._reader.offset = noted.get("sent", 0)
                self._run_id = noted["run_id"]
                return
            except mlflow.exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                logger.warning("MLflow at %s does not know this run; a new one is begun there", redact(self._uri))
        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment:
            number = experiment.experiment_id
        else:
            place = artifact_place(self._uri, self._experiment)
            number = self._client.create_experiment(self._experiment, artifact_location=place)
        tags = {} if self._parent is None else {"mlflow.parentRunId": noted_run(self._parent)}
        self._run_id = self._client.create_run(number, run_name=self._name, tags=tags).info.run_id
        self._note()


def why_not(uri: str, error: Exception) -> str:
    """What to say of an MLflow that takes nothing, and what to do."""
    place, later = redact(uri), "the run goes on, and its metrics are sent later"
    if "database schema" in str(error):
        return f"{other_schema(place)}; {later}"
    return f"MLflow at {place} can't be reached ({type(error).__name__}); {later}"


def other_schema(place: str) -> str:
    """What to say of a database that this version of MLflow can't use."""
    return (
        f"the MLflow database {place} is of another version of MLflow: keep a copy of it and run `mlflow db upgrade "
        f"{place}`, or give another --tracking"
    )


def noted_run(run_url: str) -> str:
    """The MLflow run of a run directory.

    Raises:
        FileNotFoundError: if it has none yet.
    """
    return str(storage.read_json(RunDirectory(run_url).mlflow_url)["run_id"])


def artifact_place(uri: str, experiment: str) -> str | None:
    """Where a new experiment's artifacts go: beside an SQLite file; a server knows its own place.

    MLflow would put them below the working directory, which a submitted job loses.
    """
    scheme, _, path = uri.partition(":///")
    if scheme != "sqlite":
        return None
    folder = os.path.dirname(os.path.abspath(path))
    if "%" in folder:  # MLflow reads a path as it reads a URI, and %20 as a blank
        folder = f"file://{quote(folder)}"
    return f"{folder}/mlruns/{quote(experiment, safe='')}"


def absolute_uri(uri: str) -> str:
    """The same tracking URI for a process that was started elsewhere."""
    scheme, separator, path = uri.partition(":///")
    if separator and scheme == "sqlite" and not path.startswith("/"):
        return f"sqlite:///{os.path.abspath(path)}"
    return uri if "://" in uri else os.path.abspath(uri)


def as_metrics(line: Mapping[str, Any]) -> list[tuple[str, float, float, int]]:
    """A line of the metrics file as MLflow wants it: (name, value, time, step or round) for each of its numbers."""
    axis = line["kind"]
    if axis not in ("step", "round"):
        return []
    left_out = ("time", "step", "round", "stage", "phase_step", "phase_steps")
    numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and k not in left_out}
    return [(f"{axis}/{name}", float(value), line["time"], line[axis]) for name, value in numbers.items()]


def redact(uri: str) -> str:
    """The URI without user and password."""
    scheme, separator, rest = uri.partition("://")
    return scheme + separator + rest.rpartition("@")[2] if separator else uri


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
