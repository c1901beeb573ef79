"""jobs.validate names everything that is wrong with a corpus; jobs.pack --repair rebuilds what is damaged."""

import io
import json
import re
import tarfile

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from cluster import storage
from jobs import pack
from jobs import validate as job
from sst.corpora.drawings import draw
from sst.data.shards import MANIFEST, RawSample, SampleMeta, shard_bytes
from tests.small import files


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(21):
        Image.fromarray(draw(1, number, 64).image).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "cut.jpg").write_bytes(b"no image")
    pack.main(command(tmp_path))
    return tmp_path / "shards"


def command(folder, *more: str) -> list[str]:
    told = f"folder --images {folder}/images --out {folder}/shards --shard-samples 5 --max-skipped 0.2".split()
    return [*told, *more]


def verdict(corpus, capsys) -> tuple[bool, str]:
    capsys.readouterr()
    try:
        job.main([str(corpus)])
        sound = True
    except SystemExit as exit_:
        assert exit_.code == 1
        sound = False
    return sound, capsys.readouterr().out


def rewrite(corpus, number: int, change) -> None:
    """Replaces a shard by one of changed samples, with a manifest that vouches for it."""
    manifest = json.loads((corpus / MANIFEST).read_text())
    shard = manifest["shards"][number]
    with tarfile.open(corpus / shard["file"]) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    keys = sorted({name[:9] for name in members})
    samples = [[key, members[f"{key}.jpg"], json.loads(members[f"{key}.json"])] for key in keys]
    change(samples)
    data = shard_bytes([RawSample(key, jpeg, SampleMeta.model_validate(meta)) for key, jpeg, meta in samples])
    (corpus / shard["file"]).write_bytes(data)
    shard |= {"bytes": len(data), "sha256": storage.sha256(data)}
    (corpus / MANIFEST).write_text(json.dumps(manifest))


def test_a_sound_corpus_is_said_to_be_sound(corpus, capsys):
    sound, said = verdict(corpus, capsys)
    assert sound and "21 images in" in said and "are sound" in said


def cut(path):
    path.write_bytes(path.read_bytes()[:-700])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "missing": (lambda path: path.unlink(), r"missing \("),
    "cut": (cut, r"\d+ bytes \("),
    "flipped": (flip, "sha256 is"),
    "emptied": (lambda path: path.write_bytes(b""), r"0 bytes \("),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_named_and_rebuilt_bit_for_bit(corpus, capsys, damage):
    before = files(corpus)
    DAMAGE[damage][0](corpus / "shard-00001.tar")
    sound, said = verdict(corpus, capsys)
    assert not sound and re.search(f"shard-00001.tar: {DAMAGE[damage][1]}", said)
    assert "--repair" in said and "1 of " in said
    pack.main(command(corpus.parent, "--repair"))
    assert files(corpus) == before and "rebuilt shard-00001.tar" in capsys.readouterr().out
    assert verdict(corpus, capsys)[0]


def test_only_damaged_shards_are_written_again(corpus):
    (corpus / "shard-00001.tar").unlink()
    times = {path: path.stat().st_mtime_ns for path in corpus.iterdir()}
    pack.main(command(corpus.parent, "--repair"))
    assert {path: path.stat().st_mtime_ns for path in corpus.iterdir() if path.name != "shard-00001.tar"} == times


@pytest.mark.parametrize("change", ["image", "setting", "fewer"])
def test_another_source_is_refused_and_changes_nothing(corpus, capsys, change):
    (corpus / "shard-00001.tar").unlink()
    more = []
    if change == "image":
        for path in (corpus.parent / "images").glob("*.png"):
            Image.fromarray(np.full((64, 64, 3), 7, np.uint8)).save(path)
    elif change == "setting":
        more = ["--seed", "5"]
    else:
        (corpus.parent / "images" / "3.png").unlink()
    before = files(corpus)
    with pytest.raises(SystemExit) as exit_:
        pack.main(command(corpus.parent, "--repair", *more))
    assert exit_.value.code == 2 and "pack it again with --overwrite" in capsys.readouterr().err
    assert files(corpus) == before


def grey() -> bytes:
    return simplejpeg.encode_jpeg(np.full((64, 64, 3), 90, np.uint8))


def set_(row: int, field: str, value):
    return lambda samples: samples[row][2].__setitem__(field, value)


def give_points(samples):
    for sample in samples:
        sample[2] |= {"points": [[5.0, 5.0]], "visible": [True]}
    samples[1][2]["points"] = [[900.0, 5.0]]


ODD = {
    "undecodable": (lambda samples: samples[2].__setitem__(1, b"\xff\xd8 no image"), "can't be decoded"),
    "duplicate": (lambda samples: [s.__setitem__(0, f"{int(s[0]) - 5:09d}") for s in samples], "a duplicate or a gap"),
    "split": (set_(0, "split", "test"), "split test in a shard of the train split"),
    "box": (set_(0, "box", [0.0, 0.0, 99.0, 20.0]), "reaches beyond the image of 64 x 64 pixels"),
    "points": (give_points, "visible points [0] lie outside the image"),
    "fewer": (lambda samples: samples.pop(), "4 samples (5 expected)"),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_a_manifest_vouches_for_is_looked_at_too(corpus, capsys, odd):
    rewrite(corpus, 1, ODD[odd][0])
    sound, said = verdict(corpus, capsys)
    assert not sound and ODD[odd][1] in said and "shard-00001.tar: " in said


def test_a_file_that_nothing_explains_is_named(corpus, capsys):
    (corpus / "shard-00099.tar").write_bytes(io.BytesIO().getvalue())
    sound, said = verdict(corpus, capsys)
    assert not sound and "shard-00099.tar: not in the manifest; remove it" in said


def test_without_a_manifest_there_is_no_corpus(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        job.main([str(tmp_path)])
    assert exit_.value.code == 2 and "no manifest.json in it" in capsys.readouterr().err
