"""The whole walk, as a script and as a notebook, on the demo model: what a user without a network gets."""

import ast
import copy
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jupytext
import nbformat
import pytest
import torch
import transformers
from conftest import fill_form
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import PruningAndFineTuningColab as nb

SCRIPT = Path(nb.__file__)
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
FEW = {"max_steps": 12, "eval_blocks": 8, "calibration_blocks": 8, "gate_steps": 20, "repair_blocks": 16}


@pytest.fixture(scope="session")
def script_run(home):
    arguments = ["--save-model", "compact zeroed"] + [
        word for name, value in FEW.items() for word in ("--" + name.replace("_", "-"), str(value))
    ]
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
    stages = list(metrics["perplexity"])  # the last one only where the smaller model makes more steps in the same time
    assert stages[:5] == ["dense", "pruned", "repaired", "fine_tuned", "dense_fine_tuned"] and len(stages) <= 6
    assert metrics["perplexity"]["dense"] < 200, "the demo model has learned something"
    assert metrics["perplexity"]["dense"] != metrics["perplexity"]["pruned"]
    assert metrics["settings"]["model"] == "demo" and metrics["settings"]["pruning_level"] == 0.3
    assert metrics["heads"]["total"] == 32 and metrics["heads"]["closed"] == 10 == len(metrics["heads"]["closed_list"])
    assert torch.tensor(metrics["importance"]).shape == (4, 8)
    assert set(metrics["samples"]) == set(metrics["perplexity"])
    assert set(metrics["size"]) == {"dense", "pruned"}
    assert all(
        0 < metrics["size"]["pruned"][quantity] < value
        for quantity, value in metrics["size"]["dense"].items()
        if "second" not in quantity
    )
    assert (
        metrics["parameters"]["fine_tuned"]
        == metrics["parameters"]["pruned"]
        == metrics["size"]["pruned"]["parameters"]
    )
    assert metrics["parameters"]["dense_fine_tuned"] == metrics["parameters"]["dense"] == metrics["model"]["parameters"]
    assert metrics["compact_difference"] < 1e-5 and metrics["reopened_difference"] == {
        "compact": 0,
        "zeroed": pytest.approx(0, abs=1e-5),
    }
    assert all(text.startswith("The history of the city began") for text in metrics["samples"].values())
    assert (
        set(metrics["seconds"])
        == set(metrics["peak_memory_bytes"])
        >= {"load model", "importance", "fine-tune", "save model"}
    )
    assert {"python", "torch", "transformers", "datasets"} <= set(metrics["versions"])
    assert (
        metrics["training"]["fine_tuned"]["steps"]
        == 12
        == metrics["training"]["fine_tuned"]["history"]["perplexity"][-1][0]
    )


def test_the_zip_holds_the_report_the_pictures_and_a_model_that_opens(results, tmp_path):
    with zipfile.ZipFile(f"{results}.zip") as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / results.name
    report = (folder / "report.md").read_text()
    assert "| pruned + fine-tuned | 22 / 32 |" in report and "seed 0" in report
    for picture in (*re.findall(r"\((\w+\.png)\)", report), "dense_fine_tuned.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((folder / "metrics.json").read_text())
    tokenizer, model = nb.load_gated(folder / "model-zeroed")
    text = nb.load_text(nb.Settings(dataset="python-docs"))
    blocks = nb.pack(text["test"], tokenizer, 512)[:8]
    assert nb.perplexity(model, blocks) == pytest.approx(metrics["perplexity"]["fine_tuned"], rel=1e-4)
    assert int((nb.get_gates(model) == 0).sum()) == 10
    for form in ("compact", "zeroed"):
        assert nb.perplexity(nb.reopen(folder / f"model-{form}"), blocks) == pytest.approx(
            metrics["perplexity"]["fine_tuned"], rel=1e-4
        )
    sizes = [(folder / f"model-{form}" / "model.safetensors").stat().st_size for form in ("compact", "zeroed")]
    assert sizes[0] == pytest.approx(metrics["size"]["pruned"]["bytes"], abs=10_000) and sizes[0] < sizes[1]
    card = (folder / "model-compact" / "README.md").read_text()
    assert (
        card.startswith("---\nlibrary_name: transformers\n")
        and "trust_remote_code=True" in card
        and "10 of 32 attention heads removed" in card
    )
    assert (
        f"| pruned + fine-tuned | 22 / 32 | {metrics['parameters']['pruned'] / 1e6:.2f} M | "
        f"{metrics['size']['pruned']['bytes'] / 1e6:.1f} | {metrics['perplexity']['fine_tuned']:.2f} |" in card
    )
    assert not [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".json", ".safetensors", ".md", ".png", ".py")
    ]
    assert json.loads((folder / "model-compact" / "config.json").read_text())["use_cache"] is True


