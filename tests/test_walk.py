"""The whole walk, as a script and as a notebook, on the demo model: what a user without a network gets."""

import contextlib
import json
import re
import runpy
import shutil
import sys
import zipfile
from pathlib import Path

import families
import jupytext
import nbformat
import pytest
import torch
from conftest import CPU, FEW, SCRIPT, client_of, fill_form, results_in
from nbclient.exceptions import CellExecutionError
from safetensors.torch import load_file

import PruningAndFineTuningColab as nb

NOTEBOOK = SCRIPT.with_suffix(".ipynb")


@pytest.fixture(scope="module")
def results(script_run, home):
    assert script_run.returncode == 0, script_run.stderr[-3000:]
    return results_in(home / "results")[0]


@pytest.fixture(scope="module")
def metrics(results):
    return json.loads((results / "metrics.json").read_text())


def measured_blocks(tokenizer):
    return nb.pack(nb.load_text(nb.Settings(dataset="python-docs"))["test"], tokenizer, 128)[: FEW["eval_blocks"]]


def test_the_record_holds_everything(metrics):
    perplexity, size, parameters = metrics["perplexity"], metrics["size"], metrics["parameters"]
    assert list(perplexity) == ["dense", "pruned", "repaired", "fine_tuned", "dense_fine_tuned"]
    assert perplexity["dense"] < 200, "the demo model has learned something"
    assert perplexity["dense"] != perplexity["pruned"]
    assert metrics["settings"]["model"] == "demo" and metrics["settings"]["pruning_level"] == 0.3
    assert metrics["heads"]["total"] == 32 and metrics["heads"]["closed"] == 10 == len(metrics["heads"]["closed_list"])
    assert torch.tensor(metrics["importance"]).shape == (4, 8)
    assert set(metrics["samples"]) == set(perplexity) and set(size) == {"dense", "pruned"}
    counted = {name: value for name, value in size["dense"].items() if "second" not in name}
    assert set(counted) == {"parameters", "flops_per_token", "cache_bytes_per_token"}
    assert all(0 < size["pruned"][name] < value for name, value in counted.items())
    assert parameters["fine_tuned"] == parameters["pruned"] == size["pruned"]["parameters"]
    assert parameters["dense_fine_tuned"] == parameters["dense"] == metrics["model"]["parameters"]
    assert metrics["compact_difference"] < 1e-5
    assert metrics["reopened_difference"] == {"compact": 0, "zeroed": pytest.approx(0, abs=1e-5)}
    assert all(text.startswith(metrics["settings"]["prompt"]) for text in metrics["samples"].values())
    assert all(set(metrics[name]) == set(perplexity) for name in nb.ABILITIES)
    steps = {"load model", "plan", "importance", "repair", "compact", "fine-tune", "save model"}
    assert set(metrics["seconds"]) == set(metrics["peak_memory_bytes"]) >= steps
    assert {"python", "torch", "transformers", "datasets"} <= set(metrics["versions"])
    tuning = metrics["training"]["fine_tuned"]
    assert tuning["planned_steps"] == 12 >= tuning["steps"] == tuning["history"]["perplexity"][-1][0]


