"""Many runs with different settings, as trials of Ray Tune: weak ones are stopped between rounds, lost ones go on.

Each trial is a whole run in SWEEP/trials/NNN, so all that holds for a run holds for it. What is known of a sweep lies
in its directory as JSON; Tune's own state is not read again: a resumed sweep reports to Tune what its trials found
before, which brings the scheduler to where it was.
"""

import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from cluster import storage
from sst.config import TrainSettings, differences
from sst.data.corpus import open_corpus
from sst.environment import set_environment
from sst.errors import RunFailedError, UserError
from sst.progress import clock
from sst.run.lock import RunLock
from sst.run.metrics import MetricsReader
from sst.run.pipeline import train_run
from sst.run.placement import Machine, gpu_room, place_trial
from sst.run.ray_cluster import joins_cluster, start_ray
from sst.run.tracking import Tracker, Tracking, noted_run
from sst.train.first_round import keypoints_hash
from sst.train.run_directory import RunDirectory
from sst.train.schedule import plan
from sst.tune.comparison import comparison_page, fetch_runs
from sst.tune.objective import Objective, final_objective, round_error
from sst.tune.search_space import Values, with_values

logger = logging.getLogger(__name__)

TRIAL_CPUS = 0.01
"""CPUs that Ray sets aside for the process that leads a trial: its workers do the work."""

NODE_SHARE = 1e-4
"""Of the resource by which Ray names a machine: enough to be placed there."""

TRIAL_FAILURES = 2
"""How often a lost trial is started again."""

REDUCTION = 4 / 3
"""ASHA's reduction factor (Li et al. 2020): of the trials that are judged, one in so many goes on, three of four."""

POLL_SECONDS = 1.0

TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_SYNCER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
"""Set before Ray Tune is imported, unless the caller has set them."""


class TrialRecord(BaseModel):
    """How a trial ended, as SWEEP/trials/NNN/trial.json.

    Attributes:
        values: by setting, what it was given.
        status: finished; stopped for being weak; failed.
        step: optimizer steps taken.
        objective: of the finished model; smaller is better.
        metrics: of the finished model, and scores where there are annotations.
        error: why it failed or was stopped.
        seconds: of the start in which it ended.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    values: Values
    status: Literal["finished", "stopped", "failed"]
    step: int = 0
    objective: float | None = None
    metrics: dict[str, float] = {}
    error: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Sweep:
    """A sweep and its directory.

    Attributes:
        url: its directory.
        settings: what does not vary.
        shards: the corpus.
        trials: what each trial varies.
        objective: what is made small.
        tracking: where its MLflow runs go.
    """

    url: str
    settings: TrainSettings
    shards: str
    trials: list[Values]
    objective: Objective
    tracking: Tracking

    def run(self, number: int) -> RunDirectory:
        """The run of a trial."""
        return RunDirectory(storage.join(self.url, "trials", f"{number:03d}"))

    def name(self, number: int) -> str:
        """Name of a trial's MLflow run."""
        return f"{self.tracking.name}-{number:03d}"

    def record(self, number: int) -> TrialRecord | None:
        """How a trial ended; None if it has not."""
        url = storage.join(self.run(number).url, "trial.json")
        return TrialRecord.model_validate(storage.read_json(url)) if storage.exists(url) else None

    def write(self, number: int, record: TrialRecord) -> None:
        """Notes how a trial ended."""
        storage.write_json(storage.join(self.run(number).url, "trial.json"), record.model_dump(mode="json"))

    def track(self, number: int) -> Tracking:
        """Where a trial's MLflow run goes."""
        return Tracking(self.tracking.uri, self.tracking.experiment, self.name(number), parent=self.url)

    def claim(self, resume: bool) -> None:
        """Writes the sweep's settings, or checks that they are those it began with.

        Raises:
            UserError: if there is a sweep of that name and `resume` is not set, or it was begun otherwise.
        """
        url = storage.join(self.url, "sweep.json")
        given = {
            "settings": self.settings.model_dump(mode="json"),
            "shards": self.shards,
            "trials": self.trials,
            "objective": self.objective,
        }
        if not storage.exists(url):
            storage.write_json(url, given)
            return
        if not resume:
            raise UserError(f"{self.url} is a sweep already; go on with it by --resume, or take another --name")
        if changed := differences(storage.read_json(url), given):
            raise UserError(f"{self.url} was begun otherwise ({'; '.join(changed)}); take another --name")


