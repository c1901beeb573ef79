"""The report of a run: one HTML page that needs nothing else, and its pictures as files."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from cluster import storage

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


def short(value: Any) -> str:
    """A number with as many digits as a reader needs."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_report(
    run_url: str,
    *,
    title: str,
    summary: Mapping[str, str],
    figures: Sequence[ReportFigure],
    rounds: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> str:
    """Writes RUN/figures/*.png and RUN/report.html.

    Args:
        run_url: directory of the run.
        title: heading.
        summary: name and value of the figures shown first.
        figures: pictures in their order.
        rounds: a row of figures per round; rows may lack some.
        settings: shown as JSON.
        notes: sentences shown under the summary.

    Returns:
        URL of the page.
    """
    for figure in figures:
        storage.write_bytes(storage.join(run_url, "figures", f"{figure.name}.png"), figure.png)
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
    )
    url = storage.join(run_url, "report.html")
    storage.write_bytes(url, page.encode())
    return url
