"""Where a run trains: how many workers, and on GPUs or CPUs, as a function of what the cluster has and what was asked.

A GPU is never passed over in silence: what was asked for and does not fit on the GPUs is an error with the remedy, and
CPUs beside a GPU are a warning.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sst.config import TrainSettings
from sst.errors import UserError

WORKER_GB, REST_GB = 1.6, 2.8
"""Memory of a CPU worker in float32 over all rounds and mergings, and of all else (driver, Ray, k-means, tasks on two
cores), with `faces-cpu` (benchmarks/RESULTS.md)."""

MAX_ON_CPUS = 8
"""Workers that auto takes on CPUs: each more has fewer images of a step of 16 pairs, and 8 have two pairs each."""

TRIAL_ON_CPUS = 2
"""Workers that auto gives a trial of a sweep on CPUs; further cores are for further trials."""


@dataclass(frozen=True)
class Machine:
    """What a machine has to train with.

    Attributes:
        cpus: cores that may be used.
        gpus: CUDA devices.
        memory_gb: memory that was free when its share in the cluster began, or is free now.
    """

    cpus: float
    gpus: float
    memory_gb: float = math.inf


@dataclass(frozen=True)
class Placement:
    """What was decided.

    Attributes:
        workers: "4", or "2:8" if it may change.
        gpu: whether they train on GPUs.
        said: the decision with its reason, for the line in which a run says how it works.
        warning: what the user may not have meant, with cause and remedy.
    """

    workers: str
    gpu: bool
    said: str
    warning: str | None = None


def place(settings: TrainSettings, machines: Sequence[Machine], joined: bool = False) -> Placement:
    """Decides for a run.

    Args:
        settings: of the run; its resources are what was asked, its batches bound what auto takes.
        machines: of the cluster, as it is now.
        joined: whether the cluster was there before the run, so that it may grow when asked to.

    Raises:
        UserError: if what was asked does not fit; the message has both numbers and what to do.
    """
    asked, gpus = settings.resources, sum(int(machine.gpus) for machine in machines)
    if asked.gpu and joined and gpu_room(settings, machines) < asked.min_workers:
        return _to_come(settings, gpus)
    if asked.gpu or (asked.gpu is None and gpus):
        return _on_gpus(settings, machines, gpus)
    placed = _on_cpus(settings, machines)
    if gpus:
        warning = (
            f"{_gpus(gpus)} of this cluster stay{'s' if gpus == 1 else ''} idle: --resources.gpu False trains on CPUs, "
            "many times more slowly; leave it out to train on GPUs"
        )
        return Placement(placed.workers, False, placed.said, warning)
    later = "; the cluster has no GPU now, and --resources.gpu True waits for one" if joined else ""
    return Placement(placed.workers, False, placed.said + later)


def place_trial(settings: TrainSettings, machines: Sequence[Machine], joined: bool = False) -> Placement:
    """Decides for each trial of a sweep: with auto a GPU each, since trials need not wait for each other."""
    placed = place(settings, machines, joined)
    if settings.resources.workers != "auto":
        return placed
    workers = 1 if placed.gpu else min(TRIAL_ON_CPUS, int(placed.workers))
    return Placement(str(workers), placed.gpu, f"{workers} for each trial", placed.warning)


def gpu_room(settings: TrainSettings, machines: Sequence[Machine]) -> int:
    """Workers that find a GPU and CPUs on one machine, while k-means has its share of a GPU too."""
    item = settings.resources
    each = _per_gpu(item.worker_gpus)
    room = sum(min(int(machine.gpus) * each, _fits(machine.cpus, item.worker_cpus)) for machine in machines)
    return max(0, room - _lost_to_kmeans(settings, sum(int(machine.gpus) for machine in machines)))


def cpu_workers(cpus: int, memory_gb: float) -> int:
    """A power of two up to 8: as many as there are cores, with memory for a worker each; 0 if there is none for one."""
    fitting = min(cpus, int((memory_gb - REST_GB) / WORKER_GB) if memory_gb < math.inf else cpus)
    return 2 ** min(int(math.log2(MAX_ON_CPUS)), int(math.log2(fitting))) if fitting >= 1 else 0


def _on_gpus(settings: TrainSettings, machines: Sequence[Machine], gpus: int) -> Placement:
    asked, room = settings.resources, gpu_room(settings, machines)
    is_auto = asked.workers == "auto"
    if room < asked.min_workers:
        raise UserError(_too_few(settings, gpus, room))
    if not is_auto:
        _check_pool(settings, asked.min_workers)
        number = "worker" if asked.workers == "1" else "workers"
        return Placement(asked.workers, True, f"{asked.workers.replace(':', ' to ')} {number} on {_gpus(gpus)}")
    one_each = min(gpus, room)
    workers = min(one_each, settings.workers_for_batch)
    _check_pool(settings, workers)
    of = "" if workers == gpus else f"{workers} of "
    said = f"{workers} worker{'' if workers == 1 else 's'} on {of}{_gpus(gpus)} (auto: one on each)"
    warning = None
    if workers < one_each:
        warning = (
            f"{workers} of {_gpus(gpus)} are used: stage1.pairs {settings.stage1.pairs} and stage2.batch "
            f"{settings.stage2.batch} are too small for more workers; raise them to use all"
        )
    elif room < gpus * _per_gpu(asked.worker_gpus) - _lost_to_kmeans(settings, gpus):
        warning = (
            f"{workers} of {_gpus(gpus)} are used: the machines' CPUs do for no more workers with "
            f"{asked.worker_cpus:g} CPUs each; lower --resources.worker-cpus"
        )
    return Placement(str(workers), True, said, warning)


def _to_come(settings: TrainSettings, gpus: int) -> Placement:
    """The GPUs are not there yet; Ray tells the cluster's autoscaler what is waited for."""
    asked = settings.resources
    workers = f"1:{settings.workers_for_batch}" if asked.workers == "auto" else asked.workers
    minimum = workers.partition(":")[0]
    warning = (
        f"the cluster has {_gpus(gpus)} now, too few for {minimum} workers: the run waits until its autoscaler has "
        "brought more machines. If it has none that do, stop, and lower --workers or leave out --resources.gpu"
    )
    return Placement(workers, True, f"{workers.replace(':', ' to ')} workers on GPUs that are waited for", warning)