def test_no_secret_of_the_environment_is_in_what_is_handed_on(results, script_run, secret):
    for path in (*results.rglob("*"), Path(f"{results}.zip")):
        assert path.is_dir() or secret.encode() not in path.read_bytes()
    with zipfile.ZipFile(f"{results}.zip") as archive:
        assert not [name for name in archive.namelist() if secret.encode() in archive.read(name)]
    assert secret not in script_run.stdout + script_run.stderr


def test_no_folder_of_this_machine_is_named_in_what_is_handed_on(results):
    for path in (*results.glob("model-*/*.json"), *results.glob("model-*/*.md"), *results.glob("*.md")):
        assert str(results.parents[1]) not in path.read_text()


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
    fill_form(notebook, FEW)
    (prune,) = (cell for cell in notebook.cells if "run.settings = settings\n" in cell.source)
    (settle,) = (cell for cell in notebook.cells if "settings = start_settings(MORE)" in cell.source)
    (compare,) = (cell for cell in notebook.cells if "draw_dashboard(run.metrics" in cell.source)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
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
        pictures = [
            output
            for cell in notebook.cells
            for output in cell.get("outputs", [])
            if "image/png" in output.get("data", {})
        ]
        assert len(pictures) >= 4  # heads, two live plots, comparison
        (folder,) = (path for path in (tmp_path / "results").iterdir() if path.is_dir())
        metrics = json.loads((folder / "metrics.json").read_text())
        travels = "model-compact/modeling_pruned.py"
        assert (folder / travels).read_text() == (results / travels).read_text(), (
            "the same code from a notebook as from the script"
        )
        assert metrics["reopened_difference"] == {"compact": 0}
        again = run(prune.source)
        assert f"pruned: perplexity {metrics['perplexity']['pruned']:.2f}" in again
        run("PRUNING_LEVEL = 0.5")
        run(settle.source)
        half = run(prune.source)
        closed = json.loads(run("print(run.metrics['heads']['closed_list'])"))
        assert run("print(pruned is model)").strip() == "True", "what was repaired before belongs to other gates"
        with pytest.raises(CellExecutionError, match="pruned after it was fine-tuned: run sections 9 to 14 again"):
            run(compare.source)

    # a fresh run at that level, from the record and the files alone
    tokenizer, model = nb.load_model(
        str(next((results.parents[1] / "cache/PruningAndFineTuningColab").iterdir())), torch.device("cpu")
    )
    gates = nb.choose_gates(torch.tensor(metrics["importance"]), 0.5)
    nb.set_gates(model, gates)
    blocks = nb.pack(nb.load_text(nb.Settings(dataset="python-docs"))["test"], tokenizer, 512)[:8]
    assert closed == nb.describe_heads(gates)["closed_list"] and len(closed) == 16
    assert f"pruned: perplexity {nb.perplexity(model, blocks):.2f}" in half


def test_fine_tuning_closed_heads_stay_closed_and_may_come_back_when_asked(results, tmp_path):
    settings = nb.Settings(
        output_dir=str(tmp_path), max_steps=6, learning_rate=1e-3, block_length=64, batch_size=4, pruning_level=0.5
    )
    cache = next((results.parents[1] / "cache/PruningAndFineTuningColab").iterdir())
    tokenizer, model = nb.load_model(str(cache), torch.device("cpu"))
    blocks = nb.pack_all(nb.load_text(nb.Settings(dataset="python-docs")), tokenizer, model, settings)
    gates = nb.choose_gates(nb.get_strategy("random").score(model), 0.5)
    nb.set_gates(model, gates)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = nb.Run(settings, torch.device("cpu"), torch.float32)
    tuned = nb.fine_tune(run, "stay", lambda: copy.deepcopy(model), blocks, settings)
    assert torch.equal(nb.get_gates(tuned), gates)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), (
        "the original is untouched"
    )
    assert not torch.equal(tuned.state_dict()["lm_head.weight"], before["lm_head.weight"])
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(nb, "GATE_LEARNING_RATE", 0.6)  # only three steps to come back in
        free = nb.fine_tune(
            run, "reopen", lambda: copy.deepcopy(model), blocks, nb.dataclasses.replace(settings, reopen_heads=True)
        )
    reopened = nb.get_gates(free)
    assert ((gates == 0) & (reopened != 0)).any(), "no head came back"
    assert (reopened != 0).sum() == (gates != 0).sum(), "as many heads are open as the level says"
    assert not any(parameter_name.endswith("gates") for parameter_name, _ in free.named_parameters())


