"""Runs that come to nothing are known at once, sound ones are left in peace."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from torch import nn

from cluster import rapids
from cluster.actor import KMeansActor
from cluster.kmeans import KMeansResult, KMeansSettings
from cluster.rapids import CumlError
from cluster.shards import Descriptors
from sst.config import TrainSettings
from sst.data.corpus import Corpus
from sst.errors import Stopped, Unwell, UnwellError, exit_on_user_error
from sst.nn.losses import landmark_loss
from sst.nn.network import LandmarkDetector, NetworkShape
from sst.nn.optimizer import OptimizerName, Update
from sst.presets import PRESETS
from sst.report.advice import seen_on_the_way
from sst.run.console import Show
from sst.run.distributed import kmeans_backend, ray_tools, why_unwell
from sst.run.metrics import MetricsFile
from sst.run.own import Machine, choose
from sst.train import health, trainer
from sst.train.extraction import Predictions
from sst.train.health import Watch, dead_scales, kept_shares, signs
from sst.train.run_directory import RunDirectory
from sst.train.tools import Tools
from tests.small import SETTINGS, local_tools, train_locally, write_toy


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("corpus"))
    write_toy(url, train=48, test=16)
    return url


def seen_in_rounds(rounds: list[tuple[float, int]], **more: float) -> list[tuple[str, int]]:
    """The signs that rounds with so many labels per image and clusters in use give, with their numbers."""
    watch, before, found = Watch(signs(TrainSettings())), [], []
    for number, (labels, clusters) in enumerate(rounds, start=1):
        figures = {"labels_per_image": labels, "clusters_in_use": clusters}
        line = {"kind": "round", "round": number} | figures | kept_shares(figures, before) | more
        found += [(each.sign.name, number) for each in watch.look(line)]
        before.append(figures)
    return found


COLLAPSED = ([(12.5, 40), (3.9, 9), (2.6, 4)], [(15.0, 100), (5.4, 12)])
"""Labels per image and clusters in use of rounds on a GPU whose clusters died."""

SOUND = (
    [(11.1, 40), (11.0, 40), (11.8, 40), (15.5, 40)],
    [(14.1, 100), (11.8, 100), (10.5, 100), (7.8, 100)],
    [(16.7, 30), (16.9, 30), (17.3, 30)],
)
"""The same of runs that went well, the last on drawings on a CPU."""


@pytest.mark.parametrize("rounds", COLLAPSED)
def test_clusters_that_died_on_a_gpu_would_have_been_known_in_the_second_round(rounds):
    assert {("labels lost", 2), ("clusters died", 2)} <= set(seen_in_rounds(rounds))


@pytest.mark.parametrize("rounds", SOUND)
def test_sound_rounds_give_no_warning(rounds):
    assert seen_in_rounds(rounds, label_persistence=0.3) == []


def test_a_decline_over_several_rounds_is_seen_as_well():
    assert seen_in_rounds([(12.0, 40), (9.0, 40), (7.0, 38), (5.0, 30)]) == [("labels lost", 4)]


def test_labels_that_change_altogether_are_seen():
    assert seen_in_rounds([(12.0, 40)], label_persistence=0.02) == [("labels do not last", 1)]


def step(stage: int, number: int, **figures: float) -> dict:
    place = {"kind": "step", "phase": "p", "stage": stage, "step": number, "phase_step": number, "phase_steps": 10**6}
    return place | figures


def seen_in_steps(stage: int, figures: list[dict[str, float]]) -> dict[str, int]:
    """Sign and stage step at which it is told, for figures of every 20 steps."""
    watch, found = Watch(signs(TrainSettings())), {}
    for number, each in enumerate(figures, start=1):
        for told in watch.look(step(stage, 20 * number, **each), 20 * number):
            found[told.sign.name] = 20 * number
    return found


def test_a_second_stage_that_unlearns_is_known_within_few_hundred_steps_and_told_once():
    """Loss and level of the run on a GPU that answered zero everywhere, with a quarter of its scales dead."""
    falling = [{"loss_of_all_zero": 0.00102 / 0.000437, "peak": 0.1, "decay_share": 0.5, "dead_scales": 0.0}] * 10
    dead = [{"loss_of_all_zero": 0.000437 / 0.000437, "peak": 0.0005, "decay_share": 0.99, "dead_scales": 0.25}] * 90
    found = seen_in_steps(2, falling + dead)
    assert set(found) == {"nothing learnt", "flat landmarks", "weights vanish", "channels died"}
    assert max(found.values()) <= 500


SOUND_STEPS = (
    ((100, 1.565, 0.131, 0.49), (200, 0.866, 0.208, 0.34), (300, 0.810, 0.225, 0.34), (400, 0.757, 0.230, 0.29)),
    ((100, 2.304, 0.131, 0.47), (200, 0.903, 0.194, 0.34), (300, 0.852, 0.276, 0.33), (400, 0.777, 0.313, 0.33)),
)
"""Step, loss over that of maps of zeros, peak and share of weights led by decay of sound second stages, up to the step
written; networks of width 32 and 64, with the published decay in the proportion to the loss that 256 px have."""


NARROW = (
    (
        4.316,
        1.028,
        1.006,
        0.991,
        1.001,
        0.978,
        0.986,
        0.989,
        0.972,
        0.994,
        0.96,
        0.976,
        0.967,
        0.953,
        0.996,
        0.943,
        0.931,
        0.972,
        0.924,
        0.923,
    ),
    (
        0.111,
        0.07,
        0.062,
        0.058,
        0.056,
        0.054,
        0.054,
        0.053,
        0.053,
        0.054,
        0.054,
        0.055,
        0.055,
        0.057,
        0.058,
        0.058,
        0.06,
        0.06,
        0.061,
        0.061,
    ),
)
"""Loss over that of maps of zeros and peak, every 20 steps: a sound stage 2 on drawings, width 32, 64 px, batch 8."""


def test_a_sound_but_slow_beginning_gives_no_warning():
    rows = [{"loss_of_all_zero": loss, "peak": peak} for loss, peak in zip(*NARROW, strict=True)]
    assert seen_in_steps(2, rows + rows[-5:] * 10) == {}


@pytest.mark.parametrize("recorded", SOUND_STEPS)
def test_sound_steps_give_no_warning(recorded):
    rows = [
        {"loss_of_all_zero": loss, "peak": peak, "decay_share": share, "dead_scales": 0.0, "waiting_share": 0.02}
        for _, loss, peak, share in recorded
        for _ in range(5)
    ]
    assert seen_in_steps(2, rows + rows[-1:] * 50) == {}


def test_a_sign_must_last_and_is_told_again_when_it_comes_back():
    well, unwell = {"waiting_share": 0.01}, {"waiting_share": 0.6}
    assert seen_in_steps(1, [well] * 30 + [unwell] * 4 + [well] * 30) == {}
    watch, told = Watch(signs(TrainSettings())), []
    for number, each in enumerate([well] * 30 + ([unwell] * 30 + [well] * 3) * 2):
        told += watch.look(step(1, number, **each), 20 * number)
    assert [each.sign.name for each in told] == ["waiting for images"] * 2 and not told[0].sign.ends


def test_every_sign_has_a_reason_a_cause_and_a_remedy_that_names_real_settings():
    known = {f"--{name}" for name in flat_names(TrainSettings().model_dump())}
    for sign in signs(TrainSettings()):
        assert sign.why and sign.cause and sign.means.format(0.5) != sign.means
        options = {word.strip("(),.;") for word in sign.remedy.split() if word.strip("(").startswith("--")}
        assert options - {"--size"} <= known, options - known


def flat_names(settings: dict, prefix: str = "") -> list[str]:
    return [
        name
        for key, value in settings.items()
        for name in (
            flat_names(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}".replace("_", "-")]
        )
    ]


def test_levels_are_those_of_a_map_of_zeros_and_of_the_highest_points():
    torch.manual_seed(0)
    heat, points = torch.rand(3, 4, 16, 16), torch.rand(3, 5, 2) * 15
    cluster = torch.tensor([[0, 1, -1, -1, -1], [2, -1, 3, -1, -1], [-1] * 5])
    active = torch.tensor([True, True, True, False])
    _, levels = landmark_loss(heat, points, cluster, active)
    assert torch.allclose(levels["all_zero"], landmark_loss(torch.zeros_like(heat), points, cluster, active)[0].mean())
    highest = [heat[0, 0].max(), heat[0, 1].max(), heat[1, 2].max()]
    assert float(levels["peak"]) == pytest.approx(float(sum(highest)) / 3)


def test_dead_scales_are_counted_over_all_normalisations():
    network = nn.Sequential(nn.GroupNorm(1, 6), nn.Conv2d(6, 2, 1), nn.GroupNorm(1, 2))
    with torch.no_grad():
        network[0].weight[:2] = torch.tensor([0.005, -0.001])
    assert float(dead_scales(network)) == pytest.approx(2 / 8)


NARROWER = 1_000
"""How much larger a weight's gradient is in the narrow network below than in the published one at the all-zero level,
where it is some 2e-8 (norm 6e-5 over 7 million weights) against 1e-5 to 1e-4 here."""


def spots(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Grey views of 256 px with a red and a green spot at random places, and those in heatmap units."""
    points = torch.rand(count, 2, 2, generator=generator) * 56 + 4
    rows, columns = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    views = 0.4 + 0.05 * torch.randn(count, 3, 256, 256, generator=generator)
    for k in range(2):
        x, y = (4 * points[:, k, axis, None, None] for axis in (0, 1))
        views[:, k] += 0.6 * (((columns - x) ** 2 + (rows - y) ** 2) < 144)
    return views.clamp(0, 1), points


