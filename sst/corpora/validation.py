"""Whether a corpus is what its manifest says, down to every image and annotation."""

from dataclasses import dataclass

import numpy as np

from cluster import storage
from sst.data.shards import Manifest, RawSample, ShardInfo, decode, read_shard
from sst.progress import with_progress


@dataclass(frozen=True)
class Problem:
    """Something wrong with a corpus.

    Attributes:
        what: names place and trouble.
        shard: number of the shard that has to be rebuilt; None where rebuilding would change nothing.
    """

    what: str
    shard: int | None = None


def validate(url: str, manifest: Manifest) -> list[Problem]:
    """Reads every shard and decodes every image.

    Found are: shards that are missing, of another size or content than recorded, or cut; numbers of samples that
    differ; keys that are not the expected ones (so also duplicates, in a shard or across shards); images that can't be
    decoded; annotations that are odd; files that no manifest entry explains.

    Args:
        url: directory of the corpus.
        manifest: its manifest.
    """
    found, first = [], 0
    for number, shard in enumerate(with_progress(manifest.shards, "validating")):
        found += _shard_problems(url, manifest, number, shard, first)
        first += shard.samples
    known = {shard.file for shard in manifest.shards}
    strays = [name for name in storage.list_names(url) if name.endswith(".tar") and name not in known]
    return found + [Problem(f"{name}: not in the manifest; remove it") for name in strays]


def _shard_problems(url: str, manifest: Manifest, number: int, shard: ShardInfo, first: int) -> list[Problem]:
    path = storage.join(url, shard.file)
    if not storage.exists(path):
        return [Problem(f"{shard.file}: missing ({shard.bytes} bytes expected)", number)]
    if (size := storage.size(path)) != shard.bytes:
        return [Problem(f"{shard.file}: {size} bytes ({shard.bytes} expected)", number)]
    try:
        samples = list(read_shard(path, shard.sha256))
    except ValueError as error:
        # The message's remedy is for readers; whoever validates is told it once, at the end.
        return [Problem(f"{shard.file}: {str(error).removeprefix(f'{path}: ').partition('; ')[0]}", number)]
    found = []
    if len(samples) != shard.samples:
        found.append(Problem(f"{shard.file}: {len(samples)} samples ({shard.samples} expected)", number))
    for place_in_shard, sample in enumerate(samples):
        name = f"{shard.file}: sample {sample.key} ({sample.meta.source})"
        if sample.key != f"{first + place_in_shard:09d}":
            found.append(Problem(f"{name}: key {first + place_in_shard:09d} expected; a duplicate or a gap", number))
        found += [Problem(f"{name}: {what}") for what in _sample_problems(sample, manifest, shard)]
    return found


def _sample_problems(sample: RawSample, manifest: Manifest, shard: ShardInfo) -> list[str]:
    meta, found = sample.meta, []
    try:
        image, height, width = decode(sample)
    except ValueError as error:
        return [f"can't be decoded ({error})"]
    if meta.split != shard.split:
        found.append(f"split {meta.split} in a shard of the {shard.split} split")
    x0, y0, x1, y1 = meta.box
    if x0 < -0.5 or y0 < -0.5 or x1 > width + 0.5 or y1 > height + 0.5:
        found.append(f"box {meta.box} reaches beyond the image of {width} x {height} pixels")
    if meta.points is not None and meta.visible is not None:
        if len(meta.points) != manifest.landmarks:
            found.append(f"{len(meta.points)} points, the manifest says {manifest.landmarks}")
        points, visible = np.array(meta.points), np.array(meta.visible, bool)
        outside = ((points < -0.5) | (points > np.array([width, height]) - 0.5)).any(-1) & visible
        if outside.any():
            found.append(f"visible points {np.flatnonzero(outside).tolist()} lie outside the image")
    return found
