"""Benchmarks that read what runs leave behind must understand it, and those that judge must not hide what fails."""

import json
import math
import os
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ablation, fullsize, gpu, labels, layers, objective
from benchmarks.checks import DidNotHold, NotRunHere, checked, isolated, job, report
from benchmarks.fullsize import Scale, schedule, train_words
from benchmarks.round import rounds_of
from cluster import storage
from cluster.actor import read_sample
from cluster.correspondence import labels_url
from cluster.kmeans import fit
from cluster.shards import Labels
from jobs import train
from sst.data.corpus import Corpus, open_corpus
from sst.data.shards import Manifest, SampleMeta, ShardWriter
from sst.errors import UserError
from sst.nn.network import DetectorDescriptor, NetworkShape
from sst.report.evaluation import PROTOCOLS
from sst.run.claim import claim
from sst.run.metrics import MetricsFile
from sst.train.run_directory import RoundRecord, RunDirectory
from sst.train.tools import Tools
from sst.tune.sweep import TrialRecord
from tests.small import SETTINGS, train_locally, write_toy


def test_the_parts_of_a_round_are_those_that_the_run_notes(tmp_path):
    corpus, run = str(tmp_path / "corpus"), tmp_path / "run"
    write_toy(corpus, train=24, test=8)
    claim(RunDirectory(str(run)), SETTINGS, open_corpus(corpus))

    def solve(sample, asked):
        return fit(read_sample(sample), asked)

    train_locally(corpus, str(run), Tools(solve, log=MetricsFile(str(run)).write))
    rounds = rounds_of(run)
    assert [each["steps"] for each in rounds] == [SETTINGS.stage1.round_iterations] * SETTINGS.stage1.rounds
    for each in rounds:
        parts = {name: seconds for name, seconds in each.items() if name not in ("steps", "all")}
        assert all(seconds >= 0 for name, seconds in parts.items() if name != "rest") and each["training"] > 0
        # What is noted is rounded to tenths of a second, and short; it covers a round all the same.
        assert -0.5 < each["rest"] < 0.5 * each["all"] + 0.5


def test_what_a_sweep_notes_of_its_trials_can_be_ranked(tmp_path):
    run = tmp_path / "trials" / "000"
    claim(RunDirectory(str(run)), SETTINGS, Corpus("", Manifest(corpus="toy", shards=()), ""))
    record = TrialRecord(values={}, status="finished", metrics={"model/repeatability": 0.5})
    storage.write_json(str(run / "trial.json"), record.model_dump(mode="json"))
    MetricsFile(str(run)).write({"kind": "round", "round": 1, "made_by": "correspondence", "equivariance_error": 2.0})
    found = objective.metrics_of(tmp_path)["000"]
    assert found["model/repeatability"] == 0.5 and found["round 1/equivariance_error"] == 2.0


def ridge(x, y):
    """The scores' regression by scikit-learn: its penalty is a hundredth of the largest entry of centred X^T X."""
    centred = x - x.mean(0)
    return Ridge(alpha=0.01 * (centred.T @ centred).max()).fit(x, y).predict


def expected_labels(label_NK2, points_NL2):
    """Label error of each cluster, forward from labels without a gap, and of a perfect stage 2, in per cent."""
    count, flat = len(points_NL2), points_NL2.reshape(len(points_NL2), -1)
    side = np.sqrt(np.ptp(points_NL2[..., 0], axis=1) * np.ptp(points_NL2[..., 1], axis=1))
    first = np.arange(count) < count // 2
    place = np.empty_like(label_NK2)
    for half in (first, ~first):
        for k in range(label_NK2.shape[1]):
            rows = half & np.isfinite(label_NK2[:, k, 0])
            place[~half, k] = ridge(flat[rows], label_NK2[rows, k])(flat[~half])
    off = np.linalg.norm(label_NK2 - place, axis=2) / side[:, None]
    forward = []
    for landmarks in (label_NK2, place):
        errors = []
        for half in (first, ~first):
            told = np.nan_to_num(landmarks).reshape(count, -1)
            found = ridge(told[half], flat[half])(told[~half]).reshape(-1, *points_NL2.shape[1:])
            errors.append((np.linalg.norm(found - points_NL2[~half], axis=2) / side[~half, None]).mean())
        forward.append(100 * np.mean(errors))
    return 100 * np.nanmean(off, 0), *forward