def run_sweep(sweep: Sweep, *, concurrent: int | None, early_stop: bool, resume: bool) -> list[TrialRecord]:
    """Runs what is left of a sweep.

    Args:
        sweep: what to try.
        concurrent: trials at once; by default as many as the cluster has room for.
        early_stop: whether weak trials are stopped between rounds.
        resume: whether a sweep of that name may be there already.

    Returns:
        How each trial ended.

    Raises:
        UserError: if the corpus, the cluster or an earlier sweep of that name do not permit it.
        KeyboardInterrupt: after Ctrl-C, when the trials have been stopped.
    """
    corpus = open_corpus(sweep.shards)
    if sweep.objective != "label-free" and corpus.manifest.protocol is None:
        raise UserError(f"{sweep.shards} has no annotations, so the objective can't be {sweep.objective}")
    set_environment(TUNE_ENVIRONMENT)
    with RunLock(sweep.url):
        sweep.claim(resume)
        machines = start_ray()
        placed = place_trial(sweep.settings, machines, joins_cluster())
        if placed.warning:
            say(f"warning: {placed.warning}")
        sweep = replace(sweep, settings=sweep.settings.with_workers(placed.workers))
        room = concurrent or room_for(sweep.settings, machines, placed.gpu)
        tracker = sweep.tracking.open(sweep.url)
        tracker.log_settings(sweep.settings.model_dump(mode="json"))
        status = "FAILED"
        try:
            run_trials(sweep, room, early_stop)
            records = [sweep.record(number) for number in range(len(sweep.trials))]
            if None in records:
                raise KeyboardInterrupt  # Tune ends in order after the first Ctrl-C
            conclude(sweep, [record for record in records if record is not None], tracker)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            print("the same command with --resume goes on with the sweep", flush=True)
            raise
        finally:
            tracker.close(status)
    return [record for record in records if record is not None]


def run_trials(sweep: Sweep, room: int, early_stop: bool) -> None:
    """Runs what is left of the trials by Ray Tune, `room` at once; each notes how it ended."""
    from ray import tune

    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)  # it misses files that nobody asked for
    with tempfile.TemporaryDirectory() as scratch:  # of what Tune writes nothing is needed later
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, sweep=sweep), beside_this_process()),
            param_space={"trial": tune.grid_search(list(range(len(sweep.trials))))},
            # A stopped trial's process must end, for only then its workers do.
            tune_config=tune.TuneConfig(
                scheduler=scheduler_of(sweep.settings, early_stop), max_concurrent_trials=room, reuse_actors=False
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=scratch,
                callbacks=[watcher(sweep, room)],
                failure_config=tune.FailureConfig(max_failures=TRIAL_FAILURES),
                verbose=0,
            ),
        )
        tuner.fit()


def scheduler_of(settings: TrainSettings, early_stop: bool) -> Any:
    """What decides between rounds which trials go on."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    stage1 = settings.stage1
    if not early_stop or not stage1.rounds:
        return FIFOScheduler()
    # One rung, after a third of the rounds: further ones would stop good trials, see docs/tuning.md.
    rung = stage1.warmup_iterations + max(1, stage1.rounds // 3) * stage1.round_iterations
    return ASHAScheduler(
        "step",
        "error",
        "min",
        max_t=rung,
        grace_period=rung,
        reduction_factor=REDUCTION,
        stop_last_trials=False,
    )


def conclude(sweep: Sweep, records: list[TrialRecord], tracker: Tracker) -> None:
    """Writes SWEEP/comparison.html, and tells MLflow which trial is the best."""
    tracking = sweep.tracking
    try:
        page = comparison_page(f"Sweep {tracking.name}", fetch_runs(tracking.uri, tracking.experiment, [tracking.name]))
        storage.write_bytes(storage.join(sweep.url, "comparison.html"), page.encode())
        tracker.log_files({"comparison.html": page.encode()})
    except UserError as error:  # MLflow is gone; the trials are done all the same
        logger.warning("no comparison was written (%s); `landmarks compare %s` writes it later", error, tracking.name)
    best = best_of(records)
    if best is None:
        return
    tags = {"best.name": sweep.name(best)}
    with suppress(FileNotFoundError):  # the trial has never reached MLflow
        tags["best"] = noted_run(sweep.run(best).url)
    tracker.log_tags(tags)
    tracker.log(records[best].metrics | {"objective": records[best].objective or 0.0}, 0)
    if tracking.register is not None:
        each = sweep.track(best).open(sweep.run(best).url)
        each.register(tracking.register)
        each.close("FINISHED")


def beside_this_process() -> dict[str, float]:
    """What a trial's leading process asks Ray for: hardly a CPU, on this machine, where the MLflow file may lie."""
    import ray

    return {"CPU": TRIAL_CPUS, f"node:{ray.util.get_node_ip_address()}": NODE_SHARE}


