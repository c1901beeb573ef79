"""k-means by every backend, cuML's by stand-ins that are as strict as it is."""

import numpy as np
import pytest

from cluster import KMeansResult, KMeansSettings
from tests.cluster import stand_in
from tests.cluster.backends import BACKENDS, Fit, fit_by


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[stand_in.KMeans]:
    """A machine on which cuML works, by all that the project can see; what it is asked is noted in `fits`."""
    stand_in.install(monkeypatch)
    return stand_in.KMeans


@pytest.fixture(params=BACKENDS)
def fit_rows(request: pytest.FixtureRequest, gpu: type[stand_in.KMeans]) -> Fit:
    """k-means by one backend after the other; those with cuML must have asked it."""
    solve = fit_by(request.param)

    def fitted(x: np.ndarray, settings: KMeansSettings) -> KMeansResult:
        before = len(gpu.fits)
        result = solve(x, settings)
        asked = len(gpu.fits) > before
        varied = bool(np.ptp(np.asarray(x, np.float64), axis=0).any())
        assert asked == (request.param in ("cuml", "nccl") and varied)
        assert result.backend == ("cuml" if asked else "torch")
        return result

    return fitted
