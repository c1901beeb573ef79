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
from sst.errors import UserError, exit_on_user_error
from sst.predict.card import PICTURE, card_files
from sst.predict.export import export
from sst.predict.predictor import open_model
from sst.run.preflight import check_kept


class Export(BaseModel):
    """Which model is written where."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[str, tyro.conf.Positional]
    """Run directory of `landmarks train`, or the model/ directory in it."""
    out: str
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
    model, record, place_of_model = open_model(config.model)
    for name in ("model.pt2", "model.onnx", "mlflow", "model_fixed.onnx", "card"):
        place = storage.join(config.out, name)
        if storage.exists(place):
            if not config.overwrite:
                raise UserError(f"{place} is there already; choose another --out, or replace it by --overwrite")
            storage.remove(place)
    for name in export(model, record, config.out, config.fixed):
        print(storage.join(config.out, name))
    if config.card:
        for name, data in card_files(place_of_model, record, config.licence):
            storage.write_bytes(storage.join(config.out, "card", name), data)
        print(storage.join(config.out, "card"))
        if not storage.exists(storage.join(config.out, "card", PICTURE)):
            print(f"note: no picture beside {place_of_model}, so the card has none; give the finished run's directory")
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
