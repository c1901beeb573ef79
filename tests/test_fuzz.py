"""Readers of bytes from outside answer damage with their documented errors, whatever the damage."""

import logging

import pytest

from tests.fuzzing import cases, fuzz

pytestmark = pytest.mark.filterwarnings("ignore")


def test_sound_files_are_read(tmp_path):
    for case in cases(tmp_path):
        if case.name != "published":  # too small to be one
            case.read()


def test_damaged_files_give_documented_errors_only(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    counts = fuzz(tmp_path, 150, seed=0)
    assert len(counts) >= 20 and all(sum(own.values()) == 150 for own in counts.values())
    # Damage is told from soundness at all: most of it is refused where a hash or a schema can tell.
    for name in ("manifest", "shard", "labels", "weights", "round record", "COCO"):
        assert counts[name].get("accepted", 0) < 120, (name, counts[name])
