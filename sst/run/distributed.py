"""Where a run meets Ray: the k-means actor, the shard tasks and the DDP worker group.

Thin shells: what they call is plain code that tests run without Ray.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from cluster.actor import start_actor
from cluster.correspondence import Sample
from cluster.dispatch import TRIES, HangError, RayMap
from cluster.kmeans import KMeansResult, KMeansSettings
from sst.config import TrainSettings
from sst.environment import usable_cpus
from sst.errors import Leaving, RunFailedError, Stopped, UnwellError, UserError
from sst.run.interrupt import FailureNote, StopFlag, run_stoppably
from sst.run.metrics import MetricsReader
from sst.run.watchdog import RemoteRoll, Watchdog, start_attendance
from sst.train.health import without_cuml
from sst.train.run_directory import RunDirectory
from sst.train.tools import Tools

TASK_CPUS = 0.05
"""CPUs that Ray sets aside for a shard task; how many run at once is bounded by `RayMap`."""


LEAVING = "leaving"
"""What workers return that ended at the notice that a machine is about to be taken away."""

CHECK_SECONDS = 10.0
"""Time between two looks at whether the workers still give signs of life."""

GROUP_SECONDS = 300.0
"""Time in which Ray may start the workers."""

ALONE_GPUS = 0.6
"""Share of a GPU beside which there is no room for another of the same size."""

NETWORK_PATIENCE = 4
"""So much longer may a shard take in which a network seeks first keypoints, perhaps on a CPU."""

DETECTOR_GPUS = 0.2
"""Share of a GPU of a task that seeks first keypoints by a network: while four of them see images, none waits for one
that reads and decodes, and k-means keeps its place."""


def ray_tools(
    settings: TrainSettings,
    actor: Any,
    log: Callable[[dict[str, Any]], None],
    num_gpus: float = 0.0,
    at: Callable[[str], None] = lambda place: None,
) -> Tools:
    """Tools that run k-means in the actor and shards as tasks; progress names a pass by what it does with a shard.

    Args:
        settings: of the run.
        actor: runs k-means.
        log: takes one line of metrics.
        num_gpus: share of a GPU for each task that seeks first keypoints.
        at: takes where this process is; see `Tools`.
    """
    import ray

    patience = settings.resources.patience

    def warn(text: str) -> None:
        log({"kind": "hang", "text": text})

    def ask(method: str, *given: Any) -> Any:
        return answer(actor, method, patience, given, at, warn)

    def fit(sample: Sample, asked: KMeansSettings) -> KMeansResult:
        before = ask("given_up")
        try:
            result: KMeansResult = ask("fit", list(sample), asked)
        except ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        reason = ask("given_up")
        if reason and not before:
            log(without_cuml(reason))
        return result

    def progress(function: str, done: int, total: int) -> None:
        what = " ".join(word for word in function.split("_") if word not in ("", "shard", "task"))
        log({"kind": "shards", "what": what, "done": done, "total": total})

    return Tools(
        fit,
        RayMap(TASK_CPUS, progress, patience=patience, warn=warn),
        log,
        at=at,
        detect_on_shards=RayMap(TASK_CPUS, progress, num_gpus, NETWORK_PATIENCE * patience, warn),
    )


def answer(
    actor: Any,
    method: str,
    patience: float,
    given: Sequence[Any],
    at: Callable[[str], None],
    warn: Callable[[str], None],
) -> Any:
    """What a method of the k-means actor returns; if it does not in time, it is killed, and Ray starts it again.

    Args:
        actor: the handle.
        method: its name.
        patience: seconds.
        given: arguments.
        at: takes where this process is.
        warn: takes what is said when the actor is killed.

    Raises:
        HangError: if it does not answer, three times over.
        ray.exceptions.RayTaskError: what the method raises.
    """
    import ray

    said = f"k-means gave no answer ({method}) for {patience:.0f} s"
    for _ in range(TRIES):
        at(f"waiting for k-means ({method})")
        try:
            return ray.get(getattr(actor, method).remote(*given), timeout=patience)
        except ray.exceptions.GetTimeoutError:
            warn(f"{said}; it is started again")
            ray.kill(actor, no_restart=False)
    raise HangError(f"{said}, {TRIES} times over")


def detector_gpus(settings: TrainSettings, gpu: bool) -> float:
    """Share of a GPU for each task that seeks first keypoints: for networks, where k-means leaves room.

    Args:
        settings: of the run.
        gpu: whether the workers, of whom there are none yet, train on GPUs.
    """
    room = kmeans_gpus(settings, alone=True) <= 1 - DETECTOR_GPUS
    return DETECTOR_GPUS if gpu and room and settings.keypoints.detector != "rootsift" else 0.0


def start_kmeans(settings: TrainSettings, gpu: bool, alone: bool = False) -> Any:
    """Starts the run's k-means actor; it takes no CPU of its own, since it works while the workers wait.

    Args:
        settings: of the run.
        gpu: whether the workers train on GPUs.
        alone: whether there are no workers yet.
    """
    return start_actor(
        num_gpus=kmeans_gpus(settings, alone) if gpu else 0.0, num_cpus=0, members=settings.cluster.actors
    )


def kmeans_gpus(settings: TrainSettings, alone: bool) -> float:
    """Share of a GPU for each k-means actor.

    Several need a GPU each. Beside workers there is no room for two on one; without workers Ray would put small shares
    together, so there they ask for more than half.
    """
    each = settings.resources.kmeans_gpus
    return max(each, ALONE_GPUS) if alone and settings.cluster.actors > 1 else each


def beside_workers(actor: Any, settings: TrainSettings, gpu: bool) -> Any:
    """The k-means actor for the time when workers train; another one if `kmeans_gpus` differ."""
    if not gpu or kmeans_gpus(settings, True) == kmeans_gpus(settings, False):
        return actor
    import ray

    ray.kill(actor)
    return start_kmeans(settings, gpu)


def kmeans_backend(actor: Any, settings: TrainSettings, log: Callable[[dict[str, Any]], None]) -> str:
    """What runs k-means: "cuml" or "torch"; why the latter beside a GPU is a line of metrics.

    Raises:
        UserError: if cuml is asked for where it cannot run.
    """
    import ray

    try:
        backend = str(ray.get(actor.backend.remote(settings.cluster.backend)))
    except ray.exceptions.RayTaskError as error:
        raise UserError(str(error.cause)) from None
    if reason := ray.get(actor.given_up.remote()):
        log(without_cuml(reason))
    return backend


def train_on_workers(settings: TrainSettings, corpus_url: str, run_url: str, actor: Any, gpu: bool) -> None:
    """Trains by DDP on the running cluster, to the end; needs round 0.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when the workers have saved and ended; see `sst.run.interrupt`.
        RunFailedError: if more workers were lost than `max_failures`, or a worker raised; the message is its own.
        UnwellError: if the run ended itself at a sign that it comes to nothing.
    """
    import ray
    import ray.train

    attendance = start_attendance()
    roll, note, stop = RemoteRoll(attendance), FailureNote(run_url), StopFlag(run_url)
    note.take()
    limit = 2 * 60 * settings.resources.hang_minutes + GROUP_SECONDS
    needed = {name: settings.resources.min_workers * each for name, each in of_a_worker(settings, gpu).items()}

    def has_room() -> bool:
        present = ray.cluster_resources()
        return all(present.get(name, 0.0) >= number for name, number in needed.items())

    leaves: Any = True
    while leaves:  # at the notice that a machine is about to be taken away: the workers have saved and ended
        trainer = trainer_of(settings, corpus_url, run_url, actor, attendance, gpu)
        try:
            leaves = run_stoppably(trainer.fit, stop, SilenceCheck(roll, limit, has_room)).return_value == LEAVING
        except ray.train.TrainingFailedError as error:
            raise RunFailedError(note.take() or "\n".join([*hangs(roll), str(error)])) from None
    if RunDirectory(run_url).has_model():
        return
    if failed := note.take():
        raise RunFailedError(failed)
    if said := why_unwell(run_url):
        raise UnwellError(said)


def of_a_worker(settings: TrainSettings, gpu: bool) -> dict[str, float]:
    """What Ray sets aside for each worker."""
    resources = settings.resources
    return {"CPU": resources.worker_cpus} | ({"GPU": resources.worker_gpus} if gpu else {})


def trainer_of(settings: TrainSettings, corpus_url: str, run_url: str, actor: Any, attendance: Any, gpu: bool) -> Any:
    """The `TorchTrainer` whose workers train what is left of the run."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = settings.resources
    minimum, maximum = resources.min_workers, resources.max_workers
    number: Any = minimum if minimum == maximum else (minimum, maximum)  # a pair makes Ray Train elastic
    return TorchTrainer(
        train_loop_per_worker,  # type: ignore[arg-type]
        train_loop_config={
            "settings": settings.model_dump(),
            "corpus": corpus_url,
            "run": run_url,
            "kmeans": actor,
            "attendance": attendance,
        },
        scaling_config=ScalingConfig(num_workers=number, use_gpu=gpu, resources_per_worker=of_a_worker(settings, gpu)),
        run_config=RunConfig(
            name="ray",
            storage_path=run_url,
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=resources.max_failures, controller_failure_limit=3
            ),
        ),
    )


