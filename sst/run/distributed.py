"""Where a run meets Ray: the k-means actor, the shard tasks and the DDP worker group.

Thin shells: what they call is plain code that tests run without Ray.
"""

import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from cluster.actor import start_actor
from cluster.correspondence import Sample
from cluster.dispatch import RayMap
from cluster.kmeans import KMeansResult, KMeansSettings
from sst.config import ResourceSettings, TrainSettings
from sst.environment import RAY_ENVIRONMENT, set_environment, usable_cpus
from sst.errors import RunFailedError, Stopped, UnwellError, UserError
from sst.run.interrupt import FailureNote, StopFlag, run_stoppably
from sst.run.metrics import MetricsReader
from sst.run.placement import Machine
from sst.train.health import without_cuml
from sst.train.run_directory import RunDirectory
from sst.train.tools import Tools

TASK_CPUS = 0.05
"""CPUs that Ray sets aside for a shard task; how many run at once is bounded by `RayMap`."""


CLUSTER_SECONDS = 15.0
"""How long a cluster may take to answer at all."""

MAX_TMPDIR = 40
"""Bytes of TMPDIR for which the paths of Ray's sockets, some 65 bytes longer, stay within the system's 107."""

ALONE_GPUS = 0.6
"""Share of a GPU beside which there is no room for another of the same size."""

DETECTOR_GPUS = 0.2
"""Share of a GPU of a task that seeks first keypoints by a network: while four of them see images, none waits for one
that reads and decodes, and k-means keeps its place."""


