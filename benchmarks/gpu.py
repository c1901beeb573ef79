"""Does everything work on this machine's GPUs? `python -m benchmarks.gpu --images FOLDER`.

The one command for a machine with a GPU: what is installed, packing, training at the published size on drawings (killed
on the way and resumed) and on a folder of images, k-means by cuML beside torch and over NCCL, prediction and export. It
gives the commands that a user gives, goes on after what fails, and prints one table of what held and what did not, also
written below `--out` beside all logs. Exit code 1 if anything did not hold.

Where there is no GPU, or with `--size cpu`, a narrow network is trained for a short time, and what needs a GPU is said
to be not run. On a machine that gives a command only minutes, `--only` runs some of the checks; what they left in
`--out` is there for the next ones. What else is given goes to jobs.train, such as `--cluster.clusters 100`.
"""

import importlib
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from benchmarks import fullsize
from benchmarks.checks import DidNotHold, NotRunHere, Row, checked, isolated, job, report
from benchmarks.common import machine
from benchmarks.fullsize import Scale, Schedule, Trained, scale_of, schedule, train_words
from cluster.shards import Descriptors
from sst.data.shards import MANIFEST

DRAWINGS_SHARE, IMAGES_SHARE = 0.35, 0.25
"""Of the time, what a run is planned to take; the killed one also starts twice."""

OVERTIME = 2.5
"""Times what is planned, after which a run is ended."""

NARROW = 16
"""Channels where there is no GPU."""

PACKAGES = {"ray": "ray", "mlflow": "mlflow", "webdataset": "webdataset", "onnxruntime": "onnxruntime",
            "opencv-python-headless": "cv2", "simplejpeg": "simplejpeg"}  # fmt: skip
GPU_PACKAGES = {"cupy-cuda13x": "cupy", "cuml-cu13": "cuml.cluster", "raft-dask-cu13": "raft_dask.common.nccl"}
"""Distributions, and what is imported of each."""

AGREEMENT = 0.02
"""Share by which the inertias of two k-means may differ: each starts anew, so they end in different optima."""


@dataclass(frozen=True)
class Plan:
    """What is checked, and how long it may take.

    Attributes:
        out: folder of corpora, runs and logs.
        images: folder of images; None for drawings only.
        gpus: that torch sees and the checks may use.
        scale: of the runs.
        minutes: in all.
        deadline: on the clock of `time.monotonic`.
        more: arguments for jobs.train.
    """

    out: Path
    images: Path | None
    gpus: int
    scale: Scale
    minutes: float
    deadline: float
    more: tuple[str, ...] = ()

    def schedule(self, name: str) -> Schedule:
        """Steps and images of a run."""
        return schedule(self.minutes * (DRAWINGS_SHARE if name == "drawings" else IMAGES_SHARE), self.scale)

    def seconds(self, minutes: float) -> float:
        """So many minutes, or what is left.

        Raises:
            DidNotHold: if nothing is left.
        """
        left = self.deadline - time.monotonic()
        if left < 5:
            raise DidNotHold(f"no time was left of {self.minutes:g} minutes; give more --minutes, or --only this")
        return min(60 * minutes, left)

    @property
    def last(self) -> str:
        """Name of the run that is predicted with and exported."""
        return "images" if self.images else "drawings"

    def needs_gpu(self) -> None:
        """Raises `NotRunHere` where there is none."""
        if not self.gpus:
            raise NotRunHere("no GPU")


def check_install(plan: Plan) -> str:
    """Everything that is needed can be imported; libraries of the GPU, which may crash, each by itself."""
    seen = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if plan.gpus:
        seen.append(f"{plan.gpus} x {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}")
    elif (
        shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi"], capture_output=True, check=False).returncode == 0
    ):
        raise DidNotHold(f"nvidia-smi shows a GPU that torch {torch.__version__} does not see")
    broken = []
    each_alone = [{package: module} for package, module in GPU_PACKAGES.items()] if plan.gpus else []
    for packages in (PACKAGES, *each_alone):
        try:
            seen.append(isolated(imported, packages, seconds=plan.seconds(2)))
        except DidNotHold as error:
            broken.append(f"{', '.join(packages)}: {error}")
    if broken:
        raise DidNotHold("; ".join(broken))
    return ", ".join(seen)


def imported(packages: dict[str, str]) -> str:
    """Imports a module of each package; the packages with their versions."""
    for module in packages.values():
        importlib.import_module(module)
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages)


def check_obstacle(plan: Plan) -> str:
    """cuML can be used."""
    plan.needs_gpu()
    return isolated(usable_cuml, seconds=plan.seconds(2))