def _on_cpus(settings: TrainSettings, machines: Sequence[Machine]) -> Placement:
    asked = settings.resources
    room = sum(_fits(machine.cpus, asked.worker_cpus) for machine in machines)
    if asked.min_workers > room:
        cpus = sum(machine.cpus for machine in machines)
        raise UserError(
            f"{asked.min_workers} workers with {asked.worker_cpus:g} CPUs each were asked for, but the cluster has "
            f"{cpus:g}; lower --workers or --resources.worker-cpus"
        )
    if asked.workers != "auto":
        number = "worker" if asked.workers == "1" else "workers"
        return Placement(asked.workers, False, f"{asked.workers.replace(':', ' to ')} {number} on CPUs")
    cores, memory = int(sum(machine.cpus for machine in machines)), sum(machine.memory_gb for machine in machines)
    # A run that was begun is not refused for want of memory: what is free is only an estimate.
    workers = max(1, min(room, cpu_workers(cores, memory), settings.workers_for_batch))
    why = f"auto: one for each of {cores} cores, at most {MAX_ON_CPUS}, as memory and batch permit"
    return Placement(str(workers), False, f"{workers} worker{'' if workers == 1 else 's'} on CPUs ({why})")


def _too_few(settings: TrainSettings, gpus: int, room: int) -> str:
    """What to say when what was asked does not fit on the GPUs."""
    asked, workers = settings.resources, settings.resources.min_workers
    if gpus and not room:
        return (
            f"no worker fits on {_gpus(gpus)}: each needs {asked.worker_gpus:g} of one (--resources.worker-gpus) and "
            f"{asked.worker_cpus:g} CPUs on the same machine (--resources.worker-cpus), beside k-means with "
            f"{asked.kmeans_gpus:g} of one (--resources.kmeans-gpus); lower one of these, or take --resources.gpu "
            "False to train on CPUs"
        )
    asked_for = f"{workers} workers" if workers > 1 else "a worker"
    room_for = f", with room for {room}" if gpus != room else ""
    remedy = (
        f"take --workers {room} or auto, or --resources.gpu False to train on CPUs"
        if room
        else "leave out --resources.gpu to train on CPUs"
    )
    return f"GPUs for {asked_for} were asked for, and this cluster has {_gpus(gpus)}{room_for}: {remedy}"


def _check_pool(settings: TrainSettings, workers: int) -> None:
    """Refuses a k-means of several actors that would not have a GPU each: NCCL takes no two members on one.

    Ray puts a share of a GPU where least is left, which is beside a worker.
    """
    actors, resources = settings.cluster.actors, settings.resources
    if actors == 1 or resources.kmeans_gpus > 0.5:
        return
    if 2 * resources.kmeans_gpus <= 1 - resources.worker_gpus:
        raise UserError(
            f"cluster.actors {actors}: two with {resources.kmeans_gpus:g} of a GPU each could meet on that of a worker "
            f"with {resources.worker_gpus:g}, and each needs a GPU of its own; raise --resources.kmeans-gpus to "
            f"{1 - resources.worker_gpus:g}"
        )
    if actors > workers:
        raise UserError(
            f"cluster.actors {actors}: each takes its share of the GPU of one worker, and there are {workers} workers; "
            f"lower --cluster.actors to {workers}"
        )


def _lost_to_kmeans(settings: TrainSettings, gpus: int) -> int:
    """Workers that have no room since k-means has its share of some GPUs."""
    resources = settings.resources
    with_kmeans = _fits(1 - resources.kmeans_gpus, resources.worker_gpus)
    return min(gpus, settings.cluster.actors) * (_per_gpu(resources.worker_gpus) - with_kmeans)


def _per_gpu(share: float) -> int:
    return _fits(1.0, share)


def _fits(has: float, each: float) -> int:
    return int(has / each + 1e-6)  # Ray counts in 1e-4, so that 0.1 and 0.9 fit into 1


def _gpus(number: int) -> str:
    return "no GPU" if not number else f"{number} GPU{'' if number == 1 else 's'}"
