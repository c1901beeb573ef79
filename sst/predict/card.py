"""A folder as model hubs take it: the weights as safetensors, and a README.md that says what the model is for.

`landmarks predict` reads it like a run's `model/`, so whoever downloads it can use it at once.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from cluster import storage
from sst.data.shards import Manifest
from sst.predict.naming import load_names
from sst.train.model import ModelRecord, record_url, weights_url
from sst.train.run_directory import RunDirectory

PICTURE = "landmarks.png"

MEANINGS = {
    "model/landmarks": "landmarks that the model finds",
    "model/equivariance_error": "equivariance error, % of the view: how far landmarks stray when the image is warped",
    "model/visible_share": "share of the landmarks that are visible on an image",
    "model/repeatability": "share of the visible landmarks that are found again after a warp",
    "model/looseness": "how far a landmark lies from its place on the mean shape, % of the view, in the median",
    "score/forward": "forward error, %: annotated points found from the landmarks",
    "score/backward": "backward error, %: landmarks found from annotated points",
    "score/landmarks_kept": "landmarks that are visible in over 80 % of the scored images",
}
"""The metrics that a card shows, with what each says. Scores need an annotated corpus."""


def card_files(place: str, record: ModelRecord, licence: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the folder's files.

    Args:
        place: the model's directory; beside it the rest of its run, if that is still there, gives metrics and picture.
        record: of the model.
        licence: of the weights, as the hub calls it.

    Raises:
        UserError: if the named points beside the model are not its own.
    """
    run = RunDirectory(place.rstrip("/").rpartition("/")[0] or ".")
    yield "model.safetensors", storage.read_bytes(weights_url(place))
    yield "model.json", storage.read_bytes(record_url(place))
    named = load_names(place)
    if named is not None:
        yield "names.json", storage.read_bytes(storage.join(place, "names.json"))
    picture = run.figure_url("landmarks")
    if has_picture := storage.exists(picture):
        yield PICTURE, storage.read_bytes(picture)
    names = None if named is None else named.names
    yield "README.md", card(record, metrics_of(run, record), corpus_of(run), names, licence, has_picture).encode()


def metrics_of(run: RunDirectory, record: ModelRecord) -> dict[str, float]:
    """The finished run's metrics, or those in the model's own record."""
    known = {f"model/{name}": value for name, value in record.metrics.items()}
    known["model/landmarks"] = float(len(record.clusters))
    if storage.exists(run.final_metrics_url):
        known |= storage.read_json(run.final_metrics_url)
    return {name: float(known[name]) for name in MEANINGS if name in known}


def corpus_of(run: RunDirectory) -> str | None:
    """What the model learnt from, where the run and its corpus are still there."""
    if not storage.exists(run.settings_url):
        return None
    try:
        manifest = Manifest.load(storage.read_json(run.settings_url)["shards"])
    except (ValueError, KeyError, OSError):
        return None
    return f"{manifest.samples_of('train')} unlabelled images of the corpus {manifest.corpus}"


INTENDED_USE = """Finding corresponding places on images of this kind of object: alignment, measuring shape and
movement, and as a start for points of your own, which are learnt from a handful of annotated images.

It gives landmarks on any image, also of other objects, where they mean nothing: look at the confidences, and check it
on your own images first. Nobody chose where the landmarks lie, and nothing assures that one lies on the same part
everywhere. It was not made to identify, judge or diagnose people, and it may be worse for those of whom it saw few."""


def card(
    record: ModelRecord,
    metrics: Mapping[str, float],
    corpus: str | None,
    names: list[str] | None,
    licence: str,
    picture: bool,
) -> str:
    """The text of README.md, with the metadata that hubs read before it."""
    head: dict[str, Any] = {
        "license": licence,
        "pipeline_tag": "keypoint-detection",
        "library_name": "pytorch",
        "tags": ["landmarks", "self-supervised", "unsupervised", "safetensors"],
    }
    count, side = len(record.clusters), record.network.input_size
    learnt = corpus or "unlabelled images of one kind of object"
    scored = any(name.startswith("score/") for name in metrics)
    what = f"""A detector that puts the same {count} landmarks on every image of one kind of object. It learnt from
{learnt}, by self-training correspondence (Mallis et al., NeurIPS 2020)."""
    how = f"""Input: the object, roughly upright, stretched to {side} x {side} pixels. Output: {count} places and
confidences, of which those from {record.visible:g} on count as visible.

```
landmarks predict THIS_FOLDER MY_IMAGES --out predicted
```"""
    files = f"""`model.safetensors` holds the weights (sha256 `{record.weights}`),
`model.json` the sizes of the network."""
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {count} landmarks, learnt without labels",
        what,
        f"![Landmarks on images that the training has not seen]({PICTURE})" if picture else "",
        f"## Intended use\n\n{INTENDED_USE}",
        f"## How to use it\n\n{how}",
        f"Named points, learnt from annotated images: {', '.join(names)}." if names else "",
        "## Metrics",
        "\n".join(["| metric | value |", "|---|---|", *(f"| {MEANINGS[k]} | {v:.4g} |" for k, v in metrics.items())]),
        "Annotations were used for the scores alone; no training step saw them."
        if scored
        else "The corpus had no annotations, so there are no errors against annotated points.",
        f"## Files\n\n{files}",
        "## Licence",
        "Not stated yet: whoever publishes the weights must choose one." if licence == "unknown" else f"{licence}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
