"""Starting Ray on this machine, or joining the cluster that is there."""

import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from sst.config import ResourceSettings
from sst.environment import RAY_ENVIRONMENT, set_environment, usable_cpus
from sst.errors import UserError
from sst.run.placement import Machine

CLUSTER_SECONDS = 15.0
"""How long a cluster may take to answer at all."""

MAX_TMPDIR = 40
"""Bytes of TMPDIR for which the paths of Ray's sockets, some 65 bytes longer, stay within the system's 107."""


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
