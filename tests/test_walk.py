"""The whole walk, as a script and as a notebook, on the demo model: what a user without a network gets."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import jupytext
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import PruningAndFineTuningColab as nb

SCRIPT = Path(nb.__file__)
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
FEW = {"MAX_STEPS": "12", "EVAL_BLOCKS": "8", "CALIBRATION_BLOCKS": "8"}


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A machine that has never seen the script, without a network."""
    folder = tmp_path_factory.mktemp("home")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield folder
    patch.undo()


@pytest.fixture(scope="session")
def script_run(home):
    arguments = [word for name, value in FEW.items() for word in ("--" + name.lower().replace("_", "-"), value)]
    return subprocess.run([sys.executable, SCRIPT, *arguments], cwd=home, capture_output=True, text=True)


@pytest.fixture(scope="session")
def results(script_run, home):
    assert script_run.returncode == 0, script_run.stderr[-3000:]
    (folder,) = (path for path in (home / "results").iterdir() if path.is_dir())
    return folder


def test_the_script_says_that_it_is_the_demo_and_how_to_use_a_real_model(script_run, results):
    assert re.search(r"cannot be reached.*demo.*--model", script_run.stdout)
    assert "Traceback" not in script_run.stderr
    assert str(results.relative_to(results.parents[1])) in script_run.stdout


def test_the_record_holds_everything(results):
    metrics = json.loads((results / "metrics.json").read_text())
    assert list(metrics["perplexity"]) == ["dense", "pruned", "fine_tuned", "dense_fine_tuned"]
    assert metrics["perplexity"]["dense"] < 200, "the demo model has learned something"
    assert metrics["perplexity"]["dense"] != metrics["perplexity"]["pruned"]
    assert metrics["settings"]["model"] == "demo" and metrics["settings"]["pruning_level"] == 0.3
    assert metrics["heads"]["total"] == 32 and metrics["heads"]["closed"] == 10 == len(metrics["heads"]["closed_list"])
    assert torch.tensor(metrics["importance"]).shape == (4, 8)
    assert set(metrics["samples"]) == set(metrics["perplexity"])
    assert set(metrics["tokens_per_second"]) == {"dense", "pruned", "fine_tuned"}
    assert all(text.startswith("The history of the city began") for text in metrics["samples"].values())
    assert set(metrics["seconds"]) == set(metrics["peak_memory_bytes"]) >= {"load model", "importance", "fine-tune", "save model"}
    assert {"python", "torch", "transformers", "datasets"} <= set(metrics["versions"])
    assert metrics["training"]["fine_tuned"]["steps"] == 12 == metrics["training"]["fine_tuned"]["history"]["perplexity"][-1][0]


