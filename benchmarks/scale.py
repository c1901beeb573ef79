"""Do runs over tens of thousands of shards stay linear? `python -m benchmarks.scale --counts 400 4000 40000`.

What is done for each shard, by the code of a run, with tiny contents: one shard of one small image under many names, a
network that computes its answer once, few descriptors. So the seconds are those of the bookkeeping, not of the images;
what matters is that those of one shard do not grow with their number. Each count is measured in a process of its own,
whose peak memory is the driver's. Files are written to `--folder`; a part runs against an object store in memory, where
every put of a growing file would count.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from benchmarks.common import machine, print_table
from cluster import storage
from cluster.actor import read_sample
from cluster.correspondence import labels_url
from cluster.dispatch import RayMap
from cluster.kmeans import fit
from cluster.shards import Labels
from sst.config import (
    ClusterSettings,
    NetworkSettings,
    ResourceSettings,
    Stage1Settings,
    Stage2Settings,
    TrainSettings,
)
from sst.corpora.drawings import draw
from sst.data.corpus import Corpus
from sst.data.loader import balanced, training_examples
from sst.data.shards import MANIFEST, SampleMeta, ShardInfo, ShardWriter
from sst.nn.network import DetectorDescriptor, LandmarkDetector
from sst.run.metrics import MetricsFile
from sst.train.rounds import RoundMaker
from sst.train.run_directory import RoundRecord, RunDirectory
from sst.train.tools import Tools
from sst.train.workers import Group

CLUSTERS = 8

SETTINGS = TrainSettings(
    network=NetworkSettings(input_size=32, width=16, depth=1, groups=2, descriptor_size=8),
    cluster=ClusterSettings(clusters=CLUSTERS, sample=2_000),
    stage1=Stage1Settings(threshold=0.0),
    stage2=Stage2Settings(min_population=0, refine_confidence=0.0),
    resources=ResourceSettings(workers=1),
)

WORKERS = 64
"""Of the group whose first worker's stream is started."""


def make_corpus(folder: Path, shards: int) -> Corpus:
    """One shard of one drawing, under many names."""
    import simplejpeg

    with ShardWriter(str(folder), "scale", None, 1) as writer:
        drawn = draw(0, 0, 32)
        x0, y0, x1, y1 = map(float, drawn.box)
        writer.add(simplejpeg.encode_jpeg(drawn.image, 80), SampleMeta(source="0", split="train", box=(x0, y0, x1, y1)))
    one = writer.manifest.shards[0]
    names = [f"shard-{number:06d}.tar" for number in range(shards)]
    for name in names:
        os.link(folder / one.file, folder / name)
    listed = tuple(ShardInfo(file=name, **one.model_dump(exclude={"file"})) for name in names)
    manifest = writer.manifest.model_copy(update={"shards": listed})
    storage.write_json(storage.join(str(folder), MANIFEST), manifest.model_dump(by_alias=True))
    return Corpus(str(folder), manifest, "")


def first_labels(run: RunDirectory, corpus: Corpus) -> RoundRecord:
    """A round 0 in which every image has a label of each cluster."""
    points = np.random.default_rng(0).uniform(0, 8, (CLUSTERS, 2)).astype(np.float32)
    clusters = np.arange(CLUSTERS, dtype=np.int16)
    labels = Labels(np.array([0, CLUSTERS]), points, clusters, np.zeros(CLUSTERS, np.float32))
    labels.save(labels_url(run.round_url(0), corpus.train[0].file))
    first = Path(labels_url(run.round_url(0), corpus.train[0].file))
    for shard in corpus.train[1:]:
        os.link(first, labels_url(run.round_url(0), shard.file))
    record = RoundRecord(
        number=0,
        kind="keypoints",
        step=0,
        weights="",
        manifest="",
        seed=0,
        backend="torch",
        thresholds=[1.0] * CLUSTERS,
        active=[True] * CLUSTERS,
        population=[len(corpus.train)] * CLUSTERS,
        partner=None,
        metrics={},
        seconds={},
    )
    run.finish_round(record, np.zeros((CLUSTERS, 8), np.float32))
    return record


def at_once(network: nn.Module) -> Any:
    """The network, in eval mode, that computes its first answer only: as all images are the same, so are the others."""
    forward, known = network.forward, dict[torch.Size, Any]()

    def again(images: Tensor) -> Any:
        if images.shape not in known:
            known[images.shape] = forward(images)
        return known[images.shape]

    network.forward = again
    return network.eval()


class Seconds:
    """What each part took."""

    def __init__(self) -> None:
        self.taken: dict[str, float] = {}

    @contextmanager
    def of(self, part: str):
        started = time.perf_counter()
        yield
        self.taken[part] = time.perf_counter() - started


