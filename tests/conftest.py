"""What all tests share."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from tests.runs import arguments

torch.set_num_threads(1)
settings.register_profile("default", deadline=None, max_examples=50)
settings.load_profile("default")

FACES = Path(__file__).parents[2] / "shared" / "data" / "faces"


@pytest.fixture(scope="session")
def faces() -> Path:
    """The real face images, where they are present beside the project."""
    if not (FACES / "annotations.csv").exists():
        pytest.skip("the real faces are not beside the project")
    return FACES


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Where whole runs lie, with their tracking database."""
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A corpus of drawings for whole runs."""
    from jobs import pack

    out = tmp_path_factory.mktemp("corpus") / "shards"
    pack.main(f"toy --count 90 --size 96 --test-share 0.3 --shard-samples 16 --out {out}".split())
    return out


@pytest.fixture(scope="session")
def undisturbed(folder, shards) -> Path:
    """A run that nothing happens to; its Ray cluster stays up for other runs of this process."""
    from jobs import train

    train.main(arguments(folder, shards, "undisturbed"))
    return folder / "runs" / "undisturbed"
