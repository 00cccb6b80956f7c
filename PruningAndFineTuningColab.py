# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     collapsed_sections:
#     - workshop
#     - loop
#     - cut
#     name: PruningAndFineTuningColab.ipynb
#     provenance: []
#     toc_visible: true
#   jupytext:
#     cell_metadata_filter: cellView,jupyter,jp-MarkdownHeadingCollapsed,id,tags,-all
#     formats: ipynb,py:percent
#     notebook_metadata_filter: accelerator,colab,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Make a language model smaller and better
#
# A transformer reads with many **attention heads** at once, and a trained model does not need all of them. This
# notebook scores the heads of a causal language model, closes the least important ones, repairs what is left without
# training, cuts the closed heads out, fine-tunes the smaller model, and says what it cost. You get a folder that
# `from_pretrained` opens, and, if you like, a file for llama.cpp.
#
# The outputs below are of one real run of 35 minutes on two processor cores:
# `python PruningAndFineTuningColab.py --model SmolLM2-135M-Instruct.Q4_1.gguf --train-file wikitext-2/valid.txt
# --test-file wikitext-2/test.raw.txt --prune both --pruning-level 0.1 --eval-blocks 24 --batch-size 2 --max-steps 100
# --precision bf16 --control`
#
# | SmolLM2-135M-Instruct, WikiText-2 | parameters | test perplexity | last words right |
# | --- | --- | --- | --- |
# | as it came | 134.5 M | 33.3 | 19 % |
# | pruned: 258 of 270 heads, 88 % of the neurons | 124.2 M | 38.4 | 19 % |
# | + repaired, nothing trained | 124.2 M | 36.6 | 19 % |
# | + fine-tuned, 100 steps | 124.2 M | 25.3 | 20 % |
# | not pruned, fine-tuned with the same steps | 134.5 M | 22.8 | 23 % |
#
# Choose *Run all*, or run the cells one by one. Every cell can be run again: the loaded model is never changed.
#
# **Contents:** [1 Settings](#1.-Settings) · [2 Workshop](#2.-Workshop) · [3 Start](#3.-Start) · [4 Text](#4.-Text) ·
# [5 Model](#5.-Model) · [6 Heads and gates](#6.-Heads-and-gates) · [7 Perplexity](#7.-Perplexity) ·
# [8 Importance](#8.-Importance) · [9 Prune](#9.-Prune) · [10 Explore](#10.-Explore) · [11 Repair](#11.-Repair) ·
# [12 How far](#12.-How-far) · [13 Compact](#13.-Compact) · [14 Fine-tune](#14.-Fine-tune) ·
# [15 Compare](#15.-Compare) · [16 Save and download](#16.-Save-and-download)

# %% [markdown]
# <a name="1.-Settings"></a>
# ## 1. Settings
#
# These ten matter. As they are, you get GPT-2 on WikiText-2, or, without a network, a small demo model that is
# trained here. `MODEL` takes any hub id (`HuggingFaceTB/SmolLM2-135M`), a folder or a `.gguf` file. Change `PRUNE`,
# `STRATEGY` and `PRUNING_LEVEL` first: by default, 30 % of the heads are closed. `neurons` closes neurons of the
# MLPs, which hold most of a model's parameters; `both` closes whichever is worth least for its size. `SWEEP` compares
# strategies and levels (section 12). `MORE` takes all other settings as command-line options, for example
# `--block-length 256 --no-repair`; `--help` lists them. This is a script, too: `python PruningAndFineTuningColab.py`.

# %% cellView="form" tags=["parameters"]
# @title Settings
MODEL = "auto"  # @param ["auto", "demo", "gpt2", "facebook/opt-125m", "EleutherAI/pythia-160m"] {allow-input: true}
DATASET = "auto"  # @param ["auto", "Salesforce/wikitext:wikitext-2-raw-v1", "python-docs"] {allow-input: true}
TRAIN_FILE = ""  # @param {type: "string"}
PRUNE = "heads"  # @param ["heads", "neurons", "both"]
STRATEGY = "learned"  # @param ["learned", "fisher", "gradient", "entropy", "magnitude", "random", "entropy-literal"]
PRUNING_LEVEL = 0.3  # @param {type: "slider", min: 0, max: 0.9, step: 0.05}
MAX_STEPS = "auto"  # @param ["auto", "200", "1000", "5000"] {allow-input: true}
SWEEP = ""  # @param ["", "fisher entropy random 0.1 0.3 0.5"] {allow-input: true}
SAVE_MODEL = "compact"  # @param ["compact", "compact gguf", "compact zeroed", "zeroed", "no"] {allow-input: true}
MORE = ""  # @param {type: "string"}

# %% [markdown] id="workshop" jp-MarkdownHeadingCollapsed=true
# <a name="2.-Workshop"></a>
# ## 2. Workshop
#
# The machinery that the story below uses: packages, settings, devices and memory, the record of a run, reading
# text, opening models. Nothing here is about pruning. [Go on with section 3](#3.-Start).

# %% cellView="form" jupyter={"source_hidden": true}
# @title Packages (what Colab lacks is installed, the rest stays as it is) and imports
import builtins, importlib.metadata, importlib.util, os, subprocess, sys

from packaging.requirements import Requirement

NEEDED = ("torch>=2.9", "transformers>=5.9", "datasets>=4.0", "accelerate>=1.14", "matplotlib>=3.10",
          "ipywidgets>=7.7.1", "psutil>=5.9", "gguf>=0.17", "peft>=0.18")

def in_notebook() -> bool:
    """True in Jupyter and Colab, False in a plain Python process."""
    return "ipykernel" in sys.modules and hasattr(builtins, "__IPYTHON__")

for needed in map(Requirement, NEEDED):
    if __name__ == "__main__" and in_notebook() and importlib.util.find_spec(needed.name) is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", str(needed)], check=True)
    there = importlib.metadata.version(needed.name)
    if not needed.specifier.contains(there, prereleases=True):
        sys.exit(f"error: {needed.name} is {there}, but must be {needed.specifier}: pip install -U {needed.name}.")

import torch

if torch.cuda.is_available():
    os.environ.setdefault("USE_TORCH_XLA", "0")  # where both are installed accelerate would leave the GPU idle

import argparse, contextlib, copy, csv, dataclasses, datetime, difflib, functools, glob, gzip, hashlib, html
import json, math, platform, re, shlex, shutil, statistics, string, tempfile, textwrap, time, types, typing
import urllib.parse, urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import accelerate, datasets, filelock, gguf, huggingface_hub, matplotlib, numpy, pandas, psutil
import ipywidgets as widgets
import transformers
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from IPython.display import HTML, Image, Markdown, display
from matplotlib.colors import PowerNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils
from transformers.pytorch_utils import Conv1D

# %% cellView="form" jupyter={"source_hidden": true}
# @title Mistakes and failures, each said in one sentence; what a setting may be
class UserError(Exception):
    """A mistake in the input. Its message names the bad value, what is allowed, and what to do."""

class RunError(Exception):
    """A failure that is nobody's mistake. Its message says what failed, and what to do."""

def first_sentence(error: Exception) -> str:
    """The first sentence of a library's message, to be quoted in one of ours."""
    return re.split(r"(?<=\w)\.\s|\n", str(error).strip())[0].rstrip(".") or type(error).__name__

def check_choice(name: str, value, choices) -> None:
    """Raises UserError, with the nearest choice, where a value is not one of them."""
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "take one of these."
        raise UserError(f"{name} is {value!r}, but must be one of {', '.join(choices)}: {hint}")

def stop_without_traceback(kind, error, trace):
    """The script's sys.excepthook: one sentence; exit status 2 for a mistake, 1 for a failure, 130 for Ctrl-C."""
    there, foreseen = "", issubclass(kind, (RunError, OSError, SafetensorError)) or "No space left" in str(error)
    if "run" in globals() and run.folder.exists():
        there = f" What is there is in {run.folder}; the same command goes on from it."
    if not (foreseen or issubclass(kind, (UserError, KeyboardInterrupt))):
        sys.__excepthook__(kind, error, trace)
    words, status = {UserError: (f"error: {error}", 2), KeyboardInterrupt: (f"interrupted.{there}", 130)}.get(
        kind, (f"failed: {error if foreseen else 'this should not happen, please report it'}.{there}", 1))
    print(words, file=sys.stderr)
    raise SystemExit(status)

class Rule(NamedTuple):
    """What a setting may be, in words, and the function that checks it."""

    words: str
    holds: Callable

def at_least(low: float, below: float = math.inf) -> Rule:
    words = f"at least {low:g}" + (f" and below {below:g}" if below < math.inf else "")
    return Rule(words, lambda value: low <= value < below)

def strategies_and_levels(words: str) -> tuple[list[str], list[float]]:
    """The two kinds of words in a sweep. Raises ValueError for a word that is neither."""
    names = [word for word in words.split() if word in STRATEGY_NAMES]
    return names, [float(word) for word in words.split() if word not in names]

STRATEGY_NAMES = ("learned", "fisher", "gradient", "entropy", "magnitude", "random", "entropy-literal")
SHARE = Rule("from 0 to 1", lambda value: 0 <= value <= 1)
POINTS = Rule("strategies and levels from 0 to below 1, separated by spaces, some of each", lambda words: not words or (
    all(strategies_and_levels(words)) and all(0 <= level < 1 for level in strategies_and_levels(words)[1])))
FORMS = Rule("'no', or one or more of compact, zeroed and gguf, separated by spaces",
             lambda forms: bool(forms.split()) and set(forms.split()) <= {"compact", "zeroed", "gguf"})

def setting(default, help: str, rule: Rule | None = None, **words):
    """A field of Settings; `words` are what words such as yes, no and auto stand for."""
    words = words or ({"yes": True, "no": False} if isinstance(default, bool) else {})
    return dataclasses.field(default=default, metadata={"help": help, "rule": rule, "words": words})

# %% cellView="form" jupyter={"source_hidden": true}
# @title All settings: name, default, what it means, and what it may be
@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run. Raises UserError for a value that is not allowed, or does not go with another."""

    model: str = setting(MODEL, "hub id (or id@revision), folder, .gguf file, 'demo' (trained here), or 'auto'")
    prune: Literal["heads", "neurons", "both"] = setting(PRUNE, "what is closed: heads, neurons of the MLPs, or both")
    strategy: Literal[STRATEGY_NAMES] = setting(STRATEGY, "how units are scored")
    pruning_level: float = setting(PRUNING_LEVEL, "share to close of all heads, neurons, or parameters of both; auto: "
                                   "as much as --max-loss allows", at_least(0, 1), auto=0.3)
    max_loss: float = setting(0.0, "take the largest level that costs no more validation perplexity", at_least(0))
    min_heads: int = setting(1, "heads that stay open in every layer", at_least(1))
    gate_steps: int = setting(240, "steps that the strategy 'learned' trains the gates for", at_least(1))
    repair: int = setting(128, "training blocks to refit projections on; 0: none", at_least(0), yes=128, no=0)
    uniform: Literal["auto", "no", "groups", "yes"] = setting(
        "auto", "yes: equally many in every layer, an ordinary checkpoint; groups: equally many heads for every key of "
        "a layer; auto: groups for gguf", yes="yes", no="no")
    reopen_heads: bool = setting(False, "half-way through fine-tuning score again, and choose again")
    dataset: str = setting(DATASET, "hub dataset (id, or id:configuration), 'python-docs' (no network), or 'auto'")
    train_file: str = setting(TRAIN_FILE, "file, folder or pattern instead of a dataset; alone it is split 80/10/10")
    validation_file: str = setting("", "text that progress is watched on")
    test_file: str = setting("", "text that only the reported perplexities see")
    block_length: int = setting(512, "tokens in a block", at_least(2))
    calibration_blocks: int = setting(256, "training blocks that units are scored on", at_least(1))
    eval_blocks: int = setting(64, "test blocks that perplexity is measured on, 0 = all", at_least(0))
    prompt: str = setting("auto", "start of the samples; auto: the beginning of a passage of the validation text",
                          Rule("some words", str.strip))
    max_steps: int = setting(MAX_STEPS, "steps of fine-tuning; auto: one pass, or 200 on a CPU", at_least(0), auto=0)
    train: Literal["auto", "all", "lora"] = setting("auto", "all weights, in float32; or adapters, merged at the end, "
                                                    "with weights in 16 bits; auto: what fits into memory")
    learning_rate: float = setting(1e-4, "peak learning rate", Rule("above 0", lambda rate: 0 < rate < math.inf))
    batch_size: int = setting(4, "blocks in one optimizer step, however many fit at once", at_least(1))
    distillation: float = setting(0.0, "share of the loss that asks for the dense model's predictions", SHARE)
    gradient_checkpointing: bool = setting(False, "keep only each layer's input: slower, in much less memory")
    control: Literal["auto", "yes", "no"] = setting(
        "auto", "fine-tune the dense model alike; auto: unless it is large and on a processor", yes="yes", no="no")
    sweep: str = setting(SWEEP, "strategies and levels to compare; a script stops after it", POINTS, no="",
                         yes="learned fisher gradient entropy magnitude random 0.1 0.3 0.5")
    device: Literal["auto", "cuda", "tpu", "mps", "cpu"] = setting("auto", "where to compute")
    precision: Literal["auto", "fp32", "fp16", "bf16"] = setting("auto", "number format of the computations")
    seed: int = setting(0, "seed of everything random", at_least(0, 2**32))
    save_model: str = setting(SAVE_MODEL, "forms to save: compact, gguf for llama.cpp, or zeroed", FORMS, no="no")
    output_dir: str = setting("results", "folder that gets a results folder for each run")
    trust_remote_code: bool = setting(False, "run the Python code that a model brings along, if it does")

    def __post_init__(self):
        check_settings(self)

# %% cellView="form" jupyter={"source_hidden": true}
# @title Settings from the form and from command-line options, checked and converted
def converted(field, value):
    """A value of whatever type, as the setting has it. Raises UserError where it is none that is allowed."""
    kind, rule, words = field.type, field.metadata["rule"], str(value).strip()
    meant = {"true": "yes", "false": "no"}.get(words.lower(), words.lower())
    if meant in field.metadata["words"]:
        return field.metadata["words"][meant]
    if choices := typing.get_args(kind):
        check_choice(field.name, words, choices)
        return words
    allowed = [{int: "a whole number", float: "a number", bool: "yes or no"}.get(kind)] + [rule and rule.words]
    try:
        found = str(value) if kind is str else kind(float(words))
        if kind is bool or (kind is int and found != float(words)) or not (rule is None or rule.holds(found)):
            raise ValueError
        return found
    except (ValueError, OverflowError):
        raise UserError(f"{field.name} is {value!r}, but must be {', '.join(filter(None, allowed))}: the default is "
                        f"{field.default!r}.") from None

def check_settings(settings: Settings) -> None:
    """Converts the values of new settings. Raises UserError for one that is not allowed, or not with another."""
    values, auto = vars(settings), str(settings.pruning_level).strip() == "auto"
    for field in dataclasses.fields(settings):
        values[field.name] = converted(field, values[field.name])
    values["max_loss"] = settings.max_loss or 0.05 * auto
    heads, files, uniform = settings.prune == "heads", settings.train_file, settings.uniform == "yes"
    for name, fine, allowed in (
            ("validation_file", files or not settings.validation_file, "given together with train_file"),
            ("test_file", files or not settings.test_file, "given together with train_file"),
            ("dataset", settings.dataset == "auto" or not files, "left alone where files are given"),
            ("uniform", not (uniform and settings.reopen_heads), "off where reopen_heads is on"),
            ("uniform", not (uniform and settings.sweep), "off in a sweep"),
            ("reopen_heads", not settings.reopen_heads or (heads and settings.train != "lora"),
             "off where neurons are pruned or train is 'lora'"),
            ("strategy", heads or settings.strategy != "entropy-literal", "another one where neurons are pruned"),
            ("output_dir", not Path(settings.output_dir).is_file(), "a folder")):
        if not fine:
            raise UserError(f"{name} is {values[name]!r}, but must be {allowed}: change one of the two.")

def read_settings(arguments: list[str]) -> Settings:
    """Settings from the form's values, overridden by options as a shell gives them. Raises UserError."""
    def refuse(message):
        raise UserError(f"{message}; --help lists all options.")

    parser = argparse.ArgumentParser(description="Prune a causal language model, repair and fine-tune what is left.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = refuse
    for field in dataclasses.fields(Settings):
        option, rule = field.name.replace("_", "-"), field.metadata["rule"]
        help = field.metadata["help"].replace("%", "%%") + (f" ({rule.words})" if rule else "")
        kind = {"nargs": "?", "const": "yes"} if "yes" in field.metadata["words"] else {}
        kind["metavar"] = "|".join(typing.get_args(field.type)) or field.name.split("_")[-1].upper()
        default = globals().get(field.name.upper(), field.default)  # the form's value now
        parser.add_argument(f"--{option}", help=help, default=default, **kind)
        if "no" in field.metadata["words"]:
            parser.add_argument(f"--no-{option}", dest=field.name, action="store_const", const="no",
                                help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    return Settings(**vars(parser.parse_args(arguments)))

# %% cellView="form" jupyter={"source_hidden": true}
# @title Model and text that are 'auto', and whether there is a network
def bare_name(name: str) -> str:
    """A model or file name without the folders of this machine; of a folder of the hub's cache, the model's id."""
    cached = re.search(r"models--([^/\\]+)", name)
    return cached[1].replace("--", "/") if cached else Path(name).name if Path(name).exists() else name

def hub_is_reachable(timeout: float = 2.0) -> bool:
    """Asks the hub once, instead of letting every download find out for itself."""
    with contextlib.suppress(OSError):
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=timeout).close()
        return True
    return False

def choose_sources(settings: Settings) -> Settings:
    """Settings with 'auto' in model and dataset resolved; a model that was named never turns into another one."""
    model, dataset = settings.model, settings.dataset
    local = model == "demo" or Path(model).exists(), settings.train_file or dataset == "python-docs" or model == "demo"
    offline = huggingface_hub.constants.HF_HUB_OFFLINE or not (all(local) or hub_is_reachable())
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = offline
    if model == "auto":
        model = "demo" if offline else "gpt2"
        if offline:
            print("The Hugging Face hub cannot be reached, so this is a small demo model, trained on Python's manual. "
                  "For a real one give --model: a hub id where there is a network, a local folder, or a .gguf file.")
    if dataset == "auto" and not settings.train_file:
        dataset = "python-docs" if model == "demo" else "Salesforce/wikitext:wikitext-2-raw-v1"
    return dataclasses.replace(settings, model=model, dataset=dataset)

# %% cellView="form" jupyter={"source_hidden": true}
# @title Device, number format and memory, found by themselves
def find_device(choice: str = "auto") -> torch.device:
    """The device of this process. Raises UserError where the chosen one is not there."""
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(f"WORLD_SIZE is {processes}, but a run is one process: start it without torchrun.")
    accelerate.state.PartialState._reset_state()  # the notebook may be run again with another choice
    device = accelerate.PartialState(cpu=choice == "cpu").device
    there = {"xla": "tpu"}.get(device.type, device.type)
    if choice not in ("auto", there):
        raise UserError(f"device is {choice!r}, but this machine has {there}: choose that, 'cpu', or 'auto'; where "
                        "torch_xla is installed, set USE_TORCH_XLA=0 in the environment to compute without it.")
    return device

def has_bf16(device: torch.device) -> bool:
    return device.type in ("xla", "cpu") or (device.type == "cuda" and torch.cuda.is_bf16_supported(False))

def find_precision(device: torch.device, choice: str = "auto") -> torch.dtype:
    """The number format that this device computes in. Raises UserError for one it lacks."""
    if choice == "auto":
        choice = "fp32" if device.type in ("cpu", "mps") else "bf16" if has_bf16(device) else "fp16"
    if (choice == "fp16" and device.type != "cuda") or (choice == "bf16" and not has_bf16(device)):
        raise UserError(f"precision is {choice!r}, which {device.type} does not have: choose 'fp32', or 'auto'.")
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[choice]

def move(model, device: torch.device | str):
    """The model, moved to a device; XLA makes a new tensor for each of two tied weights, so they are tied again."""
    model.to(device)
    model.tie_weights()
    return model

def describe_device(device: torch.device) -> str:
    """One line: what the machine computes with."""
    name = f"{device.type.upper()}: {platform.processor() or platform.machine()}"
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, {torch.cuda.mem_get_info(device)[1] / 2**30:.0f} GiB"
    return f"{name} ({psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB RAM)"

def memory_free(device: torch.device) -> int:
    """Bytes that are free: of the GPU's memory, or of RAM."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available

def memory_used(device: torch.device) -> dict[str, int]:
    """Bytes in use: this process's RAM now, and the most of a GPU's memory since the step began."""
    gpu = {"accelerator": torch.cuda.max_memory_allocated()} if device.type == "cuda" else {}
    return {"ram": psutil.Process().memory_info().rss} | gpu

# %% cellView="form" jupyter={"source_hidden": true}
# @title How it is computed: number format, and batches that fit into memory
@dataclasses.dataclass
class Computing:
    """How over_blocks() computes, for all of the story: set once, in section 3."""

    dtype: torch.dtype = torch.float32
    weights: torch.dtype = torch.float32  # what they are held in: 16 bits only where adapters are trained
    batch_size: int = 4
    fitted: dict = dataclasses.field(default_factory=dict)  # step that ran out of memory -> blocks that fit

COMPUTING = Computing()

def number_format(device: torch.device, dtype: torch.dtype | None = None):
    """Context in which products are computed in COMPUTING.dtype, or in `dtype`. Weights may not change in it."""
    dtype = dtype or COMPUTING.dtype
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

def fit_batch_size(function, largest: int, what: str, room: float = math.inf):
    """`function(batch_size)`, with the largest divisor of `largest` for which there is memory, remembered by `what`.

    Raises RunError where not even a single block fits.
    """
    room = min(COMPUTING.fitted.get(what, largest), room)
    for size in [size for size in range(largest, 0, -1) if largest % size == 0 and size <= room] or [1]:
        if COMPUTING.fitted.get(what, room) < room:
            print(f"{what} runs out of memory: trying {size} blocks at once")
        try:
            return function(size)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)
        COMPUTING.fitted[what] = size - 1
    raise RunError(f"{what} runs out of memory with a single block: take a smaller --block-length or model, "
                   "--precision bf16, or --gradient-checkpointing")

def first_of(output):
    """What a module returns, or the first of several things."""
    return output[0] if isinstance(output, (tuple, list)) else output

@torch.no_grad()
def first_not_finite(model, block: torch.Tensor) -> str:
    """The first part of a model that makes numbers that are not finite, of a block (1, time), in words; "" for none."""
    found, names = [], {module: name for name, module in model.named_modules()}

    def look(module, args, output):
        if isinstance(part := first_of(output), torch.Tensor) and not part.isfinite().all():
            found.append(names[module] or type(module).__name__)

    with hooks(module.register_forward_hook(look) for module in names), number_format(model.device):
        model.eval()(block.to(model.device), use_cache=False)
    return f"first in {found[0]}" if found else ""

# %% cellView="form" jupyter={"source_hidden": true}
# @title The interface between the story and the supporting code: over_blocks()
def long_loop(items, what: str, device: torch.device):
    """The items one by one, with a bar; `device` does the work of an item."""
    for item in tqdm(items, what, leave=False, disable=None) if what else items:
        yield item
        if device.type == "xla":  # a TPU collects work until it is told to begin
            sys.modules["torch_xla"].sync()

def in_equal_batches(function, number: int, what: str):
    """`function(batch size)`, of a size that divides the number of blocks and fits into memory."""
    return fit_batch_size(function, max(n for n in range(1, COMPUTING.batch_size + 1) if number % n == 0), what)

def over_blocks(model, blocks, function, what: str, backward: bool = False) -> torch.Tensor:
    """What `function` returns for every block, in their order: (n, ...), on the model's device.

    `blocks` are token ids (n, time), or a tuple of tensors that belong together, block by block; `function` gets
    batches of them on the model's device, and returns a tensor that has a row for each block of the batch. It runs
    in evaluation mode, in COMPUTING.dtype, in batches that fit into memory, with a progress bar named `what`.
    `backward` says that gradients are computed. Raises RunError for numbers that are not finite.
    """
    tensors = blocks if isinstance(blocks, tuple) else (blocks,)
    each = 24 * tensors[0].shape[1] * model.config.get_text_config().vocab_size  # bytes of logits and their copies
    # On a processor two texts at a time are fastest in a backward pass: more logits are too large for its caches.
    largest = min(COMPUTING.batch_size, 2) if backward and model.device.type == "cpu" else COMPUTING.batch_size
    # A processor's system kills a process that asks for more than there is.
    room = memory_free(model.device) / each if model.device.type == "cpu" else math.inf
    model.eval()

    def attempt(size: int) -> torch.Tensor:
        batches, parts = list(zip(*(tensor.split(size) for tensor in tensors))), []
        for batch in long_loop(batches, what if len(batches) > 1 else "", model.device):
            with number_format(model.device):
                parts.append(function(*(part.to(model.device) for part in batch)))
        return torch.cat(parts).to(model.device)

    found = fit_batch_size(attempt, largest, what, room)
    if not found.isfinite().all():
        place = first_not_finite(model, tensors[0][:1]) or "though all that the model computes is finite"
        raise RunError(f"{what} gives numbers that are not finite ({place}): take --precision fp32, or another model "
                       "or text")
    return found

# %% cellView="form" jupyter={"source_hidden": true}
# @title How a run is named, and files that are never half-written
def fingerprint(*things) -> str:
    """The same for the same values (numbers, texts, tensors, models with weights and gates), and else another."""
    digest = hashlib.sha256()
    for thing in things:
        parts = thing.state_dict() if isinstance(thing, torch.nn.Module) else {"": thing}
        if any(isinstance(part, torch.Tensor) and part.device.type == "xla" for part in parts.values()):
            sys.modules["torch_xla"].sync()  # a copy that is read before it is computed shares its original's memory
        for name, part in parts.items():
            if isinstance(part, torch.Tensor):
                digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
                part = (part.dtype, tuple(part.shape))
            digest.update(repr((name, part)).encode())
    return digest.hexdigest()[:12]

@contextlib.contextmanager
def in_one_move(file: Path):
    """A path to write to; when all is written it takes the place of `file`, and where that fails it is removed."""
    part = file.with_name(file.name + ".part")
    try:
        yield part
        part.replace(file)
    except RuntimeError as error:  # torch.save has words of its own for a full disk
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    finally:
        part.unlink(missing_ok=True)

def open_folder(settings: Settings, key: str) -> tuple[Path, filelock.FileLock]:
    """The folder of the run with this fingerprint that has no zip yet, else a new one; and its lock, which is held.

    A run that another process computes is left alone. Raises UserError where no folder can be made.
    """
    place = Path(settings.output_dir)
    name = re.sub(r"[^\w.-]+", "-", bare_name(settings.model).split("/")[-1].removesuffix(".gguf"))
    new = place / f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{name}_{key}"
    earlier = sorted((path for path in place.glob(f"*_{key}*") if path.suffix not in (".state", ".zip")), reverse=True)
    for folder in [*earlier, new, Path(f"{new}-2")]:
        lock = filelock.FileLock(folder.with_name(folder.name + ".state") / "lock", timeout=0, is_singleton=True)
        try:
            if not folder.with_name(folder.name + ".zip").exists():
                lock.acquire()  # makes the folder that it is in
                folder.mkdir(parents=True, exist_ok=True)
                return folder, lock
        except filelock.Timeout:
            continue
        except OSError as error:
            raise UserError(f"output_dir is {str(place)!r}, but no folder can be made there ({error.strerror}): choose "
                            "another place.") from None
    raise UserError(f"output_dir is {str(place)!r}, where several such runs are being computed: wait for them.")

# %% cellView="form" jupyter={"source_hidden": true}
# @title The record of a run (1): its folder, its numbers, and what is computed once
class Record:
    """A run's folder, its numbers (`metrics`, in metrics.json), and what it goes on from (beside it, until it ends).

    A run is named by a fingerprint of settings, versions and device. Where a run with that fingerprint has no zip yet,
    it goes on: so the same command, or the notebook run again, goes on by itself.
    """

    def __init__(self, settings: Settings, device: torch.device, dtype: torch.dtype):
        transformers.set_seed(settings.seed)
        vars(COMPUTING).update(vars(Computing(dtype, batch_size=settings.batch_size)))
        self.settings, self.device, self.reused, self.dense_validation = settings, device, False, None
        about = {"settings": dataclasses.asdict(settings), "versions": VERSIONS, "device": describe_device(device),
                 "precision": str(dtype).removeprefix("torch.")}
        self.metrics = about | {name: {} for name in "perplexity bits_per_byte last_words repetition parameters heads "
                                "size samples seconds training peak_memory_bytes".split()}
        self.folder, self.lock = open_folder(settings, fingerprint(about))
        self.state = self.folder.with_name(self.folder.name + ".state")  # what is kept until the run is finished
        if (record := self.folder / "metrics.json").exists():
            self.metrics |= json.loads(record.read_text())
            print(f"Going on with {self.folder}, which was not finished (remove it to start anew).")
        self.save()

    def save(self) -> None:
        """Writes metrics.json in one move, so that it is never half there."""
        self.folder.mkdir(exist_ok=True)
        with in_one_move(self.folder / "metrics.json") as part:
            part.write_text(json.dumps(self.metrics, indent=1))

    def keep(self, name: str, thing) -> None:
        """Keeps a thing (tensors, numbers, texts, in dicts and lists) under a name, in one move."""
        self.state.mkdir(exist_ok=True)
        with in_one_move(self.state / f"{name}.pt") as part, part.open("wb") as file:
            torch.save(send_to_device(thing, "cpu"), file)

    def kept(self, name: str):
        """What was kept under a name, on the processor; or None."""
        file = self.state / f"{name}.pt"
        return torch.load(file) if file.exists() else None

    def cached(self, name: str, depends: tuple, compute):
        """compute(), or what it returned before for the same `depends`; not None."""
        key = f"{name}-{fingerprint(self.metrics['precision'], self.settings.seed, *depends)}"
        found = self.kept(key)
        self.reused = found is not None
        if found is None:
            found = compute()
            self.keep(key, found)
        else:
            print(f"[{name}: kept from before]")
        return found

# %% cellView="form" jupyter={"source_hidden": true}
# @title The record of a run (2): steps, pictures, and the zip
class Run(Record):
    """A record with `step` (times what happens in it), `show` (keeps and shows pictures), `finish` (the zip)."""

    @contextlib.contextmanager
    def step(self, name: str):
        """Times a step, notes its memory, and keeps what it recorded in `metrics`, also where the step fails."""
        clear_device_cache(garbage_collection=True)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start, self.reused = time.perf_counter(), False
        try:
            yield
        finally:
            error = sys.exc_info()[1]
            empty = isinstance(error, UserError) and not self.metrics["perplexity"]
            used, seconds, noted = memory_used(self.device), time.perf_counter() - start, self.metrics["seconds"]
            if not (self.reused and name in noted):  # else what was noted then stays
                noted[name], self.metrics["peak_memory_bytes"][name] = round(seconds, 2), used
            if empty:  # a mistake before anything was computed leaves nothing behind
                shutil.rmtree(self.folder, ignore_errors=True)
                shutil.rmtree(self.state, ignore_errors=True)
            else:
                self.save()
            failed = error is not None and not empty and in_notebook()
            kept = f" What is there is in {self.folder}: run all cells again, and it goes on." if failed else ""
            memory = ", ".join(f"{kind} {size / 2**30:.2f} GiB" for kind, size in used.items())
            print(f"[{name}: {seconds:.1f} s, {memory}]{kept}")

    def show(self, figure: Figure, name: str, width: int = 760, live=None):
        """Keeps a figure as PNG; a notebook shows it, in the place of `live`, which an earlier call returned."""
        figure.savefig(self.folder / name, dpi=150, bbox_inches="tight")
        if not in_notebook():
            return print(f"picture: {self.folder / name}")
        picture = Image(self.folder / name, width=width)
        return display(picture, display_id=True) if live is None else live.update(picture) or live

    def finish(self) -> Path:
        """The run's folder as a zip, which says that it is finished. What was kept for resuming is removed."""
        self.save()
        archive = self.folder.with_name(self.folder.name + ".zip")
        packed = shutil.make_archive(self.state / "packed", "zip", self.folder.parent, self.folder.name)
        Path(packed).replace(archive)
        self.lock.release(force=True)
        shutil.rmtree(self.state, ignore_errors=True)
        return archive

# %% cellView="form" jupyter={"source_hidden": true}
# @title What the story shows, and how a run starts
VERSIONS = {"python": platform.python_version()} | {
    package.__name__: package.__version__ for package in (torch, transformers, datasets, accelerate)}
STAGES = {"dense": "dense, untouched", "pruned": "pruned", "repaired": "pruned + repaired",
          "fine_tuned": "pruned + fine-tuned", "dense_fine_tuned": "dense + fine-tuned"}

def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), facecolor="white", layout="constrained")

