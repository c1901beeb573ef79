"""Kills or stops one process of a run at a chosen place, exactly once; installed in every Ray process by the tests.

FAULT (an environment variable) names a JSON file {"place": ..., "victim": ..., "signal": ..., "driver": process}. Who
arrives at the place first makes the file FAULT.fired, so nobody fires a second time, and then sends the victim the
signal: SIGKILL, or SIGSTOP, after which it hangs.
"""

import functools
import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil

PLACES = {
    "stage 1": ("sst.train.trainer", "stage1_losses", 12),
    "extraction": ("sst.train.rounds", "extract_descriptors", 2),
    "k-means": ("cluster.actor", "fit", 2),
    "assignment": ("cluster.actor", "assign_shard", 2),
    "checkpoint": ("sst.train.checkpoint", "_write_file", 8),  # between the two files of the fourth checkpoint
    "stage 2": ("sst.train.trainer", "stage2_losses", 15),
    "merging": ("sst.train.rounds", "count_overlaps", 2),
    "merged labels": ("sst.train.rounds", "apply_merge", 1),
    "prediction": ("sst.train.finish", "predict_shard", 2),
}
"""Place: module, function, and at which of its calls in one process."""


def install() -> None:
    """Puts the trap at the place that the FAULT file names; reads it at each call, since processes are used again."""
    import importlib

    for place, (module_name, function_name, at) in PLACES.items():
        module = importlib.import_module(module_name)
        setattr(module, function_name, trapped(getattr(module, function_name), place, at))


def trapped(function, place: str, at: int):
    calls = {"": 0}

    @functools.wraps(function)
    def wrapper(*arguments, **named):
        told = os.environ.get("FAULT", "")
        if told and Path(told).exists():
            calls[told] = calls.get(told, 0) + 1
            fault = json.loads(Path(told).read_text())
            if fault["place"] == place and calls[told] >= at:
                fire(Path(told + ".fired"), fault)
        return function(*arguments, **named)

    return wrapper


def fire(marker: Path, fault: dict) -> None:
    if marker.exists():
        return
    found = victims(fault)
    if not found:
        return  # nobody of that kind yet: a later call will fire
    try:
        with open(marker, "x") as file:
            file.write(f"{fault['place']} in {os.getpid()}")
    except FileExistsError:
        return
    for process in sorted(found, key=lambda p: p.pid == os.getpid()):
        process.send_signal(signal.Signals[fault.get("signal", "SIGKILL")])
    if fault["victim"] == "driver":
        time.sleep(60)  # the cluster dies with its driver, and this process with it


def victims(fault: dict) -> list[psutil.Process]:
    if fault["victim"] == "driver":
        return [psutil.Process(fault["driver"])]
    if fault["victim"] == "task":
        return [psutil.Process()]
    raylet = psutil.Process(os.getppid())
    title = {"worker": "RayTrainWorker", "actor": "KMeansActor"}[fault["victim"]]
    for child in raylet.children():
        with suppress(psutil.Error):  # it has just ended
            if title in " ".join(child.cmdline()):
                return [child]
    return []
