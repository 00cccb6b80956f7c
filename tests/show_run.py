"""Runs the notebook from top to bottom on a real model, and puts its outputs into PruningAndFineTuningColab.ipynb.

    python tests/show_run.py SmolLM2-135M-Instruct.Q4_1.gguf wikitext-2

The second is a folder with valid.txt and test.raw.txt. Without the two, the outputs of the last run are put in again,
cell by cell, as after a change of the prose. The form keeps its defaults; SHOWN is what this run sets instead. About an
hour on two processor cores. Pictures are reduced to 64 colours and bars are left out; the explorer and the box to talk
to the models are shown as the pictures in .github/assets.
"""

import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import jupytext
import nbclient
import nbformat
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOK, RAW = ROOT / "PruningAndFineTuningColab.ipynb", Path(tempfile.gettempdir(), "show_run.ipynb")
SHOWN = {"model": "SmolLM2-135M-Instruct.Q4_1.gguf", "train_file": "wikitext-2/valid.txt",
         "test_file": "wikitext-2/test.raw.txt", "prune": "both", "pruning_level": 0.1, "eval_blocks": 24,
         "batch_size": 2, "max_steps": 100, "precision": "bf16", "control": "yes", "output_dir": "results"}  # fmt: skip


def fewer_colours(png: str) -> str:
    """A picture, base64, with 64 colours."""
    picture, packed = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    picture.quantize(64, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
    return base64.b64encode(packed.getvalue()).decode()


def presentable(outputs: list, place: str, source: str) -> list:
    """A cell's outputs without bars, metadata and names of this machine's folders; a picture for what has widgets."""
    shown, text = [], "".join(part.text for part in outputs if part.output_type == "stream" and part.name == "stdout")
    for name in re.findall(r"^    show_(explorer|talk)\(", source, re.M):
        picture = base64.b64encode((ROOT / f".github/assets/{name}.png").read_bytes()).decode()
        shown.append(nbformat.v4.new_output("display_data", data={"image/png": fewer_colours(picture)}))
    text = text.replace(place, "").replace(str(Path.home()), "~")
    if text.strip():
        shown.append(nbformat.v4.new_output("stream", name="stdout", text=text))
    for part in outputs:
        data = {kind: value for kind, value in part.get("data", {}).items() if kind in ("image/png", "text/markdown")}
        if "image/png" in data:
            data["image/png"] = fewer_colours(data["image/png"])
        if data:
            shown.append(nbformat.v4.new_output("display_data", data=data))
    return shown


def what_runs(source: str) -> str:
    """The part of a cell that runs; another cell defines things only, and shows nothing."""
    return source[source.find("if __name__") :] if "if __name__" in source else ""


def execute(model: Path, texts: Path) -> None:
    """Runs the notebook with the settings SHOWN in a new folder; what it showed is in RAW."""
    sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]
    from conftest import fill_form

    notebook = jupytext.read(ROOT / "PruningAndFineTuningColab.py")
    fill_form(notebook, SHOWN)
    place = os.path.realpath(tempfile.mkdtemp(prefix="show_run_"))
    Path(place, SHOWN["model"]).symlink_to(model)
    Path(place, "wikitext-2").symlink_to(texts)
    os.environ["HF_HUB_OFFLINE"] = "1"
    notebook.metadata["place"] = place
    try:
        nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": place}}).execute()
    finally:
        nbformat.write(notebook, RAW)


def main():
    if len(sys.argv) > 2:
        execute(*(Path(word).resolve() for word in sys.argv[1:3]))
    raw, committed = (nbformat.read(path, as_version=4) for path in (RAW, NOTEBOOK))
    shown = {what_runs(cell.source): cell.outputs for cell in raw.cells if cell.cell_type == "code"}
    for number, cell in enumerate((cell for cell in committed.cells if cell.cell_type == "code"), 1):
        cell.outputs = presentable(shown.get(what_runs(cell.source), []), raw.metadata["place"] + "/", cell.source)
        cell.execution_count = number
        if what_runs(cell.source) not in shown and "# @title Settings\n" not in cell.source:
            print(f"changed since the run: {cell.source[:70]!r}")
    nbformat.write(committed, NOTEBOOK)
    print(f"{NOTEBOOK}: {NOTEBOOK.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