def annotated_shapes(rng, count):
    """Six points of a shape that is shifted, scaled and bent; pixels of a 256 px view."""
    mean, bent = rng.uniform(60, 196, (6, 2)), rng.normal(0, 6, (3, 6, 2))
    moved = rng.normal(0, 12, (count, 1, 2)) + np.tensordot(rng.normal(size=(count, 3)), bent, 1)
    return 128 + (mean - 128) * rng.uniform(0.8, 1.2, (count, 1, 1)) + moved


def write_labels(url, label_NK2, distance_NK):
    """A shard of labels in cells of a network input of 64 px."""
    shown = np.isfinite(label_NK2).all(2)
    offsets = np.concatenate([[0], np.cumsum(shown.sum(1))])
    points = (label_NK2[shown] / 16).astype(np.float32)
    Labels(offsets, points, np.nonzero(shown)[1].astype(np.int16), distance_NK[shown].astype(np.float32)).save(url)


def test_the_labels_of_rounds_are_scored_on_training_images_as_scikit_learn_would(tmp_path, capsys):
    rng = np.random.default_rng(0)
    points = annotated_shapes(rng, 70)
    points[60:] = rng.uniform(0, 256, (10, 6, 2))  # of test images, which must not count
    with ShardWriter(str(tmp_path / "shards"), "shapes", "toy", 40) as writer:
        for number, each in enumerate(points):
            split, box = "train" if number < 60 else "test", (0.0, 0.0, 256.0, 256.0)
            meta = {"points": tuple(map(tuple, each.tolist())), "visible": (True,) * 6}
            writer.add(rng.bytes(9), SampleMeta(source=str(number), split=split, box=box, **meta))
    corpus, run, points = open_corpus(str(tmp_path / "shards")), RunDirectory(str(tmp_path / "run")), points[:60]
    claim(run, SETTINGS, corpus)
    mixed = np.einsum("kl,nlc->nkc", rng.dirichlet(np.ones(6), 4), points)
    full = mixed + rng.normal(size=(2, 60, 4, 2)) * np.array([2, 4, 8, 16])[:, None]
    gaps = full[1].copy()
    gaps[rng.random((60, 4)) < 0.3] = np.nan
    distance = rng.uniform(0, 0.5, (60, 4))
    distance[:, 3] += np.where(np.arange(60) < 8, 0.0, 1.0)  # eight labels below the threshold: too few
    for number, (label, threshold) in enumerate(((full[0], 2.0), (gaps, 0.6))):
        record = RoundRecord(
            number=number, kind="correspondence", step=number, weights=None, manifest=corpus.manifest_hash, seed=0,
            backend=None, thresholds=[threshold] * 4, active=[True] * 4, population=[60] * 4, seconds={},
            metrics={"labels_per_image": 3.25, "clusters_in_use": 4.0},
        )  # fmt: skip
        first = 0
        for shard in corpus.train:
            each = slice(first, first := first + shard.samples)
            write_labels(labels_url(run.round_url(number), shard.file), label[each], distance[each])
        run.finish_round(record, None)
    labels.main(run.url, clusters=True)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = {cells[0]: cells for cells in lines if len(cells) == 10}
    error, forward, perfect = expected_labels(full[0], points)
    worst = ", ".join(f"{k}: {error[k]:.1f}" for k in np.argsort(-error)[:3])
    told = [f"{each:.2f} %" for each in (np.median(error), error.mean())]
    assert rows["0"][2:] == ["3.2", "4", "4", *told, worst, f"{forward:.2f} %", f"{perfect:.2f} %"]
    error, _, perfect = expected_labels(gaps[:, :3], points)
    assert rows["1"][4:7] == ["3", f"{np.median(error):.2f} %", f"{error.mean():.2f} %"]
    assert rows["1"][9] == f"{perfect:.2f} %"
    shown = np.isfinite(gaps[..., 0]).mean(0)
    told = [[str(k), f"{error[k]:.2f} %", f"{100 * shown[k]:.2f} %", "yes"] for k in np.argsort(error)]
    assert [cells for cells in lines if len(cells) == 4][2:] == told