def measure(folder: Path, shards: int) -> dict[str, float]:
    """Seconds of every part, for all shards together."""
    seconds = Seconds()
    corpus = make_corpus(folder / "shards", shards)
    with seconds.of("open the corpus"):
        corpus = Corpus.open(corpus.url)
    run = RunDirectory(str(folder / "run"))
    record = first_labels(run, corpus)
    with seconds.of("spread over workers"):
        balanced(corpus.train, WORKERS)
    with seconds.of(f"first image of worker 1 of {WORKERS}"):
        stream = training_examples(corpus.url, corpus.manifest, lambda s: run.labels(record, s), 1, 0, WORKERS, 0)
        next(stream)
    tools = Tools(lambda sample, asked: fit(read_sample(sample), asked), log=MetricsFile(run.url).write)
    maker = RoundMaker(SETTINGS, corpus, run, Group(), tools)
    shape = SETTINGS.network.shape
    with seconds.of("labels by correspondence"):
        maker.correspondence(at_once(DetectorDescriptor(shape)), record, 1)
    parts = run.record(1).seconds
    seconds.taken |= {f"- {name}": parts[name] for name in ("extract", "kmeans", "assign", "metrics")}
    network = at_once(LandmarkDetector(shape, CLUSTERS))
    with seconds.of("merging"):
        maker.merge(network, run.record(1), 2)
    with seconds.of("refinement"):
        maker.refine(network, run.record(2), 3)
    with seconds.of("progress lines, object store"):
        metrics = MetricsFile(f"memory://scale-{shards}/run")
        for done in range(1, shards + 1):
            metrics.write({"kind": "shards", "what": "extract", "done": done, "total": shards})
    return seconds.taken


def of_tasks(shards: int, patience: float = 600.0) -> float:
    """Seconds of a pass of Ray tasks that take what an assignment takes, and do nothing."""
    import ray

    ray.init("local", num_cpus=2, log_to_driver=False)
    centroids = np.zeros((100, 256), np.float32)
    run_on_shards = RayMap(0.05, patience=patience)
    run_on_shards(_nothing, [("warm-up", centroids)] * 8)
    started = time.perf_counter()
    run_on_shards(_nothing, [(str(number), centroids) for number in range(shards)])
    taken = time.perf_counter() - started
    ray.shutdown()
    return taken


def _nothing(url: str, centroids: np.ndarray) -> int:
    return len(centroids)


def peak_mb() -> float:
    """Of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def draw_table(counts: Sequence[int], rows: Sequence[tuple[str, ...]], file: Path) -> None:
    """Draws milliseconds a shard against the number of shards."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for part, *values in rows:
        axes.plot(counts, [float(value) for value in values], "o-", label=part)
    axes.set(xscale="log", yscale="log", xlabel="shards", ylabel="milliseconds a shard")
    axes.set_xticks(list(counts), [f"{count:,}" for count in counts], minor=False)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(file, dpi=120)


def main(
    counts: Sequence[int] = (400, 4_000, 40_000),
    folder: Path | None = None,
    one: int = 0,
    tasks: bool = True,
    plot: Path | None = None,
) -> None:
    """Measures and prints.

    Args:
        counts: numbers of shards.
        folder: where files are written; taken away afterwards.
        one: measures this number of shards in this process and prints JSON.
        tasks: whether Ray tasks are measured too.
        plot: picture of the table, to be written.
    """
    torch.set_num_threads(1)  # as many do not help with so little
    if one:
        where = Path(tempfile.mkdtemp(dir=folder))
        try:
            found = measure(where, one)
        finally:
            shutil.rmtree(where)
        print(json.dumps(found | {"memory": peak_mb()} | ({"Ray tasks": of_tasks(one)} if tasks else {})))
        return
    print(machine())
    each = []
    for count in counts:
        command = [sys.executable, "-m", "benchmarks.scale", "--one", str(count), f"--{'' if tasks else 'no-'}tasks"]
        command += ["--folder", str(folder)] if folder else []
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        each.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{count} shards: {each[-1]}", file=sys.stderr, flush=True)
    memory = [f"{found.pop('memory'):.0f} MB" for found in each]
    rows = [
        (part, *(f"{1e3 * found[part] / n:.3g}" for found, n in zip(each, counts, strict=True))) for part in each[0]
    ]
    if plot:
        draw_table(counts, rows, plot)
    rows.append(("peak memory", *memory))
    print_table(("milliseconds a shard", *(f"{count:,} shards" for count in counts)), rows)


if __name__ == "__main__":
    tyro.cli(main)
