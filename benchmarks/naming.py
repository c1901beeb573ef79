"""How many annotated images do named points take? `python -m benchmarks.naming RUN`.

Learns the annotated points of a finished run's corpus from a few training images, drawn at random, and measures on all
test images. Errors are in per cent of the length that the corpus's scoring protocol divides by.
"""

from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from cluster import storage
from sst.data.corpus import open_corpus
from sst.predict.naming import Examples, curve
from sst.report.evaluate_run import AnnotatedImages, protocol_of
from sst.report.evaluation import PROTOCOLS
from sst.train.run_directory import RunDirectory


def main(
    run: Annotated[str, tyro.conf.Positional],
    counts: tuple[int, ...] = (1, 5, 10, 20, 50, 300),
    draws: int = 10,
    shards: str | None = None,
) -> None:
    """Prints the table.

    Args:
        run: finished run on an annotated corpus.
        counts: numbers of annotated images.
        draws: random choices of images for each number.
        shards: where the corpus lies now, if it has moved.
    """
    directory = RunDirectory(run)
    corpus = open_corpus(shards or storage.read_json(storage.join(run, "settings.json"))["shards"])
    annotated = AnnotatedImages.of(corpus)
    assert annotated is not None, "the corpus has no annotations"
    points, confidence = [], []
    for shard, numbers in annotated.rows:
        arrays = storage.load_npz(directory.predictions_url(shard.file))
        points.append(arrays["points"][numbers])
        confidence.append(arrays["confidence"][numbers])
    everything = Examples(np.concatenate(points), np.concatenate(confidence), annotated.groundtruth)
    test = everything.subset(np.flatnonzero(annotated.is_test))
    train = everything.subset(np.flatnonzero(~annotated.is_test))
    length = PROTOCOLS[protocol_of(corpus)].normaliser(test.targets)
    table = Table("annotated images", "mean error, %", "worst point, %", "spread over draws, %")
    for count in counts:
        errors = []
        for seed in range(draws):
            found = curve(train, test, (count,), draws=1, seed=seed).get(count)
            if found is not None:
                errors.append(100 * (found / length[:, None]).mean(0))
        if errors:
            means = [each.mean() for each in errors]
            worst = np.median([each.max() for each in errors])
            spread = f"{min(means):.2f} to {max(means):.2f}"
            table.add_row(str(count), f"{np.median(means):.2f}", f"{worst:.2f}", spread)
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
