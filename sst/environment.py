"""Environment variables and processors: what must be set before Ray and MLflow are imported."""

import os
from collections.abc import Mapping

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


RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
}
"""Set before Ray is imported, unless the caller has set them."""


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