def in_lines(text: str) -> str:
    """A text in lines of a hundred characters, marked as a quotation."""
    return textwrap.indent(textwrap.fill(" ".join(text.split()), 100), "  | ")

def show_markdown(text: str) -> None:
    """Shows Markdown: rendered in a notebook, as plain text in a terminal."""
    return display(Markdown(text)) if in_notebook() else print(text)

@contextlib.contextmanager
def hooks(handles):
    """Within it the hooks are in place whose handles an iterable gives; afterwards, or after an error, none is."""
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)  # leaving it removes the hook
        yield

def start_settings(more: str) -> Settings:
    """The settings, from the form and `more` in a notebook, from the command line in a script. Raises UserError."""
    if not in_notebook():
        sys.excepthook = stop_without_traceback
        transformers.utils.logging.disable_progress_bar()  # of loading and saving; what takes long has a bar of ours
        for stream in (sys.stdout, sys.stderr):  # a sign that a console or a file cannot hold must not end a run
            if hasattr(stream, "reconfigure"):  # (there may be none at all)
                stream.reconfigure(errors="replace")
    is_script = "__file__" in globals() and Path(sys.argv[0]).name == Path(__file__).name  # also %run in a notebook
    try:
        lexer = shlex.shlex(more, posix=True, punctuation_chars=False)
        lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""  # a Windows path stays what it is
        words = sys.argv[1:] if is_script or not in_notebook() else list(lexer)
    except ValueError as error:
        raise UserError(f"MORE is {more!r}, but must be options as in a shell ({error}): correct it.") from None
    settings = choose_sources(read_settings(words))
    for field in dataclasses.fields(settings):
        if (value := getattr(settings, field.name)) != field.default or field.name in ("prune", "strategy", "seed"):
            print(f"{field.name:>22}  {value}")
    return settings

def start_run(settings: Settings) -> Run:
    """A run on the fastest device, or the one that the settings name. Raises UserError where that is not there."""
    device = find_device(settings.device)
    run = Run(settings, device, find_precision(device, settings.precision))
    print(f"{run.metrics['device']}, computing in {run.metrics['precision']}; results: {run.folder}")
    if device.type == "cpu" and "google.colab" in sys.modules:
        print("This runtime has no GPU or TPU; Runtime → Change runtime type gives you one, and all is much faster.")
    return run

# %% cellView="form" jupyter={"source_hidden": true}
# @title Which files a setting means
KINDS = (".txt", ".md", ".jsonl", ".json", ".csv", ".parquet")  # all but the last also with .gz behind it
NOT_TEXT = re.compile(r"/\.|/__MACOSX/|/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_")  # what is hidden, and results of ours
SPLIT_WORDS = {"train": "train|training", "validation": "validation|valid|val|dev", "test": "test|testing"}
SPLITS = tuple(SPLIT_WORDS)

def kind_of(path: Path) -> str:
    """The suffix that says how a file is read, in small letters and without .gz."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()

def find_files(name: str, path: str) -> dict[str, list[Path]]:
    """Split -> the files that a setting means: one, those of a folder, or those of a pattern. Raises UserError.

    They go into their splits where the names of all of them say one; else all are for train.
    """
    place, folder = Path(path), Path(path).is_dir()
    found = [place] if place.is_file() else place.rglob("*") if folder else map(Path, glob.glob(path, recursive=True))
    inside = {file: f"/{file.relative_to(place).as_posix() if folder else file.name}" for file in found
              if file.is_file()}
    files = sorted(file for file, within in inside.items()
                   if not folder or kind_of(file) in KINDS and not NOT_TEXT.search(within))
    if not files or any(kind_of(file) not in KINDS for file in files):
        raise UserError(f"{name} is {path!r}, but must be an existing file of a kind that can be read "
                        f"({', '.join(KINDS)}, or .gz of them), a folder with some, or a pattern such as data/*.txt: "
                        "check the path, or convert it first.")
    parts = {split: [file for file in files if re.search(rf"(?<![a-z])({words})(?![a-z])", inside[file].lower())]
             for split, words in SPLIT_WORDS.items()}
    named = {split: part for split, part in parts.items() if part}
    apart = "train" in named and len(named) > 1 and sum(map(len, named.values())) == len(files)
    return named if apart else {"train": files}

def is_saved(path: str) -> bool:
    return any(Path(path, name).exists() for name in ("dataset_dict.json", "state.json"))

def read_files(settings: Settings, tokenizer) -> dict[str, str]:
    """Split -> text of the files that the settings name; those of train_file may be named after splits."""
    text = {}
    for split, path in ((split, getattr(settings, f"{split}_file")) for split in SPLITS):
        if path and is_saved(path):
            parts = read_dataset(path, tokenizer)
        elif path:
            parts = {name: "\n\n".join(read_file(file, tokenizer) for file in files)
                     for name, files in find_files(f"{split}_file", path).items()}
        if path:
            text |= parts if split == "train" else {split: "\n\n".join(parts.values())}
    return text

# %% cellView="form" jupyter={"source_hidden": true}
# @title Reading text (1): chats, and the column of a table that holds the text
def for_template(value):
    """A value of a table as a template wants it: JSON in a text is read, arrays are lists, empty keys are left out."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):  # a text that only begins like JSON
            return for_template(json.loads(value))
    if isinstance(value, dict):
        return {key: part if key in ("content", "value") and isinstance(part, str) else for_template(part)
                for key, part in value.items() if part is not None}
    return list(map(for_template, value)) if isinstance(value, (list, tuple, numpy.ndarray)) else value

def write_chat(row: dict, column: str, tokenizer) -> str:
    """One chat as text, by the model's chat template; turns have role and content, or from and value."""
    turns, roles = for_template(row[column]), {"human": "user", "gpt": "assistant"}  # names in `conversations`
    if isinstance(turns, dict):  # of lists
        turns = [dict(zip(turns, values)) for values in zip(*turns.values())]
    for turn in turns:
        turn.setdefault("role", roles.get(turn.get("from"), turn.get("from")))
        content = turn.setdefault("content", turn.get("value", ""))
        if isinstance(content, list):  # parts of a text
            turn["content"] = "".join(part if isinstance(part, str) else part["text"] for part in content)
    tools = for_template(row.get("tools"))
    return tokenizer.apply_chat_template(turns, tools=tools if isinstance(tools, list) else None, tokenize=False)

def join_rows(table: pandas.DataFrame, name: str, tokenizer=lambda: None) -> str:
    """The text column of a table as one string, rows parted by a blank line; no other column is looked at.

    It is 'text'; else chats (`messages`, `conversations`), which `tokenizer()` writes out; else 'content'; else the
    only column that holds text. Raises UserError where there is none.
    """
    filled = {key: table[key].map(lambda value: bool(len(value)) if hasattr(value, "__len__") else pandas.notna(value))
              for key in table}
    texts = [key for key in table if isinstance(next(iter(table[key][filled[key]]), None), str)]
    liked = [key for key in ("text", "messages", "conversations", "content") if key in table and filled[key].any()]
    column = max(liked, key=lambda key: filled[key].sum()) if liked else texts[0] if len(texts) == 1 else None
    if column is None:
        raise UserError(f"{name!r} has the columns {', '.join(map(str, table)) or '(none)'}, but one named 'text' is "
                        "needed: rename the column that holds the text.")
    if column != "text":
        print(f"{name}: the text is that of the column {column!r}")
    rows = table[column].dropna()
    if column in ("messages", "conversations"):
        if (speaker := tokenizer()) is None or not speaker.chat_template:
            raise UserError(f"{name!r} holds chats, but the model has no chat template to write them out: take a model "
                            "that has one, or a file with a column 'text'.")
        with saying_cannot_be_used(f"a chat of {name!r}", "correct it"):
            rows = table[filled[column]].apply(lambda row: write_chat(row.to_dict(), column, speaker), axis=1)
    if wrong := next((row + 1 for row, value in rows.items() if not isinstance(value, str)), None):
        raise UserError(f"{name!r} has a column {column!r}, but row {wrong} holds no text in it: correct it.")
    return "\n\n".join(rows)

# %% cellView="form" jupyter={"source_hidden": true}
# @title Reading text (2): files of all kinds, datasets
def read_csv(path: Path) -> pandas.DataFrame:
    """A table, split at its first line's most frequent delimiter. Raises ValueError for a row that does not fit."""
    csv.field_size_limit(2**31 - 1)
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        head = file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter=max(",;\t|", key=head.count), strict=True)
        try:
            rows = [row for row in reader if row] or [[]]
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from None
    if wrong := next((number for number, row in enumerate(rows, 1) if len(row) != len(rows[0])), None):
        raise ValueError(f"row {wrong} has {len(rows[wrong - 1])} columns, but the first one {len(rows[0])}")
    return pandas.DataFrame(rows[1:], columns=rows[0])

def read_file(path: str | Path, tokenizer=lambda: None) -> str:
    """The text of a file of KINDS; of a table, its text column. Raises UserError where it has none."""
    path, utf8 = Path(path), {"encoding": "utf-8-sig"}
    with saying_cannot_be_used(f"the text of {str(path)!r}", "correct or convert it"):
        match kind_of(path):
            case ".parquet":
                table = pandas.read_parquet(path)
            case ".csv":
                table = read_csv(path)
            case ".json" | ".jsonl" as kind:
                table = pandas.read_json(path, lines=kind == ".jsonl", dtype=False, **utf8)
            case _:
                with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", **utf8) as file:
                    text = file.read()
                if "\0" in text:
                    raise ValueError(f"it has a NUL at character {text.index(chr(0))}")
                return text
    return join_rows(table, str(path), tokenizer)

def read_dataset(name: str, tokenizer=lambda: None) -> dict[str, str]:
    """Split -> text of a hub dataset, `id` or `id:configuration`, or a folder of `save_to_disk`. Raises UserError."""
    with saying_cannot_be_used(f"dataset {name!r}", "check the name, the configuration and the network, or take "
                              "--train-file or --dataset python-docs"):
        data = datasets.load_from_disk(name) if is_saved(name) else datasets.load_dataset(*name.split(":"))
        data = data if isinstance(data, dict) else {"train": data}
    if "train" not in data:
        raise UserError(f"dataset {name!r} has the splits {', '.join(data)}, but 'train' is needed: take another one.")
    return {split: join_rows(data[split].to_pandas(), name, tokenizer) for split in SPLITS if split in data}

def with_prompt(settings: Settings, text: str) -> Settings:
    """Settings whose prompt, where it is 'auto', is the beginning of the text's first passage of twenty words."""
    passage = next((words for line in text.splitlines() if len(words := line.split()) >= 20), text.split())
    beginning = " ".join(passage[:8])[:80]
    return dataclasses.replace(settings, prompt=beginning if settings.prompt == "auto" else settings.prompt)

# %% cellView="form" jupyter={"source_hidden": true}
# @title Names of models, tokenizers, and remedies for what does not load
@contextlib.contextmanager
def saying_cannot_be_used(what: str, remedy: str):
    """Within it whatever goes wrong becomes a UserError; a broken file fails in every way there is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        remedy = next((better for found, better in REMEDIES.items() if re.search(rf"\b({found})", said)), remedy)
        raise UserError(f"{what} cannot be used ({first_sentence(error)}): {remedy}.") from error

REMEDIES = {  # what a library says -> what to do
    "ImportError|ModuleNotFound": "install that package",
    "untagged enum|does not recognize this architecture|Unrecognized configuration|is not a valid .*Config": (
        "it was made by a newer version: pip install -U transformers tokenizers"),
    "[Hh]eader ?[Tt]oo|[Ii]nvalid ?[Hh]eader|[Ii]ncomplete|[Tt]runcated|unexpected end|EOF|not a valid|corrupt": (
        "a file is cut short or broken: download or copy it again"),
    "gated repo|restricted|40[13] Client": "ask for access on its page, and log in with `hf auth login`",
    "No such file|FileNotFound|no file named|not appear to have": "a file is missing: download or copy all of them",
    "Permission denied": "make its files readable", "No space left": "make room on the disk",
    "timed out|ConnectionError|MaxRetry|offline mode": "check the network, or give a local folder",
}

def place_of(name: str, trust_remote_code: bool = False) -> tuple[str, dict]:
    """What from_pretrained() takes for a model's name: a folder or hub id, and options."""
    if name.endswith(".gguf"):
        return str(Path(name).parent), {"gguf_file": Path(name).name}
    if snapshots := list(Path(name, "snapshots").glob("*")):  # a folder of the hub's cache
        return str(max(snapshots, key=os.path.getmtime)), {"trust_remote_code": trust_remote_code}
    path, _, revision = name.partition("@") if not Path(name).exists() else (name, "", "")
    return path, {"revision": revision or "main", "trust_remote_code": trust_remote_code}

def load_tokenizer(name: str, trust_remote_code: bool = False):
    """A model's tokenizer. Raises UserError where it cannot be loaded, or has no tokens."""
    remedy = "check the name and the network, or copy the tokenizer's files into the folder"
    with saying_cannot_be_used(f"the tokenizer of model {name!r}", remedy):
        path, options = place_of(name, trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        if not tokenizer("a b", add_special_tokens=False)["input_ids"]:
            raise OSError("it knows no tokens")
    return tokenizer

def python_docs() -> str:
    """Python's own reference manual, about half a million characters, from the standard library."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))

# %% cellView="form" jupyter={"source_hidden": true}
# @title Opening a model (1): its configuration, and its size
def open_config(name: str, trust_remote_code: bool):
    """A model's configuration. Raises UserError for one whose weights cannot be cut."""
    path, options = place_of(name, trust_remote_code)
    origin, (said, _) = "take the model that it was made from", transformers.PreTrainedConfig.get_config_dict(
        path, revision=options.get("revision"))
    if "pruned" in said or "kept_heads" in said:
        raise UserError(f"model {name!r} is compact, its heads are cut out already: {origin}.")
    config = AutoConfig.from_pretrained(path, **options)
    kind = (config.architectures or [""])[0]
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"model {name!r} is quantised, and such weights can be neither cut nor trained: {origin}.")
    if not trust_remote_code and hasattr(config, "auto_map") and not hasattr(transformers, kind):
        raise UserError(f"model {name!r} is a {kind}, which only the code knows that it brings along: read that "
                        "code, and give --trust-remote-code.")
    config._attn_implementation = None  # the one that is there here, not the one that it was trained with
    return config

def opener_for(config):
    """The class that opens a configuration's model: for causal language models, else for those that read images."""
    kind, (causal, images) = type(config), (AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    return images if kind not in causal._model_mapping and kind in images._model_mapping else causal

def look_at_model(name: str, trust_remote_code: bool = False) -> tuple:
    """(configuration, or None for .gguf; parameters; number format) of a model, not its weights. Raises UserError."""
    path, options = place_of(name, trust_remote_code)
    remedy = ("it must be a causal language model on the hub (with a network), a local folder, a .gguf file, or 'demo'"
              + ("" if trust_remote_code else "; one with code of its own needs --trust-remote-code"))
    with saying_cannot_be_used(f"model {name!r}", remedy):
        if "gguf_file" in options:  # such files hold no format of ours
            return None, sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(name).tensors), torch.bfloat16
        config = open_config(name, trust_remote_code)
        bare = copy.deepcopy(config)  # not the format that the configuration names, but that of the file
        bare.dtype = bare.get_text_config().dtype = None
        shapes = opener_for(config).from_pretrained(path, **options, config=bare, dtype="auto", device_map="meta")
    return config, shapes.num_parameters(), shapes.dtype

# %% cellView="form" jupyter={"source_hidden": true}
# @title What fits into memory: all weights in float32, or adapters on weights in 16 bits
BYTES_EACH = {"all": {"cuda": 18, "cpu": 26}, "lora": {"cuda": 6, "cpu": 8}}  # a parameter (tests/benchmarks/memory.py)

def choose_training(run: Run, settings: Settings, parameters: int, came_in: torch.dtype) -> Settings:
    """Settings with `train` resolved for a model of so many parameters; COMPUTING is told what weights are held in.

    Raises UserError where it cannot fit.
    """
    free, kind = memory_free(run.device), "cuda" if run.device.type == "cuda" else "cpu"
    needed = {way: 2**30 + parameters * each[kind] for way, each in BYTES_EACH.items()}  # (a GiB for what is computed)
    way = settings.train if settings.train != "auto" else "all" if needed["all"] <= free else "lora"
    if needed[way] > free:
        smaller = "--train lora, " if way == "all" and needed["lora"] <= free else ""
        raise UserError(f"train is {settings.train!r}, which takes about {needed[way] / 1e9:.1f} GB for this model of "
                        f"{parameters / 1e6:,.0f} M parameters, but {free / 1e9:.1f} GB are free: take {smaller}a "
                        "smaller model, or a machine with more memory.")
    settings = run.settings = dataclasses.replace(settings, train=way)
    if way == "lora" and settings.precision != "fp32":
        half = came_in == torch.float16 and kind == "cuda"
        COMPUTING.dtype = COMPUTING.weights = torch.bfloat16 if has_bf16(run.device) and not half else torch.float16
        run.metrics["precision"] = str(COMPUTING.dtype).removeprefix("torch.")
    how = "all weights are trained, in float32" if way == "all" else f"adapters, on {run.metrics['precision']} weights"
    print(f"{parameters / 1e6:,.1f} M parameters; training takes up to {needed['all'] / 1e9:.1f} GB with all weights, "
          f"{needed['lora'] / 1e9:.1f} GB with adapters, and {free / 1e9:.1f} GB are free: {how}")
    return settings

# %% cellView="form" jupyter={"source_hidden": true}
# @title Opening a model (2), or saying in one sentence why it cannot be used
@torch.no_grad()
def is_causal(model) -> bool:
    """True where no token's prediction depends on a later token."""
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    other = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)  # another last token
    first, second = (model(tokens, use_cache=False).logits[:, :-1].float() for tokens in (ids, other))
    return torch.allclose(first, second, rtol=1e-3, atol=1e-3 * first.abs().max().item())

def load_model(name: str, device: torch.device, trust_remote_code: bool = False, weights=torch.float32):
    """Tokenizer and model in evaluation mode. Raises UserError where the model cannot be loaded or used.

    Its weights are in the number format `weights`; `model.came_in` is the format that they came in.
    """
    (path, options), (config, _, came_in) = place_of(name, trust_remote_code), look_at_model(name, trust_remote_code)
    tokenizer = load_tokenizer(name, trust_remote_code)
    if config is None and hasattr(transformers, "GgufConfig"):  # else new versions may leave weights in 4 bits on a GPU
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with saying_cannot_be_used(f"model {name!r}", "download it again"):
        model, found = opener_for(config).from_pretrained(path, **options, config=config, dtype=weights,
                                                          output_loading_info=True)
    others = sorted(map(str, found["unexpected_keys"]))
    if lacking := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        remedy = f"it has {others[0]} instead: save it under the model's own names" if others else "download it again"
        raise UserError(f"model {name!r} lacks {len(lacking)} of its weights ({lacking[0]} first): {remedy}.")
    if others:
        print(f"{name}: {len(others)} weights have no place in a {type(model).__name__}, and are left out ({others[0]} "
              "first).")
    if broken := next((path for path, weight in model.named_parameters() if not weight.isfinite().all()), None):
        raise UserError(f"model {name!r} has numbers that are not finite in {broken}: download it again, or take "
                        "another one.")
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False  # whatever it says: the file holds a matrix of its own
    model.came_in, model = came_in, move(model, device).eval()
    if not is_causal(model):
        raise UserError(f"model {name!r} is a {type(model).__name__} whose tokens see those after them: take a causal "
                        "language model.")
    return tokenizer, model

# %% cellView="form" jupyter={"source_hidden": true}
# @title Do text, tokenizer, model and number formats fit together?
def evenly_spaced(blocks: torch.Tensor, number: int) -> torch.Tensor:
    """So many blocks (number, time), evenly spaced over all of them (n, time)."""
    return blocks[torch.linspace(0, len(blocks) - 1, min(number, len(blocks))).round().long()]