def left_after_steps(weight_decay: float, kind: OptimizerName, rate: float = 4e-3, steps: int = 45) -> float:
    """Size of the convolutions' weights after some steps of stage 2 at 256 px, as a share of the first, median."""
    torch.manual_seed(0)
    generator, active = torch.Generator().manual_seed(0), torch.ones(2, dtype=torch.bool)
    model = LandmarkDetector(NetworkShape(width=16, depth=4, groups=2), 2)
    convolutions = [weight for weight in model.parameters() if weight.dim() == 4]
    before = [float(weight.detach().norm()) for weight in convolutions]
    update = Update(model, rate, weight_decay, kind)
    for _ in range(steps):
        views, points = spots(1, generator)
        model.zero_grad()
        landmark_loss(model(views), points, torch.arange(2)[None], active)[0].mean().backward()
        update.step()
    shares = [float(weight.detach().norm()) / first for weight, first in zip(convolutions, before, strict=True)]
    return float(np.median(shares))


def test_at_256_px_the_published_decay_takes_a_network_apart_and_that_of_our_presets_does_not():
    """In the proportion of decay to gradient that the full size has, where it happened."""
    published = PRESETS["celeba"][1].stage2
    assert left_after_steps(NARROWER * published.weight_decay, published.optimizer) < 0.2
    settings = [PRESETS[name][1] for name in ("faces-cpu", "toy-cpu")]
    settings += [choose(3_000, 20, Machine(16, gpus, 100.0)) for gpus in (0, 1)]
    ours = {(stage.weight_decay, stage.optimizer) for each in settings for stage in (each.stage1, each.stage2)}
    assert len(ours) == 2
    assert all(left_after_steps(NARROWER * decay, kind) > 0.9 for decay, kind in ours)


