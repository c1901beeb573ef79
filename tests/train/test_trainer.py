"""The train loop in one process: phases, rounds, checkpoints, and going on after a crash."""

import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.correspondence import labels_url
from cluster.shards import Labels
from sst.config import ResourceSettings, Stage1Settings, Stage2Settings, TrainSettings
from sst.corpora.drawings import draw
from sst.data.corpus import Corpus
from sst.data.shards import SampleMeta, ShardWriter
from sst.errors import Leaving, Stopped
from sst.nn.network import LandmarkDetector
from sst.nn.steps import stage1_losses, stage2_losses
from sst.run.watchdog import Attendance, Watchdog
from sst.train import extraction
from sst.train.checkpoint import latest_checkpoint
from sst.train.model import load_model
from sst.train.run_directory import RunDirectory
from sst.train.schedule import derived_seed, plan
from sst.train.tools import Tools
from sst.train.trainer import Trainer
from sst.train.workers import Group
from tests.small import SETTINGS, local_tools, train_locally, write_toy


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("corpus"))
    write_toy(url, train=48, test=16)
    return url


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    lines = []
    folder = tmp_path_factory.mktemp("run")
    trainer = train_locally(corpus, str(folder), local_tools(lines))
    return folder, trainer, lines


def test_phases_follow_each_other():
    phases = plan(SETTINGS, images=48)
    assert [p.name for p in phases] == ["warm-up", "round 1", "round 2", *["landmarks"] * 3, "refine 1"]
    assert [p.round for p in phases] == list(range(7))
    assert [p.first_step for p in phases] == [0, 6, 10, 14, 17, 20, 23]
    assert [p.stage_step for p in phases if p.stage == 2] == [0, 3, 6, 9]
    assert [p.refines for p in phases] == [False] * 6 + [True]
    assert sum(p.steps for p in phases) == 6 + 2 * 4 + 9 + 3


def test_without_stage1_the_landmark_head_starts_on_the_first_labels():
    settings = TrainSettings(stage1=Stage1Settings(warmup_iterations=0, rounds=0))
    assert {phase.stage for phase in plan(settings, images=1000)} == {2}


def test_seeds_differ_for_every_purpose_rank_and_step():
    seeds = {derived_seed(0, p, rank, step) for p in range(4) for rank in range(8) for step in range(200)}
    assert len(seeds) == 4 * 8 * 200
    assert derived_seed(1, 2, 3) == derived_seed(1, 2, 3) != derived_seed(2, 2, 3)


def test_a_run_leaves_all_its_rounds_a_model_and_predictions(finished):
    folder, trainer, lines = finished
    records = RunDirectory(str(folder)).records()
    assert [r.kind for r in records] == ["keypoints"] + ["correspondence"] * 3 + ["merge"] * 2 + ["refinement"]
    for record in records:
        assert record.metrics["labels_per_image"] > 0
    assert "label_persistence" in records[2].metrics
    model, known = load_model(str(folder / "model"))
    assert 0 <= known.metrics["visible_share"] <= 1
    assert len(known.clusters) == sum(records[-1].active) == model.landmark.out.out_channels
    shards = trainer.corpus.manifest.shards
    for shard in shards:
        arrays = np.load(folder / "predictions" / shard.file.replace(".tar", ".npz"))
        assert arrays["points"].shape == (shard.samples, len(known.clusters), 2)
    assert {line["kind"] for line in lines} == {"arithmetic", "shards", "step", "round"}
    steps = [line for line in lines if line["kind"] == "step"]
    assert all(np.isfinite(line["loss"]) for line in steps)
    assert all(0 <= line["decay_share"] <= 1 and line["dead_scales"] == 0 and line["peak"] > 0 for line in steps)
    assert all(("loss_of_all_zero" in line) == (line["stage"] == 2) for line in steps)
    assert all("labels_kept" in record.metrics for record in records[2:4])
    assert not list(folder.rglob("*.tmp"))


class Crash(Exception):
    """Stands for a killed worker."""