def pack_all(text: dict[str, str], tokenizer, model, settings: Settings) -> dict[str, torch.Tensor]:
    """Split -> token ids (blocks, block_length). Raises UserError where text, tokenizer, model or prompt do not fit."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx", "context_length")
    limits = [getattr(model.config.get_text_config(), name, None) for name in names]
    longest, new_tokens = min(filter(None, limits), default=settings.block_length + 40), 40
    if settings.block_length > longest:
        raise UserError(f"block_length is {settings.block_length}, but the model reads at most {longest} tokens: take "
                        f"--block-length {longest} or less.")
    prompt = tokenizer(settings.prompt, return_tensors="pt")["input_ids"].long()
    if not 1 <= prompt.numel() <= longest - new_tokens:
        raise UserError(f"prompt has {prompt.numel()} tokens, but must have 1 to {longest - new_tokens}: write a "
                        f"{'shorter' if prompt.numel() else 'longer'} one.")
    if settings.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(f"gradient_checkpointing is on, but {type(model).__name__} does not have it: leave it off.")
    blocks = {split: pack(part, tokenizer, settings.block_length) for split, part in text.items()}
    vocabulary = model.get_input_embeddings().num_embeddings
    for split, packed in {**blocks, "prompt": prompt}.items():
        if not len(packed):
            raise UserError(f"the {split} text has fewer than {settings.block_length} tokens, but one block is needed: "
                            "take a longer text or a smaller --block-length.")
        if packed.max() >= vocabulary:
            raise UserError(f"the tokenizer of model {settings.model!r} has a token {packed.max()} (in the {split}), "
                            f"but the model knows only {vocabulary}: they do not belong together.")
    return blocks

def describe_model(model, settings: Settings) -> dict:
    """What the record says of a model that was just loaded. It will be saved in the format that it came in."""
    path = Path(settings.model)
    files = [path] if path.is_file() else path.glob("*.safetensors")
    model.saved_in = min(COMPUTING.weights, model.came_in, torch.float32, key=lambda kind: kind.itemsize)
    return {"class": type(model).__name__, "parameters": model.num_parameters(),
            **{name: str(getattr(model, name)).removeprefix("torch.") for name in ("came_in", "saved_in")},
            "file_bytes": sum(file.stat().st_size for file in files) or None}

def saved_format(run: Run) -> torch.dtype:
    return getattr(torch, run.metrics["model"]["saved_in"])

@torch.no_grad()
def rounded(model, dtype: torch.dtype):
    """The model with its weights rounded to a number format, in float32. Raises RunError where they do not fit."""
    for name, weight in model.named_parameters():
        weight.copy_(weight.to(dtype))
        if not weight.isfinite().all():
            raise RunError(f"{name} does not fit into {dtype}: take a lower --learning-rate")
    return model

def try_float16(run: Run, model, block: torch.Tensor) -> None:
    """Computes in float32 from here on where float16, tried on a block (1, time), is too narrow for the model."""
    if COMPUTING.dtype == torch.float16 and (place := first_not_finite(model, block)):
        if COMPUTING.weights == torch.float16:
            raise RunError(f"float16 is too narrow for this model ({place}): take --precision fp32, or a GPU with bf16")
        COMPUTING.dtype, run.metrics["precision"] = torch.float32, "float32"
        print(f"float16 is too narrow for this model ({place}): all is computed in float32.")

# %% cellView="form" jupyter={"source_hidden": true}
# @title Writing: always the most likely token
def greedy(model, ids: torch.Tensor, streamer=None, **options):
    """generate() for ids (texts, time), always the most likely token, whatever generation_config.json asks for."""
    before, ends = model.generation_config, model.generation_config.eos_token_id
    mask = options.pop("attention_mask", torch.ones_like(ids))
    options |= {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "eos_token_id": ends}
    model.generation_config = transformers.GenerationConfig(**{"pad_token_id": 0} | options)
    try:
        return model.eval().generate(ids, attention_mask=mask, streamer=streamer)
    finally:
        model.generation_config = before

def that_writes(model):
    """The model, or on a TPU, which would compile it anew for every length of a text, a copy on the processor."""
    return move(copy.deepcopy(model), "cpu") if model.device.type == "xla" else model

@torch.no_grad()
def sample(model, tokenizer, prompt: str, new_tokens: int = 40) -> str:
    """The prompt and the model's most likely continuation, the same every time."""
    model, ids = that_writes(model), tokenizer(prompt, return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": new_tokens, "pad_token_id": tokenizer.eos_token_id}
    output = fit_batch_size(lambda _: greedy(model, ids.to(model.device), **options), 1, "writing a sample")
    return tokenizer.decode(output.sequences[0], skip_special_tokens=True)

# %% cellView="form" jupyter={"source_hidden": true}
# @title What the loop stands on (1): batches, mixed precision, gradients that fit
def training_options(settings: Settings) -> list:
    names = ("max_steps", "learning_rate", "batch_size", "distillation", "seed", "train")
    return [getattr(settings, name) for name in names]

def measurements_since_the_best(history: dict[str, list]) -> int:
    values = [value for _, value in history["perplexity"]]
    return len(values) - 1 - values.index(min(values)) if values else 0

def draw(number: int, per_step: int, steps: int, generator: torch.Generator) -> list[torch.Tensor]:
    """For each step the numbers of the blocks that it learns from, of `number` blocks in random order: (per_step,)."""
    order = [torch.randperm(number, generator=generator) for _ in range(math.ceil(steps * per_step / number))]
    return torch.cat(order).split(per_step)[:steps]

def trained(model) -> dict[str, torch.nn.Parameter]:
    """The parameters that learn, by name: all of them, or those of adapters."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

def accelerated(model, settings: Settings):
    """accelerate's Accelerator for the model's device and COMPUTING.dtype, and AdamW; the model is ready to train."""
    accelerate.state.AcceleratorState._reset_state()  # the notebook may be run again in another number format
    kind = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(COMPUTING.dtype, "no")
    accelerator = accelerate.Accelerator(mixed_precision=kind, cpu=model.device.type == "cpu")
    optimizer = torch.optim.AdamW(trained(model).values(), lr=settings.learning_rate, weight_decay=WEIGHT_DECAY,
                                  fused=model.device.type in ("cpu", "cuda"))
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return accelerator, accelerator.prepare(optimizer)  # (the model itself is not wrapped: it stays what it is)

def backward(accelerator, model, batch: torch.Tensor, loss_of, seed: int) -> torch.Tensor:
    """Gradients of the mean loss of ids (batch, time), computed in parts that fit into memory; the loss."""
    def attempt(size: int) -> torch.Tensor:
        model.zero_grad()
        torch.manual_seed(seed)
        loss = torch.zeros((), device=model.device)
        for part in batch.split(size):
            with accelerator.autocast():
                share = loss_of(part.to(model.device)).sum() / len(batch)
            accelerator.backward(share)
            loss += share.detach()
        return loss

    # About a thousand tokens at a time are fastest on a processor: more logits are too large for its caches.
    largest = max(1, min(len(batch), 1024 // batch.shape[1] if model.device.type == "cpu" else len(batch)))
    return fit_batch_size(attempt, largest, "fine-tuning")

# %% cellView="form" jupyter={"source_hidden": true}
# @title What the loop stands on (2): what it goes on from, and its live picture
def training_to_keep(kept: dict, model, accelerator, optimizer) -> dict:
    """All that a training goes on from: weights, the best ones so far (from `kept`, if not these), AdamW's state."""
    weights, is_best = trained(model), measurements_since_the_best(kept["done"]["history"]) == 0
    best = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()} if is_best else kept["best"]
    return {"done": kept["done"], "weights": weights, "best": best, "optimizer": optimizer.state_dict(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None}

def put_training(kept: dict, model, accelerator, optimizer) -> None:
    """Puts what was kept back where it was, if anything was."""
    if "weights" in kept:
        model.load_state_dict(kept["weights"], strict=False)  # (those that do not learn stay)
        optimizer.load_state_dict(kept["optimizer"])
        if kept["scaler"]:
            accelerator.scaler.load_state_dict(kept["scaler"])

def end_training(kept: dict, model, settings: Settings) -> dict:
    """Gives the model the best weights that were kept and ends its training mode; returns the record."""
    model.load_state_dict(kept["best"], strict=False)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    model.eval()
    done = kept["done"]
    best = min(done["history"]["perplexity"], key=lambda point: point[1])[0]
    tokens = settings.batch_size * settings.block_length
    return {"steps": done["step"], "planned_steps": settings.max_steps, "kept_step": best, "tokens_per_step": tokens,
            "train_tokens_per_second": round(tokens * done["step"] / done["seconds"], 1), "history": done["history"]}

def show_training(run: Run, name: str, done: dict, settings: Settings, live, last: bool = False):
    """Loss and validation perplexity so far, as a picture in the place of `live`; a script draws the last one only."""
    steps, seconds, history = done["step"], done["seconds"], done["history"]
    minutes, rest = divmod(seconds / steps * (settings.max_steps - steps), 60)
    early = last and steps < settings.max_steps
    words = (f"{STAGES.get(name, name)}: step {steps} of {settings.max_steps} · loss {history['loss'][-1][1]:.3f} · "
             f"validation perplexity {history['perplexity'][-1][1]:.2f} · "
             f"{settings.batch_size * settings.block_length * steps / seconds:,.0f} tokens/s · "
             + ("stopped, because it no longer improves" if early else f"{minutes:.0f} min {rest:02.0f} s left"))
    if not in_notebook() and not last:
        return print(words)
    figure = new_figure(8, 2.8)
    figure.suptitle(words, fontsize=9)
    for axes, (title, points) in zip(figure.subplots(1, 2), history.items()):
        axes.plot(*zip(*points), color="#0072B2", marker="o", markersize=3)
        axes.set(title=f"{'training' if title == 'loss' else 'validation'} {title}", xlabel="step")
        axes.grid(alpha=0.3)
    if run.dense_validation:
        axes.axhline(run.dense_validation, color="#D55E00", linestyle="--", label="dense, untouched")
        axes.legend(fontsize=8)
    return run.show(figure, f"{name}.png", live=live)

# %% cellView="form" jupyter={"source_hidden": true}
# @title The demo: byte-level BPE of 1,024 tokens, 4 layers of 8 heads, 128 numbers wide, trained by the loop above
def demo_tokenizer(text: str):
    """A byte-level BPE tokenizer of 1,024 tokens."""
    lines = text.splitlines(keepends=True)
    return transformers.GPT2Tokenizer().train_new_from_iterator(lines, vocab_size=1024, show_progress=False)

def make_demo(text: str, device: torch.device = torch.device("cpu")) -> str:  # noqa: B008 (a constant)
    """Trains the demo model, once, on a text; the folder that holds it."""
    # No dropout: on a processor it makes attention several times slower.
    config = transformers.GPT2Config(vocab_size=1024, n_positions=512, n_embd=128, n_layer=4, n_head=8, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    settings = {"max_steps": 600, "learning_rate": 3e-3, "batch_size": 16, "block_length": 128}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "PruningAndFineTuningColab")
    folder = cache / f"demo-{fingerprint(text, config.to_json_string(), settings)}"
    if folder.exists():
        return str(folder)
    print("Training the demo model, once: a minute or two.")
    tokenizer, before = demo_tokenizer(text), dict(vars(COMPUTING))
    blocks = pack(text, tokenizer, settings["block_length"])
    if len(blocks) <= 16:  # which are for validation
        raise UserError(f"the demo's training text has {len(text)} characters, but 10000 or more are needed: take a "
                        "longer one, or another model.")
    with tempfile.TemporaryDirectory() as place:
        run = Run(Settings(model="demo", output_dir=place, **settings), device, torch.float32)
        model = transformers.GPT2LMHeadModel(config).to(device)
        train(run, "demo", model, {"train": blocks[:-16], "validation": blocks[-16:]}, run.settings)
        vars(COMPUTING).update(before)
        part = folder.with_name(f"{folder.name}.{os.getpid()}")
        move(model, "cpu").save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(folder)
        run.lock.release(force=True)
    return str(folder)

def open_model(run: Run, settings: Settings, text: str) -> tuple:
    """(settings with `train` resolved, tokenizer, model); the demo is trained on the text. Raises UserError."""
    name = make_demo(text, run.device) if settings.model == "demo" else settings.model
    settings = choose_training(run, settings, *look_at_model(name, settings.trust_remote_code)[1:])
    return settings, *load_model(name, run.device, settings.trust_remote_code, COMPUTING.weights)

# %% [markdown]
# <a name="3.-Start"></a>
# ## 3. Start
#
# The settings are checked, so that a typo is found now and not after ten minutes of computing. The fastest device
# is found. A folder for the results is made, or an interrupted run with the same settings goes on.

# %%
if __name__ == "__main__":
    settings = start_settings(MORE)

# %%
if __name__ == "__main__":
    run = start_run(settings)

# %% [markdown]
# <a name="4.-Text"></a>
# ## 4. Text
#
# Three texts are kept apart: heads are scored and the model is repaired and fine-tuned on *train*, progress is
# watched on *validation*, and *test* is used for the reported perplexities only. A text without splits
# of its own is cut into contiguous parts, 80 / 10 / 10. Rows of a dataset are joined by a blank line, as
# SparseGPT and Wanda do, so that perplexities can be compared with published ones.

# %%
def cut_tail(text: str, share: float) -> tuple[str, str]:
    """Cuts a text in two at `1 - share` of its length, or at a line break (else a space) soon after that place."""
    middle = round(len(text) * (1 - share))
    soon = middle + round(0.1 * (len(text) - middle))
    cut = next((place for sign in "\n " if (place := text.find(sign, middle, soon) + 1)), middle)
    return text[:cut], text[cut:]

def load_text(settings: Settings) -> dict[str, str]:
    """Split -> text. Splits that do not exist are cut off the end of train, a tenth of the whole each."""
    tokenizer = functools.cache(lambda: None if settings.model == "demo" else load_tokenizer(
        settings.model, settings.trust_remote_code))
    if settings.train_file:
        text = read_files(settings, tokenizer)
    elif settings.dataset == "python-docs":
        text = {"train": python_docs()}
    else:
        text = read_dataset(settings.dataset, tokenizer)
    missing = [split for split in SPLITS if split not in text]
    for number, split in enumerate(reversed(missing)):
        text["train"], text[split] = cut_tail(text["train"], 0.1 / (1 - 0.1 * number))
    for split in SPLITS:
        if (size := len(text[split].encode())) < settings.block_length:  # no token is shorter than a byte
            raise UserError(f"the {split} text has {size} bytes, but one block of {settings.block_length} tokens is "
                            "needed: take a longer text or a smaller --block-length.")
    return {split: text[split] for split in SPLITS}

if __name__ == "__main__":
    with run.step("text"):
        text = load_text(settings)
    settings = with_prompt(settings, text["validation"])
    print(f"{settings.train_file or settings.dataset}: {', '.join(f'{name} {len(text[name]):,}' for name in SPLITS)} "
          "characters")
    print(in_lines(text["validation"][:300]))

# %% [markdown]
# <a name="5.-Model"></a>
# ## 5. Model
#
# Any causal language model: a hub id, a local folder, or a `.gguf` file. It is trained to predict the next token, and
# judged by that: the loss is the mean negative log-likelihood of the tokens, perplexity its exponential (section 7).

# %%
def nll(logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each block of ids (n, time) but for its first token: (n,).

    `logits` are (n, time, vocabulary), or (n, time - 1, vocabulary) without those after the last token.
    """
    logits, wanted = logits[:, : batch.shape[1] - 1].flatten(0, 1).float(), batch[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits, wanted.flatten(), reduction="none")
    return losses.view_as(wanted).mean(1)

@torch.no_grad()
def perplexity(model, blocks: torch.Tensor) -> float:
    """exp(mean negative log-likelihood per token) of token ids (n, time)."""
    def per_block(batch):
        return nll(model(batch, use_cache=False).logits, batch)

    return over_blocks(model, blocks, per_block, "perplexity").cpu().double().mean().exp().item()

def divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean Kullback-Leibler divergence per token, (batch,), from wanted ones; both are logits (batch, time, n)."""
    given, wanted = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)  # (XLA does not vouch for kl_div)
    return (wanted.exp() * (wanted - given)).sum(-1).mean(1)

# %% [markdown] id="loop" jp-MarkdownHeadingCollapsed=true
# ### The training loop
#
# This is the only training loop in this notebook: AdamW, a short warmup, then a cosine decay. A step is `batch_size`
# blocks, however many fit at once. After every tenth of the steps the model is measured on validation text. The best
# weights are kept, and training stops early after three measurements in a row without improvement. You need the loop in
# section 14; it is here because it also trains the demo model. [Go on with the model](#The-model).

# %%
WARMUP, WEIGHT_DECAY, PATIENCE, MEASUREMENTS = 0.1, 0.01, 3, 10

def rate_at(step: int, steps: int) -> float:
    """The learning rate of a step as a share of its peak."""
    warm = max(1, round(WARMUP * steps))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))

def loss_of(model, batch: torch.Tensor, teacher, share: float) -> torch.Tensor:
    """The loss of each block of ids (n, time): (n,); a share of it asks for the teacher's predictions."""
    logits = model(batch, use_cache=False).logits
    if teacher is None or not share:
        return nll(logits, batch)
    with torch.no_grad():
        wanted = teacher.eval()(batch, use_cache=False).logits
    return (1 - share) * nll(logits, batch) + share * divergence(logits[:, :-1], wanted[:, :-1])

def train(run: Run, name: str, model, blocks: dict[str, torch.Tensor], settings: Settings, teacher=None) -> dict:
    """Trains a model in place for settings.max_steps on blocks (n, time); it ends with the weights of its best moment.

    What is random in a step follows from the step's number, and every measurement is kept: so a training that was
    interrupted goes on to the same weights, bit for bit. Returns its record. Raises RunError for a loss of no number.
    """
    text, seen, steps = blocks["train"], blocks["validation"][:16], settings.max_steps
    accelerator, optimizer = accelerated(model, settings)
    file = f"training-{name}-{fingerprint(model, text, seen, training_options(settings))}"
    kept = run.kept(file) or {"done": {"step": 0, "seconds": 0.0, "history": {"loss": [], "perplexity": []}}}
    put_training(kept, model, accelerator, optimizer)
    done = kept["done"]
    order = draw(len(text), settings.batch_size, steps, torch.Generator().manual_seed(settings.seed))
    loss, start, history, live = 0.0, time.perf_counter() - done["seconds"], done["history"], None
    for step in long_loop(range(done["step"], steps), name, model.device):
        if measurements_since_the_best(history) >= PATIENCE:
            continue  # training is over; the bar of a loop that is left before its end stays, in red
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate_at(step, steps)
        each = functools.partial(loss_of, model, teacher=teacher, share=settings.distillation)
        loss += backward(accelerator, model, text[order[step]], each, settings.seed + step)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, steps // MEASUREMENTS) == 0 or step + 1 == steps:
            loss = loss.item() / (step + 1 - done["step"])
            history["loss"].append([step + 1, loss])
            history["perplexity"].append([step + 1, perplexity(model, seen) if math.isfinite(loss) else loss])
            if not math.isfinite(history["perplexity"][-1][1]):
                raise RunError(f"the loss is {loss} at step {step + 1} of {steps}: take a lower --learning-rate, or "
                               "--precision fp32")
            done |= {"step": step + 1, "seconds": time.perf_counter() - start}
            kept = training_to_keep(kept, model, accelerator, optimizer)
            run.keep(file, kept)
            live, loss = show_training(run, name, done, settings, live), 0.0
            model.train()
    show_training(run, name, done, settings, live, last=True)
    return end_training(kept, model, settings)

# %% [markdown]
# <a name="The-model"></a>
# ### The model
#
# The model reads tokens, not letters. They are packed into full blocks: no padding, so nothing is wasted
# and no loss is counted on padding. What is the model, how large is it, what does it write, how well does it predict?