def unwell(settings: TrainSettings) -> TrainSettings:
    return settings.changed(resources=settings.resources.changed(stop_when_unwell=True))


def test_a_run_whose_clusters_die_ends_after_a_checkpoint_and_goes_on_without_the_flag(corpus, tmp_path):
    lines: list[dict] = []
    sound, settings = local_tools(lines), SETTINGS.changed(stage1=SETTINGS.stage1.changed(min_labels=1))

    def dying(sample, asked) -> KMeansResult:
        """All centroids but one far from any descriptor, as after descriptors have turned."""
        found = sound.fit(sample, asked)
        if len(RunDirectory(str(tmp_path)).records()) < 2:
            return found
        centroids = found.centroids.copy()
        centroids[1:] += 10
        return replace(found, centroids=centroids)

    with pytest.raises(Unwell):
        train_locally(corpus, str(tmp_path), Tools(dying, log=lines.append), unwell(settings))
    told = {line["sign"]: line for line in lines if line["kind"] == "health"}
    assert {"labels lost", "clusters died"} <= set(told) and told["clusters died"]["text"].startswith("round 2: ")
    assert lines[-1]["kind"] == "health" and (tmp_path / "checkpoints").exists()
    train_locally(corpus, str(tmp_path), sound, settings)
    assert RunDirectory(str(tmp_path)).has_model()


def test_a_second_stage_that_unlearns_ends_at_once(corpus, tmp_path, monkeypatch):
    """Weight decay far beyond the gradients, as the published one is at full size."""
    monkeypatch.setattr(trainer, "LOG_STEPS", 2)
    monkeypatch.setattr(health, "SETTLED_STEPS", 30)
    two = SETTINGS.stage2.changed(weight_decay=10.0, learning_rate=5e-3, iterations=200, merge_after=0, milestones=())
    settings = unwell(SETTINGS.changed(stage1=SETTINGS.stage1.changed(warmup_iterations=0, rounds=0), stage2=two))
    lines: list[dict] = []
    with pytest.raises(Stopped):
        train_locally(corpus, str(tmp_path), local_tools(lines), settings)
    told = [line for line in lines if line["kind"] == "health"]
    last = [line for line in lines if line["kind"] == "step"][-1]
    assert told and told[-1]["ends"] and last["step"] < 60
    assert (tmp_path / "checkpoints" / f"{last['step']:010d}").exists()


