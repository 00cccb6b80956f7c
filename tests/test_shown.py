"""The committed notebook shows a real run: every cell that runs something has its output, and nothing else is in it."""

import base64
import json
import re
from pathlib import Path

import nbformat
import pytest

import PruningAndFineTuningColab as nb

CELLS = nbformat.read(Path(nb.__file__).with_suffix(".ipynb"), as_version=4).cells
RUN_CELLS = [cell for cell in CELLS if cell.cell_type == "code" and "if __name__ ==" in cell.source]
OUTPUTS = [part for cell in CELLS if cell.cell_type == "code" for part in cell.outputs]
TEXT = "".join(part.get("text", "") + part.get("data", {}).get("text/markdown", "") for part in OUTPUTS)


@pytest.mark.parametrize("cell", RUN_CELLS, ids=lambda cell: re.sub(r"\W+", " ", cell.source[-60:]))
def test_a_cell_that_runs_something_shows_it(cell):
    is_set_up = "subprocess" in cell.source  # installs what Colab lacks
    assert bool(cell.outputs) != is_set_up


def test_no_error_no_bar_no_widget_and_no_place_of_a_machine():
    assert {part.output_type for part in OUTPUTS} == {"stream", "display_data"}
    assert {part.name for part in OUTPUTS if part.output_type == "stream"} == {"stdout"}
    kinds = {kind for part in OUTPUTS if part.output_type == "display_data" for kind in part.data}
    assert kinds == {"image/png", "text/markdown"}
    assert not re.search(r"/tmp/|/root/|/home/|/work/|Traceback|it/s\]|\x1b", TEXT)
    assert "widgets" not in json.dumps([cell.metadata for cell in CELLS])


def test_pictures_are_small():
    sizes = [len(base64.b64decode(part.data["image/png"])) for part in OUTPUTS if "image/png" in part.get("data", {})]
    assert len(sizes) >= 7 and max(sizes) <= 120_000 and sum(sizes) <= 2_500_000


def test_every_stage_and_every_measure_is_shown():
    for words in (*nb.STAGES.values(), *nb.ABILITIES.values(), "SmolLM2-135M-Instruct", "parameters", "opened again"):
        assert words in TEXT, words