def test_the_zip_holds_the_report_the_pictures_and_a_model_that_opens(results, tmp_path):
    with zipfile.ZipFile(f"{results}.zip") as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / results.name
    report = (folder / "report.md").read_text()
    assert "| pruned + fine-tuned | 22 / 32 |" in report and "seed 0" in report
    for picture in (*re.findall(r"\((\w+\.png)\)", report), "dense_fine_tuned.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((folder / "metrics.json").read_text())
    tokenizer, model = nb.load_gated(folder / "model")
    text = nb.load_text(nb.Settings(dataset="python-docs"))
    blocks = nb.pack(text["test"], tokenizer, 512)[:8]
    assert nb.perplexity(model, blocks) == pytest.approx(metrics["perplexity"]["fine_tuned"], rel=1e-4)
    plain = nb.load_model(str(folder / "model"), torch.device("cpu"))[1]
    assert nb.perplexity(plain, blocks) == pytest.approx(metrics["perplexity"]["fine_tuned"], rel=1e-4)
    assert int((nb.get_gates(model) == 0).sum()) == 10


STAND_IN = """
import sys, types
from pathlib import Path
downloaded = []
def download(name):
    if not Path(name).exists():
        raise FileNotFoundError(f"Cannot find file: {name}")
    downloaded.append(name)
colab = types.ModuleType("google.colab")
colab.files = types.SimpleNamespace(download=download)
sys.modules["google"], sys.modules["google.colab"] = types.ModuleType("google"), colab
"""


def test_the_notebook_runs_top_to_bottom_and_again(results, tmp_path):
    """`results` comes first, so that the demo model is there."""
    notebook = nbformat.read(NOTEBOOK, 4)
    (form,) = (cell for cell in notebook.cells if "# @title Settings" in cell.source)
    for name, value in FEW.items():
        form.source = re.sub(rf"^{name} = \S+", f"{name} = {value}", form.source, flags=re.M)
    (prune,) = (cell for cell in notebook.cells if "gates = choose_gates(importance" in cell.source and "__main__" in cell.source)
    (settle,) = (cell for cell in notebook.cells if "settings = choose_sources(" in cell.source)
    (compare,) = (cell for cell in notebook.cells if "draw_comparison(run.metrics)" in cell.source)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    with client.setup_kernel():
        def run(source):
            cell = nbformat.v4.new_code_cell(source)
            notebook.cells.append(cell)
            client.execute_cell(cell, len(notebook.cells) - 1)
            return "".join(output.get("text", "") for output in cell.outputs)

        for index, cell in enumerate(list(notebook.cells)):
            if cell is notebook.cells[-1]:
                run(STAND_IN)
            if cell.cell_type == "code":
                client.execute_cell(cell, index)
        assert run("print(downloaded)").strip().endswith(".zip']")
        pictures = [output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
        assert len(pictures) >= 4  # heads, two live plots, comparison
        (folder,) = (path for path in (tmp_path / "results").iterdir() if path.is_dir())
        metrics = json.loads((folder / "metrics.json").read_text())
        again = run(prune.source)
        assert f"pruned: perplexity {metrics['perplexity']['pruned']:.2f}" in again
        run("PRUNING_LEVEL = 0.5")
        run(settle.source)
        half = run(prune.source)
        closed = json.loads(run("print(run.metrics['heads']['closed_list'])"))
        with pytest.raises(CellExecutionError, match="pruned after it was fine-tuned: run section 10 again"):
            run(compare.source)

    # a fresh run at that level, from the record and the files alone
    tokenizer, model = nb.load_model(str(next((results.parents[1] / "cache/PruningAndFineTuningColab").iterdir())), torch.device("cpu"))
    gates = nb.choose_gates(torch.tensor(metrics["importance"]), 0.5)
    nb.set_gates(model, gates)
    blocks = nb.pack(nb.load_text(nb.Settings(dataset="python-docs"))["test"], tokenizer, 512)[:8]
    assert closed == nb.describe_heads(gates)["closed_list"] and len(closed) == 16
    assert f"pruned: perplexity {nb.perplexity(model, blocks):.2f}" in half


def test_fine_tuning_closed_heads_stay_closed_and_may_come_back_when_asked(results, tmp_path):
    settings = nb.Settings(output_dir=str(tmp_path), max_steps=6, learning_rate=1e-3, block_length=64, batch_size=4, pruning_level=0.5)
    cache = next((results.parents[1] / "cache/PruningAndFineTuningColab").iterdir())
    tokenizer, model = nb.load_model(str(cache), torch.device("cpu"))
    blocks = nb.pack_all(nb.load_text(nb.Settings(dataset="python-docs")), tokenizer, settings, 512)
    gates = nb.choose_gates(nb.get_strategy("random").score(model), 0.5)
    nb.set_gates(model, gates)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = nb.Run(settings, torch.device("cpu"), torch.float32)
    tuned = nb.fine_tune(model, blocks, settings, run, "stay", 50.0)
    assert torch.equal(nb.get_gates(tuned), gates)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the original is untouched"
    assert not torch.equal(tuned.state_dict()["lm_head.weight"], before["lm_head.weight"])
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(nb, "GATE_LEARNING_RATE", 0.6)  # only three steps to come back in
        free = nb.fine_tune(model, blocks, nb.dataclasses.replace(settings, reopen_heads=True), run, "reopen", 50.0)
    reopened = nb.get_gates(free)
    assert ((gates == 0) & (reopened != 0)).any(), "no head came back"
    assert (reopened != 0).sum() == (gates != 0).sum(), "as many heads are open as the level says"
    assert not any(parameter_name.endswith("gates") for parameter_name, _ in free.named_parameters())


def test_the_notebook_is_the_script_without_outputs():
    notebook, script = nbformat.read(NOTEBOOK, 4), jupytext.read(SCRIPT)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [(cell.cell_type, cell.source) for cell in script.cells], (
        "out of step: run `jupytext --to ipynb --update --output PruningAndFineTuningColab.ipynb PruningAndFineTuningColab.py`")
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    assert notebook.metadata.accelerator == "GPU"


def test_the_table_of_contents_is_clean():
    headings = [line for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "markdown"
                for line in cell.source.splitlines() if line.startswith("#")]
    assert headings[0].startswith("# ")
    assert [heading.split(".")[0] for heading in headings[1:]] == [f"## {number}" for number in range(1, len(headings))]
