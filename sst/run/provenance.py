"""Where a result comes from: versions, commit and machine."""

import os
import subprocess
from importlib import metadata
from pathlib import Path

VERSIONS = ("torch", "ray", "numpy", "scipy", "webdataset", "mlflow", "cuml-cu13", "cupy-cuda13x")
"""Packages whose versions a run notes."""


def provenance(manifest_hash: str) -> dict[str, str]:
    """What a run came from, as MLflow tags: code, versions and data."""
    versions = {name: installed_version(name) for name in VERSIONS}
    tags = {f"version.{name}": version for name, version in versions.items() if version is not None}
    commit = git_commit()
    return tags | {"manifest_sha256": manifest_hash} | ({"mlflow.source.git.commit": commit} if commit else {})


def installed_version(package: str) -> str | None:
    """Version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Commit of this code, with "-dirty" where files differ from it; None outside a checkout.

    Where a copy without history runs, as in a submitted job, `LANDMARKS_COMMIT` may tell.
    """
    if given := os.environ.get("LANDMARKS_COMMIT"):
        return given
    root = Path(__file__).resolve().parents[2]
    try:
        commit = _git(root, "rev-parse", "HEAD")
        if Path(_git(root, "rev-parse", "--show-toplevel")) != root:
            return None  # installed somewhere below another project's checkout
        return commit + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()
