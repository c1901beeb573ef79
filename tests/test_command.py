"""`landmarks VERB`: the verbs, their help, completion, and options that they share."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jobs.__main__ import VERBS, main, module_of

ROOT = Path(__file__).parents[1]


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_every_file_of_jobs_is_a_verb_and_every_verb_a_file():
    files = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__", "__main__"}
    assert files == {verb.replace("-", "_") for verb in VERBS}


def test_the_help_page_lists_every_verb_in_short_lines_and_imports_nothing_slow():
    code = """
import sys
from jobs.__main__ import main
main(["--help"])
sys.exit(", ".join({"torch", "ray", "tyro", "pydantic", "numpy"} & set(sys.modules)) or 0)
"""
    shown = run("-c", code)
    assert shown.returncode == 0, shown.stderr
    listed = re.findall(r"^  (\S+) +(\S.*)$", shown.stdout, re.MULTILINE)
    assert [verb for verb, _ in listed] == list(VERBS)
    assert max(map(len, shown.stdout.splitlines())) <= 92
    for verb, summary in listed:  # tyro shows the same sentence at the top of the verb's own help
        assert importlib.import_module(module_of(verb)).__doc__.startswith(summary), verb


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        (["-m", "jobs", "validate", "--help"], "usage: python -m jobs validate "),
        (["-m", "jobs.validate", "--help"], "usage: python -m jobs.validate "),
        (["-c", "import sys; from jobs.__main__ import main; sys.argv[0] = '/x/landmarks'; main()", "validate", "-h"],
         "usage: landmarks validate "),
    ],
)  # fmt: skip
def test_usage_says_what_was_typed(words, usage):
    shown = run(*words)
    assert shown.returncode == 0 and shown.stdout.startswith(usage)


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("import_checkpoint", "import-checkpoint")])
def test_an_unknown_verb_is_refused_with_the_nearest_one(typed, meant, capsys):
    with pytest.raises(SystemExit) as stop:
        main([typed, "--help"])
    assert stop.value.code == 2 and f"did you mean {meant}?" in capsys.readouterr().err


def test_without_a_verb_the_help_page_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and "import-checkpoint" in captured.err


def test_a_verb_gets_the_rest_of_the_line_and_gives_its_exit_code(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["validate", str(tmp_path)])
    assert stop.value.code == 2 and str(tmp_path) in capsys.readouterr().err


def test_the_console_script_is_this_function():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["landmarks"].partition(":")
    assert getattr(importlib.import_module(module), function) is main


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_verbs_and_their_options(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--tyro-print-completion", "bash"])
    assert not stop.value.code
    (tmp_path / "completion.bash").write_text(capsys.readouterr().out)

    def completed(*words: str) -> set[str]:
        script = f"""
source {tmp_path}/completion.bash
COMP_WORDS=(landmarks {" ".join(words)}); COMP_CWORD={len(words)}
$(complete -p landmarks | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
echo "${{COMPREPLY[@]}}"
"""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return set(
            subprocess.run(
                ["bash", "-c", script], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
            ).stdout.split()
        )

    assert {"train", "tune"} <= completed('""') and completed("tr") == {"train"}
    assert completed("train", "own", "--la") == {"--landmarks"}
    assert "--stage2.merge-radius" in completed("train", "faces-cpu", "--stage2.m")


@pytest.mark.parametrize("verb", ["train", "tune", "demo", "compare"])
def test_shared_options_have_one_meaning_in_every_verb(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # wider pages are set in several columns
    preset = {"train": ["own"], "tune": ["toy-cpu"]}.get(verb, [])
    with pytest.raises(SystemExit):
        main([verb, *preset, "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--tracking STR MLflow tracking URI;" in shown and "--experiment STR MLflow experiment." in shown
    assert ("--runs STR Directory or URL under which runs lie." in shown) == (verb != "compare")
    assert ("--register" in shown) == (verb != "compare")


def test_entry_files_stay_short():
    for path in (ROOT / "jobs").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 100, path.name
