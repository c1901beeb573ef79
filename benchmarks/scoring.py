"""How long does scoring a run take, and what takes the time? `python -m benchmarks.scoring`.

A corpus and a run's predictions are written as a run leaves them: 1,000 training and 300 test images with 68 annotated
points, and landmarks between those points of which 15 % are not visible. Their shapes vary in ten ways, each less than
the one before. Scoring reads both and computes forward error (completion of the missing landmarks, then ten fits) and
backward error (a fit for each landmark). The annotations' JPEGs are random bytes: nothing decodes them.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.common import idle_share, machine, print_table, summed_up
from cluster import storage
from sst.data.corpus import Corpus
from sst.data.shards import SampleMeta, ShardWriter
from sst.report import evaluation
from sst.report.evaluate_run import AnnotatedImages, score_run
from sst.train.run_directory import RunDirectory

TRAIN, TEST, POINTS, MODES = 1000, 300, 68, 10
MISSING = 0.15
JPEG_BYTES = 15_000

PARTS = {
    "reading predictions": (storage, "load_npz"),
    "forward error": (evaluation, "forward_errors"),
    "- of it completion": (evaluation, "complete"),
    "backward error": (evaluation, "_backward_errors"),
    "fits of both errors": (evaluation, "_regression"),
}
"""Where the time of each part is taken; annotations are timed by themselves."""


def annotated_points(rng: np.random.Generator) -> np.ndarray:
    """Points of all images (N, L, 2), in pixels of a 256 px view."""
    modes = rng.normal(size=(MODES, POINTS, 2)) * (10 / np.arange(1, MODES + 1))[:, None, None]
    weights = rng.normal(size=(TRAIN + TEST, MODES))
    noise = rng.normal(0, 0.5, (TRAIN + TEST, POINTS, 2))
    points: np.ndarray = rng.uniform(60, 196, (POINTS, 2)) + np.tensordot(weights, modes, 1) + noise
    return points


def write_corpus(url: str, points_NL2: np.ndarray, rng: np.random.Generator) -> Corpus:
    """Writes annotated images, the training images first."""
    with ShardWriter(url, "scoring", protocol="faces68") as writer:
        for number, each in enumerate(points_NL2):
            meta = SampleMeta(
                source=str(number),
                split="train" if number < TRAIN else "test",
                box=(0.0, 0.0, 256.0, 256.0),
                points=tuple((float(x), float(y)) for x, y in each),
                visible=(True,) * POINTS,
            )
            writer.add(rng.bytes(JPEG_BYTES), meta)
    return Corpus.open(url)


def write_predictions(
    run: RunDirectory, corpus: Corpus, points_NL2: np.ndarray, rng: np.random.Generator, k: int
) -> None:
    """Writes k landmarks between the annotated points, 2 px off, some of which no one is sure of."""
    landmarks = np.einsum("kl,nlc->nkc", rng.dirichlet(np.full(POINTS, 0.1), k), points_NL2)
    landmarks = (landmarks + rng.normal(0, 2, landmarks.shape)).astype(np.float32)
    confidence = (rng.random(landmarks.shape[:2]) >= MISSING).astype(np.float32)
    first = 0
    for shard in corpus.manifest.shards:
        each = slice(first, first := first + shard.samples)
        storage.save_npz(run.predictions_url(shard.file), points=landmarks[each], confidence=confidence[each])


@contextmanager
def watched(spent: dict[str, float]) -> Iterator[None]:
    """Adds the seconds that each of `PARTS` takes inside to `spent`."""

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def watched_work(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = work(*given, **named)
            spent[name] += time.perf_counter() - started
            return result

        return watched_work

    with ExitStack() as stack:
        for name, (module, function) in PARTS.items():
            stack.enter_context(patch.object(module, function, timed(name, getattr(module, function))))
        yield


def score(run: RunDirectory, corpus: Corpus) -> dict[str, float]:
    """Scores once; seconds by part."""
    spent = dict.fromkeys(("all", "reading annotations", *PARTS), 0.0)
    with watched(spent):
        started = time.perf_counter()
        annotated = AnnotatedImages.of(corpus)
        spent["reading annotations"] = time.perf_counter() - started
        assert annotated is not None
        score_run(run, corpus, annotated, visible=0.5)
        spent["all"] = time.perf_counter() - started
    return spent


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--landmarks", type=int, nargs="+", default=[20, 50, 90])
    parser.add_argument("--repeats", type=int, default=5, help="whose median counts, after one that warms up")
    given = parser.parse_args()
    print(machine(), f"idle before: {100 * idle_share():.0f} %", f"{TRAIN} + {TEST} images", sep="; ")
    columns: dict[str, list[str]] = {}
    for k in given.landmarks:
        rng = np.random.default_rng(0)
        with tempfile.TemporaryDirectory() as folder:
            points = annotated_points(rng)
            corpus, run = write_corpus(f"{folder}/shards", points, rng), RunDirectory(f"{folder}/run")
            write_predictions(run, corpus, points, rng, k)
            repeats = [score(run, corpus) for _ in range(1 + given.repeats)][1:]
        whole = statistics.median(one["all"] for one in repeats)
        for name in repeats[0]:
            taken = [one[name] for one in repeats]
            share = f"{100 * statistics.median(taken) / whole:.1f} %"
            columns.setdefault(name, []).extend((summed_up([1e3 * each for each in taken]), share))
    header = [f"{k} landmarks: {what}" for k in given.landmarks for what in ("ms", "of all")]
    print_table(("", *header), [(name, *cells) for name, cells in columns.items()])


if __name__ == "__main__":
    main()
