# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     name: PruningAndFineTuningColab.ipynb
#     provenance: []
#     toc_visible: true
#   jupytext:
#     cell_metadata_filter: -all
#     formats: ipynb,py:percent
#     notebook_metadata_filter: accelerator,colab,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Prune and fine-tune a language model
#
# A transformer reads with many **attention heads** at once, and a trained model does not need all of them. This
# notebook loads a causal language model, scores its heads, closes the least important ones, repairs what is left without training, cuts the
# closed heads out, fine-tunes, and tells you honestly what it cost and what came back.
#
# Run the cells from top to bottom. With nothing changed you get GPT-2 on WikiText-2; without a network you get a
# small demo model that is trained on the spot. Each section says why it is there, defines what it needs, and then
# does it: the cells that *do* something are short, and running one again is always safe.
#
# The same file is a script: `python PruningAndFineTuningColab.py --help`.

# %% [markdown]
# ## 1. Setup
#
# Colab already has almost everything. The next cell installs what is missing and leaves the rest, PyTorch
# above all, as it is.

# %%
import builtins
import importlib.util
import subprocess
import sys

NEEDED = ["torch", "transformers", "datasets", "accelerate", "matplotlib", "ipywidgets", "psutil", "gguf"]


def in_notebook() -> bool:
    """True in Jupyter and Colab, False in a plain Python process."""
    return "ipykernel" in sys.modules and hasattr(builtins, "__IPYTHON__")


if __name__ == "__main__" and in_notebook():
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)

# %%
import os

import torch

if torch.cuda.is_available():
    os.environ.setdefault("USE_TORCH_XLA", "0")  # on a machine that has both, the Trainer would leave the GPU idle

# %%
import argparse
import ast
import base64
import collections
import contextlib
import contextvars
import copy
import csv
import ctypes
import dataclasses
import datetime
import difflib
import errno
import functools
import gc
import hashlib
import html
import io
import json
import linecache
import math
import operator
import platform
import re
import shutil
import statistics
import textwrap
import threading
import time
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace

import accelerate
import datasets
import huggingface_hub
import ipywidgets as widgets
import matplotlib
import psutil
import tokenizers
import transformers
from accelerate.utils import find_executable_batch_size, is_torch_xla_available
from huggingface_hub.errors import StrictDataclassError
from matplotlib.colors import PowerNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.pytorch_utils import Conv1D


class UserError(Exception):
    """A mistake in the input. Its message names the bad value, what is allowed, and what to do."""


class RunError(Exception):
    """Something went wrong that is nobody's mistake. Its message says what, and what to do."""


class OutOfStep(RunError):
    """One of several processes cannot go on as the others do."""


def first_sentence(error: Exception) -> str:
    """The first sentence of a library's message, for one of ours."""
    return re.split(r"(?<=\w)\.\s|\n", str(error).strip())[0].rstrip(".") or type(error).__name__


# %% [markdown]
# ## 2. Settings
#
# Everything you may want to change is here. In Colab the cell below is a form; in a shell the same settings are
# options (`PRUNING_LEVEL` is `--pruning-level`). Start with `STRATEGY` and `PRUNING_LEVEL`: 0.3 closes 30 % of the
# heads and is a good first try.

# %%
# @title Settings
MODEL = "auto"  # @param ["auto", "demo", "gpt2", "facebook/opt-125m", "EleutherAI/pythia-160m", "HuggingFaceTB/SmolLM2-135M"] {allow-input: true}
REVISION = ""  # @param {type: "string"}
STRATEGY = "learned"  # @param ["learned", "fisher", "gradient", "entropy", "magnitude", "random", "entropy-literal"]
PRUNING_LEVEL = 0.3  # @param {type: "slider", min: 0, max: 0.9, step: 0.05}
MIN_HEADS = 1  # @param {type: "integer"}
ROUNDS = 1  # @param {type: "integer"}
GATE_STEPS = 240  # @param {type: "integer"}
REPAIR = True  # @param {type: "boolean"}
REPAIR_BLOCKS = 64  # @param {type: "integer"}
UNIFORM = False  # @param {type: "boolean"}
REOPEN_HEADS = False  # @param {type: "boolean"}

# @markdown **Text**
DATASET = "auto"  # @param {type: "string"}
DATASET_CONFIG = ""  # @param {type: "string"}
TRAIN_FILE = ""  # @param {type: "string"}
VALIDATION_FILE = ""  # @param {type: "string"}
TEST_FILE = ""  # @param {type: "string"}
BLOCK_LENGTH = 512  # @param {type: "integer"}
CALIBRATION_BLOCKS = 32  # @param {type: "integer"}
EVAL_BLOCKS = 64  # @param {type: "integer"}
PROMPT = "The history of the city began"  # @param {type: "string"}

# @markdown **Fine-tuning**
MAX_STEPS = 200  # @param {type: "integer"}
EPOCHS = 1.0  # @param {type: "number"}
LEARNING_RATE = 1e-4  # @param {type: "number"}
WARMUP = 0.1  # @param {type: "number"}
WEIGHT_DECAY = 0.01  # @param {type: "number"}
DISTILLATION = 0.0  # @param {type: "slider", min: 0, max: 1, step: 0.1}
PATIENCE = 3  # @param {type: "integer"}
BATCH_SIZE = 4  # @param {type: "integer"}
GRADIENT_CHECKPOINTING = False  # @param {type: "boolean"}
FSDP = False  # @param {type: "boolean"}
CONTROL = "auto"  # @param ["auto", "yes", "no"]

# @markdown **Sweep**
SWEEP = False  # @param {type: "boolean"}
SWEEP_STRATEGIES = "learned fisher gradient entropy magnitude random"  # @param {type: "string"}
SWEEP_LEVELS = "0.1 0.3 0.5"  # @param {type: "string"}

# @markdown **Machine and results**
DEVICE = "auto"  # @param ["auto", "cuda", "tpu", "mps", "cpu"]
PRECISION = "auto"  # @param ["auto", "fp32", "fp16", "bf16"]
SEED = 0  # @param {type: "integer"}
SAVE_MODEL = "compact"  # @param ["compact", "zeroed", "both", "no"]
OUTPUT_DIR = "results"  # @param {type: "string"}
SAVE_TO_DRIVE = False  # @param {type: "boolean"}
RESUME = "auto"  # @param ["auto", "no"] {allow-input: true}
OFFLINE = False  # @param {type: "boolean"}
TRUST_REMOTE_CODE = False  # @param {type: "boolean"}

# %% [markdown]
# The form becomes one checked, unchangeable object, so that a typo is found now and not after ten minutes of
# computing. The help texts say what each setting means and what it may be.

# %%
STRATEGY_NAMES = ("learned", "fisher", "gradient", "entropy", "magnitude", "random", "entropy-literal")
REPEATABLE = ("fisher", "gradient", "entropy", "entropy-literal")  # strategies whose scores change as heads are closed


def option(default, group, text, choices=None):
    """One setting: its default, the group it is listed under in --help, and what it means."""
    return dataclasses.field(default=default, metadata={"group": group, "help": text, "choices": choices})


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run. Raises UserError where a value is out of range."""

    model: str = option(MODEL, "model and pruning", "hub id, local folder, .gguf file, 'demo' (trained here), or "
                        "'auto': gpt2, and the demo where there is no network")
    revision: str = option(REVISION, "model and pruning", "branch, tag or commit of a model on the hub")
    strategy: str = option(STRATEGY, "model and pruning", "how heads are scored", STRATEGY_NAMES)
    pruning_level: float = option(PRUNING_LEVEL, "model and pruning", "share of all heads to close, 0 <= level < 1")
    min_heads: int = option(MIN_HEADS, "model and pruning", "heads that stay open in every layer")
    rounds: int = option(ROUNDS, "model and pruning", "close the heads in so many rounds and score those that are left anew in each "
                         f"({', '.join(REPEATABLE)})")
    gate_steps: int = option(GATE_STEPS, "model and pruning", "steps that the strategy 'learned' trains the gates for")
    repair: bool = option(REPAIR, "model and pruning", "after pruning, refit the output projections by least squares, without training")
    repair_blocks: int = option(REPAIR_BLOCKS, "model and pruning", "blocks of training text that the repair is solved on")
    uniform: bool = option(UNIFORM, "model and pruning", "close equally many heads in every layer, in whole key/value groups, so that the "
                           "smaller model needs no code of its own (Llama-like models)")
    reopen_heads: bool = option(REOPEN_HEADS, "model and pruning", "let closed heads come back in fine-tuning")
    dataset: str = option(DATASET, "text", "hub dataset id, 'python-docs' (needs no network), or 'auto': WikiText-2, and python-docs "
                          "for the demo model")
    dataset_config: str = option(DATASET_CONFIG, "text", "configuration of the hub dataset")
    train_file: str = option(TRAIN_FILE, "text", ".txt, .jsonl or .parquet instead of a dataset; without the other "
                             "two files it is split 80/10/10")
    validation_file: str = option(VALIDATION_FILE, "text", "text for calibration and validation")
    test_file: str = option(TEST_FILE, "text", "text that only the reported perplexities see")
    block_length: int = option(BLOCK_LENGTH, "text", "tokens in a block")
    calibration_blocks: int = option(CALIBRATION_BLOCKS, "text", "validation blocks that the heads are scored on")
    eval_blocks: int = option(EVAL_BLOCKS, "text", "test blocks that perplexity is measured on, 0 = all")
    prompt: str = option(PROMPT, "text", "the start of the sample texts")
    max_steps: int = option(MAX_STEPS, "fine-tuning", "optimizer steps, 0 = as many as --epochs needs")
    epochs: float = option(EPOCHS, "fine-tuning", "passes over the training text where --max-steps is 0")
    learning_rate: float = option(LEARNING_RATE, "fine-tuning", "peak learning rate")
    warmup: float = option(WARMUP, "fine-tuning", "share of the steps in which the learning rate rises to its peak")
    weight_decay: float = option(WEIGHT_DECAY, "fine-tuning", "AdamW's weight decay")
    distillation: float = option(DISTILLATION, "fine-tuning", "share of the loss that asks for the dense model's predictions instead of "
                                 "the text's next token, 0 to 1")
    patience: int = option(PATIENCE, "fine-tuning", "stop when validation did not improve in so many evaluations, 0 = never; the best weights are kept")
    batch_size: int = option(BATCH_SIZE, "fine-tuning", "blocks in one optimizer step, however many fit at once")
    gradient_checkpointing: bool = option(GRADIENT_CHECKPOINTING, "fine-tuning", "keep only each layer's input and compute the rest a second time: slower, "
                                          "in much less memory")
    fsdp: bool = option(FSDP, "fine-tuning", "share weights, gradients and optimizer among the GPUs that torchrun starts processes on, for models that "
                        "are too large to be trained on one")
    control: str = option(CONTROL, "fine-tuning", "fine-tune the dense model with the same budget, to compare: yes, no, "
                          "or auto (yes, unless the model is large and the machine has no accelerator)",
                          ("auto", "yes", "no"))
    sweep: bool = option(SWEEP, "sweep", "prune with every strategy at every level below, and compare; a script stops after it")
    sweep_strategies: str = option(SWEEP_STRATEGIES, "sweep", "strategies, separated by spaces")
    sweep_levels: str = option(SWEEP_LEVELS, "sweep", "pruning levels, separated by spaces")
    device: str = option(DEVICE, "machine and results", "where to compute", ("auto", "cuda", "tpu", "mps", "cpu"))
    precision: str = option(PRECISION, "machine and results", "number format of the computations; auto: bf16 where "
                            "the GPU or TPU has it, fp16 on other CUDA GPUs, else fp32",
                            ("auto", "fp32", "fp16", "bf16"))
    seed: int = option(SEED, "machine and results", "seed of everything random")
    save_model: str = option(SAVE_MODEL, "machine and results", "form of the saved model: compact (smaller and faster), zeroed (full size, "
                             "opens without code of its own), both, or no", ("compact", "zeroed", "both", "no"))
    output_dir: str = option(OUTPUT_DIR, "machine and results", "folder that gets a new results folder for each run")
    save_to_drive: bool = option(SAVE_TO_DRIVE, "machine and results", "in Colab, keep the results on your Google Drive (in MyDrive), which outlives "
                                 "the session and downloads of any size")
    resume: str = option(RESUME, "machine and results", "results folder of a run to go on with; 'auto': the newest unfinished one with these very settings, "
                         "if there is one; 'no': start anew")
    offline: bool = option(OFFLINE, "machine and results", "use no network, only what is on this machine")
    trust_remote_code: bool = option(TRUST_REMOTE_CODE, "machine and results", "run the Python code that a model brings along, if it does")

    def __post_init__(self):
        check_settings(self)


# %% [markdown]
# What a setting may be:

# %%
def check_settings(settings: Settings) -> None:
    """Raises UserError for a value that is out of range, or does not go with another."""
    def check(name, fine, allowed, remedy):
        if not fine:
            raise UserError(f"{name} is {getattr(settings, name)!r}, but must be {allowed}: {remedy}.")

    for field in dataclasses.fields(settings):
        value, choices = getattr(settings, field.name), field.metadata["choices"]
        if choices and value not in choices:
            nearest = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "take one of these."
            raise UserError(f"{field.name} is {value!r}, but must be one of {', '.join(choices)}: {hint}")
    check("pruning_level", 0 <= settings.pruning_level < 1, "at least 0 and below 1", "0.3 is a good start")
    check("learning_rate", 0 < settings.learning_rate < math.inf, "above 0", "1e-4 is a good start")
    check("epochs", 0 < settings.epochs < math.inf, "above 0", "1 is one pass over the text")
    check("block_length", settings.block_length >= 2, "at least 2", "a first token predicts a second")
    check("prompt", settings.prompt.strip(), "some words", "write the start of a sentence")
    check("warmup", 0 <= settings.warmup <= 1, "from 0 to 1", "0.1 is a good start")
    check("weight_decay", 0 <= settings.weight_decay < math.inf, "0 or more", "0.01 is a good start")
    check("distillation", 0 <= settings.distillation <= 1, "from 0 to 1", "0.5 is a good start")
    check("rounds", settings.rounds == 1 or settings.strategy in REPEATABLE, f"1 with the strategy {settings.strategy!r}",
                f"rounds are for {', '.join(REPEATABLE)}")
    check("sweep_strategies", settings.sweep_strategies.split() and set(settings.sweep_strategies.split()) <= set(STRATEGY_NAMES), f"one or more of {', '.join(STRATEGY_NAMES)}",
                "correct the names")
    check("sweep_levels", re.fullmatch(r"\s*((0?\.\d+|0)(\s+|$))+", settings.sweep_levels),
                "numbers from 0 to below 1, separated by spaces", "0.1 0.3 0.5 is a good start")
    for name in ("batch_size", "calibration_blocks", "rounds", "gate_steps", "repair_blocks"):
        check(name, getattr(settings, name) >= 1, "1 or more", "choose a larger number")
    for name in ("max_steps", "eval_blocks", "min_heads", "seed", "patience"):
        check(name, getattr(settings, name) >= 0, "0 or more", "choose a larger number")
    for name in ("train_file", "validation_file", "test_file"):
        path = Path(getattr(settings, name))
        if getattr(settings, name):
            check(name, path.suffix in (".txt", ".jsonl", ".parquet"), "a .txt, .jsonl or .parquet file",
                        "convert it first")
            check(name, path.is_file(), "an existing file", "check the path")
            check(name, bool(settings.train_file), "given together with train_file", "name that file too")
            check("dataset", settings.dataset == "auto", "left alone where files are given", "drop one of the two")
    check("uniform", not (settings.uniform and settings.reopen_heads), "off where reopen_heads is on", "drop one of the two")
    check("fsdp", not (settings.fsdp and settings.reopen_heads), "off where reopen_heads is on", "drop one of the two")
    check("sweep", not (settings.sweep and settings.uniform), "off where uniform is on", "drop one of the two")
    check("save_to_drive", not settings.save_to_drive or "google.colab" in sys.modules, "off outside of Colab", "choose an output_dir instead")
    check("output_dir", not Path(settings.output_dir).is_file(), "a folder", "choose another name")


# %% [markdown]
# In a shell the settings are options. A mistake there is answered in one sentence, without a traceback.

# %%
def settings_of(folder: str) -> dict:
    """The settings that the run of a results folder was started with. Raises UserError where it does not say them."""
    kinds = {field.name: (int, float) if field.type is float else field.type for field in dataclasses.fields(Settings) if field.name != "resume"}
    try:
        asked = json.loads(Path(folder, "metrics.json").read_text())["asked"]
        if not all(isinstance(asked[name], kind) for name, kind in kinds.items()):
            raise ValueError
        return {name: asked[name] for name in kinds}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"resume is {folder!r}, but must be 'auto', 'no', or the folder of a run, with its metrics.json: check the path.") from None


def read_settings(arguments: list[str]) -> Settings:
    """Settings from the form's values, overridden by command-line arguments."""
    parser = argparse.ArgumentParser(description="Prune the attention heads of a causal language model, fine-tune "
                                     "what is left, and compare.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    groups = {}
    for field in dataclasses.fields(Settings):
        name, flag, group = field.name, "--" + field.name.replace("_", "-"), field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        is_switch, choices = field.type is bool or name == "control", field.metadata["choices"]
        metavar = "{" + ",".join(choices) + "}" if choices else name.split("_")[-1].upper()
        kind = {"action": argparse.BooleanOptionalAction} if is_switch else {"type": field.type, "metavar": metavar}
        groups[group].add_argument(flag, default=globals()[name.upper()], help=field.metadata["help"], **kind)
    values = vars(parser.parse_args(arguments))
    if values["resume"] not in ("auto", "no"):  # its settings, but for what is said now
        parser.set_defaults(**settings_of(values["resume"]))
        values = vars(parser.parse_args(arguments))
    values["control"] = {True: "yes", False: "no"}.get(values["control"], values["control"])
    return Settings(**values)


# %% [markdown]
# What goes wrong later is answered the same way. A disk may fill up, or a mounted Drive vanish, and every library says that in words of its own.

# %%
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOTCONN, errno.ESTALE)


def disk_trouble(error: BaseException | None) -> str:
    """What is wrong with a disk (full, read-only, gone), where that is behind an error; else an empty text."""
    allowed = (*DISK_ERRORS, errno.ENOENT, errno.EACCES)  # these two are usual where something is only looked for
    while error is not None:
        if isinstance(error, OSError) and error.errno in allowed:
            return error.strerror + (f": {error.filename}" if error.filename else "")
        if "PytorchStreamWriter failed" in str(error) or "No space left" in str(error):  # PyTorch and safetensors have words of their own
            return os.strerror(errno.ENOSPC)
        if gone := re.search(r"Parent directory .* does not exist", str(error)):
            return gone[0]
        error, allowed = error.__cause__ or error.__context__, DISK_ERRORS
    return ""


@contextlib.contextmanager
def saying_disk_trouble():
    """Within it trouble with a disk becomes a RunError that says so."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if trouble := disk_trouble(error):
            raise RunError(f"the disk cannot be written or read ({trouble}): make room or bring it back, or choose another --output-dir.") from error
        raise


# %%
def stop_without_traceback(kind, error, trace):
    """The script's sys.excepthook: a sentence instead of a traceback, and exit status 2 for a mistake, 1 for a failure, 130 for Ctrl-C."""
    kept = ""
    if "run" in globals() and run.folder.exists() and kind is not UserError:
        known = ", ".join(f"{stage} {value:.2f}" for stage, value in run.metrics["perplexity"].items())
        kept = f" What is there is in {run.folder}{f' (perplexity: {known})' if known else ''}; the same command goes on from it."
    if issubclass(kind, UserError):
        words, status = f"error: {error}", 2
    elif issubclass(kind, KeyboardInterrupt):
        words, status = f"interrupted.{kept}", 130
    elif issubclass(kind, torch.OutOfMemoryError):
        words, status = f"failed: out of memory: take a smaller --block-length or --batch-size, --precision bf16, or a smaller model.{kept}", 1
    elif issubclass(kind, (RunError, SafetensorError)):
        words, status = f"failed: {error}{kept}", 1
    elif issubclass(kind, RuntimeError) and re.search("onnection (closed|reset) by|NCCL", str(error)):
        words, status = f"failed: another process ended, and this one waited for it in vain.{kept}", 1
    else:
        return sys.__excepthook__(kind, error, trace)
    if int(os.environ.get("RANK", "0")) and not issubclass(kind, OutOfStep):
        time.sleep(3)  # whoever ends first has the others killed, and the first process has something to say
    else:
        print(words, file=sys.__stderr__, flush=True)  # torch.distributed puts another stderr in its place, and drops it where SystemExit is raised
    raise SystemExit(status)


def silence_all_but_first() -> None:
    """Of several processes that torchrun or accelerate launch started, the first alone speaks."""
    if int(os.environ.get("RANK", "0")):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stays open as long as the process)
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()


# %% [markdown]
# What is still `auto` is decided next. The hub is asked once whether it is there. If you named no model and it is not, you get
# the demo; a model that you did name never turns into another one.

# %%
def hub_is_reachable(timeout: float = 2.0) -> bool:
    """Asks the hub once, instead of letting every download find out for itself."""
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=timeout).close()
    except OSError:
        return False
    return True


def choose_sources(settings: Settings) -> Settings:
    """Settings with every 'auto' in model and dataset resolved, and the hub libraries told whether there is a network."""
    model, dataset = settings.model, settings.dataset
    local_model = model == "demo" or Path(model).exists()
    if dataset == "auto" and model == "demo" and not settings.train_file:
        dataset = "python-docs"
    needs_hub = not local_model or not (settings.train_file or dataset == "python-docs")
    offline = settings.offline or huggingface_hub.constants.HF_HUB_OFFLINE or (needs_hub and not hub_is_reachable())
    if offline:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    if model == "auto":
        model = "demo" if offline else "gpt2"
        if offline:
            print("The Hugging Face hub cannot be reached, so this is the demo: a small model, trained here on Python's "
                  "manual. For a real one give --model: a hub id where there is a network, a local folder, or a .gguf file.")
    if dataset == "auto" and not settings.train_file:
        dataset = "python-docs" if model == "demo" else "Salesforce/wikitext"
    if dataset == "Salesforce/wikitext" and not settings.dataset_config:
        settings = dataclasses.replace(settings, dataset_config="wikitext-2-raw-v1")
    return dataclasses.replace(settings, model=model, dataset=dataset, offline=offline)


