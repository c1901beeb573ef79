"""MLflow beside a run: there, gone at the start, cut off on the way, slow; nothing waits and nothing is lost."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from sst.run.metrics import MetricsFile, MetricsReader
from sst.run.tracking import CLOSE_SECONDS, Tracker, as_metrics, redact
from tests.proxy import Proxy, free_port


def test_credentials_are_not_shown():
    assert redact("https://me:secret@host/path") == "https://host/path"
    assert redact("sqlite:///mlflow.db") == "sqlite:///mlflow.db"


def test_numbers_of_a_line_are_metrics_and_its_place_is_their_step():
    line = {"kind": "step", "time": 5.0, "step": 40, "phase": "warm-up", "phase_step": 40, "loss": 0.5}
    assert as_metrics(line) == [("step/loss", 0.5, 5.0, 40)]
    assert as_metrics({"kind": "resume", "time": 5.0, "step": 40}) == []


def write_steps(run, first: int, last: int) -> None:
    file = MetricsFile(str(run))
    for step in range(first, last):
        file.write({"kind": "step", "step": step, "loss": float(step)})


def sent_steps(uri: str, run) -> list[float]:
    """Values of the loss that MLflow has, each once, in order of their steps."""
    import mlflow

    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    history = mlflow.MlflowClient(uri).get_metric_history(run_id, "step/loss")
    return [value for _, value in sorted({(metric.step, metric.value) for metric in history})]


def test_a_reader_goes_on_at_an_offset(tmp_path):
    write_steps(tmp_path, 0, 3)
    first = MetricsReader(str(tmp_path))
    assert [line["step"] for line in first.new_lines()] == [0, 1, 2]
    write_steps(tmp_path, 3, 5)
    assert [line["step"] for line in MetricsReader(str(tmp_path), offset=first.offset).new_lines()] == [3, 4]
    assert [line["step"] for line in first.new_lines()] == [3, 4] and first.new_lines() == []


def test_a_server_that_is_gone_costs_a_warning_and_five_seconds_and_gets_everything_later(
    tmp_path, caplog, monkeypatch
):
    write_steps(tmp_path, 0, 700)
    tracker = Tracker(str(tmp_path), f"http://me:secret@127.0.0.1:{free_port()}", "e", "n")
    started = time.monotonic()
    for step in range(100):
        tracker.log({"score": 1.0}, step)
    assert time.monotonic() - started < 1.0  # training itself never waits
    started = time.monotonic()
    assert tracker.close("FINISHED") is False
    assert time.monotonic() - started < CLOSE_SECONDS + 1
    assert "metrics.jsonl" in caplog.text and "secret" not in caplog.text
    assert "giving the run's command again sends the rest" in " ".join(caplog.text.split())
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert Tracker(str(tmp_path), uri, "e", "n").close("FINISHED")
    assert sent_steps(uri, tmp_path) == [float(step) for step in range(700)]


def test_a_resumed_run_sends_what_is_new_and_what_a_crash_left(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    write_steps(tmp_path, 0, 5)
    assert Tracker(str(tmp_path), uri, "e", "n").close("FAILED")
    write_steps(tmp_path, 5, 9)  # by a run whose driver was killed before it sent them
    assert Tracker(str(tmp_path), uri, "e", "n").close("FINISHED")
    assert sent_steps(uri, tmp_path) == [float(step) for step in range(9)]
    import mlflow

    run_id = json.loads((tmp_path / "mlflow.json").read_text())["run_id"]
    assert len(mlflow.MlflowClient(uri).get_metric_history(run_id, "step/loss")) == 9  # none twice
    assert mlflow.MlflowClient(uri).get_run(run_id).info.status == "FINISHED"


def test_what_the_server_refuses_for_good_does_not_hold_up_the_rest(tmp_path, caplog):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker(str(tmp_path), uri, "e", "n")
    tracker.log({"a name with % that is refused?!": 1.0}, 0)
    tracker.log({"score": 2.0}, 0)
    assert tracker.close("FINISHED")
    import mlflow

    run_id = json.loads((tmp_path / "mlflow.json").read_text())["run_id"]
    assert mlflow.MlflowClient(uri).get_run(run_id).data.metrics == {"score": 2.0}
    assert "refuses something for good" in caplog.text


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """An MLflow server; its port, and the database behind it."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    database = f"sqlite:///{folder}/mlflow.db"
    process = subprocess.Popen(
        ["mlflow", "server", "--backend-store-uri", database, "--port", str(port), "--workers", "1"],
        cwd=folder, env=os.environ | {"PATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    for _ in range(240):
        assert process.poll() is None
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            break
        except OSError:
            time.sleep(0.25)
    yield port, database
    os.killpg(process.pid, 9)
    process.wait()


@pytest.fixture
def proxy(server):
    between = Proxy(server[0])
    yield between
    between.close()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()


def test_a_connection_that_is_cut_on_the_way_loses_nothing(tmp_path, server, proxy, caplog):
    write_steps(tmp_path, 0, 50)
    tracker = Tracker(str(tmp_path), f"http://127.0.0.1:{proxy.port}", "cut", "n")
    wait_for(lambda: (tmp_path / "mlflow.json").exists() and len(sent_steps(server[1], tmp_path)) == 50)
    proxy.cut()
    taken = proxy.taken
    write_steps(tmp_path, 50, 100)
    tracker.log_files({"a.txt": b"x"})
    wait_for(lambda: proxy.taken > taken and "can't be reached" in caplog.text)
    proxy.up = True
    assert tracker.close("FINISHED")
    assert sent_steps(server[1], tmp_path) == [float(step) for step in range(100)]
    assert caplog.text.count("can't be reached") == 1  # one warning for one outage


def test_a_slow_server_holds_nothing_up(tmp_path, server, proxy):
    proxy.delay = 30.0
    tracker = Tracker(str(tmp_path), f"http://127.0.0.1:{proxy.port}", "slow", "n")
    write_steps(tmp_path, 0, 20)
    started = time.monotonic()
    assert tracker.close("FINISHED") is False
    assert time.monotonic() - started < CLOSE_SECONDS + 1
    proxy.delay = 0.0
    assert Tracker(str(tmp_path), f"http://127.0.0.1:{proxy.port}", "slow", "n").close("FINISHED")
    assert sent_steps(server[1], tmp_path) == [float(step) for step in range(20)]


def test_a_resumed_run_keeps_its_mlflow_run(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for step in range(2):
        tracker = Tracker(str(tmp_path / "run"), uri, "e", "name")
        tracker.log_settings({"workers": 2 - step, "seed": 0})
        tracker.log({"loss": 1.0 - step}, step)
        tracker.log_files({"figures/a.png": b"x"})
        wait_for(lambda: (tmp_path / "run" / "mlflow.json").exists())  # MLflow's import alone may take seconds
        assert tracker.close("FINISHED")
    import mlflow

    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert len(runs) == 1
    assert runs[0].info.run_id == json.loads((tmp_path / "run" / "mlflow.json").read_text())["run_id"]
    history = client.get_metric_history(runs[0].info.run_id, "loss")
    assert [m.value for m in history] == [1.0, 0.0]
    assert runs[0].data.metrics["loss"] == pytest.approx(0.0)
    assert runs[0].data.params == {"workers": "2", "seed": "0"}
    artifacts = tmp_path / "mlruns" / "e" / runs[0].info.run_id / "artifacts"
    assert (artifacts / "figures" / "a.png").read_bytes() == b"x"
    assert runs[0].data.tags["resumed/workers"] == "1" and "resumed/seed" not in runs[0].data.tags
    # Another server knows nothing of that run: it gets one of its own.
    (tmp_path / "run" / "mlflow.json").write_text(json.dumps({"run_id": "0" * 32}))
    tracker = Tracker(str(tmp_path / "run"), uri, "e", "name")
    tracker.log({"loss": 2.0}, 3)
    assert tracker.close("FINISHED")
    assert len(client.search_runs([client.get_experiment_by_name("e").experiment_id])) == 2