@pytest.mark.parametrize(
    "at",
    [
        ("step", "warm-up"),
        ("step", "round 2"),
        ("step", "landmarks"),
        ("shards", "extract"),
        ("shards", "merge"),
        ("shards", "refine"),
        ("shards", "predict"),
    ],
)
def test_a_crashed_run_goes_on_and_ends_with_equal_weights_and_labels(finished, corpus, tmp_path, at):
    undisturbed, _, _ = finished
    fired = []

    def fail_once(line):
        place = (line["kind"], line.get("phase", line.get("what")))
        if place == at and not fired:
            fired.append(line)
            raise Crash

    tools = local_tools([])
    broken = type(tools)(tools.fit, log=fail_once)
    with pytest.raises(Crash):
        train_locally(corpus, str(tmp_path), broken)
    train_locally(corpus, str(tmp_path), broken)
    assert len(fired) == 1
    for part in ("model", "predictions", "rounds/0003/labels", "rounds/0006/labels"):
        ours = {p.name: p.read_bytes() for p in (tmp_path / part).iterdir()}
        theirs = {p.name: p.read_bytes() for p in (undisturbed / part).iterdir()}
        assert ours == theirs, part


@pytest.mark.parametrize("every", [5, 20])  # within a phase, and at the end of one
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_from_there(finished, corpus, tmp_path, monkeypatch, every):
    monkeypatch.setattr("sst.train.trainer.LOG_STEPS", every)
    undisturbed, asked = finished[0], []

    def stop():
        asked.append(True)
        return len(asked) == 1

    lines = []
    tools = local_tools(lines)
    with pytest.raises(Stopped):
        train_locally(corpus, str(tmp_path), type(tools)(tools.fit, log=lines.append, stop=stop))
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == every
    train_locally(corpus, str(tmp_path), tools)
    assert [line["step"] for line in lines if line["kind"] == "resume"] == [every]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (
        undisturbed / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("every", [5, 20])
def test_at_the_notice_of_a_machine_that_goes_not_a_step_is_lost(finished, corpus, tmp_path, monkeypatch, every):
    monkeypatch.setattr("sst.train.trainer.LOG_STEPS", every)
    undisturbed, noticed, lines = finished[0], iter([True]), []
    tools = local_tools(lines)
    with pytest.raises(Leaving):
        train_locally(corpus, str(tmp_path), replace(tools, leaving=lambda: next(noticed)))
    assert lines[-1] == {"kind": "leaving", "step": every}
    lines.clear()
    train_locally(corpus, str(tmp_path), tools)
    assert [line["step"] for line in lines if line["kind"] == "resume"] == [every]
    assert model_of(tmp_path) == model_of(undisturbed)


def model_of(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def test_a_worker_says_where_it_is(corpus, tmp_path):
    places: list[str] = []
    train_locally(corpus, str(tmp_path), replace(local_tools([]), at=places.append))
    assert places[:3] == ["waiting for the images of step 0", "in step 0", "waiting for the images of step 1"]
    assert "making the labels of round 1" in places and "making the labels of landmarks" in places


def test_a_stream_that_gives_nothing_ends_the_worker_and_is_named(corpus, tmp_path, monkeypatch):
    ended, said, stream = threading.Event(), list[str](), Trainer.stream

    class EndedError(Exception):
        """In place of the end of the process."""

    def end(text: str) -> None:
        said.append(text)
        ended.set()

    watchdog = Watchdog(0, 1, 3.0, Attendance(), end)

    def drying_up(*given):
        yield from islice(stream(*given), 3)
        with watchdog:
            assert ended.wait(60)
        raise EndedError

    monkeypatch.setattr(Trainer, "stream", drying_up)
    with pytest.raises(EndedError):
        train_locally(corpus, str(tmp_path), replace(local_tools([]), at=watchdog.at))
    assert "rank 0 waiting for the images of step 3" in said[0]


def test_other_settings_do_not_take_over_a_checkpoint(finished, corpus):
    folder, _, _ = finished
    other = SETTINGS.model_copy(update={"seed": 2})
    with pytest.raises(ValueError, match="other settings"):
        train_locally(corpus, str(folder), local_tools([]), other)


def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path, caplog):
    folder, _, _ = finished
    import shutil

    shutil.copytree(folder / "checkpoints", tmp_path / "c")
    newest, older = sorted((tmp_path / "c").iterdir(), reverse=True)[:2]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    record, tensors = latest_checkpoint(str(tmp_path / "c"))
    assert record.step == int(older.name)
    assert set(tensors) == {"model.safetensors", "optimizer.safetensors"}
    assert "does not match its recorded hash" in caplog.text


def test_merged_channels_lose_their_activity_and_their_labels(finished):
    folder, _, _ = finished
    run = RunDirectory(str(folder))
    last = run.record(5)
    inactive = np.flatnonzero(~np.array(last.active))
    for shard in ("shard-00000.tar", "shard-00002.tar"):
        labels = run.labels(last, shard)
        absorbed = set(labels.cluster.tolist()) & set(inactive.tolist())
        assert all(last.population[cluster] <= SETTINGS.stage2.min_population for cluster in absorbed)
        for image in range(len(labels)):
            _, clusters = labels.sample(image)
            assert len(set(clusters.tolist())) == len(clusters)
    assert sum(last.population) == pytest.approx(last.metrics["labels_per_image"] * 48)


def test_too_few_descriptors_are_named(corpus, tmp_path):
    settings = SETTINGS.model_copy(update={"cluster": SETTINGS.cluster.model_copy(update={"clusters": 5000})})
    with pytest.raises(ValueError, match="5000"):
        train_locally(corpus, str(tmp_path), local_tools([], settings), settings)


def test_not_finite_losses_stop_the_run_with_their_samples(corpus, tmp_path):
    lines = []
    settings = SETTINGS.model_copy(
        update={"stage1": SETTINGS.stage1.model_copy(update={"learning_rate": 1e30, "warmup_iterations": 40})}
    )
    with pytest.raises(FloatingPointError, match=r"metrics\.jsonl"):
        train_locally(corpus, str(tmp_path), local_tools(lines), settings)
    skips = [line for line in lines if line["kind"] == "skip"]
    assert len(skips) == 5 and all(len(line["keys"]) == 4 for line in skips)


def test_step_losses_are_functions_of_the_generator(finished, corpus):
    _, trainer, _ = finished
    from sst.nn.network import DetectorDescriptor

    torch.manual_seed(0)
    one = DetectorDescriptor(SETTINGS.network.shape)
    batch = next(trainer.stream(trainer.phases[0], 0, trainer.run.record(0)))
    again = next(trainer.stream(trainer.phases[0], 0, trainer.run.record(0)))
    assert batch.keys == again.keys and torch.equal(batch.images, again.images)
    values = [
        float(stage1_losses(one, batch, SETTINGS.stage1_step(), torch.Generator().manual_seed(seed)).total().detach())
        for seed in (1, 1, 2)
    ]
    assert values[0] == values[1] != values[2]
    active = torch.ones(8, dtype=torch.bool)
    two = stage2_losses(
        trainer.learner.network, batch, active, SETTINGS.stage2_step(), torch.Generator().manual_seed(1)
    ).total()
    assert float(two.detach()) > 0


def test_skipped_batches_are_those_of_an_unbroken_stream(finished):
    _, trainer, _ = finished
    record = trainer.run.record(0)
    whole = trainer.stream(trainer.phases[0], 0, record)
    keys = [next(whole).keys for _ in range(5)]
    resumed = trainer.stream(trainer.phases[0], 3, record)
    assert [next(resumed).keys for _ in range(2)] == keys[3:]


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="at least 1 per worker"):
        TrainSettings(stage2=Stage2Settings(batch=1), resources=ResourceSettings(workers=2))
    with pytest.raises(ValueError, match="least come first"):
        ResourceSettings(workers="8:2")
    with pytest.raises(ValueError, match="workers"):
        ResourceSettings(workers="0:2")
    with pytest.raises(ValueError, match="untrained"):
        TrainSettings(stage1=Stage1Settings(warmup_iterations=0))
    with pytest.raises(ValueError, match="roundz"):
        Stage1Settings(roundz=3)


