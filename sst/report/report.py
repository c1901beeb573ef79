"""The report of a run: one HTML page that needs nothing else, and its pictures as files."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from cluster import storage
from sst.report.advice import LandmarkFacts, Warned
from sst.train.run_directory import RunDirectory

PAGE_QUALITY = 88
"""WebP quality of the page's pictures; RUN/figures has them unchanged."""


@dataclass(frozen=True)
class ReportFigure:
    """A picture of the report.

    Attributes:
        name: file name without ending; galleries of landmarks begin with "landmark_".
        caption: one sentence on what it means.
        png: the picture.
    """

    name: str
    caption: str
    png: bytes

    @property
    def uri(self) -> str:
        """The picture as data URI, in WebP: a page of PNG galleries would be too large for a phone."""
        buffer = io.BytesIO()
        Image.open(io.BytesIO(self.png)).convert("RGB").save(buffer, "WEBP", quality=PAGE_QUALITY)
        return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Card:
    """What stands beside a landmark's gallery.

    Attributes:
        number: of the landmark.
        visible: share of the images on which it is visible.
        loose: how far it lies off its typical place, as a share of the view.
        warned: whether a warning names it.
        text: its metrics as a sentence.
    """

    number: int
    visible: float
    loose: float
    warned: bool
    text: str


def cards_of(facts: LandmarkFacts, warnings: Sequence[Warned]) -> dict[str, Card]:
    """The cards by the names of the galleries."""
    named = {k for warned in warnings for k in warned.landmarks}
    cards = {}
    for k, visible in enumerate(facts.visible):
        loose = 1.0 if np.isnan(facts.looseness[k]) else float(facts.looseness[k])
        said = [
            f"Visible on {100 * visible:.0f} % of the images, {100 * loose:.1f} % of the view off its typical place"
        ]
        if not np.isnan(facts.repeats[k]):
            said.append(f"found again in {100 * facts.repeats[k]:.0f} % of warped images")
        if facts.partner[k] == k:
            said.append("lies on the plane of symmetry")
        elif facts.partner[k] >= 0:
            said.append(f"left/right partner {facts.partner[k]}")
        cards[f"landmark_{k:02d}"] = Card(
            k, round(float(visible), 4), round(loose, 4), k in named, ", ".join(said) + "."
        )
    return cards


MEANINGS = {
    "landmarks": "Channels of the model: each names one place of the object.",
    "equivariance error": "An image is warped at random; how far the landmarks found on it lie from those of the plain "
    "image, moved by the same warp. Small for landmarks that stick to the object. Needs no annotation.",
    "coverage of what recurs": "Share of the labelled points of all clusters, landmarks or not, that have a visible "
    "landmark within a sixteenth of the view. Small where landmarks crowd. Needs no annotation.",
    "forward error": "Annotated points are predicted from the landmarks by a linear regression; the mean error, in the "
    "protocol's unit. Says whether the landmarks hold the shape. Only with annotations.",
    "backward error": "The reverse: landmarks predicted from annotated points. Says whether the landmarks are steady. "
    "Only with annotations.",
    "labels per image": "Keypoints with a cluster that a training image has on average in a round.",
    "label persistence": "Share of a round's labels that the next round finds again, at the same place with the same "
    "cluster.",
    "inertia": "Mean squared distance of descriptors to their cluster's centroid.",
    "off its typical place": "All landmarks of an image are laid onto their mean shape by an affine map; what is left "
    "for this one, in the median. Landmarks on firm parts have 1 to 2 %; on outlines and in the background more.",
    "left/right partner": "The landmark that takes this one's place in the mirrored image.",
}
"""Each metric of the page in a sentence."""


def short(value: Any) -> str:
    """A number with as many digits as a reader needs."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_report(
    run: RunDirectory,
    *,
    title: str,
    summary: Mapping[str, str],
    figures: Sequence[ReportFigure],
    rounds: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    facts: LandmarkFacts,
    warnings: Sequence[Warned],
    notes: Sequence[str] = (),
) -> str:
    """Writes RUN/figures/*.png and RUN/report.html.

    Args:
        run: directory that the page is written to.
        title: heading.
        summary: name and value of the metrics shown first.
        figures: pictures in their order.
        rounds: a row of metrics per round; rows may lack some.
        settings: shown as JSON.
        facts: of the landmarks whose galleries are among the pictures.
        warnings: what to look at.
        notes: sentences shown under the summary.

    Returns:
        URL of the page.
    """
    for figure in figures:
        storage.write_bytes(run.figure_url(figure.name), figure.png)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["short"] = short
    page = environment.from_string(Path(__file__).with_name("report.html").read_text("utf-8")).render(
        title=title,
        summary=summary,
        figures=figures,
        rounds=rounds,
        columns=list(dict.fromkeys(name for entry in rounds for name in entry)),
        settings=json.dumps(settings, indent=1),
        notes=notes,
        warnings=warnings,
        drawn={figure.name for figure in figures},
        meanings=MEANINGS,
        cards=cards_of(facts, warnings),
    )
    url = run.report_url
    storage.write_bytes(url, page.encode())
    return url
