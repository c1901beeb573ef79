"""Figures, report, progress and tracking from plain arrays and lines."""

import io
import json
import re
import time

import numpy as np
from PIL import Image

from cluster import storage
from sst.predict.overlay import COLOURS, draw_points
from sst.progress import clock, duration
from sst.report import plots
from sst.report.advice import Warned, landmark_facts
from sst.report.pictures import png
from sst.report.report import ReportFigure, write_report
from sst.run.console import TimeLeft, round_line, step_line
from sst.run.metrics import MetricsFile, MetricsReader
from sst.run.tracking import flatten
from sst.train.run_directory import RunDirectory
from sst.train.schedule import Phase

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
POINTS = RNG.uniform(5, 59, (3, 12, 2))


def pixels(figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png(figure))).convert("RGB")).astype(int)


def test_invisible_landmarks_are_not_drawn():
    nothing = np.zeros((3, 12), bool)
    some = nothing.copy()
    some[:, 4] = True
    bare, drawn = (pixels(plots.landmark_grid(IMAGES * 0, POINTS, visible)) for visible in (nothing, some))
    assert bare.shape == drawn.shape
    assert np.abs(bare - drawn).sum() > 0
    # Landmark 4's colour appears only where it is drawn.
    colour = np.array([int(COLOURS[4][i : i + 2], 16) for i in (1, 3, 5)])
    assert (np.abs(drawn - colour).sum(-1) < 12).any() and not (np.abs(bare - colour).sum(-1) < 12).any()


def test_a_grid_has_every_image_in_its_place_and_a_landmark_outside_of_one_is_not_on_another():
    outside = np.full((3, 1, 2), 90.0)
    drawn = plots.landmark_grid(IMAGES, outside, np.ones((3, 1), bool), columns=2)
    step = 64 + plots.GAP
    assert drawn.shape == (step + 64, step + 64, 3)
    for image, (top, left) in zip(IMAGES, ((0, 0), (0, step), (step, 0)), strict=True):
        assert (drawn[top : top + 64, left : left + 64] == image).all()
    assert (drawn[64:step] == 255).all() and (drawn[step:, step:] == 255).all()


def test_a_cross_marks_the_place_of_the_landmark_in_the_magnified_crop():
    places = np.array([[10.0, 20.0], [30.25, 7.75]])
    drawn = plots.cluster_gallery(np.zeros((2, 40, 40, 3), np.uint8), places).astype(float)
    for number, place in enumerate(places):
        left = number * (80 + plots.GAP)
        yellow = drawn[:, left : left + 80].sum(-1) * (drawn[:, left : left + 80, 2] < 100)
        centre = [(yellow.sum(axis) * np.arange(80)).sum() / yellow.sum() for axis in (0, 1)]
        # The middle of pixel x of the crop lies between pixels 2x and 2x + 1.
        assert np.allclose(centre, 2 * place + 0.5, atol=0.15)


def test_rounds_are_counted_in_whole_numbers():
    drawn = plots.round_statistics([{"round": 0, "inertia": 1.0}, {"round": 1, "inertia": 0.5}])
    assert all(tick == round(tick) for tick in drawn.axes[0].get_xticks())


def test_every_panel_of_curves_is_drawn():
    for count in (0, 1, 3, 7):
        panels = {f"panel {n}": [("run", [0.0, 1.0], [0.0, float(n)])] for n in range(count)}
        drawn = plots.curves(panels)
        assert [axis.get_title() for axis in drawn.axes] == list(panels)
        assert pixels(drawn).std() > 0 or not count


def test_every_landmark_looks_different():
    black = np.zeros((40, 40, 3), np.uint8)
    looks = {draw_points(black, np.array([[20.0, 20.0]]), [number]).tobytes() for number in range(80)}
    assert len(looks) == 80


def test_other_pictures_are_drawn():
    first = [(POINTS[i][:5], np.arange(5)) for i in range(3)]
    assert pixels(plots.before_after(IMAGES, first, POINTS, np.ones((3, 12), bool))).std() > 0
    assert pixels(plots.cluster_gallery(IMAGES, POINTS[:, 0])).std() > 0
    assert pixels(plots.error_curves(np.linspace(0.01, 0.05, 20), np.linspace(0.02, 0.04, 9), "toy")).std() > 0
    rounds = [{"round": 0, "labels_per_image": 9.0}, {"round": 1, "labels_per_image": 8.0, "inertia": 0.1}]
    assert pixels(plots.round_statistics(rounds)).std() > 0
    assert pixels(plots.round_statistics([])).std() > 0


def test_the_report_needs_nothing_else_and_escapes_what_it_is_given(tmp_path):
    picture = ReportFigure("landmarks", "a <caption>", png(plots.round_statistics([])))
    write_report(
        RunDirectory(str(tmp_path)),
        title="<script>alert(1)</script>",
        summary={"landmarks": "3"},
        figures=[picture, ReportFigure("landmark_00", "gallery", picture.png)],
        rounds=[{"round": 0, "x": 1.23456789}, {"round": 1}],
        settings={"seed": 0},
        facts=landmark_facts(POINTS[:, :1], np.ones((3, 1)), 0.4, None),
        warnings=[Warned("a <warning>", "advice", (0,))],
        notes=["a note"],
    )
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in page and "a <warning>" not in page and "&lt;script&gt;" in page
    assert page.count("data:image/webp;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "1.235" in page and "a note" in page
    assert (tmp_path / "figures" / "landmarks.png").read_bytes() == picture.png


def test_metrics_are_read_as_they_come(tmp_path):
    writer, reader = MetricsFile(str(tmp_path)), MetricsReader(str(tmp_path))
    assert reader.new_lines() == []
    writer.write({"kind": "step", "step": 1})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "half')
    assert [line["step"] for line in reader.new_lines()] == [1]
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'"}\n')
    assert [line["kind"] for line in reader.new_lines()] == ["half"]
    assert MetricsReader(str(tmp_path), skip_present=True).new_lines() == []


