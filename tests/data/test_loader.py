"""Which samples a worker sees, and what collation and decoding do to images, boxes and labels."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st

from cluster.shards import Labels
from sst.config import KeypointSettings
from sst.data.loader import (
    Example,
    KeptShards,
    Undecodable,
    balanced,
    batches,
    decode_to_view,
    rank_shards,
    shard_batches,
    training_examples,
)
from sst.data.shards import Manifest, RawSample, SampleMeta, ShardInfo, ShardWriter, read_shard
from sst.nn.geometry import transform_points
from sst.train.extraction import first_keypoints
from sst.train.keypoints import generic_detector
from tests.small import write_toy


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("corpus"))
    write_toy(url, train=40, test=4, shard_samples=8)
    return url, Manifest.load(url)


def labels_of(counts):
    offsets = np.cumsum([0, *counts])
    n = offsets[-1]
    return Labels(offsets, np.ones((n, 2), np.float32), np.arange(n, dtype=np.int16), np.zeros(n, np.float32))


@given(st.integers(1, 20), st.integers(1, 30))
def test_every_sample_of_an_epoch_goes_to_exactly_one_worker(shards, world):
    seen = Counter()
    for rank in range(world):
        mine, part, parts = rank_shards(range(shards), rank, world)
        seen.update((shard, number) for shard in mine for number in range(7) if number % parts == part)
    expected = {(shard, number) for shard in range(shards) for number in range(7)}
    # A shard shared by more than 7 workers leaves some of them without a sample, but none is read twice.
    assert set(seen) == expected and set(seen.values()) == {1}


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 40))
def test_balanced_gives_every_shard_once_and_evenly(sizes, world):
    shards = [
        ShardInfo(file=f"s{i}.tar", split="train", samples=n, bytes=1, sha256="0" * 64) for i, n in enumerate(sizes)
    ]
    parts = balanced(shards, world)
    assert sorted(s.file for part in parts for s in part) == sorted(s.file for s in shards)
    loads = [sum(s.samples for s in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes)


def test_the_stream_is_a_function_of_seed_and_rank(corpus):
    url, manifest = corpus

    def keys(rank, seed, count=100):
        stream = training_examples(url, manifest, lambda f: labels_of([3] * 8), 1, rank, 2, seed)
        return [example.sample.key for example in islice(stream, count)]

    assert keys(0, 7) == keys(0, 7)
    assert keys(0, 7) != keys(1, 7) and keys(0, 7) != keys(0, 8)
    # Over some epochs both workers together see every training image.
    assert set(keys(0, 7)) | set(keys(1, 7)) == {f"{i:09d}" for i in range(40)}


def test_images_with_too_few_labels_are_left_out(corpus):
    url, manifest = corpus
    stream = training_examples(url, manifest, lambda f: labels_of([0, 9, 1, 9, 0, 0, 0, 0]), 9, 0, 1, 0)
    assert {int(e.sample.key) % 8 for e in islice(stream, 60)} == {1, 3}


def test_a_corpus_without_labels_is_refused_instead_of_searched_for_ever(corpus):
    url, manifest = corpus
    stream = training_examples(url, manifest, lambda f: labels_of([2] * 8), 9, 0, 1, 0)
    with pytest.raises(ValueError, match=r"stage1\.min_labels"):
        next(stream)


def test_batches_pad_labels_and_keep_rows_apart(corpus):
    url, manifest = corpus
    counts = [1, 4, 2, 0, 3, 3, 3, 3]
    stream = training_examples(url, manifest, lambda f: labels_of(counts), 1, 0, 1, 0)
    batch = next(batches(stream, 5, 64, skip=0))
    assert batch.images.dtype.is_floating_point is False and batch.images.shape[0] == 5
    for row, key in enumerate(batch.keys):
        count = counts[int(key) % 8]
        assert (batch.cluster[row] >= 0).sum() == count
        assert (batch.cluster[row, count:] == -1).all()


def test_decoding_small_keeps_places(corpus):
    url, manifest = corpus
    sample = next(read_shard(f"{url}/shard-00000.tar"))
    fine, fine_matrix = decode_to_view(sample, 256)
    coarse, coarse_matrix = decode_to_view(sample, 32)
    assert coarse.shape[0] < fine.shape[0]
    box = np.array(sample.meta.box).reshape(2, 2)
    for image, matrix, size in ((fine, fine_matrix, 256), (coarse, coarse_matrix, 32)):
        scale = image.shape[1] / fine.shape[1]
        corners = transform_points(matrix, (box + 0.5) * scale - 0.5)
        np.testing.assert_allclose(corners, [[0, 0], [size, size]], atol=0.02 * size)


def test_shard_batches_keep_the_order(corpus):
    url, manifest = corpus
    keys = [k for b in shard_batches(url, manifest.shards[1], 64, 3) for k in b.keys]
    assert keys == [f"{i:09d}" for i in range(8, 16)]


def examples_with(bad: set[int], count: int = 8) -> list[Example]:
    """Images of which some are no images."""
    samples = []
    for number in range(count):
        image = np.full((32, 32, 3), 10 * number % 250, np.uint8)
        jpeg = b"\xff\xd8 no image" if number in bad else simplejpeg.encode_jpeg(image)
        meta = SampleMeta(source=f"{number}.jpg", split="train", box=(0.0, 0.0, 32.0, 32.0))
        samples.append(RawSample(f"{number:09d}", jpeg, meta))
    return [Example(s, np.full((1, 2), n, np.float32), np.array([n], np.int16)) for n, s in enumerate(samples)]


def test_in_place_of_an_undecodable_image_its_batch_has_the_next_one_with_its_labels():
    counter = Undecodable()
    made = list(batches(iter(examples_with({1, 2, 7})), 4, 32, skip=0, bad=counter))
    assert [[int(key) for key in batch.keys] for batch in made] == [[0, 3, 3, 3], [4, 5, 6, 4]]
    assert made[0].cluster[:, 0].tolist() == [0, 3, 3, 3] and (made[0].images[1] == made[0].images[3]).all()
    assert counter.failed == 3 and counter.seen == 8 and set(counter.reasons) == {f"{n:09d}" for n in (1, 2, 7)}
    assert "1.jpg" in counter.reasons["000000001"]


def test_too_many_undecodable_images_stop_the_run_and_are_listed():
    with pytest.raises(ValueError, match=r"6 of 500 images can't be decoded \(sample 000000000 \(0.jpg\)"):
        list(batches(iter(examples_with(set(range(0, 495, 90)), 600)), 10, 32, skip=0))
    few = Undecodable()
    list(batches(iter(examples_with({3, 300}, 600)), 10, 32, skip=0, bad=few))
    assert few.failed == 2


def test_a_batch_without_any_image_is_an_error():
    with pytest.raises(ValueError, match="no image of a batch can be decoded"):
        list(batches(iter(examples_with({0, 1, 2, 3}, 4)), 4, 32, skip=0))


def test_undecodable_images_keep_their_places_when_a_shard_is_gone_through(tmp_path):
    with ShardWriter(str(tmp_path), "x") as writer:
        for example in examples_with({1}, 4):
            writer.add(example.sample.jpeg, example.sample.meta)
    shard = Manifest.load(str(tmp_path)).shards[0]
    batch = next(shard_batches(str(tmp_path), shard, 32, 4))
    assert batch.keys == tuple(f"{n:09d}" for n in range(4))
    assert (batch.images[1] == 128).all() and (batch.images[2] == 20).all()
    keypoints, _ = first_keypoints(str(tmp_path), shard, generic_detector(KeypointSettings(), 32), 32)
    assert len(keypoints) == 4 and len(keypoints.sample(1)[0]) == 0


def test_kept_shards_are_read_once_until_others_take_their_room(corpus, monkeypatch):
    url, manifest = corpus
    shards = [(f"{url}/{shard.file}", shard.sha256) for shard in manifest.shards][:3]
    sizes = [sum(len(sample.jpeg) for sample in read_shard(*shard)) for shard in shards]
    asked = []

    def counted(url, sha256):
        asked.append(url)
        return read_shard(url, sha256)

    monkeypatch.setattr("sst.data.loader.read_shard", counted)
    kept = KeptShards(sizes[0] + sizes[1] + sizes[2] // 2)  # room for two
    for number in (0, 1, 0, 0, 1, 2, 2, 1, 0):
        found = [(sample.key, sample.jpeg) for sample in kept.read(*shards[number])]
        assert found == [(sample.key, sample.jpeg) for sample in read_shard(*shards[number])]
    assert asked == [shards[number][0] for number in (0, 1, 2, 0)]
    assert list(KeptShards(0).read(*shards[0])) == list(read_shard(*shards[0])) and asked[-1] == shards[0][0]