@pytest.mark.parametrize("refine_rounds", [0, 1])
def test_as_many_landmarks_are_kept_as_are_asked_for_and_mirrored_images_are_trained_on(
    corpus, tmp_path, refine_rounds
):
    two = SETTINGS.stage2.changed(max_landmarks=2, flip_share=0.5, visible=0.0, refine_rounds=refine_rounds)
    settings = SETTINGS.changed(stage1=SETTINGS.stage1.changed(flip_share=0.5), stage2=two)
    trainer = train_locally(corpus, str(tmp_path), local_tools([]), settings)
    run = RunDirectory(str(tmp_path))
    model, record = load_model(run.model_url)
    assert isinstance(trainer.learner.network, LandmarkDetector)
    channels = [k for k, active in enumerate(run.records()[-1].active) if active]
    assert len(record.clusters) == 2 <= len(channels) and set(record.clusters) <= set(channels)
    assert (len(channels) == 2) == bool(refine_rounds)  # chosen at the end, or in the first refinement
    landmarks = run.landmarks()
    assert len(landmarks.repeatability) == len(landmarks.partner) == 2
    partners = [own.partner for own in run.records()]
    assert partners[0] is None and all(own is not None for own in partners[1:])
    for own, round_ in zip(partners[-2:], run.records()[-2:], strict=True):
        assert all(j == -1 or (own[j] == k and round_.active[k] and round_.active[j]) for k, j in enumerate(own))