class SilenceCheck:
    """Ends a run whose workers do not even begin, as when a cable is cut while they are started.

    The time in which the cluster has no room for them, and waits for machines, does not count.
    """

    def __init__(self, roll: RemoteRoll, limit: float, has_room: Callable[[], bool]) -> None:
        """Takes what workers report to, the seconds in which there may be nothing, and what says if there is room."""
        self._roll, self._limit, self._has_room = roll, limit, has_room
        self._next, self._excused = time.monotonic() + CHECK_SECONDS, 0.0

    def __call__(self) -> None:
        """Looks, every few seconds.

        Raises:
            RunFailedError: if there was nothing for too long.
        """
        import ray

        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + CHECK_SECONDS
        try:
            quiet = self._roll.quiet()
        except (ray.exceptions.RayError, TimeoutError):
            return
        self._excused = min(self._excused, quiet) if self._has_room() else quiet
        if quiet - self._excused > self._limit:
            raise RunFailedError(f"the workers have given no sign of life for {quiet:.0f} s; is a machine unreachable?")


def hangs(roll: RemoteRoll) -> list[str]:
    """The hangs that nobody has told of yet; none if the attendance is gone."""
    import ray

    try:
        return roll.take()
    except (ray.exceptions.RayError, TimeoutError):
        return []


