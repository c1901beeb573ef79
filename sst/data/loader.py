"""From shards to batches: which samples a worker sees, in which order, decoded and collated.

The order is a function of seed, phase and rank alone, so a resumed run skips to where it was. Samples are shuffled
and skipped as JPEG bytes; only what is trained on is decoded.
"""

import heapq
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch

from cluster.shards import Labels
from sst.data.shards import Manifest, RawSample, ShardInfo, decode, read_shard
from sst.nn.geometry import box_to_view, resize_matrix
from sst.nn.steps import Batch

SHUFFLE_BUFFER = 1024
"""Samples (as JPEG bytes) among which a worker's stream is shuffled, beside the shuffled shard order."""

GPU_DECODE_THREADS = 8
"""Threads of a worker that decode for a GPU; one does about 1,000 images of 256 px a second."""

KEPT_BYTES = 2**32
"""Of JPEGs that a worker on a GPU keeps after reading them: taking an image out of its shard, 0.6 ms of Python, takes
longer than training on it."""

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Example:
    """One image as bytes, with its labels.

    Attributes:
        sample: the stored image and what is known of it.
        points: float32 (n, 2), heatmap units of the canonical view.
        cluster: int16 (n,).
    """

    sample: RawSample
    points: np.ndarray
    cluster: np.ndarray


class KeptShards:
    """Shards as they were read; those that were not asked for the longest make room for others."""

    def __init__(self, most: int) -> None:
        """Takes how many bytes of JPEGs are kept at most."""
        self._most, self._size = most, 0
        self._kept = OrderedDict[tuple[str, str | None], list[RawSample]]()

    def read(self, url: str, sha256: str | None) -> list[RawSample]:
        """As `read_shard`."""
        known = url, sha256
        if known not in self._kept:
            self._kept[known] = list(read_shard(url, sha256))
            self._size += jpeg_bytes(self._kept[known])
        self._kept.move_to_end(known)
        samples = self._kept[known]
        while self._size > self._most:
            self._size -= jpeg_bytes(self._kept.popitem(last=False)[1])
        return samples


def jpeg_bytes(samples: Iterable[RawSample]) -> int:
    """Of all samples together."""
    return sum(len(sample.jpeg) for sample in samples)


KEPT = KeptShards(KEPT_BYTES)
"""Of this process."""


def samples_of(corpus: str, shard: ShardInfo) -> Iterable[RawSample]:
    """A shard's samples, which stay in memory where there is a GPU to wait for them."""
    read = KEPT.read if torch.cuda.is_available() else read_shard
    return read(f"{corpus}/{shard.file}", shard.sha256)


def rank_shards(order: Sequence[int], rank: int, world: int) -> tuple[list[int], int, int]:
    """Shards of an epoch that one worker reads.

    Args:
        order: shard numbers in the epoch's order.
        rank: this worker.
        world: number of workers; it may exceed the number of shards.

    Returns:
        Its shards; and (part, parts): it takes the samples whose number modulo parts is part.
    """
    slots = min(len(order), world)
    slot = rank % slots
    sharing = len(range(slot, world, slots))
    return list(order[slot::slots]), rank // slots, sharing


def balanced(shards: Sequence[ShardInfo], world: int) -> list[list[ShardInfo]]:
    """Splits shards over workers, every shard once, evenly by samples (largest first, to the least loaded)."""
    loads, parts = [(0, worker) for worker in range(world)], [list[ShardInfo]() for _ in range(world)]
    for shard in sorted(shards, key=lambda shard: (-shard.samples, shard.file)):
        load, least = loads[0]
        heapq.heapreplace(loads, (load + shard.samples, least))
        parts[least].append(shard)
    return parts