def test_a_line_cut_short_by_a_crash_does_not_stop_the_resumed_run(tmp_path):
    MetricsFile(str(tmp_path)).write({"kind": "step", "step": 1})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "st')
    MetricsFile(str(tmp_path)).write({"kind": "resume", "step": 1})
    assert [line["kind"] for line in MetricsReader(str(tmp_path)).new_lines()] == ["step", "resume"]


def test_a_pass_over_many_shards_puts_its_file_a_few_times_only(tmp_path, monkeypatch):
    """A put of the whole file for each of 40,000 shards would send 80 GB to an object store."""
    put, now = [], [100.0]
    monkeypatch.setattr("sst.run.metrics.time.monotonic", lambda: now[0])
    monkeypatch.setattr(storage, "write_bytes", lambda url, data: put.append(len(data)))
    metrics = MetricsFile(f"memory://{tmp_path.name}")
    for done in range(1, 10_001):
        now[0] += 0.01
        metrics.write({"kind": "shards", "what": "extract", "done": done, "total": 10_000})
    assert len(put) <= 100 / 5 + 2
    metrics.write({"kind": "round", "round": 1})
    assert len(put) <= 100 / 5 + 3
    told = [json.loads(line) for line in metrics._text.splitlines()]
    assert [line["done"] for line in told if line["kind"] == "shards"][-1] == 10_000
    assert 90 <= len(told) <= 102 and told[-1]["kind"] == "round"


def test_metrics_on_an_object_store_go_on_after_a_resume():
    url = f"memory://metrics-{time.monotonic_ns()}"
    MetricsFile(url).write({"kind": "round", "round": 0})
    MetricsFile(url).write({"kind": "round", "round": 1})
    assert [line["round"] for line in MetricsReader(url).new_lines()] == [0, 1]


STEP = {
    "kind": "step", "phase": "round 2", "stage": 1, "round": 1, "step": 40, "phase_step": 20, "phase_steps": 100,
    "loss": 0.5, "detector": 0.1, "descriptor": 0.04, "gradient_norm": 1.5, "images_per_second": 99.4,
    "waiting_share": 0.031, "memory_gb": 0.7, "learning_rate": 5e-4, "time": 10.0,
}  # fmt: skip


def test_lines_are_of_fixed_width_and_without_control_characters():
    texts = [step_line(STEP | {"loss": loss, "phase_step": n}, "1:00") for loss, n in ((0.5, 20), (12.25, 100))]
    assert len({len(text) for text in texts}) == 1
    assert all(text.isprintable() for text in texts)
    assert "0.50000" in texts[0] and "99.4 img/s" in texts[0] and "wait   3 %" in texts[0]
    assert "labels/image 9.5" in round_line({"round": 3, "made_by": "merge", "labels_per_image": 9.5})


def test_time_left_follows_the_measured_speed():
    phases = [Phase("warm-up", 1, 0, 0, 100, 0, 4, 1), Phase("landmarks", 2, 1, 100, 50, 0, 4, 1)]
    left = TimeLeft(phases, images=497)
    line = STEP | {"round": 0}
    assert left.update(line | {"time": 0.0, "step": 20, "phase_step": 20}) == "?"
    # 20 steps in 10 s: 0.5 s a step, 60 steps left here and 50 in stage 2, of which nothing better is known.
    # Between phases 497 images go twice through the network in a third of the time of 99.4 images/s: 10 / 3 s.
    assert left.update(line | {"time": 10.0, "step": 40, "phase_step": 40}) == clock(55 + 2 * 10 / 3)
    assert clock(3725) == "1:02:05"


def test_what_happened_between_two_phases_once_is_not_expected_again():
    """A first pass that takes long, as where libraries start, must not count for all the rounds to come."""
    phases = [Phase(f"round {n}", 1, n, 100 * n, 100, 100 * n, 4, 1) for n in range(4)]
    left, line = TimeLeft(phases, images=497), STEP | {"stage": 1}
    for now, number, step in ((0.0, 0, 20), (10.0, 0, 100), (70.0, 1, 120), (80.0, 1, 200), (84.0, 2, 220)):
        place = {"time": now, "round": number, "step": step, "phase_step": step - 100 * number}
        said = left.update(line | place)
    # 0.125 s a step for 180 steps, and for each of two phases the last pause: 4 s less 20 steps.
    assert said == clock(180 * 0.125 + 2 * (4 - 20 * 0.125))


def test_settings_are_flat_parameters():
    assert flatten({"a": {"b": 1, "c": {"d": "x"}}, "e": (1, 2)}) == {"a.b": "1", "a.c.d": "x", "e": "(1, 2)"}


def test_durations_are_said_as_people_say_them():
    said = [duration(seconds) for seconds in (3, 60, 1650, 7200, 200_000)]
    assert said == ["1 minute", "1 minute", "28 minutes", "2.0 hours", "2.3 days"]
