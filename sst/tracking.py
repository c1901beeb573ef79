"""MLflow beside the run: it gets what the run directory has, and never holds the run up.

Calls are made by a background thread from a queue. A server that is gone costs a warning and some
ten seconds at the end: everything is in RUN/metrics.jsonl and RUN/figures all the same.
"""

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from cluster import storage

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
"""Longest wait for MLflow at the end of a run."""

VALUE_LENGTH = 500
"""Longest parameter value that every MLflow backend takes."""

MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}
"""Set before MLflow is imported, unless the caller has set them: its defaults wait for minutes."""


def set_environment(values: Mapping[str, str]) -> None:
    """Sets variables that the caller has not set."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


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

    def __init__(self, run_url: str, uri: str, experiment: str, name: str) -> None:
        """Starts the background thread; nothing is waited for."""
        self._run_url, self._uri, self._experiment, self._name = run_url, uri, experiment, name
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._client: Any = None
        self._run_id = ""
        self._failed = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()
        self._calls.put(self._open)

    def log_settings(self, settings: Mapping[str, Any]) -> None:
        """Sends nested settings as parameters; one that a resumed run has changed becomes a tag "resumed/NAME"."""
        flat = flatten(settings)

        def send() -> None:
            from mlflow.entities import Param, RunTag

            # MLflow refuses a second value for a parameter, and an error would end the tracking.
            known = self._client.get_run(self._run_id).data.params
            params = [Param(name, value) for name, value in flat.items() if name not in known]
            changed = [(name, value) for name, value in flat.items() if known.get(name, value) != value]
            for start in range(0, len(params), 100):
                self._client.log_batch(self._run_id, params=params[start : start + 100])
            for start in range(0, len(changed), 100):
                tags = [RunTag(f"resumed/{name}", value) for name, value in changed[start : start + 100]]
                self._client.log_batch(self._run_id, tags=tags)

        self._calls.put(send)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Sends numbers at an optimizer step."""
        numbers = {name: float(value) for name, value in figures.items()}

        def send() -> None:
            import time

            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            metrics = [Metric(name, value, now, step) for name, value in numbers.items()]
            self._client.log_batch(self._run_id, metrics=metrics)

        self._calls.put(send)

    def log_files(self, files: Mapping[str, bytes]) -> None:
        """Sends files as artifacts, by path."""
        own = dict(files)

        def send() -> None:
            import tempfile
            from pathlib import Path

            with tempfile.TemporaryDirectory() as folder:
                for path, data in own.items():
                    target = Path(folder, path)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(data)
                self._client.log_artifacts(self._run_id, folder)

        self._calls.put(send)

    def close(self, status: str) -> bool:
        """Ends the MLflow run and waits a little for what is still queued.

        Args:
            status: FINISHED, FAILED or KILLED.

        Returns:
            Whether all was sent.
        """
        self._calls.put(lambda: self._client.set_terminated(self._run_id, status))
        self._calls.put(None)
        self._thread.join(CLOSE_SECONDS if self._failed else 12 * CLOSE_SECONDS)
        if self._thread.is_alive() or self._failed:
            logger.warning(
                "not all figures reached MLflow at %s; they are in %s/metrics.jsonl", redact(self._uri), self._run_url
            )
            return False
        return True

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._failed:
                continue
            try:
                call()
            except Exception as error:  # whatever MLflow or its server raises must not reach the run
                self._failed = True
                logger.warning("MLflow at %s is given up: %s", redact(self._uri), type(error).__name__)

    def _open(self) -> None:
        set_environment(MLFLOW_ENVIRONMENT)
        import mlflow

        for chatty in ("mlflow", "alembic"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        self._client = mlflow.MlflowClient(tracking_uri=self._uri)
        known = storage.join(self._run_url, "mlflow.json")
        if storage.exists(known):
            self._run_id = storage.read_json(known)["run_id"]
            try:
                self._client.update_run(self._run_id, status="RUNNING")
                return
            except mlflow.exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                logger.warning("MLflow at %s does not know this run; a new one is begun there", redact(self._uri))
        experiment = self._client.get_experiment_by_name(self._experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(self._experiment)
        self._run_id = self._client.create_run(number, run_name=self._name).info.run_id
        storage.write_json(known, {"run_id": self._run_id})


def redact(uri: str) -> str:
    """The URI without user and password."""
    scheme, separator, rest = uri.partition("://")
    return scheme + separator + rest.rpartition("@")[2] if separator else uri
