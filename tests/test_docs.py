"""Every command in README and docs is run, in its order, on a tiny corpus with small settings and without Ray."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from cluster import storage
from docs import reference
from jobs import __main__ as command_line
from jobs import compare, demo, train, tune
from sst.corpora.drawings import draw
from sst.data.corpus import open_corpus
from sst.report.finish import finish_run
from sst.run import own
from sst.run.claim import claim
from sst.run.estimate import Speed
from sst.train.run_directory import RunDirectory
from sst.tune import comparison, sweep
from tests.small import SETTINGS, local_tools, train_locally

ROOT = Path(__file__).parents[1]
ROOT_PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
PAGES = [*ROOT_PAGES, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def commands(page: str) -> list[str]:
    """Commands of the page's code blocks, and those in its sentences, in their order."""
    found = []
    blocks = re.finditer(
        r"```(\w*)\n(.*?)```|`((?:(?:\.venv/bin/)?(?:python -m|landmarks)|ray job) [^`]*)`",
        (ROOT / page).read_text(),
        re.DOTALL,
    )
    for language, block, inline in (match.groups(default="") for match in blocks):
        lines = "" if language else f"{block}{inline}".replace("\\\n", " ")
        found += [line.split("  #")[0].strip() for line in map(str.strip, lines.splitlines()) if is_command(line)]
    return found