# %%
if __name__ == "__main__":
    if not in_notebook():
        sys.excepthook = stop_without_traceback
    silence_all_but_first()
    settings = choose_sources(read_settings([] if in_notebook() else sys.argv[1:]))
    print("\n".join(f"{name:>20}  {value}" for name, value in dataclasses.asdict(settings).items() if value != ""))


# %% [markdown]
# ## 3. Device, memory, and the record of a run
#
# The fastest device is found by itself: an NVIDIA GPU, a TPU, an Apple GPU, else the processor. On a GPU the
# computations run in half precision, which is faster and takes half the memory: `bfloat16` where the hardware has it,
# `float16` with gradient scaling where not. The weights themselves stay in `float32`.

# %%
def find_device(choice: str = "auto") -> torch.device:
    """The device to compute on. Raises UserError where the chosen one is not there."""
    available = {"cuda": torch.cuda.is_available(), "tpu": is_torch_xla_available(),
                 "mps": torch.backends.mps.is_available(), "cpu": True}
    if choice == "auto":
        choice = next(name for name, there in available.items() if there)
    if not available[choice]:
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise UserError(f"device is {choice!r}, but this machine has {there}: choose one of these, or 'auto'.")
    if choice == "tpu":
        import torch_xla

        return torch_xla.device()
    if available["tpu"]:
        raise UserError(f"device is {choice!r}, but transformers trains by torch_xla where that is installed: set USE_TORCH_XLA=0 in the environment.")
    return torch.device(choice)


def find_precision(device: torch.device, choice: str = "auto") -> torch.dtype:
    """The number format that computations on this device run in. Raises UserError for one it cannot do."""
    has_bf16 = {"cuda": device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False),
                "xla": True, "cpu": True}.get(device.type, False)
    if choice == "auto":
        choice = "fp32" if device.type in ("cpu", "mps") else "bf16" if has_bf16 else "fp16"
    if (choice == "fp16" and device.type != "cuda") or (choice == "bf16" and not has_bf16):
        raise UserError(f"precision is {choice!r}, which {device.type} does not have: choose 'fp32', or 'auto'.")
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[choice]


def autocast(device: torch.device, dtype: torch.dtype):
    """Context in which the model computes in `dtype`."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


# %% [markdown]
# One process computes on one device. Where `torchrun` or `accelerate launch` start several, each scores, measures and trains on its share of the text, and
# the shares are added up; the first process alone speaks and writes.

# %%
def rank_and_world() -> tuple[int, int]:
    """(number of this process, number of processes) that were started together."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if ready else (0, 1)


def own_share(blocks: torch.Tensor) -> torch.Tensor:
    """Every n-th block, for this process, of n processes."""
    rank, world = rank_and_world()
    return blocks[rank::world]


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in place."""
    if rank_and_world()[1] > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def same_everywhere(tensor: torch.Tensor) -> None:
    """Makes a tensor that of the first process, in place."""
    if rank_and_world()[1] > 1:
        torch.distributed.broadcast(tensor.detach(), 0)


def wait_for_all() -> None:
    if rank_and_world()[1] > 1:
        torch.distributed.barrier()


def agree(value, choose=operator.itemgetter(0)):
    """One value for all processes, of those that they bring: the first one's, if `choose` does not take another."""
    values = [value] * rank_and_world()[1]
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return choose(values)


MEETING = []  # a group of all processes in which they wait a minute for each other, and no longer


def all_come() -> bool:
    """True where all processes come to this point within a minute of each other."""
    if MEETING:
        try:
            torch.distributed.barrier(MEETING[0])
        except RuntimeError:
            return False
    return True


def join_processes(device: torch.device, fsdp: bool = False) -> torch.device:
    """Joins the processes that were started together; the device of this one. Raises UserError where they cannot share what is trained."""
    for what in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{what}", "false") in ("true", "1"):
            raise UserError(f"accelerate was told to use {what}, but heads are scored and cut on a whole model: leave it out, and give this script --fsdp.")
    kind = accelerate.DistributedType.NO
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        state = accelerate.PartialState(cpu=device.type == "cpu")
        device, kind = state.device, state.distributed_type
        MEETING[:] = [torch.distributed.new_group(timeout=datetime.timedelta(minutes=1), backend="gloo")]
    if fsdp and kind in ("NO", "MULTI_CPU", "XLA"):
        raise UserError(f"fsdp is on, but there is {'one process' if kind == 'NO' else 'no GPU'}, and several GPUs share a model: start this script with "
                        "torchrun on them, or leave --fsdp out.")
    if fsdp and not transformers.utils.is_accelerate_available("1.15.0"):  # older ones take tied embeddings apart
        raise UserError(f"fsdp is on, but accelerate is {accelerate.__version__}, and has to be 1.15 or later: pip install -U accelerate.")
    return device


# %% [markdown]
# A model goes to the device in one piece: where input and output embeddings are one tensor, they have to be it afterwards, too.

# %%
def move(model, device: torch.device | str):
    """The model, moved to a device. On XLA devices moving makes new tensors, one for each of two names."""
    model.to(device)
    model.tie_weights()
    return model


@contextlib.contextmanager
def set_aside(*models):
    """Models wait in the processor's memory while the accelerator's is needed for another."""
    devices = [model.device for model in models]
    for model in models:
        move(model, "cpu")
    yield
    for model, device in zip(models, devices):
        move(model, device)


# %% [markdown]
# Memory is what runs out first on Colab, so it is shown after every step and its peak is recorded.

# %%
def describe_device(device: torch.device) -> str:
    """One line: what the machine computes with."""
    ram = f"{psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB RAM"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB ({ram})"
    return f"{device.type.upper()}: {platform.processor() or platform.machine()} ({ram})"


def memory_used(device: torch.device) -> dict[str, int]:
    """Bytes in use now: this process's RAM, and the accelerator's memory where there is one."""
    used = {"ram": psutil.Process().memory_info().rss}
    if device.type == "cuda":
        used["accelerator"] = torch.cuda.memory_allocated(device)
    elif device.type == "mps":
        used["accelerator"] = torch.mps.current_allocated_memory()
    elif device.type == "xla":
        import torch_xla.core.xla_model as xm

        if xm.xla_device_hw(device) == "TPU":  # XLA on a processor does not say
            used["accelerator"] = xm.get_memory_info(device)["bytes_used"]
    return used


def free_memory() -> None:
    """Gives back what deleted models held, on the processor and on the accelerator."""
    gc.collect()
    if sys.platform == "linux":  # glibc keeps what is free for itself, and a kernel would seem to grow from run to run
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


# %% [markdown]
# The peak is what decides whether a model fits, and it may be over in a moment: a thread keeps watch.

# %%
class PeakMemory(threading.Thread):
    """Samples memory_used() ten times a second; `stop()` returns the largest values seen."""

    def __init__(self, device: torch.device):
        super().__init__(daemon=True)
        self.device, self.peak, self.done = device, memory_used(device), threading.Event()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.start()

    def run(self):
        while not self.done.wait(0.1):
            self.sample()

    def sample(self):
        for kind, used in memory_used(self.device).items():
            self.peak[kind] = max(self.peak[kind], used)

    def stop(self) -> dict[str, int]:
        self.done.set()
        self.join()
        self.sample()
        if self.device.type == "cuda":
            self.peak["accelerator"] = torch.cuda.max_memory_allocated(self.device)
        return self.peak


# %% [markdown]
# Where memory does run out, a batch is tried again in smaller parts: it costs a second try, and not the run.

# %%
def free_bytes(device: torch.device) -> float:
    """Bytes that this process can still have: of the accelerator where it says so, and else its share of the free RAM."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "xla":  # XLA plans its memory by itself
        return math.inf
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def room_for_blocks(model, tokens: int, dtype: torch.dtype, backward: bool = False, training: float = 0, logits: bool = True, maps: bool = False,
                    device: torch.device | None = None) -> int:
    """How many blocks of so many tokens have room in the memory that is free now, roughly; at least 1.

    A layer holds 34 bytes per token and width in 16 bits (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198), and for a `backward` pass
    every layer does. Beside that come logits and their copies, attention `maps` where they are built, and in `training` so many bytes for each parameter.
    `device` is the model's, if it does not say another.
    """
    config = model.config.get_text_config()
    layer = 34 * torch.finfo(dtype).bits // 16 * tokens * config.hidden_size + maps * 12 * config.num_attention_heads * tokens**2
    each = layer * (config.num_hidden_layers if backward else 1) + logits * (24 if backward or training else 12) * tokens * config.vocab_size
    beside = training * model.num_parameters()
    return max(1, int(min((free_bytes(device or model.device) - beside) / each, 1e9)))


FITTED = {}  # what ran out of memory -> the smaller number of blocks, so that no step finds it out twice


def fit_batch_size(function, largest: int, what: str, room: int | None = None, in_step: bool = False):
    """`function(batch_size)`, with `largest` or, where that is more than there is room for or memory runs out, the next smaller divisor.

    What fits is remembered under `what`. `in_step` says that several processes wait for each other within the function, so that they have to begin
    anew together. Raises RunError where not even a single block fits, and OutOfStep where memory ran out for some of the processes only.
    """
    sizes = [largest]
    while sizes[-1] > 1:
        sizes.append(max(size for size in range(1, sizes[-1] // 2 + 1) if largest % size == 0))
    room = agree(room or largest, min)
    if room < FITTED.get(what, largest):
        FITTED[what] = next((size for size in sizes if size <= room), 1)
        print(f"{what}: memory has room for {FITTED[what]} blocks at once, not {largest}")
    sizes = [size for size in sizes if size <= FITTED.get(what, largest)] or [1]
    smaller = iter(sizes[1:])

    def reduce():
        size = FITTED[what] = next(smaller, 0)
        alone = in_step and not all_come()
        if not size:
            raise (OutOfStep if alone else RunError)(f"{what} runs out of memory with a single block: take a smaller --block-length, --precision bf16, "
                                                     f"{'--gradient-checkpointing, ' if what == 'fine-tuning' else ''}or a smaller model.")
        if alone:
            raise OutOfStep(f"{what} runs out of memory in process {rank_and_world()[0]}, but not in all: start the same command again, and it takes fewer blocks at once: {size}.")
        print(f"{what} runs out of memory: trying {size} blocks at once")
        return size

    return find_executable_batch_size(function, starting_batch_size=sizes[0], reduce_batch_size_fn=reduce)()


# %% [markdown]
# Long loops show how far they are: in a bar of their own, or, when they run behind a button, in that button's panel.

# %%
PROGRESS = contextvars.ContextVar("progress")


def progress(items, title: str, device: torch.device | None = None):
    """The items one by one, with a bar: tqdm's, or that of whoever set PROGRESS. `device` is where each item's work is done."""
    for item in PROGRESS.get(functools.partial(tqdm, leave=False, disable=rank_and_world()[0] > 0 or None))(items, title):
        yield item
        if device is not None and device.type == "xla":  # a TPU collects work until it is told to begin; this waits for nothing
            sys.modules["torch_xla"].sync()


# %% [markdown]
# Every run gets a folder of its own, named by the time, and never overwrites another. What a step computes is written to
# `metrics.json` the moment the step ends.
#
# Sessions die, so what is dear to compute (scores, repaired and fine-tuned weights, checkpoints) is also kept, in a folder beside it that ends in
# `.state` and is removed when all is done. The same run started again finds it there and goes on; each product is named by a fingerprint of all that
# it depends on, so nothing stale is ever taken.

# %%
def on_drive(folder: str) -> Path:
    """The folder of this name on Google Drive, which Colab asks you to allow, once a session. Raises UserError where it is not given."""
    from google.colab import drive

    try:
        drive.mount("/content/drive")
    except Exception as error:  # Colab raises whatever went wrong, from a browser without cookies to a "no"
        raise UserError(f"save_to_drive is on, but Google Drive cannot be mounted ({first_sentence(error)}): allow it, or switch it off.") from None
    return Path("/content/drive/MyDrive", folder)


def fingerprint(*things) -> str:
    """The same for the same values (numbers, texts, tensors, models with weights and gates), and else another."""
    digest = hashlib.sha256()
    for thing in things:
        tensors = thing.state_dict() if isinstance(thing, torch.nn.Module) else {"": thing} if isinstance(thing, torch.Tensor) else {}
        for name, tensor in tensors.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        if not tensors:
            digest.update(repr(thing).encode())
    return digest.hexdigest()[:16]


def this_process() -> dict:
    return {"host": fingerprint(platform.node()), "pid": os.getpid(), "started": psutil.Process().create_time()}


def is_running(process: dict) -> bool:
    """True where the process that a record names is another one, on this machine, and still there."""
    if process["host"] != this_process()["host"] or process == this_process() or not psutil.pid_exists(process["pid"]):
        return False
    return psutil.Process(process["pid"]).create_time() == process["started"]


# %%
@contextlib.contextmanager
def in_one_move(file: Path):
    """A path to write to; what is written takes the place of `file` when it is whole, and is removed where that fails."""
    part = file.with_name(file.name + ".part")
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def make_folder(place: Path, model: str) -> Path:
    """A new folder. Raises UserError where none can be made."""
    stem = f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_" + re.sub(r"[^\w.-]+", "-", Path(model).stem)
    names = (stem + (f"-{number}" if number > 1 else "") for number in range(1, 100))
    try:
        folder = next(path for name in names if not (path := place / name).exists())
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"output_dir is {str(place)!r}, but no folder can be made there "
                        f"({error.strerror}): choose another place.") from None
    return folder


def find_unfinished(resume: str, place: Path, wanted: dict) -> tuple[Path, dict] | None:
    """The folder to go on in, and its record, or None; `wanted` is the record of a new run. Raises UserError where `resume` names one of another run."""
    if resume == "no":
        return None
    for file in [Path(resume, "metrics.json")] if resume != "auto" else sorted(place.glob("*/metrics.json"), reverse=True):
        try:
            record = json.loads(file.read_text())
            differing = [name for name in ("asked", "versions", "device", "precision") if record[name] != wanted[name]]
            unfinished = not record["finished"] or file.parent.with_name(file.parent.name + ".state").exists()
            usable = not differing and unfinished and wanted.keys() <= record.keys() and not is_running(record["process"])
        except (OSError, ValueError, TypeError, KeyError):  # a record of an older version, or none of ours
            usable, differing = False, ["record"]
        if usable:
            return file.parent, record | {name: wanted[name] for name in ("settings", "process")}
        if resume != "auto":
            reason = f"its {' and '.join(differing)} differ from this run's" if differing else "it is finished, or still running"
            raise UserError(f"resume is {resume!r}, but {reason}: give the same options as then, or start anew with --resume no.")
    return None


# %% [markdown]
# With these, a run is its folder, its record, and three services: `step` times what happens within it, `once` keeps what is dear, `show` keeps pictures.

# %%
class Run:
    """The record of one run: its folder, its numbers (`metrics`, kept in metrics.json), its pictures."""

    def __init__(self, settings: Settings, device: torch.device, dtype: torch.dtype):
        transformers.set_seed(settings.seed)
        FITTED.clear()
        self.device, self.dtype = device, dtype
        packages = (torch, transformers, datasets, accelerate)
        asked = {name: value for name, value in dataclasses.asdict(settings).items() if name != "resume"}
        self.metrics = {
            "settings": dataclasses.asdict(settings),
            "versions": {"python": platform.python_version()} | {p.__name__: p.__version__ for p in packages},
            "device": describe_device(device),
            "precision": str(dtype).removeprefix("torch."),
            "perplexity": {}, "parameters": {}, "heads": {}, "size": {}, "samples": {},
            "seconds": {}, "peak_memory_bytes": {}, "asked": asked, "process": this_process(), "finished": False,
        }
        place = on_drive(settings.output_dir) if settings.save_to_drive else Path(settings.output_dir)
        self.writes = rank_and_world()[0] == 0
        if self.writes:
            found = find_unfinished(settings.resume, place, self.metrics)
            self.folder, self.metrics = found or (make_folder(place, settings.model), self.metrics)
            if found:
                print(f"Going on with {self.folder}, which was not finished (--resume no starts anew).")
            others = sum(file.stat().st_size for file in place.glob("*.state/**/*") if not file.is_relative_to(self.state))
            if others > 1e8:
                print(f"Unfinished runs keep {others / 1e9:.1f} GB in {place}/*.state, to go on from: remove those that you do not need.")
            self.save()
        self.folder, self.metrics = agree((self.folder, self.metrics) if self.writes else None)
        self.taken = self.metrics.get("taken")  # heads that were taken in section 10 before the run was interrupted
        if (self.state / "fitted.json").exists():
            FITTED.update(json.loads((self.state / "fitted.json").read_text()))

    @property
    def state(self) -> Path:
        """Where products are kept until the run is finished."""
        return self.folder.with_name(self.folder.name + ".state")

    def once(self, name: str, depends: tuple, compute) -> tuple[dict[str, torch.Tensor], dict]:
        """compute(), which returns a dict of tensors and a record (JSON), or, where that was done before with equal `depends`, what it returned then."""
        file = self.state / f"{name}-{fingerprint(str(self.dtype), self.metrics['asked']['seed'], *depends)}.safetensors"
        if agree(file.exists()):
            print(f"[{name}: kept from before]")
            self.kept = True
            with safe_open(file, "pt") as kept:
                return load_file(file), json.loads(kept.metadata()["record"])
        self.metrics["finished"] = False
        tensors, record = compute()
        if not self.writes:
            return tensors, record
        self.state.mkdir(exist_ok=True)
        with in_one_move(file) as part:
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, part, {"record": json.dumps(record)})
        return tensors, record

    @saying_disk_trouble()
    def finish(self) -> Path:
        """The run's folder as a zip. What was kept to go on from goes, in the end."""
        self.metrics["finished"] = True
        self.save()
        archive = self.folder.with_name(self.folder.name + ".zip")
        with in_one_move(archive) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as packed:
            for file in sorted(self.folder.rglob("*")):
                packed.write(file, file.relative_to(self.folder.parent))
        shutil.rmtree(self.state, ignore_errors=True)
        return archive

    @saying_disk_trouble()
    def save(self):
        """Writes metrics.json in one move, so that it is never half there."""
        if not self.writes:
            return
        self.folder.mkdir(exist_ok=True)
        with in_one_move(self.folder / "metrics.json") as part:
            part.write_text(json.dumps(self.metrics, indent=1))

    @contextlib.contextmanager
    def step(self, name: str):
        """Times a step, watches its memory, and keeps what it recorded in `metrics`, also where the step fails."""
        free_memory()
        peak, start, empty, self.kept = PeakMemory(self.device), time.perf_counter(), False, False
        try:
            with saying_disk_trouble():
                yield
        except UserError:
            empty = not self.metrics["perplexity"]
            raise
        except OutOfStep:
            self.state.mkdir(exist_ok=True)
            with in_one_move(self.state / "fitted.json") as part:
                part.write_text(json.dumps({what: max(size, 1) for what, size in FITTED.items()}))
            raise
        finally:
            top, seconds = peak.stop(), round(time.perf_counter() - start, 2)
            if not (self.kept and name in self.metrics["seconds"]):  # else what was noted when it was computed stays
                self.metrics["peak_memory_bytes"][name], self.metrics["seconds"][name] = top, seconds
            if empty:  # a mistake before anything was computed leaves nothing behind
                shutil.rmtree(self.folder, ignore_errors=True)
            else:
                self.save()
            memory = ", ".join(f"{kind} {used / 2**30:.2f} GiB (peak {top[kind] / 2**30:.2f})"
                               for kind, used in memory_used(self.device).items())
            print(f"[{name}: {seconds:.1f} s, {memory}]")

    @saying_disk_trouble()
    def keep(self, figure: Figure, name: str):
        """Keeps a figure as PNG in the run's folder."""
        if self.writes:
            figure.savefig(self.folder / name, dpi=150, bbox_inches="tight")

    def show(self, figure: Figure, name: str, width: int = 760):
        """Keeps a figure, and displays it in a notebook."""
        self.keep(figure, name)
        if not self.writes:
            return
        if in_notebook():
            from IPython.display import Image, display

            display(Image(self.folder / name, width=width))
        else:
            print(f"picture: {self.folder / name}")


# %% [markdown]
# Pictures, panels and tables show themselves in a notebook, and are files or plain text elsewhere.

# %%
def png(figure: Figure, dpi: int = 80) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def show_widget(widget, picture: Path) -> None:
    """Displays a widget in a notebook; where nobody can show widgets (a printed or uploaded notebook), the picture."""
    from IPython.display import display

    if "google.colab" in sys.modules:
        display(widget)
    else:
        view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
        display({"application/vnd.jupyter.widget-view+json": view, "image/png": base64.b64encode(picture.read_bytes()).decode(),
                 "text/plain": f"a panel that needs a live notebook; {picture} stands for it"}, raw=True)


def show_markdown(text: str) -> None:
    """Rendered in a notebook, as it is in a terminal."""
    if in_notebook():
        from IPython.display import Markdown, display

        display(Markdown(text))
    else:
        print(text)


# %%
if __name__ == "__main__":
    device = join_processes(find_device(settings.device), settings.fsdp)
    dtype = find_precision(device, settings.precision)
    run = Run(settings, device, dtype)
    print(f"{run.metrics['device']}, computing in {run.metrics['precision']}")
    if device.type == "cpu" and "google.colab" in sys.modules:
        print("This runtime has no GPU or TPU: Runtime → Change runtime type gives you one, and all of this many times faster.")
    print(f"results: {run.folder}")

# %% [markdown]
# ## 4. Text
#
# Three texts that are kept apart: the model is fine-tuned on *train*, heads are scored and progress is watched on
# *validation*, and *test* is only ever used for the perplexities that are reported. The text comes from the Hugging Face
# hub, from your own files, or, without a network, from the reference manual that every Python carries.
#
# A text without splits of its own is cut into contiguous parts, so that test and training text never mix. Rows of a
# dataset are joined by a blank line, as the pruning literature does (SparseGPT, Wanda), so that perplexities can be compared
# with published ones.