def usable_cuml() -> str:
    """Asks as a run does; a RuntimeError says what is in the way."""
    from cluster.actor import KMeansActor

    return f"k-means by {KMeansActor().backend('cuml')}"


def check_pack(plan: Plan, name: str) -> str:
    """Packs what a run needs."""
    if (plan.out / f"{name}-shards" / MANIFEST).exists():
        return "packed before"
    source = str(plan.images) if name == "images" else "drawings"
    return fullsize.pack(source, plan.schedule(name).images, plan.out, name, plan.seconds(3))


def check_train(plan: Plan, name: str) -> str:
    """A run ends well."""
    trained, planned = Trained.at(plan.out, name), plan.schedule(name)
    words = [*train_words(planned, plan.scale, plan.out, name), *plan.more]
    minutes = OVERTIME * plan.minutes * (DRAWINGS_SHARE if name == "drawings" else IMAGES_SHARE)
    fullsize.train(trained, words, plan.out / "logs" / f"{name}.txt", plan.seconds(minutes), None)
    shown, every = fullsize.visible_in_most(trained)
    steps = planned.warm_up + planned.rounds * planned.round_steps
    speed = [line["images_per_second"] for line in trained.lines("step")]
    return (
        f"{steps} + {planned.stage2} steps on {planned.images} images, {np.median(speed):.0f} img/s; {shown} of "
        f"{every} landmarks visible in most test images"
    )


def check_killed(plan: Plan) -> str:
    """A run is killed after its first checkpoint."""
    trained = Trained.at(plan.out, "drawings")
    words = [*train_words(plan.schedule("drawings"), plan.scale, plan.out, "drawings"), *plan.more]
    minutes = OVERTIME * plan.minutes * DRAWINGS_SHARE

    def begun() -> bool:
        return any(Path(trained.run.checkpoints_url).glob("*/record.json"))

    if begun():
        raise NotRunHere("the run has a checkpoint already")
    log = plan.out / "logs" / "drawings.txt"
    if fullsize.train(trained, words, log, plan.seconds(minutes), begun):
        raise DidNotHold("it was done before it had a checkpoint")
    return "all processes killed after the first checkpoint"


def check_resumed(plan: Plan) -> str:
    """The same command goes on from the checkpoint, to the end."""
    seen, trained = check_train(plan, "drawings"), Trained.at(plan.out, "drawings")
    resumes = [line["step"] for line in trained.lines("resume")]
    if not resumes or not resumes[-1]:
        raise DidNotHold(f"it did not go on from a checkpoint; {seen}")
    return f"went on from step {resumes[-1]}; {seen}"


def finished(plan: Plan, name: str) -> Trained:
    """A run that ended well.

    Raises:
        DidNotHold: if it did not.
    """
    trained = Trained.at(plan.out, name)
    if not trained.run.has_model():
        raise DidNotHold(f"run {name} has no model; see its check")
    return trained


def check_devices(plan: Plan, name: str) -> str:
    """Where there is a GPU, workers and k-means use it."""
    trained = finished(plan, name)
    line = trained.lines("arithmetic")[-1]
    backends = {record.backend for record in trained.run.records() if record.backend}
    refused = [line["obstacle"], *(each["obstacle"] for each in trained.lines("not_recorded"))]
    obstacles = [each for each in refused if each]
    how = "; ".join(obstacles) or ("steps recorded, own kernels" if line["device"].startswith("cuda") else "as written")
    seen = f"workers on {line['device']} in {line['convolutions']}, {how}; k-means by {', '.join(sorted(backends))}"
    if plan.gpus and not (line["device"].startswith("cuda") and not obstacles and backends == {"cuml"}):
        raise DidNotHold(seen)
    return seen


def check_criterion(plan: Plan, name: str, criterion: Callable[[Trained], str]) -> str:
    """One of `fullsize.CRITERIA` of a finished run."""
    return criterion(finished(plan, name))


def clustered_rows(rows: int, width: int, clusters: int) -> np.ndarray:
    """Unit rows around three times as many centres as there are clusters, float32 (N, D)."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3 * clusters, width)).astype(np.float32)
    x = centres[rng.integers(0, len(centres), rows)] + rng.standard_normal((rows, width), np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def saved_sample(folder: str, rows: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Rows as a k-means actor is told of them: a shard of descriptors, and the numbers of its rows."""
    url, count = f"{folder}/descriptors.npz", len(rows)
    points = np.zeros((count, 2), np.float32)
    Descriptors(np.array([0, count], np.int64), points, rows.astype(np.float16)).save(url)
    return [(url, np.arange(count))]


