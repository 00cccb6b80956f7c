"""Small random models of real transformers classes, one for every family, and a reference gate of our own."""

import copy
import json
import os
import re
import subprocess
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # each gets its share of the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // processes)))

import filelock
import pytest
import torch
import transformers
from families import CATALOGUE, GPT
from families import SIZES as SMALL
from families import WIDE as LLAMA
from torch.utils.flop_counter import FlopCounterMode

import PruningAndFineTuningColab as nb

FEW = {"max_steps": 12, "eval_blocks": 8, "calibration_blocks": 8, "gate_steps": 20, "repair": 16}

# family -> (config class, its arguments, path of the output projection)
FAMILIES = {
    "gpt2": ("GPT2Config", GPT, "transformer.h.{}.attn.c_proj"),
    "opt": (*CATALOGUE["OPT"], "model.decoder.layers.{}.self_attn.out_proj"),
    "gpt_neox": ("GPTNeoXConfig", SMALL, "gpt_neox.layers.{}.attention.dense"),
    "llama": ("LlamaConfig", LLAMA, "model.layers.{}.self_attn.o_proj"),
    "mistral": ("MistralConfig", LLAMA, "model.layers.{}.self_attn.o_proj"),
    "qwen2": ("Qwen2Config", SMALL | dict(num_key_value_heads=2), "model.layers.{}.self_attn.o_proj"),
    "qwen3": ("Qwen3Config", LLAMA, "model.layers.{}.self_attn.o_proj"),
    "gemma2": ("Gemma2Config", LLAMA, "model.layers.{}.self_attn.o_proj"),
    "gemma3": ("Gemma3TextConfig", LLAMA, "model.layers.{}.self_attn.o_proj"),
    "phi": ("PhiConfig", SMALL, "model.layers.{}.self_attn.dense"),
    "phi3": ("Phi3Config", SMALL | dict(num_key_value_heads=2), "model.layers.{}.self_attn.o_proj"),
    "gptj": ("GPTJConfig", GPT | dict(rotary_dim=4), "transformer.h.{}.attn.out_proj"),
    "gpt_neo": (*CATALOGUE["GPT-Neo"], "transformer.h.{}.attn.attention.out_proj"),
    "bloom": (*CATALOGUE["BLOOM"], "transformer.h.{}.self_attention.dense"),
    "falcon": (*CATALOGUE["Falcon 40B"], "transformer.h.{}.self_attention.dense"),
    "falcon_multi_query": (*CATALOGUE["Falcon 7B"], "transformer.h.{}.self_attention.dense"),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT, "transformer.h.{}.attn.c_proj"),
    "biogpt": ("BioGptConfig", SMALL, "biogpt.layers.{}.self_attn.out_proj"),
    "stablelm": ("StableLmConfig", SMALL | dict(num_key_value_heads=2), "model.layers.{}.self_attn.o_proj"),
}


def pytest_collection_modifyitems(items):
    """The longest files first, so that no process is left alone with one in the end."""
    items.sort(key=lambda item: item.path.name not in ("test_browser.py", "test_walk.py"))


def make(family: str, seed: int = 0, **changes):
    """A small random model of a family, in evaluation mode, with weights large enough that every head counts."""
    name, arguments, _ = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**(arguments | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


@torch.no_grad()
def zero_heads(model, family: str, gates: torch.Tensor):
    """The independent reference: zeroes the closed heads' inputs in the weight of the output projection, by path."""
    for number, row in enumerate(gates):
        projection = model.get_submodule(FAMILIES[family][2].format(number))
        weight = projection.weight if family == "gpt2" else projection.weight.T  # (in, out), as a Conv1D is stored
        width = weight.shape[0] // len(row)
        for head, gate in enumerate(row.tolist()):
            weight[head * width : (head + 1) * width] *= gate
    return model


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
        model(block, use_cache=False)
    return counter.get_total_flops() / block.numel()


def tiny_tokenizer():
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def tokens():
    return torch.randint(3, 97, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def gates():
    return torch.tensor([[1.0, 0, 1, 0], [0, 0, 1, 1]])


@pytest.fixture(autouse=True)
def a_fresh_start():
    """One seed, and a machine on which nothing has run: float32, batches of four, no step that ran out of memory."""
    torch.manual_seed(0)
    vars(nb.COMPUTING).update(vars(nb.Computing()))


def fill_form(notebook, settings: dict):
    """Sets fields of a notebook's form; what is not in the form goes into MORE, as in a shell."""
    (form,) = (cell for cell in notebook.cells if cell.source.startswith("# @title Settings\n"))
    more = []
    for name, value in settings.items():
        option, field = name.replace("_", "-"), name.upper()
        form.source, found = re.subn(rf"^{field} = [^#]*", f"{field} = {value!r}  ", form.source, flags=re.M)
        words = [f"--no-{option}"] if value is False else [f"--{option}", str(value)]
        more += [] if found else words
    form.source = form.source.replace('MORE = ""', f"MORE = {' '.join(more)!r}")


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
    few = [word for name, value in FEW.items() for word in ("--" + name.replace("_", "-"), str(value))]
    with filelock.FileLock(f"{place}.lock"):
        if not (said := place.with_suffix(".json")).exists():
            place.mkdir()
            words = [sys.executable, nb.__file__, "--save-model", "compact zeroed", *few]
            done = subprocess.run(words, cwd=place, capture_output=True, text=True, env=os.environ | own)
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