# %%
SPLITS = ("train", "validation", "test")


def join_rows(rows: datasets.Dataset, name: str) -> str:
    """One string from a dataset's text column. Raises UserError where it has none."""
    columns = [key for key, feature in rows.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")]
    column = "text" if "text" in columns else columns[0] if len(columns) == 1 else None
    if column is None:
        raise UserError(f"dataset {name!r} has the columns {', '.join(rows.features)}, but one named 'text' is needed: "
                        "rename the column that holds the text.")
    return "\n\n".join(row or "" for row in rows[column])


def read_file(path: str) -> str:
    """The text of a .txt file, or the text column of a .jsonl or .parquet file. Raises UserError for what is no text."""
    if path.endswith(".txt"):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path!r} is not UTF-8 text (byte {error.start}): convert it first.") from None
    else:
        try:
            rows = datasets.load_dataset("json" if path.endswith(".jsonl") else "parquet", data_files=path, split="train")
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"{path!r} cannot be read ({first_sentence(error.__cause__ or error)}): check that it is a {Path(path).suffix} file.") from error
        text = join_rows(rows, path)
    if "\0" in text:
        raise UserError(f"{path!r} has a NUL at character {text.index(chr(0))}, so it is no text: convert it first.")
    return text


def python_docs() -> str:
    """Python's own reference manual, about half a million characters, from the standard library."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


# %% [markdown]
# The tail of a text serves as validation and test text where there is nothing else.

# %%
def cut_tail(text: str, share: float) -> tuple[str, str]:
    """Cuts a text in two at the line break nearest to `1 - share` of its length."""
    middle = round(len(text) * (1 - share))
    middle = text.find("\n", middle) + 1 or middle
    return text[:middle], text[middle:]


def load_text(settings: Settings) -> dict[str, str]:
    """{'train', 'validation', 'test'} -> text. Splits that do not exist are cut off the end of train, 10 % each."""
    if settings.train_file:
        files = {split: getattr(settings, f"{split}_file") for split in SPLITS}
        text = {split: read_file(path) for split, path in files.items() if path}
    elif settings.dataset == "python-docs":
        text = {"train": python_docs()}
    else:
        try:
            data = datasets.load_dataset(settings.dataset, settings.dataset_config or None)
        except (OSError, ValueError) as error:
            raise UserError(f"dataset {settings.dataset!r} cannot be had ({first_sentence(error)}): check the name, the "
                            "configuration and the network, or take --train-file or --dataset python-docs.") from None
        if "train" not in data:
            raise UserError(f"dataset {settings.dataset!r} has the splits {', '.join(data)}, but 'train' is needed.")
        text = {split: join_rows(data[split], settings.dataset) for split in SPLITS if split in data}
    missing = [split for split in SPLITS if split not in text]
    for number, split in enumerate(reversed(missing)):
        text["train"], text[split] = cut_tail(text["train"], 0.1 / (1 - 0.1 * number))  # a tenth of the whole each time
    return {split: text[split] for split in SPLITS}


# %%
if __name__ == "__main__":
    with run.step("text"):
        text = load_text(settings)
    print(settings.train_file or settings.dataset, {split: f"{len(part):,} characters" for split, part in text.items()})


# %% [markdown]
# ## 5. Model
#
# Any causal language model: a hub id, a local folder, or a `.gguf` file. Where there is neither weights nor network,
# a GPT-2 of about a million parameters is trained on the spot, in a minute or two, and kept for the next run. It is a toy,
# but a trained one: its heads differ, and closing the wrong ones hurts.

# %%
def load_model(name: str, device: torch.device, trust_remote_code: bool = False, revision: str = ""):
    """Tokenizer and float32 model, in evaluation mode. Raises UserError where the model cannot be had or used."""
    path, options, is_gguf = name, {"trust_remote_code": trust_remote_code, "revision": revision or "main"}, name.endswith(".gguf")
    if is_gguf:
        path, options["gguf_file"] = str(Path(name).parent), Path(name).name
    try:
        if is_gguf and not Path(name).is_file():
            raise OSError("no such file")
        config = None if is_gguf else AutoConfig.from_pretrained(path, **options)
        if hasattr(config, "kept_heads"):
            raise UserError(f"model {name!r} is compact, its heads are cut out already: take the model that it was made from.")
        if getattr(config, "quantization_config", None) is not None:
            raise UserError(f"model {name!r} is quantised, and such weights can be neither cut nor trained: take the model that it was made from.")
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model, found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **options)
    except UserError:
        raise
    except Exception as error:  # what strangers put into files fails in every way there is; the sentence says how
        named = f"model {name!r}" + (f" at revision {revision!r}" if revision else "")
        raise UserError(f"{named} cannot be had ({first_sentence(error)}): it must be a causal language model on the "
                        "hub (with a network), a local folder, a .gguf file, or 'demo'.") from error
    if found["missing_keys"] or found["mismatched_keys"]:
        lacking = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
        raise UserError(f"model {name!r} lacks {len(lacking)} of its weights ({lacking[0]} first), which would be random: download it again.")
    if is_gguf:
        # The weights are plain float32 now, but the model would still refuse save_pretrained as quantised.
        model.hf_quantizer, model.is_quantized = None, False
        model.config.__dict__.pop("quantization_config", None)
    model = move(model, device).eval()
    if not is_causal(model):
        raise UserError(f"model {name!r} is a {type(model).__name__} whose tokens see those after them: take a causal language model.")
    return tokenizer, model


@torch.no_grad()
def is_causal(model) -> bool:
    """True where no token's prediction depends on a later token."""
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    other = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)  # another last token
    first, second = (model(tokens, use_cache=False).logits[:, :-1].float() for tokens in (ids, other))
    return torch.allclose(first, second, rtol=1e-3, atol=1e-3 * first.abs().max().item())


# %% [markdown]
# The demo's recipe: byte-level BPE of 1,024 tokens, 4 layers of 8 heads, 128 numbers wide.

# %%
ADAMW = "adamw_torch" if is_torch_xla_available() else "adamw_torch_fused"  # XLA fuses it by itself


def make_demo(text: str, steps: int = 600) -> str:
    """Trains the demo model, once; the folder that holds it."""
    # No dropout: on a processor it makes attention several times slower.
    config = transformers.GPT2Config(vocab_size=1024, n_positions=512, n_embd=128, n_layer=4, n_head=8, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    key = hashlib.sha256(f"{text}{config.to_json_string()}{steps}".encode()).hexdigest()[:12]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "PruningAndFineTuningColab", f"demo-{key}")
    if folder.exists():
        return str(folder)
    if rank_and_world()[1] > 1:
        raise UserError("model is 'demo', which several processes cannot train together: run it once without torchrun, or take another model.")
    print("Training the demo model, once: a minute or two.")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(text.splitlines(keepends=True), tokenizers.trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    transformers.set_seed(0)
    model, blocks = transformers.GPT2LMHeadModel(config), pack(text, tokenizer, 128)
    part = folder.with_name(f"{folder.name}.{os.getpid()}")
    arguments = TrainingArguments(str(part), max_steps=steps, per_device_train_batch_size=16, learning_rate=3e-3,
                                  warmup_steps=steps // 10, lr_scheduler_type="cosine", seed=0, report_to="none", optim=ADAMW,
                                  save_strategy="no", logging_strategy="no", use_cpu=True, dataloader_pin_memory=False)
    Trainer(model, arguments, train_dataset=[{"input_ids": block, "labels": block} for block in blocks]).train()
    model.config.use_cache = True  # which the Trainer switched off
    move(model, "cpu").save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)
    return str(folder)


# %% [markdown]
# Tokens are packed into full blocks: no padding, so nothing is wasted and no loss is counted on it.

# %%
def pack(text: str, tokenizer, block_length: int) -> torch.Tensor:
    """Token ids (blocks, block_length): the whole text, in order, but for a tail shorter than one block."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // block_length * block_length], dtype=torch.long).view(-1, block_length)


def pack_all(text: dict[str, str], tokenizer, settings: Settings, longest: int) -> dict[str, torch.Tensor]:
    """Blocks of every split. Raises UserError where blocks are longer than the model can read, or a text has none."""
    if settings.block_length > longest:
        raise UserError(f"block_length is {settings.block_length}, but the model reads at most {longest} tokens: "
                        f"take --block-length {longest} or less.")
    blocks = {split: pack(part, tokenizer, settings.block_length) for split, part in text.items()}
    for split, packed in blocks.items():
        if not len(packed):
            raise UserError(f"the {split} text has fewer than {settings.block_length} tokens, but one block is needed: "
                            "take a longer text or a smaller --block-length.")
    return blocks


def check_tokens(blocks: dict[str, torch.Tensor], tokenizer, model, settings: Settings, longest: int, new_tokens: int = 40) -> None:
    """Raises UserError where the tokenizer has tokens that the model lacks, or the prompt is empty or too long to go on from."""
    vocabulary, highest = model.get_input_embeddings().num_embeddings, max(int(packed.max()) for packed in blocks.values())
    if highest >= vocabulary:
        raise UserError(f"the tokenizer of model {settings.model!r} has a token {highest}, but the model knows only {vocabulary}: they do not belong together.")
    length = len(tokenizer(settings.prompt)["input_ids"])
    if not 1 <= length <= longest - new_tokens:
        raise UserError(f"prompt has {length} tokens, but must have 1 to {longest - new_tokens}: write a {'shorter' if length else 'longer'} one.")


# %%
if __name__ == "__main__":
    with run.step("load model"):
        name = make_demo(text["train"]) if settings.model == "demo" else settings.model
        tokenizer, model = load_model(name, device, settings.trust_remote_code, settings.revision)
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", settings.block_length)
        blocks = pack_all(text, tokenizer, settings, longest)
        check_tokens(blocks, tokenizer, model, settings, longest)
    test_blocks = blocks["test"][: settings.eval_blocks or None]
    run.metrics["blocks"] = {split: len(packed) for split, packed in blocks.items()} | {"tested": len(test_blocks)}
    run.metrics["model"] = {"class": type(model).__name__, "parameters": model.num_parameters()}
    print(f"{settings.model}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters")


# %% [markdown]
# ## 6. How good is it? Perplexity
#
# Perplexity is $\exp\big(\tfrac1N\sum_i -\log p(x_i \mid x_{<i})\big)$: the number of tokens that the model is, on
# average, undecided between. Lower is better. It is measured on test blocks that do not overlap; the first token of each block
# is context only.

# %%
@torch.no_grad()
def perplexity(model, blocks: torch.Tensor, dtype: torch.dtype = torch.float32, batch_size: int = 4) -> float:
    """exp(mean negative log-likelihood) of blocks (n, block_length), each block's first token being context only."""
    model.eval()

    def total_nll(batch_size):
        sums = [torch.zeros((), device=model.device)]  # read in the end only: to read a number is to wait for the device
        for batch in progress(own_share(blocks).split(batch_size), "perplexity", model.device):
            batch = batch.to(model.device)
            with autocast(model.device, dtype):
                logits = model(batch, use_cache=False).logits[:, :-1]
            sums.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"))
        return torch.stack(sums).cpu().double().sum()

    total = fit_batch_size(total_nll, batch_size, "perplexity", room_for_blocks(model, blocks.shape[1], dtype))
    total = total.to(model.device, torch.float64 if model.device.type == "cpu" else torch.float32)
    return math.exp(add_up(total).item() / blocks[:, 1:].numel())


# %% [markdown]
# A number says how much; a sample says what it feels like. Both are recorded for every stage.

# %%
@torch.no_grad()
def sample(model, tokenizer, prompt: str, new_tokens: int = 40) -> str:
    """The prompt and the model's most likely continuation, the same every time."""
    if model.device.type == "xla":
        model = move(copy.deepcopy(model), "cpu")  # a TPU would compile the model anew for every length of the text
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    model.eval()
    output = fit_batch_size(lambda _: model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id),
                            1, "writing a sample")
    return tokenizer.decode(output[0], skip_special_tokens=True)


STAGES = {"dense": "dense, untouched", "pruned": "pruned", "repaired": "pruned + repaired", "fine_tuned": "pruned + fine-tuned",
          "dense_fine_tuned": "dense + fine-tuned"}


def forget(run: Run, stage: str) -> None:
    """Drops what was measured of a stage and of later ones, because it is out of date."""
    for outdated in list(STAGES)[list(STAGES).index(stage):]:
        for record in ("perplexity", "parameters", "samples", "size"):
            run.metrics[record].pop(outdated, None)


def measure(run: Run, stage: str, model, tokenizer, blocks: torch.Tensor, settings: Settings) -> None:
    """Records a stage's test perplexity and sample text, and forgets those of later stages, which are out of date."""
    run.metrics["settings"] = dataclasses.asdict(settings)
    forget(run, stage)

    def compute():
        return {}, {"perplexity": perplexity(model, blocks, run.dtype, settings.batch_size), "samples": sample(model, tokenizer, settings.prompt),
                    "parameters": model.num_parameters()}

    with run.step(f"measure {stage}"):
        _, record = run.once(f"measure_{stage}", (model, blocks, settings.prompt), compute)
        for name, value in record.items():
            run.metrics[name][stage] = value
    print(f"{stage}: perplexity {record['perplexity']:.2f}")


# %% [markdown]
# A perplexity without its conditions is worth nothing, so they go with every table.

# %%
def bare_name(name: str) -> str:
    """A model or file name without the folders of this machine."""
    return Path(name).name if Path(name).exists() else name