def test_labels_of_nothing_give_no_perfect_landmarks():
    rng = np.random.default_rng(1)
    points, noise = annotated_shapes(rng, 200), rng.uniform(0, 256, (200, 30, 2))
    side = PROTOCOLS["toy"].normaliser(points)[:, None]
    guess = (np.linalg.norm(points - points.mean(0), axis=2) / side).mean()
    assert labels.score_labels(noise, points, PROTOCOLS["toy"]).perfect > guess
    told = labels.score_labels(points + rng.normal(0, 3, points.shape), points, PROTOCOLS["toy"])
    assert told.perfect < told.forward < 0.2 * guess


def test_an_ablation_trains_what_has_no_row_yet_and_sums_up_its_rows(tmp_path, capsys, monkeypatch):
    urls, file = [str(tmp_path / name) for name in ("toy", "other")], tmp_path / "out" / "rows.jsonl"
    for number, url in enumerate(urls):
        write_toy(url, train=2 + number, test=1)
    same, wide = {"cluster.clusters": SETTINGS.cluster.clusters}, {"cluster.clusters": 9}
    long = {"stage1.warmup_iterations": ablation.Times(0.5)}
    monkeypatch.setattr(ablation, "CHOICES", {"wide": wide, "same": same, "long": long})
    other = ablation.changed(SETTINGS, wide)
    bases = [ablation.Basis("toy", urls[0], SETTINGS), ablation.Basis("other", urls[1], other)]

    def tasks():
        return [task for seed in (0, 1) for basis in bases for task in basis.tasks(("wide", "same", "long"), seed)]

    assert [(task.corpus, task.choice) for task in tasks()[:6]] == [
        ("toy", "base"), ("toy", "wide"), ("toy", "long"), ("other", "base"), ("other", "same"), ("other", "long"),
    ]  # fmt: skip
    assert tasks()[2].settings.stage1.warmup_iterations == SETTINGS.stage1.warmup_iterations / 2
    assert len({task.key for task in tasks()}) == 12 and len({task.name for task in tasks()}) == 12
    trained, broken = [], {("toy", "long", 1): DidNotHold("out of memory"), ("other", "long", 1): KeyboardInterrupt()}

    def train_as_if(task):
        what = (task.corpus, task.choice, task.settings.seed)
        trained.append(what)
        if what in broken:
            raise broken[what]
        forward = {"base": 0.05, "wide": 0.04, "same": None, "long": 0.06}[task.choice]
        return ablation.Row(
            choice=task.choice, corpus=task.corpus, seed=what[2], key=task.key, commit="abc",
            forward=forward and forward + 0.01 * what[2], backward=0.03, kept=10 + what[2], seconds=60 + 40 * what[2],
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        ablation.finish(tasks(), file, train_as_if)
    assert len(trained) == 12 and len(file.read_text().splitlines()) == 10
    told = capsys.readouterr()
    assert "11 runs to go, about 11:00" in told.out and "toy-long-1" in told.out and "out of memory" in told.err
    broken.clear()
    trained.clear()
    rows = ablation.finish(tasks(), file, train_as_if)
    assert trained == [("toy", "long", 1), ("other", "long", 1)] and len(rows) == 12
    long["stage1.warmup_iterations"] = ablation.Times(2)
    trained.clear()
    rows = ablation.finish(tasks(), file, train_as_if)
    assert [what[1] for what in trained] == ["long"] * 4
    header, lines = ablation.table(tasks(), rows)
    assert header[:2] == ["choice", "toy: forward, %"] and header[-1] == "other: seconds"
    assert lines[0][:5] == ["base", "5.50 (5.00 to 6.00)", "3.00 (3.00 to 3.00)", "10 (10 to 11)", "80 (60 to 100)"]
    assert lines[1][5:] == ["as base"] * 4
    assert lines[3][:2] == ["same", "as base"] and lines[3][5] == "none (none to none)"


def test_an_ablation_names_what_failed_in_its_exit_code(tmp_path, capsys, monkeypatch):
    write_toy(str(tmp_path / "shards"), train=2, test=1)

    def train_as_if(task, out, commit):
        if task.settings.seed:
            raise DidNotHold("out of memory")
        row = {"choice": task.choice, "corpus": task.corpus, "seed": 0, "key": task.key, "commit": commit}
        return ablation.Row(**row, forward=0.0512, backward=None, kept=9, seconds=60)

    monkeypatch.setattr(ablation, "train_apart", train_as_if)
    given = ablation.Command(corpus=str(tmp_path / "shards"), drawings=0, only=("mirrored views",), out=tmp_path)
    assert given.run() == 1 and replace(given, seeds=(0,)).run() == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("| mirrored views")]
    assert table == ["| mirrored views | 5.12 | none | 9 | 60 |".split()] * 2
    with pytest.raises(UserError, match="no choice is called 'clusters'; there are squared error in stage 2, "):
        replace(given, only=("clusters",)).run()
    with pytest.raises(UserError, match="--corpus or some --drawings"):
        replace(given, corpus=None).run()


