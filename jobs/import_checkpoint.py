"""Reads a checkpoint that the paper's authors published, of either stage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict, Field

from cluster import storage
from sst.errors import GivenPath, UserError, exit_on_user_error
from sst.nn.network import LandmarkDetector
from sst.predict.published import FILES, RECORD, Published, is_model, read_published, save_published
from sst.run.preflight import check_kept


class ImportCheckpoint(BaseModel):
    """Which file, and where to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Annotated[GivenPath, tyro.conf.Positional] = Field(
        description="The published .pth file: a local path or URL."
    )
    out: GivenPath = Field(description="Directory or URL that the model is written to, as safetensors and JSON.")
    overwrite: bool = Field(False, description="Replace the model that is at --out.")


def run(config: ImportCheckpoint) -> None:
    """Reads, writes, and says what was found.

    Raises:
        UserError: if the file is not a published checkpoint, or the place is taken.
    """
    check_kept(out=config.out)
    if Path(config.out).is_file():
        raise UserError(f"{config.out}: a file; --out must be a directory or URL")
    holds_model = is_model(config.out)
    if holds_model and not config.overwrite:
        raise UserError(f"{config.out}: holds a model already; choose another --out, or replace it by --overwrite")
    there = [name for name in FILES if storage.exists(storage.join(config.out, name))]
    if there and not holds_model:
        raise UserError(
            f"{config.out}: {there[0]} is there already, and {RECORD} is not one of this program, so nothing is "
            "touched; choose another --out"
        )
    published = read_published(config.file)
    save_published(config.out, published)
    print("\n".join(described(config.file, published)))
    print(f"wrote {config.out}")


def described(file: str, published: Published) -> list[str]:
    """What was found in the file, line by line."""
    stage2 = isinstance(published.model, LandmarkDetector)
    steps = "unknown" if published.iteration is None else published.iteration
    parameters = sum(parameter.numel() for parameter in published.model.parameters())
    lines = [f"read {file}: stage {2 if stage2 else 1}, iteration {steps}, {parameters} parameters"]
    if isinstance(published.model, LandmarkDetector):
        active = published.active
        lines.append(f"{published.model.landmark.out.out_channels} channels, {len(active)} of them active: {active}")
    elif published.centroids_KD is not None:
        lines.append(f"{len(published.centroids_KD)} centroids")
    else:
        lines.append("no centroids: saved before the first clustering")
    if published.unused:
        lines.append(f"not taken, unused by the published network too: {', '.join(published.unused)}")
    if published.left_out:
        lines.append(f"left out: {', '.join(published.left_out)}")
    return lines


COMMAND = ImportCheckpoint


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None, prog: str = "python -m jobs.import_checkpoint") -> None:
    """Parses the command line and imports; a mistake gives a message on stderr and exit code 2."""
    config = tyro.cli(COMMAND, prog=prog, description=__doc__, args=arguments)
    run(config)


if __name__ == "__main__":
    main()