def conditions(metrics: dict) -> str:
    """One paragraph: everything that the numbers depend on."""
    s, versions = metrics["settings"], metrics["versions"]
    files = [(split, s[f"{split}_file"]) for split in SPLITS]
    text = s["train_file"] and ", ".join(bare_name(file) if file else f"{split} cut from it" for split, file in files)
    how = (" in every layer alike" if s["uniform"] else "") + (f" in {s['rounds']} rounds" if s["rounds"] > 1 else "")
    how += f", {by_hand} gates set by hand" if (by_hand := metrics.get("heads", {}).get("by_hand")) else ""
    how += f", {s['gate_steps']} gate steps" if s["strategy"] == "learned" else ""
    how += f", repaired on {min(s['repair_blocks'], metrics['blocks']['train'])} training blocks" if s["repair"] else ""
    how += f", distillation {s['distillation']:g} in fine-tuning" if s["distillation"] else ""
    return (f"Model {bare_name(s['model'])}; text {text or s['dataset']}; strategy {s['strategy']}, level {s['pruning_level']:g}{how}, scored on "
            f"{min(s['calibration_blocks'], metrics['blocks']['validation'])} validation blocks; tested on {metrics['blocks']['tested']} "
            f"test blocks of {s['block_length']} tokens; seed {s['seed']}; {metrics['precision']} on {metrics['device']}; "
            + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")


# %%
if __name__ == "__main__":
    measure(run, "dense", model, tokenizer, test_blocks, settings)


# %% [markdown]
# ## 7. Heads and gates
#
# In every layer, each head reads the text in its own way and writes a vector of `head_dim` numbers per token. The vectors of
# all heads are laid side by side, and one matrix, the layer's **output projection**, mixes them back into the model. So a
# head is a slice of that matrix's *input*, and to remove a head is to multiply its slice by zero:
#
# $$\text{attention}(x) = W_O\,[\,g_1 h_1(x),\; g_2 h_2(x),\; \dots\,] + b,\qquad g_i \in \{0, 1\}.$$
#
# The numbers $g_i$ are the **gates**. A closed gate is exact (the head contributes nothing, whatever attention kernel
# runs), and reversible: set it to one again and the head is back, bit for bit.

# %%
def inputs_first(projection) -> torch.Tensor:
    """The weight of a Linear or Conv1D as (inputs, outputs): a view, whatever way round it is stored."""
    return projection.weight if isinstance(projection, Conv1D) else projection.weight.T


@dataclasses.dataclass
class HeadLayer:
    """Where one layer keeps its heads."""

    path: str  # of the output projection, within the model
    block: torch.nn.Module  # the whole transformer layer
    attention: torch.nn.Module  # its attention module
    projection: torch.nn.Module  # the output projection, a Linear or Conv1D
    heads: int

    @property
    def head_dim(self) -> int:
        return self.output_weight.shape[1]

    @property
    def output_weight(self) -> torch.Tensor:
        """The projection's weight as (heads, head_dim, hidden), a view."""
        return inputs_first(self.projection).unflatten(0, (self.heads, -1))


PROVEN = "GPT-2, OPT, GPT-NeoX/Pythia, Llama, Qwen, Mistral, Gemma, Phi, GPT-J, GPT-Neo, BLOOM, Falcon, GPTBigCode, BioGPT, StableLM"


def find_heads(model) -> list[HeadLayer]:
    """The layers of a causal language model, in order. Raises UserError where their heads cannot be identified."""
    config, layers = model.config.get_text_config(), []
    modules = dict(model.named_modules())
    for path, projection in modules.items():
        parent, _, name = path.rpartition(".")
        is_output = name in ("c_proj", "out_proj", "o_proj", "dense") and isinstance(projection, (torch.nn.Linear, Conv1D))
        block = re.match(r".*?\.\d+(?=\.)", path)
        if is_output and block and "Attention" in type(modules[parent]).__name__:
            layer = HeadLayer(path, modules[block[0]], modules[parent], projection, config.num_attention_heads)
            inputs = projection.weight.shape[0 if isinstance(projection, Conv1D) else 1]
            if inputs % layer.heads == 0:
                layers.append(layer)
    if len(layers) != config.num_hidden_layers:
        raise UserError(f"the attention output projections of {type(model).__name__} cannot be identified ({len(layers)} found in "
                        f"{config.num_hidden_layers} layers): take a model of one of these families: {PROVEN}.")
    return layers


# %% [markdown]
# Closing a head works for any of them. Cutting it out for good (section 13) needs to know where a family keeps queries, keys and values.

# %%
COMPACTABLE = ("gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3")


def can_compact(model) -> bool:
    """True where the model's family is one that compact() is tested on; others keep their gates."""
    return model.config.model_type in COMPACTABLE


# %% [markdown]
# One hook in front of the output projection is all it takes, for every architecture. (Multiplying the attention *weights*
# that a layer returns, as some notebooks do, prunes nothing: the layer's output was computed before.)

# %%
def apply_gates(projection, inputs):
    """Forward pre-hook of an output projection: scales every head's slice of its input (batch, time, heads x head_dim).

    Gates are (heads,), or (batch, 1, heads) where every text has its own.
    """
    x, *rest = inputs
    gates = projection.gates.to(x.dtype)
    return (x * gates.repeat_interleave(x.shape[-1] // gates.shape[-1], dim=-1), *rest)


def add_gates(model) -> None:
    """Gives every head an open gate: a buffer of the output projection, saved and moved with the model."""
    for layer in find_heads(model):
        if not hasattr(layer.projection, "gates"):
            layer.projection.register_buffer("gates", torch.ones(layer.heads, device=model.device))
            layer.projection.gate_hook = layer.projection.register_forward_pre_hook(apply_gates)


def remove_gates(model) -> None:
    """Takes all gates away: the model is again as the library made it."""
    for layer in find_heads(model):
        if hasattr(layer.projection, "gates"):
            layer.projection.gate_hook.remove()
            del layer.projection.gates, layer.projection.gate_hook


@torch.no_grad()
def set_gates(model, gates: torch.Tensor) -> None:
    """Sets the gates (layers, heads) of a model: 1 is open, 0 is closed."""
    add_gates(model)
    for layer, row in zip(find_heads(model), gates, strict=True):
        layer.projection.gates.copy_(row)


def get_gates(model) -> torch.Tensor:
    """The gates of a model, (layers, heads), on the processor."""
    return torch.stack([layer.projection.gates.detach().float().cpu() for layer in find_heads(model)])


@contextlib.contextmanager
def all_open(model):
    """Within it all gates are open, and afterwards they are again as they were, also after an error."""
    before = get_gates(model)
    set_gates(model, torch.ones_like(before))
    try:
        yield
    finally:
        set_gates(model, before)


@contextlib.contextmanager
def without_gates(model):
    """Within it the model has no gates at all, not even open ones: for timing it as it came."""
    before = get_gates(model)
    remove_gates(model)
    try:
        yield
    finally:
        set_gates(model, before)


# %% [markdown]
# Gates can also be asked questions: what would happen to the loss if this one moved? For that they become tensors that gradients flow to, while
# all weights stand still, which saves a third of the computing.

# %%
@contextlib.contextmanager
def movable_gates(model):
    """Within it weights are frozen and `place(rows)` puts tensors in the place of the gates, one for a layer; afterwards all is as it was."""
    add_gates(model)
    projections = [layer.projection for layer in find_heads(model)]
    before, trained = [projection.gates for projection in projections], [p for p in model.parameters() if p.requires_grad]

    def place(rows):
        for projection, row in zip(projections, rows, strict=True):
            projection.gates = row

    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield place
    finally:
        place(before)
        for parameter in trained:
            parameter.requires_grad_(True)


# %% [markdown]
# How many gates a level closes is known before any head is scored, and so is a level that cannot be reached.

# %%
def heads_to_close(layers: int, heads: int, level: float, min_heads: int) -> int:
    """round(level x all heads). Raises UserError where `min_heads` open heads in every layer do not allow so many."""
    wanted, possible = round(level * layers * heads), layers * max(heads - min_heads, 0)
    if wanted > possible:
        raise UserError(f"pruning_level is {level:g} with min_heads {min_heads}, but at most {possible} of {layers * heads} heads "
                        f"({possible / (layers * heads):.2f}) can be closed so: lower one of the two.")
    return wanted


# %% [markdown]
# Which heads these are an importance decides: the lowest numbers go first, wherever they are.

# %%
def choose_gates(importance: torch.Tensor, level: float, min_heads: int = 1) -> torch.Tensor:
    """Gates (layers, heads): the least important are 0, as many as heads_to_close() says, but `min_heads` stay open in every layer."""
    layers, heads = importance.shape
    wanted, gates = heads_to_close(layers, heads, level, min_heads), torch.ones(layers, heads)
    for index in importance.flatten().argsort(stable=True).tolist():
        layer, head = divmod(index, heads)
        if wanted and gates[layer].sum() > min_heads:
            gates[layer, head] = 0
            wanted -= 1
    return gates


# %% [markdown]
# With `uniform` every layer loses equally many heads, and in whole groups: the query heads that share a key/value head stay or go together.
# Llama-like families can say such a shape in their own configuration, so that the smaller model needs no code of its own.

# %%
NATIVE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")


def config_with_fewer(config, heads: int, key_value_heads: int, head_dim: int):
    """A copy of a family's config with so many heads in every layer. Raises UserError where the family cannot have them."""
    shape = f"{heads} heads over {key_value_heads} key/value heads in every layer"
    if config.model_type not in NATIVE:
        raise UserError(f"the configuration of {config.model_type!r} cannot say that a model has {shape} of the old width, "
                        f"only {', '.join(NATIVE)} can: leave uniform off, compacting does not need it.")
    fewer = {"num_attention_heads": heads, "num_key_value_heads": key_value_heads, "head_dim": head_dim}
    try:
        return type(config).from_dict(config.to_dict() | fewer)
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"the configuration of {config.model_type!r} does not allow {shape} ({str(error).splitlines()[-1].strip()}): "
                        "take another pruning_level, or leave uniform off.") from None


def plan_uniform(model, level: float, min_heads: int) -> tuple[int, int]:
    """(query heads in a group, groups to close in every layer). Raises UserError where level and family do not allow it."""
    layer, config = find_heads(model)[0], model.config.get_text_config()
    groups = getattr(config, "num_key_value_heads", None) or layer.heads
    size, close = layer.heads // groups, round(level * groups)
    if (level and not close) or (groups - close) * size < max(min_heads, 1):
        possible = [f"{n / groups:.2f}" for n in range(1, groups) if (groups - n) * size >= min_heads]
        raise UserError(f"pruning_level is {level:g} with uniform and min_heads {min_heads}, but every layer has {groups} groups of heads: "
                        f"take {', '.join(possible) or 'a smaller min_heads'}.")
    config_with_fewer(config, (groups - close) * size, groups - close, layer.head_dim)
    return size, close


# %%
if __name__ == "__main__":
    add_gates(model)
    layers, heads = get_gates(model).shape
    wanted = heads_to_close(layers, heads, settings.pruning_level, settings.min_heads)
    if settings.uniform:
        size, close = plan_uniform(model, settings.pruning_level, settings.min_heads)
        wanted = layers * size * close
    print(f"{layers} layers with {heads} heads each: {layers * heads} gates, {wanted} of which will be closed")


# %% [markdown]
# ## 8. Which heads matter? Importance
#
# A strategy gives every head a number, its **importance**. All of them share one interface: `get_strategy(name)` returns a
# strategy, and `strategy.score(model, blocks)` returns a table (layers × heads), higher meaning more important. New
# strategies are one small class and one line in `STRATEGIES`.
#
# **Random** is the yardstick: a strategy that is no better knows nothing.

# %%
@dataclasses.dataclass
class Random:
    """Random importance, the same for the same seed."""

    seed: int = 0

    def score(self, model, blocks=None) -> torch.Tensor:
        layers = find_heads(model)
        return torch.rand(len(layers), layers[0].heads, generator=torch.Generator().manual_seed(self.seed))


# %% [markdown]
# **Magnitude** is the L2 norm of everything a head owns: its rows of the query, key and value projections and its columns of the
# output projection. It looks at no text. With grouped queries, several query heads share one key/value head, and
# each of them counts it.
#
# The families store these weights in three ways: as three matrices, as one matrix with the queries, keys and values one after the
# other (GPT-2, Phi-3), or as one matrix in which every group of heads has its queries, key and value together (GPT-NeoX,
# BLOOM, Falcon).

# %%
def find_rows(attention, heads: int, head_dim: int) -> list[tuple[str, torch.Tensor]]:
    """For query, key and value: the name of the projection that computes it, and which of its outputs each head owns, (n, head_dim).

    Raises ValueError for an attention module that keeps them in another way.
    """
    parts = dict(attention.named_children())

    def outputs(name):
        weight = parts[name].weight
        return torch.arange(weight.shape[1 if isinstance(parts[name], Conv1D) else 0]).view(-1, head_dim)

    if "q_proj" in parts:
        return [(name, outputs(name)) for name in ("q_proj", "k_proj", "v_proj")]
    fused = next((name for name in ("query_key_value", "c_attn", "qkv_proj") if name in parts), None)
    if fused is None:
        raise ValueError(f"{type(attention).__name__} has the projections {', '.join(parts)}: none that is known here")
    rows = outputs(fused)
    shared = (len(rows) - heads) // 2  # key heads, and value heads
    if fused == "query_key_value":
        rows = rows.view(shared, -1, head_dim)  # each group: its queries, one key, one value
        return [(fused, rows[:, :-2].flatten(0, 1)), (fused, rows[:, -2]), (fused, rows[:, -1])]
    return [(fused, part) for part in rows.split([heads, shared, shared])]


def query_key_value_weights(layer: HeadLayer) -> list[torch.Tensor]:
    """[query, key, value] weights of a layer, each (heads, head_dim, hidden), shared key/value heads repeated."""
    weights = []
    for name, rows in find_rows(layer.attention, layer.heads, layer.head_dim):
        projection = getattr(layer.attention, name)
        weight = projection.weight.T if isinstance(projection, Conv1D) else projection.weight
        weights.append(weight[rows].repeat_interleave(layer.heads // len(rows), dim=0))
    return weights


# %% [markdown]
# With these at hand the score is one line.

# %%
@dataclasses.dataclass
class Magnitude:
    """L2 norm of a head's query, key, value and output weights."""

    @torch.no_grad()
    def score(self, model, blocks=None) -> torch.Tensor:
        scores = []
        for layer in find_heads(model):
            try:
                weights = [*query_key_value_weights(layer), layer.output_weight]
            except ValueError as error:
                raise UserError(f"strategy 'magnitude' cannot find the weights of a head ({error}): take another strategy.") from None
            scores.append(sum(weight.float().flatten(1).square().sum(1) for weight in weights).sqrt().cpu())
        return torch.stack(scores)


# %% [markdown]
# **Entropy** asks how a head reads. With $a_{ij}$ the attention that token $i$ pays to token $j$, the entropy
# $H_i = -\sum_j a_{ij}\log a_{ij}$ is 0 where the head looks at one token and $\log i$ where it spreads evenly over all it can see.
# The literal rule (`entropy-literal`) says: diffuse heads are unimportant. It fails badly, for two reasons:
#
# 1. **Attention sinks.** A head with nothing to say must still spend its attention somewhere, since every row sums to one. Trained models
#    park it on the first token, whose value vector is nearly zero ([Xiao et al. 2023](https://arxiv.org/abs/2309.17453)). Such a head is
#    *idle* and has a very *low* entropy: the literal rule keeps it and closes the working ones.
# 2. **Position.** Token 500 can spread over a hundred times more tokens than token 5, so raw entropies measure where
#    a token stands as much as what the head does.
#
# The rule here repairs both. Entropy is divided by its maximum at that position, which gives a *focus* between 0 and 1; and focus only
# counts as far as the head *writes* something, measured against the stream of numbers it writes into:
#
# $$\text{importance}(h)=\operatorname*{mean}_i\;\frac{\lVert W_O^{(h)} h_i\rVert}{\lVert x_i\rVert}\Big(1+\underbrace{1-\tfrac{H_i}{\log i}}_{\text{focus}}\Big)$$
#
# where $x_i$ is the residual stream right after the attention's output was added. A sink head looks sharply, but
# at an empty vector: it writes next to nothing and scores low (the norm of what attention moves rather than its
# weights: [Kobayashi et al. 2020](https://arxiv.org/abs/2004.10102)). A diffuse early head that gathers a lot scores high.

# %%
@contextlib.contextmanager
def eager_attention(model):
    """Within it the model hands out its attention weights, which the fast kernels never build."""
    # Not set_attn_implementation(): it refuses families that read this attribute themselves, such as Falcon.
    before, model.config._attn_implementation = model.config._attn_implementation, "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def focus(attention: torch.Tensor) -> torch.Tensor:
    """1 - entropy / log(visible tokens) of causal attention (..., time, time): (..., time), and 0 for the first token."""
    attention = attention.float()
    entropy = -torch.xlogy(attention, attention).sum(-1)
    visible = torch.arange(1, attention.shape[-1] + 1, device=attention.device)
    return torch.where(visible > 1, 1 - entropy / visible.log().clamp_min(1e-9), 0.0)


def adds_in_parallel(config) -> bool:
    """True where attention and MLP are added to the residual stream at once (GPT-NeoX, GPT-J, Phi, Falcon)."""
    return (getattr(config, "use_parallel_residual", False) or getattr(config, "parallel_attn", False)
            or config.model_type in ("gptj", "phi", "codegen", "cohere"))


# %% [markdown]
# Attention weights are large, batch × heads × time × time for every layer, so they are reduced inside the forward pass, layer by layer,
# and let go.

# %%
@dataclasses.dataclass
class Entropy:
    """How much a head writes x how focused it reads; `literal=True` is minus the mean attention entropy instead."""

    literal: bool = False
    batch_size: int = 4
    dtype: torch.dtype = torch.float32

    @torch.no_grad()
    def score(self, model, blocks: torch.Tensor) -> torch.Tensor:
        """Importance (layers, heads) on blocks (n, time). Attention is reduced layer by layer and never kept."""
        model.eval()
        with eager_attention(model):
            room = room_for_blocks(model, blocks.shape[1], self.dtype, logits=False, maps=True)
            total = fit_batch_size(lambda size: self._score(model, own_share(blocks), size), self.batch_size, "scoring by entropy", room)
        return add_up(total).cpu() / len(blocks)

    def _score(self, model, blocks, batch_size):
        layers = find_heads(model)
        parallel = adds_in_parallel(model.config.get_text_config())
        sums = [torch.zeros(layer.heads, device=model.device) for layer in layers]
        with contextlib.ExitStack() as hooks:
            for layer, total in zip(layers, sums):
                for handle in self._watch(layer, total, parallel):
                    hooks.callback(handle.remove)
            for batch in progress(blocks.split(batch_size), "importance", model.device):
                with autocast(model.device, self.dtype):
                    model.base_model(batch.to(model.device), use_cache=False)
        return torch.stack(sums)

    def _watch(self, layer, total, parallel):
        """Hooks that add a layer's scores, summed over the batch, to `total` (heads,)."""
        seen = {}
        weight = layer.output_weight.float()
        gram = weight @ weight.mT  # |W h|^2 = h' W W' h, so that no head's output (hidden wide) is ever built

        def enter_block(block, args, kwargs):
            seen["stream"] = args[0] if args else kwargs["hidden_states"]

        def enter_projection(projection, args):
            heads = args[0].float().unflatten(-1, (layer.heads, layer.head_dim))
            power = (torch.einsum("bthd,hde->bthe", heads, gram) * heads).sum(-1)
            seen["written"] = power.clamp_min(0).sqrt().transpose(1, 2)  # (batch, heads, time)

        def leave_attention(attention, args, output):
            if output[1] is None:
                raise UserError(f"strategy 'entropy' needs attention weights, which {type(attention).__name__} does not give: "
                                "take another strategy.")
            if self.literal:
                attention = output[1].float()
                total.add_(torch.xlogy(attention, attention).sum(-1)[..., 1:].mean(-1).sum(0))
            else:
                seen["focus"] = focus(output[1])
                seen["stream"] = seen["stream"] + output[0]

        def leave_block(block, args, output):
            after = (output[0] if isinstance(output, tuple) else output) if parallel else seen["stream"]
            share = seen["written"] / after.float().norm(dim=-1)[:, None]
            total.add_((share * (1 + seen["focus"]))[..., 1:].mean(-1).sum(0))
            seen.clear()

        yield layer.attention.register_forward_hook(leave_attention)
        if not self.literal:
            yield layer.projection.register_forward_pre_hook(enter_projection)
            yield layer.block.register_forward_pre_hook(enter_block, with_kwargs=True)
            yield layer.block.register_forward_hook(leave_block)


# %% [markdown]
# **Gradient** asks the loss instead of the attention: by how much would it change if the head's gate moved a little? One backward pass over some
# text answers for all heads at once, and a head whose gate moves nothing is not needed. The importance is the mean over texts
# of $|\partial L/\partial g|$ ([Michel et al. 2019](https://arxiv.org/abs/1905.10650)); squared, it is the diagonal of the
# **Fisher** information, which says how fast the model's predictions change ([Kwon et al. 2022](https://arxiv.org/abs/2204.09656)).

# %%
SCALE = 1024.0  # lifts small gradients into the range of float16; a power of two, so that nothing else changes


@dataclasses.dataclass
class Gradient:
    """Mean over blocks of |d loss / d gate|; `squared=True` is the mean square instead (Fisher)."""

    squared: bool = False
    batch_size: int = 4
    dtype: torch.dtype = torch.float32

    def score(self, model, blocks: torch.Tensor) -> torch.Tensor:
        """Importance (layers, heads) on blocks (n, time), at the gates that the model has."""
        model.eval()
        with movable_gates(model) as place:
            gates = torch.stack([layer.projection.gates for layer in find_heads(model)]).detach()
            # On a processor two texts at a time are fastest: the logits of more are too large for its caches.
            size = min(self.batch_size, 2) if model.device.type == "cpu" else self.batch_size
            room = room_for_blocks(model, blocks.shape[1], self.dtype, backward=True)
            total = fit_batch_size(lambda size: self._score(model, own_share(blocks), size, gates, place), size, "scoring by gradient", room)
        return add_up(total).cpu() / len(blocks)

    def _score(self, model, blocks, batch_size, gates, place):
        total = torch.zeros_like(gates)
        for batch in progress(blocks.to(model.device).split(batch_size), "importance", model.device):
            own = gates[:, None, None].repeat(1, len(batch), 1, 1).requires_grad_()  # (layers, batch, 1, heads): every block has its own
            place(own)
            with autocast(model.device, self.dtype):
                logits = model(batch[:, :-1], use_cache=False).logits  # a slice of logits would cost a copy of them on the way back
            nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum")
            (slope,) = torch.autograd.grad(nll * (SCALE / (batch.shape[1] - 1)), own)  # of each block's mean loss, for no block's gate moves another's
            slope = slope / SCALE
            total += (slope.square() if self.squared else slope.abs()).sum((1, 2))
        return total


# %% [markdown]
# A score describes the model that was scored, and once some heads are closed it is another model: of two heads that do the same, neither is
# missed until the other is gone. With `rounds` a part of the heads is closed at a time, and the rest are scored anew before the next part
# goes.

# %%
@dataclasses.dataclass
class InRounds:
    """Scores by another strategy, closing heads in `rounds` equal parts up to `level` and scoring again in between."""

    strategy: object
    rounds: int
    level: float
    min_heads: int = 1

    def score(self, model, blocks: torch.Tensor) -> torch.Tensor:
        """Importance (layers, heads): heads closed in round n are in [n, n + 1), so that choose_gates() closes these very heads."""
        layers = find_heads(model)
        importance, gates = torch.zeros(len(layers), layers[0].heads), torch.ones(len(layers), layers[0].heads)
        with all_open(model):
            for number in range(1, self.rounds + 1):
                set_gates(model, gates)
                rank = self.strategy.score(model, blocks).flatten().argsort(stable=True).argsort().view_as(gates) / gates.numel()
                importance = torch.where(gates == 0, importance, number + rank)
                gates = choose_gates(importance, self.level * number / self.rounds, self.min_heads)
        return importance


# %% [markdown]
# **Learned** goes all the way: the gates are trained, with all weights frozen, to keep the predictions of the dense model while only so many may be
# open. During training a gate is a number between 0 and 1, $g=\sigma\big((a-\tau+\varepsilon)/T\big)$ (the *concrete* relaxation:
# [Louizos et al. 2018](https://arxiv.org/abs/1712.01312), used for heads by [Voita et al. 2019](https://arxiv.org/abs/1905.09418)).
# Three choices differ from theirs:
#
# - The budget is kept exactly, in every step, by the threshold $\tau$; so there is no penalty to weigh against the loss.
# - The loss is the Kullback-Leibler divergence from the dense model's predictions. It is zero for the dense model, and
#   says more per token than the one word that happened to come next.
# - The temperature $T$ falls, so gates are soft at first and nearly decided in the end. The start is the Fisher score.
#
# It takes minutes where Fisher takes half a minute, and closes heads at the lowest cost on most of the models that it was measured on: whether
# a head can go depends on which others go. For a quick look, `fisher` with the repair of section 11 comes near.

# %%
def soft_gates(scores: torch.Tensor, open_gates: float, temperature: float) -> torch.Tensor:
    """sigmoid((scores - threshold) / temperature) of scores (..., layers, heads); thresholds are such that each table of gates sums to
    `open_gates`, and the gradient knows that they move along."""
    values = scores.detach().flatten(-2)
    low, high = values.amin(-1, keepdim=True) - 20 * temperature, values.amax(-1, keepdim=True) + 20 * temperature
    for _ in range(40):
        middle = (low + high) / 2
        too_many = torch.sigmoid((values - middle) / temperature).sum(-1, keepdim=True) > open_gates
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    slope = torch.sigmoid((values - low) / temperature)
    slope = slope * (1 - slope)
    moves = (slope * scores.flatten(-2)).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.sigmoid((scores.flatten(-2) - low - (moves - moves.detach())) / temperature).view_as(scores)


def cut_shorter(blocks: torch.Tensor, longest: int = 128) -> torch.Tensor:
    """Blocks (n, time) cut into equal parts of at most `longest` tokens."""
    parts = math.ceil(blocks.shape[1] / longest)
    length = blocks.shape[1] // parts
    return blocks[:, : parts * length].reshape(-1, length)


def divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean Kullback-Leibler divergence per token of the predictions of `logits` from those of `wanted`, both (batch, time, vocabulary)."""
    given, wanted = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)  # (not kl_div, whose gradient XLA does not vouch for)
    return (wanted.exp() * (wanted - given)).sum(-1).mean()


# %%
@dataclasses.dataclass
class Learned:
    """Gates trained on the dense model's predictions, with frozen weights and exactly `level` of them closed."""

    level: float
    steps: int = 240
    seed: int = 0
    batch_size: int = 4
    dtype: torch.dtype = torch.float32
    rate: float = 0.1  # Adam's, falling to a tenth
    hot: float = 1.0  # temperature of the first step
    cold: float = 0.03  # and of the last
    noise: float = 0.5  # scale of the logistic noise, in temperatures

    def score(self, model, blocks: torch.Tensor) -> torch.Tensor:
        """Importance (layers, heads) learned on blocks (n, time): texts of 128 tokens, 256 tokens in a step, each text with its own draw of the noise."""
        start = Gradient(True, self.batch_size, self.dtype).score(model, blocks).clamp_min(1e-20).log()
        open_gates = start.numel() - round(self.level * start.numel())
        if open_gates == start.numel():
            return start
        texts = cut_shorter(blocks)
        per_step = min(len(texts), max(1, 256 // texts.shape[1]))
        with movable_gates(model) as place:
            dense = fit_batch_size(lambda size: self._last_states(model, texts, size), self.batch_size, "looking at the dense model")
            return fit_batch_size(lambda size: self._train(model, place, start, open_gates, texts, dense, per_step, size), per_step, "learning gates", in_step=True).cpu()

    def _train(self, model, place, start, open_gates, texts, dense, per_step, at_once):
        scores = ((start - start.mean()) / start.std().clamp_min(1e-6)).to(model.device).requires_grad_()
        optimizer, generator = torch.optim.Adam([scores], lr=self.rate, betas=(0.9, 0.98)), torch.Generator().manual_seed(self.seed)
        order = torch.cat([torch.randperm(len(texts), generator=generator) for _ in range(math.ceil(self.steps * per_step / len(texts)))])
        steps_right = torch.zeros((), device=model.device)
        for step, chosen in enumerate(progress(order.split(per_step)[: self.steps], "learning gates", model.device)):
            done = step / max(self.steps - 1, 1)
            temperature = self.hot * (self.cold / self.hot) ** done
            optimizer.param_groups[0]["lr"] = self.rate * (1 - 0.9 * done)
            chance = torch.rand(len(chosen), *scores.shape, generator=generator).clamp(1e-4, 1 - 1e-4).logit().to(model.device)
            gates = own_share(soft_gates(scores + self.noise * temperature * chance, open_gates, temperature))
            slopes = []
            for mine, part in zip(own_share(chosen).split(at_once), gates.detach().split(at_once)):
                part.requires_grad_()
                place(part[:, None].unbind(2))  # for each layer (texts, 1, heads)
                loss = self._loss(model, texts[mine].to(model.device), dense[mine].to(model.device))
                slopes += torch.autograd.grad(loss * (SCALE * len(mine) / len(chosen)), part)
            (scores.grad,) = torch.autograd.grad(gates, scores, torch.cat(slopes) / SCALE) if slopes else (torch.zeros_like(scores),)
            add_up(scores.grad)
            optimizer.step()
            steps_right += torch.isfinite(scores).all()
            if (step % 24 == 23 or step + 1 == self.steps) and steps_right < step + 1:  # now and then: to look is to wait for the device
                raise RunError(f"the gates are not finite after step {int(steps_right) + 1} of {self.steps}: take --precision fp32, or another strategy.")
        return scores.detach()

    @torch.no_grad()
    def _last_states(self, model, blocks, batch_size):
        """What the model's last layer gives, (n, time, hidden): the logits are one multiplication away, and a hundred times larger."""
        with autocast(model.device, self.dtype):
            return torch.cat([model.base_model(batch.to(model.device), use_cache=False).last_hidden_state.cpu()
                              for batch in progress(blocks.split(batch_size), "importance", model.device)])

    def _loss(self, model, batch, dense):
        """The divergence of the gated model's predictions from the dense one's."""
        to_logits = model.get_output_embeddings()
        with autocast(model.device, self.dtype):
            gated = to_logits(model.base_model(batch, use_cache=False).last_hidden_state)
            with torch.no_grad():
                wanted = to_logits(dense.to(gated.dtype))
        return divergence(gated, wanted)


# %% [markdown]
# All of them by name:

# %%
STRATEGIES = {
    "learned": Learned,
    "fisher": lambda **options: Gradient(squared=True, **options),
    "gradient": Gradient,
    "entropy": Entropy,
    "magnitude": Magnitude,
    "random": Random,
    "entropy-literal": lambda **options: Entropy(literal=True, **options),
}


def get_strategy(name: str, rounds: int = 1, **options):
    """A strategy by name, for every architecture. Raises UserError for a name or an option that it does not have.

    Options: `random` takes seed; the gradient and entropy strategies take batch_size and dtype, and, with rounds above 1, level and
    min_heads; `learned` takes level, steps, seed, batch_size, dtype, rate, hot, cold and noise.
    """
    if name not in STRATEGIES:
        nearest = difflib.get_close_matches(name, STRATEGIES, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "take one of these."
        raise UserError(f"strategy is {name!r}, but must be one of {', '.join(STRATEGIES)}: {hint}")
    if rounds > 1 and name not in REPEATABLE:
        raise UserError(f"strategy {name!r} is not scored in rounds, only {', '.join(REPEATABLE)} are: leave rounds out.")
    try:
        if rounds > 1:
            own = {key: value for key, value in options.items() if key not in ("level", "min_heads")}
            return InRounds(STRATEGIES[name](**own), rounds, **{key: options[key] for key in options.keys() - own.keys()})
        return STRATEGIES[name](**options)
    except TypeError as error:
        raise UserError(f"strategy {name!r} does not take these options ({error}): correct them.") from None


def options_for(settings: Settings, dtype: torch.dtype) -> dict:
    """What the chosen strategy takes from the settings."""
    if settings.strategy in ("random", "magnitude"):
        return {"seed": settings.seed} if settings.strategy == "random" else {}
    options = {"batch_size": settings.batch_size, "dtype": dtype}
    if settings.strategy == "learned":
        options |= {"level": settings.pruning_level, "steps": settings.gate_steps, "seed": settings.seed}
    elif settings.rounds > 1:
        options |= {"rounds": settings.rounds, "level": settings.pruning_level, "min_heads": settings.min_heads}
    return options


# %%
if __name__ == "__main__":
    calibration = blocks["validation"][: settings.calibration_blocks]
    options = options_for(settings, dtype)
    with run.step("importance"), all_open(model):
        kept, _ = run.once("importance", (model, calibration, settings.strategy, options), lambda: (
            {"importance": get_strategy(settings.strategy, **options).score(model, calibration)}, {}))
        importance = kept["importance"]
        run.metrics["importance"] = importance.tolist()
    print(f"{settings.strategy}, on {len(calibration)} blocks of validation text")


# %% [markdown]
# ## 9. Prune
#
# The least important share of all heads is closed, wherever they are, but every layer keeps at least `min_heads`. The weights
# are not touched, so this cell can be run again and again with another level.
#
# What to expect: a model of a hundred million parameters loses a few percent of its perplexity with a tenth of its heads, a quarter with a third of them, and falls
# apart somewhere beyond a half; larger models can spare more. Repair gives back about half of the loss. Fine-tuning gives back more than was lost, because it
# also teaches the model this kind of text: so the comparison that counts is with the dense model after the same fine-tuning (section 15).

# %%
def choose_uniform_gates(importance: torch.Tensor, size: int, close: int) -> torch.Tensor:
    """Gates (layers, heads): in every layer the `close` least important groups of `size` neighbouring heads are 0."""
    groups = importance.unflatten(1, (-1, size)).mean(-1)
    lowest = groups.argsort(dim=1, stable=True)[:, :close]
    return torch.ones_like(groups).scatter(1, lowest, 0).repeat_interleave(size, 1)


def describe_heads(gates: torch.Tensor) -> dict:
    """Counts for the record: total, closed, open_per_layer, closed_per_layer, and closed_list as [layer, head] pairs."""
    closed = gates == 0
    return {"total": gates.numel(), "closed": int(closed.sum()), "open_per_layer": (~closed).sum(1).tolist(),
            "closed_per_layer": closed.sum(1).tolist(), "closed_list": closed.nonzero().tolist()}


# %% [markdown]
# The picture to look at: dark heads are the least important, a cross is a closed gate.

# %%
def plot_heads(axes, importance: torch.Tensor, gates: torch.Tensor) -> None:
    """Heatmap of (layers, heads), layers from left to right: colour is the rank of a head's importance, a cross a closed gate."""
    layers, heads = importance.shape
    rank = importance.flatten().argsort().argsort().view(layers, heads) / max(importance.numel() - 1, 1)
    image = axes.imshow(rank.T, cmap="cividis", aspect="auto", vmin=0, vmax=1)
    closed_layers, closed_heads = (gates == 0).nonzero(as_tuple=True)
    axes.scatter(closed_layers, closed_heads, marker="x", color="white", s=26, linewidths=1.6)
    axes.set(xlabel="layer", ylabel="head", xticks=range(0, layers, math.ceil(layers / 20)), yticks=range(0, heads, math.ceil(heads / 16)))
    bar = axes.figure.colorbar(image, ax=axes, label="importance (rank)", ticks=[0, 1], pad=0.01)
    bar.ax.set_yticklabels(["least", "most"])


def draw_heads(importance: torch.Tensor, gates: torch.Tensor, title: str) -> Figure:
    """plot_heads() as a figure of its own."""
    layers, heads = importance.shape
    figure = Figure(figsize=(max(5, 0.3 * layers + 2), max(2.6, 0.24 * heads + 1.2)), facecolor="white", layout="constrained")
    plot_heads(figure.subplots(), importance, gates)
    figure.axes[0].set_title(title)
    return figure


# %% [markdown]
# Closing heads makes everything that was measured of an earlier choice out of date, so the record is kept in one place.

# %%
def close_heads(run: Run, model, tokenizer, gates: torch.Tensor, test_blocks: torch.Tensor, settings: Settings, by_hand: int = 0) -> None:
    """Sets the gates of a model, and records and measures what that does; `by_hand` gates are not as the strategy has them."""
    set_gates(model, gates)
    run.metrics["heads"] = describe_heads(gates) | {"by_hand": by_hand}
    measure(run, "pruned", model, tokenizer, test_blocks, settings)
    print(f"heads lost, layer by layer: {' '.join(map(str, run.metrics['heads']['closed_per_layer']))}")


def picture_heads(run: Run, importance: torch.Tensor, gates: torch.Tensor) -> Figure:
    """What was closed, with the finding as its title."""
    heads, ppl, strategy = run.metrics["heads"], run.metrics["perplexity"], run.metrics["settings"]["strategy"]
    return draw_heads(importance, gates, f"{heads['closed']} of {heads['total']} heads closed (×) by {strategy}: perplexity {ppl['dense']:.1f} → {ppl['pruned']:.1f}")


# %%
if __name__ == "__main__":
    if settings.uniform:
        gates = choose_uniform_gates(importance, *plan_uniform(model, settings.pruning_level, settings.min_heads))
    else:
        gates = choose_gates(importance, settings.pruning_level, settings.min_heads)
    if not run.taken:
        run.metrics.pop("taken", None)
    close_heads(run, model, tokenizer, gates, test_blocks, settings)
    pruned = model  # until it is repaired
    run.show(picture_heads(run, importance, gates), "heads.png")

# %% [markdown]
# ## 10. Explore
#
# Look and play before you go on. In the **explorer** every square is a head, layers from left to right, dark where it matters least, × where
# its gate is closed. Drag the level, change the strategy, click single heads; see what the smaller model would weigh, measure it on validation
# text, let it write. Nothing of that touches the run, until you press *Take it*: then go on from section 11.
#
# What a choice of heads saves is arithmetic. A closed query head frees its rows of the query projection and its columns of the output
# projection; a key/value head is free when no open head reads it any more.

# %%
def predict_cost(model, gates: torch.Tensor, tokens: int) -> dict[str, float]:
    """`parameters` and `flops_per_token` (in texts of `tokens` tokens) of the model with only the heads that `gates` (layers, heads) leave."""
    linear = [module for module in model.modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    parameters, products = model.num_parameters(), sum(module.weight.numel() for module in linear)
    for layer, row in zip(find_heads(model), gates != 0):
        lost = int((~row).sum()) * layer.output_weight[0].numel()
        for name, rows in find_rows(layer.attention, layer.heads, layer.head_dim):
            projection = getattr(layer.attention, name)
            closed = int((~row.view(len(rows), -1).any(1)).sum()) * layer.head_dim  # outputs that nobody reads
            lost += closed * inputs_first(projection).shape[0]
            parameters -= closed * (projection.bias is not None)
        if not row.any():  # norms of queries and keys go too
            parameters -= sum(p.numel() for name, p in layer.attention.named_parameters() if "norm" in name)
        parameters, products = parameters - lost, products - lost
    head_dim = find_heads(model)[0].head_dim
    return {"parameters": parameters, "flops_per_token": 2 * products + 4 * tokens * head_dim * int((gates != 0).sum())}


# %% [markdown]
# A callback that takes long would stop the notebook, and one that fails would do so unseen. So long jobs run in a thread, on a model of their own that
# shares its weights with `model` and has only gates to itself, and whatever goes wrong is said in the panel.

# %%
def sharing_copy(model):
    """A copy of a gated model that shares its weights and has gates of its own."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def close_panel(widget) -> None:
    """Closes a widget and all that is in it: the notebook's server, and with it the models behind the buttons, would be kept for good."""
    for part in (*getattr(widget, "children", ()), getattr(widget, "style", None), getattr(widget, "layout", None)):
        if isinstance(part, widgets.Widget):
            close_panel(part)
    widget.close()


class Cancelled(Exception):
    """Somebody pressed Cancel."""


class Panel:
    """A line of text, and a bar with a button to cancel while a job runs: one job at a time, in a thread."""

    def __init__(self):
        self.text, self.bar, self.cancel = widgets.HTML(), widgets.FloatProgress(max=1.0), widgets.Button(description="Cancel")
        self.busy = widgets.HBox([self.bar, self.cancel], layout=widgets.Layout(display="none"))
        self.box, self.stop, self.thread = widgets.VBox([self.busy, self.text]), threading.Event(), None
        self.cancel.on_click(lambda _: self.stop.set())

    def say(self, words: str, wrong: bool = False):
        color = "color: #d55e00" if wrong else ""
        self.text.value = f'<div style="line-height: 1.4; white-space: pre-wrap; {color}">{html.escape(words)}</div>'

    def guard(self, work):
        """work(), and what it returns is said; what it raises too, for nobody reads the log that it would end in."""
        try:
            words = work()
            if words is not None:
                self.say(words)
        except Cancelled:
            self.say("Cancelled.")
        except Exception as error:
            self.say(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}", wrong=True)

    def start(self, work):
        """guard(work) in a thread, with the bar."""
        if self.thread is not None and self.thread.is_alive():
            return self.say("One thing at a time: wait, or cancel.", wrong=True)

        def job():
            PROGRESS.set(self.count)
            self.bar.value, self.busy.layout.display = 0.0, ""
            self.guard(work)
            self.busy.layout.display = "none"

        self.stop.clear()
        self.thread = threading.Thread(target=job, daemon=True)
        self.thread.start()

    def count(self, items, title: str):
        self.bar.description = title
        for number, item in enumerate(items):
            if self.stop.is_set():
                raise Cancelled
            self.bar.value = number / len(items)
            yield item


# %% [markdown]
# The grid of heads is a button for each, coloured by a stylesheet, which costs one short message for a head that changes.

# %%
COLORS = [to_hex(color) for color in matplotlib.colormaps["cividis"].resampled(16).colors]
STYLE = ("<style>.prune-head.prune-head {width: 22px; height: 17px; line-height: 17px; padding: 0; margin: 0; min-width: 0; border: 0; "
         "border-radius: 2px; font-size: 13px; font-weight: bold; overflow: hidden} .prune-head.prune-head:hover {outline: 2px solid #d55e00} "
         ".prune-label.prune-label, .prune-label .widget-html-content {width: 22px; height: 17px; line-height: 17px; margin: 0; font-size: 10px; "
         "text-align: center; overflow: hidden}"
         + "".join(f".prune-head.prune-head.prune-{number} {{background: {color}; color: {'#fff' if number < 10 else '#000'}}}"
                   for number, color in enumerate(COLORS)) + "</style>")


class HeadGrid:
    """Layers from left to right, heads from top to bottom; `clicked(layer, head)` is called where one is clicked."""

    def __init__(self, layers: int, heads: int, clicked):
        layout, self.buttons, cells = widgets.Layout(), {}, [widgets.HTML(str(name)).add_class("prune-label") for name in ("", *range(layers))]
        for head in range(heads):
            cells.append(widgets.HTML(str(head)).add_class("prune-label"))
            for layer in range(layers):
                button = widgets.Button(tooltip=f"layer {layer}, head {head}", layout=layout).add_class("prune-head")
                button.on_click(lambda _, place=(layer, head): clicked(*place))
                self.buttons[layer, head] = button
                cells.append(button)
        grid = widgets.Layout(grid_template_columns=f"repeat({layers + 1}, 22px)", grid_gap="1px", align_items="center", overflow="auto")
        self.box, self.colors = widgets.GridBox(cells, layout=grid), {}

    def show(self, importance: torch.Tensor, gates: torch.Tensor):
        """Colours by the rank of importance (layers, heads), a cross where a gate is 0. Only what changes is sent."""
        rank = importance.flatten().argsort().argsort().view_as(importance) * 16 // importance.numel()
        for (layer, head), button in self.buttons.items():
            color = f"prune-{rank[layer, head]}"
            if self.colors.get((layer, head)) != color:
                button.remove_class(self.colors.get((layer, head), ""))
                button.add_class(color)
                self.colors[layer, head] = color
            button.description = "\N{NO-BREAK SPACE}" if gates[layer, head] else "×"  # (an empty one would not take the cross away)


# %%
class Explorer:
    """The panel of section 10. `take(gates, importance, strategy, level, by_hand)` is what the button *Take it* does."""

    def __init__(self, model, tokenizer, blocks: dict[str, torch.Tensor], settings: Settings, dtype: torch.dtype, importance: torch.Tensor, take):
        self.model, self.tokenizer, self.blocks, self.settings, self.dtype, self.take = sharing_copy(model), tokenizer, blocks, settings, dtype, take
        self.importance = {settings.strategy: importance}  # of every strategy that was scored
        self.dense, self.gates, self.chosen = None, get_gates(model), get_gates(model)
        wide = {"style": {"description_width": "70px"}}
        self.strategy = widgets.Dropdown(options=STRATEGY_NAMES, value=settings.strategy, description="strategy", **wide)
        self.level = widgets.FloatSlider(settings.pruning_level, min=0, max=0.95, step=0.01, description="level", readout_format=".0%", **wide)
        self.min_heads = widgets.BoundedIntText(settings.min_heads, min=0, max=importance.shape[1], description="min heads", **wide)
        self.prompt = widgets.Text(settings.prompt, description="prompt", layout=widgets.Layout(width="480px"), **wide)
        self.measure, self.taking, self.write = (widgets.Button(description=words, tooltip=tip) for words, tip in (
            ("Measure", "validation perplexity of what is shown"), ("Take it", "these heads become those of the run"),
            ("Write", "dense model and shown model go on from the prompt")))
        self.counts, self.panel, self.grid = widgets.HTML(), Panel(), HeadGrid(*importance.shape, self.toggle)
        for control in (self.strategy, self.level, self.min_heads):
            control.observe(lambda _: self.choose(), "value")
        for button, job in ((self.measure, self.perplexity), (self.taking, self.take_it), (self.write, self.samples)):
            button.on_click(lambda _, job=job: self.panel.start(job))
        self.box = widgets.VBox([widgets.HTML(STYLE), widgets.HBox([self.strategy, self.level, self.min_heads]), self.grid.box, self.counts,
                                 widgets.HBox([self.measure, self.taking]), widgets.HBox([self.prompt, self.write]), self.panel.box])
        self.refresh()

    def choose(self):
        """The gates that strategy, level and minimum ask for; scores first where there are none yet."""
        def close():
            importance = self.importance[self.strategy.value]
            self.gates = choose_gates(importance, self.level.value, self.min_heads.value)
            self.chosen = self.gates.clone()
            self.refresh()
            return ""

        def score():
            name = self.strategy.value
            options = options_for(dataclasses.replace(self.settings, strategy=name, rounds=1, pruning_level=self.level.value), self.dtype)
            with all_open(self.model):
                self.importance[name] = get_strategy(name, **options).score(self.model, self.calibration())
            return close()

        if self.strategy.value in self.importance:
            self.panel.guard(close)
        else:
            self.panel.say(f"Scoring with {self.strategy.value}, once.")
            self.panel.start(score)

    def toggle(self, layer: int, head: int):
        self.gates[layer, head] = 1 - (self.gates[layer, head] != 0).float()
        self.refresh()

    def refresh(self):
        """Grid and counts as the gates are."""
        self.grid.show(self.importance.get(self.strategy.value, self.gates), self.gates)
        closed, total = int((self.gates == 0).sum()), self.gates.numel()
        words = f"<b>{total - closed} heads open, {closed} closed</b> ({closed / total:.0%})"
        if can_compact(self.model):
            before, after = (predict_cost(self.model, gates, self.settings.block_length) for gates in (torch.ones_like(self.gates), self.gates))
            words += (f" · {after['parameters'] / 1e6:.2f} M parameters ({after['parameters'] / before['parameters'] - 1:+.1%}) · "
                      f"{after['flops_per_token'] / 1e6:,.1f} MFLOP a token ({after['flops_per_token'] / before['flops_per_token'] - 1:+.1%})")
        self.counts.value = words

    def calibration(self) -> torch.Tensor:
        return self.blocks["validation"][: self.settings.calibration_blocks]

    def perplexity(self) -> str:
        gates, text = self.gates.clone(), self.blocks["validation"][:16]
        for wanted in ([torch.ones_like(gates)] if self.dense is None else []) + [gates]:
            set_gates(self.model, wanted)
            value = perplexity(self.model, text, self.dtype, self.settings.batch_size)
            self.dense = self.dense or value
        return f"Validation perplexity {value:.2f}, dense {self.dense:.2f} ({len(text)} blocks), before repair and fine-tuning."

    def samples(self) -> str:
        gates, words = self.gates.clone(), []
        for title, wanted in (("dense", torch.ones_like(gates)), ("shown", gates)):
            set_gates(self.model, wanted)
            words.append(f"{title}:\n{sample(self.model, self.tokenizer, self.prompt.value)}")
        return "\n\n".join(words)

    def take_it(self) -> str:
        gates, strategy = self.gates.clone(), self.strategy.value
        value = self.take(gates, self.importance[strategy], strategy, self.level.value, int((gates != self.chosen).sum()))
        return f"Taken: test perplexity {value:.2f}. Now run the cells from section 11 on."


# %% [markdown]
# What is taken is kept with the run: should it be interrupted, it goes on with these heads, not with those of section 9. In a script there is nobody to
# press a button, and the picture of section 9 stands for the panel.

# %%
if __name__ == "__main__":
    def take(gates, scores, strategy, level, by_hand):
        """Makes heads that were chosen by hand those of the run."""
        global settings, importance, pruned
        settings = dataclasses.replace(settings, strategy=strategy, pruning_level=level, rounds=1, uniform=False, min_heads=int(gates.sum(1).min()))
        importance, pruned = scores, model
        run.metrics["importance"] = importance.tolist()
        run.metrics["taken"] = {"gates": gates.tolist(), "scores": scores.tolist(), "strategy": strategy, "level": level, "by_hand": by_hand}
        close_heads(run, model, tokenizer, gates, test_blocks, settings, by_hand)
        run.keep(picture_heads(run, importance, gates), "heads.png")
        return run.metrics["perplexity"]["pruned"]

    if run.taken:
        take(**run.taken | {key: torch.tensor(run.taken[key]) for key in ("gates", "scores")})
        run.taken = None
        print("These are the heads that were taken before the run was interrupted (section 9, run again, goes back to the strategy's).")

# %%
if __name__ == "__main__" and in_notebook():
    if "explorer" in globals():  # from an earlier run of this cell
        close_panel(globals().pop("explorer").box)
    explorer = Explorer(model, tokenizer, blocks, settings, dtype, importance, take)
    show_widget(explorer.box, run.folder / "heads.png")

# %% [markdown]
# ### What does a head look at?
#
# The map of a head has a row for every token: how it spreads its attention over the tokens before it. A column that is bright from top to bottom is
# an attention sink: there the head rests, and heads that do nothing else are *idle*. On such a map you can see why a low entropy does not make a
# head important.

# %%
@torch.no_grad()
def attention_maps(model, ids: torch.Tensor) -> torch.Tensor:
    """Attention weights of a text (1, time), all gates open: (layers, heads, time, time)."""
    maps = []
    with eager_attention(model), all_open(model), contextlib.ExitStack() as hooks:
        for layer in find_heads(model):
            handle = layer.attention.register_forward_hook(lambda module, args, output: maps.append(output[1]))
            hooks.callback(handle.remove)
        model.eval().base_model(ids.to(model.device), use_cache=False)
    if any(weights is None for weights in maps):
        raise UserError(f"{type(model).__name__} does not give its attention weights: there is nothing to look at.")
    return torch.cat(maps).float().cpu()


def describe_head(attention: torch.Tensor, importance: dict[str, torch.Tensor], layer: int, head: int) -> str:
    """What can be said of one head: entropy and sink share of its map (time, time), and its rank under every strategy."""
    ranks = (f"{name} {int((scores > scores[layer, head]).sum()) + 1}" for name, scores in importance.items())
    total = next(iter(importance.values())).numel()
    return (f"layer {layer}, head {head}\nentropy {1 - focus(attention)[1:].mean():.0%} of its maximum, {attention[1:, 0].mean():.0%} on the first token\n"
            f"importance rank of {total}: {', '.join(ranks)}")


def draw_attention(attention: list[torch.Tensor], titles: list[str], tokens: list[str]) -> Figure:
    """One map for each head: rows read, columns are read from, both labelled with the tokens."""
    size = max(4.2, 0.17 * len(tokens) + 1.2)
    figure = Figure(figsize=(size * len(attention), size + 0.5), facecolor="white", layout="constrained")
    names = [token.replace("$", r"\$").strip() or "␣" for token in tokens]
    for axes, weights, title in zip(figure.subplots(1, len(attention), squeeze=False)[0], attention, titles):
        hidden = torch.ones_like(weights).triu(1).bool()
        image = axes.imshow(weights.masked_fill(hidden, float("nan")), cmap="cividis", norm=PowerNorm(0.5, 0, 1))
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=figure.axes, label="attention", ticks=[0, 0.1, 0.3, 1], shrink=0.7, pad=0.01)
    return figure


# %% [markdown]
# The most and the least important head, and then a viewer for any head and sentence.

# %%
def read_sentence(tokenizer, sentence: str, longest: int = 40) -> tuple[torch.Tensor, list[str]]:
    """Token ids (1, time) of the first `longest` tokens, and each token as text. Raises UserError for fewer than two."""
    ids = tokenizer(sentence, return_tensors="pt")["input_ids"][:, :longest]
    if ids.shape[1] < 2:
        raise UserError(f"the sentence {sentence!r} has {ids.shape[1]} tokens, but two are needed: write a few words.")
    return ids, [tokenizer.decode([token]) for token in ids[0].tolist()]


def draw_extremes(model, tokenizer, sentence: str, strategy: str, importance: torch.Tensor) -> Figure:
    """The maps of the most and of the least important head."""
    ids, tokens = read_sentence(tokenizer, sentence)
    maps, scores = attention_maps(model, ids), {strategy: importance}
    places = [divmod(int(index), importance.shape[1]) for index in (importance.argmax(), importance.argmin())]
    return draw_attention([maps[place] for place in places], [describe_head(maps[place], scores, *place) for place in places], tokens)


class AttentionViewer:
    """The map of one head on a sentence. `importance` is a dict of scores, which may grow."""

    def __init__(self, model, tokenizer, sentence: str, importance: dict[str, torch.Tensor]):
        self.model, self.tokenizer, self.importance, self.known = sharing_copy(model), tokenizer, importance, ("", None, None)
        layers, heads = get_gates(model).shape
        self.layer, self.head = (widgets.IntSlider(0, 0, top - 1, description=name) for name, top in (("layer", layers), ("head", heads)))
        self.sentence = widgets.Text(sentence, description="sentence", continuous_update=False, layout=widgets.Layout(width="600px"))
        self.picture, self.panel = widgets.Image(format="png", layout=widgets.Layout(max_width="760px")), Panel()
        for control in (self.layer, self.head, self.sentence):
            control.observe(lambda _: self.panel.guard(self.refresh), "value")
        self.box = widgets.VBox([self.sentence, widgets.HBox([self.layer, self.head]), self.picture, self.panel.box])
        self.panel.guard(self.refresh)

    def refresh(self) -> str:
        if self.known[0] != self.sentence.value:
            ids, tokens = read_sentence(self.tokenizer, self.sentence.value)
            self.known = (self.sentence.value, tokens, attention_maps(self.model, ids))
        _, tokens, maps = self.known
        layer, head = self.layer.value, self.head.value
        figure = draw_attention([maps[layer, head]], [describe_head(maps[layer, head], self.importance, layer, head)], tokens)
        self.picture.value = png(figure)
        return ""


# %%
if __name__ == "__main__":
    sentence = f"{settings.prompt}. The city was old, and the river was older than the city."
    try:
        run.show(draw_extremes(model, tokenizer, sentence, settings.strategy, importance), "attention.png", width=1000)
    except UserError as error:  # nothing that follows needs the picture
        print(error)
    else:
        if in_notebook():
            if "viewer" in globals():
                close_panel(globals().pop("viewer").box)
            viewer = AttentionViewer(model, tokenizer, sentence, explorer.importance)
            show_widget(viewer.box, run.folder / "attention.png")

# %% [markdown]
# ## 11. Repair without training
#
# What a closed head wrote is gone, but part of it can be said by the others: the heads of a layer are not independent. Which mix of the open heads
# comes nearest to what the dense model computed is a linear least-squares problem, and has an exact solution. With $X$ the open
# heads' outputs on some training text, $W$ their rows of the output projection and $Y$ what should come out,
#
# $$W' = W + (X^\top X + \lambda I)^{-1} X^\top (Y - XW).$$
#
# It is solved layer by layer from the bottom, on what the *pruned* model computes: $Y$ is what the stream has to receive to be where
# the dense model's is, so a layer also corrects what was lost below it. The MLP writes into the same stream, so its output projection is refitted
# too, more carefully ($\lambda$ is larger, because it was not pruned). It takes two forward passes. (Relatives:
# [FLAP](https://arxiv.org/abs/2312.11983), [SlimGPT](https://arxiv.org/abs/2412.18110), which refit a layer alone.)

# %%
RIDGE = {"attention": 0.1, "mlp": 1.0}  # lambda, as a share of the mean diagonal of X'X


def find_mlp_output(layer: HeadLayer):
    """The projection with which a layer's MLP writes into the stream, or None where there is not exactly one (mixtures of experts)."""
    attention, names = set(layer.attention.modules()), ("c_proj", "fc2", "fc_out", "down_proj", "dense_4h_to_h")
    found = [module for path, module in layer.block.named_modules() if path.rpartition(".")[2] in names and module not in attention
             and isinstance(module, (torch.nn.Linear, Conv1D))]
    return found[0] if len(found) == 1 else None


@torch.no_grad()
def refit(projection, inputs: torch.Tensor, target: torch.Tensor, ridge: float, kept=slice(None)) -> None:
    """Least squares in place: the `kept` inputs (..., in) of a projection shall give `target` (..., out); ridge pulls to the old weight."""
    weight, bias = inputs_first(projection), projection.bias
    with torch.autocast(inputs.device.type, enabled=False):
        x, y = inputs.flatten(0, -2).float()[:, kept], target.flatten(0, -2).float()
        error = y - x @ weight[kept].float() - (0 if bias is None else bias.float())
        if bias is not None:  # the bias takes care of the means
            x_mean, error_mean = x.mean(0), error.mean(0)
            x, error = x - x_mean, error - error_mean
        gram, wanted = (x.T @ x).cpu().double(), (x.T @ error).cpu().double()
        gram.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(1e-12))
        change = torch.linalg.solve(gram, wanted).to(weight)
        weight[kept] += change
        if bias is not None:
            bias += error_mean - x_mean @ change


# %% [markdown]
# Both passes are ordinary forward passes with hooks: the first notes where the dense model's stream is after every attention and every MLP,
# the second changes each projection just before it is used. Some families (Gemma 2 and 3) normalise what a layer writes before it is
# added; there the sum does not add up, and only the attention's own output is refitted.

# %%
def watch_layer(layer: HeadLayer, seen: dict):
    """Hooks that note in `seen` a layer's stream in and out, and what attention and MLP add to it; yields their handles."""
    def keep(name):
        def hook(module, args, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach().clone()  # Falcon goes on adding to it
        return hook

    def enter(block, args, kwargs):
        seen["in"] = (args[0] if args else kwargs["hidden_states"]).detach()

    yield layer.block.register_forward_pre_hook(enter, with_kwargs=True)
    yield layer.projection.register_forward_hook(keep("attention"))
    if find_mlp_output(layer) is not None:
        yield find_mlp_output(layer).register_forward_hook(keep("mlp"))
    yield layer.block.register_forward_hook(keep("out"))


@torch.no_grad()
def dense_targets(model, blocks: torch.Tensor, dtype: torch.dtype, batch_size: int = 4) -> list[dict]:
    """For each layer, on the processor: the dense stream after attention ("middle") and MLP ("out"), or the attention's output ("attention")."""
    layers = find_heads(model)
    seen, parts = [{} for _ in layers], [collections.defaultdict(list) for _ in layers]
    with contextlib.ExitStack() as hooks, all_open(model):
        for layer, notes in zip(layers, seen):
            for handle in watch_layer(layer, notes):
                hooks.callback(handle.remove)
        for batch in progress(blocks.split(batch_size), "repair", model.device):
            with autocast(model.device, dtype):
                model.base_model(batch.to(model.device), use_cache=False)
            for notes, part in zip(seen, parts):
                out, middle = notes["out"].float(), notes["in"].float() + notes["attention"].float()
                # (The MLP of OPT sees all tokens of a batch in one row.)
                adds_up = "mlp" in notes and torch.dist(middle + notes["mlp"].float().view_as(out), out) < 0.02 * out.norm()
                for name, value in {"middle": middle, "out": notes["out"]}.items() if adds_up else [("attention", notes["attention"])]:
                    part[name].append(value.to(torch.bfloat16).cpu())  # 2 layers x tokens x hidden numbers: half the memory
    return [{name: torch.cat(values) for name, values in part.items()} for part in parts]


# %%
def repair_layer(layer: HeadLayer, target: dict):
    """Hooks that refit a layer's output projections the moment their inputs are there; yields their handles."""
    seen, mlp = {}, find_mlp_output(layer)

    def before_projection(projection, args):
        kept = (projection.gates != 0).repeat_interleave(layer.head_dim)
        wanted = target["middle"].to(args[0].device) - seen["in"].float() if "middle" in target else target["attention"].to(args[0].device)
        if kept.any():
            refit(projection, args[0], wanted, RIDGE["attention"], kept)

    def before_mlp_output(projection, args):
        refit(projection, args[0], target["out"].to(args[0].device) - seen["in"].float() - seen["attention"], RIDGE["mlp"])

    yield from watch_layer(layer, seen)
    yield layer.projection.register_forward_pre_hook(before_projection)  # after the gates' own hook, which was there first
    if "out" in target:
        yield mlp.register_forward_pre_hook(before_mlp_output)
    yield layer.block.register_forward_hook(lambda *_: seen.clear())  # what is noted of a layer is large


@torch.no_grad()
def repair(model, blocks: torch.Tensor, dtype: torch.dtype = torch.float32, batch_size: int = 4):
    """A copy of a gated model whose output projections are refitted on blocks (n, time), so that it follows the model with open gates."""
    room = room_for_blocks(model, blocks.shape[1], dtype, logits=False)
    targets = fit_batch_size(lambda size: dense_targets(model, blocks, dtype, size), batch_size, "looking at the dense model", room)

    def attempt(number):
        fixed = copy.deepcopy(model).eval()
        with contextlib.ExitStack() as hooks, autocast(fixed.device, dtype):
            for layer, target in zip(find_heads(fixed), targets):
                for handle in repair_layer(layer, {name: value[:number] for name, value in target.items()}):
                    hooks.callback(handle.remove)
            fixed.base_model(blocks[:number].to(fixed.device), use_cache=False)
        return fixed

    fixed = fit_batch_size(attempt, len(blocks), "repair", room_for_blocks(model, blocks.shape[1], dtype, logits=False))  # all blocks have to go through a layer before the next one can be repaired
    for parameter in fixed.parameters():
        same_everywhere(parameter)
    return fixed


def put_weights(model, weights: dict[str, torch.Tensor]) -> None:
    """Gives a model weights that were kept; those that are not among them stay. Raises RunError for weights that it does not have."""
    strangers = model.load_state_dict(weights, strict=False).unexpected_keys
    if strangers:
        raise RunError(f"what was kept is of another model ({strangers[0]}): start anew with --resume no.")


def changed_weights(model, before) -> dict[str, torch.Tensor]:
    """The parameters in which a model differs from what it was."""
    old = dict(before.named_parameters())
    return {name: value for name, value in model.named_parameters() if not torch.equal(value, old[name])}


def spread(blocks: torch.Tensor, number: int) -> torch.Tensor:
    """So many blocks, evenly spread over all of them."""
    return blocks[torch.linspace(0, len(blocks) - 1, min(number, len(blocks))).round().long()]


# %%
if __name__ == "__main__":
    pruned, repair_text = model, spread(blocks["train"], settings.repair_blocks)
    forget(run, "repaired")
    if settings.repair and run.metrics["heads"]["closed"]:
        with run.step("repair"):
            kept, _ = run.once("repair", (model, repair_text, RIDGE), lambda: (
                changed_weights(repair(model, repair_text, dtype, settings.batch_size), model), {}))
            pruned = copy.deepcopy(model)
            put_weights(pruned, kept)
        measure(run, "repaired", pruned, tokenizer, test_blocks, settings)

# %% [markdown]
# ## 12. Sweep: which strategy, how many heads?
#
# One strategy at one level says little. With `sweep` every strategy meets every level, on the same model and text: the dense model is loaded once,
# and heads are scored once per strategy (once per level where the score depends on it). A point is written down the moment it is known, so
# an interrupted sweep goes on where it was.

# %%
def sweep_file(run: Run, settings: Settings, *texts: torch.Tensor) -> Path:
    """Where the points of a sweep are kept: one file for each model, text and setting that they depend on."""
    depends = [run.metrics["perplexity"]["dense"], run.metrics["versions"], run.metrics["precision"], settings.model, settings.seed,
               settings.min_heads, settings.rounds, settings.gate_steps, settings.repair, *(text.tolist() for text in texts)]
    return run.folder.parent / f"sweep-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:12]}.json"


def sweep(model, calibration: torch.Tensor, repair_text: torch.Tensor, test: torch.Tensor, settings: Settings, dtype: torch.dtype, file: Path,
          known=()) -> list[dict]:
    """Prunes with every strategy at every level: a list of {strategy, level, closed, pruned, repaired}, the last two being perplexities.

    Points that are in `file` or `known` are not computed again. Raises UserError, before anything is computed, for a level that is
    out of reach.
    """
    layers, heads = get_gates(model).shape
    names, levels = settings.sweep_strategies.split(), [float(level) for level in settings.sweep_levels.split()]
    for level in levels:
        heads_to_close(layers, heads, level, settings.min_heads)
    before = agree(json.loads(file.read_text()) if file.exists() else [])
    points = {(point["strategy"], point["level"]): point for point in [*before, *known]}
    wanted = [(name, level) for name in names for level in levels]
    with all_open(model):
        last = None
        for name, level in progress([pair for pair in wanted if pair not in points], "sweep"):
            own = dataclasses.replace(settings, strategy=name, pruning_level=level, rounds=settings.rounds if name in REPEATABLE else 1)
            options = options_for(own, dtype)
            if last != name or "level" in options:  # else the score of the last level serves this one too
                set_gates(model, torch.ones(layers, heads))
                importance, last = get_strategy(name, **options).score(model, calibration), name
            gates = choose_gates(importance, level, settings.min_heads)
            set_gates(model, gates)
            point = {"strategy": name, "level": level, "closed": int((gates == 0).sum()),
                     "pruned": perplexity(model, test, dtype, settings.batch_size), "repaired": None}
            if settings.repair:
                fixed = repair(model, repair_text, dtype, settings.batch_size) if point["closed"] else model
                point["repaired"] = perplexity(fixed, test, dtype, settings.batch_size)
            points[name, level] = point
            if rank_and_world()[0] == 0:
                with in_one_move(file) as part:
                    part.write_text(json.dumps(list(points.values()), indent=1))
    return [points[pair] for pair in wanted]


def sweep_table(points: list[dict], dense: float) -> str:
    """Strategies × levels as a Markdown table: perplexity after pruning → after repair."""
    levels = sorted({point["level"] for point in points})
    rows = ["| strategy | " + " | ".join(f"{level:.0%}" for level in levels) + " |", "|---" * (len(levels) + 1) + "|"]
    for name in dict.fromkeys(point["strategy"] for point in points):
        cells = {point["level"]: f"{point['pruned']:.2f}" + (f" → {point['repaired']:.2f}" if point["repaired"] else "")
                 for point in points if point["strategy"] == name}
        rows.append(f"| {name} | " + " | ".join(cells[level] for level in levels) + " |")
    return "\n".join([*rows, "", f"Test perplexity after pruning{' → after repair' if points[0]['repaired'] else ''}; dense: {dense:.2f}."])


# %% [markdown]
# As a picture: solid lines are what is left in the end, thin dotted ones what it was before the repair.

# %%
def draw_sweep(points: list[dict], dense: float, total: int) -> Figure:
    """Perplexity (log axis) against the share of closed heads, one line a strategy, the dense model as a horizontal line."""
    figure = Figure(figsize=(8, 4.6), facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.axhline(dense, color="#555555", linestyle="--", linewidth=1.2, label="dense")
    colors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    for name, color, marker in zip(STRATEGY_NAMES, colors, "os^Dv<>"):
        mine = sorted((point for point in points if point["strategy"] == name), key=lambda point: point["closed"])
        if not mine:
            continue
        shares = [point["closed"] / total for point in mine]
        if mine[0]["repaired"]:
            axes.plot(shares, [point["pruned"] for point in mine], color=color, linestyle=":", linewidth=1)
        axes.plot(shares, [point["repaired"] or point["pruned"] for point in mine], color=color, marker=marker, markersize=5, label=name)
    best = min(points, key=lambda point: (-point["level"], point["repaired"] or point["pruned"]))
    axes.set(yscale="log", xlabel="share of heads closed", ylabel="test perplexity (log scale)",
             title=f"Closing {best['level']:.0%} of the heads: {best['strategy']} leaves perplexity "
                   f"{best['repaired'] or best['pruned']:.1f} (dense {dense:.1f})")
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if axes.get_ylim()[1] < 10 * axes.get_ylim()[0] else "")
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# %%
if __name__ == "__main__" and settings.sweep:
    heads_now = run.metrics["heads"]
    own_point = {"strategy": settings.strategy, "level": settings.pruning_level, "closed": heads_now["closed"],
                 "pruned": run.metrics["perplexity"]["pruned"], "repaired": run.metrics["perplexity"].get("repaired")}
    with run.step("sweep"):
        texts = (calibration, repair_text, test_blocks)
        points = sweep(model, *texts, settings, dtype, sweep_file(run, settings, *texts), [own_point] if heads_now["closed"] and not heads_now["by_hand"] else [])
        run.metrics["sweep"] = points
        if run.writes:
            with (run.folder / "sweep.csv").open("w", newline="") as file:
                table = csv.DictWriter(file, points[0])
                table.writeheader()
                table.writerows(points)
    show_markdown(sweep_table(points, run.metrics["perplexity"]["dense"]) + "\n\n" + conditions(run.metrics))
    run.show(draw_sweep(points, run.metrics["perplexity"]["dense"], heads_now["total"]), "sweep.png")
    if not in_notebook():
        if run.writes:
            print(f"results: {run.finish()}")
        raise SystemExit

# %% [markdown]
# ## 13. Compact: cut the closed heads out
#
# So far the model is as large and as slow as before: a gate multiplies by zero what has been computed all the same. Now the closed
# heads really go: their rows of the query, key and value projections and their columns of the output projection. Where several query heads
# share a key/value head, that one goes when the last query head that reads it is gone. What is left is the same function with fewer
# numbers, so the logits may not change by more than rounding, and the cell that does it checks that.
#
# No configuration file can say "layer 3 has 7 heads", which is why pruned models usually cannot be opened again. Here the functions
# of this section travel with the saved model (section 17): opening it builds the full model without weights and cuts it the same
# way. So they stand on their own, with torch and transformers and nothing else.

# %%
def slice_projection(projection, rows: torch.Tensor, inputs: bool = False) -> None:
    """Keeps only these outputs, or inputs, of a Linear or Conv1D, in this order."""
    is_conv = isinstance(projection, Conv1D)  # its weight is (inputs, outputs), that of a Linear (outputs, inputs)
    weight, bias = projection.weight, projection.bias
    rows = rows.to(weight.device)
    projection.weight = torch.nn.Parameter(weight.detach().index_select(int(is_conv != inputs), rows), weight.requires_grad)
    if bias is not None and not inputs:
        projection.bias = torch.nn.Parameter(bias.detach()[rows], bias.requires_grad)
    for name, size in zip(("nx", "nf") if is_conv else ("out_features", "in_features"), projection.weight.shape):
        setattr(projection, name, size)


def cut_attention(attention, output: str, kept: list[int]):
    """The attention module with only the heads in `kept`, cut in place; `output` is the name of its output projection."""
    if not kept:
        return NoHeads(attention, output)
    heads, projection = attention.config.num_attention_heads, getattr(attention, output)
    columns = torch.arange(projection.weight.shape[0 if isinstance(projection, Conv1D) else 1]).view(heads, -1)
    query, key, value = find_rows(attention, heads, columns.shape[1])
    sharing = heads // len(key[1])  # query heads that read the same key/value head
    kept_shared = sorted({head // sharing for head in kept})
    rows = {}
    for (name, table), wanted in zip((query, key, value), (kept, kept_shared, kept_shared)):
        rows.setdefault(name, []).append(table[wanted].flatten())
    for name, parts in rows.items():
        slice_projection(getattr(attention, name), torch.cat(parts).sort().values)
    slice_projection(projection, columns[kept].flatten(), inputs=True)

    attention.readers = [sum(head // sharing == shared for head in kept) for shared in kept_shared]
    even = len(set(attention.readers)) == 1
    if not even:
        attention.register_forward_pre_hook(repeat_by_readers, with_kwargs=True)
    sizes = {"num_heads": len(kept), "split_size": len(kept) * columns.shape[1], "num_key_value_heads": len(kept_shared),
             "num_key_value_groups": attention.readers[0] if even else 1}
    for name, size in sizes.items():
        if hasattr(attention, name):
            setattr(attention, name, size)
    attention.config = LayerConfig(attention.config, len(kept))
    return attention


def cut_heads(model, kept_heads: dict[str, list[int]]) -> None:
    """Cuts a model in place. `kept_heads`: path of an attention output projection -> the heads that stay."""
    for path, kept in kept_heads.items():
        parent, _, output = path.rpartition(".")
        model.set_submodule(parent, cut_attention(model.get_submodule(parent), output, kept))


# %% [markdown]
# The attention code of transformers copes with fewer heads by itself, but for three things. Key/value heads that are read by an *uneven*
# number of query heads have to be handed out one by one; a layer may have lost *all* its heads; and a module may ask the model's
# configuration how many heads it has.

# %%
def find_cache(arguments: dict):
    """(name, KV cache) among the arguments of an attention module: its name depends on the family and the version of transformers."""
    return next((name, arguments[name]) for name in ("past_key_values", "layer_past", "cache") if name in arguments)


def repeat_by_readers(attention, args, kwargs):
    """Forward pre-hook: the cache goes on holding few key/value heads, but hands out one for every query head that reads it."""
    name, cache = find_cache(kwargs)

    def repeat(states):  # (batch, key/value heads, time, head_dim)
        return torch.cat([states[:, i, None].expand(-1, n, -1, -1) for i, n in enumerate(attention.readers)], dim=1)

    def update(keys, values, *position, **options):
        if cache is not None:
            keys, values = cache.update(keys, values, *position, **options)
        return repeat(keys), repeat(values)

    return args, kwargs | {name: SimpleNamespace(update=update)}


class NoHeads(torch.nn.Module):
    """The attention of a layer that has lost all its heads: what remains is the output projection's bias."""

    def __init__(self, attention, output: str):
        super().__init__()
        self.layer_idx = attention.layer_idx
        self.dropout = getattr(attention, "resid_dropout", torch.nn.Identity())
        self.register_parameter("output_bias", getattr(attention, output).bias)

    def forward(self, hidden_states, **arguments):
        _, cache = find_cache(arguments)
        if cache is not None:  # it knows how many tokens it has seen by what its layers hold: here one number each
            token = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(token, token, self.layer_idx)
        nothing = torch.zeros_like(hidden_states)
        return self.dropout(nothing if self.output_bias is None else nothing + self.output_bias), None


class LayerConfig:
    """The model's config as one layer sees it: with the number of heads that this layer has left."""

    def __init__(self, config, heads: int):
        self.config, self.num_attention_heads = config, heads

    def __getattr__(self, name):
        if name == "config":  # asked for while a copy is made, when nothing is there yet
            raise AttributeError(name)
        return getattr(self.config, name)


# %% [markdown]
# With these, compacting is to fold the gates into the weights and cut.

# %%
@torch.no_grad()
def compact(model):
    """A copy of a gated model without gates and without the heads that they close; its config lists `kept_heads`."""
    if not can_compact(model):
        raise UserError(f"a model of the family {model.config.model_type!r} cannot be compacted, only {', '.join(COMPACTABLE)}: "
                        "keep its gates.")
    small, kept = copy.deepcopy(model), {}
    for layer in find_heads(small):
        layer.output_weight.mul_(layer.projection.gates[:, None, None])  # a gate that was trained may be any number
        kept[layer.path] = layer.projection.gates.nonzero().flatten().tolist()
    remove_gates(small)
    cut_heads(small, kept)
    small.config.kept_heads = kept
    return small


@torch.no_grad()
def largest_difference(model, other, blocks: torch.Tensor) -> float:
    """The largest difference between two models' float32 logits on blocks (n, time), relative to the largest logit."""
    logits, others = (m.eval()(blocks.to(m.device), use_cache=False).logits.float() for m in (model, other))
    return ((logits - others).abs().max() / logits.abs().max()).item()


# %% [markdown]
# What did it bring? Four things can be counted: parameters, bytes, what the model has to remember of every token while it writes (the
# **KV cache**), and the floating-point operations of a forward pass. From the last follows how much faster it *should* be;
# how much faster it *is* has to be measured, in turns, so that both models meet the same weather.

# %%
@torch.no_grad()
def count_flops(model, tokens: int) -> float:
    """Floating-point operations per token of a forward pass over `tokens` tokens, in matrix products; nothing is computed."""
    shapes = {name: tensor.to("meta") for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    # Where nothing is computed nothing can be looked at: eager attention does not look whether tokens are masked, and with a cache
    # nobody looks whether several texts are packed together.
    with eager_attention(model), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model.eval(), shapes, (ids,), {"use_cache": True})
    return counter.get_total_flops() / tokens


@torch.no_grad()
def cache_bytes(model, tokens: int = 8) -> int:
    """Bytes of keys and values that the model keeps for each token it has read."""
    cache = model.eval()(torch.zeros(1, tokens, dtype=torch.long, device=model.device), use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // tokens


def tokens_per_second(models: dict, batch: torch.Tensor, dtype: torch.dtype, training: bool = False, rounds: int = 5) -> dict[str, float]:
    """Median speed of several models on token ids (batch, time), in turns, after a warm-up; training is forward and backward."""
    seconds = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            ids, start = batch.to(model.device), time.perf_counter()
            with torch.set_grad_enabled(training), autocast(model.device, dtype):
                output = model.train(training)(ids, labels=ids if training else None, use_cache=False)
            if training:
                output.loss.backward()
                model.get_input_embeddings().weight.grad[0, 0].item()  # the last to be computed: waits for the device
            else:
                output.logits[0, -1, 0].item()
            seconds[name].append(time.perf_counter() - start)
            model.zero_grad(set_to_none=True)
            model.eval()
    return {name: round(batch.numel() / statistics.median(times[1:]), 1) for name, times in seconds.items()}


# %% [markdown]
# Both kinds of numbers go side by side into one table.

# %%
def weigh(models: dict, block: torch.Tensor, dtype: torch.dtype) -> dict[str, dict]:
    """Size and speed of models without gates, as {name: {quantity: number}}; speeds on one block (1, time)."""
    sizes = {name: {"parameters": model.num_parameters(), "bytes": sum(p.nbytes for p in model.parameters()),
                    "cache_bytes_per_token": cache_bytes(model), "flops_per_token": count_flops(model, block.shape[1])}
             for name, model in models.items()}
    for kind, training in (("forward", False), ("training", True)):
        for name, speed in tokens_per_second(models, block, dtype, training).items():
            sizes[name][f"{kind}_tokens_per_second"] = speed
    return sizes


def size_table(sizes: dict[str, dict], small: str = "pruned") -> str:
    """Dense and compact model side by side, as a Markdown table."""
    rows = [("parameters, million", "parameters", 1e-6, ",.2f"),
            ("weights, MB", "bytes", 1e-6, ",.1f"),
            ("KV cache, bytes per token", "cache_bytes_per_token", 1, ",.0f"),
            ("forward pass, MFLOP per token", "flops_per_token", 1e-6, ",.1f"),
            ("forward pass, tokens/s", "forward_tokens_per_second", 1, ",.0f"),
            ("training, tokens/s", "training_tokens_per_second", 1, ",.0f")]
    lines = ["| | dense | compact | ratio |", "|---|---|---|---|"]
    for title, key, unit, form in rows:
        before, after = sizes["dense"][key], sizes[small][key]
        lines.append(f"| {title} | {before * unit:{form}} | {after * unit:{form}} | {after / before:.3f} |")
    return "\n".join(lines)


# %%
if __name__ == "__main__":
    run.metrics["size"] = {}
    if can_compact(model):
        with run.step("compact"):
            small = compact(pruned)
            difference = run.metrics["compact_difference"] = largest_difference(pruned, small, test_blocks[:1])
            with without_gates(model):
                run.metrics["size"] = sizes = weigh({"dense": model, "pruned": small}, test_blocks[:1], dtype)
            for stage in {"pruned", "repaired"} & set(run.metrics["parameters"]):
                run.metrics["parameters"][stage] = small.num_parameters()
            del small
        show_markdown(size_table(sizes))
        expected = sizes["dense"]["flops_per_token"] / sizes["pruned"]["flops_per_token"]
        measured = sizes["pruned"]["forward_tokens_per_second"] / sizes["dense"]["forward_tokens_per_second"]
        print(f"forward pass {measured:.2f} x as fast, {expected:.2f} x by arithmetic; "
              f"largest difference to the gated logits: {difference:.1e} of the largest logit")
        if difference > 1e-3:
            raise RuntimeError(f"the compact model differs from the gated one by {difference:.1e}: please report this, naming the model.")
    else:
        print(f"{type(model).__name__} keeps its gates: compacting knows {', '.join(COMPACTABLE)}.")

# %% [markdown]
# ## 14. Fine-tune
#
# The remaining heads can learn to do without the closed ones. Training is `transformers.Trainer`: AdamW, a short warm-up, then a cosine
# decay. The effective batch is `batch_size` blocks, always; where they do not fit into memory at once, fewer are computed at a time
# and their gradients added up.
#
# What is trained is the compact model: a closed gate lets no gradient through, so with gates it would be the same training, only
# slower. It is a copy, and `model` keeps the original weights (`pruned` has the repaired ones): so every cell above can be run again at any time.
#
# The weights that are kept are those with the best perplexity on validation text, and training stops early when that has not improved for
# `patience` evaluations. With `distillation` a share of the loss asks for the dense model's predictions instead of the next token of the text
# ([Hinton et al. 2015](https://arxiv.org/abs/1503.02531), for pruned models [Muralidharan et al. 2024](https://arxiv.org/abs/2407.14679)).
#
# With `reopen_heads` the gated model is trained instead, and compacted afterwards. Its gates are trained too, for the first half of the
# steps: a closed head gets a gradient on its gate even at zero, and may come back. Half-way the heads with the largest gates stay, as
# many as the level allows, and the second half repairs what that broke.

# %%
GATE_LEARNING_RATE = 3e-2  # gates have to travel from 0 to about 1; weights hardly move


def train_gates(model) -> None:
    """Turns the gates from buffers into parameters."""
    for layer in find_heads(model):
        gates = layer.projection.gates
        del layer.projection.gates
        layer.projection.gates = torch.nn.Parameter(gates.clone())


def untrain_gates(model) -> None:
    """Turns the gates from parameters into buffers."""
    for layer in find_heads(model):
        gates = layer.projection.gates.detach()
        del layer.projection.gates
        layer.projection.register_buffer("gates", gates)


class CommitGates(TrainerCallback):
    """Half-way through training, closes all gates but the largest and trains none of them any more."""

    def __init__(self, level: float, min_heads: int):
        self.level, self.min_heads = level, min_heads

    def on_train_begin(self, args, state, control, model=None, **_):
        if state.global_step >= max(1, state.max_steps // 2):  # of a training that goes on
            self.freeze(model)

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == max(1, state.max_steps // 2):
            values = get_gates(model)
            set_gates(model, values * choose_gates(values.abs(), self.level, self.min_heads))
            self.freeze(model)

    def freeze(self, model):
        for layer in find_heads(model):
            layer.projection.gates.requires_grad_(False)


# %% [markdown]
# What you see while it trains: the loss, the perplexity on validation text against that of the dense model, the learning rate
# and the memory. In a notebook the picture is redrawn in place; in a terminal there is a progress bar; both keep the PNG.

# %%
class LivePlot(TrainerCallback):
    """Collects what the Trainer logs and draws it in place, spending at most a twentieth of the time on it; keeps the last picture."""

    def __init__(self, run: Run, name: str, dense_validation: float, tokens_per_step: int = 0):
        self.run, self.name, self.dense, self.tokens_per_step = run, name, dense_validation, tokens_per_step
        self.history = {"loss": [], "perplexity": [], "learning_rate": [], "memory": []}
        self.display, self.drawn, self.cost = None, 0.0, 0.0

    def on_train_begin(self, args, state, control, **_):
        self.begun, self.first_step = time.monotonic(), state.global_step
        for logs in state.log_history:  # of a training that goes on
            self.collect(logs["step"], logs)

    def on_log(self, args, state, control, logs=None, **_):
        value = logs.get("loss", logs.get("eval_loss", 0.0))
        if not math.isfinite(value):
            raise RunError(f"the loss is {value} at step {state.global_step} of {state.max_steps}: take a lower --learning-rate, or --precision fp32.")
        self.collect(state.global_step, logs)
        used = memory_used(self.run.device)
        self.history["memory"].append((state.global_step, used.get("accelerator", used["ram"]) / 2**30))

    def collect(self, step, logs):
        for key in ("loss", "learning_rate"):
            if key in logs:
                self.history[key].append((step, logs[key]))
        if "eval_loss" in logs:
            self.history["perplexity"].append((step, math.exp(logs["eval_loss"])))

    def on_step_end(self, args, state, control, **_):
        if in_notebook() and time.monotonic() - self.drawn > max(0.5, 20 * self.cost):
            self.redraw(state)

    def on_train_end(self, args, state, control, **_):
        if in_notebook():
            self.redraw(state)
        if self.run.writes:
            self.draw(state).savefig(self.run.folder / f"{self.name}.png", dpi=150)

    def title(self, state) -> str:
        """How far, how well, how fast, how long still."""
        words = [f"{STAGES.get(self.name, self.name)}: step {state.global_step} of {state.max_steps}"]
        seen = [f"{value:.1f}" for _, value in (self.history["perplexity"][:1] + self.history["perplexity"][-1:])]
        if seen:
            words.append(f"validation perplexity {' → '.join(seen)}")
        seconds = time.monotonic() - self.begun
        done = state.global_step - self.first_step
        if done:
            words.append(f"{self.tokens_per_step * done / seconds:,.0f} tokens/s")
            left = seconds / done * (state.max_steps - state.global_step)
            words.append(f"{left // 60:.0f} min {left % 60:02.0f} s left" if left else f"{seconds // 60:.0f} min {seconds % 60:02.0f} s")
        return " · ".join(words)

    def draw(self, state) -> Figure:
        figure = Figure(figsize=(11, 2.8), facecolor="white", layout="constrained")
        figure.suptitle(self.title(state), fontsize=11)
        titles = {"loss": "training loss", "perplexity": "validation perplexity", "learning_rate": "learning rate",
                  "memory": "memory (GiB)"}
        for axes, (key, points) in zip(figure.subplots(1, 4), self.history.items()):
            axes.plot(*zip(*points) if points else ([], []), color="#0072B2")
            axes.set_title(titles[key], fontsize=10)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            if key == "perplexity":
                axes.axhline(self.dense, color="#D55E00", linestyle="--", label="dense, untouched")
                axes.legend(fontsize=8)
            if key == "memory" and points:
                axes.set_ylim(0, 1.15 * max(used for _, used in points))  # a level line at the very top could not be seen
        return figure

    def redraw(self, state):
        from IPython.display import Image, display

        start = time.monotonic()
        picture = Image(png(self.draw(state)))
        if self.display is None:
            self.display = display(picture, display_id=True)
        else:
            self.display.update(picture)
        self.drawn = time.monotonic()
        self.cost = self.drawn - start


# %%
class DistillingTrainer(Trainer):
    """A Trainer whose loss is, to a share, the divergence from a teacher's predictions."""

    def __init__(self, *args, teacher, share: float, **options):
        super().__init__(*args, **options)
        self.teacher, self.share = teacher, share
        self.model_accepts_loss_kwargs = False  # the loss below is a mean over the micro-batch, to be divided by their number

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        output = model(**inputs)
        loss = output.loss
        if model.training:  # validation stays comparable: the text's own tokens
            with torch.no_grad():
                wanted = self.teacher(inputs["input_ids"], use_cache=False).logits
            loss = (1 - self.share) * loss + self.share * divergence(output.logits[:, :-1], wanted[:, :-1])
        return (loss, output) if return_outputs else loss


# %% [markdown]
# Every tenth of the way a checkpoint is written, with the optimizer and the random numbers, from which an interrupted training goes on as if nothing
# had happened. What was being written when the process died is no checkpoint; its state, which is written last, is not there or not whole.

# %%
def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint in a Trainer's folder, or None; those that are not whole are removed."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        try:
            whole.append((json.loads((path / "trainer_state.json").read_text())["global_step"], str(path)))
        except (OSError, ValueError):
            shutil.rmtree(path)
    return max(whole, default=(0, None))[1]


def training_settings(settings: Settings) -> dict:
    """The settings that a fine-tuned model depends on."""
    groups = {field.name: field.metadata["group"] for field in dataclasses.fields(Settings)}
    more = ("reopen_heads", "pruning_level", "min_heads") if settings.reopen_heads else ()
    return {name: value for name, value in dataclasses.asdict(settings).items() if groups[name] == "fine-tuning" or name in more}


def fine_tuned(model, start, blocks: dict[str, torch.Tensor], settings: Settings, run: Run, name: str, *arguments, **options):
    """fine_tune(), once: where it was done before, the weights that were kept."""
    tuned = None

    def compute():
        nonlocal tuned
        tuned = fine_tune(model, blocks, settings, run, name, *arguments, start, **options)
        gates = {key: value for key, value in tuned.named_buffers() if key.endswith(".gates")}
        return dict(tuned.named_parameters()) | gates, run.metrics["training"][name]

    weights, record = run.once(name, (model, blocks["train"], blocks["validation"], training_settings(settings)), compute)
    run.metrics.setdefault("training", {})[name] = record
    if tuned is None:  # it was kept from before
        tuned = start(model).eval()
        put_weights(tuned, weights)
    return move(tuned, run.device)


# %% [markdown]
# AdamW needs 16 bytes a parameter: the weight, its gradient and two averages. Several GPUs can share them (fully sharded data parallel,
# [Zhao et al. 2023](https://arxiv.org/abs/2304.11277)): each keeps a part, and gathers a layer's weights when that layer's turn comes.

# %%
@torch.no_grad()
def put_together(shared, whole):
    """The whole model, with the weights of one whose parts all processes share."""
    parts = shared.state_dict()
    for name, parameter in whole.named_parameters():
        parameter.copy_(parts[name].full_tensor())
    return whole


# %%
def fine_tune(model, blocks: dict[str, torch.Tensor], settings: Settings, run: Run, name: str, dense_validation: float, start=copy.deepcopy,
              teacher=None):
    """A fine-tuned copy of the model. `start` makes the copy that is trained: copy.deepcopy (with its gates) or compact.

    `name` names the picture; `dense_validation` is a line in it; `teacher` is the dense model, for settings.distillation. The weights are
    those of the evaluation with the best validation loss.
    """
    rank, world = rank_and_world()
    if settings.batch_size % world:
        raise UserError(f"batch_size is {settings.batch_size}, but must be a multiple of {world}, the number of processes: change one of the two.")
    steps = settings.max_steps or math.ceil(settings.epochs * len(blocks["train"]) / settings.batch_size)
    # The first label is masked: nothing predicts it, but the Trainer would count it, and every loss would be a little too small.
    train, validation = ([{"input_ids": block, "labels": torch.cat([block.new_tensor([-100]), block[1:]])} for block in part]
                         for part in (blocks["train"], blocks["validation"][:16]))

    folder = run.state / f"trainer-{name}-{fingerprint(model, blocks['train'], blocks['validation'], training_settings(settings))}"

    def attempt(micro_batch):
        transformers.set_seed(settings.seed)
        tuned = start(model)
        names = [dict(tuned.named_parameters(remove_duplicate=duplicates)) for duplicates in (True, False)]
        tuned._keys_to_ignore_on_save = list(names[1].keys() - names[0].keys()) or None  # tied weights are not missed in checkpoints
        plot, optimizer = LivePlot(run, name, dense_validation, settings.batch_size * blocks["train"].shape[1]), None
        callbacks = [plot] + ([EarlyStoppingCallback(settings.patience)] if settings.patience and not settings.reopen_heads else [])
        # Whole weights in checkpoints: of weights in parts the Trainer (of transformers 5.24) remembers a wrong checkpoint as the best one.
        sharing = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT",
                                                 "activation_checkpointing": settings.gradient_checkpointing}} if settings.fsdp else {}
        if settings.gradient_checkpointing and not settings.fsdp:
            tuned.gradient_checkpointing_enable({"use_reentrant": False})
        if settings.reopen_heads:
            train_gates(tuned)
            callbacks.append(CommitGates(settings.pruning_level, settings.min_heads))
            gates = [parameter for name, parameter in tuned.named_parameters() if name.endswith(".gates")]
            weights = [parameter for name, parameter in tuned.named_parameters() if not name.endswith(".gates")]
            optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": settings.weight_decay},
                                           {"params": gates, "lr": GATE_LEARNING_RATE, "weight_decay": 0.0}],
                                          lr=settings.learning_rate)
        arguments = TrainingArguments(
            str(folder / f"micro-batch-{micro_batch}"), max_steps=steps, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay,
            warmup_steps=round(settings.warmup * steps), lr_scheduler_type="cosine", max_grad_norm=1.0,
            per_device_train_batch_size=micro_batch, gradient_accumulation_steps=settings.batch_size // world // micro_batch,
            per_device_eval_batch_size=micro_batch, prediction_loss_only=True, logging_nan_inf_filter=False,
            eval_strategy="steps", eval_steps=max(1, steps // 10), logging_steps=max(1, steps // 25),
            save_strategy="steps", save_steps=max(1, steps // 10), save_total_limit=1, restore_callback_states_from_checkpoint=True,
            # Gates that are still being chosen have no best moment: with them the last weights count.
            load_best_model_at_end=not settings.reopen_heads, metric_for_best_model="loss",
            optim=ADAMW, bf16=run.dtype == torch.bfloat16, fp16=run.dtype == torch.float16, use_cpu=run.device.type == "cpu",
            seed=settings.seed, report_to="none", disable_tqdm=in_notebook(), dataloader_pin_memory=run.device.type == "cuda",
            **sharing)
        distil = bool(settings.distillation and teacher is not None)
        kind = functools.partial(DistillingTrainer, teacher=teacher, share=settings.distillation) if distil else Trainer
        trainer = kind(tuned, arguments, train_dataset=train, eval_dataset=validation, callbacks=callbacks, optimizers=(optimizer, None))
        trainer.remove_callback(transformers.PrinterCallback)
        with all_open(teacher) if distil else contextlib.nullcontext():
            result = trainer.train(resume_from_checkpoint=agree(last_checkpoint(Path(arguments.output_dir)) if not rank else None))
        seen = [value for _, value in plot.history["perplexity"]]
        if settings.fsdp:
            tuned = put_together(tuned, start(model))
        vars(tuned).pop("_keys_to_ignore_on_save", None)
        for attribute in ("forward", "_original_forward"):  # accelerate's own, which would go on computing in 16 bits
            vars(tuned).pop(attribute, None)
        if settings.gradient_checkpointing:
            tuned.gradient_checkpointing_disable()
        tuned.config.use_cache = model.config.use_cache  # which the Trainer switches off, and would be saved so
        if settings.reopen_heads:
            untrain_gates(tuned)
        run.metrics.setdefault("training", {})[name] = {
            "steps": trainer.state.global_step, "planned_steps": steps, "kept_step": steps if settings.reopen_heads else
            plot.history["perplexity"][seen.index(min(seen))][0], "tokens_per_step": settings.batch_size * blocks["train"].shape[1], "micro_batch": micro_batch,
            "train_tokens_per_second": round((trainer.state.global_step - plot.first_step) * settings.batch_size * blocks["train"].shape[1]
                                             / result.metrics["train_runtime"], 1),
            "history": plot.history}
        return tuned.eval()

    room = room_for_blocks(model, blocks["train"].shape[1], run.dtype, not settings.gradient_checkpointing, 16 / (world if settings.fsdp else 1), device=run.device)
    tuned = fit_batch_size(attempt, settings.batch_size // world, "fine-tuning", room, in_step=True)
    wait_for_all()  # for those that still read the best weights
    shutil.rmtree(folder, ignore_errors=True)
    return tuned


# %%
if __name__ == "__main__":
    with run.step("fine-tune"):
        with all_open(model):
            dense_validation = perplexity(model, blocks["validation"][:16], dtype, settings.batch_size)
        tuned = None  # lets the last one go, if this cell is run again
        start = compact if can_compact(model) and not settings.reopen_heads else copy.deepcopy
        unused = [] if not settings.fsdp else [pruned] if settings.distillation else [pruned, model]
        with set_aside(*unused):
            tuned = fine_tuned(pruned, start, blocks, settings, run, "fine_tuned", dense_validation, teacher=model)
    run.metrics.pop("heads_after_fine_tuning", None)
    if settings.reopen_heads:
        came_back = ((get_gates(model) == 0) & (get_gates(tuned) != 0)).nonzero().tolist()
        run.metrics["heads_after_fine_tuning"] = describe_heads(get_gates(tuned)) | {"came_back": came_back}
        print(f"{len(came_back)} of {run.metrics['heads']['closed']} closed heads came back [layer, head]: {came_back}")
        if can_compact(model):
            tuned = compact(tuned)
    measure(run, "fine_tuned", tuned, tokenizer, test_blocks, settings)

# %% [markdown]
# ## 15. The control: the dense model, fine-tuned too
#
# Fine-tuning on text like the test text helps *any* model. To know what pruning cost, the pruned model has to be compared with
# the dense one after the same number of steps on the same text, and not only with the untouched one.

# %%
LARGE = 50e6  # parameters above which 'auto' skips the control on a machine without an accelerator

if __name__ == "__main__":
    run.metrics.get("training", {}).pop("dense_fine_tuned", None)
    affordable = device.type != "cpu" or model.num_parameters() < LARGE
    if settings.control == "auto" and not affordable:
        print("No control: it would take long for a model of this size without an accelerator. --control runs it.")
    elif settings.control != "no":
        with run.step("fine-tune control"), all_open(model), set_aside(*[model, pruned] if settings.fsdp else []):
            all_heads = dataclasses.replace(settings, reopen_heads=False)
            dense_tuned = fine_tuned(model, copy.deepcopy, blocks, all_heads, run, "dense_fine_tuned", dense_validation)
        measure(run, "dense_fine_tuned", dense_tuned, tokenizer, test_blocks, settings)
        del dense_tuned


# %% [markdown]
# ## 16. Compare
#
# The numbers side by side. *Pruned + fine-tuned* against *dense + fine-tuned* is what pruning really cost.

# %%
def require_fine_tuned(metrics: dict) -> None:
    """Raises UserError where the heads were pruned anew and nothing was fine-tuned since."""
    if "fine_tuned" not in metrics["perplexity"]:
        raise UserError("the model was pruned after it was fine-tuned: run sections 9 to 14 again, and then this cell.")


def comparison(metrics: dict) -> str:
    """The comparison as a Markdown table."""
    heads, dense = metrics["heads"], metrics["perplexity"]["dense"]
    after = metrics.get("heads_after_fine_tuning", heads)
    closed = {"dense": 0, "dense_fine_tuned": 0, "pruned": heads["closed"], "repaired": heads["closed"], "fine_tuned": after["closed"]}
    rows = ["| model | heads | parameters | test perplexity | against dense |", "|---|---|---|---|---|"]
    for stage, value in metrics["perplexity"].items():
        rows.append(f"| {STAGES[stage]} | {heads['total'] - closed[stage]} / {heads['total']} | {metrics['parameters'][stage] / 1e6:,.2f} M | "
                    f"{value:.2f} | {value / dense - 1:+.1%} |")
    return "\n".join(rows)


# %% [markdown]
# The same as one picture, fit for a slide: what was removed, what that cost, what came back, how much smaller and faster it is.

# %%
COLOR = {"dense": "#999999", "pruned": "#D55E00", "repaired": "#E69F00", "fine_tuned": "#0072B2", "dense_fine_tuned": "#56B4E9"}


def plot_perplexities(axes, values: dict[str, float]) -> None:
    """Perplexity of every stage, on a log axis, as the distance from the dense model."""
    axes.axvline(values["dense"], color=COLOR["dense"], linestyle="--", linewidth=1)
    for row, (stage, value) in enumerate(values.items()):
        axes.plot([values["dense"], value], [row, row], color=COLOR[stage], linewidth=3)
        axes.plot(value, row, "o", color=COLOR[stage], markersize=10)
        axes.annotate(f"{value:.1f}", (value, row), (0, 8), textcoords="offset points", ha="center", fontsize=9)
    axes.set(xscale="log", xlabel="test perplexity (log scale, lower is better)", yticks=range(len(values)),
             yticklabels=[STAGES[stage] for stage in values], ylim=(len(values) - 0.5, -0.8))
    if max(values.values()) < 10 * min(values.values()):
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12)


def plot_sizes(axes, sizes: dict[str, dict], small: str = "pruned") -> None:
    """The compact model's size and speed in percent of the dense one's."""
    rows = {"parameters": "parameters", "KV cache": "cache_bytes_per_token", "FLOPs": "flops_per_token",
            "forward speed": "forward_tokens_per_second", "training speed": "training_tokens_per_second"}
    shares = [100 * sizes[small][key] / sizes["dense"][key] for key in rows.values()]
    axes.barh(list(rows), shares, color=["#0072B2" if "speed" not in name else "#009E73" for name in rows], height=0.6)
    for row, share in enumerate(shares):
        axes.annotate(f"{share:.0f} %", (share, row), (-4, 0), textcoords="offset points", va="center", ha="right", color="white", fontsize=9)
    axes.axvline(100, color=COLOR["dense"], linestyle="--", linewidth=1)
    axes.set(xlabel="compact model, % of the dense one", xlim=(0, 1.05 * max(100, *shares)))
    axes.invert_yaxis()


def plot_training(axes, metrics: dict) -> None:
    """Validation perplexity while fine-tuning, the pruned model and the control."""
    for stage, record in metrics["training"].items():
        axes.plot(*zip(*record["history"]["perplexity"]), color=COLOR[stage], marker="o", markersize=3, label=STAGES[stage])
    axes.set(xlabel="step", ylabel="validation perplexity")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def finding(metrics: dict) -> str:
    """The result in one line."""
    ppl, heads = metrics["perplexity"], metrics["heads"]
    words = " → ".join(f"{ppl[stage]:.1f} {name}".strip() for stage, name in (
        ("dense", ""), ("pruned", ""), ("repaired", "repaired"), ("fine_tuned", "fine-tuned")) if stage in ppl)
    return f"{heads['closed'] / heads['total']:.0%} of heads gone: perplexity {words}"


def draw_dashboard(metrics: dict, gates: torch.Tensor) -> Figure:
    """Heads, perplexities, size and speed, training, and samples; the title states the finding."""
    figure = Figure(figsize=(13, 7.4), facecolor="white", layout="constrained")
    figure.suptitle(finding(metrics), fontsize=15, fontweight="bold")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 0.95))
    heads, stages = top.subplots(1, 2, width_ratios=(1.25, 1))
    size, training, words = bottom.subplots(1, 3, width_ratios=(0.8, 0.9, 1.1))
    plot_heads(heads, torch.tensor(metrics["importance"]), gates)
    heads.set_title(f"{bare_name(metrics['settings']['model'])}: {metrics['heads']['closed']} of {metrics['heads']['total']} heads closed (×) by "
                    f"{metrics['settings']['strategy']}", fontsize=11)
    plot_perplexities(stages, metrics["perplexity"])
    stages.set_title("what it cost, what came back", fontsize=11)
    if "pruned" in metrics["size"]:
        plot_sizes(size, metrics["size"])
        size.set_title("size and speed", fontsize=11)
    else:
        size.set_axis_off()
        size.text(0, 0.5, "keeps its gates:\nas large and as fast as before")
    plot_training(training, metrics)
    training.set_title("fine-tuning", fontsize=11)
    words.set_axis_off()
    words.set_title("what it writes", fontsize=11)
    text = ""
    for stage in ("dense", "pruned", "fine_tuned"):
        lines = textwrap.wrap(" ".join(metrics["samples"][stage].replace("$", r"\$").split()), 62)
        text += f"{STAGES[stage]}:\n" + "\n".join(lines[:5]) + (" …" if len(lines) > 5 else "") + "\n\n"
    words.text(0, 1, text, va="top", fontsize=8, transform=words.transAxes)
    for axes in (stages, size, training):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


# %% [markdown]
# Everything together goes into `report.md`.

# %%
@saying_disk_trouble()
def write_report(run: Run) -> str:
    """Writes report.md into the run's folder, and returns it."""
    metrics = run.metrics
    samples = "\n\n".join(f"**{STAGES[stage]}**\n\n> " + text.replace("\n", "\n> ") for stage, text in metrics["samples"].items())
    layers = " | ".join(map(str, metrics["heads"]["open_per_layer"]))
    lost = " | ".join(map(str, metrics["heads"]["closed_per_layer"]))
    numbers = " | ".join(map(str, range(len(metrics["heads"]["open_per_layer"]))))
    size = size_table(metrics["size"]) + "\n\n" if "pruned" in metrics["size"] else ""
    report = (f"# {bare_name(metrics['settings']['model'])}, {metrics['heads']['closed']} of {metrics['heads']['total']} heads closed\n\n"
              f"{comparison(metrics)}\n\n{conditions(metrics)}\n\n{size}![dashboard](dashboard.png)\n\n![heads](heads.png)\n\n"
              f"| layer | {numbers} |\n|---|{'---|' * len(metrics['heads']['open_per_layer'])}\n| heads open | {layers} |\n| heads lost | {lost} |\n\n![fine-tuning](fine_tuned.png)\n\n## Samples\n\n{samples}\n")
    (run.folder / "report.md").write_text(report, encoding="utf-8")
    return report


# %%
if __name__ == "__main__":
    require_fine_tuned(run.metrics)
    if run.writes:
        write_report(run)
    show_markdown(comparison(run.metrics) + "\n\n" + conditions(run.metrics))
    run.show(draw_dashboard(run.metrics, get_gates(model)), "dashboard.png", width=1100)
    for stage, words in run.metrics["samples"].items():
        print(f"\n{STAGES[stage]}:\n" + re.sub(r"\s*\n\s*", "\n  ", words))


# %% [markdown]
# ## 17. Save and download
#
# The **compact** model is saved so that anyone can open it, without this notebook: weights as safetensors, configuration, tokenizer,
# a model card, and `modeling_pruned.py`, a short file with the functions of section 13, which cuts the model while it is being
# opened. It is written from the source of those very functions, so the logic exists once.

# %%
def source_of(thing) -> str:
    """The source of a function or class of this file; inspect.getsource cannot find the classes of a notebook."""
    code = (thing.__init__ if isinstance(thing, type) else thing).__code__
    text = "".join(linecache.getlines(code.co_filename))
    return next(ast.get_source_segment(text, node) for node in ast.parse(text).body if getattr(node, "name", "") == thing.__name__)


def native_class(model) -> type:
    """The class of transformers that a model has, or is derived from."""
    return next(base for base in type(model).__mro__ if base.__module__.startswith("transformers.models."))


def modeling_code(name: str) -> str:
    """The text of modeling_pruned.py: the class Pruned<name>, derived from the class <name> of transformers."""
    pieces = (find_rows, slice_projection, cut_attention, cut_heads, find_cache, repeat_by_readers, NoHeads, LayerConfig)
    return f'''"""{name} with some of its attention heads removed; `kept_heads` in config.json lists those that are left.

Written by PruningAndFineTuningColab. Needs torch and transformers, nothing else.
"""

from types import SimpleNamespace

import torch
from transformers import {name}
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.pytorch_utils import Conv1D

# Some weights have another name in files than in models; the class here has the same ones as the class it derives from.
renamed = get_checkpoint_conversion_mapping("{name}")
if renamed:
    register_checkpoint_conversion_mapping("Pruned{name}", renamed, overwrite=True)


class Pruned{name}({name}):
    """Builds the full model and cuts it before its weights are loaded."""

    _auto_class = "AutoModelForCausalLM"  # so that save_pretrained takes this file along

    def __init__(self, config):
        super().__init__(config)
        cut_heads(self, getattr(config, "kept_heads", {{}}))


''' + "\n\n\n".join(source_of(piece) for piece in pieces) + "\n"


# %% [markdown]
# Where all layers have lost equally many heads, in whole groups, and the family's own configuration can say so, no code has to travel:
# the folder is an ordinary, smaller checkpoint. That is what `uniform` prunes for.

# %%
def native_config(model):
    """A compact model's configuration in the words of its family alone, or None where they do not suffice."""
    config, kept_heads = copy.deepcopy(model.config), model.config.kept_heads
    del config.kept_heads
    sharing = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    readers = {tuple(collections.Counter(head // sharing for head in kept).values()) for kept in kept_heads.values()}
    if len(readers) > 1 or len(set(min(readers))) != 1:
        return None  # layers differ, key/value heads are read by different numbers of query heads, or no head is left
    (readers,) = readers
    output_weight = model.get_submodule(next(iter(kept_heads))).weight
    try:
        return config_with_fewer(config, sum(readers), len(readers), output_weight.numel() // config.hidden_size // sum(readers))
    except UserError:
        return None


def save_compact(model, tokenizer, folder: Path) -> None:
    """Saves a compact model for from_pretrained: natively where that is possible, else with modeling_pruned.py."""
    model = move(copy.deepcopy(model), "cpu")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = native_config(model)
    if config is None:
        config, name = copy.deepcopy(model.config), native_class(model).__name__
        config.architectures, config.auto_map = [f"Pruned{name}"], {"AutoModelForCausalLM": f"modeling_pruned.Pruned{name}"}
        (folder / "modeling_pruned.py").write_text(modeling_code(name), encoding="utf-8")
    config.save_pretrained(folder)


# %% [markdown]
# Some tools allow no code at all. For them there is the **zeroed** form, the full-sized model with the gates multiplied into its
# output projections: it opens plainly and has the same logits. What the gates erased is kept beside it in `gates.safetensors`, so that
# `load_gated` can open any head again. To get there from a compact model, its weights go back to where they came from; the cut
# itself tells where that is.

# %%
@torch.no_grad()
def expand(small, model):
    """A copy of the gated `model` with the weights of `small`, which was compacted from it; closed heads keep those of `model`."""
    full, weights = copy.deepcopy(model), dict(small.named_parameters())
    for path, kept in small.config.kept_heads.items():
        parent, _, output = path.rpartition(".")
        origin = copy.deepcopy(model.get_submodule(parent))
        for parameter in origin.parameters():  # every number says where it stands, and is then cut with the rest
            parameter.requires_grad_(False).data = torch.arange(parameter.numel(), device=parameter.device).view_as(parameter)
        for name, position in cut_attention(origin, output, kept).named_parameters():
            target = full.get_parameter(f"{parent}.{name.replace('output_bias', f'{output}.bias')}")
            target.view(-1)[position.flatten()] = weights.pop(f"{parent}.{name}").flatten()
    for name, weight in weights.items():
        full.get_parameter(name).copy_(weight)
    set_gates(full, torch.tensor([[float(head in kept) for head in range(layer.heads)]
                                  for layer, kept in zip(find_heads(full), small.config.kept_heads.values())]))
    return full


@torch.no_grad()
def save_gated(model, tokenizer, folder: Path) -> None:
    """Saves a gated model as a plain checkpoint, with its gates and what they erased in gates.safetensors."""
    plain = move(copy.deepcopy(model), "cpu")
    kept = {"gates": get_gates(plain)}
    for number, layer in enumerate(find_heads(plain)):
        gates = layer.projection.gates
        kept[f"output_weight.{number}"] = layer.output_weight[gates != 1].clone().contiguous()
        layer.output_weight.mul_(gates[:, None, None])
    remove_gates(plain)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(kept, folder / "gates.safetensors")


@torch.no_grad()
def load_gated(folder: Path, device: str | torch.device = "cpu"):
    """Tokenizer and model that save_gated wrote, with its gates, every one of which can be opened again."""
    tokenizer, model = load_model(str(folder), device)
    kept = load_file(Path(folder) / "gates.safetensors")
    for number, (layer, gates) in enumerate(zip(find_heads(model), kept["gates"], strict=True)):
        layer.output_weight[gates != 1] = kept[f"output_weight.{number}"].to(device)
    set_gates(model, kept["gates"])
    return tokenizer, model


# %% [markdown]
# The model card says what the model is made from, what was removed, what that cost, and how to open it.

# %%
def model_card(metrics: dict, folder: Path) -> str:
    """The README.md of a saved model, with the metadata that the Hugging Face hub reads."""
    name, heads = bare_name(metrics["settings"]["model"]), metrics.get("heads_after_fine_tuning", metrics["heads"])
    removed = {}
    for layer, head in heads["closed_list"]:
        removed.setdefault(layer, []).append(str(head))
    on_hub = name == metrics["settings"]["model"] and name != "demo"
    with_code = (folder / "modeling_pruned.py").exists()
    closed = "closed (their output weights are zero)" if (folder / "gates.safetensors").exists() else "removed"
    return f"""---
{f'base_model: {name}{chr(10)}' if on_hub else ''}library_name: transformers
pipeline_tag: text-generation
tags: [attention-head-pruning]
---

# {name}, {heads["closed"]} of {heads["total"]} attention heads {closed.split()[0]}

Made from `{name}` with PruningAndFineTuningColab: heads were scored, the least important ones {closed}, and what is left was fine-tuned.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{', trust_remote_code=True' if with_code else ''})
```
{'''
`trust_remote_code=True` runs `modeling_pruned.py`, which is in this folder: read it first. It needs torch and transformers only.
''' if with_code else ''}
{comparison(metrics)}

{conditions(metrics)}

Heads {closed.split()[0]}, by layer: {"; ".join(f"{layer}: {', '.join(numbers)}" for layer, numbers in removed.items()) or "none"}.
"""


# %% [markdown]
# Before it is handed over, the folder is opened again as a stranger would do it, and must give the same logits. In Colab the last cell then
# downloads everything as one zip file; elsewhere it tells you where it is.

# %%
def reopen(folder: Path):
    """The model of a folder that this section wrote, opened as AutoModelForCausalLM.from_pretrained(trust_remote_code=True) does."""
    # Step by step, because some versions of AutoModelForCausalLM then use the folder's class for all models of the family.
    code = getattr(AutoConfig.from_pretrained(folder), "auto_map", {}).get("AutoModelForCausalLM")
    opener = get_class_from_dynamic_module(code, folder) if code else AutoModelForCausalLM
    return opener.from_pretrained(folder)


def save_models(run: Run, tuned, model, tokenizer, settings: Settings, block: torch.Tensor) -> None:
    """Saves `tuned`, which came from the gated `model`, in the forms that the settings ask for, and opens each again."""
    is_compact = hasattr(tuned.config, "kept_heads")
    forms = {"compact": ["compact"], "zeroed": ["zeroed"], "both": ["compact", "zeroed"], "no": []}[settings.save_model]
    if forms and not is_compact:
        print(f"{type(tuned).__name__} is not compact, so it is saved in the zeroed form, with its gates.")
        forms = ["zeroed"]
    run.metrics["reopened_difference"] = {}
    for form in forms:
        folder = run.folder / f"model-{form}"
        shutil.rmtree(folder, ignore_errors=True)  # from an earlier run of this cell
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, folder, ignore_errors=True)  # half a model is none
            if form == "compact":
                save_compact(tuned, tokenizer, folder)
            else:
                save_gated(expand(tuned, model) if is_compact else tuned, tokenizer, folder)
            (folder / "README.md").write_text(model_card(run.metrics, folder), encoding="utf-8")
            undo.pop_all()
        difference = run.metrics["reopened_difference"][form] = largest_difference(tuned, move(reopen(folder), run.device), block)
        print(f"{folder}: {sum(file.stat().st_size for file in folder.glob('*.safetensors')) / 1e6:.1f} MB; opened again, "
              + ("with the same logits" if not difference else f"logits differ by {difference:.0e} of the largest"))
        if difference > 1e-3:
            raise RuntimeError(f"{folder} does not open as the model that was saved: please report this, naming the model.")


def deliver(archive: Path) -> None:
    """Downloads a file in Colab, where it is not on Drive already; elsewhere says where it is, with a link in a notebook."""
    if "google.colab" in sys.modules and not archive.is_relative_to("/content/drive"):
        from google.colab import files

        files.download(str(archive))
    elif in_notebook():
        from IPython.display import HTML, display

        # Not IPython's FileLink: JupyterLab would open the zip as a text.
        display(HTML(f'<a href="{urllib.parse.quote(os.path.relpath(archive))}" download>{html.escape(archive.name)}</a>'))
    print(f"results: {archive} ({archive.stat().st_size / 2**20:.1f} MB)")


# %%
if __name__ == "__main__":
    require_fine_tuned(run.metrics)
    if run.writes:
        with run.step("save model"):
            save_models(run, tuned, pruned, tokenizer, settings, test_blocks[:1])
        deliver(run.finish())
    wait_for_all()