def raising(error: Exception):
    def check() -> str:
        raise error

    return check


def test_a_failing_check_is_reported_stops_no_other_and_gives_exit_code_1(tmp_path, capsys):
    checks = {
        "first": lambda: "fine",
        "second": raising(DidNotHold("3 of 40 clusters | in use")),
        "third": raising(ZeroDivisionError("division by zero")),
        "fourth": raising(NotRunHere("no GPU")),
        "last": lambda: "fine\nas well",
    }
    rows = [checked(name, check) for name, check in checks.items()]
    assert [row.outcome for row in rows] == ["held", "did not hold", "did not hold", "not run here", "held"]
    assert report(rows, "a machine", tmp_path / "table.md") == 1
    written = (tmp_path / "table.md").read_text()
    assert written in capsys.readouterr().out
    assert "2 held, 2 did not hold, 1 not run here" in written
    lines = [line.split(" | ") for line in written.splitlines() if line.startswith(("| s", "| t", "| f", "| l"))]
    assert [line[1] for line in lines] == ["held", "**did not hold**", "**did not hold**", "**not run here**", "held"]
    assert lines[1][-1] == "3 of 40 clusters / in use |" and lines[4][-1] == "fine as well |"
    assert "ZeroDivisionError: division by zero" in lines[2][-1]


def test_what_is_not_run_is_no_failure(tmp_path):
    rows = [checked("first", lambda: "fine"), checked("second", raising(NotRunHere("no GPU")))]
    assert report(rows, "a machine", tmp_path / "table.md") == 0


def test_a_command_that_fails_is_named_with_its_exit_code_and_last_words(tmp_path):
    words = ["folder", "--images", "nowhere", "--out", str(tmp_path / "shards")]
    with pytest.raises(DidNotHold, match=r"jobs\.pack ended with exit code 2: .*nowhere.*\(log\.txt\)"):
        job("pack", words, tmp_path / "log.txt", seconds=120)


def test_a_command_that_is_not_done_in_time_is_ended(tmp_path):
    with pytest.raises(DidNotHold, match="jobs.pack was not done after 0 s"):
        job("pack", ["toy", "--count", "100000", "--out", str(tmp_path / "shards")], tmp_path / "log.txt", seconds=0.1)


def test_a_check_whose_process_dies_did_not_hold():
    with pytest.raises(DidNotHold, match="exit code 7"):
        isolated(os._exit, 7, seconds=120)


