"""Writes a model as ONNX, torch.export and MLflow.

DIR/model.onnx (onnxruntime, TensorRT, ...), DIR/model.pt2 (torch.export) and DIR/mlflow (`mlflow models serve`) take
uint8 RGB images (B, H, W, 3) of any size and give landmarks in pixels of these images, and confidences. On request
DIR/model_fixed.onnx takes one number and size of images alone (TensorRT), and DIR/card is a folder for a model hub.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict, Field

from cluster import storage
from sst.errors import GivenPath, exit_on_user_error
from sst.outputs import Outputs, refuse_overlap
from sst.predict.card import PICTURE, card_files
from sst.predict.export import EXPORTED, export
from sst.predict.predictor import open_model
from sst.run.preflight import check_kept


class Export(BaseModel):
    """Which model is written where."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[GivenPath, tyro.conf.Positional]
    """Run directory of `landmarks train`, or the model/ directory in it."""
    out: GivenPath
    """Directory or URL that is written to."""
    fixed: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=8)], Annotated[int, Field(ge=8)]] | None = None
    """Number, height and width of the images for which model_fixed.onnx is written too, as TensorRT reads it."""
    card: bool = False
    """Also write card/: weights, and a README.md with picture, metrics, licence and intended use."""
    licence: str = "unknown"
    """Licence of the weights as model hubs call it (cc-by-4.0, apache-2.0, ...), for the card."""
    overwrite: bool = False
    """Replace what was exported to --out before."""


def run(config: Export) -> None:
    """Exports and says what was written.

    Raises:
        UserError: if there is no model, or the place is taken.
    """
    check_kept(out=config.out)
    model, record, place = open_model(config.model)
    refuse_overlap(config.out, {"the model": place})
    card = dict(card_files(place, record, config.licence)) if config.card else {}
    with Outputs(config.out, "export", config.overwrite, EXPORTED) as outputs:
        written = export(model, record, outputs, config.fixed)
        for name, data in card.items():
            outputs.write(f"card/{name}", data)
    for name in (*written, *(["card"] if card else [])):
        print(storage.join(config.out, name))
    if card and PICTURE not in card:
        print(f"note: no picture beside {place}, so the card has none; give the finished run's directory")
    print(f"{len(record.clusters)} landmarks; visible from confidence {record.visible:g}; input uint8 RGB (B, H, W, 3)")
    path = f"PATH={Path(sys.executable).parent}:$PATH"  # MLflow starts uvicorn by its name
    print(f"serve it: {path} mlflow models serve -m {storage.join(config.out, 'mlflow')} --env-manager local")


COMMAND = Export


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None, prog: str = "python -m jobs.export") -> None:
    """Parses the command line and exports; a mistake gives a message on stderr and exit code 2."""
    run(tyro.cli(COMMAND, prog=prog, description=__doc__, args=arguments))


if __name__ == "__main__":
    main()
