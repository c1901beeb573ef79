"""What training uses of the world around it; tests pass local versions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.correspondence import Sample
from cluster.dispatch import ShardMap, map_serially
from cluster.kmeans import KMeansResult, KMeansSettings


@dataclass(frozen=True)
class Tools:
    """What rank 0 uses to make a round; tests pass local versions.

    Attributes:
        fit: k-means on (descriptor shard, row numbers) pairs.
        run_on_shards: runs a function per shard.
        log: takes one line of metrics.
        stop: whether the run is to end after a checkpoint.
        leaving: whether a machine of the group is about to be taken away; all workers ask at the same step.
        at: takes where this worker is whenever it gets further, as in "in step 12".
        detect_on_shards: runs the detector of first keypoints per shard, with a GPU where it takes one.
    """

    fit: Callable[[Sample, KMeansSettings], KMeansResult]
    run_on_shards: ShardMap = map_serially
    log: Callable[[dict[str, Any]], None] = lambda line: None
    stop: Callable[[], bool] = lambda: False
    leaving: Callable[[], bool] = lambda: False
    at: Callable[[str], None] = lambda place: None
    detect_on_shards: ShardMap = map_serially