def start_ray() -> list[Machine]:
    """Joins the cluster of `RAY_ADDRESS` or of the submitted job, or starts one on this machine.

    Returns:
        Its machines, for `sst.run.placement.place`.
    """
    # For a cluster that is started here. Task processes stay for the next round: a new one takes seconds to load torch,
    # and Ray would end them after one second in which workers hold the CPUs.
    set_environment(RAY_ENVIRONMENT | {"RAY_num_workers_soft_limit": str(usable_cpus())})
    joins = joins_cluster()
    if joins:
        check_cluster(os.environ["RAY_ADDRESS"])
    if not joins and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        # Ray's own servers listen on every interface; without this token nobody else can use them. Ray reads both
        # when it is imported, so whoever has imported it has decided.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    if not ray.is_initialized():
        with nullcontext() if joins else started_here():
            # Without an address Ray would join whatever cluster last ran on this machine.
            where: dict[str, Any] = {} if joins else {"address": "local", "num_cpus": usable_cpus()}
            try:
                ray.init(logging_level=logging.WARNING, log_to_driver=False, **where)
            except ConnectionError as error:
                raise UserError(f"{no_cluster(os.environ.get('RAY_ADDRESS', 'local'))} ({error})") from error
    return [machine_of(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def joins_cluster() -> bool:
    """Whether the cluster is there before the run."""
    return bool(os.environ.get("RAY_ADDRESS"))


def no_cluster(address: str) -> str:
    """What to say of a cluster that does not answer."""
    return (
        f"no Ray cluster answers at RAY_ADDRESS={address}; start it again or correct the address, or unset RAY_ADDRESS "
        "to train on this machine alone"
    )


def check_cluster(address: str) -> None:
    """Asks the cluster for a sign of life, for which Ray itself would wait for ten minutes in silence.

    Args:
        address: as RAY_ADDRESS has it; one without a port, as "local", is not asked.

    Raises:
        UserError: if nothing answers.
    """
    import ray

    if address == "auto":  # what was started last on this machine, by the note that it left
        address = ray._private.utils.read_ray_address() or ""
    host, _, port = address.rpartition("://")[2].strip("/").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CLUSTER_SECONDS):
            pass
        if "://" not in address:  # a Ray client's port speaks another protocol
            ray._raylet.GcsClient(address=address).check_alive([], CLUSTER_SECONDS)  # type: ignore[attr-defined]
    except (OSError, ray.exceptions.RaySystemError, ray.exceptions.RpcError) as error:
        raise UserError(f"{no_cluster(address)} ({error})") from error


@contextmanager
def started_here() -> Iterator[None]:
    """What a cluster needs that is started on this machine, for this run alone."""
    with own_address(), own_process_group(), short_tmpdir():
        yield


@contextmanager
def short_tmpdir() -> Iterator[None]:
    """While inside, TMPDIR is /tmp where it is so deep that the paths of Ray's sockets would get too long."""
    given = os.environ.get("TMPDIR", "")
    if len(os.fsencode(given)) <= MAX_TMPDIR:
        yield
        return
    os.environ["TMPDIR"] = "/tmp"
    try:
        yield
    finally:
        os.environ["TMPDIR"] = given


STARTING_RAY = threading.Event()
"""Up while this process starts Ray's own processes."""


@contextmanager
def own_process_group() -> Iterator[None]:
    """While inside, the processes that Ray starts leave this one's process group.

    A scheduler, `timeout` or a shell sends SIGTERM to the whole group. The workers would be gone before the first
    process, which is told too, could ask them to save. Ray ends them with it all the same, however it ends.
    """
    if not hasattr(os, "register_at_fork"):
        yield
        return
    if not _AT_FORK:
        # Ray sets signals up between fork and exec, and so Python's own hooks run there too.
        os.register_at_fork(after_in_child=_leave_group)
        _AT_FORK.append(True)
    STARTING_RAY.set()
    try:
        yield
    finally:
        STARTING_RAY.clear()


_AT_FORK: list[bool] = []


def _leave_group() -> None:
    if STARTING_RAY.is_set():
        os.setpgid(0, 0)


def machine_of(resources: Mapping[str, float]) -> Machine:
    """A node as it told Ray about itself; its memory is what was free when it joined, of which Ray makes two parts."""
    memory = resources.get("memory", 0.0) + resources.get("object_store_memory", 0.0)
    return Machine(resources.get("CPU", 0.0), resources.get("GPU", 0.0), memory / 1e9)


@contextmanager
def own_address() -> Iterator[None]:
    """While inside, a cluster that is started here tells its address to all its processes.

    Ray's own helper actors, such as the one that frees what a lost run had reserved, ask for the cluster's state, and
    without an address they ask whatever cluster was started last on this machine.
    """
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    each = {"RAY_GCS_SERVER_PORT": port, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    os.environ |= each
    try:
        yield
    finally:
        for name in each:
            del os.environ[name]


def check_local_cpus(resources: ResourceSettings) -> None:
    """Refuses more workers than this machine has CPUs, before a local cluster is started.

    Raises:
        UserError: naming both numbers.
    """
    workers = resources.min_workers
    if not joins_cluster() and workers * resources.worker_cpus > usable_cpus():
        raise UserError(
            f"{workers} workers with {resources.worker_cpus} CPUs each need more than this machine's "
            f"{usable_cpus()} CPUs; lower --workers, or set RAY_ADDRESS to use a cluster"
        )


def ray_tools(
    settings: TrainSettings,
    actor: Any,
    log: Callable[[dict[str, Any]], None],
    num_gpus: float = 0.0,
) -> Tools:
    """Tools that run k-means in the actor and shards as tasks; progress names a pass by what it does with a shard.

    Args:
        settings: of the run.
        actor: runs k-means.
        log: takes one line of metrics.
        num_gpus: share of a GPU for each task that seeks first keypoints.
    """
    import ray

    def fit(sample: Sample, asked: KMeansSettings) -> KMeansResult:
        before = ray.get(actor.given_up.remote())
        try:
            result: KMeansResult = ray.get(actor.fit.remote(list(sample), asked))
        except ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        reason = ray.get(actor.given_up.remote())
        if reason and not before:
            log(without_cuml(reason))
        return result

    def progress(function: str, done: int, total: int) -> None:
        what = " ".join(word for word in function.split("_") if word not in ("", "shard", "task"))
        log({"kind": "shards", "what": what, "done": done, "total": total})

    return Tools(fit, RayMap(TASK_CPUS, progress), log, detect_on_shards=RayMap(TASK_CPUS, progress, num_gpus))


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
    import ray.train
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = settings.resources
    minimum, maximum = resources.min_workers, resources.max_workers
    number: Any = minimum if minimum == maximum else (minimum, maximum)  # a pair makes Ray Train elastic
    each = {"CPU": resources.worker_cpus} | ({"GPU": resources.worker_gpus} if gpu else {})
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={
            "settings": settings.model_dump(),
            "corpus": corpus_url,
            "run": run_url,
            "kmeans": actor,
        },
        scaling_config=ScalingConfig(num_workers=number, use_gpu=gpu, resources_per_worker=each),
        run_config=RunConfig(
            name="ray",
            storage_path=run_url,
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=resources.max_failures, controller_failure_limit=3
            ),
        ),
    )
    note = FailureNote(run_url)
    note.take()
    try:
        run_stoppably(trainer.fit, StopFlag(run_url))
    except ray.train.TrainingFailedError as error:
        raise RunFailedError(note.take() or str(error)) from None
    if RunDirectory(run_url).has_model():
        return
    if failed := note.take():
        raise RunFailedError(failed)
    if said := why_unwell(run_url):
        raise UnwellError(said)


def why_unwell(run_url: str) -> str | None:
    """The last sign for which a run may have ended itself, with what to do about it."""
    lines = [line for line in MetricsReader(run_url).new_lines() if line["kind"] == "health" and line["ends"]]
    if not lines:
        return None
    return (
        f"{lines[-1]['text']} {lines[-1]['advice']} The same command without --stop-when-unwell goes on from the last "
        "checkpoint; with other settings take another --name."
    )


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """What each worker of the `TorchTrainer` runs."""
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
    metrics = MetricsFile(config["run"]) if group.rank == 0 else None
    tools = replace(
        ray_tools(settings, config["kmeans"], metrics.write if metrics else lambda line: None),
        stop=StopFlag(config["run"]).is_up,
    )
    corpus, run = Corpus.open(config["corpus"]), RunDirectory(config["run"])
    trainer, note = Trainer(settings, corpus, run, group, tools), FailureNote(config["run"])
    if note.read() is not None:
        return
    try:
        network = trainer()
        Finisher(trainer.settings, corpus, run, group, tools)(network, run.records()[-1])
    except Stopped:
        return  # a failure would be a reason to start again
    except (ValueError, FloatingPointError) as error:
        note.write(error)
        raise