def test_the_zip_holds_the_report_the_pictures_and_a_model_that_opens(results, metrics, tmp_path):
    with zipfile.ZipFile(f"{results}.zip") as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / results.name
    report = (folder / "report.md").read_text()
    wanted, parameters = metrics["perplexity"]["fine_tuned"], metrics["parameters"]["fine_tuned"]
    against = wanted / metrics["perplexity"]["dense"] - 1
    row = (f"| pruned + fine-tuned | {parameters / 1e6:.2f} M | {4 * parameters / 1e6:.1f} | {wanted:.2f} | "
           f"{against:+.1%} |")
    assert "10 of 32 heads closed" in report and row in report and "seed 0" in report
    for picture in (*re.findall(r"\((\w+\.png)\)", report), "dense_fine_tuned.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    tokenizer, model = nb.load_gated(folder / "model-zeroed")
    blocks = measured_blocks(tokenizer)
    assert nb.perplexity(model, blocks) == pytest.approx(wanted, rel=1e-4)
    assert int((nb.get_gates(model) == 0).sum()) == 10
    for form in ("compact", "zeroed"):
        assert nb.perplexity(nb.reopen(folder / f"model-{form}"), blocks) == pytest.approx(wanted, rel=1e-4)
    sizes = {form: (folder / f"model-{form}/model.safetensors").stat().st_size for form in ("compact", "zeroed")}
    assert sizes == metrics["file_bytes"] and sizes["compact"] < sizes["zeroed"]
    assert sizes["compact"] == pytest.approx(4 * parameters, abs=10_000)
    card = (folder / "model-compact" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "trust_remote_code=True" in card
    assert "10 of 32 heads removed" in card and row in card
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors", ".md", ".png", ".py"}
    assert json.loads((folder / "model-compact" / "config.json").read_text())["use_cache"] is True


def test_the_script_says_what_it_does_and_hands_on_no_secret_and_no_folder_of_this_machine(results, script_run, secret):
    """It says that it is the demo, how to use a real model, and where the results are."""
    assert re.search(r"cannot be reached.*demo.*--model", script_run.stdout)
    assert "Traceback" not in script_run.stderr
    assert str(results.relative_to(results.parents[1])) in script_run.stdout
    for path in (*results.rglob("*"), Path(f"{results}.zip")):
        assert path.is_dir() or secret.encode() not in path.read_bytes()
    with zipfile.ZipFile(f"{results}.zip") as archive:
        assert not [name for name in archive.namelist() if secret.encode() in archive.read(name)]
    assert secret not in script_run.stdout + script_run.stderr
    for path in (*results.glob("model-*/*.json"), *results.glob("model-*/*.md"), *results.glob("*.md")):
        assert str(results.parents[1]) not in path.read_text()


STAND_IN = """
import sys, types
downloaded = []
colab = types.ModuleType("google.colab")
colab.files = types.SimpleNamespace(download=lambda name: downloaded.append(open(name).name))
sys.modules["google"], sys.modules["google.colab"] = types.ModuleType("google"), colab
"""


def test_the_notebook_runs_top_to_bottom_and_again(results, demo, tmp_path):
    notebook = nbformat.read(NOTEBOOK, 4)
    fill_form(notebook, FEW)
    (prune,) = (cell for cell in notebook.cells if "run.settings = settings\n" in cell.source)
    (settle,) = (cell for cell in notebook.cells if "settings = start_settings(MORE)" in cell.source)
    (compare,) = (cell for cell in notebook.cells if "draw_dashboard(run.metrics" in cell.source)
    client = client_of(notebook, tmp_path)
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
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        # heads, attention, two live plots, comparison
        assert len([output for output in outputs if "image/png" in output.get("data", {})]) >= 5
        folder, metrics = results_in(tmp_path / "results")
        travels = "model-compact/modeling_pruned.py"
        same = (folder / travels).read_text() == (results / travels).read_text()
        assert same, "the same code from a notebook as from the script"
        assert metrics["reopened_difference"] == {"compact": 0}
        assert f"pruned: perplexity {metrics['perplexity']['pruned']:.2f}" in run(prune.source)
        run("PRUNING_LEVEL = 0.5")
        run(settle.source)
        half = run(prune.source)
        closed = json.loads(run("print(run.metrics['heads']['closed_list'])"))
        assert run("print(pruned is model)").strip() == "True", "what was repaired before belongs to other gates"
        with pytest.raises(CellExecutionError, match="pruned after it was fine-tuned: run sections 9 to 14 again"):
            run(compare.source)

    # a fresh run at that level, from the record and the files alone
    tokenizer, model = nb.load_model(str(demo), CPU)
    gates = nb.choose_gates(torch.tensor(metrics["importance"]), 0.5)
    nb.set_gates(model, gates)
    assert closed == nb.describe_units(model, gates)["heads"]["closed_list"] and len(closed) == 16
    assert f"pruned: perplexity {nb.perplexity(model, measured_blocks(tokenizer)):.2f}" in half


@pytest.fixture
def short_run(demo, tmp_path, monkeypatch, capsys):
    """Runs the script on a small model of a family with the demo's tokenizer; folder, record, and what it printed."""

    def run_on(family, words, **changes):
        shutil.copytree(demo, tmp_path / "tiny", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        families.make(family, vocab_size=1024, **changes).save_pretrained(tmp_path / "tiny")
        few = "--block-length 64 --eval-blocks 4 --calibration-blocks 2 --gate-steps 20 --max-steps 4 --no-control"
        words = f"--model tiny --dataset python-docs {few} {words}".split()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *(word.replace("+", " ") for word in words)])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # the script has one of its own
        with contextlib.suppress(SystemExit):  # a sweep stops after its table
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return *results_in(tmp_path / "results"), capsys.readouterr().out

    return run_on


def rows_left(folder: Path, name: str) -> list[int]:
    """How many rows a projection has in each layer of the compact model."""
    weights = load_file(folder / "model-compact" / "model.safetensors")
    return [len(weights[path]) for path in sorted(weights) if path.endswith(f"{name}.weight")]


def test_a_sweep_runs_from_the_script(short_run):
    """As a script the cells run in order, so what a cell needs has to be above it; a sweep stops after its table."""
    words = "--strategy fisher --pruning-level 0.5 --sweep fisher+random+0.25+0.5 --repair 4"
    folder, metrics, said = short_run("GPT-2", words)
    rows = (folder / "sweep.csv").read_text().splitlines()
    assert rows[0] == "prune,strategy,level,closed,parameters,flops_per_token,pruned,repaired" and len(rows) == 9
    assert "fine_tuned" not in metrics["perplexity"]
    assert metrics["sweep"][1]["pruned"] == metrics["perplexity"]["pruned"], "of the same heads"
    assert "|  | 25% | 50% |" in said and "\n| both, fisher | " in said and Path(f"{folder}.zip").exists()


def test_a_family_that_cannot_be_compacted_keeps_its_gates_and_says_so(short_run):
    folder, metrics, said = short_run("CodeGen", "", n_positions=512)
    assert "nothing can be cut out, because cut, it" in said and metrics["size"] == {}
    assert "CodeGenForCausalLM keeps its gates, and its size: cut, it" in said
    assert "is not compact, so it is saved in the zeroed form" in said
    assert [path.name for path in folder.glob("model-*")] == ["model-zeroed"]
    assert "2 of 8 heads closed" in (folder / "model-zeroed" / "README.md").read_text()


def test_heads_and_neurons_are_pruned_as_far_as_the_loss_allows(short_run):
    """--prune both and --max-loss, from the command to the files: the level is found, and what is closed is gone."""
    words = "--prune both --pruning-level auto --max-loss 0.5 --strategy fisher --repair 4 --save-model compact+zeroed"
    folder, metrics, said = short_run("Llama, SmolLM2", words)
    level, heads, neurons = metrics["level"], metrics["heads"], metrics["neurons"]
    assert metrics["settings"]["pruning_level"] == level["found"] > 0
    assert (folder / "level.png").read_bytes().startswith(b"\x89PNG")
    for point in level["points"]:
        assert (point["repaired"] <= 1.5 * level["dense"]) == (point["level"] <= level["found"])
    assert metrics["size"]["pruned"]["parameters"] < metrics["size"]["dense"]["parameters"]
    assert max(metrics["reopened_difference"].values()) < 1e-6
    assert set(metrics["reopened_difference"]) == {"compact", "zeroed"}
    closed = f"{heads['closed']} of 8 heads and " * (heads["closed"] > 0) + f"{neurons['closed']} of 128 neurons"
    left = ", ".join(map(str, neurons["open_per_layer"]))
    assert neurons["closed"] > 0 and rows_left(folder, "up_proj") == neurons["open_per_layer"]
    assert f"neurons left, layer by layer: {left}." in (folder / "report.md").read_text()
    assert f"{closed} removed" in (folder / "model-compact" / "README.md").read_text()


def test_reopened_heads_are_in_the_compact_model_too_which_is_handed_on_in_16_bits(short_run):
    """(16 bits are the default wherever there is a GPU.)"""
    words = "--reopen-heads --save-model compact+zeroed --pruning-level 0.5 --precision bf16"
    folder, metrics, said = short_run("OPT", words)
    heads = metrics["heads_after_fine_tuning"]["open_per_layer"]
    shapes = [int(rows / 8) for rows in rows_left(folder, "q_proj")]
    assert shapes == heads and sum(heads) == 4 and "closed heads came back" in said
    assert metrics["precision"] == "bfloat16" and metrics["reopened_difference"]["compact"] == 0
    assert metrics["reopened_difference"]["zeroed"] < 1e-5


def test_the_notebook_is_the_script():
    def parts(cells):
        kept = ("cellView", "jupyter", "jp-MarkdownHeadingCollapsed", "id")
        return [(cell.cell_type, cell.source, [cell.metadata.get(key) for key in kept]) for cell in cells]

    notebook, script = nbformat.read(NOTEBOOK, 4), jupytext.read(SCRIPT)
    remedy = f"jupytext --to ipynb --update --output {NOTEBOOK.name} {SCRIPT.name}"
    assert parts(notebook.cells) == parts(script.cells), f"out of step: run `{remedy}`"
    assert notebook.metadata.accelerator == "GPU"
    assert notebook.metadata.colab.collapsed_sections == ["workshop", "loop", "cut"]
    for name in notebook.metadata.colab.collapsed_sections:
        (heading,) = (cell for cell in notebook.cells if cell.metadata.get("id") == name)
        assert heading.metadata["jp-MarkdownHeadingCollapsed"]


def test_the_table_of_contents_is_clean():
    told = "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "markdown")
    headings = re.findall(r"^##? .*", told, re.M)
    assert headings[0].startswith("# ") and [int(h[3:].split(".")[0]) for h in headings[1:]] == list(range(1, 17))
    linked, anchors = (set(re.findall(pattern, told)) for pattern in (r"\]\(#(.*?)\)", r'<a name="(.*?)">'))
    assert linked == anchors == {heading[3:].replace(" ", "-") for heading in headings[1:]} | {"The-plan", "The-model"}