def training_examples(
    corpus: str,
    manifest: Manifest,
    load_labels: Callable[[str], Labels],
    min_labels: int,
    rank: int,
    world: int,
    seed: int,
) -> Iterator[Example]:
    """An endless shuffled stream of one worker's training images.

    Args:
        corpus: directory of the shards.
        manifest: its manifest; shards of the training split are read.
        load_labels: gives the labels of a shard, by its file name.
        min_labels: images with fewer labelled points are left out.
        rank: this worker.
        world: number of workers.
        seed: equal on all workers, different for each phase.

    Raises:
        ValueError: if no image has `min_labels` points, or a shard is damaged.
    """
    import webdataset as wds

    shards = manifest.shards_of("train")

    def shard_order() -> Iterator[tuple[ShardInfo, int, int]]:
        for epoch in range(2**31):
            order = np.random.default_rng([seed, epoch]).permutation(len(shards)).tolist()
            mine, part, parts = rank_shards(order, rank, world)
            yield from ((shards[number], part, parts) for number in mine)

    def expand(source: Iterable[tuple[ShardInfo, int, int]]) -> Iterator[Example]:
        barren = 0
        for shard, part, parts in source:
            labels = load_labels(shard.file)
            found = False
            for number, sample in enumerate(samples_of(corpus, shard)):
                points, cluster = labels.sample(number)
                if number % parts == part and len(points) >= min_labels:
                    found = True
                    yield Example(sample, points, cluster)
            barren = 0 if found else barren + 1
            if barren >= 2 * len(shards):
                raise ValueError(
                    f"no training image has at least {min_labels} labelled points; lower stage1.min_labels "
                    "or check the pictures of the first keypoints"
                )

    shuffle = wds.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER // 4, seed=seed * 1_000_003 + rank)
    return iter(wds.DataPipeline(shard_order, expand, shuffle))


