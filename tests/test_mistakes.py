"""What people get wrong before anything is started: one clear message, exit code 2, nothing left behind."""

import json
import shlex
import subprocess
import sys
from unittest.mock import MagicMock

import pytest
from PIL import Image

from jobs import evaluate, export, import_checkpoint, pack, predict, train
from jobs import name as naming
from sst.corpora.drawings import draw
from sst.data.corpus import open_corpus
from sst.errors import UserError
from sst.nn.network import LandmarkDetector
from sst.presets import PRESETS
from sst.run.claim import as_begun, claim
from sst.train.model import save_model
from sst.train.run_directory import RunDirectory
from tests.small import SETTINGS, write_toy


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


def test_a_run_of_that_name_with_other_settings_is_refused_with_the_differences(command, capsys, tmp_path):
    corpus = open_corpus(str(tmp_path / "shards"))
    settings = PRESETS["toy-cpu"][1]
    claim(RunDirectory(str(tmp_path / "runs" / "x")), settings, corpus)
    text = refused(train.main, [*command, "--stage1.rounds", "7"], capsys)
    assert f"stage1.rounds: {settings.stage1.rounds} -> 7" in text and "take another --name" in text


def test_a_refused_run_takes_back_what_is_its_own(command, capsys, tmp_path, monkeypatch):
    """A folder of the name of the run, as `--runs . --name pics` finds it, keeps what is in it."""
    monkeypatch.setattr("sst.run.pipeline.place", lambda *_: (_ for _ in ()).throw(UserError("no room")))
    monkeypatch.setattr("sst.run.pipeline.start_ray", list)
    monkeypatch.setattr("sst.run.pipeline.Tracking.open", lambda *_: MagicMock())
    run = tmp_path / "runs" / "x"
    refused(train.main, command, capsys)
    assert not (tmp_path / "runs").exists()
    run.mkdir(parents=True)
    (run / "mine.png").write_text("mine")
    refused(train.main, command, capsys)
    assert [path.name for path in run.iterdir()] == ["mine.png"]
    (run / "model").mkdir()
    assert "holds model, and is no run" in refused(train.main, command, capsys)
    (run / "settings.json").write_text('{"editor.fontSize": 12}')
    assert "not the settings of a run" in refused(train.main, command, capsys)
    assert sorted(path.name for path in run.iterdir()) == ["mine.png", "model", "settings.json"]


def test_a_run_of_an_earlier_version_without_a_setting_goes_on(tmp_path):
    write_toy(str(tmp_path / "shards"), train=16, test=4)
    corpus, run, settings = open_corpus(str(tmp_path / "shards")), RunDirectory(str(tmp_path)), PRESETS["toy-cpu"][1]
    claim(run, settings, corpus)
    told = json.loads((tmp_path / "settings.json").read_text())
    del told["settings"]["stage2"]["flip_share"]
    (tmp_path / "settings.json").write_text(json.dumps(told))
    assert claim(run, settings, corpus) is False


def test_resources_may_change_between_starts_but_not_the_arithmetic(tmp_path):
    write_toy(str(tmp_path / "shards"), train=16, test=4)
    corpus, run, settings = open_corpus(str(tmp_path / "shards")), RunDirectory(str(tmp_path)), PRESETS["toy-cpu"][1]
    claim(run, settings, corpus)
    resources = settings.resources.model_copy(update={"workers": "1:2", "checkpoint_steps": 7, "max_failures": 0})
    assert claim(run, settings.model_copy(update={"resources": resources}), corpus) is False
    exact = settings.resources.model_copy(update={"precision": "float32"})
    with pytest.raises(UserError, match="settings.resources.precision: auto -> float32"):
        claim(run, settings.model_copy(update={"resources": exact}), corpus)


@pytest.mark.parametrize("begun", ["bf16", "float32"])
def test_a_run_keeps_the_arithmetic_that_it_began_with(tmp_path, begun):
    """Whatever this machine would take; runs of earlier versions noted bf16 without being told."""
    write_toy(str(tmp_path / "shards"), train=16, test=4)
    corpus, run, settings = open_corpus(str(tmp_path / "shards")), RunDirectory(str(tmp_path)), PRESETS["toy-cpu"][1]
    assert as_begun(run, settings) == settings
    claim(run, settings, corpus)
    assert as_begun(run, settings) == settings and run.noted_precision() is None
    run.note_precision(begun)
    later = as_begun(run, settings)
    assert later == settings.with_precision(begun) and claim(run, later, corpus) is False
    other = settings.with_precision("float32" if begun == "bf16" else "bf16")
    assert as_begun(run, other) == other
    with pytest.raises(UserError, match=f"settings.resources.precision: {begun} -> {other.resources.precision}"):
        claim(run, other, corpus)


