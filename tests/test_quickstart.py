"""examples/quickstart.ipynb runs from top to bottom: with fewer images and a smaller network than a reader's."""

import re
from pathlib import Path

import nbclient
import nbformat

from sst.corpora.drawings import LANDMARK_NAMES

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"

SMALLER = """
from sst.run import own
from tests.small import SETTINGS

IMAGES, LANDMARKS, MINUTES, WORK = 90, 6, None, {work!r}
own.choose = lambda images, landmarks, machine: SETTINGS
"""
"""In place of the parameters: `train_own` would otherwise choose settings that take minutes."""


def test_the_notebook_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)


def test_the_notebook_runs_from_a_folder_to_named_landmarks(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = SMALLER.format(work=str(tmp_path))
    nbclient.NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    (report,) = re.findall(r"landmarks; report: (\S+)", text)
    assert len(pictures) == 2 and Path(report).is_file() and Path(report).is_relative_to(tmp_path)
    errors = dict(re.findall(r"^(.+?) +(\d+\.\d) %$", text, re.MULTILINE))
    assert list(errors) == [*LANDMARK_NAMES, "mean"]
