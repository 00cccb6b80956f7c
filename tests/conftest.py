"""What the tests share: models of the catalogue under short names, runs, scripts, and one script run for all."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # each gets its share of the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // processes)))

import families
import filelock
import pytest
import tokenizers
import torch
import transformers
from nbclient import NotebookClient
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import PruningAndFineTuningColab as nb

CPU, SCRIPT = torch.device("cpu"), Path(nb.__file__)
FEW = {"max_steps": 12, "eval_blocks": 7, "calibration_blocks": 7, "gate_steps": 12, "repair": 8, "block_length": 128}
# One process starts with what trains the demo, which takes minutes; what needs the demo comes when it is there.
FIRST = "walk compact families field bad_input importance sweep_and_recovery gguf browser resume disk"
FEW_WORDS = [word for name, value in FEW.items() for word in ("--" + name.replace("_", "-"), str(value))]
UNEVEN = torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 0]])  # gates: the second layer loses both readers of a key
OPEN = torch.ones(2, 4)

FAMILIES = {  # short names -> those of the catalogue
    "gpt2": "GPT-2", "opt": "OPT", "gpt_neox": "GPT-NeoX, Pythia", "llama": "Llama, SmolLM2", "mistral": "Mistral",
    "qwen2": "Qwen 2", "gemma3": "Gemma 3", "phi": "Phi", "phi3": "Phi-3", "bloom": "BLOOM", "falcon": "Falcon 40B",
    "falcon_multi_query": "Falcon 7B", "gpt_bigcode": "GPTBigCode", "stablelm": "StableLM",
}  # fmt: skip
OUTPUTS = {  # how the paths of the output projections end
    "heads": ("attn.c_proj", "attn.out_proj", "attn.o_proj", "attn.dense", "attention.dense"),
    "neurons": ("mlp.c_proj", ".fc2", "mlp.down_proj", "mlp.dense_4h_to_h"),
}


def pytest_collection_modifyitems(items):
    """In an order in which no process waits for the demo, or is left alone with a long file in the end."""
    places = {f"test_{name}": place for place, name in enumerate(FIRST.split())}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def make(family: str, seed: int = 0, **changes):
    """A small random model of a family, in evaluation mode, with weights large enough that every head counts."""
    return families.make(FAMILIES[family], seed, **changes)


def gated(family: str, gates=UNEVEN, **changes):
    """A small random model whose gates are set."""
    model = make(family, **changes)
    nb.set_gates(model, torch.as_tensor(gates, dtype=torch.float))
    return model


def saved(folder: Path, family: str = "llama", dtype=torch.float32, **changes) -> Path:
    """A folder with a small random model and a tokenizer."""
    make(family, **changes).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def edit(file: Path, **words) -> None:
    """Changes words of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | words))


def change_weights(folder: Path, change) -> None:
    """Saves what `change` makes of a folder's weights (name -> tensor)."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def outputs_of(model, kind: str = "heads") -> dict:
    """Path -> output projection of a layer's heads or neurons, found by their names."""
    return {path: module for path, module in model.named_modules() if path.endswith(OUTPUTS[kind])}


