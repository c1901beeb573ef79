"""Runs side by side, from what MLflow holds of them."""

import mlflow
import pytest

from jobs import compare
from sst.errors import UserError
from sst.tune.comparison import ComparedRun, choose, comparison_page, differing, fetch_runs, label


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two runs, a sweep of two trials one of which was stopped, and a run that has just begun."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("birds", artifact_location=str(tmp_path_factory.mktemp("artifacts")))

    def run(name: str, clusters: int, error: float | None, parent: str | None = None) -> str:
        tags = {} if parent is None else {"mlflow.parentRunId": parent}
        own = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        client.log_param(own, "cluster.clusters", clusters)
        client.log_param(own, "seed", 0)
        for number in range(3):
            for _ in range(2):  # a resumed run sends a round again
                client.log_metric(own, "round/equivariance_error", 5.0 - number, step=number)
        if error is not None:
            client.log_metric(own, "model/equivariance_error", error)
            client.set_terminated(own)
        return own

    ids = {"k20": run("k20", 20, 2.5), "k<40>": run("k<40>", 40, 1.5)}
    ids["sweep"] = client.create_run(experiment, run_name="sweep").info.run_id
    ids["sweep-000"] = run("sweep-000", 10, 3.5, ids["sweep"])
    ids["sweep-001"] = run("sweep-001", 11, None, ids["sweep"])
    client.create_run(experiment, run_name="new")
    return uri, ids, client


def names(runs: list[ComparedRun]) -> list[str]:
    return [run.name for run in runs]


def test_runs_are_found_by_experiment_name_id_and_sweep(store):
    uri, ids, _ = store
    assert names(fetch_runs(uri, "birds")) == ["k20", "k<40>", "sweep-000", "sweep-001"]
    assert names(fetch_runs(uri, "birds", [ids["k<40>"], "k20", "k20"])) == ["k<40>", "k20"]
    trials = fetch_runs(uri, "birds", ["sweep"])
    assert names(trials) == ["sweep-000", "sweep-001"] and {run.parent for run in trials} == {ids["sweep"]}
    assert trials[0].curves["round/equivariance_error"] == ([0, 1, 2], [5.0, 4.0, 3.0])
    assert trials[0].metrics["model/equivariance_error"] == 3.5


@pytest.mark.parametrize(
    ("experiment", "told", "said"),
    [
        ("fish", [], "no experiment fish"),
        ("birds", ["k20", "k21", "k22"], "k21, k22"),
        ("birds", ["new"], "no run with metrics"),
    ],
)
def test_what_is_not_there_is_named(store, experiment, told, said):
    with pytest.raises(UserError, match=said):
        fetch_runs(store[0], experiment, told)


def test_only_settings_that_differ_are_shown():
    first = ComparedRun("1", "a", "FINISHED", None, {"x": "1", "y": "2"})
    second = ComparedRun("2", "b", "FINISHED", None, {"x": "1"})
    assert differing([first, second]) == ["y"] and differing([first]) == []
    assert label(first, ["stage.y", "y"]) == "a: y 2" and label(second, ["y"]) == "b"


def test_the_page_has_every_run_with_its_figures_and_escapes_their_names(store):
    runs = fetch_runs(store[0], "birds")
    page = comparison_page("Birds & more", runs)
    assert "Birds &amp; more" in page and "k&lt;40&gt;" in page and "k<40>" not in page
    assert "cluster.clusters" in page and ">seed<" not in page
    assert all(f"<td>{value}</td>" in page for value in ("2.5", "1.5", "3.5", "20", "40"))
    assert page.count("data:image/webp") == 1 and "http" not in page


def test_the_command_writes_the_page_and_makes_it_an_artifact(store, tmp_path, capsys):
    uri, ids, client = store
    out = tmp_path / "pages" / "c.html"
    compare.main(["sweep", "--experiment", "birds", "--tracking", uri, "--out", str(out)])
    assert [file.path for file in client.list_artifacts(ids["sweep"])] == ["comparison.html"]
    compare.main(["--experiment", "birds", "--tracking", uri, "--out", str(out)])
    said = capsys.readouterr().out
    assert "comparison of 4 runs" in said
    new = said.split()[-1]
    assert client.get_run(new).info.run_name == "comparison" and client.get_run(new).info.status == "FINISHED"
    assert names(fetch_runs(uri, "birds")) == ["k20", "k<40>", "sweep-000", "sweep-001"]  # it is none to be compared
    with pytest.raises(SystemExit, match="2"):
        compare.main(["nobody", "--experiment", "birds", "--tracking", uri, "--out", str(out)])
    assert "nobody" in capsys.readouterr().err


def test_of_two_runs_of_one_name_both_are_meant():
    class Run:
        def __init__(self, run_id):
            self.info = type("Info", (), {"run_id": run_id, "run_name": "twice"})
            self.data = type("Data", (), {"tags": {}})

    assert [run.info.run_id for run in choose([Run("1"), Run("2")], ["twice"])] == ["1", "2"]