def why_unwell(run_url: str) -> str | None:
    """The last sign for which a run may have ended itself, with what to do about it."""
    lines = [line for line in MetricsReader(run_url).new_lines() if line["kind"] == "health" and line["ends"]]
    if not lines:
        return None
    return (
        f"{lines[-1]['text']} {lines[-1]['advice']} The same command without --stop-when-unwell goes on from the last "
        "checkpoint; with other settings take another --name."
    )


def train_loop_per_worker(config: dict[str, Any]) -> str | None:
    """What each worker of the `TorchTrainer` runs.

    Returns:
        `LEAVING` if it saved and ended since a machine is about to be taken away.
    """
    import ray
    import ray.train
    import ray.train.torch
    import torch

    from sst.data.corpus import Corpus
    from sst.nn.precision import keep_freed_memory
    from sst.run.metrics import MetricsFile
    from sst.train.finish import Finisher
    from sst.train.trainer import Trainer
    from sst.train.workers import Group

    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, usable_cpus() // context.get_local_world_size()))
        keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # every step has the same shapes, so looking for the fastest form pays
    settings = TrainSettings.model_validate(config["settings"])
    group = Group(context.get_world_rank(), context.get_world_size(), device)
    metrics, roll = MetricsFile(config["run"]) if group.rank == 0 else None, RemoteRoll(config["attendance"])
    watchdog = Watchdog(group.rank, group.world, 60 * settings.resources.hang_minutes, roll)

    def log(line: dict[str, Any]) -> None:
        if line["kind"] == "shards":
            watchdog.at(f"after {line['what']} of {line['done']}/{line['total']} shards")
        if metrics:
            metrics.write(line)

    for text in hangs(roll) if metrics else ():
        log({"kind": "hang", "text": text})
    tools = replace(
        ray_tools(settings, config["kmeans"], log, at=watchdog.at),
        stop=StopFlag(config["run"]).is_up,
        leaving=lambda: ray.train.get_preemption_info() is not None,
    )
    corpus, run = Corpus.open(config["corpus"]), RunDirectory(config["run"])
    trainer, note = Trainer(settings, corpus, run, group, tools), FailureNote(config["run"])
    if note.read() is not None:
        return None
    try:
        with watchdog:
            network = trainer()
            Finisher(trainer.settings, corpus, run, group, tools)(network, run.records()[-1])
    except Leaving:
        return LEAVING
    except Stopped:
        pass  # a failure would be a reason to start again
    except (ValueError, FloatingPointError) as error:
        note.write(error)
        raise
    return None