@pytest.fixture
def short_run(results, tmp_path):
    """Runs the script on a small random model with the demo's tokenizer; the run's folder and what it printed."""

    def run_on(model, *words):
        cache = next((results.parents[1] / "cache/PruningAndFineTuningColab").iterdir())
        shutil.copytree(cache, tmp_path / "tiny", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        model.save_pretrained(tmp_path / "tiny")
        few = "--block-length 64 --eval-blocks 4 --calibration-blocks 2 --gate-steps 20 --max-steps 4 --no-control"
        words = [*f"--model tiny --dataset python-docs {few}".split(), *words]
        run = subprocess.run([sys.executable, SCRIPT, *words], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        (folder,) = (path for path in (tmp_path / "results").iterdir() if path.is_dir())
        return folder, run.stdout

    return run_on


def test_a_sweep_runs_from_the_script(short_run):
    """As a script the cells run in order, so what a cell needs has to be above it; a sweep stops after its table."""
    config = transformers.GPT2Config(vocab_size=1024, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    folder, said = short_run(
        transformers.GPT2LMHeadModel(config),
        "--strategy",
        "fisher",
        "--pruning-level",
        "0.5",
        "--sweep",
        "--sweep-strategies",
        "fisher random",
        "--sweep-levels",
        "0.25 0.5",
        "--repair-blocks",
        "4",
    )
    rows = (folder / "sweep.csv").read_text().splitlines()
    assert rows[0] == "prune,strategy,level,closed,share,parameters,flops_per_token,pruned,repaired"
    assert [row.split(",")[:4] for row in rows[1:5]] == [
        ["heads", "fisher", "0.25", "2"],
        ["heads", "fisher", "0.5", "4"],
        ["heads", "random", "0.25", "2"],
        ["heads", "random", "0.5", "4"],
    ]
    assert [row.split(",")[:3] for row in rows[5:]] == [
        [kind, "fisher", level] for kind in ("neurons", "both") for level in ("0.25", "0.5")
    ]
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert len(metrics["sweep"]) == 4 and metrics["sweep"][1]["pruned"] == metrics["perplexity"]["pruned"]
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG") and "fine_tuned" not in metrics["perplexity"]
    assert "| strategy | 25% | 50% |" in said


def test_a_run_in_16_bits_hands_on_the_model_that_it_measured(short_run):
    """The default wherever there is a GPU."""
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    folder, said = short_run(
        transformers.LlamaForCausalLM(config),
        "--precision",
        "bf16",
        "--gate-steps",
        "4",
        "--repair-blocks",
        "4",
        "--save-model",
        "compact zeroed",
    )
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["precision"] == "bfloat16" and metrics["reopened_difference"] == {"compact": 0, "zeroed": 0}


def test_a_family_that_cannot_be_compacted_keeps_its_gates_and_says_so(short_run):
    folder, said = short_run(
        transformers.CodeGenForCausalLM(
            transformers.CodeGenConfig(vocab_size=1024, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=512)
        )
    )
    assert "nothing can be cut out, because cut, it" in said
    assert "CodeGenForCausalLM keeps its gates, and its size: cut, it" in said
    assert "is not compact, so it is saved in the zeroed form" in said
    assert [path.name for path in folder.glob("model-*")] == ["model-zeroed"]
    assert "2 of 8 attention heads closed" in (folder / "model-zeroed" / "README.md").read_text()


def test_heads_and_neurons_are_pruned_as_far_as_the_loss_allows(short_run):
    """--prune both and --max-loss, from the command to the files: the level is found, and what is closed is gone."""
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    words = "--prune both --pruning-level auto --max-loss 0.5 --strategy fisher --repair-blocks 4".split()
    words += ["--round-neurons", "8", "--save-model", "compact zeroed"]
    folder, said = short_run(transformers.LlamaForCausalLM(config), *words)
    metrics = json.loads((folder / "metrics.json").read_text())
    level, neurons = metrics["level"], metrics["neurons"]
    assert metrics["settings"]["pruning_level"] == level["found"] > 0 and (folder / "level.png").exists()
    for point in level["points"]:
        assert point["within"] == (point["perplexity"] <= 1.5 * level["dense"]) == (point["level"] <= level["found"])
    assert neurons["closed"] > 0 and all(number % 8 == 0 for number in neurons["open_per_layer"])
    report = (folder / "report.md").read_text()
    assert f"| {neurons['total'] - neurons['closed']} / {neurons['total']} |" in report and "neurons left" in report
    assert metrics["size"]["pruned"]["parameters"] < metrics["size"]["dense"]["parameters"]
    assert max(metrics["reopened_difference"].values()) < 1e-6 and set(metrics["reopened_difference"]) == {
        "compact",
        "zeroed",
    }
    kept = json.loads((folder / "model-compact" / "config.json").read_text())["kept_neurons"]
    assert list(kept.values()) == neurons["open_per_layer"]
    assert f"and {neurons['closed']} of {neurons['total']} neurons" in (
        (folder / "model-compact" / "README.md").read_text()
    )


def test_a_uniform_run_saves_an_ordinary_smaller_checkpoint(short_run):
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=64,
    )
    folder, said = short_run(transformers.LlamaForCausalLM(config), "--uniform", "--pruning-level", "0.3")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["heads"]["open_per_layer"] == [4, 4, 4] and "18 gates, 6 of which will be closed" in said
    assert all(
        first % 2 == 0 and second == first + 1
        for (_, first), (_, second) in zip(*[iter(metrics["heads"]["closed_list"])] * 2)
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model-compact")
    assert model.config.num_attention_heads == 4 and model.num_parameters() == metrics["parameters"]["fine_tuned"]
    assert (
        not list(folder.glob("model-compact/*.py"))
        and "trust_remote_code" not in (folder / "model-compact" / "README.md").read_text()
    )


def test_reopened_heads_are_in_the_compact_model_too(short_run):
    config = transformers.OPTConfig(
        vocab_size=1024,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    folder, said = short_run(
        transformers.OPTForCausalLM(config),
        "--reopen-heads",
        "--save-model",
        "compact zeroed",
        "--pruning-level",
        "0.5",
    )
    metrics = json.loads((folder / "metrics.json").read_text())
    kept = json.loads((folder / "model-compact" / "config.json").read_text())["kept_heads"]
    assert [len(heads) for heads in kept.values()] == metrics["heads_after_fine_tuning"]["open_per_layer"]
    assert sum(len(heads) for heads in kept.values()) == 4 and "closed heads came back" in said
    assert metrics["reopened_difference"]["compact"] == 0 and metrics["reopened_difference"]["zeroed"] < 1e-5


KEPT = ("cellView", "jupyter", "jp-MarkdownHeadingCollapsed", "id")


def test_the_notebook_is_the_script_without_outputs():
    notebook, script = nbformat.read(NOTEBOOK, 4), jupytext.read(SCRIPT)

    def parts(cells):
        return [
            (cell.cell_type, cell.source, {key: value for key, value in cell.metadata.items() if key in KEPT})
            for cell in cells
        ]

    assert parts(notebook.cells) == parts(script.cells), (
        "out of step: run `jupytext --to ipynb --update --output PruningAndFineTuningColab.ipynb "
        "PruningAndFineTuningColab.py`"
    )
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    assert notebook.metadata.accelerator == "GPU" and notebook.metadata.colab.collapsed_sections == ["workshop"]
    assert any(
        cell.metadata.get("id") == "workshop" and cell.metadata["jp-MarkdownHeadingCollapsed"]
        for cell in notebook.cells
    )


def test_run_cells_use_only_what_stands_above_them():
    """The tests import the whole file, which hides it; but as a script or notebook the cells run in order."""
    defined, runs = {}, []
    for node in ast.parse(SCRIPT.read_text()).body:
        names = {
            inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load)
        }
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = (node.lineno, names)
        elif isinstance(node, ast.If) and "__name__" in names:
            runs.append((node.lineno, names))
    assert len(runs) > 15 and len(defined) > 100
    for line, names in runs:
        seen, left = set(), names & defined.keys()
        while left:
            name = left.pop()
            seen.add(name)
            assert defined[name][0] < line, f"the cell at line {line} needs {name}, which stands below it"
            left |= (defined[name][1] & defined.keys()) - seen


def test_the_table_of_contents_is_clean():
    headings = [
        line
        for cell in nbformat.read(NOTEBOOK, 4).cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith(("# ", "## "))
    ]
    assert headings[0].startswith("# ")
    assert [heading.split(".")[0] for heading in headings[1:]] == [f"## {number}" for number in range(1, len(headings))]