def test_a_run_goes_on_with_other_resources(corpus, tmp_path):
    stopping = local_tools([])
    stopping = Tools(stopping.fit, log=stopping.log, stop=lambda: True)
    long = SETTINGS.model_copy(update={"stage1": SETTINGS.stage1.model_copy(update={"warmup_iterations": 24})})
    with pytest.raises(Stopped):
        train_locally(corpus, str(tmp_path), stopping, long)
    other = long.model_copy(update={"resources": long.resources.model_copy(update={"checkpoint_steps": 7})})
    lines: list[dict] = []
    train_locally(corpus, str(tmp_path), local_tools(lines), other)
    assert [line["step"] for line in lines if line["kind"] == "resume"] == [20]
    load_model(RunDirectory(str(tmp_path)).model_url)


def test_no_skipped_step_is_unreported_when_a_checkpoint_goes_beyond_it(corpus, tmp_path, monkeypatch):
    pending, write = [], Trainer._checkpoint

    def checkpoint(trainer: Trainer, index: int, phase_step: int, beside: bool = False) -> None:
        pending.append(len(trainer.skips.noted))
        write(trainer, index, phase_step, beside)

    monkeypatch.setattr(Trainer, "_checkpoint", checkpoint)
    train_locally(corpus, str(tmp_path), local_tools([]))
    assert len(pending) > 6 and not any(pending)


def test_images_without_any_keypoint_are_legal_everywhere(tmp_path):
    with ShardWriter(str(tmp_path / "corpus"), "toy", "toy", 16) as writer:
        for index in range(56):
            drawn = draw(5, index, 96)
            x0, y0, x1, y1 = map(float, drawn.box)
            image = np.full_like(drawn.image, 128) if index % 3 == 0 or index >= 48 else drawn.image
            meta = SampleMeta(source=str(index), split="train" if index < 48 else "test", box=(x0, y0, x1, y1))
            writer.add(simplejpeg.encode_jpeg(np.ascontiguousarray(image), 95), meta)
    trainer = train_locally(str(tmp_path / "corpus"), str(tmp_path / "run"), local_tools([]))
    run = RunDirectory(str(tmp_path / "run"))
    for record in run.records():
        for number, shard in enumerate(trainer.corpus.train):
            labels = run.labels(record, shard.file)
            assert len(labels) == shard.samples
            if record.number == 0:
                grey = [row for row in range(shard.samples) if (16 * number + row) % 3 == 0]
                assert grey and all(len(labels.sample(row)[0]) == 0 for row in grey)
    assert len(load_model(run.model_url)[1].clusters) > 0


