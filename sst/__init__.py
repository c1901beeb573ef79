"""Self-training of object landmarks: corpora, keypoints, network, losses, stages, scoring and pictures."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sst.nn.network import DetectorDescriptor, LandmarkDetector


def import_published(path: str | Path) -> "DetectorDescriptor | LandmarkDetector":
    """Reads the network of a published checkpoint: see `sst.predict.published.import_published`."""
    # Imported only now, so that `import sst` does not wait for torch.
    from sst.predict import published

    return published.import_published(path)
