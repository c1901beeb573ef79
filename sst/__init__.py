"""Self-training of object landmarks; from Python: `sst.load`, `sst.train_own`, `sst.name_landmarks`, see `sst.api`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sst.api import Landmarks, Predictor, import_published, load, name_landmarks, train_own

__all__ = ["Landmarks", "Predictor", "import_published", "load", "name_landmarks", "train_own"]


def __getattr__(name: str) -> object:
    """Imports `sst.api` when something of it is first asked for, so that `import sst` does not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("sst.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
