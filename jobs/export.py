"""Writes a model as ONNX, torch.export and MLflow.

DIR/model.onnx (onnxruntime, TensorRT, ...), DIR/model.pt2 (torch.export) and DIR/mlflow (`mlflow models serve`) take
uint8 RGB images (B, H, W, 3) of any size and give landmarks in pixels of these images, and confidences.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict

from cluster import storage
from sst.errors import exit_on_user_error
from sst.outputs import Outputs, refuse_overlap
from sst.predict.export import EXPORTED, export
from sst.predict.predictor import open_model
from sst.run.preflight import check_kept


class Export(BaseModel):
    """Which model is written where."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[str, tyro.conf.Positional]
    """Run directory of `landmarks train`, or the model/ directory in it."""
    out: str
    """Directory or URL that is written to."""
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
    with Outputs(config.out, "export", config.overwrite, EXPORTED) as outputs:
        export(model, record, outputs)
    for name in EXPORTED:
        print(storage.join(config.out, name))
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