def check_cuml(plan: Plan) -> str:
    """cuML and torch find clusterings that are as good."""
    plan.needs_gpu()
    return isolated(both_backends, 500_000, 256, 100, seconds=plan.seconds(5))


def both_backends(rows: int, width: int, clusters: int) -> str:
    """Fits by torch and by cuML, each from its own start."""
    from cluster.actor import KMeansActor
    from cluster.kmeans import KMeansSettings

    seen, inertia = [f"{rows} x {width}, K = {clusters}"], {}
    with tempfile.TemporaryDirectory() as folder:
        sample = saved_sample(folder, clustered_rows(rows, width, clusters))
        for backend in ("torch", "cuml"):
            started = time.monotonic()
            found = KMeansActor().fit(sample, KMeansSettings(clusters, seed=2**40, backend=backend))
            inertia[backend] = found.inertia
            taken = time.monotonic() - started
            seen.append(f"{backend}: {found.inertia:.4f}, {found.empty} empty, {found.iterations} steps, {taken:.1f} s")
    if max(inertia.values()) > (1 + AGREEMENT) * min(inertia.values()):
        raise DidNotHold("; ".join(seen))
    return "; ".join(seen)


def check_nccl(plan: Plan) -> str:
    """k-means over NCCL, an actor on each GPU, is as good as in one process."""
    plan.needs_gpu()
    if plan.gpus == 1:
        return isolated(pool_of_one, 200_000, 256, 100, seconds=plan.seconds(5))
    return isolated(pool_by_ray, plan.gpus, 1.0, 200_000, 256, 100, seconds=plan.seconds(5))


def check_pool(plan: Plan) -> str:
    """k-means over two processes, by sums, is as good as in one."""
    return isolated(pool_by_ray, 2, 0.0, 20_000, 64, 30, seconds=plan.seconds(3))


def pool_of_one(rows: int, width: int, clusters: int) -> str:
    """The one member is in this process, since Ray would have a single actor fit alone."""
    from cluster.kmeans import KMeansSettings, fit
    from cluster.pool import PoolMember, fit_pool

    x = clustered_rows(rows, width, clusters)
    member, settings = PoolMember(x), KMeansSettings(clusters, backend="torch")
    pooled = fit_pool(lambda method, given: [getattr(member, method)(*each) for each in given], 1, settings, nccl=True)
    return agreeing("pool of one over NCCL", pooled, fit(x, settings))