# %%
def pack(text: str, tokenizer, block_length: int) -> torch.Tensor:
    """Token ids (blocks, block_length): the whole text, in order, but for a tail shorter than one block."""
    size = 2_000_000  # characters at once: a tokenizer needs some 250 bytes for every token that it makes
    pieces = [text[start: start + size] for start in range(0, len(text), size)]
    ids = torch.cat([torch.tensor(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"],
                                  dtype=torch.long) for piece in pieces or [text]])
    return ids[: len(ids) // block_length * block_length].view(-1, block_length)

# %%
if __name__ == "__main__":
    with run.step("load model"):
        settings, tokenizer, model = open_model(run, settings, text["train"])
        blocks = pack_all(text, tokenizer, model, settings)
    try_float16(run, model, blocks["validation"][:1])
    test_blocks = blocks["test"][: settings.eval_blocks or None]
    run.metrics["blocks"] = {split: len(blocks[split]) for split in SPLITS} | {"tested": len(test_blocks)}
    run.metrics["model"] = describe_model(model, settings)
    print(f"{settings.model}: weights came in {run.metrics['model']['came_in']}, and will be saved in "
          f"{run.metrics['model']['saved_in']}")
    print(f"blocks of {settings.block_length} tokens: "
          f"{', '.join(f'{name} {number:,}' for name, number in run.metrics['blocks'].items())}")
    print(f"{type(model).__name__}: perplexity {perplexity(model, blocks['validation'][:4]):.2f} on validation text\n"
          + in_lines(sample(model, tokenizer, settings.prompt)))

# %% [markdown]
# <a name="6.-Heads-and-gates"></a>
# ## 6. Heads and gates
#
# In every layer, each head reads the text in its own way and writes a vector of `head_dim` numbers per
# token. The vectors of all heads stand side by side, and one matrix, the layer's **output projection**,
# mixes them back into the model. So a head is a slice of that matrix's *input*, and to remove a head is
# to multiply its slice by zero:
#
# $$\text{attention}(x) = W_O\,[\,g_1 h_1(x),\; g_2 h_2(x),\; \dots\,] + b,\qquad g_i \in \{0, 1\}.$$
#
# The numbers $g_i$ are the **gates**. The same holds for the **neurons** of the MLP: they stand side by
# side in the input of *its* output projection, each one number wide. So heads and neurons are two kinds of
# **units**, and everything below works on both. First, the heads have to be found.
# %%
def inputs_first(projection) -> torch.Tensor:
    """The weight of a Linear or Conv1D as (inputs, outputs): a view, whichever way it is stored."""
    return projection.weight if isinstance(projection, Conv1D) else projection.weight.T

@dataclasses.dataclass
class Units:
    """Where one layer keeps units that can be closed: slices of the input of a projection into the stream."""

    path: str  # of the projection, within the model
    block: torch.nn.Module  # the whole transformer layer
    module: torch.nn.Module  # the attention module, or the MLP
    projection: torch.nn.Module  # the output projection, a Linear or Conv1D
    number: int  # of units
    kind: str = "heads"  # or "neurons", each one number wide

    def __str__(self) -> str:
        return f"{self.path}: {self.number} {self.kind} of {self.size} numbers"

    @property
    def size(self) -> int:
        return self.output_weight.shape[1]

    @property
    def output_weight(self) -> torch.Tensor:
        """The projection's weight as (units, size, hidden), a view."""
        return inputs_first(self.projection).unflatten(0, (self.number, -1))

OUTPUTS = ("c_proj", "out_proj", "o_proj", "dense")  # names of attention output projections

def find_heads(model) -> list[Units]:
    """The layers of a causal language model that have heads, in order. Raises UserError where they cannot be found."""
    config, layers, modules = model.config.get_text_config(), [], dict(model.named_modules())
    heads = getattr(config, "num_attention_heads", 0)
    language = set((model.get_decoder() or model).modules())  # a model that reads images has heads elsewhere, too
    attentions = {path: module for path, module in modules.items()
                  if module in language and "Attention" in type(module).__name__}
    for path, projection in modules.items():
        parent, _, name = path.rpartition(".")
        block = re.match(r".*?\.\d+(?=\.)", path)
        is_output = block and name in OUTPUTS and isinstance(projection, (torch.nn.Linear, Conv1D))
        if heads and is_output and parent in attentions and inputs_first(projection).shape[0] % heads == 0:
            layers.append(Units(path, modules[block[0]], modules[parent], projection, heads))
    unknown = [path for path in attentions
               if not any(layer.path.startswith(f"{path}.") or path.startswith(layer.path.rpartition(".")[0])
                          for layer in layers)]
    if unknown or not layers:
        kind = f"there is no {type(attentions[unknown[0]]).__name__}" if unknown else "there is no attention"
        raise UserError(f"the heads of {type(model).__name__} cannot be found ({kind} in {(unknown or ['it'])[0]} "
                        f"with an output projection {', '.join(OUTPUTS)}): take a transformer such as GPT-2, "
                        "Llama or Qwen.")
    return layers
# %% cellView="form" jupyter={"source_hidden": true}
# @title Neurons are units too: one number wide, in the input of the MLP's output projection
def find_mlp_output(layer: Units):
    """The projection with which a layer's MLP writes into the stream, or None where there is not exactly one."""
    attention, names = set(layer.module.modules()), ("c_proj", "fc2", "fc_out", "down_proj", "dense_4h_to_h")
    found = [module for path, module in layer.block.named_modules() if path.rpartition(".")[2] in names
             and module not in attention and isinstance(module, (torch.nn.Linear, Conv1D))]
    return found[0] if len(found) == 1 else None

def find_neurons(model) -> list[Units]:
    """The MLPs of a model, layer by layer. Raises UserError where a layer has not exactly one."""
    layers, paths = [], {module: path for path, module in model.named_modules()}
    for layer in find_heads(model):
        output = find_mlp_output(layer)
        if output is None:
            raise UserError(f"the neurons of {type(model).__name__} cannot be found in {paths[layer.block]}, which has "
                            "no MLP, or several (a mixture of experts keeps its experts): take --prune heads.")
        parent = model.get_submodule(paths[output].rpartition(".")[0])
        layers.append(Units(paths[output], layer.block, parent, output, inputs_first(output).shape[0], "neurons"))
    if len({units.number for units in layers}) > 1:
        raise UserError(f"the layers of {type(model).__name__} have different numbers of neurons: take --prune heads.")
    return layers

def find_units(model, kind: str = "") -> list[tuple[Units, ...]]:
    """Layer by layer the units of a kind ("heads", "neurons", "both"), without one of the kind that is pruned here."""
    kinds = {"heads": (find_heads,), "neurons": (find_neurons,), "both": (find_heads, find_neurons)}
    return list(zip(*(find(model) for find in kinds[kind or getattr(model, "prunes", "heads")])))

def number_of_heads(model) -> int:
    """The number of heads in a row of the gates (layers, units), where they come before the neurons."""
    return sum(units.number for units in find_units(model)[0] if units.kind == "heads")

def heads_part(model, table: torch.Tensor) -> torch.Tensor:
    """The heads' columns of a table (layers, units); ones (layers, heads) where only neurons are pruned."""
    heads, layers = number_of_heads(model), find_heads(model)
    return table[:, :heads] if heads else torch.ones(len(layers), layers[0].number)

def all_units(model) -> list[Units]:
    """find_units() in one list."""
    return [units for layer in find_units(model) for units in layer]
# %%
if __name__ == "__main__":
    print(f"{len(find_heads(model))} layers, the first of them:", *find_heads(model)[:3], sep="\n")
# %% [markdown]
# One hook in front of the output projection is all it takes, for every architecture. It is exact (a
# closed head contributes nothing, whatever attention kernel runs) and reversible. Multiplying the
# attention *weights* that a layer returns, as some notebooks do, prunes nothing: the layer's output was
# computed before.
# %%
def apply_gates(projection, inputs):
    """Forward pre-hook of an output projection: scales every unit's slice of its input (batch, time, units x size).

    Gates are (units,), or (batch, 1, units) where every text has its own.
    """
    x, *rest = inputs
    gates = projection.gates.to(x.dtype)
    if x.dim() == 2 and gates.dim() == 3:  # (the MLP of OPT sees all tokens of a batch in one row)
        gates = gates.flatten(0, 1).repeat_interleave(len(x) // len(gates), dim=0)
    return (x * gates.repeat_interleave(x.shape[-1] // gates.shape[-1], dim=-1), *rest)

def add_gates(model) -> None:
    """Gives every unit an open gate: a buffer of the output projection, saved and moved with the model."""
    for units in all_units(model):
        if not hasattr(units.projection, "gates"):
            units.projection.register_buffer("gates", torch.ones(units.number, device=model.device))
            units.projection.gate_hook = units.projection.register_forward_pre_hook(apply_gates)

@torch.no_grad()
def set_gates(model, gates: torch.Tensor) -> None:
    """Sets the gates (layers, units) of a model: 1 is open, 0 is closed. Where both are pruned heads come first."""
    add_gates(model)
    for layer, row in zip(find_units(model), gates, strict=True):
        for units, values in zip(layer, row.split([units.number for units in layer])):
            units.projection.gates.copy_(values)

def get_gates(model) -> torch.Tensor:
    """The gates of a model, (layers, units), on the processor; open ones, where it has none yet."""
    add_gates(model)
    return torch.stack([torch.cat([units.projection.gates.detach().float().cpu() for units in layer])
                        for layer in find_units(model)])
# %% cellView="form" jupyter={"source_hidden": true}
# @title Temporary gates: all open, none at all, or others with gradients
def sharing_copy(model):
    """A copy of a gated model that shares its weights and has gates of its own."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})

def remove_gates(model):
    """The model, with all gates taken away: again as the library made it."""
    for units in all_units(model):
        if hasattr(units.projection, "gates"):
            units.projection.gate_hook.remove()
            del units.projection.gates, units.projection.gate_hook
    return model

def prune_only(model, kind: str) -> None:
    """Tells a model what is pruned in it: "heads", "neurons" or "both". Closed gates of the same kind stay closed.

    Raises UserError, before anything is changed, where the model has not what is to be pruned.
    """
    if find_units(model, kind) and getattr(model, "prunes", "heads") != kind:
        remove_gates(model)
    model.prunes = kind
    add_gates(model)

@contextlib.contextmanager
def all_open(model):
    """Within it all gates are open, and afterwards they are again as they were, also after an error."""
    before = get_gates(model)
    set_gates(model, torch.ones_like(before))
    try:
        yield
    finally:
        set_gates(model, before)

# %%
if __name__ == "__main__":
    prune_only(model, settings.prune)
    print(f"{get_gates(model).numel():,} gates, all of them open")

# %% [markdown]
# <a name="7.-Perplexity"></a>
# ## 7. Perplexity
#
# How good is the model? Perplexity is $\exp\big(\tfrac1N\sum_i -\log p(x_i \mid x_{<i})\big)$: the number
# of tokens that the model is, on average, undecided between. Lower is better. Try a gate: close one head, see
# the perplexity move on some validation text, and open it again. Change `layer` and `head` and run the cell
# again: not all heads matter alike.

# %%
def try_head(model, blocks: torch.Tensor, layer: int, head: int) -> str:
    """Perplexity of blocks (n, time) with one head open, closed, open again; the gates stay as they were before."""
    gates, values = torch.ones_like(get_gates(model)), []
    with all_open(model):
        for gate in (1, 0, 1):
            gates[layer, head] = gate
            set_gates(model, gates)
            values.append(f"{perplexity(model, blocks):.3f}")
    kind = "head" if head < number_of_heads(model) else "neuron"
    return f"layer {layer}, {kind} {head}: perplexity {values[0]}, closed {values[1]}, open again {values[2]}"

if __name__ == "__main__":
    print(try_head(model, blocks["validation"][:2], layer=0, head=0))

# %% [markdown]
# A closed gate costs as much as an open one: the numbers that it multiplies by zero are still
# computed. So the closed units are **cut** out in section 13: their rows of the projections before,
# their columns of the output projection. Whether that works for this model is not looked up in a list: it is
# tried now, before any long computation. Some units are closed at random, cut out of a copy that shares all
# other weights, and that copy is saved and opened again. It has to give the same logits as the gated model, read
# in one go and written token by token from a key/value cache, also where texts are padded. Where it does not, the
# model keeps its gates: it is pruned, not smaller.

# %% [markdown] id="cut" jp-MarkdownHeadingCollapsed=true
# ### The cut
#
# How units are cut out, how the result is saved and opened, and how both are tried.
# [Go on with the plan](#The-plan).

# %% cellView="form" jupyter={"source_hidden": true}
# @title Cutting (1): which rows of the query, key and value projections belong to a head
def find_rows(attention, heads: int, head_dim: int) -> list[tuple[str, torch.Tensor]]:
    """For query, key and value: the projection that computes it, and its outputs that each head owns, (n, size).

    Models keep these weights as three matrices, as one with queries, keys and values one after the other (GPT-2,
    Phi-3), or as one in which every group of heads has its queries, key and value together (GPT-NeoX, Falcon).
    Raises ValueError for an attention module that keeps them in another way.
    """
    parts = dict(attention.named_children())

    def outputs(name):
        return torch.arange(inputs_first(parts[name]).shape[1], device="cpu").view(-1, head_dim)

    if "q_proj" in parts:  # some have more than head_dim rows for a query: a gate of their own
        return [("q_proj", outputs("q_proj").view(heads, -1)), ("k_proj", outputs("k_proj")),
                ("v_proj", outputs("v_proj"))]
    fused = next((name for name in ("query_key_value", "c_attn", "qkv_proj", "Wqkv") if name in parts), None)
    if fused is None:
        raise ValueError(f"{type(attention).__name__} has the projections {', '.join(parts)}: none that is known here")
    rows = outputs(fused)
    shared = (len(rows) - heads) // 2  # key heads, and value heads
    if fused == "query_key_value":
        rows = rows.view(shared, -1, head_dim)  # each group: its queries, one key, one value
        return [(fused, rows[:, :-2].flatten(0, 1)), (fused, rows[:, -2]), (fused, rows[:, -1])]
    return [(fused, part) for part in rows.split([heads, shared, shared])]

def heads_that_stay(row: torch.Tensor, sharing: int, together: bool) -> list[int]:
    """The open heads of gates (heads,), at least one. Where a key and its `sharing` heads stand `together` in one
    matrix, closed heads, which write zeros, fill the groups up to equally many."""
    groups = (row != 0).float().view(-1, sharing)
    if not groups.any():
        groups[0, 0] = 1
    if together:
        readers = int(groups.sum(1).max())
        order = groups.argsort(dim=1, descending=True, stable=True)[:, :readers]
        groups = torch.zeros_like(groups).scatter(1, order, 1) * groups.any(1, keepdim=True)
    return groups.flatten().nonzero().flatten().tolist()

# %% cellView="form" jupyter={"source_hidden": true}
# @title Cutting (2): what a slice leaves to do at run time: an uneven number of readers, a norm over all heads
HOOKS = '''
class RepeatedKeys:
    """A KV cache that keeps few key/value heads, and hands out one for each query head that reads it."""

    def __init__(self, cache, key_of):
        self.cache, self.key_of = cache, key_of

    def update(self, keys, values, *position, **options):  # (batch, key/value heads, time, head_dim)
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *position, **options)
        return keys[:, self.key_of], values[:, self.key_of]


def repeat_keys(attention, args, kwargs):
    """Forward pre-hook of an attention module some of whose keys are read by more heads than others."""
    names = ("past_key_values", "layer_past", "cache")  # depends on family and version
    name = next((name for name in names if name in kwargs), names[0])
    return args, kwargs | {name: RepeatedKeys(kwargs.get(name), attention.key_of)}


def pick(norm, args, output):
    """Forward hook of a norm over all heads (OLMo 2), which needs them all: what stays of (batch, time, width)."""
    return output[..., norm.picked]


def add_hooks(module):
    """Gives a module of a cut model the hooks that its numbers ask for."""
    if hasattr(module, "key_of"):
        module.register_forward_pre_hook(repeat_keys, with_kwargs=True)
    if hasattr(module, "picked"):
        module.register_forward_hook(pick)
    if hasattr(module, "told"):  # Phi-3 asks the configuration, which all layers share
        module.config = copy.copy(module.config)
        module.config.num_attention_heads = module.told
'''  # as a text, because a saved model takes it along
AT_RUN_TIME = types.ModuleType("at_run_time")
sys.modules.update(at_run_time=AT_RUN_TIME)  # torch.compile looks for it there
exec(f"import copy\n{HOOKS}", vars(AT_RUN_TIME))

# %% cellView="form" jupyter={"source_hidden": true}
# @title Cutting (3): projections and heads
def slice_projection(projection, rows: torch.Tensor, inputs: bool = False) -> None:
    """Keeps only these outputs, or inputs, of a Linear or Conv1D; rows are (n,)."""
    is_conv = isinstance(projection, Conv1D)  # its weight is (inputs, outputs), that of a Linear (outputs, inputs)
    for name, weight in list(projection.named_parameters()):
        if name == "weight" or not inputs:
            dim = int(is_conv != inputs) if weight.dim() > 1 else 0
            part = weight.detach().index_select(dim, rows.to(weight.device))
            setattr(projection, name, torch.nn.Parameter(part, weight.requires_grad))
    for name, size in zip(("nx", "nf") if is_conv else ("out_features", "in_features"), projection.weight.shape):
        setattr(projection, name, size)

def cut_heads(layer: Units, row: torch.Tensor) -> tuple[list[int], dict | None]:
    """Cuts an attention module in place to the heads that gates (heads,) leave open; these, and what families call it.

    The words are those of configurations, or None where no configuration can say that some keys have more readers.
    """
    attention, size, parts = layer.module, layer.size, find_rows(layer.module, layer.number, layer.size)
    keys, sharing = len(parts[1][1]), layer.number // len(parts[1][1])
    kept = heads_that_stay(row, sharing, together=parts[0][0] == "query_key_value")
    shared = sorted({head // sharing for head in kept})
    readers = {sum(head // sharing == key for head in kept) for key in shared}
    rows = {}
    for (name, table), wanted in zip(parts, (kept, shared, shared)):
        norm = getattr(attention, name.replace("_proj", "_norm"), None) if name.endswith("_proj") else None
        weight = getattr(norm, "weight", torch.empty(0))
        if weight.dim() == 1 and weight.numel() == table.numel() > size:  # it needs all heads
            norm.picked = table[wanted].flatten().tolist()
            AT_RUN_TIME.add_hooks(norm)
        else:
            rows.setdefault(name, []).append(table[wanted].flatten())
    for path, parameter in list(attention.named_parameters()):  # a row for each head: GPT-OSS's sinks, Cohere's norms
        owner, _, name = path.rpartition(".")
        owner = attention.get_submodule(owner)
        of_norm = "norm" in path and parameter.dim() == 2 and parameter.shape[1] == size
        if ((owner is attention and parameter.dim() == 1) or of_norm) and parameter.shape[0] in (layer.number, keys):
            part = parameter.detach()[kept if parameter.shape[0] == layer.number else shared]
            setattr(owner, name, torch.nn.Parameter(part, parameter.requires_grad))
    for name, numbers in rows.items():
        slice_projection(getattr(attention, name), torch.cat(numbers).sort().values)
    slice_projection(layer.projection, torch.arange(layer.number * size).view(-1, size)[kept].flatten(), inputs=True)
    numbers = {"num_heads num_attention_heads n_heads n_head": len(kept), "kv_dim": len(shared) * size,
               "split_size embed_dim hidden_size": len(kept) * size,
               "num_key_value_heads num_kv_heads kv_heads": len(shared),
               "num_key_value_groups": 1 if len(readers) > 1 else max(readers)}
    vars(attention).update({name: number for names, number in numbers.items() for name in names.split()
                            if name in vars(attention)})
    if len(readers) > 1:
        attention.key_of = [shared.index(head // sharing) for head in kept]
    if "qkv_proj" in rows:
        attention.told = len(kept)
    AT_RUN_TIME.add_hooks(attention)
    words = {"num_attention_heads": len(kept), "num_key_value_heads": len(shared), "head_dim": size}
    return kept, None if len(readers) > 1 else words

# %% cellView="form" jupyter={"source_hidden": true}
# @title Cutting (4): neurons, the whole model, and whether its configuration has words for what is left
def cut_neurons(layer: Units, row: torch.Tensor) -> tuple[list[int], dict]:
    """Cuts an MLP in place to the neurons that gates (neurons,) leave open, at least one; these, and words for it."""
    rows = row.nonzero().flatten() if row.any() else torch.zeros(1, dtype=torch.long)
    for part in layer.module.children():  # one projection, or gate and up, or both of them in one
        if isinstance(part, (torch.nn.Linear, Conv1D)) and part is not layer.projection:
            times = inputs_first(part).shape[1] // layer.number
            slice_projection(part, torch.cat([rows + layer.number * i for i in range(times)]))
    slice_projection(layer.projection, rows, inputs=True)
    return rows.tolist(), dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim"), len(rows))

@torch.no_grad()
def cut(model, gates: torch.Tensor):
    """A model without gates, cut in place to the units that gates (layers, units) leave open.

    Gates that are neither 0 nor 1 are multiplied into the weights. `model.kept` says which units stay,
    `model.words` what each layer has left, in the words of configurations.
    """
    model.kept, model.words = torch.zeros_like(gates), []
    for layer, row, left in zip(find_units(model), gates, model.kept, strict=True):
        words, sizes = {}, [units.number for units in layer]
        for units, part, stay in zip(layer, row.split(sizes), left.split(sizes)):
            kept, named = (cut_heads if units.kind == "heads" else cut_neurons)(units, part)
            stay[kept] = 1
            words = None if words is None or named is None else words | named
            weight = inputs_first(units.projection)
            weight.mul_(part[kept].to(weight).repeat_interleave(len(weight) // len(kept))[:, None])
        model.words.append(words)
    return model

def without_weights(model):
    """A copy of a model without gates whose weights are only shapes: it takes no memory, and computes nothing."""
    return remove_gates(move(sharing_copy(model), "meta"))

def native_config(small):
    """A cut model's configuration in the words of its family alone, or None where they do not suffice.

    Its class is built from it, without weights, and must have the same shapes. What LlamaConfig refuses, MistralConfig
    can say: with its own head_dim and without a window it is the same model.
    """
    words, own, llama = small.words[0], type(small), transformers.LlamaForCausalLM
    wanted = {name: part.shape for name, part in small.named_parameters()}
    if words is None or any(layer != words for layer in small.words):
        return None
    for kind in [own] + [transformers.MistralForCausalLM] * (own is llama):
        config, other = copy.deepcopy(small.config), {"sliding_window": None, "model_type": "mistral"}
        text = config.get_text_config()
        try:
            for word, number in words.items():
                if word == "head_dim" or hasattr(text, word):
                    setattr(text, word, number)
            config = kind.config_class.from_dict(config.to_dict() | (other if kind is not own else {}))
            config.architectures = [kind.__name__]
            with torch.device("meta"):
                built = kind(copy.deepcopy(config))
        except Exception:  # numbers that nobody foresaw fail in every way: then this class cannot say them
            continue
        if {name: part.shape for name, part in built.named_parameters()} == wanted:
            return config
    return None

# %% cellView="form" jupyter={"source_hidden": true}
# @title modeling_pruned.py, but for the hooks above
CODE = '''"""$model with some of its heads or neurons removed: `pruned` in config.json says what is left.

Written by PruningAndFineTuningColab. Needs torch and transformers, nothing else.
"""

import copy

import torch
import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping


class PrunedConfig(transformers.$config):
    """The family's, but for its name in config.json: so whoever allows no code is told that it is needed."""

    _auto_class = "AutoConfig"  # so that save_pretrained takes this file along

    @classmethod
    def get_config_dict(cls, *place, **options):
        words, rest = super().get_config_dict(*place, **options)
        return words | {"model_type": "$kind"}, rest

    def to_diff_dict(self):
        return super().to_diff_dict() | {"model_type": "pruned_$kind"}


class Pruned:
    """Builds the full model, and gives it the shapes that are left before the weights are loaded."""

    def __init__(self, config):
        super().__init__(config)
        base = "" if hasattr(self, self.base_model_prefix) else f"{self.base_model_prefix}."  # (AutoModel is the base)
        for path, shape in config.pruned["shapes"].items():
            owner, _, name = path.removeprefix(base).rpartition(".")
            owner = self.get_submodule(owner)
            setattr(owner, name, torch.nn.Parameter(getattr(owner, name).new_empty(shape)))
        for path, numbers in config.pruned["numbers"].items():
            module = self.get_submodule(path.removeprefix(base))
            vars(module).update(numbers)
            add_hooks(module)


for auto, name in $classes.items():
    words = {"_auto_class": auto, "config_class": PrunedConfig, "__module__": __name__}
    globals()[f"Pruned{name}"] = type(f"Pruned{name}", (Pruned, getattr(transformers, name)), words)
    # Some weights have another name in files than in models: the same ones as in the class that it derives from.
    if renamed := get_checkpoint_conversion_mapping(name) or get_checkpoint_conversion_mapping("$kind"):
        register_checkpoint_conversion_mapping(f"Pruned{name}", renamed, overwrite=True)

'''

# %% cellView="form" jupyter={"source_hidden": true}
# @title Saving and opening the compact form, with code or natively
def differences(small) -> dict:
    """Shapes of parameters and numbers of modules in which a cut model differs from what its class builds."""
    with torch.device("meta"):
        whole = type(small)(copy.deepcopy(small.config))
    shapes = {name: list(p.shape) for name, p in small.named_parameters() if p.shape != whole.get_parameter(name).shape}
    numbers = {}
    for path, module in small.named_modules():
        other = vars(whole.get_submodule(path))
        if changed := {key: value for key, value in vars(module).items()
                       if type(value) in (int, list) and value != other.get(key) and path}:
            numbers[path] = changed
    return {"shapes": shapes, "numbers": numbers}

def save_config(small, folder: Path, dtype: torch.dtype) -> None:
    """config.json of a compact model: in its family's words where they suffice, else with modeling_pruned.py."""
    config, name = native_config(small), type(small).__name__
    if config is None:
        config = copy.deepcopy(small.config)
        classes = {"AutoModelForCausalLM": name, "AutoModel": type(small.base_model).__name__,
                   "AutoModelForSequenceClassification": re.sub("(ForCausalLM|LMHeadModel)$", "", name)
                   + "ForSequenceClassification"}
        classes = {auto: name for auto, name in classes.items() if hasattr(transformers, name)}
        config.pruned, config.architectures = differences(small), [f"Pruned{name}"]
        config.auto_map = {auto: f"modeling_pruned.Pruned{name}" for auto, name in classes.items()}
        config.auto_map["AutoConfig"] = "modeling_pruned.PrunedConfig"
        code = string.Template(CODE).substitute(
            model=name, kind=config.model_type, config=type(config).__name__, classes=classes)
        (folder / "modeling_pruned.py").write_text(code + HOOKS.lstrip(), encoding="utf-8")
    config.dtype = dtype
    config.save_pretrained(folder)
    if hasattr(config, "pruned"):
        words = json.loads((folder / "config.json").read_text()) | {"model_type": f"pruned_{config.model_type}"}
        (folder / "config.json").write_text(json.dumps(words, indent=2))

def save_compact(small, tokenizer, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Saves a compact model for from_pretrained: natively where that is possible, else with modeling_pruned.py."""
    move(copy.deepcopy(small), "cpu").to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_config(small, folder, dtype)

# %% cellView="form" jupyter={"source_hidden": true}
# @title The proof that it works for this model
def reopen(folder: Path, model=None, dtype: torch.dtype = torch.float32):
    """The model of a saved folder, as a stranger opens it; or its class with the weights of `model`."""
    try:
        os.makedirs(dynamic_module_utils.HF_MODULES_CACHE, exist_ok=True)
    except OSError:  # a home that cannot be written to
        dynamic_module_utils.HF_MODULES_CACHE = tempfile.mkdtemp()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)  # its code is ours, or was trusted before
    with torch.device("meta"):
        opener = type(opener_for(config).from_config(config, trust_remote_code=True))
    if model is None:
        return opener.from_pretrained(folder, dtype=dtype)
    return opener.from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=model.dtype)

def tolerated(model) -> float:
    """The largest difference of logits, relative to the largest one, that rounding explains."""
    return 1e-3 if model.dtype == torch.float32 else 8 * torch.finfo(model.dtype).eps

@torch.no_grad()
def largest_difference(model, other, blocks: torch.Tensor) -> float:
    """The largest difference between two models' float32 logits on blocks (n, time), relative to the largest logit."""
    logits, others = (m.eval()(blocks.to(m.device), use_cache=False).logits.float() for m in (model, other))
    return ((logits - others).abs().max() / logits.abs().max()).item()

@torch.no_grad()
def written_logits(model) -> torch.Tensor:
    """Logits (steps, 2, vocabulary) of three tokens that a model writes after two short texts, one of them padded."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.arange(3, 19, device=model.device).view(2, 8) % vocabulary
    mask = torch.ones_like(ids).index_put((torch.tensor([0, 0]), torch.tensor([0, 1])), ids.new_tensor(0))
    output = greedy(model, ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3)
    return torch.stack(output.logits).float()

# %% cellView="form" jupyter={"source_hidden": true}
# @title What comes into a layer, what goes out, and what it is called with
def maps_in(output, heads: int) -> torch.Tensor | None:
    """Attention weights (batch, heads, time, time) among what an attention module returns, or None."""
    others = output[1:] if isinstance(output, (tuple, list)) else []
    return next((part for part in others if isinstance(part, torch.Tensor) and part.dim() == 4
                 and part.shape[1] == heads and part.shape[2] == part.shape[3] == first_of(output).shape[1]), None)

def watch_layer(layer: Units, seen: dict):
    """Hooks that note in `seen`, and yield their handles:

    "in" and "out", the stream before and after the layer; "heads" and "neurons", the output projections' inputs before
    the gates; "attention" and "mlp", what they add to the stream, all (batch, time, width); "maps" (batch, heads, time,
    time) where they are built.
    """
    def keep(name, module, args, output):
        seen[name] = first_of(output).clone()  # Falcon goes on adding to it

    def enter(block, args, kwargs):
        seen["in"] = args[0] if args else kwargs["hidden_states"]

    yield layer.block.register_forward_pre_hook(enter, with_kwargs=True)
    yield layer.projection.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0]), prepend=True)
    yield layer.projection.register_forward_hook(functools.partial(keep, "attention"))
    yield layer.module.register_forward_hook(lambda _, args, output: seen.update(maps=maps_in(output, layer.number)))
    if find_mlp_output(layer) is not None:
        output = find_mlp_output(layer)
        yield output.register_forward_pre_hook(lambda _, args: seen.update(neurons=args[0]), prepend=True)
        yield output.register_forward_hook(functools.partial(keep, "mlp"))
    yield layer.block.register_forward_hook(functools.partial(keep, "out"))

def stack_of(model) -> torch.nn.ModuleList:
    """All layers of a model, also those without heads."""
    return model.get_submodule(re.match(r"(.*?)\.\d+\.", find_heads(model)[0].path)[1])

class FarEnough(Exception):
    """Ends a forward pass of which only the beginning is needed."""

@torch.no_grad()
def layer_calls(model, batches) -> tuple[list, list]:
    """The first layer's inputs, (batch, time, hidden) for each batch of ids, and what else every layer is called with.

    The batches are equally large, so that what the layers get besides is the same for all of them.
    """
    inputs, calls, stack = [], [], stack_of(model)

    def note(block, args, kwargs):
        if block is stack[0]:
            inputs.append((args[0] if args else kwargs["hidden_states"]).cpu())
            if len(inputs) > 1:
                raise FarEnough
        calls.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))

    with hooks(block.register_forward_pre_hook(note, with_kwargs=True) for block in stack), number_format(model.device):
        for batch in batches:
            with contextlib.suppress(FarEnough):
                model.eval().base_model(batch.to(model.device), use_cache=False)
    return inputs, calls

# %% cellView="form" jupyter={"source_hidden": true}
# @title A layer, run by itself, and whether all of them can be refitted
@torch.no_grad()
def run_layer(block, call: tuple, stream: torch.Tensor) -> torch.Tensor:
    """What comes out of a layer, called as layer_calls() has seen it, for a stream (batch, time, hidden)."""
    device = next(block.parameters()).device
    with number_format(device):
        return first_of(block(stream.to(device), *call[0], **call[1]))

def seen_in(layer: Units, call: tuple, stream: torch.Tensor, wanted=("out",)) -> dict[str, torch.Tensor]:
    """What watch_layer() notes while a layer runs on a stream (batch, time, hidden), until it has what is wanted."""
    seen, outputs = {}, [output for output in (layer.projection, find_mlp_output(layer)) if output is not None]

    def look(*_):
        if seen.keys() >= set(wanted):
            raise FarEnough

    watched = [*watch_layer(layer, seen), *(output.register_forward_pre_hook(look) for output in outputs)]
    with hooks(watched), contextlib.suppress(FarEnough):
        run_layer(layer.block, call, stream)
    if "out" in seen:  # (OPT's MLP has a batch in one row)
        seen["mlp"] = seen.get("mlp", torch.zeros_like(seen["out"])).view_as(seen["out"])
    return seen

@torch.no_grad()
def why_not_repair(model) -> str:
    """Why a model's layers cannot be refitted one by one (section 11), or "": it is tried on two short texts."""
    texts = torch.arange(16, device=model.device).view(2, 1, 8) % model.get_input_embeddings().num_embeddings
    units, ends = {layer.block: layer for layer in find_heads(model)}, []
    try:
        inputs, calls = layer_calls(model, texts)
        if len(inputs) != len(texts) or len(calls) != len(stack_of(model)):
            return "its layers do not run once for every text"
        stream = inputs[1]
        for block, call in zip(stack_of(model), calls):
            if block in units and seen_in(units[block], call, stream)["attention"].shape != stream.shape:
                return f"{units[block].path} does not write into one stream"
            stream = run_layer(block, call, stream)
        last = stack_of(model)[-1].register_forward_hook(lambda *args: ends.append(first_of(args[-1])))
        with hooks([last]), number_format(model.device):
            model.base_model(texts[1], use_cache=False)
    except Exception as error:  # code that is not made for it breaks in many ways; the sentence says how
        return f"its layers cannot be run one by one ({first_sentence(error)})"
    fits = len(ends) == 1 and torch.dist(ends[0], stream) < 1e-3 * stream.norm()
    return "" if fits else "its layers, run one by one, compute something else"

# %% cellView="form" jupyter={"source_hidden": true}
# @title The proof, once for each model
def try_compact(model, gates: torch.Tensor) -> str:
    """What goes wrong where units that gates (layers, units) close are cut out, saved and opened again; "" for nothing.

    Only the configuration is really saved: the copies share all weights but those that are cut.
    """
    gated, step = sharing_copy(model), "cut"
    set_gates(gated, gates)
    ids = (torch.arange(24).view(2, 12) * 7) % model.get_input_embeddings().num_embeddings
    wanted, deterministic = written_logits(gated), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # what opening leaves unfilled is NaN then, and shows
    try:
        small = cut(remove_gates(sharing_copy(gated)), gates)
        with tempfile.TemporaryDirectory() as folder:
            save_config(small, Path(folder), torch.float32)
            for step, tried in (("cut", small), ("opened again", reopen(Path(folder), small))):
                difference = max(largest_difference(gated, tried, ids),
                                 ((written_logits(tried) - wanted).abs().max() / wanted.abs().max()).item())
                if not difference < tolerated(model):
                    return f"{step}, its logits differ by {difference:.0e} of the largest"
    except Exception as error:  # code that was written for whole layers breaks in many ways; the sentence says how
        return f"{step}, it fails: {first_sentence(error)}"
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return ""

def why_not_compact(model) -> str:
    """Why units of a gated model cannot be cut out, or "" where they can; tried once, and then known."""
    prunes = getattr(model, "prunes", "heads")
    if getattr(model, "tried", "") != prunes:
        gates = torch.rand(get_gates(model).shape, generator=torch.Generator().manual_seed(0)).gt(0.5).float()
        gates[:, 0], gates[:, 1:2] = 1, 0
        gates[0, : len(gates[0]) if len(gates) > 1 else 0] = 1  # it loses less than others, so code has to travel
        gates[0, number_of_heads(model) - 1] = 0.5
        model.tried, model.not_compact = prunes, "its class brings its own code"
        if type(model).__module__.startswith("transformers.models."):
            model.not_compact = try_compact(that_writes(model), gates)
    return model.not_compact

def can_compact(model) -> bool:
    return not why_not_compact(model)

# %% cellView="form" jupyter={"source_hidden": true}
# @title What a unit costs, and which units hang together
def own_weights(units: Units) -> list[torch.Tensor]:
    """What computes a layer's units: [query, key, value] weights, each (heads, size, hidden), shared key/value heads
    repeated; or the weights of an MLP's first projections, each (neurons, 1, hidden).
    """
    if units.kind == "heads":
        return [inputs_first(getattr(units.module, name)).T[rows].repeat_interleave(units.number // len(rows), dim=0)
                for name, rows in find_rows(units.module, units.number, units.size)]
    weights = [inputs_first(part).T for part in units.module.children() if isinstance(part, (torch.nn.Linear, Conv1D))
               and part is not units.projection]
    return [part[:, None] for weight in weights for part in weight.split(units.number) if len(part) == units.number]

def unit_costs(model) -> torch.Tensor:
    """Parameters (layers, units) that go with each unit: a head's with its share of shared keys and values."""
    def cost(units):
        parts = [part for part in units.module.children() if isinstance(part, (torch.nn.Linear, Conv1D))]
        return sum(part.weight.numel() for part in parts) / units.number

    return torch.stack([torch.cat([torch.full((units.number,), cost(units)) for units in layer])
                        for layer in find_units(model)])

def relative_costs(model) -> torch.Tensor:
    """Costs (layers, units) as shares of the largest: importance is divided by them, so that kinds can be compared."""
    costs = unit_costs(model)
    return costs / costs.max()

class Layout(NamedTuple):
    """What a row of gates means: so many heads, of which `readers` read the same key and are treated alike, then
    neurons, which go in chunks; and what a head and a neuron cost."""

    heads: int
    readers: int = 1
    chunk: int = 1
    head_cost: float = 1.0
    neuron_cost: float = 1.0

def layout_of(model, settings: Settings) -> Layout:
    """Heads are single, or in groups where the settings want these even; in wide layers 64 neurons suit kernels."""
    layer, costs, heads = find_heads(model)[0], unit_costs(model)[0], number_of_heads(model)
    even, keys = {"auto": "gguf" in settings.save_model.split(), "no": False}.get(settings.uniform, True), layer.number
    if even and can_compact(model):  # else nobody can say which heads read the same key
        keys = len(find_rows(layer.module, layer.number, layer.size)[1][1])
    chunk = 64 if len(costs) - heads >= 1024 else 1
    return Layout(heads, layer.number // keys, chunk, costs[0].item(), costs[-1].item())

def weakest_first(scores: list[float], layout: Layout) -> tuple[list[list[int]], list[list[int]]]:
    """A layer's groups of heads and chunks of neurons, the weakest first, each with its weakest unit first."""
    groups = [sorted(range(first, first + layout.readers), key=scores.__getitem__)
              for first in range(0, layout.heads, layout.readers)]
    neurons = sorted(range(layout.heads, len(scores)), key=scores.__getitem__)
    rest = len(neurons) % layout.chunk  # goes first, so that multiples of a chunk are left
    chunks = [neurons[i:i + layout.chunk] for i in range(rest, len(neurons), layout.chunk)]
    return (sorted(groups, key=lambda group: sum(scores[head] for head in group)),
            [neurons[:rest]] * bool(rest) + chunks)

# %% cellView="form" jupyter={"source_hidden": true}
# @title The same in every layer (uniform)
def close_alike(importance: torch.Tensor, level: float, layout: Layout) -> torch.Tensor:
    """Gates (layers, units): in every layer as many groups of heads and chunks of neurons are 0, `level` of all cost.

    Where both are pruned neurons make up for what whole groups of heads leave.
    """
    gates, neurons = torch.ones_like(importance), importance.shape[1] - layout.heads
    budget = level * (layout.heads * layout.head_cost + neurons * layout.neuron_cost)
    for row, scores in zip(gates, importance.tolist()):
        groups, chunks = weakest_first(scores, layout)
        closed = groups[:int(level * len(groups)) if chunks else round(level * len(groups))]
        left = (budget - len(closed) * layout.readers * layout.head_cost) / layout.neuron_cost
        for part in chunks[:-1]:
            if len(part) / 2 <= left:
                closed, left = [*closed, part], left - len(part)
        row[[unit for part in closed for unit in part]] = 0
    return gates

def check_uniform(model, settings: Settings) -> None:
    """Raises UserError, which names levels that do, where a level does not leave an ordinary smaller checkpoint."""
    layout, scores = layout_of(model, settings), torch.zeros(get_gates(model).shape)
    groups, chunks = weakest_first(scores[0].tolist(), layout)

    def fits(level):
        gates = close_alike(scores, level, layout)
        enough = not groups or gates[0, : layout.heads].sum() >= settings.min_heads
        return enough and not (level and gates.all()) and native_config(cut(without_weights(model), gates))

    if not can_compact(model):
        raise UserError(f"uniform is on, but nothing can be cut out, because {why_not_compact(model)}: leave it off.")
    if not fits(settings.pruning_level):
        number = len(groups or chunks)
        levels = [f"{n / number:.3g}" for n in range(1, number, max(1, number // 12)) if fits(n / number)]
        raise UserError(f"pruning_level is {settings.pruning_level:g} with uniform, but every layer of this "
                        f"{type(model).__name__} has {number} parts that go together, and its configuration has words "
                        f"for some numbers only: {'take ' + ', '.join(levels) if levels else 'leave uniform off'}.")

# %% cellView="form" jupyter={"source_hidden": true}
# @title llama.cpp: which models and tokenizers it can run is known before the run, too
LLAMA_CPP = ("LlamaForCausalLM", "MistralForCausalLM", "MinistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
             "Phi3ForCausalLM", "SeedOssForCausalLM")  # each is proved in tests/test_gguf.py
LETTERS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
BYTES = {"type": "ByteLevel", "add_prefix_space": False}
PRE_TOKENIZERS = {  # llama.cpp's name -> how a text is cut before its bytes are merged
    "gpt-2": [BYTES | {"use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}],
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": LETTERS % "{1,3}"}}, BYTES | {"use_regex": False}],
    "qwen2": [{"type": "Split", "pattern": {"Regex": LETTERS % ""}}, BYTES | {"use_regex": False}],
}

def why_not_gguf(model) -> str:
    """Why a gated model, cut, cannot be written for llama.cpp; "" where it can."""
    if not can_compact(model):
        return f"nothing can be cut out, because {why_not_compact(model)}"
    if type(model).__name__ not in LLAMA_CPP:
        return f"it has layers that differ only for {', '.join(name.removesuffix('ForCausalLM') for name in LLAMA_CPP)}"
    rope, tied = model.config.rope_parameters, model.config.tie_word_embeddings
    if model.config.hidden_act != "silu":
        return f"it has no activation {model.config.hidden_act!r} there"
    if (kind := rope.get("rope_type", "default")) not in ("default", "linear", "llama3"):
        return f"it has no positions of the type {kind!r}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "only a part of each head is rotated by position"
    if "Qwen3" in type(model).__name__ and not tied:
        return "queries and keys are normalised, and there is an output matrix"
    return ""

def pre_tokenizer_name(tokenizer) -> str:
    """What llama.cpp calls the way in which a tokenizer cuts texts. Raises UserError where that has no name here."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = (parts["pre_tokenizer"] or {}).get("pretokenizers", [parts["pre_tokenizer"] or {}])
    for name, wanted in PRE_TOKENIZERS.items():
        if parts["model"]["type"] == "BPE" and parts["model"]["merges"] and len(steps) == len(wanted) and all(
                want.items() <= step.items() for want, step in zip(wanted, steps)):
            return name
    raise UserError("save_model asks for gguf, but llama.cpp's name for the tokenizer is unknown here, or it has "
                    f"no merges (known: {', '.join(PRE_TOKENIZERS)}): take --save-model compact, or a .gguf of the "
                    "same model as --model, whose tokenizer is copied.")

def check_gguf(model, tokenizer, settings: Settings) -> None:
    """Raises UserError, before the run, where a .gguf is wanted and model or tokenizer have no place in llama.cpp."""
    if "gguf" not in settings.save_model.split():
        return
    if reason := why_not_gguf(model):
        raise UserError(f"save_model asks for gguf, but llama.cpp cannot run a pruned {type(model).__name__} "
                        f"({reason}): take --save-model compact.")
    if not settings.model.endswith(".gguf"):
        pre_tokenizer_name(tokenizer)
    print("llama.cpp can run it")

# %% cellView="form" jupyter={"source_hidden": true}
# @title What the settings will close, checked before any long computation
def check_reach(model, settings: Settings) -> None:
    """Raises UserError where so much cannot be closed, because every layer keeps some heads and some neurons."""
    layout, costs = layout_of(model, settings), unit_costs(model)
    neurons = len(costs[0]) - layout.heads
    spare = len(costs) * (max(layout.heads - settings.min_heads, 0) * layout.head_cost
                          + max(neurons - layout.chunk, 0) * layout.neuron_cost)
    unit = layout.head_cost if layout.heads else layout.neuron_cost
    if settings.pruning_level * costs.sum().item() > spare + unit / 2:
        raise UserError(f"pruning_level is {settings.pruning_level:g} with min_heads {settings.min_heads}, but at most "
                        f"{spare / costs.sum().item():.2f} can be closed so: lower one of the two.")

def plan_closing(model, settings: Settings) -> str:
    """What the settings will close, in words; the model is told. Raises UserError where they cannot."""
    prune_only(model, settings.prune)
    with saying_cannot_be_used(f"a text written by {type(model).__name__}", "take another model"):
        written_logits(model)
    layers, heads = len(find_units(model)), number_of_heads(model)
    neurons, level = sum(units.number for units in find_units(model)[0]) - heads, settings.pruning_level
    for other in {level, *strategies_and_levels(settings.sweep)[1]}:
        check_reach(model, dataclasses.replace(settings, pruning_level=other))
    if settings.uniform == "yes":
        check_uniform(model, settings)
    if settings.repair and (reason := why_not_repair(model)):
        raise UserError(f"{type(model).__name__} cannot be repaired, because {reason}: take --no-repair.")
    numbers = {"heads": layers * heads, "neurons": layers * neurons}
    kinds = " and ".join(f"{number} {kind}" for kind, number in numbers.items() if number)
    how = ", in every layer alike" if settings.uniform == "yes" else ""
    whole = f"nothing can be cut out, because {why_not_compact(model)}: the model keeps its gates, and its size"
    return (f"{kinds}, {level:.0%} of {'whose parameters' if neurons else 'which'} will be closed{how}\n"
            + ("tried: what is closed can be cut out" if can_compact(model) else whole))

# %% [markdown]
# <a name="The-plan"></a>
# ### The plan
#
# What the settings will close, and whether it can be cut out and repaired.

# %%
if __name__ == "__main__":
    with run.step("plan"):
        print(plan_closing(model, settings))
        check_gguf(model, tokenizer, settings)

# %% [markdown]
# Now the whole test text. Perplexity says how well the model predicts. It can improve while abilities are lost, so
# more is recorded at every stage: **bits per byte**, which can be compared between tokenizers; how many **last words**
# of sentences are predicted exactly (as in [LAMBADA](https://arxiv.org/abs/1606.06031)); how much of what it
# writes is **repeated**; and a sample of its writing.

# %% cellView="form" jupyter={"source_hidden": true}
# @title What it can still do: bits per byte, last words, repetition
def last_words(tokenizer, blocks: torch.Tensor, number: int = 200, longest: int = 64) -> tuple[torch.Tensor, ...]:
    """Ends of sentences in the second halves of blocks (n, time): ids (passages, tokens), and a mask of the last word.

    At most `number`, evenly spaced; the words have two letters or more, nothing else, and a space before them.
    """
    texts = tokenizer.batch_decode(blocks, clean_up_tokenization_spaces=False)
    found = [(text, match) for text in texts for match in re.finditer(r"\s([^\W\d_]{2,})(?= ?[.!?]\s)", text)
             if match.start() > len(text) / 2]
    length, passages = min(longest, blocks.shape[1] // 4), []
    for text, match in found[:: math.ceil(len(found) / number) or 1]:
        before, whole = (tokenizer(text[:end], add_special_tokens=False)["input_ids"]
                         for end in (match.start(), match.end()))
        if whole[:len(before)] == before and len(whole) >= length > len(whole) - len(before):
            passages.append((whole[-length:], [place >= len(before) for place in range(len(whole))][-length:]))
    ids, is_word = zip(*passages) if passages else ([], [])
    return tuple(torch.tensor(part, dtype=kind).view(-1, length) for part, kind in ((ids, int), (is_word, bool)))

@torch.no_grad()
def last_word_accuracy(model, passages: tuple[torch.Tensor, ...]) -> float | None:
    """Share of last_words(), ids and masks (passages, tokens), all of whose tokens are the most likely ones."""
    def per_text(ids, is_word):
        right = model(ids, use_cache=False).logits[:, :-1].argmax(-1) == ids[:, 1:]
        return (right | ~is_word[:, 1:]).all(1).float()

    return over_blocks(model, passages, per_text, "last words").mean().item() if len(passages[0]) else None

@torch.no_grad()
def repetition(model, blocks: torch.Tensor, texts: int = 20, read: int = 32, written: int = 64) -> float | None:
    """Share of repeated 4-grams of tokens in what a model writes after the beginnings of blocks (n, time).

    Greedy, never ended early; None where blocks are too short.
    """
    read = min(read, blocks.shape[1] // 2)
    new, model = min(written, blocks.shape[1] - read), that_writes(model)

    def per_text(ids):
        said = greedy(model, ids, max_new_tokens=new, min_new_tokens=new).sequences[:, -new:]
        return torch.tensor([1 - len(text.unique(dim=0)) / len(text) for text in said.cpu().unfold(1, 4, 1)])

    beginnings = evenly_spaced(blocks, texts)[:, :read]
    return over_blocks(model, beginnings, per_text, "repetition").mean().item() if new >= 8 else None

def abilities(model, tokenizer, blocks: torch.Tensor) -> dict:
    """Perplexity of a model on blocks (n, time), bits per byte, last_word_accuracy() and repetition()."""
    value = perplexity(model, blocks)
    texts = tokenizer.batch_decode(blocks[:, 1:], clean_up_tokenization_spaces=False)
    each = sum(len(text.encode()) for text in texts) / blocks[:, 1:].numel()  # bytes a token
    return {"perplexity": value, "bits_per_byte": math.log2(value) / each if each else None,
            "last_words": last_word_accuracy(model, last_words(tokenizer, blocks)),
            "repetition": repetition(model, blocks)}

# %% cellView="form" jupyter={"source_hidden": true}
# @title Recording a stage: its test perplexity, what it can still do, a sample, and the conditions that belong to it
ABILITIES = {"bits_per_byte": "bits per byte", "last_words": "last words right", "repetition": "repeated 4-grams"}

def drop_outdated(run: Run, stage: str) -> None:
    """Drops what was measured of a stage and of later ones."""
    for outdated in list(STAGES)[list(STAGES).index(stage):]:
        for record in ("perplexity", "parameters", "samples", "size", *ABILITIES):
            run.metrics[record].pop(outdated, None)

def measure(run: Run, stage: str, model, tokenizer, blocks: torch.Tensor) -> None:
    """Records a stage's abilities() on blocks (n, time) and a sample; what was measured of later stages is dropped."""
    run.metrics["settings"], prompt = dataclasses.asdict(run.settings), run.settings.prompt
    drop_outdated(run, stage)

    def compute():
        return abilities(model, tokenizer, blocks) | {"samples": sample(model, tokenizer, prompt),
                                                      "parameters": model.num_parameters()}

    with run.step(f"measure {stage}"):
        for name, value in run.cached(f"measure_{stage}", (model, blocks, prompt), compute).items():
            run.metrics[name][stage] = value
    words = [f"{title} {words_for_ability(name, run.metrics[name][stage])}" for name, title in ABILITIES.items()]
    print(f"{STAGES[stage]}: perplexity {run.metrics['perplexity'][stage]:.2f}, {', '.join(words)}\n"
          f"{in_lines(run.metrics['samples'][stage])}")

def words_for_ability(name: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if name == "bits_per_byte" else f"{value:.0%}"

def markdown_table(head: list, rows) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows])

def conditions(metrics: dict) -> str:
    """One paragraph: everything that the numbers depend on."""
    s, blocks = metrics["settings"], metrics["blocks"]
    always = "prune pruning_level strategy calibration_blocks repair block_length seed".split()
    always += [name for name in ("train_file", "max_steps") if s[name]]  # (their defaults are what the form says)
    never = "model dataset eval_blocks precision device prompt output_dir save_model sweep".split()
    named = [f"{field.name} {bare_name(str(s[field.name]))}" for field in dataclasses.fields(Settings)
             if field.name in always or (field.name not in never and s[field.name] != field.default)]
    text = f"text {s['dataset']}" if not s["train_file"] else "splits without a file are cut from train_file"
    return "; ".join([f"Model {bare_name(s['model'])}", text, *named, f"{metrics.get('by_hand', 0)} gates set by hand",
                      f"tested on {blocks['tested']} of {blocks['test']} test blocks",
                      f"{metrics['precision']} on {metrics['device']}",
                      *(f"{name} {version}" for name, version in metrics["versions"].items())]) + "."

# %%
if __name__ == "__main__":
    measure(run, "dense", model, tokenizer, test_blocks)
# %% [markdown]
# <a name="8.-Importance"></a>
# ## 8. Importance
#
# Which heads matter? A **strategy** gives every head a number, its importance. All strategies share one
# interface: `get_strategy(name).score(model, blocks)` returns a table (layers, units), higher meaning
# more important. Where neurons are pruned they stand in the table behind the heads, and a score is divided
# by the number of parameters that go with the unit, so that the two can be compared. A new strategy is one
# small class and one line in `STRATEGIES`.
#
# **Random** is the baseline: a strategy that does no better than this is useless.
# %%
@dataclasses.dataclass
class Random:
    """Random importance, the same for the same seed."""

    seed: int = 0

    def score(self, model, blocks=None) -> torch.Tensor:
        """Importance (layers, units)."""
        return torch.rand(get_gates(model).shape, generator=torch.Generator().manual_seed(self.seed))

if __name__ == "__main__":
    print("the first layer's first eight units, at random:", Random().score(model)[0][:8].numpy().round(2))
# %% [markdown]
# **Magnitude** looks at no text: it is the L2 norm of everything a head owns, its rows of the query, key
# and value projections and its columns of the output projection.
# %%
@dataclasses.dataclass
class Magnitude:
    """L2 norm of a head's query, key, value and output weights."""

    @torch.no_grad()
    def score(self, model, blocks=None) -> torch.Tensor:
        """Importance (layers, heads). Raises UserError where a family keeps its weights in an unknown way."""
        scores = []
        for layer in find_units(model):
            with saying_cannot_be_used("strategy 'magnitude'", "take another strategy"):
                own = [[*own_weights(units), units.output_weight] for units in layer]
            scores.append(torch.cat([sum(weight.float().flatten(1).square().sum(1) for weight in weights).sqrt().cpu()
                                     for weights in own]))
        return torch.stack(scores) / relative_costs(model)
# %% [markdown]
# **Entropy** asks how a head reads. With $a_{ij}$ the attention that token $i$ pays to token $j$, the
# entropy $H_i = -\sum_j a_{ij}\log a_{ij}$ is 0 where the head looks at one token, and $\log i$ where it
# spreads evenly over all it can see. The literal rule (`entropy-literal`) says: diffuse heads are
# unimportant. It fails badly, for two reasons:
#
# 1. **Attention sinks.** A head with nothing to say must still spend its attention somewhere, since every
#    row sums to one. Trained models park it on the first token, whose value vector is nearly zero
#    ([Xiao et al. 2023](https://arxiv.org/abs/2309.17453)). Such an idle head has a very *low* entropy.
# 2. **Position.** Token 500 can spread over a hundred times more tokens than token 5.
#
# The rule here fixes both. Entropy is divided by its maximum at that position, which gives a *focus*
# between 0 and 1; and focus only counts to the extent that the head *writes* something, relative to the
# residual stream $x_i$ that it writes into (the norm of what attention moves:
# [Kobayashi et al. 2020](https://arxiv.org/abs/2004.10102)):
#
# $$\text{importance}(h)=\operatorname*{mean}_i\;\frac{\lVert W_O^{(h)} h_i\rVert}{\lVert x_i\rVert}
# \Big(1+\underbrace{1-\tfrac{H_i}{\log i}}_{\text{focus}}\Big)$$
# %%
def entropy(attention: torch.Tensor) -> torch.Tensor:
    """Entropy of every row of attention (..., time, time): (..., time)."""
    return -torch.xlogy(attention.float(), attention.float()).sum(-1)

def focus(attention: torch.Tensor) -> torch.Tensor:
    """1 - entropy / log(visible tokens) of causal attention (..., time, time): (..., time), 0 for the first token."""
    visible = torch.arange(1, attention.shape[-1] + 1, device=attention.device)
    return torch.where(visible > 1, 1 - entropy(attention) / visible.log().clamp_min(1e-9), 0.0)

if __name__ == "__main__":
    print(f"focus on the fourth token: even {focus(torch.ones(4, 4) / 4)[3]:.2f}, "
          f"two tokens {focus(torch.tensor([[0.5, 0.5, 0, 0]] * 4))[3]:.2f}, one token {focus(torch.eye(4))[3]:.2f}")
# %% cellView="form" jupyter={"source_hidden": true}
# @title Attention weights, which the fast kernels never build, and the norm of what a head writes
@contextlib.contextmanager
def eager_attention(model):
    """Within it the model hands out its attention weights, which the fast kernels never build."""
    # Not set_attn_implementation(): it refuses families that read this attribute themselves, such as Falcon.
    before, model.config._attn_implementation = model.config._attn_implementation, "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = before

def head_norms(layer: Units, heads: torch.Tensor) -> torch.Tensor:
    """Norms of what each head writes, (batch, heads, time), from the output projection's input (batch, time, width)."""
    weight, parts = layer.output_weight.float(), heads.float().unflatten(-1, (layer.number, layer.size))
    gram = weight @ weight.mT  # |W h|^2 = h' W W' h, so that what a head writes (hidden wide) is never built
    power = (torch.einsum("bthd,hde->bthe", parts, gram) * parts).sum(-1)
    return power.clamp_min(0).sqrt().transpose(1, 2)
# %%
@dataclasses.dataclass
class Entropy:
    """How much a head writes x how focused it reads; `literal=True` is minus the mean attention entropy instead."""

    literal: bool = False

    @torch.no_grad()
    def score(self, model, blocks: torch.Tensor) -> torch.Tensor:
        """Importance (layers, units) on blocks (n, time). Raises UserError where a model gives no attention weights."""
        layers, scores = find_heads(model), {}  # a path -> (batch, units), the sum where a layer runs several times

        def score_unit(units, seen, stream):  # (batch, units, time), of the norm of the stream (batch, 1, time)
            if units.kind == "neurons":
                inputs = seen["neurons"].float().view(*seen["in"].shape[:2], -1).abs()
                return (inputs * units.output_weight.float().norm(dim=-1)[:, 0]).transpose(1, 2) / stream
            if seen["maps"] is None:
                raise UserError("strategy 'entropy' needs attention weights, which "
                                f"{type(units.module).__name__} does not give: take another strategy.")
            written = head_norms(units, seen["heads"]) / stream
            return -entropy(seen["maps"]) if self.literal else written * (1 + focus(seen["maps"]))

        def watch(layer, row):
            seen = {}

            def leave(*_):  # attention maps are large, so each layer's are reduced before the next one runs
                stream = (seen["in"] + seen["attention"]).float().norm(dim=-1)[:, None]
                each = [score_unit(units, seen, stream)[..., 1:].mean(-1) for units in row]
                scores[layer.path] = scores.get(layer.path, 0) + torch.cat(each, dim=1)
                seen.clear()

            yield from watch_layer(layer, seen)
            yield layer.block.register_forward_hook(leave)

        def per_block(batch):
            scores.clear()
            model.base_model(batch, use_cache=False)
            return torch.stack([scores[layer.path] for layer in layers], 1)  # (batch, layers, units)

        watched = zip(layers, find_units(model))
        with eager_attention(model), hooks(handle for pair in watched for handle in watch(*pair)):
            scored = over_blocks(model, blocks, per_block, "scoring by entropy")
        return scored.mean(0).cpu() / relative_costs(model)
# %% [markdown]
# **Gradient** asks the loss instead: by how much would it change if the head's gate moved a little? One
# backward pass answers for all heads at once. The importance is the mean over texts of at most 128 tokens of
# $|\partial L/\partial g|$ ([Michel et al. 2019](https://arxiv.org/abs/1905.10650)); squared, it is the
# diagonal of the **Fisher** information, which says how fast the model's predictions change
# ([Kwon et al. 2022](https://arxiv.org/abs/2204.09656)).
# %%
SCALE = 1024.0  # lifts small gradients into the range of float16; a power of two, so that nothing else changes

def cut_shorter(blocks: torch.Tensor, longest: int = 128) -> torch.Tensor:
    """Blocks (n, time) cut into equal parts of at most `longest` tokens: (more, shorter time)."""
    parts = math.ceil(blocks.shape[1] / longest)
    length = blocks.shape[1] // parts
    return blocks[:, : parts * length].reshape(-1, length)

def logits_with(model, layers: list, rows, ids: torch.Tensor) -> torch.Tensor:
    """Logits of ids (batch, time) with `rows`, (..., units) for each of the layers, as gates; weights are frozen."""
    gates = {f"{units.path}.gates": part for layer, row in zip(layers, rows, strict=True)
             for units, part in zip(layer, row.split([units.number for units in layer], dim=-1))}
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return torch.func.functional_call(model, weights | gates, ids, {"use_cache": False}).logits

@dataclasses.dataclass
class Gradient:
    """Mean over short texts of |d loss / d gate|; `squared=True` is the mean square instead (Fisher)."""

    squared: bool = False

    def score(self, model, blocks: torch.Tensor) -> torch.Tensor:
        """Importance (layers, units) on blocks (n, time), at the gates that the model has."""
        texts = cut_shorter(blocks)  # the gradients of a long text's tokens would cancel out
        gates, layers = get_gates(model).to(model.device), find_units(model)

        def per_block(batch):
            own = gates[:, None, None].repeat(1, len(batch), 1, 1).requires_grad_()  # (layers, batch, 1, units)
            loss = nll(logits_with(model, layers, own, batch[:, :-1]), batch).sum()
            (slope,) = torch.autograd.grad(SCALE * loss, own)  # no block's gate moves another block's loss
            return slope[:, :, 0].transpose(0, 1) / SCALE  # (batch, layers, units)

        slopes = over_blocks(model, texts, per_block, "scoring by gradient", backward=True)
        return (slopes.square() if self.squared else slopes.abs()).mean(0).cpu() / relative_costs(model)
# %% [markdown]
# **Learned** trains the gates themselves, with all weights frozen, so that they keep the predictions of
# the dense model while only a given number may be open. In training a gate is a number between 0 and 1,
# $g=\sigma\big((a-\tau+\varepsilon)/T\big)$ with noise $\varepsilon$ (the *concrete* relaxation:
# [Louizos et al. 2018](https://arxiv.org/abs/1712.01312), for heads
# [Voita et al. 2019](https://arxiv.org/abs/1905.09418)). Three choices differ from theirs:
#
# - The threshold $\tau$ is solved for in every step so that the gates sum to the number that may be open.
#   So there is no penalty to weigh against the loss.
# - The loss is the Kullback-Leibler divergence from the dense model's predictions. It is zero for the
#   dense model, and says more per token than the one token that happened to come next.
# - The temperature $T$ falls: gates are soft at first and nearly decided in the end. They start from Fisher.
#
# There are too many neurons to learn a gate for each from so little text: Fisher ranks the neurons of a layer, and
# one number for each layer is learned, which moves all of them up or down.
#
# It takes about twice as long as Fisher, and raises perplexity the least on most models that we
# measured, because whether a head can go depends on which others go.
# %%
def soft_gates(scores: torch.Tensor, budget: float, temperature: float, costs: torch.Tensor | float = 1.0):
    """sigmoid((scores - threshold) / temperature) of scores (..., layers, units), in the same shape.

    The thresholds are such that costs x gates, (layers, units), sum to `budget`; the gradient knows that they move.
    """
    costs = costs.flatten() if isinstance(costs, torch.Tensor) else costs
    values = scores.detach().flatten(-2)
    low, high = values.amin(-1, keepdim=True) - 20 * temperature, values.amax(-1, keepdim=True) + 20 * temperature
    for _ in range(40):
        middle = (low + high) / 2
        too_many = (costs * torch.sigmoid((values - middle) / temperature)).sum(-1, keepdim=True) > budget
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    slope = torch.sigmoid((values - low) / temperature)
    slope = costs * slope * (1 - slope)
    moves = (slope * scores.flatten(-2)).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.sigmoid((scores.flatten(-2) - low - (moves - moves.detach())) / temperature).view_as(scores)

if __name__ == "__main__":
    print("scores 2, 1, 0, -1, of which two may be open; gates while the temperature falls:",
          *(soft_gates(torch.tensor([[2.0, 1, 0, -1]]), 2, t)[0].numpy().round(2) for t in (1.0, 0.3, 0.1)))

# %%
@dataclasses.dataclass
class Learned:
    """Gates trained on the dense model's predictions, with frozen weights and exactly `level` of them closed."""

    level: float
    steps: int = 240
    seed: int = 0

    def score(self, model, blocks: torch.Tensor) -> torch.Tensor:
        """Importance (layers, units) on Fisher's scale, from blocks (n, time). Raises RunError for overflows."""
        texts, costs = cut_shorter(blocks), relative_costs(model)
        start = Gradient(squared=True).score(model, texts).clamp_min(1e-20).log()
        closed = round(self.level * costs.numel()) if costs.min() == 1 else self.level * costs.sum().item()
        if not closed:
            return start.exp()
        heads, budget, costs = number_of_heads(model), costs.sum().item() - closed, costs.to(model.device)
        middle, spread = start.mean(), start.std().clamp_min(1e-6)
        start = ((start - middle) / spread).to(model.device)
        # So many neurons cannot be learned from so little text: Fisher ranks a layer's, and one number moves them all.
        own, moved = start[:, :heads].clone().requires_grad_(), torch.zeros_like(start[:, :1]).requires_grad_()
        learned = [own] * (heads > 0) + [moved] * (heads < start.shape[1])
        optimizer, generator = torch.optim.Adam(learned, betas=(0.9, 0.98)), torch.Generator().manual_seed(self.seed)
        per_text = functools.partial(self.slope, model, find_units(model))
        order = draw(len(texts), min(len(texts), max(1, 256 // texts.shape[1])), self.steps, generator)
        for step, chosen in enumerate(long_loop(order, "learning gates", model.device)):
            done = step / max(self.steps - 1, 1)
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - 0.9 * done)  # falls to a tenth
            temperature = 0.03**done  # falls from 1 to 0.03
            chance = torch.rand(len(chosen), *own.shape, generator=generator).clamp(1e-4, 1 - 1e-4).logit()
            noise = 0.5 * temperature * chance.to(model.device)  # every text has its own
            scores = torch.cat([own + noise, (start[:, heads:] + moved).expand(len(chosen), -1, -1)], dim=-1)
            gates = soft_gates(scores, budget, temperature, costs)  # (texts, layers, units)
            slopes = over_blocks(model, (texts[chosen], gates.detach()), per_text, "learning gates", backward=True)
            for part, slope in zip(learned, torch.autograd.grad(gates, learned, slopes / len(chosen))):
                part.grad = slope
            optimizer.step()
        return (torch.cat([own, start[:, heads:] + moved], dim=1).detach().cpu() * spread + middle).exp()

    def slope(self, model, layers: list, batch: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """d divergence / d gate of each text: (batch, layers, units), like `gates`; `batch` is (batch, time)."""
        with torch.no_grad():
            wanted = logits_with(model, layers, torch.ones_like(gates[0]), batch)
        rows = gates.requires_grad_()[:, None].unbind(2)  # for each layer (batch, 1, units)
        loss = divergence(logits_with(model, layers, rows, batch), wanted).sum()
        return torch.autograd.grad(SCALE * loss, gates)[0] / SCALE
# %% [markdown]
# All strategies by name, and the one that you chose, applied to training text:
# %%
STRATEGIES = {"learned": Learned, "fisher": functools.partial(Gradient, squared=True), "gradient": Gradient,
              "entropy": Entropy, "magnitude": Magnitude, "random": Random,
              "entropy-literal": functools.partial(Entropy, literal=True)}

def get_strategy(name: str, **options):
    """A strategy by name, for every architecture. Raises UserError for a name or an option that it does not have.

    Options: `random` takes seed; `learned` takes level, steps and seed.
    """
    check_choice("strategy", name, STRATEGIES)
    try:
        return STRATEGIES[name](**options)
    except TypeError as error:
        raise UserError(f"strategy {name!r} does not take these options ({error}): correct them.") from None

def options_for(settings: Settings) -> dict:
    """What the chosen strategy takes from the settings."""
    learned = {"level": settings.pruning_level, "steps": settings.gate_steps, "seed": settings.seed}
    return {"learned": learned, "random": {"seed": settings.seed}}.get(settings.strategy, {})

def scores_of(run: Run, model, blocks: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Importance (layers, units) by the chosen strategy on blocks (n, time), all gates open, kept with the run."""
    options = options_for(settings)
    with all_open(model):
        return run.cached("importance", (model, blocks, settings.strategy, options),
                          lambda: get_strategy(settings.strategy, **options).score(model, blocks))

if __name__ == "__main__":
    calibration = evenly_spaced(blocks["train"], settings.calibration_blocks)
    with run.step("importance"):
        importance = scores_of(run, model, calibration, settings)
    print(f"{settings.strategy}, on {len(calibration)} blocks of training text; the first layer's first units:")
    print(importance[0][:8])
# %% [markdown]
# <a name="9.-Prune"></a>
# ## 9. Prune
#
# The least important share of all heads is closed, wherever they are, but every layer keeps at least
# `min_heads`. With `PRUNE = "both"` heads and neurons share one budget: the level is the share of all their
# parameters. No weight is touched, so this cell can be run again with another level.
#
# What to expect: in a model of a hundred million parameters, perplexity rises by a few percent without a
# tenth of the heads, by a quarter without a third of them, and the model falls apart somewhere beyond a half; larger
# models can spare more. Repair recovers a third to a half of the loss. Fine-tuning recovers more than was
# lost, because it also teaches the model this kind of text: so the comparison that counts is with the
# dense model after the same fine-tuning (section 15).

# %%
def ways_down(groups: list, chunks: list, scores: list[float], min_heads: int, layout: Layout):
    """What a layer can lose next, as (importance lost for its cost, cost, (groups, chunks) that are left then).

    The lists have their weakest part first, and something of each always stays.
    """
    def way(gone, unit_cost, number, *left):
        return sum(scores[unit] for unit in gone) / number, unit_cost * number, left

    key = 1 / (layout.readers + 1) if layout.readers > 1 else 0.0  # of a head's cost with its share of the key
    heads = sum(map(len, groups))
    if len(groups) > 1 and heads - len(groups[0]) >= min_heads:  # a head, or a group with its key
        yield way(groups[0], layout.head_cost, len(groups[0]) * (1 - key) + layout.readers * key, groups[1:], chunks)
    if groups and len(groups[0]) > 1 and heads - len(groups) >= min_heads:  # a head of every group
        weakest, stay = zip(*((group[0], group[1:]) for group in groups))
        yield way(weakest, layout.head_cost, len(groups) * (1 - key),
                  sorted(stay, key=lambda group: sum(scores[head] for head in group)), chunks)
    if len(chunks) > 1:
        yield way(chunks[0], layout.neuron_cost, len(chunks[0]), groups, chunks[1:])

def choose_gates(importance: torch.Tensor, level: float, min_heads: int = 1, layout=None) -> torch.Tensor:
    """Gates (layers, units): step by step what is least important for its cost goes, until `level` of all cost is gone.

    Importance is (layers, units); without a `layout` all units are heads, each for itself. Raises UserError where the
    layers have to keep too much.
    """
    layout = layout or Layout(importance.shape[1])
    layers, neurons = importance.tolist(), importance.shape[1] - layout.heads
    left = [weakest_first(scores, layout) for scores in layers]
    unit = layout.neuron_cost if not layout.heads else layout.head_cost
    total = len(layers) * (layout.heads * layout.head_cost + neurons * layout.neuron_cost)
    wanted = budget = level * total if layout.heads and neurons else round(level * importance.numel()) * unit

    def ways(number):
        return [(number, *way) for way in ways_down(*left[number], layers[number], min_heads, layout)]

    open_ways = [ways(number) for number in range(len(layers))]
    while fitting := [way for each in open_ways for way in each if way[2] / 2 <= budget]:
        number, _, cost, left[number] = min(fitting, key=lambda way: way[1])
        budget, open_ways[number] = budget - cost, ways(number)
    if not any(open_ways) and budget > unit / 2:
        raise UserError(f"pruning_level is {level:g} with min_heads {min_heads}, but at most "
                        f"{(wanted - budget) / total:.2f} can be closed so: lower one of the two.")
    gates = torch.zeros_like(importance)
    for row, (groups, chunks) in zip(gates, left):
        row[[unit for part in (*groups, *chunks) for unit in part]] = 1
    return gates

def gates_for(model, importance: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Gates (layers, units) as the settings want them, from importance (layers, units). Raises UserError."""
    layout = layout_of(model, settings)
    if settings.uniform == "yes":
        return close_alike(importance, settings.pruning_level, layout)
    return choose_gates(importance, settings.pruning_level, settings.min_heads, layout)

# %% cellView="form" jupyter={"source_hidden": true}
# @title What gates save: the model is cut without its weights, and counted
def predict_cost(model, gates: torch.Tensor, tokens: int) -> dict[str, float]:
    """`parameters` and `flops_per_token` of the model with only the units that gates (layers, units) leave.

    FLOPs are those of matrix products in texts of `tokens` tokens.
    """
    empty = without_weights(model)
    outputs = [layer.projection for layer in find_heads(empty)]
    small = cut(empty, gates) if can_compact(model) else empty
    width = sum(inputs_first(output).shape[0] for output in outputs)
    products = sum(m.weight.numel() for m in small.modules() if isinstance(m, (torch.nn.Linear, Conv1D)))
    return {"parameters": small.num_parameters(), "flops_per_token": 2 * products + 4 * tokens * width}

def words_for_size(model, gates: torch.Tensor, tokens: int) -> str:
    """predict_cost() of gates (layers, units) in words, beside the dense model's."""
    before, after = (predict_cost(model, table, tokens) for table in (torch.ones_like(gates), gates))
    fewer, less = (f"{after[name] / before[name] - 1:+.1%}" for name in ("parameters", "flops_per_token"))
    saved = after["parameters"] * getattr(model, "saved_in", torch.float32).itemsize
    return (f"{after['parameters'] / 1e6:,.2f} M parameters ({fewer}), {saved / 1e6:,.1f} MB as saved, "
            f"{after['flops_per_token'] / 1e6:,.1f} MFLOP a token ({less})")

def ranks(importance: torch.Tensor) -> torch.Tensor:
    """The place of every head in the order of importance, 0 for the least: integers (layers, heads)."""
    return importance.flatten().argsort(stable=True).argsort().view_as(importance)

def describe_units(model, gates: torch.Tensor) -> dict[str, dict | None]:
    """Counts for the record, of gates (layers, units): of heads, and of neurons where these are pruned."""
    parts = {"heads": heads_part(model, gates) != 0, "neurons": gates[:, number_of_heads(model):] != 0}
    counts = {kind: {"total": part.numel(), "closed": int((~part).sum()), "open_per_layer": part.sum(1).tolist()}
              for kind, part in parts.items() if part.numel()}
    counts["heads"]["closed_list"] = (~parts["heads"]).nonzero().tolist()  # [layer, head]
    return {"neurons": None} | counts

def words_for_closed(metrics: dict) -> str:
    """What was closed, in words: heads, neurons, or both."""
    counts = [f"{counts['closed']:,} of {counts['total']:,} {kind}"
              for kind in ("heads", "neurons") if (counts := metrics.get(kind)) and counts["closed"]]
    return " and ".join(counts) or "nothing"

# %% cellView="form" jupyter={"source_hidden": true}
# @title The picture of what was closed
def draw_units(run: Run, model, importance: torch.Tensor) -> Figure:
    """Heads of importance (layers, units), coloured by rank, × a closed one; neurons left; the title says the cost."""
    perplexities, neurons = run.metrics["perplexity"], run.metrics["neurons"]
    scores, gates = (heads_part(model, table) for table in (importance, get_gates(model)))
    layers, heads = gates.shape
    drawn = [name for name, there in (("heads", number_of_heads(model)), ("neurons", neurons)) if there]
    height = max(2.6, 0.24 * heads + 1.2) * ("heads" in drawn) + 2 * ("neurons" in drawn)
    figure = new_figure(max(5, 0.3 * layers + 2), height)
    for axes, name in zip(figure.subplots(len(drawn), squeeze=False)[:, 0], drawn):
        if name == "heads":
            shades = (ranks(scores).T / max(scores.numel() - 1, 1)).numpy()
            image = axes.imshow(shades, cmap="cividis", aspect="auto", vmin=0, vmax=1)
            axes.scatter(*(gates == 0).nonzero(as_tuple=True), marker="x", color="white", s=26, linewidths=1.6)
            axes.set(ylabel="head (×: closed)", yticks=range(0, heads, math.ceil(heads / 16)))
            bar = figure.colorbar(image, ax=axes, label="importance (rank)", ticks=[0, 1], pad=0.01)
            bar.ax.set_yticklabels(["least", "most"])
        else:
            axes.bar(range(layers), neurons["open_per_layer"], color="#009E73")
            axes.axhline(neurons["total"] / layers, color="#999999", linestyle="--", linewidth=1)
            axes.set(ylabel="neurons left", xlim=(-0.5, layers - 0.5))
        axes.set(xlabel="layer", xticks=range(0, layers, math.ceil(layers / 20)))
    figure.axes[0].set_title(f"{words_for_closed(run.metrics)} closed by {run.metrics['settings']['strategy']}: "
                             f"perplexity {perplexities['dense']:.1f} → {perplexities['pruned']:.1f}")
    return figure

def close_units(run: Run, model, tokenizer, gates: torch.Tensor, scores: torch.Tensor, blocks: torch.Tensor) -> None:
    """Sets gates, chosen by scores, both (layers, units); measures the model on blocks (n, time), and draws it."""
    set_gates(model, gates)
    run.metrics |= describe_units(model, gates) | {"importance": heads_part(model, scores).tolist(), "by_hand": 0}
    measure(run, "pruned", model, tokenizer, blocks)
    for kind in ("heads", "neurons"):
        if run.metrics[kind] and run.metrics[kind]["closed"]:
            print(f"{kind} left, layer by layer: {' '.join(map(str, run.metrics[kind]['open_per_layer']))}")
    if can_compact(model):
        print(f"when that is cut out: {words_for_size(model, gates, blocks.shape[1])}")
    run.show(draw_units(run, model, scores), "heads.png")

# %%
if __name__ == "__main__":
    run.settings = settings
    pruned = model  # until it is repaired
    close_units(run, model, tokenizer, gates_for(model, importance, settings), importance, test_blocks)

# %% [markdown]
# <a name="10.-Explore"></a>
# ## 10. Explore
#
# Here you can experiment before you go on. In the explorer every square is a head, layers from left to right, dark
# where it matters least, × where its gate is closed. Drag the level, change the strategy, click single
# heads; see how large the smaller model would be, measure it on validation text, let it write. To stop a
# long job, interrupt the kernel. None of this affects the run until you press *Take it*: then go on from
# section 11.

# %% cellView="form" jupyter={"source_hidden": true}
# @title The explorer: strategy, level, a button for every head; measure, take, write
COLORS = [to_hex(color) for color in matplotlib.colormaps["cividis"].resampled(16).colors]
STYLE = "<style>.prune-head {color: white; text-shadow: 0 0 2px black; font-weight: bold; line-height: 18px}</style>"

class ExplorerPanel:
    """What the explorer shows: controls, a grid of heads, counts, and an output for words, bars and mistakes."""

    def __init__(self, settings: Settings, layers: int, heads: int):
        self.strategy = widgets.Dropdown(options=STRATEGY_NAMES, value=settings.strategy, description="strategy")
        self.level = widgets.FloatSlider(settings.pruning_level, min=0, max=0.95, step=0.01, description="level",
                                         readout_format=".0%", continuous_update=False)
        self.prompt = widgets.Text(settings.prompt, description="prompt", layout=widgets.Layout(width="480px"))
        self.measuring, self.taking, self.writing = map(
            lambda name: widgets.Button(description=name), ("Measure", "Take it", "Write"))
        self.counts, self.output = widgets.HTML(), widgets.Output()
        small = widgets.Layout(width="22px", height="18px", padding="0", margin="0")
        self.styles = [widgets.ButtonStyle(button_color=color) for color in COLORS]
        self.buttons = {(layer, head): widgets.Button(tooltip=f"layer {layer}, head {head}", layout=small,
                                                      style=self.styles[0]).add_class("prune-head")
                        for head in range(heads) for layer in range(layers)}
        grid = widgets.GridBox(list(self.buttons.values()), layout=widgets.Layout(
            grid_template_columns=f"repeat({layers}, 22px)", grid_gap="1px", overflow="auto"))
        rows = ([self.strategy, self.level], [grid], [self.counts], [self.measuring, self.taking],
                [self.prompt, self.writing], [self.output])
        self.box = widgets.VBox([widgets.HTML(STYLE), *map(widgets.HBox, rows)])

    def refresh(self) -> None:
        """Shows the gates that the Explorer has now, its scores as shades, and what they save."""
        scores = self.importance[self.settings.strategy][:, :self.heads]
        shades = ranks(scores) * 16 // scores.numel()
        for place, button in self.buttons.items():
            button.style = self.styles[shades[place]]
            button.description = "\N{NO-BREAK SPACE}" if self.gates[place] else "×"  # (an empty one is not sent)
        counts = describe_units(self.model, self.gates)
        size = [words_for_size(self.model, self.gates, self.settings.block_length)] * can_compact(self.model)
        self.counts.value = " · ".join([f"<b>{words_for_closed(counts)} closed</b>", *size])

    def do(self, work) -> None:
        """work(), with its bars, and the words that it returns, in the panel; a mistake is said there, too."""
        with self.output:
            self.output.clear_output()
            try:
                print(work() or "")
            except UserError as error:
                print(error)

# %% cellView="form" jupyter={"source_hidden": true}
# @title The explorer: what its controls do
class Explorer(ExplorerPanel):
    """Closes units of a copy; *Take it* closes them in the run's model. Blocks and importance as in show_explorer()."""
    def __init__(self, run: Run, model, tokenizer, blocks: dict, importance: torch.Tensor):
        self.run, self.settings, self.importance = run, run.settings, {run.settings.strategy: importance}
        self.original, self.model, self.tokenizer, self.blocks = model, sharing_copy(model), tokenizer, blocks
        self.gates, self.chosen, self.heads = get_gates(model), get_gates(model), number_of_heads(model)
        super().__init__(run.settings, len(importance), self.heads)
        for control in (self.strategy, self.level):
            control.observe(lambda _: self.do(self.choose), "value")
        works = {self.measuring: self.measure, self.writing: self.write, self.taking: self.take_it}
        works |= {button: functools.partial(self.toggle, place) for place, button in self.buttons.items()}
        for button, work in works.items():
            button.on_click(lambda _, work=work: self.do(work))
        self.refresh()

    def toggle(self, place: tuple[int, int]) -> None:
        self.gates[place] = 1 - (self.gates[place] != 0).float()
        self.refresh()

    def choose(self) -> None:
        name = self.strategy.value
        settings = dataclasses.replace(self.settings, strategy=name, pruning_level=self.level.value)
        if name not in self.importance:
            print(f"Scoring with {name}, once.")
            text = evenly_spaced(self.blocks["train"], settings.calibration_blocks)
            self.importance[name] = scores_of(self.run, self.model, text, settings)
        self.chosen, self.settings = gates_for(self.model, self.importance[name], settings), settings
        self.gates = self.chosen.clone()
        self.refresh()

    def both(self, look) -> list:
        """What `look(model)` returns of the model with all gates open, and with those that are shown."""
        set_gates(self.model, self.gates)
        with all_open(self.model):
            dense = look(self.model)
        return [dense, look(self.model)]

    def measure(self) -> str:
        dense, shown = self.both(lambda model: perplexity(model, self.blocks["validation"][:16]))
        return f"Validation perplexity: dense {dense:.2f}, shown {shown:.2f}, before repair and fine-tuning."

    def write(self) -> str:
        return "dense:\n{}\n\nshown:\n{}".format(*self.both(lambda m: sample(m, self.tokenizer, self.prompt.value)))

    def take_it(self) -> str:
        run, name, tested = self.run, self.settings.strategy, self.blocks["test"][: self.settings.eval_blocks or None]
        run.settings = dataclasses.replace(run.settings, strategy=name, pruning_level=self.settings.pruning_level)
        close_units(run, self.original, self.tokenizer, self.gates, self.importance[name], tested)
        run.metrics["by_hand"] = int((self.gates != self.chosen).sum())
        return f"Taken: test perplexity {run.metrics['perplexity']['pruned']:.2f}. Go on from section 11."

# %%
def show_explorer(run: Run, model, tokenizer, blocks: dict[str, torch.Tensor], importance: torch.Tensor) -> None:
    """The Explorer, in a notebook and where heads are pruned; blocks are (n, time), importance is (layers, units)."""
    if in_notebook() and number_of_heads(model):
        widgets.Widget.close_all()  # else an earlier explorer keeps its model for as long as the kernel lives
        display(Explorer(run, model, tokenizer, blocks, importance).box)

if __name__ == "__main__":
    show_explorer(run, model, tokenizer, blocks, importance)

# %% [markdown]
# What does a head look at? The map of a head has a row for every token: how it spreads its attention over
# the tokens before it. A column that is bright from top to bottom is an attention sink: there the head
# rests. On such a map you can see why a low entropy does not make a head important. Here are the most and
# the least important head; run the cell again with a sentence and heads of your own.
# %% cellView="form" jupyter={"source_hidden": true}
# @title Attention maps
@torch.no_grad()
def attention_maps(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """For each layer the attention (1, heads, time, time) of ids (1, time), all gates open. Raises UserError."""
    maps, heads = [], find_heads(model)[0].number
    look = (layer.module.register_forward_hook(lambda module, args, output: maps.append(maps_in(output, heads)))
            for layer in find_heads(model))
    with eager_attention(model), all_open(model), hooks(look):
        model.eval().base_model(ids.to(model.device), use_cache=False)
    if any(weights is None for weights in maps):
        raise UserError(f"{type(model).__name__} does not give its attention weights: there is nothing to look at.")
    return [weights.float().cpu() for weights in maps]

def draw_attention(model, tokenizer, sentence: str, importance: torch.Tensor, places: list[tuple[int, int]]) -> Figure:
    """The maps of heads at places (layer, head): rows read, columns are read from; importance is (layers, heads)."""
    ids = tokenizer(sentence, return_tensors="pt")["input_ids"][:, :40]
    if ids.shape[1] < 2:
        raise UserError(f"the sentence {sentence!r} has {ids.shape[1]} tokens, but two are needed: write a few words.")
    names = [tokenizer.decode([token]).replace("$", r"\$").strip() or "␣" for token in ids[0].tolist()]
    maps, size = attention_maps(model, ids), max(4.2, 0.17 * len(names) + 1.2)
    figure = new_figure(size * len(places), size + 0.5)
    for axes, (layer, head) in zip(figure.subplots(1, len(places), squeeze=False)[0], places):
        weights, place = maps[layer][0, head], importance.numel() - int(ranks(importance)[layer, head])
        later = torch.ones_like(weights).triu(1).bool()
        image = axes.imshow(weights.masked_fill(later, math.nan).numpy(), cmap="cividis", norm=PowerNorm(0.5, 0, 1))
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_title(f"layer {layer}, head {head}: number {place} of {importance.numel()} by importance,\n"
                       f"{weights[1:, 0].mean():.0%} of its attention on the first token", fontsize=9)
        axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=figure.axes, label="attention", ticks=[0, 0.1, 0.3, 1], shrink=0.7, pad=0.01)
    return figure

# %%
def show_attention(run: Run, model, tokenizer, sentence: str = "", places: list[tuple[int, int]] | None = None) -> None:
    """Draws what heads look at in a sentence: those at `places` (layer, head), else the most and least important."""
    importance = torch.tensor(run.metrics["importance"])
    if not number_of_heads(model):
        return print("No heads are pruned: no map is drawn.")
    sentence = sentence or f"{run.settings.prompt}. The city was old, and the river was older than the city."
    places = places or [divmod(int(index), importance.shape[1]) for index in (importance.argmax(), importance.argmin())]
    try:
        figure = draw_attention(model, tokenizer, sentence, importance, places)
    except UserError as error:  # nothing that follows needs the picture
        return print(error)
    run.show(figure, "attention.png", width=1000)

if __name__ == "__main__":
    show_attention(run, model, tokenizer)  # or (run, model, tokenizer, "A sentence of yours.", [(0, 0), (3, 5)])

# %% [markdown]
# <a name="11.-Repair"></a>
# ## 11. Repair
#
# What a closed head wrote is gone, but the open heads can say part of it: the heads of a layer are not
# independent. Which mix of them comes nearest to what the dense model computed is a linear least-squares
# problem, and has an exact solution. With $X$ the open heads' outputs on some training text, $W$ their
# rows of the output projection and $Y$ what should come out,
#
# $$W' = W + (X^\top X + \lambda I)^{-1} X^\top (Y - XW).$$
#
# It is solved layer by layer from the bottom, on what the *pruned* model computes, for the heads and then for the MLP.
# $Y$ is the mean of two targets. The first would bring the stream to the dense model's, so a layer also corrects what
# was lost below it. The second is what this layer would write if all of it were open. A
# small $\lambda$ trusts the text, a large one the old weights. For each projection, five values are tried on a quarter
# of the tokens, which is held out, and the best is taken. (Relatives: [FLAP](https://arxiv.org/abs/2312.11983),
# [SlimGPT](https://arxiv.org/abs/2412.18110).)

# %%
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)  # lambda, as a share of X'X's mean diagonal

class LeastSquares:
    """Changes an output projection so that its open inputs give a target; tokens are added batch by batch.

    The last quarter of every text is held out: the ridge is the one whose change, fitted to the rest, does best there.
    """

    def __init__(self, projection):
        self.projection, inputs = projection, inputs_first(projection).shape[0]
        gates = getattr(projection, "gates", torch.ones(1, device=projection.weight.device))
        self.kept = (gates != 0).repeat_interleave(inputs // len(gates))
        self.sums = [[0.0, 0.0], [0.0, 0.0]]  # X'X and X'Y of the tokens to fit, and of those that are held out

    def add(self, inputs: torch.Tensor, target: torch.Tensor) -> None:
        """Texts: the projection's inputs (batch, time, in), and what should come out for them (batch, time, out)."""
        x, y = inputs.reshape(*target.shape[:2], -1).float()[..., self.kept], target.float()
        if self.projection.bias is not None:
            x = torch.cat([x, torch.ones_like(x[..., :1])], -1)  # a last input that is always 1
        sizes = [y.shape[1] - y.shape[1] // 4, y.shape[1] // 4]
        with number_format(x.device, torch.float32):
            for sums, own, wanted in zip(self.sums, x.split(sizes, 1), y.split(sizes, 1)):
                own, wanted = own.flatten(0, 1), wanted.flatten(0, 1)
                sums[:] = sums[0] + (own.T @ own).cpu().double(), sums[1] + (own.T @ wanted).cpu().double()

    def change(self, gram: torch.Tensor, missing: torch.Tensor, ridge: float) -> torch.Tensor:
        """The change of weights (inputs, outputs) that gives what is `missing`, X'(Y - XW), by X'X (inputs, inputs)."""
        spread, number = gram.diagonal().clone(), int(self.kept.sum())
        if number < len(gram):  # the bias takes care of the means, and is free
            spread -= gram[:, -1].square() / gram[-1, -1]
        penalty = torch.zeros_like(spread).index_fill(0, torch.arange(number), ridge * spread[:number].mean() + 1e-12)
        return torch.linalg.solve(gram + penalty.diag(), missing)

    def solve(self, where: str = "") -> None:
        """Changes the projection in place. Raises RunError for numbers that are not finite."""
        bias, weight = self.projection.bias, inputs_first(self.projection)
        now = torch.cat([weight[self.kept]] + ([] if bias is None else [bias[None]])).cpu().double()
        (gram, missing), (held_gram, held) = ((gram, wanted - gram @ now) for gram, wanted in self.sums)
        if not (gram.isfinite().all() and missing.isfinite().all()):
            raise RunError(f"repair meets numbers that are not finite in {where}: take --precision fp32, or another "
                           "model or text")

        def held_error(ridge):  # |Y - X(W + change)|^2 on what is held out, less what no change alters
            change = self.change(gram, missing, ridge)
            return (change * (held_gram @ change - 2 * held)).sum().item()

        change = self.change(gram + held_gram, missing + held, min(RIDGES, key=held_error)).to(weight)
        weight[self.kept] += change[: int(self.kept.sum())]
        if bias is not None:
            bias += change[-1]

# %% [markdown]
# A layer is refitted in three passes over the text: the first collects the outputs of the dense layer and of the
# pruned heads; the second, those of the neurons behind the refitted heads; the third, the layer's own. Only the streams
# between two layers are kept, of the dense and of the pruned model, however many layers there are.

# %%
def halfway(projection, inputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Between `wanted` (batch, time, out) and what a projection makes of its inputs, those of closed units included."""
    return (wanted + projection.forward(inputs).view_as(wanted)) / 2  # (without its hooks)

def refit_layer(original: Units, layer: Units, call: tuple, dense: list, pruned: list) -> None:
    """Refits a layer, and moves both streams (lists of (batch, time, hidden)) from its inputs to its outputs."""
    heads, output, targets = LeastSquares(layer.projection), find_mlp_output(layer), []
    with number_format(layer.projection.weight.device):
        for number, stream in enumerate(dense):
            seen, own = seen_in(original, call, stream), seen_in(layer, call, pruned[number], ("in", "heads"))
            middle, end = seen["in"].float() + seen["attention"], seen["out"].float()
            if not targets:  # else a norm or a factor stands between (Gemma 2, Granite): the outputs are the targets
                adds_up = torch.dist(middle + seen["mlp"], end) < 0.02 * end.norm()
            pair = (middle, end) if adds_up else (seen["attention"], seen["mlp"])
            targets.append([part.bfloat16().cpu() for part in pair])
            wanted = targets[-1][0].to(middle.device) - (own["in"].float() if adds_up else 0)
            heads.add(own["heads"], halfway(layer.projection, own["heads"], wanted))
            dense[number] = seen["out"].cpu()
    if heads.kept.any():
        heads.solve(layer.path)
    if output is not None:
        neurons = LeastSquares(output)
        with number_format(layer.projection.weight.device):
            for (_, end), stream in zip(targets, pruned):
                own = seen_in(layer, call, stream, ("in", "attention", "neurons"))
                middle = own["in"].float() + own["attention"] if adds_up else 0
                wanted = end.to(own["neurons"].device) - middle
                neurons.add(own["neurons"], halfway(output, own["neurons"], wanted))
        neurons.solve(f"the MLP beside {layer.path}")
    with number_format(layer.projection.weight.device):
        pruned[:] = [run_layer(layer.block, call, stream).cpu() for stream in pruned]

# %%
def with_own_outputs(model):
    """A copy of a gated model that has gates and output projections of its own, and shares all other weights."""
    outputs = [output for layer in find_heads(model) for output in (layer.projection, find_mlp_output(layer)) if output]
    own = {id(parameter) for output in outputs for parameter in output.parameters()}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})

@torch.no_grad()
def repair(model, blocks: torch.Tensor):
    """with_own_outputs() of a gated model, refitted on blocks (n, time) to follow the model with open gates.

    Raises UserError for a model whose layers cannot be refitted, RunError for numbers that are not finite.
    """
    if reason := why_not_repair(model):
        raise UserError(f"{type(model).__name__} cannot be repaired, because {reason}: take --no-repair.")

    def attempt(size: int):
        fixed = with_own_outputs(model).eval()
        layers = {layer.block: (layer, own) for layer, own in zip(find_heads(model), find_heads(fixed))}
        with all_open(model):
            dense, calls = layer_calls(model, blocks.split(size))
            pruned = list(dense)
            for number, block in enumerate(long_loop(stack_of(model), "repair", model.device)):
                if block in layers:
                    refit_layer(*layers[block], calls[number], dense, pruned)
                else:  # a hybrid's layer without heads
                    for streams, module in ((dense, block), (pruned, stack_of(fixed)[number])):
                        streams[:] = [run_layer(module, calls[number], stream).cpu() for stream in streams]
        return fixed

    return in_equal_batches(attempt, len(blocks), "repair")

# %% cellView="form" jupyter={"source_hidden": true}
# @title Repaired weights are kept with the run
def repaired(run: Run, model, tokenizer, text: torch.Tensor, test_blocks: torch.Tensor):
    """repair() on blocks (n, time), kept with the run and measured; the model itself where there is nothing to do."""
    drop_outdated(run, "repaired")
    if not run.settings.repair or get_gates(model).all():
        return model

    def compute():
        old, fixed = dict(model.named_parameters()), repair(model, text)
        return {name: value for name, value in fixed.named_parameters() if not torch.equal(value, old[name])}

    with run.step("repair"):
        fixed = with_own_outputs(model)
        fixed.load_state_dict(run.cached("repair", (model, text, RIDGES), compute), strict=False)
    measure(run, "repaired", fixed, tokenizer, test_blocks)
    return fixed

# %%
if __name__ == "__main__":
    repair_text = evenly_spaced(blocks["train"], run.settings.repair)
    pruned = repaired(run, model, tokenizer, repair_text, test_blocks)

# %% [markdown]
# <a name="12.-How-far"></a>
# ## 12. How far
#
# Which strategy, how many heads? One strategy at one level says little. With `SWEEP = "fisher random 0.1 0.3"`
# each of these strategies meets each of these levels, on the same model and text, and the first one also prunes
# heads, neurons and both, each against the size and speed that it leaves. And how far may it go? With
# `--pruning-level auto --max-loss 0.05` the level is found: the largest one whose repaired model is at most 5 %
# worse than the dense one, on validation text. Both ask for points, one by one: prune, repair, measure.

# %%
def try_level(run: Run, model, importance: torch.Tensor, texts: tuple[torch.Tensor, ...], settings: Settings) -> dict:
    """A point: size and perplexities at a level, by importance (layers, units), kept with the run.

    `texts` are blocks (n, time) to repair on and to measure on. Raises UserError for a level that is out of reach.
    """
    repair_text, seen = texts
    gates = gates_for(model, importance, settings)

    def compute():
        with all_open(model):
            set_gates(model, gates)
            point = {"prune": settings.prune, "strategy": settings.strategy, "level": settings.pruning_level,
                     "closed": int((gates == 0).sum()), **predict_cost(model, gates, seen.shape[1]),
                     "pruned": perplexity(model, seen), "repaired": None}
            if settings.repair:
                point["repaired"] = perplexity(repair(model, repair_text), seen) if point["closed"] else point["pruned"]
        return point

    options = (settings.prune, settings.strategy, settings.pruning_level, settings.repair)
    return run.cached("point", (model, gates, *texts, options), compute)

def sweep(run: Run, model, texts: tuple[torch.Tensor, ...], settings: Settings) -> list[dict]:
    """The points of settings.sweep: its strategies at its levels, then the first of them for other kinds of units.

    `texts` are blocks (n, time): to score on, to repair on, to measure on.
    """
    (names, levels), points, gates = strategies_and_levels(settings.sweep), [], get_gates(model)
    others = [kind for kind in ("heads", "neurons", "both") if kind != settings.prune]
    try:
        for kind, name in [*((settings.prune, name) for name in names), *((kind, names[0]) for kind in others)]:
            try:
                prune_only(model, kind)
                for level in levels:
                    own = dataclasses.replace(settings, prune=kind, strategy=name, pruning_level=level)
                    points.append(try_level(run, model, scores_of(run, model, texts[0], own), texts[1:], own))
                    print(f"{kind}, {name}, {level:.0%}: {words_for_point(points[-1])}")
            except UserError as error:  # no neurons, or a level that is out of reach there
                print(f"{kind}, {name}: left out, {error}")
    finally:
        prune_only(model, settings.prune)
        set_gates(model, gates)
    return points

def find_level(run: Run, model, importance: torch.Tensor, texts: tuple[torch.Tensor, ...], dense: float) -> dict:
    """Finds by bisection the largest level within settings.max_loss of `dense`, with importance (layers, units).

    `texts` are blocks (n, time) to repair on and to look at. Returns the level found, and all points.
    """
    low, high, points = 0.0, 1.0, []
    for _ in range(6):
        settings = dataclasses.replace(run.settings, pruning_level=(low + high) / 2)
        try:
            points.append(try_level(run, model, importance, texts, settings))
            value = points[-1]["repaired"] or points[-1]["pruned"]
            print(f"level {settings.pruning_level:.3f}: validation perplexity {value:.2f}, {value / dense - 1:+.1%}")
            within = value <= dense * (1 + settings.max_loss)
        except UserError:  # out of reach: every layer keeps some
            within = False
        low, high = (settings.pruning_level, high) if within else (low, settings.pruning_level)
    return {"dense": dense, "found": low, "points": points}

# %% cellView="form" jupyter={"source_hidden": true}
# @title Points as a table and as a picture, recorded and shown
def words_for_point(point: dict) -> str:
    return f"{point['pruned']:.2f}" + (f" → {point['repaired']:.2f}" if point["repaired"] else "")

def points_table(points: list[dict]) -> str:
    """Kinds and strategies x levels as a Markdown table: perplexity after pruning → after repair."""
    levels, rows = sorted({point["level"] for point in points}), {}
    for point in points:
        rows.setdefault(f"{point['prune']}, {point['strategy']}", {})[point["level"]] = words_for_point(point)
    return markdown_table(["", *(f"{level:.0%}" for level in levels)],
                          [[name, *(row.get(level, "") for level in levels)] for name, row in rows.items()])

def draw_points(points: list[dict], dense: dict, limit: float | None = None) -> Figure:
    """Perplexity (log axis) against parameters and FLOPs: a line for each kind and strategy, dotted before repair.

    `dense` is the dense model as a point, where every line begins; `limit` is the share that it may lose.
    """
    figure = new_figure(11, 4.2)
    for axes, unit in zip(figure.subplots(1, 2, sharey=True), ("parameters", "flops_per_token")):
        for name in dict.fromkeys((point["prune"], point["strategy"]) for point in points):
            mine = [dense, *(point for point in points if (point["prune"], point["strategy"]) == name)]
            mine.sort(key=lambda point: point[unit])
            sizes = [point[unit] / 1e6 for point in mine]
            repaired = [point["repaired"] or point["pruned"] for point in mine]
            (line,) = axes.plot(sizes, repaired, marker="o", markersize=4, label=", ".join(name))
            axes.plot(sizes, [point["pruned"] for point in mine], color=line.get_color(), linestyle=":", linewidth=1)
        axes.plot(dense[unit] / 1e6, dense["pruned"], "o", color="black", markersize=8, label="dense")
        if limit:
            axes.axhline(dense["pruned"] * (1 + limit), color="#D55E00", linestyle="--", label=f"dense + {limit:.0%}")
        axes.set(xlabel={"parameters": "parameters, million"}.get(unit, "forward pass, MFLOP per token"), yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        if max(point["pruned"] for point in points) < 10 * dense["pruned"]:
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=9)
    figure.axes[0].set_ylabel("perplexity (log scale), dotted: before repair")
    return figure

# %% cellView="form" jupyter={"source_hidden": true}
# @title The sweep and the level: recorded, shown, and the model pruned as far as the loss allows
def dense_point(model, tokens: int, value: float) -> dict:
    """The dense model as a point: its size in texts of so many tokens, and its perplexity."""
    return predict_cost(model, torch.ones_like(get_gates(model)), tokens) | {"pruned": value, "repaired": None}

def run_sweep(run: Run, model, texts: tuple[torch.Tensor, ...]) -> None:
    """sweep() on blocks (n, time), recorded, also as a CSV file, and shown; a script ends with it."""
    dense = dense_point(model, texts[-1].shape[1], run.metrics["perplexity"]["dense"])
    with run.step("sweep"):
        points = run.metrics["sweep"] = sweep(run, model, texts, run.settings)
    show_markdown(f"{points_table(points)}\n\nTest perplexity after pruning → after repair; dense: "
                  f"{dense['pruned']:.2f}.\n\n{conditions(run.metrics)}")
    run.show(draw_points(points, dense), "sweep.png", width=1000)
    pandas.DataFrame(points).to_csv(run.folder / "sweep.csv", index=False)
    if not in_notebook():
        print(f"results: {run.finish()}")
        raise SystemExit

def prune_as_far(run: Run, model, tokenizer, importance: torch.Tensor, blocks: dict[str, torch.Tensor]):
    """The model pruned and repaired at the level of find_level(); blocks are (n, time), importance (layers, units)."""
    text, seen = evenly_spaced(blocks["train"], run.settings.repair), blocks["validation"][-16:]
    tested = blocks["test"][: run.settings.eval_blocks or None]
    with run.step("level"):
        with all_open(model):
            dense = perplexity(model, seen)
        found = run.metrics["level"] = find_level(run, model, importance, (text, seen), dense)
    run.settings = dataclasses.replace(run.settings, pruning_level=found["found"])
    start = dense_point(model, seen.shape[1], dense)
    run.show(draw_points(found["points"], start, run.settings.max_loss), "level.png", width=1000)
    close_units(run, model, tokenizer, gates_for(model, importance, run.settings), importance, tested)
    return repaired(run, model, tokenizer, text, tested)

# %%
if __name__ == "__main__":
    if settings.sweep:
        run_sweep(run, model, (calibration, repair_text, test_blocks))
    if settings.max_loss:
        pruned = prune_as_far(run, model, tokenizer, importance, blocks)
    if not (settings.sweep or settings.max_loss):
        print("The level stays as it is. SWEEP compares levels and strategies, --max-loss finds the largest level.")

# %% [markdown]
# <a name="13.-Compact"></a>
# ## 13. Compact
#
# So far the model is as large and as slow as before. Now the closed units are really removed, as tried in section 7: a
# closed head's rows of the query, key and value projections, its columns of the output projection, and a key/value
# head with the last head that reads it. What is left is the same function with fewer numbers. The cell below checks
# that the logits agree, counts what was saved, and measures the speed, alternating with the dense model.
#
# No configuration file can say "layer 3 has 7 heads", so pruned models usually cannot be opened again. Here the shapes
# that are left stand in the configuration, and a short file gives them to the model when it is opened (section 16).

# %%
def compact(model):
    """A copy of a gated model without the units that its gates close. Raises UserError where they cannot be cut out."""
    if not can_compact(model):
        raise UserError(f"the heads of {type(model).__name__} cannot be cut out ({why_not_compact(model)}): keep its "
                        "gates.")
    return cut(remove_gates(copy.deepcopy(model)), get_gates(model))

# %% cellView="form" jupyter={"source_hidden": true}
# @title What is gained: parameters, KV cache and FLOPs, counted; speed, measured alternately
@torch.no_grad()
def cache_bytes(model, tokens: int = 8) -> int:
    """Bytes of keys and values that the model keeps for each token it has read; 0 where it keeps none."""
    output = model.eval()(torch.zeros(1, tokens, dtype=torch.long, device=model.device), use_cache=True)
    cache = getattr(output, "cache", None) or getattr(output, "past_key_values", None)
    kept = [part for layer in getattr(cache, "layers", []) for name in ("keys", "values")
            if isinstance(part := getattr(layer, name, None), torch.Tensor)]
    return sum(part.nbytes for part in kept) // tokens

def tokens_per_second(models: dict, batch: torch.Tensor, training: bool = False, rounds: int = 5) -> dict[str, float]:
    """Median speed of models on ids (batch, time), alternating, after a warmup; training is forward and backward."""
    seconds = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            ids, start = batch.to(model.device), time.perf_counter()
            with torch.set_grad_enabled(training), number_format(model.device):
                output = model.train(training)(ids, use_cache=False)
            if training:
                nll(output.logits, ids).mean().backward()
                model.get_input_embeddings().weight.grad[0, 0].item()  # the last to be computed: waits for the device
            else:
                output.logits[0, -1, 0].item()
            seconds[name].append(time.perf_counter() - start)
            model.zero_grad(set_to_none=True)
            model.eval()
    return {name: round(batch.numel() / statistics.median(times[1:]), 1) for name, times in seconds.items()}

def size_table(sizes: dict[str, dict]) -> str:
    """Dense and compact model side by side, as a Markdown table."""
    titles = {"parameters": "parameters", "cache_bytes_per_token": "KV cache, bytes per token",
              "flops_per_token": "forward pass, FLOP per token", "forward_tokens_per_second": "forward pass, tokens/s",
              "training_tokens_per_second": "training, tokens/s"}
    pairs = {title: (sizes["dense"][key], sizes["pruned"][key]) for key, title in titles.items()}
    return markdown_table(["", "dense", "compact", "ratio"], [
        (title, f"{before:,.0f}", f"{after:,.0f}", f"{after / before:.3f}" if before else "-")
        for title, (before, after) in pairs.items()])

# %% cellView="form" jupyter={"source_hidden": true}
# @title Compacting, checked and recorded
def require_same_gates(model, pruned) -> None:
    """Raises UserError where heads were taken in section 10, and what was repaired before belongs to others."""
    if not torch.equal(get_gates(model), get_gates(pruned)):
        raise UserError("other heads were closed since the model was repaired: run section 11, and then this cell.")

def check_compact(run: Run, model, pruned, block: torch.Tensor) -> str:
    """Compacts `pruned`, compares logits on a block (1, time), and measures it beside the dense `model`; in words."""
    require_same_gates(model, pruned)
    run.metrics["size"], gates = {}, get_gates(model)
    if not can_compact(model):
        return f"{type(model).__name__} keeps its gates, and its size: {why_not_compact(model)}."

    def compute():
        costs = {"dense": torch.ones_like(gates), "pruned": gates}
        sizes = {name: predict_cost(model, table, block.shape[1]) for name, table in costs.items()}
        models = {"dense": remove_gates(sharing_copy(model)), "pruned": small}  # (gates would cost the dense one time)
        for kind in ("forward", "training"):
            for name, speed in tokens_per_second(models, block, kind == "training").items():
                sizes[name][f"{kind}_tokens_per_second"] = speed
        for name, each in models.items():
            sizes[name]["cache_bytes_per_token"] = cache_bytes(each)
        return sizes

    with run.step("compact"):
        small = compact(pruned)
        difference = run.metrics["compact_difference"] = largest_difference(pruned, small, block)
        if difference > tolerated(model):
            raise RunError(f"the compact model differs from the gated one by {difference:.1e}: please report this, "
                           "naming the model")
        run.metrics["size"] = run.cached("size", (model, pruned, block), compute)
        for stage in {"pruned", "repaired"} & set(run.metrics["parameters"]):
            run.metrics["parameters"][stage] = small.num_parameters()
    return (f"{size_table(run.metrics['size'])}\n\nLargest difference to the gated logits: {difference:.0e} of the "
            "largest logit.")

# %%
if __name__ == "__main__":
    show_markdown(check_compact(run, model, pruned, test_blocks[:1]))

# %% [markdown]
# <a name="14.-Fine-tune"></a>
# ## 14. Fine-tune
#
# The remaining units can learn to make up for the closed ones. The loop of section 5 trains the compact model: a
# closed gate lets no gradient through, so with gates it would be the same training, only slower. `MAX_STEPS =
# "auto"` is one pass over the training text with an accelerator, and 200 steps on a processor.
#
# With `distillation`, part of the loss compares with the dense model's predictions, not with the text's next token
# ([Hinton et al. 2015](https://arxiv.org/abs/1503.02531), for pruned models
# [Muralidharan et al. 2024](https://arxiv.org/abs/2407.14679)). With `reopen_heads` the first half is trained with
# gates; then heads are scored again, all open, and chosen again, so that a closed one may come back.
#
# Training all weights takes sixteen bytes for each of them. A model that does not fit into memory (section 5
# says so) keeps its weights in 16 bits, frozen, and learns small **adapters** beside them (LoRA,
# [Hu et al. 2021](https://arxiv.org/abs/2106.09685)), which are merged into the weights at the end: `--train lora`.

# %%
def with_steps(settings: Settings, blocks: dict[str, torch.Tensor], device: torch.device) -> Settings:
    """Settings with `max_steps` resolved, for blocks (n, time): one pass, or on a processor 200 steps."""
    one_pass = math.ceil(len(blocks["train"]) / settings.batch_size)
    return dataclasses.replace(settings, max_steps=settings.max_steps or (200 if device.type == "cpu" else one_pass))

def fine_tune_pruned(run: Run, model, pruned, blocks: dict[str, torch.Tensor]):
    """`pruned`, compacted where it can be and trained on blocks (n, time); `model` is the gated dense one."""
    require_same_gates(model, pruned)
    settings = run.settings = with_steps(run.settings, blocks, run.device)
    pruned = sharing_copy(pruned)  # it may be `model` itself, whose gates are opened below
    run.metrics.pop("heads_after_fine_tuning", None)
    with run.step("fine-tune"), all_open(model):
        run.dense_validation = perplexity(model, blocks["validation"][:16])
        if settings.reopen_heads:
            half = dataclasses.replace(settings, max_steps=max(1, settings.max_steps // 2))
            pruned = fine_tuned(run, "first_half", copy.deepcopy(pruned), blocks, half, model)
            reopen_heads(run, pruned, evenly_spaced(blocks["train"], settings.calibration_blocks))
            rest, seed = max(1, settings.max_steps - half.max_steps), (settings.seed + 1) % 2**32  # for other blocks
            settings = dataclasses.replace(settings, max_steps=rest, seed=seed)
        start = compact(pruned) if can_compact(model) else copy.deepcopy(pruned)
        with waiting_in_ram(*([] if settings.distillation else [model, pruned])):
            tuned = fine_tuned(run, "fine_tuned", start, blocks, settings, model)
    return rounded(tuned, saved_format(run))  # so that what is measured is what is saved

# %% cellView="form" jupyter={"source_hidden": true}
# @title Adapters (LoRA), for models whose weights do not all fit into memory with what training needs
LORA = {"rank": 32, "rate": 10}  # and their learning rate, as so many times the setting

def add_adapters(model, seed: int):
    """Freezes a model and adds to each of its linear layers W a product BA of low rank (Hu et al. 2021, arXiv
    2106.09685), in float32; but not where gates stand in front, which would not reach it. Returns peft's model."""
    import peft  # takes seconds

    torch.manual_seed(seed)
    head = model.get_output_embeddings()
    paths = [path for path, part in model.named_modules() if isinstance(part, (torch.nn.Linear, Conv1D))
             and part is not head and not hasattr(part, "gates")]
    turned = any(isinstance(model.get_submodule(path), Conv1D) for path in paths)  # its weight is (inputs, outputs)
    config = peft.LoraConfig(r=LORA["rank"], lora_alpha=LORA["rank"], target_modules=paths, fan_in_fan_out=turned)
    return peft.get_peft_model(model, config)

def train_all_or_adapters(run: Run, name: str, model, blocks: dict, settings: Settings, teacher=None) -> dict:
    """train() on blocks (n, time), of all weights, or of adapters, merged at the end; its record."""
    if settings.train != "lora":
        return train(run, name, model, blocks, settings, teacher)
    adapted = add_adapters(model, settings.seed)
    settings = dataclasses.replace(settings, learning_rate=settings.learning_rate * LORA["rate"])
    record = train(run, name, model, blocks, settings, teacher)
    adapted.merge_and_unload()  # in place; every sum in float32, as the adapters are
    model.requires_grad_(True)
    return record

@contextlib.contextmanager
def waiting_in_ram(*models):
    """Within it models do not take a GPU's memory."""
    places = [(model, model.device) for model in models if model.device.type == "cuda"]
    for model, _ in places:
        model.to("cpu")
    try:
        yield
    finally:
        for model, device in places:
            move(model, device)

# %% cellView="form" jupyter={"source_hidden": true}
# @title Trained weights kept with the run, reopened heads, and the dense control
def fine_tuned(run: Run, name: str, model, blocks: dict[str, torch.Tensor], settings: Settings, teacher=None):
    """The model, after train() on blocks (n, time), once: where it was done before, with the weights that were kept."""
    def compute():
        record = train_all_or_adapters(run, name, model, blocks, settings, teacher)
        return dict(model.named_parameters()), record

    depends = (model, blocks["train"], blocks["validation"][:16], training_options(settings))
    weights, run.metrics["training"][name] = run.cached(name, depends, compute)
    model.load_state_dict(weights, strict=False)
    for file in run.state.glob(f"training-{name}-*"):
        file.unlink()
    return model.eval()

def reopen_heads(run: Run, pruned, calibration: torch.Tensor) -> None:
    """Scores a gated model again on blocks (n, time), all open, and closes what is least important now."""
    before = get_gates(pruned)
    importance = scores_of(run, pruned, calibration, run.settings)
    set_gates(pruned, gates_for(pruned, importance, run.settings))
    came_back = ((before == 0) & (get_gates(pruned) != 0)).nonzero().tolist()
    now = describe_units(pruned, get_gates(pruned))["heads"]
    run.metrics["heads_after_fine_tuning"] = now | {"came_back": came_back}
    print(f"{len(came_back)} of {run.metrics['heads']['closed']} closed heads came back [layer, head]: {came_back}")

def fine_tune_dense(run: Run, model, tokenizer, blocks: dict[str, torch.Tensor], test_blocks: torch.Tensor) -> None:
    """Fine-tunes the dense model on blocks (n, time) with the same budget, where that is wanted, and measures it."""
    run.metrics["training"].pop("dense_fine_tuned", None)
    slow = run.device.type == "cpu" and model.num_parameters() > 50e6
    if run.settings.control == "no" or (run.settings.control == "auto" and slow):
        return print("No control: for so large a model it takes long without an accelerator. --control runs it."
                     if slow else "No control.")
    with run.step("fine-tune control"):
        settings = with_steps(run.settings, blocks, run.device)
        start = remove_gates(copy.deepcopy(model))
        with waiting_in_ram(model):
            tuned = fine_tuned(run, "dense_fine_tuned", start, blocks, settings)
        tuned = rounded(tuned, saved_format(run))
    measure(run, "dense_fine_tuned", tuned, tokenizer, test_blocks)

# %%
if __name__ == "__main__":
    tuned = None  # lets the last one go, if this cell is run again
    tuned = fine_tune_pruned(run, model, pruned, blocks)
    measure(run, "fine_tuned", tuned, tokenizer, test_blocks)
# %% [markdown]
# **The control.** Fine-tuning on text like the test text helps *any* model. To know what pruning cost, the
# pruned model has to be compared with the dense one after the same number of steps on the same text.
# %%
if __name__ == "__main__":
    fine_tune_dense(run, model, tokenizer, blocks, test_blocks)
# %% [markdown]
# <a name="15.-Compare"></a>
# ## 15. Compare
#
# The numbers side by side. *Pruned + fine-tuned* against *dense + fine-tuned* is what pruning really cost, at
# the same number of steps.
# %% cellView="form" jupyter={"source_hidden": true}
# @title The comparison as a table, as a picture, and the report
def require_fine_tuned(metrics: dict) -> None:
    """Raises UserError where the heads were pruned anew and nothing was fine-tuned since."""
    if "fine_tuned" not in metrics["perplexity"]:
        raise UserError("the model was pruned after it was fine-tuned: run sections 9 to 14 again, and then this cell.")

def comparison(metrics: dict) -> str:
    """The comparison as a Markdown table."""
    dense, bits = metrics["perplexity"]["dense"], getattr(torch, metrics["model"]["saved_in"]).itemsize
    rows = []
    for stage, value in metrics["perplexity"].items():
        parameters = metrics["parameters"][stage]
        others = [words_for_ability(name, metrics[name].get(stage)) for name in ABILITIES]
        rows.append([STAGES[stage], f"{parameters / 1e6:,.2f} M", f"{parameters * bits / 1e6:,.1f}", f"{value:.2f}",
                     f"{value / dense - 1:+.1%}", *others])
    head = ["model", "parameters", "MB as saved", "test perplexity", "against dense", *ABILITIES.values()]
    before = metrics["repetition"].get("dense")
    more = [STAGES[stage] for stage, share in metrics["repetition"].items() if before and share > before + 0.1]
    warning = f"\n\nRepeats itself clearly more than the dense model: {', '.join(more)}." if more else ""
    return f"{words_for_closed(metrics)} closed.\n\n{markdown_table(head, rows)}{warning}"

def draw_dashboard(metrics: dict) -> Figure:
    """Perplexity of every stage, as the distance from the dense model, and of training."""
    figure, values = new_figure(12, 4), metrics["perplexity"]
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    figure.suptitle(f"{words_for_closed(metrics)} closed by {metrics['settings']['strategy']}", fontweight="bold")
    colors = {stage: f"C{number}" for number, stage in enumerate([*STAGES, "first_half"])}
    left.axvline(values["dense"], color="#999999", linestyle="--", linewidth=1)
    for row, (stage, value) in enumerate(values.items()):
        left.plot([values["dense"], value], [row, row], "o-", color=colors[stage], linewidth=3, markevery=[1])
        left.annotate(f"{value:.1f}", (value, row), (0, 8), textcoords="offset points", ha="center", fontsize=9)
    left.set(xscale="log", xlabel="test perplexity (log scale, lower is better)", yticks=range(len(values)),
             yticklabels=[STAGES[stage] for stage in values], ylim=(len(values) - 0.5, -0.8))
    if max(values.values()) < 10 * min(values.values()):
        left.xaxis.set_major_locator(MaxNLocator(6))
        left.xaxis.set_minor_locator(NullLocator())
    left.xaxis.set_major_formatter("{x:g}")
    left.margins(x=0.12)
    for stage, record in metrics["training"].items():
        right.plot(*zip(*record["history"]["perplexity"]), "o-", markersize=3, color=colors[stage],
                   label=STAGES.get(stage, "the first half, with gates"))
    right.set(xlabel="step", ylabel="validation perplexity")
    right.grid(alpha=0.3)
    right.legend(frameon=False, fontsize=8)
    return figure

def report(metrics: dict) -> str:
    """What was done and what came of it, in Markdown: the text of report.md and of every model card."""
    heads, neurons = metrics.get("heads_after_fine_tuning", metrics["heads"]), metrics["neurons"]
    left = {"heads left": heads["open_per_layer"]} | ({"neurons left": neurons["open_per_layer"]} if neurons else {})
    layers = "\n".join(f"{name}, layer by layer: {', '.join(map(str, row))}.\n" for name, row in left.items())
    closed = f"Closed heads as [layer, head]: {heads['closed_list']}."
    samples = [f"**{STAGES[stage]}**\n\n> " + text.replace("\n", "\n> ") for stage, text in metrics["samples"].items()]
    sizes = [size_table(metrics["size"])] if metrics["size"] else []
    parts = [comparison(metrics), conditions(metrics), *sizes, layers, closed, "## Samples", *samples]
    return "\n\n".join(parts) + "\n"

# %%
if __name__ == "__main__":
    require_fine_tuned(run.metrics)
    show_markdown(comparison(run.metrics) + "\n\n" + conditions(run.metrics))
    run.show(draw_dashboard(run.metrics), "dashboard.png", width=1000)

# %% [markdown]
# **Talk to it.** The dense, the pruned and the fine-tuned model side by side, each with its most likely words; a chat
# model gets your text as a message. Interrupt the kernel to stop the one that writes.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Talk to it: a prompt, and what each model writes
def talk_box(models: dict, tokenizer, prompt: str, new_tokens: int = 100) -> widgets.VBox:
    """A prompt, a button, and what models (by name) write then, word by word, side by side."""
    box, button = widgets.Textarea(prompt, layout=widgets.Layout(width="98%")), widgets.Button(description="Write")
    columns = [widgets.Output(layout=widgets.Layout(width=f"{98 // len(models)}%")) for _ in models]

    def write(_):
        words, is_chat = box.value, bool(tokenizer.chat_template)
        if is_chat:
            turns = [{"role": "user", "content": words}]
            words = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(words, return_tensors="pt", add_special_tokens=not is_chat)["input_ids"]
        for column, (name, model) in zip(columns, models.items()):
            with column, contextlib.suppress(KeyboardInterrupt):
                column.clear_output()
                print(f"{name}:" if ids.numel() else "Write a prompt first.")
                if ids.numel():
                    stream = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
                    greedy(model, ids.to(model.device), stream, max_new_tokens=new_tokens)

    button.on_click(write)
    return widgets.VBox([box, button, widgets.HBox(columns)])

# %%
def show_talk(run: Run, model, pruned, tuned, tokenizer) -> None:
    """talk_box(), in a notebook: the dense model, the pruned one, repaired if it was, and the fine-tuned one."""
    if in_notebook():
        models = {"dense": remove_gates(sharing_copy(model)), "pruned": pruned, "pruned + fine-tuned": tuned}
        display(talk_box({name: that_writes(each) for name, each in models.items()}, tokenizer, run.settings.prompt))

if __name__ == "__main__":
    show_talk(run, model, pruned, tuned, tokenizer)

# %% [markdown]
# <a name="16.-Save-and-download"></a>
# ## 16. Save and download
#
# The **compact** model is saved so that anyone can open it, without this notebook: weights as safetensors,
# configuration, tokenizer, a model card, and `modeling_pruned.py`, eighty lines that give the family's own model the
# shapes which the configuration lists. Where all layers have lost the same share and the family's own
# configuration can say so (`uniform`), no code is needed: the folder is an ordinary, smaller checkpoint.
#
# Some tools allow no code at all. For them there is the **zeroed** form, the full-sized model with the
# gates multiplied into its output projections: it opens without code and has the same logits. What the gates
# erased is kept beside it, so that `load_gated` can open any head again.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Saving the zeroed form, and opening it again with its gates
@torch.no_grad()
def expand(small, model):
    """A copy of the gated `model` with the weights of `small`, which was cut from it; what was cut keeps its own."""
    full, places, weights = copy.deepcopy(model), remove_gates(copy.deepcopy(model)), dict(small.named_parameters())
    for parameter in places.parameters():  # every number says where it stands, and is then cut with the rest
        numbers = torch.arange(parameter.numel(), dtype=torch.int32, device=parameter.device)
        parameter.requires_grad_(False).data = numbers.view_as(parameter)
    for name, place in cut(places, small.kept).named_parameters():
        full.get_parameter(name).view(-1)[place.flatten().long()] = weights[name].flatten()
    set_gates(full, small.kept)
    return full

@torch.no_grad()
def save_gated(model, tokenizer, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Saves a gated model as a plain checkpoint, with its gates and what they erased in gates.safetensors."""
    plain = move(copy.deepcopy(model), "cpu")
    erased = {"gates": get_gates(plain)}
    for number, units in enumerate(all_units(plain)):
        gates = units.projection.gates
        erased[f"output_weight.{number}"] = units.output_weight[gates != 1].clone().contiguous()
        units.output_weight.mul_(gates[:, None, None])
    remove_gates(plain).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "gates").mkdir(exist_ok=True)  # not among the model's own files: some servers load all of those
    save_file(erased, folder / "gates/gates.safetensors", {"prunes": getattr(plain, "prunes", "heads")})

@torch.no_grad()
def load_gated(folder: Path, device: str | torch.device = "cpu"):
    """Tokenizer and model that save_gated wrote, with its gates, every one of which can be opened again."""
    tokenizer, model = load_model(str(folder), torch.device(device))
    with safe_open(next(Path(folder).rglob("gates.safetensors")), "pt") as stored:
        model.prunes = (stored.metadata() or {}).get("prunes", "heads")
        set_gates(model, stored.get_tensor("gates"))
        for number, units in enumerate(all_units(model)):
            units.output_weight[units.projection.gates != 1] = stored.get_tensor(f"output_weight.{number}").to(device)
    return tokenizer, model

# %% [markdown]
# llama.cpp, and Ollama and LM Studio with it, reads **GGUF** files. One of its architectures, `deci`, is Llama
# with other numbers of heads and neurons in every layer, so it has a place for what is left here: the compact model
# in one file, with its tokenizer and chat template.

# %% cellView="form" jupyter={"source_hidden": true}
# @title A compact model in llama.cpp's format
def attention_parts(attention, size: int, normed: bool) -> tuple[dict, int, int]:
    """({name: weight or bias}, heads, key/value heads) of a cut attention module; `normed`: queries and keys are."""
    output, heads, parts = attention.o_proj, attention.o_proj.in_features // size, {}
    names, (queries, keys, values) = zip(*find_rows(attention, heads, size))  # rows (heads, size) of each
    if hasattr(attention, "key_of"):  # it wants equally many readers of each key: one for each query head
        keys, values = keys[attention.key_of], values[attention.key_of]
    if not normed:  # transformers turns the halves of a head by its position, llama.cpp neighbours
        queries, keys = (rows.unflatten(1, (2, -1)).mT.flatten(1) for rows in (queries, keys))
    for kind in ("weight", "bias"):
        parts[f"output.{kind}"] = getattr(output, kind)
        if getattr(getattr(attention, names[0]), kind) is not None:
            q, k, v = (getattr(getattr(attention, name), kind).cpu()[rows.flatten()]
                       for name, rows in zip(names, (queries, keys, values)))
            own = {"qkv": torch.cat([q, k, v])} if normed else {"q": q, "k": k, "v": v}  # `openelm` has one matrix
            parts |= {f"{name}.{kind}": part for name, part in own.items()}
    if normed:
        parts |= {"q_norm.weight": attention.q_norm.weight, "k_norm.weight": attention.k_norm.weight}
    return parts, heads, len(keys)

@torch.no_grad()
def in_words_of_llama_cpp(small) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, numbers) of a compact model of LLAMA_CPP: a state_dict and a file's numbers, by llama.cpp's names."""
    base, config = small.base_model, small.config
    size, theta = getattr(config, "head_dim", None), config.rope_parameters["rope_theta"]
    size = size or config.hidden_size // config.num_attention_heads
    tensors = {"token_embd.weight": base.embed_tokens.weight, "output_norm.weight": base.norm.weight}
    if small.lm_head.weight is not base.embed_tokens.weight:
        tensors["output.weight"] = small.lm_head.weight
    factors = theta ** -(torch.arange(0, size, 2).double() / size) / base.rotary_emb.inv_freq.cpu().double()
    if (factors - 1).abs().max() > 1e-4:  # Llama 3's and linear scaling
        tensors["rope_freqs.weight"] = factors.float()
    normed = hasattr(base.layers[0].self_attn, "q_norm")
    window = getattr(config, "sliding_window", None)  # beyond it llama.cpp's plain attention would read too much
    numbers = {"block_count": len(base.layers), "embedding_length": config.hidden_size, "rope_freq_base": theta,
               "vocab_size": len(base.embed_tokens.weight), "layer_norm_rms_eps": config.rms_norm_eps,
               "context_length": min(config.max_position_embeddings, window or config.max_position_embeddings),
               **dict.fromkeys(("key_length", "value_length", "rope_dimension_count"), size),
               "head_count": [], "head_count_kv": [], "feed_forward_length": []}
    for layer, block in enumerate(base.layers):
        parts, heads, shared = attention_parts(block.self_attn, size, normed)
        parts = {f"attn_{name}": part for name, part in parts.items()}
        parts |= {"attn_norm.weight": block.input_layernorm.weight,
                  "ffn_norm.weight": block.post_attention_layernorm.weight}
        down = block.mlp.down_proj
        inputs = [part for part in block.mlp.children() if isinstance(part, torch.nn.Linear) and part is not down]
        for kind in ("weight", "bias"):
            if getattr(down, kind) is not None:
                gate, up = torch.cat([getattr(part, kind) for part in inputs]).chunk(2)
                parts |= {f"ffn_gate.{kind}": gate, f"ffn_up.{kind}": up, f"ffn_down.{kind}": getattr(down, kind)}
        tensors |= {f"blk.{layer}.{name}": part for name, part in parts.items() if part is not None}
        numbers["head_count"].append(heads)
        numbers["head_count_kv"].append(shared)
        numbers["feed_forward_length"].append(down.in_features)
    return {name: part.detach().cpu() for name, part in tensors.items()}, numbers

# %% cellView="form" jupyter={"source_hidden": true}
# @title The tokenizer of a .gguf file
def write_tokenizer(writer, tokenizer, source: str, vocabulary: int) -> None:
    """The fields tokenizer.*: those of a .gguf file `source`, else made from a Hugging Face tokenizer."""
    if source.endswith(".gguf"):
        for name, field in gguf.GGUFReader(source).fields.items():
            if name.startswith("tokenizer.") or name == "general.license":
                kinds = field.types
                writer.add_key_value(name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
        return
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    kinds = dict.fromkeys(words, gguf.TokenType.NORMAL)
    for number, token in tokenizer.added_tokens_decoder.items():
        kinds[number] = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    room = range(vocabulary)  # a model may have room for more than its tokenizer knows
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
    writer.add_token_list([words.get(number, f"[PAD{number}]") for number in room])
    writer.add_token_types([kinds.get(number, gguf.TokenType.UNUSED) for number in room])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocabulary)
    special.add_special_token["bos"] = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    special.chat_template = special.chat_template or tokenizer.chat_template
    special.add_to_gguf(writer, quiet=True)

# %% cellView="form" jupyter={"source_hidden": true}
# @title Writing a .gguf file
def write_gguf(path: Path, small, tokenizer, source: str, words: dict) -> None:
    """Writes a compact model. `source`: the tokenizer's model or file; `words`: format, name, base and description."""
    tensors, numbers = in_words_of_llama_cpp(small)
    lists = {name: number for name, number in numbers.items() if isinstance(number, list)}
    if alike := all(len(set(number)) == 1 for number in lists.values()):
        numbers |= {name: number[0] for name, number in lists.items()}
    normed, biased = (any(name.endswith(end) for name in tensors) for end in ("q_norm.weight", ".bias"))
    plain, bits = alike and not biased, words["format"].upper()
    writer = gguf.GGUFWriter(path, "openelm" if normed else "llama" if plain else "deci")  # transformers reads `llama`
    about = gguf.Metadata(name=words["name"], description=words["description"], base_models=[{"name": words["base"]}])
    about.set_gguf_meta_model(writer)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if bits == "F32" else f"MOSTLY_{bits}"])
    for name, number in numbers.items():
        getattr(writer, f"add_{name}")(number)
    write_tokenizer(writer, tokenizer, source, numbers["vocab_size"])
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType["F32" if tensor.ndim == 1 else bits]
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().contiguous().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

def save_gguf(run: Run, small, tokenizer, folder: Path) -> None:
    """Writes a compact model into a folder as .gguf, in 16 bits: those that the weights came in, else f16."""
    name, bits = bare_name(run.metrics["settings"]["model"]), "bf16" if saved_format(run) == torch.bfloat16 else "f16"
    words = {"format": bits, "name": f"{name}, pruned", "base": name, "description":
             f"{words_for_closed(run.metrics)} removed from {name}, then fine-tuned, by PruningAndFineTuningColab"}
    folder.mkdir()
    file = folder / f"{name.split('/')[-1].removesuffix('.gguf')}-pruned.gguf"
    write_gguf(file, small, tokenizer, run.settings.model, words)

# %% cellView="form" jupyter={"source_hidden": true}
# @title The model card
NOTES = {
    "code": "`trust_remote_code=True` runs `modeling_pruned.py`, which is in this folder: read it first. Such folders "
            "were tried with lm-evaluation-harness, peft, trl, mergekit, ONNX and `torch.compile`. llama.cpp's "
            "converter and continuous batching want a folder made with `--uniform`, or the zeroed form.",
    "zeroed": "What is closed has output weights of zero: a training that does not know it fills them again.",
}

def model_card(metrics: dict, folder: Path) -> str:
    """The README.md of a saved model: metadata that the Hugging Face hub reads, how to open it, and the report."""
    name, is_gguf = bare_name(metrics["settings"]["model"]), any(folder.glob("*.gguf"))
    zeroed, code = (folder / "gates").exists(), (folder / "modeling_pruned.py").exists()
    on_hub = name == metrics["settings"]["model"] and name != "demo"
    data = huggingface_hub.ModelCardData(base_model=name if on_hub else None, pipeline_tag="text-generation",
                                         library_name=None if is_gguf else "transformers",
                                         tags=["attention-head-pruning", *["gguf"] * is_gguf])
    trust = ", trust_remote_code=True" if code else ""
    open_it = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder"{trust})
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{trust})
```

To evaluate it: `lm_eval run --model hf --model_args pretrained=FOLDER{trust.replace(" ", "")} --tasks piqa`"""
    for file in folder.glob("*.gguf"):
        open_it = f"""```sh
llama-cli -m {file.name}
echo "FROM ./{file.name}" > Modelfile && ollama create pruned -f Modelfile && ollama run pruned
```"""
    note = next((NOTES[kind] for kind, there in (("zeroed", zeroed), ("code", code)) if there), "")
    title = f"# {name}, {words_for_closed(metrics)} {'closed' if zeroed else 'removed'}"
    made = f"Made from `{name}` with PruningAndFineTuningColab."
    return "\n\n".join([f"---\n{data.to_yaml()}\n---", title, made, open_it, note, report(metrics)])

# %% cellView="form" jupyter={"source_hidden": true}
# @title The folders, each opened again and compared; the report, and the download
def save_models(run: Run, tuned, model, tokenizer, block: torch.Tensor) -> None:
    """Saves `tuned`, made from the gated `model`, in the forms wanted; each is opened again, on a block (1, time)."""
    is_compact, dtype = hasattr(tuned, "kept"), saved_format(run)
    forms = [form for form in ("compact", "gguf", "zeroed") if form in run.settings.save_model.split()]
    if forms and not is_compact:
        print(f"{type(tuned).__name__} is not compact, so it is saved in the zeroed form, with its gates.")
        forms = ["zeroed"]
    save = {"gguf": lambda folder: save_gguf(run, tuned, tokenizer, folder),
            "compact": lambda folder: save_compact(tuned, tokenizer, folder, dtype),
            "zeroed": lambda path: save_gated(expand(tuned, model) if is_compact else tuned, tokenizer, path, dtype)}
    run.metrics |= {"reopened_difference": {}, "file_bytes": {}}
    for form in forms:
        folder = run.folder / f"model-{form}"
        shutil.rmtree(folder, ignore_errors=True)  # from an earlier run of this cell
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, folder, ignore_errors=True)  # a folder that is not whole is removed
            save[form](folder)
            (folder / "README.md").write_text(model_card(run.metrics, folder), encoding="utf-8")
            undo.pop_all()
        size = sum(path.stat().st_size for kind in ("model*.safetensors", "*.gguf") for path in folder.glob(kind))
        run.metrics["file_bytes"][form], words = size, ""
        if form != "gguf":
            difference = largest_difference(tuned, move(reopen(folder, dtype=tuned.dtype), run.device), block)
            run.metrics["reopened_difference"][form] = difference
            words = f"; opened again, logits differ by {difference:.0e} of the largest"
            if difference > tolerated(model):
                raise RunError(f"{folder} does not open as the model that was saved: please report this and the model")
        print(f"{folder}: {size / 1e6:.1f} MB{words}")

def offer_download(archive: Path) -> None:
    """Downloads a file in Colab, if it is not on Drive; elsewhere says where it is, with a link in a notebook."""
    if "google.colab" in sys.modules and not archive.is_relative_to("/content/drive"):
        sys.modules["google.colab"].files.download(str(archive))
    elif in_notebook():
        # Not IPython's FileLink: JupyterLab would open the zip as a text.
        address = urllib.parse.quote(os.path.relpath(archive))
        display(HTML(f'<a href="{address}" download>{html.escape(archive.name)}</a>'))
    print(f"results: {archive} ({archive.stat().st_size / 2**20:.1f} MB)")

def hand_over(run: Run, tuned, model, tokenizer, block: torch.Tensor) -> None:
    """save_models(), with a block (1, time) to compare on, the report and the download; the last step of a run."""
    require_fine_tuned(run.metrics)
    with run.step("save model"):
        save_models(run, tuned, model, tokenizer, block)
        title = f"# {bare_name(run.metrics['settings']['model'])}, {words_for_closed(run.metrics)} closed\n\n"
        pictures = "![dashboard](dashboard.png)\n\n![units](heads.png)\n\n![fine-tuning](fine_tuned.png)\n\n"
        (run.folder / "report.md").write_text(title + pictures + report(run.metrics), encoding="utf-8")
    offer_download(run.finish())

# %% [markdown]
# Before it is handed over, the folder is opened again as any user would open it, and must give the same
# logits. In Colab this cell then downloads everything as one zip file; elsewhere it says where that is.
# %%
if __name__ == "__main__":
    hand_over(run, tuned, pruned, tokenizer, test_blocks[:1])

