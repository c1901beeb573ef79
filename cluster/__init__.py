"""Correspondence: descriptors in, labels out. Knows nothing of images or networks.

The public functions are here, and are imported when they are asked for: k-means alone needs no more than torch and
NumPy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.assignment import assign, assign_shard
    from cluster.correspondence import correspond
    from cluster.kmeans import KMeansResult, KMeansSettings, fit, sample_rows
    from cluster.matching import match_clusters, shared_labels
    from cluster.merging import apply_merge, count_overlaps, merge_plan
    from cluster.outliers import background_mask, outlier_cut, outlier_scores
    from cluster.pool import fit_pool
    from cluster.rapids import choose_backend
    from cluster.shards import Descriptors, Labels

__all__ = [
    "Descriptors",
    "KMeansResult",
    "KMeansSettings",
    "Labels",
    "apply_merge",
    "assign",
    "assign_shard",
    "background_mask",
    "choose_backend",
    "correspond",
    "count_overlaps",
    "fit",
    "fit_pool",
    "match_clusters",
    "merge_plan",
    "outlier_cut",
    "outlier_scores",
    "sample_rows",
    "shared_labels",
]

_HOMES = {
    "assignment": ("assign", "assign_shard"),
    "correspondence": ("correspond",),
    "kmeans": ("KMeansResult", "KMeansSettings", "fit", "sample_rows"),
    "matching": ("match_clusters", "shared_labels"),
    "merging": ("apply_merge", "count_overlaps", "merge_plan"),
    "outliers": ("background_mask", "outlier_cut", "outlier_scores"),
    "pool": ("fit_pool",),
    "rapids": ("choose_backend",),
    "shards": ("Descriptors", "Labels"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"cluster.{home}"), name)
    raise AttributeError(f"module 'cluster' has no attribute {name!r}")