def test_a_detector_that_finds_nothing_yet_does_not_end_a_run_without_old_labels(corpus, tmp_path):
    blind = SETTINGS.changed(stage1=SETTINGS.stage1.changed(unite=False, threshold=0.999))
    lines: list[dict] = []
    train_locally(corpus, str(tmp_path), local_tools(lines), blind)
    run = RunDirectory(str(tmp_path))
    rounds = [record for record in run.records() if record.kind == "correspondence"]
    assert run.has_model() and [record.metrics["first_keypoints_share"] for record in rounds] == [1.0] * 3
    told = [line for line in lines if line["kind"] == "health" and line["sign"] == "few keypoints"]
    assert len(told) == 1 and "100% of the images are labelled at their first keypoints" in told[0]["text"]
    for shard in Corpus.open(corpus).train:  # the first keypoints, however many of them a round's clusters dropped
        first = run.labels(run.record(0), shard.file)
        for number in (1, 2, 3):
            found = Labels.load(labels_url(run.round_url(number), shard.file))
            for image in range(shard.samples):
                places, again = first.sample(image)[0], found.sample(image)[0]
                assert sorted(again.tolist()) == sorted(places.tolist())


def test_descriptors_that_are_zero_or_not_finite_are_dropped_and_counted(corpus, monkeypatch, tmp_path):
    sound = extraction.describe

    def spoilt(*told, **named):
        counts, points, descriptors, united = sound(*told, **named)
        first = (counts.cumsum(0) - counts)[counts > 1]
        descriptors[first] = float("nan")
        descriptors[first + 1] = 0.0
        return counts, points, descriptors, united

    monkeypatch.setattr(extraction, "describe", spoilt)
    lines: list[dict] = []
    train_locally(corpus, str(tmp_path), local_tools(lines))
    dropped = [line["unusable_descriptors"] for line in lines if "unusable_descriptors" in line]
    assert len(dropped) == 3 and all(number > 48 for number in dropped)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.integers(1, 12))
def test_workers_with_unequal_shares_of_a_batch_give_its_mean(values, world):
    """Each has the mean over its share, which DDP averages; images are spread over the workers in turn."""
    size, world = len(values), min(world, len(values))
    shares = [Group(rank, world).share_of(size) for rank in range(world)]
    assert sum(shares) == size and max(shares) - min(shares) <= 1
    means = [np.mean(values[rank::world]) * (share * world / size) for rank, share in enumerate(shares)]
    assert np.mean(means) == pytest.approx(np.mean(values), abs=1e-9)


def test_a_run_without_a_cluster_of_enough_labels_says_so_before_stage_2(corpus, tmp_path):
    settings = SETTINGS.changed(stage2=SETTINGS.stage2.changed(min_population=100_000))
    with pytest.raises(ValueError, match="no cluster has more than 100000 labels .* --stage2.min-population"):
        train_locally(corpus, str(tmp_path), local_tools([]), settings)


def test_refinements_that_no_longer_gain_are_left_out_and_a_resumed_run_knows_it(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("sst.train.trainer.settled", lambda errors: len(errors) >= 2)
    lines, settings = [], SETTINGS.changed(stage2=SETTINGS.stage2.changed(refine_rounds=5))
    train_locally(corpus, str(tmp_path), local_tools(lines), settings)
    kinds = [record.kind for record in RunDirectory(str(tmp_path)).records()]
    assert kinds.count("refinement") == 2 and [line["round"] for line in lines if line["kind"] == "settled"] == [7]
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    train_locally(corpus, str(tmp_path), local_tools([]), settings)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