def decode_to_view(sample: RawSample, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a stored image no larger than the view needs.

    Args:
        sample: the stored image.
        size: side S of the view.

    Returns:
        uint8 (H, W, 3) and the matrix (3, 3) from its pixels to the canonical view.

    Raises:
        ValueError: if the image cannot be decoded; the message names sample and source.
    """
    x0, y0, x1, y1 = sample.meta.box
    image, stored_height, stored_width = decode(sample, min(1.0, max(size / (x1 - x0), size / (y1 - y0))))
    shrink = resize_matrix(image.shape[1] / stored_width, image.shape[0] / stored_height)
    return image, box_to_view(np.array(sample.meta.box), size) @ np.linalg.inv(shrink)


MAX_UNDECODABLE, UNDECODABLE_AFTER = 0.01, 500
"""Share of undecodable images above which a run stops, and images after which that is judged."""


class Undecodable:
    """Counts images that can't be decoded: the packer wrote sound ones, so these are few or something is wrong.

    Attributes:
        seen: images decoded or tried.
        failed: tries that failed.
        reasons: key of a sample to its source and what is wrong with it.
    """

    def __init__(self) -> None:
        """Begins without any."""
        self.seen = self.failed = 0
        self.reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def decode(self, sample: RawSample, size: int) -> tuple[np.ndarray, np.ndarray] | None:
        """As `decode_to_view`; None for an image that can't be decoded.

        Raises:
            ValueError: if there are too many of them.
        """
        decoded, wrong = None, ""
        try:
            decoded = decode_to_view(sample, size)
        except ValueError as error:
            wrong = str(error)
        with self._lock:
            self.seen += 1
            if wrong:
                self.failed += 1
                if sample.key not in self.reasons:
                    logger.warning("left out: %s", wrong)
                self.reasons[sample.key] = wrong
        if self.seen >= UNDECODABLE_AFTER and self.failed > MAX_UNDECODABLE * self.seen:
            listed = "; ".join(list(self.reasons.values())[:5])
            raise ValueError(
                f"{self.failed} of {self.seen} images can't be decoded ({listed}); "
                "look at the corpus by `landmarks validate`"
            )
        return decoded


def collate(
    decoded: Sequence[tuple[np.ndarray, np.ndarray]],
    points: Sequence[np.ndarray],
    cluster: Sequence[np.ndarray],
    keys: Sequence[str],
) -> Batch:
    """Pads images and labels of a batch to common shapes."""
    count, maximum = len(decoded), max(1, *(len(p) for p in points))
    height, width = (max(image.shape[axis] for image, _ in decoded) for axis in (0, 1))
    images = np.zeros((count, height, width, 3), np.uint8)
    padded, numbers = np.zeros((count, maximum, 2), np.float32), np.full((count, maximum), -1, np.int64)
    for row, (image, _) in enumerate(decoded):
        images[row, : image.shape[0], : image.shape[1]] = image
        padded[row, : len(points[row])] = points[row]
        numbers[row, : len(cluster[row])] = cluster[row]
    stored = np.array([image.shape[1::-1] for image, _ in decoded], np.float32)
    matrices = np.stack([matrix for _, matrix in decoded]).astype(np.float32)
    arrays = (images, stored, matrices, padded, numbers)
    return Batch(tuple(keys), *(torch.from_numpy(array) for array in arrays))


def batches(
    examples: Iterator[Example], size: int, view: int, skip: int, bad: Undecodable | None = None
) -> Iterator[Batch]:
    """Groups a stream into batches, decoding in background threads.

    In place of an image that can't be decoded its batch has the next one of the batch once more, so that batches stay
    full, on all workers alike and whenever they are made.

    Args:
        examples: the stream.
        size: images per batch.
        view: side S of the view.
        skip: batches passed over without decoding (on resume).
        bad: counts undecodable images.

    Raises:
        ValueError: if too many images can't be decoded.
    """
    counter = bad or Undecodable()

    def load(group: list[Example]) -> Batch:
        decoded = [counter.decode(example.sample, view) for example in group]
        sound = [row for row, image in enumerate(decoded) if image is not None]
        if not sound:
            raise ValueError(f"no image of a batch can be decoded ({'; '.join(counter.reasons.values())[:500]})")
        rows = [next((each for each in sound if each >= row), sound[0]) for row in range(len(group))]
        return collate(
            [image for row in rows if (image := decoded[row]) is not None],
            [group[row].points for row in rows],
            [group[row].cluster for row in rows],
            [group[row].sample.key for row in rows],
        )

    stream = islice(examples, skip * size, None)
    groups = iter(lambda: list(islice(stream, size)), [])
    return loaded(load, groups)


def loaded(load: Callable[[list[Example]], Batch], groups: Iterator[list[Example]]) -> Iterator[Batch]:
    """Batches loaded in the background, in order; in pinned memory where there is a GPU."""
    if not torch.cuda.is_available():
        return ordered_map(load, groups, workers=1, ahead=2)  # more threads would take the cores from training
    return ordered_map(lambda group: load(group).pinned(), groups, GPU_DECODE_THREADS, 2 * GPU_DECODE_THREADS)


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int = 2, ahead: int = 16) -> Iterator[R]:
    """Maps in threads, in order, with at most `ahead` results waiting or on their way."""
    source = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="load") as pool:
        pending = deque(pool.submit(function, item) for item in islice(source, ahead))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(source, 1))
            yield result


def shard_batches(corpus: str, shard: ShardInfo, view: int, size: int) -> Iterator[Batch]:
    """All images of a shard in their order, without labels, for extraction and prediction.

    An image that can't be decoded is grey: nothing is found on it, and the others keep their numbers.
    """
    counter = Undecodable()
    grey = np.full((view, view, 3), 128, np.uint8), np.eye(3)

    def load(group: list[Example]) -> Batch:
        nothing = [np.zeros((0, 2), np.float32)] * len(group)
        return collate(
            [counter.decode(e.sample, view) or grey for e in group],
            nothing,
            [np.zeros(0, np.int16)] * len(group),
            [e.sample.key for e in group],
        )

    empty = np.zeros((0, 2), np.float32), np.zeros(0, np.int16)
    samples = (Example(sample, *empty) for sample in samples_of(corpus, shard))
    groups = iter(lambda: list(islice(samples, size)), [])
    return loaded(load, groups)