def room_for(settings: TrainSettings, machines: Sequence[Machine], gpu: bool) -> int:
    """How many trials with these settings the cluster can train at once."""
    workers = settings.resources.max_workers
    if gpu:
        return max(1, gpu_room(settings, machines) // workers)
    cpus = sum(machine.cpus for machine in machines)
    return max(1, int(cpus / (workers * settings.resources.worker_cpus + TRIAL_CPUS)))


def run_trial(config: dict[str, int], sweep: Sweep) -> None:
    """A trial, in a process of its own: trains, and tells Tune of every round."""
    from ray import tune

    number = config["trial"]
    reader = MetricsReader(sweep.run(number).url)
    rounds = train_trial(sweep, number, reader) if sweep.record(number) is None else new_rounds(sweep, number, reader)
    for step, error in rounds:
        tune.report({"step": step, "error": error})


def new_rounds(sweep: Sweep, number: int, reader: MetricsReader) -> Iterator[tuple[int, float]]:
    """(optimizer step, error) of every round of correspondence that is new in the trial's metrics file."""
    clusters = with_values(sweep.settings, sweep.trials[number]).cluster.clusters
    for line in reader.new_lines():
        if line.get("kind") == "round" and line.get("made_by") == "correspondence":
            yield sweep.run(number).record(line["round"]).step, round_error(line, clusters)


def train_trial(sweep: Sweep, number: int, reader: MetricsReader) -> Iterator[tuple[int, float]]:
    """Trains a trial to its end and notes it; yields (optimizer step, error) after every round.

    Raises:
        Exception: what is not the trial's own fault, such as a lost node: it may be tried again.
    """
    started, run, values = time.monotonic(), sweep.run(number), sweep.trials[number]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            settings = with_values(sweep.settings, values)
            keypoints = storage.join(sweep.url, "keypoints", keypoints_hash(settings, open_corpus(sweep.shards)))
            train_run(settings, sweep.shards, run.url, sweep.track(number), keypoints=keypoints)
        except BaseException as error:  # handed to the trial's own thread
            failures.append(error)

    thread = threading.Thread(target=work, name="run", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        yield from new_rounds(sweep, number, reader)
    seconds = time.monotonic() - started
    if not failures:
        sweep.write(number, finished_record(sweep, number, seconds))
    elif isinstance(failures[0], UserError | RunFailedError):
        sweep.write(number, TrialRecord(values=values, status="failed", error=str(failures[0]), seconds=seconds))
    else:
        raise failures[0]


def finished_record(sweep: Sweep, number: int, seconds: float) -> TrialRecord:
    """What a finished run came to."""
    run = sweep.run(number)
    metrics = storage.read_json(run.final_metrics_url)
    images = open_corpus(sweep.shards).manifest.samples_of("train")
    last = plan(with_values(sweep.settings, sweep.trials[number]), images)[-1]
    return TrialRecord(
        values=sweep.trials[number],
        status="finished",
        step=last.first_step + last.steps,
        objective=final_objective(sweep.objective, metrics),
        metrics=metrics,
        seconds=seconds,
    )


def watcher(sweep: Sweep, concurrent: int) -> Any:
    """The Tune callback that says how far the sweep is and notes which trials were stopped or lost."""
    from ray.tune import Callback

    class Watch(Callback):
        def __init__(self) -> None:
            self.began: dict[int, float] = {}
            self.took: list[float] = []
            self.done = 0

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            number = trial.config["trial"]
            again = "" if number not in self.began else " again, its process was lost"
            self.began.setdefault(number, time.monotonic())
            say(f"trial {number:03d} starts{again}: {given(sweep.trials[number])}")

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            say(f"trial {trial.config['trial']:03d}  step {result['step']}  {off(result['error'])}")

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            number, last = trial.config["trial"], trial.last_result
            if sweep.record(number) is None:
                record = TrialRecord(
                    values=sweep.trials[number],
                    status="stopped",
                    step=int(last["step"]),
                    error=f"{off(float(last['error']))}, among the worst quarter of those that came as far",
                    seconds=time.monotonic() - self.began[number],
                )
                sweep.write(number, record)
                sweep.track(number).open(sweep.run(number).url).close("KILLED")
            self.end(number)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            number = trial.config["trial"]
            why = "its process was lost, again and again; see Ray's logs"
            if trial.error_file and os.path.exists(trial.error_file):
                with open(trial.error_file, encoding="utf-8") as file:
                    why = file.read()[-2000:]
            sweep.write(number, TrialRecord(values=sweep.trials[number], status="failed", error=why))
            self.end(number)

        def end(self, number: int) -> None:
            record = sweep.record(number)
            assert record is not None
            self.done += 1
            self.took.append(time.monotonic() - self.began[number])
            remaining = len(sweep.trials) - self.done
            left = sum(self.took) / len(self.took) * remaining / min(concurrent, max(1, remaining))
            came_to = "" if record.objective is None else f", objective {record.objective:.4g}"
            why = "" if record.error is None else f", {record.error.strip().splitlines()[-1]}"
            say(
                f"trial {number:03d} {record.status} after {record.step} steps{came_to}{why}; {self.done} of "
                f"{len(sweep.trials)} done, about {clock(left)} left"
            )

    return Watch()


def off(error: float) -> str:
    """An error of `round_error` as people read it."""
    return f"equivariance error {error:.3g} % of the distance between clusters"


def given(values: Values) -> str:
    """A trial's values as people write them."""
    return " ".join(f"{name}={value}" for name, value in values.items())


def say(text: str) -> None:
    """One line of progress."""
    print(text, flush=True)


def best_of(records: list[TrialRecord]) -> int | None:
    """Number of the finished trial with the smallest objective; None where none has one."""
    usable = [(r.objective, n) for n, r in enumerate(records) if r.status == "finished" and r.objective is not None]
    return min(usable)[1] if usable else None
