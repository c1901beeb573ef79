"""How many workers a run takes, and on what: a table of machines, laws, and Ray's own placing on declared GPUs."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.dispatch import RayMap
from sst.config import ClusterSettings, ResourceSettings, TrainSettings
from sst.errors import UserError
from sst.presets import PRESETS
from sst.run.distributed import TASK_CPUS, detector_gpus, kmeans_gpus
from sst.run.placement import Machine, place, place_trial
from sst.run.ray_cluster import machine_of
from sst.tune.sweep import room_for
from tests.small import SETTINGS


def told(workers="auto", gpu=None, **more) -> TrainSettings:
    return TrainSettings(resources=ResourceSettings(workers=workers, gpu=gpu, **more))


TABLE = [
    # CPUs, GPUs, workers, gpu: workers and device, or what the error says; what the warning says
    (2, 0, "auto", None, "2 CPU", None),
    (16, 0, "auto", None, "8 CPU", None),
    (64, 0, "auto", None, "8 CPU", None),
    (2, 0, "1", None, "1 CPU", None),
    (2, 0, "2", None, "2 CPU", None),
    (2, 0, "2:8", None, "2:8 CPU", None),
    (2, 0, "4", None, "4 workers with 0.9 CPUs each were asked for, but the cluster has 2", None),
    (16, 0, "auto", True, "this cluster has no GPU: leave out --resources.gpu to train on CPUs", None),
    (16, 0, "2:8", True, "GPUs for 2 workers were asked for, and this cluster has no GPU", None),
    (16, 0, "2", False, "2 CPU", None),
    (16, 1, "auto", None, "1 GPU", None),
    (2, 1, "auto", None, "1 GPU", None),
    (16, 1, "auto", True, "1 GPU", None),
    (16, 1, "1", None, "1 GPU", None),
    (16, 1, "2", None, "this cluster has 1 GPU: take --workers 1 or auto, or --resources.gpu False to train", None),
    (16, 1, "2:8", None, "this cluster has 1 GPU: take --workers 1 or auto", None),
    (16, 1, "2", True, "this cluster has 1 GPU: take --workers 1 or auto", None),
    (16, 1, "auto", False, "8 CPU", "1 GPU of this cluster stays idle: --resources.gpu False"),
    (16, 1, "2", False, "2 CPU", "1 GPU of this cluster stays idle"),
    (16, 2, "auto", None, "2 GPU", None),
    (16, 2, "2:8", None, "2:8 GPU", None),
    (2, 2, "2:8", None, "2:8 GPU", None),
    (16, 2, "auto", False, "8 CPU", "2 GPUs of this cluster stay idle"),
    (64, 8, "auto", None, "8 GPU", None),
    (64, 8, "auto", True, "8 GPU", None),
    (64, 8, "2", None, "2 GPU", None),
    (64, 8, "9", None, "this cluster has 8 GPUs: take --workers 8 or auto", None),
    (2, 8, "auto", None, "2 GPU", "2 of 8 GPUs are used: the machines' CPUs"),
    (64, 16, "auto", None, "8 GPU", "8 of 16 GPUs are used: stage1.pairs 16 and stage2.batch 64"),
]


@pytest.mark.parametrize(("cpus", "gpus", "workers", "gpu", "expected", "warned"), TABLE)
def test_what_a_machine_gets(cpus, gpus, workers, gpu, expected, warned):
    settings = (
        told(workers, gpu)
        if workers != "9"
        else PRESETS["celeba"][1].model_copy(
            update={
                "stage1": TrainSettings().stage1.model_copy(update={"pairs": 18}),
                "resources": ResourceSettings(workers=workers, gpu=gpu),
            }
        )
    )
    try:
        placed = place(settings, [Machine(cpus, gpus, 500.0)])
    except UserError as error:
        assert expected in str(error)
        return
    assert f"{placed.workers} {'GPU' if placed.gpu else 'CPU'}" == expected
    assert (placed.warning is None) if warned is None else warned in placed.warning
    device = "GPU" if placed.gpu else "CPUs"
    assert device in placed.said and placed.workers.replace(":", " to ") in placed.said
    assert ("auto" in placed.said) == (workers == "auto")


machines = st.lists(
    st.builds(Machine, st.integers(1, 64), st.integers(0, 8), st.floats(1.0, 900.0)), min_size=1, max_size=5
)


@given(
    machines,
    st.sampled_from(["auto", "1", "2", "2:8"]),
    st.sampled_from([None, True, False]),
    st.integers(2, 64),
    st.booleans(),
)
def test_a_gpu_is_never_passed_over_in_silence_and_auto_always_fits(found, workers, gpu, pairs, joined):
    stage1 = TrainSettings().stage1.model_copy(update={"pairs": max(pairs, 16 if workers == "2:8" else 4)})
    settings = told(workers, gpu).model_copy(update={"stage1": stage1})
    gpus, cpus = sum(m.gpus for m in found), sum(m.cpus for m in found)
    try:
        placed = place(settings, found, joined)
    except UserError as error:
        assert workers != "auto" or (gpu and not gpus)
        assert "lower" in str(error) or "take --workers" in str(error) or "leave out" in str(error)
        return
    settled = settings.with_workers(placed.workers)  # refuses batches that are too small
    if gpus and not placed.gpu:
        assert gpu is False and placed.warning
    if workers == "auto" and placed.gpu and gpus:
        assert settled.resources.max_workers <= min(gpus, cpus / 0.9)
    if workers == "auto" and not placed.gpu:
        assert settled.resources.max_workers <= min(cpus, 8)
    assert ("waits" in (placed.warning or "")) <= bool(joined and gpu)


def test_workers_have_their_gpu_and_cpus_on_one_machine():
    head, box = Machine(32, 0, 100.0), Machine(1, 4, 100.0)
    placed = place(told(), [head, box])
    assert placed.workers == "1" and "CPUs" in placed.warning
    assert place(told(), [Machine(8, 1, 30.0)] * 3).workers == "3"
    with pytest.raises(UserError, match="no worker fits on 1 GPU: each needs 0.9 of one"):
        place(told(), [head, Machine(0, 1, 30.0)])


def test_kmeans_finds_its_share_of_a_gpu():
    with pytest.raises(UserError, match="k-means with 0.2 of one"):
        place(told(kmeans_gpus=0.2), [Machine(16, 1, 100.0)])
    assert place(told(kmeans_gpus=1.0), [Machine(16, 8, 100.0)]).workers == "7"
    assert place(told(worker_gpus=0.4), [Machine(16, 2, 100.0)]).workers == "2"
    assert place(told("4", worker_gpus=0.4), [Machine(16, 2, 100.0)]).workers == "4"
    pool = told("2").model_copy(update={"cluster": ClusterSettings(actors=3)})
    with pytest.raises(UserError, match="lower --cluster.actors to 2"):
        place(pool, [Machine(16, 8, 100.0)])
    shared = told(worker_gpus=0.5).model_copy(update={"cluster": ClusterSettings(actors=2)})
    with pytest.raises(UserError, match="raise --resources.kmeans-gpus to 0.5"):
        place(shared, [Machine(16, 2, 100.0)])


def test_memory_bounds_what_auto_takes_on_cpus_but_refuses_nothing():
    for memory, workers in ((9.5, "4"), (6.5, "2"), (3.0, "1"), (600.0, "8")):
        assert place(told(), [Machine(64, 0, memory)]).workers == workers


def test_gpus_that_a_cluster_brings_when_asked_for_are_waited_for():
    head = [Machine(4, 0, 16.0)]
    waiting = place(told("2:8", True), head, joined=True)
    assert (waiting.workers, waiting.gpu) == ("2:8", True) and "waits until its autoscaler" in waiting.warning
    assert place(told("auto", True), head, joined=True).workers == "1:8"
    assert "--resources.gpu True waits for one" in place(told(), head, joined=True).said


def test_trials_of_a_sweep_stand_side_by_side():
    box = [Machine(64, 8, 500.0)]
    trial = place_trial(told(), box)
    assert (trial.workers, trial.gpu) == ("1", True) and room_for(told("1"), box, True) == 8
    assert place_trial(told(), [Machine(16, 0, 500.0)]).workers == "2"
    assert place_trial(told("4"), box).workers == "4" and room_for(told("4"), box, True) == 2
    assert room_for(told("2"), [Machine(16, 0, 500.0)], False) == 8


def test_a_small_batch_bounds_what_auto_takes():
    assert SETTINGS.stage1.pairs == 4
    auto = SETTINGS.with_workers("auto")
    assert place(auto, [Machine(16, 0, 500.0)]).workers == "2"
    with pytest.raises(ValueError, match="at least 2 per worker, and there may be 3"):
        auto.with_workers("3")


def with_keypoints(settings: TrainSettings, detector: str) -> TrainSettings:
    return settings.changed(keypoints=settings.keypoints.changed(detector=detector))


def test_a_network_seeks_first_keypoints_on_a_gpu_where_kmeans_leaves_room():
    network = with_keypoints(told(), "transformers")
    assert 0 < detector_gpus(network, gpu=True) <= 1 - kmeans_gpus(network, alone=True)
    assert detector_gpus(network, gpu=False) == detector_gpus(with_keypoints(told(), "rootsift"), gpu=True) == 0
    assert detector_gpus(with_keypoints(told(kmeans_gpus=0.9), "transformers"), gpu=True) == 0


def test_ray_places_workers_and_kmeans_on_the_gpus_that_are_there():
    """GPUs are declared, not there: two workers, an actor beside them, a pool before and among them."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    ray.shutdown()
    ray.init(address="local", num_cpus=2, num_gpus=2, log_to_driver=False)
    try:
        (machine,) = [machine_of(node["Resources"]) for node in ray.nodes()]
        assert (machine.cpus, machine.gpus) == (2, 2) and 0.1 < machine.memory_gb < 10_000
        alone = told().model_copy(update={"cluster": ClusterSettings(actors=1)})
        pool = told().model_copy(update={"cluster": ClusterSettings(actors=2)})
        assert place(pool, [machine]).workers == "2"

        @ray.remote(num_cpus=0)
        class Member:
            def gpus(self):
                return ray.get_gpu_ids()

        def members(share, number):
            held = [Member.options(num_gpus=share).remote() for _ in range(number)]
            return held, [each for own in ray.get([m.gpus.remote() for m in held], timeout=60) for each in own]

        before, found = members(kmeans_gpus(pool, alone=True), 2)
        assert sorted(found) == [0, 1]  # with their share beside workers Ray would put both on GPU 0
        for each in before:
            ray.kill(each)
        (actor,), _ = members(kmeans_gpus(alone, alone=False), 1)  # is there before the workers
        share = detector_gpus(with_keypoints(alone, "superpoint"), gpu=True)
        seen = RayMap(TASK_CPUS, num_gpus=share)(os.getenv, [("CUDA_VISIBLE_DEVICES",)] * 3)
        assert set(seen) <= {"0", "1"}
        workers = [{"CPU": alone.resources.worker_cpus, "GPU": alone.resources.worker_gpus}] * 2
        group = placement_group(workers)
        assert group.wait(30)
        remove_placement_group(group)
        ray.kill(actor)
        assert placement_group(workers).wait(30)
        _, among = members(kmeans_gpus(pool, alone=False), 2)
        assert sorted(among) == [0, 1]
    finally:
        ray.shutdown()