def pool_by_ray(members: int, gpus: float, rows: int, width: int, clusters: int) -> str:
    """Members are actors, as in a run."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    from cluster.actor import KMeansActor, start_actor
    from cluster.kmeans import KMeansSettings

    ray.init("local", num_cpus=members, log_to_driver=False)
    settings = KMeansSettings(clusters, seed=0, backend="cuml" if gpus else "torch")
    with tempfile.TemporaryDirectory() as folder:
        sample = saved_sample(folder, clustered_rows(rows, width, clusters))
        pooled = ray.get(start_actor(num_gpus=gpus, num_cpus=0, members=members).fit.remote(sample, settings))
        alone = KMeansActor().fit(sample, replace(settings, backend="torch"))
    ray.shutdown()
    return agreeing(f"pool of {members} by {pooled.backend}", pooled, alone)


def agreeing(name: str, pooled: Any, alone: Any) -> str:
    """Says both inertias; raises `DidNotHold` where they differ."""
    seen = f"{name}: inertia {pooled.inertia:.4f}, {pooled.empty} empty; by torch in one process {alone.inertia:.4f}"
    if not abs(pooled.inertia - alone.inertia) <= AGREEMENT * alone.inertia:
        raise DidNotHold(seen)
    return seen


def check_predict(plan: Plan) -> str:
    """Every image that is there gets every landmark."""
    trained, out = finished(plan, plan.last), plan.out / "predictions"
    words = [
        trained.run.url,
        str(plan.out / f"{plan.last}-shards"),
        "--out",
        str(out),
        "--pictures",
        "4",
        "--overwrite",
    ]
    job("predict", words, plan.out / "logs" / "predict.txt", plan.seconds(4))
    found = json.loads((out / "predictions.json").read_text())
    images, wanted = len(found["images"]), sum(shard.samples for shard in trained.corpus.manifest.shards)
    pictures = len([path for path in (out / "pictures").rglob("*") if path.is_file()])
    seen = f"{len(found['annotations'])} objects on {images} of {wanted} images, {pictures} pictures"
    if not len(found["annotations"]) == wanted or not pictures:
        raise DidNotHold(seen)
    return seen


def check_export(plan: Plan) -> str:
    """The exported model gives what the model gives."""
    trained, out = finished(plan, plan.last), plan.out / "export"
    words = [trained.run.url, "--out", str(out), "--overwrite"]
    job("export", words, plan.out / "logs" / "export.txt", plan.seconds(5))
    return isolated(same_as_exported, trained.run.url, str(out), seconds=plan.seconds(2))


def same_as_exported(run: str, out: str) -> str:
    """Runs model.onnx and the model itself on a drawing."""
    import onnxruntime

    from sst.corpora.drawings import draw
    from sst.predict.predictor import ImageLandmarks, open_model

    image = np.ascontiguousarray(draw(0, 0, 256).image)[None]
    model, record, _ = open_model(run)
    with torch.inference_mode():
        points, confidence = ImageLandmarks(model, record.network.input_size)(torch.from_numpy(image))
    session = onnxruntime.InferenceSession(f"{out}/model.onnx", providers=["CPUExecutionProvider"])
    exported = session.run(None, {session.get_inputs()[0].name: image})
    off = float(np.median(np.linalg.norm(exported[0] - points.numpy(), axis=-1)))
    unsure = float(np.abs(exported[1] - confidence.numpy()).max())
    size = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file()) / 1e6
    seen = f"{size:.0f} MB; ONNX beside torch: points {off:.2g} px, confidences {unsure:.2g} apart"
    if not (off < 0.1 and unsure < 1e-3):
        raise DidNotHold(seen)
    return seen


def checks_of(plan: Plan) -> dict[str, Callable[[Plan], str]]:
    """All checks by name, in their order."""
    checks: dict[str, Callable[[Plan], str]] = {"install": check_install, "cuml here": check_obstacle}
    names = ["drawings", "images"] if plan.images else ["drawings"]
    for name in names:
        checks[f"pack {name}"] = partial(check_pack, name=name)
    checks["train drawings, killed"] = check_killed
    checks["resume drawings"] = check_resumed
    if plan.images:
        checks["train images"] = partial(check_train, name="images")
    for name in names:
        checks[f"{name}: devices"] = partial(check_devices, name=name)
        for each in ("labels", "clusters", "weights", "maps"):
            checks[f"{name}: {each}"] = partial(check_criterion, name=name, criterion=fullsize.CRITERIA[each])
    return checks | {
        "cuml beside torch": check_cuml,
        "k-means over NCCL": check_nccl,
        "k-means over processes": check_pool,
        "predict": check_predict,
        "export": check_export,
    }


@dataclass(frozen=True)
class Command:
    """What is checked."""

    images: Path | None = None
    """Folder of images to train on besides drawings."""
    size: Literal["auto", "full", "cpu"] = "auto"
    """full is the published network; cpu a narrow one in a short schedule; auto is full where there is a GPU."""
    minutes: float | None = None
    """Bound of all checks; by default 25 with a GPU and 8 without."""
    out: Path = Path("runs/gpu")
    """Folder of corpora, runs, logs and the table; runs that are there go on."""
    only: tuple[str, ...] = ()
    """Names of the checks to run, instead of all."""

    def run(self, more: Sequence[str]) -> int:
        """Checks, prints, and returns the exit code."""
        full = self.size == "full" or (self.size == "auto" and torch.cuda.is_available())
        if full and not torch.cuda.is_available():
            print("--size full needs a GPU that torch sees; leave it out for the short form", file=sys.stderr)
            return 2
        if not full:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is started from here sees none
        minutes = self.minutes or (25.0 if full else 8.0)
        plan = Plan(
            out=self.out,
            images=self.images,
            gpus=torch.cuda.device_count() if full else 0,
            scale=scale_of(256 if full else NARROW, full, IMAGES_SHARE * minutes),
            minutes=minutes,
            deadline=time.monotonic() + 60 * minutes,
            more=tuple(more),
        )
        checks = checks_of(plan)
        if unknown := [name for name in self.only if name not in checks]:
            print(f"--only: no check is called {unknown[0]!r}; there are {', '.join(checks)}", file=sys.stderr)
            return 2
        self.out.mkdir(parents=True, exist_ok=True)
        title = f"{machine()}; {'full size' if full else 'narrow network, no GPU used'}, {minutes:g} minutes at most"
        print(title, flush=True)
        chosen = {name: check for name, check in checks.items() if not self.only or name in self.only}
        rows: list[Row] = [checked(name, partial(check, plan)) for name, check in chosen.items()]
        return report(rows, title, self.out / "checks.md")


if __name__ == "__main__":
    command, rest = tyro.cli(Command, description=__doc__, return_unknown_args=True)
    sys.exit(command.run(rest))
