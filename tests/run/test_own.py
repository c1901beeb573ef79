"""`jobs.train own`: settings for one's own images."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jobs import pack, train
from sst.config import TrainSettings
from sst.corpora.drawings import draw
from sst.corpora.sources import pack_source
from sst.data.corpus import Corpus, open_corpus
from sst.data.shards import read_shard
from sst.errors import UserError
from sst.presets import PRESETS
from sst.run import estimate
from sst.run.estimate import Speed, expected_seconds, measure, scaled, timed, within
from sst.run.own import MIN_IMAGES, choose, reasons, workers_for
from sst.run.placement import Machine
from sst.train.consistency import repeatability
from sst.train.schedule import plan
from tests.small import SETTINGS, write_toy

LAPTOP, GPU_BOX = Machine(cpus=2, gpus=0, memory_gb=20.0), Machine(cpus=16, gpus=1, memory_gb=100.0)
SPEED = Speed(0.127, 0.117, describe=0.0026, predict=0.0025, keypoints=0.015, kmeans=5e-6, first=0.5, memory_gb=3.5)
"""Of two cores, as benchmarks/RESULTS.md has them."""
GPU_SPEED = Speed(0.025, 0.02, describe=0.0007, predict=0.0006, keypoints=0.0024, kmeans=4e-6, first=15, memory_gb=4.4)
"""Of an H200 with 16 cores, beside other work (benchmarks/RESULTS.md)."""


@given(
    images=st.integers(MIN_IMAGES, 10**6),
    landmarks=st.integers(2, 200),
    cpus=st.integers(1, 256),
    gpus=st.integers(0, 16),
    memory=st.floats(4.5, 2000),
)
def test_any_folder_and_machine_give_sound_settings(images, landmarks, cpus, gpus, memory):
    settings = choose(images, landmarks, Machine(cpus, gpus, memory))
    assert TrainSettings.model_validate(settings.model_dump()) == settings
    assert settings.stage2.max_landmarks == landmarks < settings.cluster.clusters
    assert settings.stage2.min_population < images
    assert settings.resources.workers == "auto" and workers_for(settings, Machine(cpus, gpus, memory)) <= (gpus or cpus)
    assert all("?" not in choice.why for choice in reasons(settings, images, Machine(cpus, gpus, memory), None))


def test_thirty_landmarks_on_two_cores_are_the_measured_preset():
    settings, preset = choose(3244, 30, LAPTOP), PRESETS["faces-cpu"][1]
    assert settings.stage1 == preset.stage1 and settings.network == preset.network
    assert settings.cluster == preset.cluster and settings.stage2 == preset.stage2


def test_workers_fit_memory():
    assert workers_for(choose(3000, 20, LAPTOP), Machine(64, 0, 9.5)) == 4
    assert workers_for(choose(3000, 20, LAPTOP), Machine(64, 3, 600.0)) == 3
    with pytest.raises(UserError, match="1.0 GB of memory are free"):
        choose(3000, 20, Machine(64, 0, 1.0))


def test_too_few_images_are_refused_with_what_the_method_needs():
    with pytest.raises(UserError, match=f"needs at least {MIN_IMAGES}"):
        choose(MIN_IMAGES - 1, 20, LAPTOP)


def test_the_estimate_for_the_measured_run_is_what_it_took():
    """18.2 minutes for `faces-cpu` on two busy cores (README), from the medians of its own steps and passes."""
    seen = replace(SPEED, stage1=0.256, stage2=0.122, describe=0.0025, predict=0.0021, keypoints=0.030)
    minutes = expected_seconds(PRESETS["faces-cpu"][1], 3244, seen) / 60
    assert 0.85 < minutes / 18.2 < 1.15


MACHINES = st.sampled_from([(LAPTOP, SPEED, 5_000), (GPU_BOX, GPU_SPEED, 20_000)])
"""A machine, its speed, and images with which five minutes do."""


@settings(max_examples=15)
@given(st.floats(5, 240), st.data(), MACHINES)
def test_any_budget_from_five_minutes_on_is_kept_and_used(minutes, data, found):
    machine, speed, most = found
    images = data.draw(st.integers(MIN_IMAGES, most))
    fitting = within(choose(images, 20, machine), images, speed, minutes)
    seconds = expected_seconds(fitting, images, speed)
    assert seconds <= 60 * minutes
    # A round and a refinement more are the largest jump.
    jump = images * (speed.describe + 2 * speed.predict) + 200 * speed.stage1 + 300 * speed.stage2
    assert seconds > 0.97 * 60 * minutes - jump
    assert fitting.stage1.rounds >= 1 and fitting.stage1.round_iterations >= 150
    assert TrainSettings.model_validate(fitting.model_dump()) == fitting


@settings(max_examples=40)
@given(st.floats(0.01, 60), st.integers(MIN_IMAGES, 400_000), MACHINES)
def test_a_budget_that_is_too_short_is_refused_with_one_that_is_not(minutes, images, found):
    machine, speed, _ = found
    settings = choose(images, 20, machine)
    try:
        within(settings, images, speed, minutes)
    except UserError as error:
        numbers = re.search(
            r"--minutes \S+ is too short: the shortest schedule takes (\S+) minutes here, (\S+) of them for going "
            r"through (\d+) images, and the full one (\d+); take --minutes (\S+) or more",
            str(error),
        )
        assert numbers is not None, error
        shortest, passes, named, full, enough = map(float, numbers.groups())
        assert named == images and minutes < shortest == enough <= full + 0.5 and passes < shortest
        assert expected_seconds(within(settings, images, speed, enough), images, speed) <= 60 * enough


def test_the_estimate_is_the_sum_of_what_a_run_does():
    """Walks through a run with a clock that is moved by what each part takes."""
    images, clock = 700, 0.0
    small = choose(images, 20, LAPTOP)
    phases = plan(small, images)
    clock += estimate.START_SECONDS + SPEED.first
    clock += images * SPEED.keypoints + 20 * images * SPEED.kmeans + estimate.ROUND_SECONDS
    for number, phase in enumerate(phases):
        for _ in range(phase.steps):
            clock += SPEED.stage1 if phase.stage == 1 else SPEED.stage2
        if phase.stage == 1:
            clock += images * SPEED.describe + 20 * images * SPEED.kmeans + estimate.ROUND_SECONDS
        elif number + 1 < len(phases):
            clock += images * SPEED.predict * (2 if phases[number + 1].refines else 1) + estimate.ROUND_SECONDS
    clock += 2 * images * SPEED.predict
    assert expected_seconds(small, images, SPEED) == pytest.approx(clock)


def test_the_time_of_the_first_step_is_told_from_that_of_others_and_nothing_is_repeated_for_long():
    now, lasts = 0.0, iter([90.0, 4.0, 3.0, 5.0, 100.0])

    def work():
        nonlocal now
        now += next(lasts)

    assert timed(work, lambda: now) == (4.0, 86.0)
    now, lasts = 0.0, iter([130.0, 110.0, 1.0])
    assert timed(work, lambda: now) == (110.0, 20.0) and next(lasts) == 1.0


def test_a_shorter_schedule_has_fewer_rounds_and_refinements_rather_than_tiny_ones():
    short = scaled(choose(3000, 20, LAPTOP), 0.4)
    assert short.stage1.rounds == 2 and short.stage1.round_iterations == 160
    assert short.stage2.refine_rounds == 4 and short.stage2.refine_iterations == 150
    for machine in (LAPTOP, GPU_BOX):
        least = scaled(choose(3000, 20, machine), 0.0)
        assert [(phase.stage, phase.steps) for phase in plan(least, 3000)] == [(1, 150), (1, 150), (2, 300), (2, 150)]


def test_speed_is_measured_by_real_steps_and_passes(tmp_path):
    write_toy(str(tmp_path), train=16, test=0)
    threads = torch.get_num_threads()
    speed = measure(SETTINGS, LAPTOP, 2, Corpus.open(str(tmp_path)))
    assert torch.get_num_threads() == threads
    assert 0 < speed.stage1 < 60 and 0 < speed.stage2 < 60 and speed.first >= 0
    assert 0 < speed.describe < 1 and 0 < speed.predict < 1 and 0 < speed.keypoints < 5 and 0 < speed.kmeans < 0.01
    assert speed.memory_gb == pytest.approx(2 * 1.6 + 2.8)


def test_repeatability_counts_images_where_a_landmark_stays():
    moved = np.zeros((4, 3, 2))
    found = moved + np.array([[1.0, 0], [9.0, 0], [1.0, 0]])
    found[0, 2] = np.nan
    moved[3, 2] = np.nan
    np.testing.assert_array_equal(repeatability(moved, found, 5.0), [1, 0, 0.5])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "owls").mkdir()
    for number in range(70):
        Image.fromarray(draw(1, number, 64).image).save(tmp_path / "owls" / f"{number}.jpg")
    return tmp_path / "owls"


@pytest.fixture
def started(monkeypatch):
    """What would be trained."""
    runs = []
    monkeypatch.setattr("sst.run.own.train_run", lambda *args: runs.append(args))
    monkeypatch.setattr(train, "print_outcome", lambda *args: None)
    monkeypatch.setattr("sst.run.own.measure", lambda *_: SPEED)
    return runs


def own(folder, *more: str) -> None:
    train.main(["own", "--images", str(folder), "--runs", str(folder.parent / "runs"), *more])


def test_a_folder_is_packed_settled_and_trained(folder, started, capsys):
    own(folder, "--landmarks", "12")
    settings, shards, run, tracking = started[0]
    said = " ".join(capsys.readouterr().out.split())
    assert tracking.name == "owls" and run.endswith("runs/owls")
    assert settings.cluster.clusters == 18 and settings.stage2.max_landmarks == 12
    assert "1.5 for each landmark" in said and "GB of memory" in said and "training images are few" in said
    assert json.loads((folder.parent / "runs" / "owls" / "shards" / "manifest.json").read_text())["corpus"] == "owls"


def test_going_on_keeps_the_settings_that_were_chosen(folder, started, monkeypatch, capsys):
    own(folder, "--landmarks", "12")
    monkeypatch.setattr("sst.run.own.this_machine", lambda: Machine(64, 0, 500))
    own(folder, "--landmarks", "12")
    assert started[0] == started[1]
    with pytest.raises(SystemExit) as exit_:
        own(folder, "--landmarks", "13")
    assert exit_.value.code == 2 and "landmarks: 12 -> 13" in capsys.readouterr().err


def test_annotations_of_one_category_are_packed_and_what_is_odd_is_said(folder, started, capsys):
    rows = [f"images/{number}.jpg,owl,4,4,60,60" for number in range(70)]
    rows[3], rows[4] = "images/3.jpg,owl,0.1,0.1,0.9,0.9", "images/4.jpg,cat,4,4,60,60"
    table = folder.parent / "boxes.csv"
    table.write_text("\n".join(["filename, class, xmin, ymin, xmax, ymax", *rows]))
    with pytest.raises(SystemExit):
        own(folder, "--annotations", str(table))
    assert "objects of 2 categories: owl (69), cat (1)" in capsys.readouterr().err
    own(folder, "--annotations", str(table), "--category", "owl")
    said = capsys.readouterr().out
    assert said.count("boxes in shares of the image's sides instead of pixels: 1 (3.jpg)") == 1
    assert "objects of other categories left out: 1" in said and len(started) == 1
    stored = open_corpus(str(folder.parent / "runs" / "owls" / "shards"))
    metas = [each.meta for shard in stored.manifest.shards for each in read_shard(f"{stored.url}/{shard.file}")]
    assert sum(meta.box == (4, 4, 60, 60) for meta in metas) == 68
    with pytest.raises(SystemExit):
        own(folder, "--annotations", str(table), "--category", "cat")
    assert "category: owl -> cat" in capsys.readouterr().err


def test_what_a_partly_unusable_file_has_is_counted_as_by_pack_and_said_before_a_refusal(folder, started, capsys):
    """The same lines, once, also where training is refused in the end; links to a picture are pictures of their own."""
    rows = [f"images/{number}.jpg,4,4,60,60" for number in range(70)]
    rows[3], rows[4], rows[5] = "3.jpg,0.1,0.1,0.9,0.9", "4.jpg,60,60,4,4", "5,4,4,60,60"
    table = folder.parent / "boxes.csv"
    table.write_text("\n".join(["file,xmin,ymin,xmax,ymax,weather", *rows]))
    for number in range(6, 60):
        (folder / f"link_{number}.jpg").symlink_to(f"{number}.jpg")

    def notes() -> list[str]:
        said = capsys.readouterr()
        return sorted(
            line for line in (said.out + said.err).splitlines() if line.startswith("note: ") and "few" not in line
        )

    pack.main(["folder", "--images", str(folder), "--annotations", str(table), "--out", str(folder.parent / "out")])
    wanted = notes()
    for part in ("columns not used: weather", "in shares of the image's sides instead of pixels: 1 (3.jpg)",
                 "left of or above the first: 1 (4.jpg)", "names without ending taken for the picture called so: 1 (5)",
                 "names taken without their leading folders: 67", "images without an object in it, seen whole: 54",
                 "pictures for training are equal to test pictures",
                 "54 pictures are links to others or copies of them, and are used too: link_10.jpg, "):  # fmt: skip
        assert sum(part in line for line in wanted) == 1, (part, wanted)
    own(folder, "--annotations", str(table))
    assert notes() == wanted and len(started) == 1
    (folder.parent / "notes.csv").write_text(
        "file,xmin,ymin,xmax,ymax\n1.jpg,4,4,40,40\n2.jpg,4,4,9,9\n3.jpg,9,9,4,4\n"
    )
    for path in (*folder.glob("link_*"), *(folder / f"{number}.jpg" for number in range(20, 70))):
        path.unlink()
    refused(folder, "--annotations", str(folder.parent / "notes.csv"), "--name", "few")
    assert any("left of or above the first: 1 (3.jpg)" in line for line in notes()) and len(started) == 1


def refused(folder, *more: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        own(folder, *more)
    assert exit_.value.code == 2


def test_pictures_or_boxes_that_changed_are_named_with_what_to_do(folder, started, capsys):
    table = folder.parent / "boxes.csv"
    table.write_text("file,box_x0,box_y0,box_x1,box_y1\n1.jpg,4,4,40,40\n")
    words = ["--annotations", str(table)]
    own(folder, *words)
    (folder / "2.jpg").touch()
    own(folder, *words)
    assert len(started) == 2
    table.write_text("file,box_x0,box_y0,box_x1,box_y1\n1.jpg,4,4,44,44\n")
    refused(folder, *words)
    said = capsys.readouterr().err
    assert "--annotations is another one" in said and "1 picture" not in said and "take another --name" in said
    (folder / "3.jpg").unlink()
    (folder / "4.jpg").write_bytes((folder / "5.jpg").read_bytes())
    (folder / "new.jpg").write_bytes((folder / "5.jpg").read_bytes())
    refused(folder, *words)
    said = capsys.readouterr().err
    for part in ("1 picture is new (new.jpg)", "1 picture is gone (3.jpg)", "1 picture is changed (4.jpg)"):
        assert part in said, said
    own(folder, *words, "--as-packed")
    assert len(started) == 3
    own(folder, *words, "--name", "other")
    folder.rename(folder.parent / "away")
    own(folder, *words)
    assert "is gone" in capsys.readouterr().err and len(started) == 5


def test_a_start_that_ended_right_after_packing_or_in_it_does_not_hide_what_changes(
    folder, started, capsys, monkeypatch
):
    class Killed(BaseException):
        pass

    def killed(_config, _found):
        raise Killed

    def killed_after(config, found):
        pack_source(config, found)
        raise Killed

    run = folder.parent / "runs" / "owls"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("sst.run.own.pack_source", killed)
        own(folder)
    assert not run.exists()
    (folder / "3.jpg").unlink()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("sst.run.own.pack_source", killed_after)
        own(folder)
    assert (run / "shards" / "manifest.json").exists() and not (run / "own.json").exists()
    (folder / "4.jpg").unlink()
    refused(folder)
    assert "1 picture is gone (4.jpg)" in capsys.readouterr().err and not started
    own(folder, "--as-packed")
    assert len(started) == 1


def test_a_record_left_by_a_kill_while_packing_is_written_anew(folder, started):
    run = folder.parent / "runs" / "owls"
    own(folder)
    shutil.rmtree(run / "shards")
    (run / "own.json").unlink()
    (folder / "4.jpg").unlink()
    own(folder)
    own(folder)
    assert len(started) == 3 and "4.jpg" not in json.loads((run / "packed.json").read_text())["pictures"]


@pytest.mark.parametrize(("name", "content", "said"), [
    ("packed.json", '{"pictures": {"1.j', "packed.json: not a JSON file"),
    ("packed.json", "{}", "packed.json: not as this version writes it (pictures: Field required)"),
    ("own.json", '{"given": {', "own.json: not a JSON file"),
    ("own.json", "{}", "own.json: not what `landmarks train own` writes"),
    ("own.json", '{"given": GIVEN, "settings": {"rounds": 3}}', "own.json: settings not as this version writes it ("),
])  # fmt: skip
def test_a_damaged_record_of_a_run_is_named_and_nothing_is_lost(folder, started, capsys, name, content, said):
    own(folder)
    path = folder.parent / "runs" / "owls" / name
    given = json.dumps(json.loads(path.read_text()).get("given"))
    path.write_text(content.replace("GIVEN", given))
    refused(folder)
    error = capsys.readouterr().err
    remedy = "use the version that wrote it" if "settings" in said else "remove it"
    assert said in error and remedy in error and len(started) == 1


def test_a_packing_that_is_refused_leaves_the_record_of_an_earlier_one(folder, started):
    own(folder)
    run = folder.parent / "runs" / "owls"
    manifest, record = (run / "shards" / "manifest.json").read_bytes(), (run / "packed.json").read_bytes()
    (run / "shards" / "manifest.json").unlink()
    (folder / "3.jpg").unlink()
    refused(folder)
    (run / "shards" / "manifest.json").write_bytes(manifest)
    assert (run / "packed.json").read_bytes() == record
    refused(folder)


def test_annotations_that_are_gone_are_called_so(folder, started, capsys):
    table = folder.parent / "boxes.csv"
    table.write_text("file,box_x0,box_y0,box_x1,box_y1\n1.jpg,4,4,40,40\n")
    own(folder, "--annotations", str(table))
    table.unlink()
    refused(folder, "--annotations", str(table))
    assert "the file of --annotations is gone" in capsys.readouterr().err


def test_shards_without_a_record_of_their_pictures_are_used_and_it_is_said(folder, started, capsys):
    own(folder)
    (folder.parent / "runs" / "owls" / "packed.json").unlink()
    assert "packed.json" not in capsys.readouterr().err
    own(folder)
    assert "holds no packed.json, so it is not known whether" in capsys.readouterr().err and len(started) == 2


def test_points_that_changed_in_a_project_of_several_files_are_noticed(folder, started, capsys):
    project = folder.parent / "project"
    table = project / "labeled-data" / "day1" / "CollectedData_Ada.csv"
    table.parent.mkdir(parents=True)
    (project / "config.yaml").write_text("scorer: Ada\n")
    head = "scorer,Ada,Ada\nbodyparts,nose,nose\ncoords,x,y\n"
    table.write_text(head + "labeled-data/day1/1.jpg,20,30\n")
    for place in (project, project / "config.yaml"):
        words = ["--annotations", str(place), "--name", place.name[:6]]
        own(folder, *words)
        earlier = table.read_text()
        table.write_text(head + "labeled-data/day1/1.jpg,20,31\n")
        refused(folder, *words)
        assert "--annotations is another one" in capsys.readouterr().err
        table.write_text(earlier)
        own(folder, *words)
    assert len(started) == 4


def test_the_run_of_a_folder_lies_outside_of_it(folder, started, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for runs in ("runs", ".."):
        with pytest.raises(SystemExit):
            train.main(["own", "--images", ".", "--runs", runs])
        assert "the run (--runs and --name)" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and not started


def test_a_refused_run_leaves_the_name_for_corrected_settings(folder, started, monkeypatch):
    def refuse(*_):
        raise UserError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("sst.run.own.train_run", refuse)
        refused(folder, "--landmarks", "12")
    own(folder, "--landmarks", "13")
    assert started[0][0].stage2.max_landmarks == 13


def test_too_few_images_leave_nothing(folder, started, capsys):
    for number in range(30):
        (folder / f"{number}.jpg").unlink()
    with pytest.raises(SystemExit) as exit_:
        own(folder)
    assert exit_.value.code == 2 and "needs at least" in capsys.readouterr().err
    assert not (folder.parent / "runs").exists() and not started