@pytest.mark.parametrize(("width", "image"), [(16, 0.02), (64, 0.04), (256, 3.0)])
def test_a_schedule_is_one_that_training_takes_and_that_fits_the_time(tmp_path, capsys, width, image):
    scale = Scale(width, batch=8, image=image, start=75.0)
    plan = schedule(60, scale)
    train.main([*train_words(plan, scale, tmp_path, "run"), "--print-config"])
    told = json.loads(capsys.readouterr().out)
    assert (told["network"]["width"], told["network"]["input_size"]) == (width, 256)
    assert told["stage1"]["warmup_iterations"] < told["stage1"]["rounds"] * told["stage1"]["round_iterations"]
    images = 2 * told["stage1"]["pairs"] * (plan.warm_up + plan.rounds * plan.round_steps)
    images += told["stage2"]["batch"] * plan.stage2
    assert 1200 < images * scale.image < 3600


def plan_without_gpu(out, **told) -> gpu.Plan:
    told = {"images": None, "gpus": 0, "minutes": 8.0, "deadline": math.inf} | told
    return gpu.Plan(out=out, scale=Scale(16, batch=8, image=0.02, start=75.0), **told)


def test_what_needs_a_gpu_is_said_to_be_not_run_where_there_is_none(tmp_path):
    plan = plan_without_gpu(tmp_path)
    names = ("cuml here", "cuml beside torch", "k-means over NCCL")
    rows = [checked(name, partial(gpu.checks_of(plan)[name], plan)) for name in names]
    assert {(row.outcome, row.seen) for row in rows} == {("not run here", "no GPU")}


def test_a_check_for_which_no_time_is_left_did_not_hold(tmp_path):
    plan = plan_without_gpu(tmp_path, deadline=0.0)
    row = checked("pack", partial(gpu.checks_of(plan)["pack drawings"], plan))
    assert row.outcome == "did not hold" and "no time was left" in row.seen


def test_single_checks_can_be_asked_for(tmp_path, capsys):
    assert gpu.Command(size="cpu", out=tmp_path, only=("export",)).run(()) == 1
    assert "| export | **did not hold** | 0 | run drawings has no model" in (tmp_path / "checks.md").read_text()
    assert gpu.Command(size="cpu", out=tmp_path, only=("exports",)).run(()) == 2
    assert "no check is called 'exports'; there are install, " in capsys.readouterr().err


def test_the_table_of_layers_has_the_operations_that_torch_counts_and_the_bytes_of_two_layers_by_hand():
    shape, size, images = NetworkShape(16, 2, 2, 16), 64, 3
    costs = layers.costs_of(shape, size, images)
    with FlopCounterMode(display=False) as counter:
        heat, descriptors = DetectorDescriptor(shape)(torch.zeros(images, 3, size, size))
        (heat.sum() + descriptors.sum()).backward()
    of_images = 2 * (7 * 7 * 3) * 4 * 32 * 32  # no gradient of the images is asked for
    assert images * (sum(cost.flop for cost in costs.values()) - of_images) == counter.get_total_flops()
    read_and_written = 3 * (3 * 64 * 64 + 4 * 32 * 32 + 4 * 3 * 7 * 7 / images)  # input, output and weights
    assert costs["convolution 7 x 7"].moved == pytest.approx(2 * read_and_written)
    # Two levels, 16 x 16 and 8 x 8 cells of 16 channels: read whole and written by quarters, and back.
    assert costs["halving"].moved == 2 * 2.5 * 16 * (16 * 16 + 8 * 8)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_short_training_at_256_pixels_keeps_its_labels_clusters_and_weights(tmp_path):
    """Some minutes are too few for landmarks that are sure in most images, so these are not asked for."""
    fullsize.Command(minutes=8, width=16, out=tmp_path).run(())
    written = (tmp_path / "drawings-16.md").read_text()
    for criterion in ("labels", "clusters", "weights", "maps"):
        assert f"| {criterion} | held |" in written
