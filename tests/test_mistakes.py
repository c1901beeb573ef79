"""What people get wrong before anything is started: one clear message, exit code 2, nothing left behind."""

import subprocess
import sys

import pytest

from jobs import evaluate, pack, train
from tests.small import write_toy


def refused(main, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert stop.value.code == 2
    captured = capsys.readouterr()
    return captured.err + captured.out


@pytest.fixture
def command(tmp_path):
    write_toy(str(tmp_path / "shards"), train=16, test=4)
    return ["toy-cpu", "--shards", tmp_path / "shards", "--name", "x", "--runs", tmp_path / "runs"]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    import ray

    def started(**options):
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", started)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_unknown_preset(capsys):
    text = refused(train.main, ["celebb", "--shards", "s", "--name", "n"], capsys)
    assert "celebb" in text and "celeba" in text


def test_unknown_option_names_the_nearest(command, capsys):
    text = refused(train.main, [*command, "--stage1.roundz", "3"], capsys)
    assert "--stage1.roundz" in text and "--stage1.rounds" in text


def test_wrong_type(command, capsys):
    assert "many" in refused(train.main, [*command, "--stage1.rounds", "many"], capsys)


def test_contradiction(command, capsys, tmp_path):
    text = refused(train.main, [*command, "--stage2.batch", "3"], capsys)
    assert "stage2.batch 3 must be a multiple of resources.workers 2" in text
    assert not (tmp_path / "runs").exists()


def test_missing_shards(command, capsys, tmp_path):
    command[2] = tmp_path / "nowhere"
    text = refused(train.main, command, capsys)
    assert "nowhere" in text and "jobs.pack" in text
    assert not (tmp_path / "runs").exists()


def test_missing_and_short_shards_are_all_named(command, capsys, tmp_path):
    (tmp_path / "shards" / "shard-00000.tar").unlink()
    short = tmp_path / "shards" / "shard-00001.tar"
    short.write_bytes(short.read_bytes()[:-512])
    text = refused(train.main, command, capsys)
    assert "shard-00000.tar is missing" in text and "shard-00001.tar has" in text
    assert not (tmp_path / "runs").exists()


def test_more_workers_than_cpus(command, capsys, tmp_path):
    text = refused(
        train.main,
        [*command, "--resources.workers", "512", "--stage1.pairs", "1024", "--stage2.batch", "512"],
        capsys,
    )
    assert "512 workers" in text and "--resources.workers" in text
    assert not (tmp_path / "runs").exists()


def test_odd_run_name(command, capsys):
    command[4] = "../x"
    assert "name" in refused(train.main, command, capsys)


def test_evaluate_without_a_run(capsys, tmp_path):
    assert "settings.json" in refused(evaluate.main, ["run", tmp_path], capsys)


def test_evaluate_of_a_file_that_is_no_npz(capsys, tmp_path):
    (tmp_path / "x.npz").write_text("text")
    assert "x.npz" in refused(evaluate.main, ["predictions", tmp_path / "x.npz", "--protocol", "mafl"], capsys)


def test_pack_of_a_missing_folder(capsys, tmp_path):
    text = refused(pack.main, ["folder", "--images", tmp_path / "none", "--out", tmp_path / "out"], capsys)
    assert "none" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["pack", "train", "evaluate", "demo"])
def test_help_of_every_verb(verb):
    shown = subprocess.run(
        [sys.executable, "-m", f"jobs.{verb}", "--help"], capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0 and f"jobs.{verb}" in shown.stdout