CSV = "file,box_x0,box_y0,box_x1,box_y1,x0,y0\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What people have lying about: good and bad folders, annotations, shards, models and runs."""
    root = tmp_path_factory.mktemp("world")
    for name, count in (("pics", 4), ("half", 2), ("many", 70)):
        (root / name).mkdir()
        for number in range(count):
            Image.fromarray(draw(1, number, 64).image).save(root / name / f"{number}.png")
    (root / "half" / "cut.jpg").write_bytes(b"no image")
    (root / "half" / "text.png").write_text("no image")
    for name in ("empty", "bad"):
        (root / name).mkdir()
    (root / "bad" / "cut.jpg").write_bytes(b"no image")
    for name, text in {
        "no_file.csv": "who,x0,y0\n0.png,1,2\n",
        "no_number.csv": f"{CSV}0.png,1,1,60,60,left,3\n",
        "missing.csv": f"{CSV}elsewhere.png,1,1,60,60,2,3\n",
        "cats.csv": "file,label,xmin,ymin,xmax,ymax\n0.png,cat,1,1,60,60\n1.png,dog,1,1,60,60\n",
        "shares.csv": f"{CSV}0.png,0.1,0.1,0.9,0.9,5,5\n",
        "split.csv": "file,split\n0.png,trian\n",
        "broken.json": "{",
        "other.json": json.dumps({"pictures": []}),
        "uneven.json": json.dumps(
            {
                "images": [{"id": 1, "file_name": "0.png"}, {"id": 2, "file_name": "1.png"}],
                "annotations": [
                    {"image_id": 1, "keypoints": [1, 1, 2]},
                    {"image_id": 2, "keypoints": [1, 1, 2, 3, 3, 2]},
                ],
            }
        ),
        "boxes.csv": "file,box_x0,box_y0,box_x1,box_y1\n0.png,1,1,60,60\n",
        "a_file": "text",
        "zero": "\n",
    }.items():
        (root / name).write_text(text)
    for name in ("shards", "gone", "short", "no_json"):
        write_toy(str(root / name), train=16, test=4)
    write_toy(str(root / "only_test"), train=0, test=4)
    (root / "gone" / "shard-00000.tar").unlink()
    short = root / "short" / "shard-00000.tar"
    short.write_bytes(short.read_bytes()[:-512])
    (root / "no_json" / "manifest.json").write_text("{")
    network = SETTINGS.network
    for name in ("model", "damaged"):
        save_model(
            str(root / name), LandmarkDetector(network.shape, 3), network=network, clusters=[0, 1, 2], visible=0.1
        )
    with (root / "damaged" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    (root / "unfinished").mkdir()
    (root / "unfinished" / "settings.json").write_text("{}")
    (root / "onnx").mkdir()
    (root / "onnx" / "model.onnx").write_text("")
    return root


PACK, TRAIN = "folder --out {}/out --images ", "toy-cpu --name x --runs {}/runs --shards "
VERBS = {
    "pack": pack.main,
    "train": train.main,
    "evaluate": evaluate.main,
    "predict": predict.main,
    "name": naming.main,
    "export": export.main,
    "import_checkpoint": import_checkpoint.main,
}

EMPTY = [
    ("pack", PACK + "''"),
    ("pack", PACK + "{}/pics --annotations ''"),
    ("pack", "folder --images {}/pics --out ''"),
    ("pack", "celeba --out {}/out --root ''"),
    ("train", TRAIN + "''"),
    ("train", "toy-cpu --name x --runs '' --shards {}/shards"),
    ("train", "own --runs {}/runs --images ''"),
    ("train", "own --runs ' ' --images {}/many"),
    ("train", "own --runs {}/runs --images {}/many --annotations ''"),
    ("evaluate", "run ''"),
    ("predict", "'' {}/pics --out {}/out"),
    ("predict", "{}/model '' --out {}/out"),
    ("predict", "{}/model {}/pics '' --out {}/out"),
    ("predict", "{}/model {}/pics --boxes '' --out {}/out"),
    ("name", "{}/model --annotations ''"),
    ("name", "{}/model --annotations {}/boxes.csv --images ''"),
    ("export", "'' --out {}/out"),
    ("import_checkpoint", "'' --out {}/out"),
]
"""What an unset variable of the shell gives: it would be the current directory, or the root of the file system."""

MISTAKES = [
    ("pack", PACK + "{}/none", "none: no such folder; give a folder of images"),
    ("pack", PACK + "{}/a_file", "a_file: not a folder"),
    ("pack", PACK + "{}/empty", "no image in it (looked for .jpg"),
    ("pack", PACK + "{}/bad", "1 of 1 images can't be used"),
    ("pack", PACK + "{}/half", "2 of 4 images can't be used; --max-skipped is 0.01: "),
    ("pack", PACK + "{}/pics --annotations {}/none.csv", "none.csv: can't read the annotations"),
    ("pack", PACK + "{}/pics --annotations {}/no_file.csv", "no column 'file'; its columns are who, x0, y0"),
    ("pack", PACK + "{}/pics --annotations {}/no_number.csv", "no_number.csv, line 2: x0 is 'left', not a number"),
    ("pack", PACK + "{}/pics --annotations {}/missing.csv", "1 of 1 files named there are not in"),
    ("pack", PACK + "{}/pics --annotations {}/cats.csv", "objects of 2 categories: cat (1), dog (1); choose one by"),
    (
        "pack",
        PACK + "{}/pics --annotations {}/cats.csv --category cow",
        "no object of the category 'cow'; there are cat",
    ),
    ("pack", PACK + "{}/pics --annotations {}/shares.csv", "1 of 1 boxes can't be meant so: boxes in shares of the"),
    ("pack", PACK + "{}/pics --annotations {}/split.csv", "0.png: split is 'trian'; train, test or nothing"),
    ("pack", PACK + "{}/pics --annotations {}/broken.json", "broken.json: not COCO keypoints JSON"),
    (
        "pack",
        PACK + "{}/pics --annotations {}/other.json",
        "other.json: not COCO keypoints JSON: it has the keys",
    ),
    ("pack", PACK + "{}/pics --annotations {}/uneven.json", "all objects need equally many points, found [1, 2]"),
    ("pack", PACK + "{}/pics --context 0.5", "greater than or equal to 1"),
    ("pack", "folder --images {}/pics", "--out"),
    ("pack", "folder --images {}/pics --out {}/a_file", "a_file: a file; --out must be a directory or URL"),
    ("pack", "folder --images {}/pics --out {}/shards", "holds a corpus already; choose another --out"),
    ("pack", "toy --out {}/out --count 0", "greater than or equal to 1"),
    ("pack", "toy --out {}/out --count many", "many"),
    ("pack", "celeba --out {}/out --root {}/none", "none"),
    ("pack", "folders --out {}/out --images {}/pics", "folders"),
    ("train", "celebb --shards s --name n", "celebb"),
    ("train", TRAIN + "{}/shards --stage1.roundz 3", "--stage1.rounds"),
    ("train", TRAIN + "{}/shards --stage1.rounds many", "many"),
    ("train", TRAIN + "{}/shards --stage1.rounds -1", "rounds Input should be greater than or equal to 0"),
    (
        "train",
        TRAIN + "{}/shards --stage2.batch 1 --workers 2",
        "stage2.batch 1 must be at least 1 per worker, and there may be 2",
    ),
    ("train", TRAIN + "{}/shards --network.input-size 100", "input_size 100 must be a multiple of 4 * 2**depth = 32"),
    ("train", TRAIN + "{}/shards --network.width 60", "width 60 must be a multiple of 8 * groups = 64"),
    ("train", TRAIN + "{}/shards --stage1.warmup-iterations 0", "stage1.rounds needs stage1.warmup_iterations above 0"),
    ("train", TRAIN + "{}/shards --keypoints superpoint", "superpoint"),
    ("train", TRAIN + "{}/shards --keypoints superpoint --superpoint-weights {}/none.pth", "none.pth"),
    ("train", TRAIN + "{}/shards --keypoints export --features-model {}/none.pt2", "none.pt2: can't read the program"),
    ("train", TRAIN + "{}/shards --keypoints surf", "rootsift"),
    ("train", TRAIN + "{}/shards --resources.workers 512 --stage1.pairs 1024 --stage2.batch 512", "512 workers"),
    ("train", TRAIN + "{}/none", "none: no such directory, so this is not a (complete) corpus; build the corpus again"),
    ("train", TRAIN + "{}/a_file", "a_file: a file, not a directory of shards"),
    ("train", TRAIN + "{}/pics", "no manifest.json in it"),
    ("train", TRAIN + "{}/gone", "shard-00000.tar is missing"),
    ("train", TRAIN + "{}/short", "shard-00000.tar has"),
    ("train", TRAIN + "{}/no_json", "manifest.json: not a JSON file"),
    ("train", TRAIN + "{}/only_test", "no shard of the training split; pack again with a smaller --test-share"),
    ("train", "toy-cpu --runs {}/runs --shards {}/shards", "--name"),
    ("train", "toy-cpu --runs {}/runs --shards {}/shards --name ../x", "name"),
    ("train", "own --runs {}/runs --images {}/none", "none: no such folder"),
    ("train", "own --runs {}/runs --images {}/pics", "the method finds landmarks by what recurs, and needs at least"),
    ("train", "own --runs {}/runs --images {}/many --annotations {}/shares.csv", "1 of 1 boxes can't be meant so"),
    ("train", "own --runs {}/runs --images {}/many --landmarks 1", "greater than or equal to 2"),
    ("train", "own --runs {}/runs --images {}/many --landmarks 2 --minutes 0.1", "--minutes 0.1 is too short"),
    ("evaluate", "run {}/none", "none is no run: it has no settings.json"),
    ("evaluate", "predictions {}/a_file --protocol mafl", "a_file"),
    ("evaluate", "predictions {}/none.npz --protocol mafl", "none.npz"),
    ("predict", "{}/none {}/pics --out {}/out", "none: no such directory; give a run directory of `landmarks train`"),
    ("predict", "{}/pics {}/pics --out {}/out", "pics: no landmark model in it"),
    ("predict", "{}/unfinished {}/pics --out {}/out", "training has not finished, so there is no model yet"),
    ("predict", "{}/damaged {}/pics --out {}/out", "does not match the hash in model.json; copy both again"),
    ("predict", "{}/model --out {}/out", "images"),
    ("predict", "{}/model {}/empty --out {}/out", "no image in it"),
    ("predict", "{}/model {}/bad --out {}/out", "none of 1 images is readable: cut.jpg"),
    ("predict", "{}/model {}/pics/*.gif --out {}/out", "no image matches this pattern"),
    ("predict", "{}/model {}/shards --boxes {}/boxes.csv --out {}/out", "shards hold the boxes of their images"),
    ("predict", "{}/model {}/pics --boxes {}/missing.csv --out {}/out", "1 of 1 files named there are not among the 4"),
    ("predict", "{}/model {}/pics --boxes {}/shares.csv --out {}/out", "1 of 1 boxes can't be meant so"),
    ("predict", "{}/model {}/pics --boxes {}/cats.csv --out {}/out", "objects of 2 categories"),
    ("predict", "{}/model {}/pics", "--out"),
    (
        "predict",
        "{}/model {}/pics --boxes {}/pics --out {}/out",
        "pics: --boxes takes CSV or COCO JSON, no project of an",
    ),
    ("predict", "{}/model {}/pics --boxes {}/none.xml --out {}/out", "export its boxes as COCO"),
    ("predict", "{}/model {}/pics --boxes {}/zero --out {}/out", "zero: an empty file; expected CSV or COCO JSON"),
    ("name", "{}/model --annotations {}/zero --images {}/pics", "zero: an empty file; expected CSV or COCO JSON"),
    ("name", "{}/model --annotations {}/none.json", "none.json: can't read the annotations"),
    ("name", "{}/model --annotations {}/boxes.csv --images {}/pics", "no annotated points in it; annotate a handful"),
    ("name", "{}/model --annotations {}/missing.csv --images {}/pics", "1 of 1 annotated images are not in"),
    ("name", "{}/model --annotations {}/shares.csv --images {}/pics", "1 of 1 boxes can't be meant so"),
    ("export", "{}/none --out {}/out", "none: no such directory"),
    (
        "export",
        "{}/model --out {}/onnx",
        "model.onnx is there already, and not from `landmarks export` (no record names it)",
    ),
    ("import_checkpoint", "{}/none.pth --out {}/out", "none.pth"),
    *((verb, typed, "is empty; give a path or URL (is a variable of the shell unset?)") for verb, typed in EMPTY),
]
"""What somebody types, and what the message has to say."""


@pytest.mark.parametrize(("verb", "typed", "said"), MISTAKES, ids=[f"{v} {t}" for v, t, _ in MISTAKES])
def test_a_mistake_is_named_with_its_place_and_remedy_and_leaves_nothing(verb, typed, said, world, capsys):
    before = sorted(path for path in world.rglob("*"))
    text = " ".join(
        refused(VERBS[verb], shlex.split(typed.replace("{}", str(world))), capsys).replace("│", " ").split()
    )
    assert said in text and "Traceback" not in text
    left = [path for path in world.rglob("*") if path not in before]
    # `own` packs before it can tell that the time is too short; the shards serve the next try.
    assert not left or "--minutes" in typed


def test_there_are_at_least_forty_mistakes():
    assert len(MISTAKES) >= 40


@pytest.mark.parametrize(
    "verb", ["pack", "train", "evaluate", "demo", "predict", "name", "export", "import_checkpoint"]
)
def test_help_of_every_verb(verb):
    shown = subprocess.run(
        [sys.executable, "-m", f"jobs.{verb}", "--help"], capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0 and f"jobs.{verb}" in shown.stdout
