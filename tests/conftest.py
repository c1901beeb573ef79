"""What all tests share."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

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