def test_a_warning_is_shown_at_once_and_again_in_the_report_and_decides_the_exit_code(tmp_path, capsys):
    watch, metrics = Watch(signs(PRESETS["faces-cpu"][1])), MetricsFile(str(tmp_path))
    (told,) = watch.look({"kind": "round", "round": 2, "clusters_kept": 0.225})
    metrics.write(told.line())
    Show([], 0).line(told.line())
    said = capsys.readouterr().out
    assert said.startswith("warning: round 2: clusters in use are 22% of what they were.") and "--cluster" in said
    (warned,) = seen_on_the_way([told.line(), {"kind": "step"}, told.line()])
    assert warned.text == "While training, round 2: clusters in use are 22% of what they were." and warned.advice
    reason = why_unwell(str(tmp_path))
    assert reason is not None and "without --stop-when-unwell" in reason
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        raise UnwellError(reason)
    assert ended.value.code == 4 and "round 2" in capsys.readouterr().err


def test_refinements_that_set_most_landmarks_back_are_known_at_once():
    watch = Watch(signs(PRESETS["faces-cpu"][1]))
    assert watch.look({"kind": "round", "round": 6, "made_by": "refinement", "set_back_share": 1 / 30}) == []
    (found,) = watch.look({"kind": "round", "round": 7, "made_by": "refinement", "set_back_share": 17 / 30})
    assert found.sign.name == "landmarks set back" and "57%" in found.text and found.sign.ends


def test_a_network_that_answers_places_of_the_view_is_ended_in_its_first_refinement(corpus, tmp_path, monkeypatch):
    """Answers that do not move with the image: after a warp they lie elsewhere on it."""
    constant = np.random.default_rng(0).uniform(60, 200, (1, SETTINGS.cluster.clusters, 2)).astype(np.float32)

    def predicted(model, corpus, shard, settings, warp_seed=None, mirrored=False):
        shift = 0 if warp_seed is None else 40
        points = np.repeat(constant + shift, shard.samples, 0)
        return Predictions(points, np.ones(points.shape[:2], np.float32))

    monkeypatch.setattr("sst.train.extraction.predict_shard", predicted)
    two = SETTINGS.stage2.changed(merge_after=0, refine_rounds=2, refine_radius=6.0)
    lines: list[dict] = []
    with pytest.raises(Unwell):
        train_locally(corpus, str(tmp_path), local_tools(lines), unwell(SETTINGS.changed(stage2=two)))
    assert [line["sign"] for line in lines if line["kind"] == "health"] == ["landmarks set back"]
    record = RunDirectory(str(tmp_path)).records()[-1]
    assert record.metrics["set_back"] == record.metrics["clusters_in_use"] > 0
    before = RunDirectory(str(tmp_path)).records()[-2]
    shard = Corpus.open(corpus).train[0].file
    run = RunDirectory(str(tmp_path))
    kept = np.array(before.active)[run.labels(before, shard).cluster]
    np.testing.assert_array_equal(run.labels(record, shard).points, run.labels(before, shard).points[kept])


def test_figures_that_are_not_numbers_are_no_sign():
    assert Watch(signs(TrainSettings())).look({"kind": "round", "round": 2, "labels_kept": float(np.nan)}) == []


class Here:
    """The k-means actor without Ray: in this process, its methods called as those of an actor."""

    def __init__(self) -> None:
        self.actor = KMeansActor()

    def __getattr__(self, name: str):
        return SimpleNamespace(remote=getattr(self.actor, name))


@pytest.mark.parametrize("when", ["at the start", "in a fit"])
def test_a_cuml_that_cannot_work_is_said_once_where_people_look(when, monkeypatch, tmp_path, capsys):
    """The actor's own log is in a file of Ray's that nobody opens."""

    def fail(*given):
        raise CumlError("bad_alloc")

    monkeypatch.setattr(ray, "get", lambda value, timeout=None: value)
    monkeypatch.setattr(rapids, "_given_up", [])
    monkeypatch.setattr(rapids, "gpu_here", lambda: True)
    monkeypatch.setattr(rapids, "obstacle", lambda several=False: "bad_alloc" if when == "at the start" else None)
    monkeypatch.setattr(rapids, "fit_alone", fail)
    url, rows, lines = f"{tmp_path}/0.npz", np.random.default_rng(0).normal(size=(20, 4)), []
    Descriptors(np.array([0, 20]), np.zeros((20, 2), np.float32), rows.astype(np.float16)).save(url)
    actor, settings = Here(), TrainSettings()
    kmeans_backend(actor, settings, lines.append)
    assert len(lines) == (when == "at the start")
    fit = ray_tools(settings, actor, lines.append).fit
    for _ in range(2):
        assert fit([(url, np.arange(20))], KMeansSettings(3)).backend == "torch"
    (line,) = lines
    Show([], 0).line(line)
    assert "bad_alloc" in capsys.readouterr().out and "bad_alloc" in seen_on_the_way(lines)[0].text
    MetricsFile(str(tmp_path)).write(line)
    assert why_unwell(str(tmp_path)) is None