def is_command(line: str) -> bool:
    return re.match(r"(\.venv/bin/|python -m |landmarks |make |ray |PATH=)", line) is not None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One small trained run, which later runs copy where their corpus is the same size."""
    return {"folder": tmp_path_factory.mktemp("finished")}


@pytest.fixture
def world(tmp_path, monkeypatch, finished):
    """The files that the pages speak of, and training that takes seconds."""
    rng = np.random.default_rng(0)
    (tmp_path / "MY_IMAGES").mkdir()
    for number in range(72):
        Image.fromarray(draw(1, number, 96).image).save(tmp_path / "MY_IMAGES" / f"{number}.jpg")
    shutil.copytree(tmp_path / "MY_IMAGES", tmp_path / "FACES" / "images")
    points = ",".join(f"{axis}{n}" for n in range(68) for axis in "xy")
    rows = [f"{number}.jpg," + ",".join(f"{v:.1f}" for v in rng.uniform(5, 90, 136)) for number in range(72)]
    (tmp_path / "FACES" / "annotations.csv").write_text("\n".join([f"file,{points}", *rows]))
    boxes = "".join(f"{number}.jpg,10,10,80,80\n" for number in range(72))
    (tmp_path / "BOXES.csv").write_text("file,box_x0,box_y0,box_x1,box_y1\n" + boxes)
    (tmp_path / "FEW").mkdir()
    shutil.copy(tmp_path / "MY_IMAGES" / "0.jpg", tmp_path / "FEW")
    (tmp_path / "FEW" / "few.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "0.jpg"}],
                "annotations": [{"image_id": 1, "keypoints": [20, 30, 2]}],
                "categories": [{"keypoints": ["nose"]}],
            }
        )
    )
    shutil.copytree(tmp_path / "MY_IMAGES", tmp_path / "MY_PROJECT" / "labeled-data" / "day1")
    shutil.copytree(tmp_path / "FEW", tmp_path / "SOME_IMAGES")
    places = "".join(f"labeled-data/day1/{n}.jpg,{20 + n % 7},{30 + n % 5},50,{60 + n % 3}\n" for n in range(72))
    head = "scorer,Ada,Ada,Ada,Ada\nbodyparts,nose,nose,tail,tail\ncoords,x,y,x,y\n"
    (tmp_path / "MY_PROJECT" / "labeled-data" / "day1" / "CollectedData_Ada.csv").write_text(head + places)
    (tmp_path / "MY_PROJECT" / "config.yaml").write_text("scorer: Ada\n")
    (tmp_path / "EXPORTED").mkdir()
    (tmp_path / "EXPORTED" / "annotations.xml").write_text(
        '<annotations><image id="0" name="0.jpg" width="96" height="96"><points label="nose" points="20,30"/></image>'
        "</annotations>"
    )
    writer = cv2.VideoWriter(str(tmp_path / "MY_VIDEO.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 96))
    writer.write(draw(1, 0, 96).image)
    writer.release()

    def quickly(settings, shards, run_url, tracking):
        run, corpus = RunDirectory(storage.absolute(run_url)), open_corpus(storage.absolute(shards))
        claim(run, settings, corpus)
        known = finished.setdefault(corpus.manifest_hash, finished["folder"] / str(len(finished)))
        if not known.exists():
            train_locally(corpus.url, str(known), local_tools([]), SETTINGS)
        shutil.copytree(known, run.url, dirs_exist_ok=True)
        return finish_run(run, corpus, SETTINGS, 1.0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train_run", quickly)
    monkeypatch.setattr(own, "train_run", quickly)
    monkeypatch.setattr(own, "measure", lambda *_: Speed(0.1, 0.1, 0.003, 0.003, 0.02, 1e-6, 1.0, 3.5))
    monkeypatch.setattr(demo, "train_run", quickly)
    one = sweep.TrialRecord(values={}, status="finished", objective=1.0)
    monkeypatch.setattr(
        tune, "run_sweep", lambda told, **_: [one.model_copy(update={"values": v}) for v in told.trials]
    )
    compared = comparison.ComparedRun("0", "k20", "FINISHED", metrics={"model/landmarks": 20.0})
    monkeypatch.setattr(compare, "fetch_runs", lambda uri, experiment, told: [compared])
    monkeypatch.setattr(compare, "track_page", lambda *_: "0")
    return tmp_path


def run(command: str) -> None:
    """Runs a command of the docs, or what can be run of it here."""
    words = shlex.split(command)
    if words[0] == "ray" and "--" not in words:
        files = [word for word in words if word.endswith(".yaml")]
        assert words[1] in ("up", "down", "dashboard", "job") and all((ROOT / file).exists() for file in files)
        return
    if words[0] == "ray":
        words = words[words.index("--") + 1 :]
    if words[0] == "make":
        subprocess.run(["make", "-n", words[1]], cwd=ROOT, check=True, capture_output=True)
    elif words[0].endswith("landmarks"):
        succeeds(command_line.main, words[1:])
    elif "mlflow" in words[0] or "mlflow" in words[1]:
        from click.testing import CliRunner
        from mlflow.cli import cli

        arguments = words[words.index("mlflow") + 1 :] if "mlflow" in words else words[1:]
        result = CliRunner().invoke(cli, [*arguments, "--help"])
        assert result.exit_code == 0, result.output
    else:
        assert words[1] == "-m", command
        main, arguments = importlib.import_module(words[2]), words[3:]
        if not words[2].startswith("jobs."):
            return  # what it does is looked at elsewhere; that it exists, here
        succeeds(main.main, arguments)


def succeeds(main, arguments):
    try:
        main(arguments)
    except SystemExit as exit_:
        assert not exit_.code, arguments


def is_pattern(command: str) -> bool:
    """Whether a command shows a form rather than something that can be typed."""
    bare_verb = r"^(python -m jobs\.\w+|landmarks \w[\w-]*( own)?)$"
    return re.search(rf"\b(PRESET|FILE|DIR|SOURCE)\b|s3://|\||{bare_verb}", command) is not None


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_run(page, world, capsys):
    found = commands(page)
    if page in ("docs/how-to.md", "docs/annotation-tools.md"):
        run(".venv/bin/landmarks train own --images MY_IMAGES --name mine")  # it speaks of a finished run
    if page == "docs/how-to.md":
        shutil.rmtree("runs")
    for command in found:
        if page == "README.md" and "evaluate run runs/mine" in command:
            continue  # its images have no annotations: refused with that reason, see test_mistakes
        if is_pattern(command):
            verb = re.search(r"(?:jobs\.|landmarks )([\w-]+)", command)
            assert verb is None or verb.group(1).replace("_", "-") in (*command_line.VERBS, "VERB"), command
        else:
            run(command)


def test_commands_are_found_at_all():
    found = [command for page in PAGES for command in commands(page)]
    assert len(found) >= 30 and sum(not is_pattern(command) for command in found) >= 20


@pytest.mark.parametrize("line", [
    "python -m jobs.train celeba --shards s3://bucket/shards --runs s3://bucket/runs --name mine",
])  # fmt: skip
def test_a_submitted_command_is_a_sound_one(line):
    parsed = train.parse(shlex.split(line)[3:])
    assert parsed.shards == "s3://bucket/shards" and any(line in command for command in commands("README.md"))


def test_the_reference_is_made_from_the_configuration_models():
    assert reference.PAGE.read_text() == reference.page(), "run python -m docs.reference"


def test_every_setting_has_a_meaning():
    empty = [row for row in reference.rows(own.PRESETS["celeba"][1]) if row.endswith("|  |")]
    assert not empty


@pytest.mark.parametrize("page", [*PAGES, "benchmarks/RESULTS.md"])
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target
    for file, anchor in re.findall(r"\]\(([^)#:]*)#([\w-]+)\)", (ROOT / page).read_text()):
        text = ((ROOT / page).parent / file).read_text()
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert anchor in [re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings]


def test_python_blocks_of_the_docs_compile():
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
            compile(block, page, "exec")
    assert sys.version_info >= (3, 11)


@pytest.mark.parametrize("page", ["docs/reliability.md", "docs/security.md"])
def test_every_test_that_a_page_names_exists(page):
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    text = (ROOT / page).read_text()
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) >= 8 and [name for name in named if f"def {name}(" not in tests] == []
    assert all(list((ROOT / "tests").rglob(name)) for name in re.findall(r"`(test_\w+\.py)`", text))


def test_the_contributors_tour_names_files_and_rooms_that_exist():
    named = re.findall(r"`([\w./]+/[\w.]*)`", (ROOT / "CONTRIBUTING.md").read_text())
    missing = [name for name in named if name != "site/index.html" and not (ROOT / name).exists()]
    assert len(named) >= 30 and missing == []


def test_the_citation_names_the_paper_and_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    paper = citation["references"][0]
    assert "Unsupervised Learning of Object Landmarks via Self-Training Correspondence" in paper["title"]
    assert [author["family-names"] for author in paper["authors"]] == ["Mallis", "Sanchez", "Bell", "Tzimiropoulos"]
    assert citation["version"] == project["version"] and citation["cff-version"] == "1.2.0"


def test_the_changelog_has_room_for_the_next_change():
    headings = re.findall(r"^#{2,3} (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}  # those of Keep a Changelog
    assert all(heading in kinds or re.match(r"\[[\w.]+\]", heading) for heading in headings)


def test_forms_and_workflows_are_sound_yaml_and_ci_runs_what_must_pass():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug_report.yml").read_text())
    asked = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert {"name", "description"} <= form.keys() and len(set(asked)) == len(asked) >= 4
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert "bash .ci/run" in steps and (ROOT / ".ci/run").exists()
