"""Writes docs/reference.md from the configuration models: `python -m docs.reference` (a test compares).

What a setting means stands once, at its field in `sst/config.py`; this page and `--help` are made from it.
"""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sst.config import TrainSettings, differences
from sst.presets import PRESETS

PAGE = Path(__file__).with_name("reference.md")

HEAD = """# Reference: settings and presets

Made from the configuration models by `python -m docs.reference`. Each setting is an option of `landmarks train PRESET`:
`stage1.round_iterations` is `--stage1.round-iterations`; only `keypoints.detector` is `--keypoints`,
`keypoints.superpoint.weights` is `--superpoint-weights`, `keypoints.features.model` is `--features-model`.
Defaults are the published values; [fidelity.md](fidelity.md) says which are ours.
"""


def shown(value: Any) -> str:
    """A default as a reader types it."""
    return "unset" if value is None else " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def limits(field: FieldInfo) -> str:
    """Bounds and choices of a setting."""
    bounds = {"Gt": "> {gt}", "Ge": ">= {ge}", "Lt": "< {lt}", "Le": "<= {le}"}
    texts = [
        bounds[name].format(**{name.lower(): getattr(rule, name.lower())})
        for rule in field.metadata
        if (name := type(rule).__name__) in bounds
    ]
    choices = getattr(field.annotation, "__args__", ())
    texts += [str(choice) for choice in choices if isinstance(choice, str)]
    return ", ".join(texts)


def rows(model: BaseModel, prefix: str = "") -> list[str]:
    """A table row for every setting, nested ones included."""
    lines = []
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            lines += rows(value, f"{prefix}{name}.")
        elif is_dataclass(value):
            inner = "; ".join(f"{own.name} {shown(getattr(value, own.name))}" for own in fields(value))
            lines.append(f"| `{prefix}{name}.*` | {inner} | | {_text(field)} |")
        else:
            lines.append(f"| `{prefix}{name}` | {shown(value)} | {limits(field)} | {_text(field)} |")
    return lines


def _text(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")


def page() -> str:
    """The whole page."""
    settings = TrainSettings()
    parts = [HEAD]
    for name, field in TrainSettings.model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            about = (type(value).__doc__ or "").strip()
            parts.append(f"## {name}\n\n{about}\n\n| setting | default | limits | meaning |\n|---|---|---|---|")
            parts.append("\n".join(rows(value, f"{name}.")) + "\n")
        else:
            parts.append(f"`{name}` (default {shown(value)}): {_text(field)}\n")
    parts.append("## Presets\n\nWhat each says beyond the defaults.\n")
    base = settings.model_dump()
    for name, (about, preset) in PRESETS.items():
        changed = [line.replace("None", "unset") for line in differences(base, preset.model_dump())]
        listed = "\n".join(f"- `{line.split(': ')[0]}`: {line.split(': ', 1)[1]}" for line in changed)
        parts.append(f"### {name}\n\n{about}\n\n{listed or 'The defaults.'}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