@torch.no_grad()
def zero_units(model, gates: torch.Tensor, kind: str = "heads"):
    """The independent reference: zeroes the closed units' inputs in the weights of the output projections."""
    for projection, row in zip(outputs_of(model, kind).values(), gates, strict=True):
        weight = projection.weight if isinstance(projection, Conv1D) else projection.weight.T  # (in, out)
        weight *= row.repeat_interleave(len(weight) // len(row))[:, None]
    return model


def random_blocks(number: int, length: int = 16, seed: int = 1, most: int = 97) -> torch.Tensor:
    """Random token ids (number, length)."""
    return torch.randint(3, most, (number, length), generator=torch.Generator().manual_seed(seed))


def logits(model, tokens):
    with torch.no_grad():
        return model.eval()(tokens).logits


@torch.no_grad()
def count_flops(model, block):
    """Floating-point operations of matrix products per token, counted in a forward pass over a block (1, time)."""
    model = copy.deepcopy(model).requires_grad_(False).eval()
    for module in model.modules():
        if hasattr(module, "config"):  # the counter does not know the fast kernels
            module.config._attn_implementation = module.config._experts_implementation = "eager"
    with FlopCounterMode(display=False) as counter:
        model(block.to(model.device), use_cache=False)
    return counter.get_total_flops() / block.numel()


def tiny_tokenizer():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


@pytest.fixture
def tokens():
    return random_blocks(2)


@pytest.fixture
def gates():
    return torch.tensor([[1.0, 0, 1, 0], [0, 0, 1, 1]])


@pytest.fixture(autouse=True)
def a_fresh_start():
    """One seed, and a machine on which nothing has run: float32, batches of four, no step that ran out of memory."""
    torch.manual_seed(0)
    vars(nb.COMPUTING).update(vars(nb.Computing()))


def new_run(folder: Path, dtype=torch.float32, **changes):
    """A run with these settings, which keeps its results in a folder."""
    return nb.Run(nb.Settings(output_dir=str(folder), **changes), CPU, dtype)


def run_python(*words, cwd: Path, status: int = 0, timeout: float = 900, **environment):
    """What a Python process said, which has to end with this status; after `timeout` seconds it is killed."""
    own = os.environ | {"PYTHONPATH": str(SCRIPT.parent)} | environment
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == status, done.stderr[-3000:]
    return done


def folders_in(place: Path) -> list[Path]:
    """Folders of results, and not what is kept of runs that are to be gone on with."""
    return [path for path in place.iterdir() if path.is_dir() and path.suffix != ".state"]


def results_in(place: Path):
    """(the one folder of results, its record)"""
    (folder,) = folders_in(place)
    return folder, json.loads((folder / "metrics.json").read_text())


def fill_form(notebook, settings: dict):
    """Sets fields of a notebook's form; what is not in the form goes into MORE, as in a shell. Old outputs go."""
    (form,) = (cell for cell in notebook.cells if cell.source.startswith("# @title Settings\n"))
    more = []
    for name, value in settings.items():
        option, field = name.replace("_", "-"), name.upper()
        form.source, found = re.subn(rf"^{field} = [^#]*", f"{field} = {value!r}  ", form.source, flags=re.M)
        words = [f"--no-{option}"] if value is False else [f"--{option}", str(value)]
        more += [] if found else words
    form.source = form.source.replace('MORE = ""', f"MORE = {' '.join(more)!r}")
    for cell in notebook.cells:
        cell.update({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {})


def client_of(notebook, cwd: Path) -> NotebookClient:
    return NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(cwd)}})


@pytest.fixture(scope="session")
def secret():
    return "hf_" + "thisIsAToken" * 3


@pytest.fixture(scope="session")
def script_run(tmp_path_factory, secret):
    """What a script said on a machine that has never seen it, without a network, with a token in its environment.

    It trains the demo, once for all processes of a test run.
    """
    place = tmp_path_factory.getbasetemp()
    place = (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "home"
    own = {"XDG_CACHE_HOME": str(place / "cache"), "HF_HUB_OFFLINE": "1", "HF_TOKEN": secret}
    with filelock.FileLock(f"{place}.lock"):
        if not (said := place.with_suffix(".json")).exists():
            place.mkdir()
            words = [sys.executable, SCRIPT, "--save-model", "compact zeroed", *FEW_WORDS]
            env = os.environ | own | {"USE_TORCH_XLA": "0"}  # (the demo would train for long through XLA)
            done = subprocess.run(words, cwd=place, capture_output=True, text=True, env=env)
            said.write_text(json.dumps([done.returncode, done.stdout, done.stderr]))
        run = subprocess.CompletedProcess(place, *json.loads(said.read_text()))
    patch = pytest.MonkeyPatch()
    for name, value in own.items():
        patch.setenv(name, value)
    yield run
    patch.undo()


@pytest.fixture(scope="session")
def home(script_run):
    """The machine on which the script has run."""
    return script_run.args


@pytest.fixture(scope="session")
def demo(home):
    """The folder of the demo model; the script has trained it."""
    (folder,) = folders_in(home / "cache/PruningAndFineTuningColab")
    return folder
