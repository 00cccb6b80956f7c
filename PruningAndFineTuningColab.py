# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     collapsed_sections:
#     - workshop
#     name: PruningAndFineTuningColab.ipynb
#     provenance: []
#     toc_visible: true
#   jupytext:
#     cell_metadata_filter: cellView,jupyter,jp-MarkdownHeadingCollapsed,id,-all
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
# # Make a language model smaller and better
#
# A transformer reads with many **attention heads** at once, and a trained model does not need all of
# them. This notebook scores the heads of a causal language model, closes the least important ones,
# repairs what is left without training, cuts the closed heads out, fine-tunes the smaller model, and
# says what it cost. You get a folder that `from_pretrained` opens, and, if you like, a file for llama.cpp. Two
# real runs, on two processor cores:
#
# | SmolLM2-135M-Instruct, WikiText-2; test perplexity, lower is better | heads | heads and neurons |
# |---|---|---|
# | as it came: 270 heads, 134.5 M parameters | 33.3 | 33.3 |
# | pruned: 189 heads, 127.8 M; or 260 heads and 93 % of the neurons, 128.1 M | 41.3 | 36.9 |
# | + repaired, nothing trained | 38.1 | 35.6 |
# | + fine-tuned, 200 steps | 24.6 | 23.5 |
# | not pruned, fine-tuned with the same steps | 21.9 | 21.9 |
#
# Choose *Run all*, or run the cells one by one. Every cell can be run again, also with other settings,
# because the model that was loaded is never changed.
#
# **Contents:** [1 Settings](#1.-Settings) · [2 Workshop](#2.-Workshop) (the machinery: skip it,
# [go on with 3](#3.-Start)) · [4 Text](#4.-Text) · [5 Model](#5.-Model) ·
# [6 Heads and gates](#6.-Heads-and-gates) · [7 Perplexity](#7.-Perplexity) ·
# [8 Importance](#8.-Importance) · [9 Prune](#9.-Prune) · [10 Explore](#10.-Explore) ·
# [11 Repair](#11.-Repair) · [12 Sweep](#12.-Sweep) · [13 Compact](#13.-Compact) ·
# [14 Fine-tune](#14.-Fine-tune) · [15 Compare](#15.-Compare) · [16 Save and download](#16.-Save-and-download)

# %% [markdown]
# <a name="1.-Settings"></a>
# ## 1. Settings
#
# These eleven matter. As they are, you get GPT-2 on WikiText-2, or, without a network, a small demo model
# that is trained here. `MODEL` takes any hub id (`HuggingFaceTB/SmolLM2-135M`), a folder or a `.gguf`
# file. Change `PRUNE`, `STRATEGY` and `PRUNING_LEVEL` first: as they are, 30 % of the heads are closed.
# `neurons` closes neurons of the MLPs, which hold most of a model's parameters; `both` closes whichever
# is worth least for its size.
# `MORE` takes every other setting as a shell would, for example `--block-length 256 --no-repair`;
# `--help` lists them. The same file is a script: `python PruningAndFineTuningColab.py --help`.

# %% cellView="form"
# @title Settings
MODEL = "auto"  # @param ["auto", "demo", "gpt2", "facebook/opt-125m", "EleutherAI/pythia-160m"] {allow-input: true}
DATASET = "auto"  # @param ["auto", "Salesforce/wikitext", "python-docs"] {allow-input: true}
TRAIN_FILE = ""  # @param {type: "string"}
PRUNE = "heads"  # @param ["heads", "neurons", "both"]
STRATEGY = "learned"  # @param ["learned", "fisher", "gradient", "entropy", "magnitude", "random", "entropy-literal"]
PRUNING_LEVEL = 0.3  # @param {type: "slider", min: 0, max: 0.9, step: 0.05}
MAX_STEPS = "auto"  # @param ["auto", "200", "1000", "5000"] {allow-input: true}
SWEEP = False  # @param {type: "boolean"}
SAVE_MODEL = "compact"  # @param ["compact", "compact gguf", "compact zeroed", "zeroed", "no"] {allow-input: true}
SAVE_TO_DRIVE = False  # @param {type: "boolean"}
MORE = ""  # @param {type: "string"}

# %% [markdown] id="workshop" jp-MarkdownHeadingCollapsed=true
# <a name="2.-Workshop"></a>
# ## 2. Workshop
#
# The machinery that the story below uses: packages, all settings, devices, memory, the record of a
# run. Nothing here is about pruning. [Go on with section 3](#3.-Start).

# %% cellView="form" jupyter={"source_hidden": true}
# @title Packages: what Colab lacks is installed, the rest stays as it is
import builtins
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys

NEEDED = {"torch": "2.9", "transformers": "5.9", "datasets": "4.0", "accelerate": "1.14", "matplotlib": "3.10",
          "ipywidgets": "7.7.1", "psutil": "5.9", "gguf": "0.17"}  # package -> the oldest version that will do

def in_notebook() -> bool:
    """True in Jupyter and Colab, False in a plain Python process."""
    return "ipykernel" in sys.modules and hasattr(builtins, "__IPYTHON__")

def install_missing() -> None:
    """Installs the packages of NEEDED that are not there."""
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)

def check_versions() -> None:
    """Raises ImportError, or ends the script, where a package is too old."""
    for package, oldest in NEEDED.items():
        there = importlib.metadata.version(package)
        numbers = [[int(part) for part in re.findall(r"\d+", version)[:3]] for version in (there, oldest)]
        if numbers[0] < numbers[1]:
            words = f"{package} is {there}, but must be at least {oldest}: pip install --upgrade {package}."
            if __name__ == "__main__" and not in_notebook():
                print(f"error: {words}", file=sys.stderr)
                raise SystemExit(2)
            raise ImportError(words)

if __name__ == "__main__" and in_notebook():
    install_missing()
check_versions()

import torch

if torch.cuda.is_available():
    os.environ.setdefault("USE_TORCH_XLA", "0")  # where both are installed the Trainer would leave the GPU idle

# %% cellView="form" jupyter={"source_hidden": true}
# @title Imports of Python's own
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
import glob
import gzip
import hashlib
import html
import inspect
import io
import json
import linecache
import math
import platform
import shlex
import shutil
import statistics
import tempfile
import textwrap
import threading
import time
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

# %% cellView="form" jupyter={"source_hidden": true}
# @title Imports of packages
import accelerate
import datasets
import gguf
import huggingface_hub
import ipywidgets as widgets
import matplotlib
import numpy
import psutil
import pyarrow
import pyarrow.parquet
import tokenizers
import transformers
from accelerate.utils import broadcast, gather_object, is_torch_xla_available
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from matplotlib.colors import PowerNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.pytorch_utils import Conv1D


# %% cellView="form" jupyter={"source_hidden": true}
# @title Errors: mistakes and failures, each said in one sentence
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


# %% cellView="form" jupyter={"source_hidden": true}
# @title What a setting may be
class Rule(NamedTuple):
    """What a setting may be, in words, and the function that checks it."""

    words: str
    holds: Callable

def at_least(low: float, below: float = math.inf) -> Rule:
    words = f"at least {low:g}" + (f" and below {below:g}" if below < math.inf else "")
    return Rule(words, lambda value: low <= value < below)

ABOVE_ZERO = Rule("above 0", lambda value: 0 < value < math.inf)
SHARE = Rule("from 0 to 1", lambda value: 0 <= value <= 1)
WORDS = Rule("some words", lambda text: bool(text.strip()))
FORMS = Rule("'no', or one or more of compact, zeroed and gguf, separated by spaces", lambda forms: forms == "no" or (
    bool(forms.split()) and set(forms.split()) <= {"compact", "zeroed", "gguf"}))
STEPS = Rule("'auto' or a number of steps, at least 1",
             lambda steps: str(steps) == "auto" or (str(steps).isdecimal() and int(steps) > 0))
LEVELS = Rule("numbers from 0 to below 1, separated by spaces",
              lambda levels: bool(re.fullmatch(r"\s*((0?\.\d+|0)(\s+|$))+", levels)))
STRATEGY_NAMES = ("learned", "fisher", "gradient", "entropy", "magnitude", "random", "entropy-literal")
STRATEGY_LIST = Rule(f"one or more of {', '.join(STRATEGY_NAMES)}",
                     lambda names: bool(names.split()) and set(names.split()) <= set(STRATEGY_NAMES))


# %% cellView="form" jupyter={"source_hidden": true}
# @title Which files a setting means: one, all of a folder, or those that fit a pattern
KINDS = (".txt", ".md", ".jsonl", ".json", ".csv", ".parquet")  # all but the last also with .gz behind it

def kind_of(path: Path) -> str:
    """The suffix that says how a file is read, in small letters and without .gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:-1] if suffixes[-1:] == [".gz"] else suffixes[-1:])

def refuse_folder(error: OSError):
    """Raises UserError for a folder that cannot be read."""
    raise UserError(f"the folder {error.filename!r} cannot be read ({error.strerror}): take another one, or name the "
                    "files.")

def find_files(path: str) -> list[Path]:
    """The files that a path means. A file that is called so comes first, whatever signs are in its name."""
    place = Path(path)
    if place.is_file():
        return [place]
    if place.is_dir():
        found = (Path(folder, name) for folder, _, names in os.walk(place, onerror=refuse_folder) for name in names)
        return sorted(file for file in found if kind_of(file) in KINDS and os.path.isfile(file))
    return sorted(file for file in map(Path, glob.glob(path, recursive=True)) if file.is_file())


# %% cellView="form" jupyter={"source_hidden": true}
# @title All settings (1): name, default, what it may be, and what it means
SETTINGS = {
    "model and pruning": [
        ("model", MODEL, None, "hub id, local folder, .gguf file, 'demo' (trained here), or 'auto': gpt2, or the demo"),
        ("revision", "", None, "branch, tag or commit of a model on the hub"),
        ("strategy", STRATEGY, STRATEGY_NAMES, "how heads are scored"),
        ("prune", PRUNE, ("heads", "neurons", "both"), "what is closed: heads, neurons of the MLPs, or both together"),
        ("pruning_level", PRUNING_LEVEL, at_least(0, 1), "share to close of all heads, neurons, or parameters of both; "
         "auto: as much as --max-loss allows, where that is not given 0.05"),
        ("max_loss", 0.0, at_least(0), "find the largest level at which validation perplexity rises by no more than "
         "this share; 0: close as much as --pruning-level says"),
        ("min_heads", 1, at_least(0), "heads that stay open in every layer"),
        ("round_neurons", 0, at_least(0), "multiple that numbers of neurons stay at, 256 suits k-quants; 0: 32, which "
         "suits kernels, in layers of 1,024 neurons or more, else 1"),
        ("gate_steps", 240, at_least(1), "steps that the strategy 'learned' trains the gates for"),
        ("repair", True, None, "after pruning, refit the output projections by least squares, without training"),
        ("repair_blocks", 128, at_least(1), "blocks of training text that the repair is solved on"),
        ("uniform", False, None, "close equally many heads in every layer, in whole key/value groups, so that the "
         "smaller model needs no code of its own (Llama-like models)"),
        ("even_groups", "auto", ("auto", "yes", "no"), "where several heads read the same key, leave equally many for "
         "every key of a layer: smaller files in llama.cpp; auto: where save_model asks for gguf"),
        ("reopen_heads", False, None, "let closed heads come back in fine-tuning")],
    "text": [
        ("dataset", DATASET, None, "hub dataset id, 'python-docs' (needs no network), or 'auto': WikiText-2 or these"),
        ("dataset_config", "", None, "configuration of the hub dataset"),
        ("train_file", TRAIN_FILE, None, "file, folder or pattern (.txt, .md, .jsonl, .json, .csv, .parquet, also .gz) "
         "instead of a dataset; alone it is split 80/10/10"),
        ("validation_file", "", None, "text for calibration and validation"),
        ("test_file", "", None, "text that only the reported perplexities see"),
        ("block_length", 512, at_least(2), "tokens in a block"),
        ("calibration_blocks", 64, at_least(1), "validation blocks that the heads are scored on"),
        ("eval_blocks", 64, at_least(0), "test blocks that perplexity is measured on, 0 = all"),
        ("prompt", "The history of the city began", WORDS, "the start of the sample texts")],
    "fine-tuning": [
        ("max_steps", MAX_STEPS, STEPS, "optimizer steps; auto: as many as --epochs needs, where that is not given one "
         "pass over the training text with an accelerator, 200 steps without"),
        ("epochs", 0.0, at_least(0), "passes over the training text instead of --max-steps"),
        ("learning_rate", 1e-4, ABOVE_ZERO, "peak learning rate"),
        ("warmup", 0.1, SHARE, "share of the steps in which the learning rate rises to its peak"),
        ("weight_decay", 0.01, at_least(0), "AdamW's weight decay"),
        ("distillation", 0.0, SHARE, "share of the loss that asks for the dense model's predictions"),
        ("patience", 3, at_least(0), "evaluations without improvement after which training stops, 0 = never"),
        ("batch_size", 4, at_least(1), "blocks in one optimizer step, however many fit at once"),
        ("gradient_checkpointing", False, None, "keep only each layer's input: slower, in much less memory"),
        ("control", "auto", ("auto", "yes", "no"), "fine-tune the dense model with the same budget, to compare; auto: "
         "yes, unless the model is large and the machine has no accelerator")],
}


# %% cellView="form" jupyter={"source_hidden": true}
# @title All settings (2): the sweep, the machine, the results
SETTINGS |= {
    "sweep": [
        ("sweep", SWEEP, None, "prune with every strategy at every level below, and compare; a script stops after it"),
        ("sweep_strategies", "learned fisher gradient entropy magnitude random", STRATEGY_LIST, "separated by spaces"),
        ("sweep_levels", "0.1 0.3 0.5", LEVELS, "pruning levels, separated by spaces")],
    "machine and results": [
        ("device", "auto", ("auto", "cuda", "tpu", "mps", "cpu"), "where to compute"),
        ("precision", "auto", ("auto", "fp32", "fp16", "bf16"), "number format of the computations; auto: bf16 where "
         "the GPU or TPU has it, fp16 on other CUDA GPUs, else fp32"),
        ("seed", 0, at_least(0), "seed of everything random"),
        ("save_model", SAVE_MODEL, FORMS, "forms of the saved model, separated by spaces: compact (smaller, "
         "faster), gguf (the same for llama.cpp), zeroed (full size, opens without code of its own); or no"),
        ("gguf_format", "auto", ("auto", "f32", "f16", "bf16", "q8_0"), "number format of the .gguf file; auto: bf16 "
         "where the weights are saved so, else f16"),
        ("save_format", "auto", ("auto", "fp32", "fp16", "bf16"), "number format of the saved weights; auto: the one "
         "that the model came in, for a .gguf file bf16"),
        ("output_dir", "results", None, "folder that gets a new results folder for each run"),
        ("save_to_drive", SAVE_TO_DRIVE, None, "in Colab, keep the results on your Google Drive"),
        ("resume", "auto", None, "results folder of a run to go on with; 'auto': the newest unfinished one with these "
         "very settings, if there is one; 'no': start anew"),
        ("offline", False, None, "use no network, only what is on this machine"),
        ("trust_remote_code", False, None, "run the Python code that a model brings along, if it does")],
}


# %% cellView="form" jupyter={"source_hidden": true}
# @title Settings, checked before anything is computed
class CheckedSettings:
    """Raises UserError for a value that is out of range, or does not go with another."""

    def __post_init__(self):
        for name, default, allowed, _ in (row for rows in SETTINGS.values() for row in rows):
            value = getattr(self, name)
            if isinstance(allowed, Rule):
                self.check(name, allowed.holds(value), allowed.words, f"the default is {default!r}")
            elif allowed:
                check_choice(name, value, allowed)
        for name in ("train_file", "validation_file", "test_file"):
            if path := getattr(self, name):
                files, kinds = find_files(path), ", ".join(KINDS)
                self.check(name, bool(files), f"an existing file ({kinds}), a folder with some, or a pattern such as "
                           "data/*.txt", "check the path")
                self.check(name, all(kind_of(file) in KINDS for file in files), f"of a kind that can be read ({kinds}, "
                           "or .gz of them)", "convert it first")
                self.check(name, bool(self.train_file), "given together with train_file", "name that file too")
                self.check("dataset", self.dataset == "auto", "left alone where files are given", "drop one of the two")
        one, in_colab = "drop one of the two", "google.colab" in sys.modules
        self.check("epochs", not self.epochs or self.max_steps == "auto", "left alone where max_steps is given", one)
        self.check("uniform", not (self.uniform and self.reopen_heads), "off where reopen_heads is on", one)
        for name in ("uniform", "reopen_heads"):
            self.check(name, self.prune == "heads" or not getattr(self, name), "off where neurons are pruned", one)
        self.check("strategy", self.prune == "heads" or self.strategy != "entropy-literal", "another one where neurons "
                   "are pruned, which have no attention", "take entropy")
        self.check("sweep", not (self.sweep and self.uniform), "off where uniform is on", one)
        self.check("save_to_drive", in_colab or not self.save_to_drive, "off outside of Colab", "choose an output_dir")
        self.check("output_dir", not Path(self.output_dir).is_file(), "a folder", "choose another name")

    def even(self) -> bool:
        """True where groups of heads are to stay even."""
        return self.even_groups == "yes" or (self.even_groups == "auto" and "gguf" in self.save_model.split())

    def multiple(self, neurons: int) -> int:
        """The multiple that the number of a layer's neurons stays at."""
        return min(self.round_neurons or (32 if neurons >= 1024 else 1), max(neurons, 1))

    def check(self, name: str, fine: bool, allowed: str, remedy: str) -> None:
        if not fine:
            raise UserError(f"{name} is {getattr(self, name)!r}, but must be {allowed}: {remedy}.")

Settings = dataclasses.make_dataclass(
    "Settings", [(name, type(default), default) for rows in SETTINGS.values() for name, default, *_ in rows],
    bases=(CheckedSettings,), frozen=True)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Settings from the form, from options as in a shell, or from the record of an earlier run
class Options(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors."""

    def error(self, message: str):
        raise UserError(f"{message}; --help lists all options.")

def settings_of(folder: str) -> dict:
    """The settings that the run of a results folder was started with. Raises UserError where it does not say them."""
    kinds = {field.name: (int, float) if field.type is float else field.type
             for field in dataclasses.fields(Settings) if field.name != "resume"}
    try:
        asked = json.loads(Path(folder, "metrics.json").read_text())["asked"]
        if not all(isinstance(asked[name], kind) for name, kind in kinds.items()):
            raise ValueError
        return {name: asked[name] for name in kinds}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"resume is {folder!r}, but must be 'auto', 'no', or the folder of a run, with its "
                        "metrics.json: check the path.") from None

def number_or_auto(word: str) -> float | str:
    """What --pruning-level may be; argparse says this name where it is something else."""
    return word if word == "auto" else float(word)

def read_settings(arguments: list[str]) -> Settings:
    """Settings from the form's values, overridden by options as a shell gives them. Raises UserError."""
    parser = Options(description="Prune the attention heads of a causal language model, fine-tune what is left, and "
                     "compare.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for title, rows in SETTINGS.items():
        group = parser.add_argument_group(title)
        for name, default, allowed, help in rows:
            choices = "{" + ",".join(allowed) + "}" if allowed and not isinstance(allowed, Rule) else ""
            kind = {"type": type(default), "metavar": choices or name.split("_")[-1].upper()}
            if isinstance(default, bool) or name in ("control", "even_groups"):
                kind = {"action": argparse.BooleanOptionalAction}
            elif name == "pruning_level":
                kind["type"] = number_or_auto
            default = globals().get(name.upper(), default)  # the form's value now
            group.add_argument("--" + name.replace("_", "-"), default=default, help=help, **kind)
    values = vars(parser.parse_args(arguments))
    if values["resume"] not in ("auto", "no"):  # its settings, but for what is said now
        parser.set_defaults(**settings_of(values["resume"]))
        values = vars(parser.parse_args(arguments))
    if values["pruning_level"] == "auto":
        values |= {"pruning_level": PRUNING_LEVEL, "max_loss": values["max_loss"] or 0.05}
    values["max_steps"] = str(values["max_steps"])  # somebody may write a number into the form
    for name in ("control", "even_groups"):
        values[name] = {True: "yes", False: "no"}.get(values[name], values[name])
    return Settings(**values)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Model and text that are 'auto', and whether there is a network
def hub_is_reachable(timeout: float = 2.0) -> bool:
    """Asks the hub once, instead of letting every download find out for itself."""
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=timeout).close()
    except OSError:
        return False
    return True

def check_cache() -> None:
    """Raises UserError where what comes from the hub cannot be kept."""
    for folder in (huggingface_hub.constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"the Hugging Face cache is {str(folder)!r}, but nothing can be written there "
                            f"({error.strerror}): set HF_HOME to another folder.") from None

def choose_sources(settings: Settings) -> Settings:
    """Settings with every 'auto' in model and dataset resolved; the hub libraries are told whether there is a network.

    A model that was named never turns into another one.
    """
    model, dataset = settings.model, settings.dataset
    local_model = model == "demo" or Path(model).exists()
    if dataset == "auto" and model == "demo" and not settings.train_file:
        dataset = "python-docs"
    needs_hub = not local_model or not (settings.train_file or dataset == "python-docs")
    offline = settings.offline or huggingface_hub.constants.HF_HUB_OFFLINE or (needs_hub and not hub_is_reachable())
    if offline:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    elif needs_hub:
        check_cache()
    if model == "auto":
        model = "demo" if offline else "gpt2"
        if offline:
            print("The Hugging Face hub cannot be reached, so this is a small demo model, trained on Python's manual. "
                  "For a real one give --model: a hub id where there is a network, a local folder, or a .gguf file.")
    if dataset == "auto" and not settings.train_file:
        dataset = "python-docs" if model == "demo" else "Salesforce/wikitext"
    config = settings.dataset_config or ("wikitext-2-raw-v1" if dataset == "Salesforce/wikitext" else "")
    return dataclasses.replace(settings, model=model, dataset=dataset, dataset_config=config, offline=offline)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Failures: the disk, and the script's last words
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOTCONN, errno.ESTALE)

def disk_trouble(error: BaseException | None) -> str:
    """What is wrong with a disk (full, read-only, gone), where that is behind an error; else an empty text."""
    allowed = (*DISK_ERRORS, errno.ENOENT, errno.EACCES)  # these two are usual where something is only looked for
    while error is not None:
        if isinstance(error, OSError) and error.errno in allowed:
            return error.strerror + (f": {error.filename}" if error.filename else "")
        if "PytorchStreamWriter failed" in str(error) or "No space left" in str(error):
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
            raise RunError(f"the disk cannot be written or read ({trouble}): make room or bring it back, or choose "
                           "another --output-dir.") from error
        raise

def stop_without_traceback(kind, error, trace):
    """The script's sys.excepthook: one sentence; exit status 2 for a mistake, 1 for a failure, 130 for Ctrl-C."""
    there = ""
    if "run" in globals() and run.folder.exists() and kind is not UserError:
        known = ", ".join(f"{stage} {value:.2f}" for stage, value in run.metrics["perplexity"].items())
        known = f" (perplexity: {known})" if known else ""
        there = f" What is there is in {run.folder}{known}; the same command goes on from it."
    if issubclass(kind, UserError):
        words, status = f"error: {error}", 2
    elif issubclass(kind, KeyboardInterrupt):
        words, status = f"interrupted.{there}", 130
    elif issubclass(kind, torch.OutOfMemoryError):
        words, status = f"failed: out of memory: take a smaller --block-length or model, or --precision bf16.{there}", 1
    elif issubclass(kind, (RunError, SafetensorError)):
        words, status = f"failed: {error}{there}", 1
    elif issubclass(kind, RuntimeError) and re.search("onnection (closed|reset) by|NCCL", str(error)):
        words, status = f"failed: another process ended, and this one waited for it in vain.{there}", 1
    else:
        sys.__excepthook__(kind, error, trace)
        words, status = f"failed: this should not happen, please report it.{there}", 1
    if int(os.environ.get("RANK", "0")):
        time.sleep(3)  # where the first process has the same to say, it ends now, and torchrun ends this one
    print(words, file=sys.__stderr__, flush=True)  # torch.distributed replaces sys.stderr, and drops what is in it
    raise SystemExit(status)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Device and number format, found by themselves
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
        raise UserError(f"device is {choice!r}, but transformers trains by torch_xla where that is installed: set "
                        "USE_TORCH_XLA=0 in the environment.")
    return torch.device(choice)

def find_precision(device: torch.device, choice: str = "auto") -> torch.dtype:
    """The number format that this device computes in; weights stay in float32. Raises UserError for one it lacks."""
    has_bf16 = {"cuda": device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False),
                "xla": True, "cpu": True}.get(device.type, False)
    if choice == "auto":
        choice = "fp32" if device.type in ("cpu", "mps") else "bf16" if has_bf16 else "fp16"
    if (choice == "fp16" and device.type != "cuda") or (choice == "bf16" and not has_bf16):
        raise UserError(f"precision is {choice!r}, which {device.type} does not have: choose 'fp32', or 'auto'.")
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[choice]

def move(model, device: torch.device | str):
    """The model, moved to a device; XLA makes a new tensor for each of two tied weights, so they are tied again."""
    model.to(device)
    model.tie_weights()
    return model

def describe_device(device: torch.device) -> str:
    """One line: what the machine computes with."""
    ram = f"{psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB RAM"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB ({ram})"
    return f"{device.type.upper()}: {platform.processor() or platform.machine()} ({ram})"


# %% cellView="form" jupyter={"source_hidden": true}
# @title Several processes: torchrun starts one for each GPU, and each takes its share of the text
def rank_and_world() -> tuple[int, int]:
    """(number of this process, number of processes) that were started together."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if ready else (0, 1)

def from_all_processes(value) -> list:
    """What every process brings to this line, in the order of the processes."""
    return gather_object([value]) if rank_and_world()[1] > 1 else [value]

def same_everywhere(model):
    """The model, with the first process's parameters."""
    if rank_and_world()[1] > 1:
        for parameter in model.parameters():
            broadcast(parameter.detach())
    return model

def wait_for_all() -> None:
    if rank_and_world()[1] > 1:
        torch.distributed.barrier()

def join_processes(device: torch.device) -> torch.device:
    """Joins the processes that were started together; the device of this one. Raises UserError for models in parts."""
    for what in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{what}", "false") in ("true", "1"):
            raise UserError(f"accelerate was told to use {what}, but heads are scored and cut on a whole model: leave "
                            "it out.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return accelerate.PartialState(cpu=device.type == "cpu").device
    return device

def silence_all_but_first() -> None:
    """Of several processes the first alone speaks."""
    if int(os.environ.get("RANK", "0")):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stays open as long as the process)
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()


# %% cellView="form" jupyter={"source_hidden": true}
# @title Memory: what is used, what is free, and how many blocks have room
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

def peak_memory(device: torch.device) -> dict[str, int]:
    """Largest bytes in use: RAM since the process began, a GPU's memory since the step began."""
    peak = memory_used(device)
    if sys.platform == "win32":
        peak["ram"] = psutil.Process().memory_info().peak_wset
    else:
        import resource

        peak["ram"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if device.type == "cuda":
        peak["accelerator"] = torch.cuda.max_memory_allocated(device)
    return peak

def memory_words(device: torch.device, peak: dict[str, int]) -> str:
    return ", ".join(f"{kind} {used / 2**30:.2f} GiB (peak {peak[kind] / 2**30:.2f})"
                     for kind, used in memory_used(device).items())

def free_memory() -> None:
    """Gives back what deleted models held, on processor and accelerator, and begins to watch a GPU's peak anew."""
    clear_device_cache(garbage_collection=True)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if sys.platform == "linux":  # glibc keeps what is free for itself, and a kernel would seem to grow from run to run
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)

def free_bytes(device: torch.device) -> float:
    """Bytes that this process can still have: of the accelerator where it says so, else its share of the free RAM."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "xla":  # XLA plans its memory by itself
        return math.inf
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


# %% cellView="form" jupyter={"source_hidden": true}
# @title How it is computed: the number format, and what was found to fit into memory
@dataclasses.dataclass
class Computing:
    """How over_blocks() computes, for all of the story: set once, in section 3."""

    dtype: torch.dtype = torch.float32
    batch_size: int = 4
    fitted: dict = dataclasses.field(default_factory=dict)  # step that ran out of memory -> blocks that fit
    wider_from: str = ""  # the step in which float16 was too narrow, so that all is computed in float32 since then

COMPUTING = Computing()

def autocast(device: torch.device):
    """Context in which a model computes in COMPUTING.dtype."""
    exact = COMPUTING.dtype == torch.float32
    return contextlib.nullcontext() if exact else torch.autocast(device.type, dtype=COMPUTING.dtype)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Batches that fit: a step that runs out of memory goes on with fewer blocks at once
def room_for_blocks(model, tokens: int, kind: str = "forward", bytes_beside: float = 0) -> int:
    """Roughly how many blocks of so many tokens have room in the memory that is free now; at least 1.

    A layer holds 34 bytes per token and width in 16 bits (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198);
    for a "backward" pass every layer does. Beside that come logits and their copies, attention "maps", or two "streams"
    of each layer in 16 bits with one layer's inputs and targets in float32.
    """
    config, backward = model.config.get_text_config(), kind == "backward"
    each = 34 * torch.finfo(COMPUTING.dtype).bits // 16 * tokens * config.hidden_size
    each *= config.num_hidden_layers if backward else 1
    each += {"maps": 12 * config.num_attention_heads * tokens**2, "backward": 24 * tokens * config.vocab_size,
             "forward": 12 * tokens * config.vocab_size,
             "streams": (4 * config.num_hidden_layers + 60) * tokens * config.hidden_size}[kind]
    return max(1, int(min((free_bytes(model.device) - bytes_beside) / each, 1e9)))

def fit_batch_size(function, largest: int, what: str, room: int | None = None, in_step: bool = False):
    """`function(batch_size)`, with `largest` or, where there is no room for it, the next smaller divisor.

    What fits is remembered under `what`. `in_step` says that several processes wait for each other within the
    function: then they cannot begin anew one by one, and the run ends, to go on with smaller batches.
    Raises RunError there, and where not even a single block fits.
    """
    sizes = [size for size in range(largest, 0, -1) if largest % size == 0]
    together = in_step and rank_and_world()[1] > 1
    room = room or largest
    if (min(from_all_processes(room)) if together else room) < COMPUTING.fitted.get(what, largest):
        COMPUTING.fitted[what] = next((size for size in sizes if size <= room), 1)
        print(f"{what}: memory has room for {COMPUTING.fitted[what]} blocks at once, not {largest}")
    sizes = [size for size in sizes if size <= COMPUTING.fitted.get(what, largest)] or [1]
    for size, smaller in zip(sizes, [*sizes[1:], 0]):
        try:
            return function(size)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        free_memory()
        COMPUTING.fitted[what] = smaller
        if not smaller:
            less = "--gradient-checkpointing, " if what == "fine-tuning" else ""
            raise RunError(f"{what} runs out of memory with a single block: take a smaller --block-length, --precision "
                           f"bf16, {less}or a smaller model.")
        if together:
            raise RunError(f"{what} runs out of memory in one of several processes: start the same command again, and "
                           f"it takes {smaller} blocks at once.")
        print(f"{what} runs out of memory: trying {smaller} blocks at once")


# %% cellView="form" jupyter={"source_hidden": true}
# @title Numbers that are no numbers: noticed where they first appear, and computed again where float16 is too narrow
@torch.no_grad()
def first_not_finite(model, block: torch.Tensor) -> str:
    """The first part of a model that makes numbers that are not finite, of a block (1, time), in words."""
    found, names = [], {module: name for name, module in model.named_modules()}

    def look(module, args, output):
        part = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(part, torch.Tensor) and not part.isfinite().all():
            found.append(names[module] or type(module).__name__)

    with hooks(module.register_forward_hook(look) for module in names), autocast(model.device):
        model.eval()(block.to(model.device), use_cache=False)
    return f"first in {found[0]}" if found else "though all that the model computes is finite"

def compute_wider(model, block: torch.Tensor, what: str) -> None:
    """From here on all is computed in float32, because float16 was too narrow. Raises RunError where that was not it.

    `what` was computed; block (1, time) is one of its texts.
    """
    place = first_not_finite(model, block)
    if COMPUTING.dtype != torch.float16:
        raise RunError(f"{what} gives numbers that are not finite ({place}): take another model or text, or report "
                       "this.")
    COMPUTING.dtype, COMPUTING.wider_from = torch.float32, what
    print(f"{what}: float16 is too narrow ({place}); from here on all is computed in float32.")


# %% cellView="form" jupyter={"source_hidden": true}
# @title The door between story and machine: over_blocks()
PROGRESS = contextvars.ContextVar("progress")

def long_loop(items, what: str, device: torch.device | None = None):
    """The items one by one, with a bar: tqdm's, or that of whoever set PROGRESS. `device` does the work of an item."""
    bar = functools.partial(tqdm, leave=False, disable=rank_and_world()[0] > 0 or None)
    for item in PROGRESS.get(bar)(items, what) if what else items:
        yield item
        if device is not None and device.type == "xla":  # a TPU collects work until it is told to begin
            sys.modules["torch_xla"].sync()

def over_blocks(model, blocks, function, what: str, memory: str = "forward", share: bool = True) -> torch.Tensor:
    """What `function` returns for every block, in their order: (n, ...), on the model's device.

    `blocks` are token ids (n, time), or a tuple of tensors that belong together, block by block; `function` gets
    batches of them on the model's device, and returns a tensor that has a row for each block of the batch. It runs
    in evaluation mode, in COMPUTING.dtype, in batches that fit into memory, with a progress bar named `what`, and on
    several processes each takes its share (or, with `share=False`, all blocks). `memory` says what a batch needs:
    "forward", "backward", or attention "maps".
    """
    tensors = blocks if isinstance(blocks, tuple) else (blocks,)
    rank, world = rank_and_world() if share else (0, 1)
    own = [tensor[rank::world] for tensor in tensors]
    model.eval()

    def attempt(size: int) -> list[torch.Tensor]:
        batches, parts = list(zip(*(tensor.split(size) for tensor in own))) if len(own[0]) else [], []
        for batch in long_loop(batches, what if len(batches) > 1 else "", model.device):
            with autocast(model.device):
                parts.append(function(*(part.to(model.device) for part in batch)))
        return parts

    def rows() -> torch.Tensor:
        # On a processor two texts at a time are fastest in a backward pass: more logits are too large for its caches.
        slow = memory == "backward" and model.device.type == "cpu"
        room = room_for_blocks(model, tensors[0].shape[1], memory)
        parts = fit_batch_size(attempt, min(COMPUTING.batch_size, 2) if slow else COMPUTING.batch_size, what, room)
        if world == 1:
            return torch.cat(parts)
        found = [None] * len(tensors[0])
        for number, theirs in enumerate(from_all_processes([part.cpu() for part in parts])):
            found[number::world] = [row for part in theirs for row in part]
        return torch.stack(found).to(model.device)

    found = rows()
    if not found.isfinite().all():
        compute_wider(model, tensors[0][:1], what)
        found = rows()
    return found


# %% cellView="form" jupyter={"source_hidden": true}
# @title The door for work in which all blocks have to come through a layer before the next layer can begin
def all_at_once(model, blocks, function, what: str):
    """The model that `function(blocks)` returns, from all blocks (n, time) at once or from as many as have room.

    It runs in COMPUTING.dtype, on every process alike; all then go on with the first one's model.
    """
    def attempt(number: int):
        with autocast(model.device):
            return function(blocks[:number].to(model.device))

    try:
        made = fit_batch_size(attempt, len(blocks), what, room_for_blocks(model, blocks.shape[1], "streams"))
    except FloatingPointError:
        compute_wider(model, blocks[:1], what)
        made = fit_batch_size(attempt, len(blocks), what, room_for_blocks(model, blocks.shape[1], "streams"))
    return same_everywhere(made)


# %% cellView="form" jupyter={"source_hidden": true}
# @title What a run is named by and found again by
def on_drive(folder: str) -> Path:
    """The folder of this name on Google Drive, which Colab asks you to allow. Raises UserError where you do not."""
    from google.colab import drive

    try:
        drive.mount("/content/drive")
    except Exception as error:  # Colab raises whatever went wrong, from a browser without cookies to a "no"
        raise UserError(f"save_to_drive is on, but Google Drive cannot be mounted ({first_sentence(error)}): allow it, "
                        "or switch it off.") from None
    return Path("/content/drive/MyDrive", folder)

def fingerprint(*things) -> str:
    """The same for the same values (numbers, texts, tensors, models with weights and gates), and else another."""
    digest = hashlib.sha256()
    for thing in things:
        tensors = {"": thing} if isinstance(thing, torch.Tensor) else {}
        if isinstance(thing, torch.nn.Module):
            tensors = thing.state_dict()
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
    mine = this_process()
    if process["host"] != mine["host"] or process == mine or not psutil.pid_exists(process["pid"]):
        return False
    return psutil.Process(process["pid"]).create_time() == process["started"]

@contextlib.contextmanager
def in_one_move(file: Path):
    """A path to write to; when all is written it takes the place of `file`, and where that fails it is removed."""
    part = file.with_name(file.name + ".part")
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


# %% cellView="form" jupyter={"source_hidden": true}
# @title The folder of a run: a new one, or that of an interrupted run
def make_folder(place: Path, model: str) -> Path:
    """A new folder, named by time and model. Raises UserError where none can be made."""
    name = re.sub(r"[^\w.-]+", "-", Path(model).name.removesuffix(".gguf"))
    stem = f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{name}"
    names = (stem + (f"-{number}" if number > 1 else "") for number in range(1, 100))
    try:
        folder = next(path for name in names if not (path := place / name).exists())
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"output_dir is {str(place)!r}, but no folder can be made there ({error.strerror}): choose "
                        "another place.") from None
    return folder

def say_what_others_keep(place: Path, own: Path) -> None:
    """Prints what unfinished runs keep on the disk, but for this one's `own` folder."""
    others = sum(file.stat().st_size for file in place.glob("*.state/**/*") if own not in file.parents)
    if others > 1e8:
        print(f"Unfinished runs keep {others / 1e9:.1f} GB in {place}/*.state, to go on from: remove what you do not "
              "need.")

def new_metrics(settings: Settings, device: torch.device, dtype: torch.dtype) -> dict:
    """The record of a run that has just begun; what its keys mean is in PruningAndFineTuningColab.md."""
    packages = (torch, transformers, datasets, accelerate)
    return {
        "settings": dataclasses.asdict(settings),
        "versions": {"python": platform.python_version()} | {p.__name__: p.__version__ for p in packages},
        "device": describe_device(device), "precision": str(dtype).removeprefix("torch."),
        "perplexity": {}, "parameters": {}, "heads": {}, "size": {}, "samples": {}, "seconds": {},
        "peak_memory_bytes": {}, "process": this_process(), "finished": False,
        "asked": {name: value for name, value in dataclasses.asdict(settings).items() if name != "resume"},
    }

def find_unfinished(resume: str, place: Path, wanted: dict) -> tuple[Path, dict] | None:
    """The folder to go on in, and its record, or None; `wanted` is the record of a new run.

    Raises UserError where `resume` names the folder of another run.
    """
    if resume == "no":
        return None
    named = resume != "auto"
    for file in [Path(resume, "metrics.json")] if named else sorted(place.glob("*/metrics.json"), reverse=True):
        try:
            record = json.loads(file.read_text())
            differing = [name for name in ("asked", "versions", "device", "precision") if record[name] != wanted[name]]
            unfinished = not record["finished"] or file.parent.with_name(file.parent.name + ".state").exists()
            usable = not differing and unfinished and wanted.keys() <= record.keys()
            usable = usable and not is_running(record["process"])
        except (OSError, ValueError, TypeError, KeyError):  # a record of an older version, or none of ours
            usable, differing = False, ["record"]
        if usable:
            return file.parent, record | {name: wanted[name] for name in ("settings", "process")}
        if named:
            reason = f"its {' and '.join(differing)} differ from this run's" if differing else ""
            raise UserError(f"resume is {resume!r}, but {reason or 'it is finished, or still running'}: give the same "
                            "options as then, or start anew with --resume no.")
    return None


# %% cellView="form" jupyter={"source_hidden": true}
# @title The record of a run (1): its folder, its numbers, and how it goes on after an interruption
class Record:
    """A run's folder, its numbers (`metrics` in metrics.json, and `dense_validation`), and what it goes on from."""

    def __init__(self, settings: Settings, device: torch.device, dtype: torch.dtype):
        transformers.set_seed(settings.seed)
        self.device, self.dtype, self.writes, self.dense_validation = device, dtype, rank_and_world()[0] == 0, None
        self.settings, self.metrics = settings, new_metrics(settings, device, dtype)
        if self.writes:
            place = on_drive(settings.output_dir) if settings.save_to_drive else Path(settings.output_dir)
            found = find_unfinished(settings.resume, place, self.metrics)
            self.folder, self.metrics = found or (make_folder(place, settings.model), self.metrics)
            if found:
                print(f"Going on with {self.folder}, which was not finished (--resume no starts anew).")
            say_what_others_keep(place, self.state)
            self.save()
        self.folder, self.metrics = from_all_processes((self.folder, self.metrics) if self.writes else None)[0]
        wider = self.metrics.get("float32_from", "")
        vars(COMPUTING).update(vars(Computing(torch.float32 if wider else dtype, settings.batch_size, {}, wider)))
        self.taken = self.metrics.get("taken")  # heads that were taken in section 10 before an interruption
        if (fitted := self.state / "fitted.json").exists():
            COMPUTING.fitted.update(json.loads(fitted.read_text()))

    @property
    def state(self) -> Path:
        """Where products are kept until the run is finished."""
        return self.folder.with_name(self.folder.name + ".state")

    def load_or_compute(self, name: str, depends: tuple, compute) -> tuple[dict[str, torch.Tensor], dict]:
        """compute(), which returns a dict of tensors and a record (JSON), or what it returned before.

        It is kept in a file named by a fingerprint of all that it depends on, so nothing outdated is ever taken.
        """
        seed = self.metrics["asked"]["seed"]
        file = self.state / f"{name}-{fingerprint(str(self.dtype), seed, *depends)}.safetensors"
        if from_all_processes(file.exists())[0]:
            print(f"[{name}: kept from before]")
            self.reused = True
            with safe_open(file, "pt") as stored:
                return load_file(file), json.loads(stored.metadata()["record"])
        self.metrics["finished"] = False
        tensors, record = compute()
        if self.writes:
            self.state.mkdir(exist_ok=True)
            with in_one_move(file) as part:
                save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, part,
                          {"record": json.dumps(record)})
        return tensors, record

    @saying_disk_trouble()
    def save(self):
        """Writes metrics.json in one move, so that it is never half there."""
        if COMPUTING.wider_from:
            self.metrics["float32_from"] = COMPUTING.wider_from
        if self.writes:
            self.folder.mkdir(exist_ok=True)
            with in_one_move(self.folder / "metrics.json") as part:
                part.write_text(json.dumps(self.metrics, indent=1))


# %% cellView="form" jupyter={"source_hidden": true}
# @title The record of a run (2): steps, pictures, and the zip
class Run(Record):
    """A record with `step` (times what happens in it), `show` (keeps and shows pictures), `finish` (the zip)."""

    @contextlib.contextmanager
    def step(self, name: str):
        """Times a step, notes its memory, and keeps what it recorded in `metrics`, also where the step fails."""
        free_memory()
        start, empty, self.reused = time.perf_counter(), False, False
        try:
            with saying_disk_trouble():
                yield
        except UserError:
            empty = not self.metrics["perplexity"]
            raise
        except RunError:  # perhaps out of memory in one of several processes: the same command begins with what fits
            if rank_and_world()[1] > 1 and COMPUTING.fitted:
                self.state.mkdir(exist_ok=True)
                with in_one_move(self.state / "fitted.json") as part:
                    part.write_text(json.dumps({what: max(size, 1) for what, size in COMPUTING.fitted.items()}))
            raise
        finally:
            peak, seconds, noted = peak_memory(self.device), time.perf_counter() - start, self.metrics["seconds"]
            if not (self.reused and name in noted):  # else what was noted then stays
                self.metrics["peak_memory_bytes"][name], noted[name] = peak, round(seconds, 2)
            if empty:  # a mistake before anything was computed leaves nothing behind
                shutil.rmtree(self.folder, ignore_errors=True)
            else:
                self.save()
            failed = sys.exc_info()[0] is not None and not empty and in_notebook()
            kept = f" What is there is in {self.folder}: run all cells again, and it goes on." if failed else ""
            print(f"[{name}: {seconds:.1f} s, {memory_words(self.device, peak)}]{kept}")

    @saying_disk_trouble()
    def keep(self, figure: Figure, name: str):
        """Keeps a figure as PNG in the run's folder."""
        if self.writes:
            figure.savefig(self.folder / name, dpi=150, bbox_inches="tight")

    def show(self, figure: Figure, name: str, width: int = 760):
        """Keeps a figure, and displays it in a notebook."""
        self.keep(figure, name)
        if self.writes and in_notebook():
            from IPython.display import Image, display

            display(Image(self.folder / name, width=width))
        elif self.writes:
            print(f"picture: {self.folder / name}")

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


# %% cellView="form" jupyter={"source_hidden": true}
# @title Pictures, panels and tables: shown in a notebook, files or plain text elsewhere
def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), facecolor="white", layout="constrained")

def png(figure: Figure, dpi: int = 80) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()

def close_panel(widget) -> None:
    """Closes a widget and all in it; else the notebook's server keeps it, and the models behind its buttons."""
    for part in (*getattr(widget, "children", ()), getattr(widget, "style", None), getattr(widget, "layout", None)):
        if isinstance(part, widgets.Widget):
            close_panel(part)
    widget.close()

SHOWN = globals().get("SHOWN", {})  # name of a picture -> widget, also of an earlier run of this cell

def show_widget(widget, picture: Path) -> None:
    """Displays a widget, and closes an earlier one; where none can be shown (a printed notebook), the picture."""
    from IPython.display import display

    if picture.name in SHOWN:
        close_panel(SHOWN[picture.name])
    SHOWN[picture.name] = widget
    if "google.colab" in sys.modules:
        display(widget)
    else:
        view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
        image, words = base64.b64encode(picture.read_bytes()).decode(), f"this needs a live notebook: see {picture}"
        display({"application/vnd.jupyter.widget-view+json": view, "image/png": image, "text/plain": words}, raw=True)

def show_markdown(text: str) -> None:
    """Rendered in a notebook, as it is in a terminal."""
    if in_notebook():
        from IPython.display import Markdown, display

        display(Markdown(text))
    else:
        print(text)

def ranks(importance: torch.Tensor) -> torch.Tensor:
    """The place of every head in the order of importance, 0 for the least: integers (layers, heads)."""
    return importance.flatten().argsort(stable=True).argsort().view_as(importance)

@contextlib.contextmanager
def hooks(handles):
    """Within it the hooks are in place whose handles an iterable gives; afterwards, or after an error, none is."""
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)  # leaving it removes the hook
        yield


# %% cellView="form" jupyter={"source_hidden": true}
# @title How a run starts: settings, device, folder
def start_settings(more: str) -> Settings:
    """The settings, from the form and `more` in a notebook, from the command line in a script. Raises UserError."""
    if not in_notebook():
        sys.excepthook = stop_without_traceback
        for stream in (sys.stdout, sys.stderr):  # a sign that a console or a file cannot hold must not end a run
            stream.reconfigure(errors="replace")
    silence_all_but_first()
    try:
        words = shlex.split(more) if in_notebook() else sys.argv[1:]
    except ValueError as error:
        raise UserError(f"MORE is {more!r}, but must be options as in a shell ({error}): correct it.") from None
    settings = choose_sources(read_settings(words))
    if settings.max_steps == "auto" and not settings.epochs:
        slow = find_device(settings.device).type == "cpu"
        settings = dataclasses.replace(settings, **({"max_steps": "200"} if slow else {"epochs": 1.0}))
    print("\n".join(f"{name:>22}  {value}" for name, value in dataclasses.asdict(settings).items() if value != ""))
    return settings

def start_run(settings: Settings) -> Run:
    """A run on the fastest device, or the one that the settings name. Raises UserError where that is not there."""
    device = join_processes(find_device(settings.device))
    run = Run(settings, device, find_precision(device, settings.precision))
    print(f"{run.metrics['device']}, computing in {run.metrics['precision']}; results: {run.folder}")
    if device.type == "cpu" and "google.colab" in sys.modules:
        print("This runtime has no GPU or TPU; Runtime → Change runtime type gives you one, and all is much faster.")
    return run


# %% [markdown]
# <a name="3.-Start"></a>
# ## 3. Start
#
# The settings are checked, so that a typo is found now and not after ten minutes of computing. The
# fastest device is found. A folder for the results is made, or, if a run with the same settings was
# interrupted, that run goes on.

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
# Three texts are kept apart: the model is fine-tuned on *train*, heads are scored and progress is
# watched on *validation*, and *test* is used for the reported perplexities only. A text without splits
# of its own is cut into contiguous parts, 80 / 10 / 10. Rows of a dataset are joined by a blank line, as
# SparseGPT and Wanda do, so that perplexities can be compared with published ones.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Chats are written out by the model's own chat template
def load_tokenizer(name: str, trust_remote_code: bool = False, revision: str = ""):
    """A model's tokenizer. Raises UserError where it cannot be had, or knows no tokens."""
    path, options = name, {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    if name.endswith(".gguf"):
        path, options["gguf_file"] = str(Path(name).parent), Path(name).name
    remedy = "check the name and the network, or copy the tokenizer's files into the folder"
    with saying_cannot_be_had(f"the tokenizer of model {name!r}", remedy):
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        if not tokenizer("a b", add_special_tokens=False)["input_ids"]:
            raise OSError("it knows no tokens")
    return tokenizer

@contextlib.contextmanager
def saying_cannot_be_had(what: str, remedy: str):
    """Within it whatever goes wrong becomes a UserError; a broken file fails in every way there is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        remedy = "install that package" if isinstance(error, ImportError) else remedy
        raise UserError(f"{what} cannot be had ({first_sentence(error)}): {remedy}.") from error

ROLES = {"human": "user", "gpt": "assistant"}  # how the turns of `conversations` are called in `messages`

def write_chat(turns: list[dict], tokenizer, name: str, row: int) -> str:
    """One chat as text: turns have role and content, or from and value. Raises UserError where there is no template."""
    if tokenizer is None or not tokenizer.chat_template:
        raise UserError(f"{name!r} holds chats, but the model has no chat template to write them out: take a model "
                        "that has one, or a file with a column 'text'.")
    named = [{"role": turn.get("role") or ROLES.get(turn.get("from"), turn.get("from")),
              "content": turn.get("content", turn.get("value"))} for turn in turns]
    try:
        return tokenizer.apply_chat_template(named, tokenize=False)
    except Exception as error:  # a template is a program of the model's maker, and may refuse anything
        raise UserError(f"the chat in row {row} of {name!r} cannot be written out ({first_sentence(error)}): correct "
                        "it.") from error


# %% cellView="form" jupyter={"source_hidden": true}
# @title Reading text: files of all kinds, hub datasets, Python's own manual
SPLITS = ("train", "validation", "test")

def is_chat(value) -> bool:
    return (isinstance(value, list) and bool(value)
            and all(isinstance(turn, dict) and ({"role", "from"} & turn.keys()) for turn in value))

def join_columns(columns: dict[str, list], name: str, tokenizer=lambda: None) -> str:
    """The text column of a table as one string, rows parted by a blank line; no other column is looked at.

    It is 'text'; else chats (`messages`, `conversations`), which `tokenizer()` writes out; else 'content'; else the
    only column that holds text. Raises UserError where there is none.
    """
    def first(values):
        return next((value for value in values if value is not None), None)

    texts = [key for key, values in columns.items() if isinstance(first(values), str)]
    chats = [key for key, values in columns.items() if is_chat(first(values))]
    liked = [key for key in ("text", *chats, "content") if key in columns]
    column = liked[0] if liked else texts[0] if len(texts) == 1 else None
    if column is None:
        raise UserError(f"{name!r} has the columns {', '.join(columns) or '(none)'}, but one named 'text' is needed: "
                        "rename the column that holds the text.")
    if column != "text":
        print(f"{name}: the text is that of the column {column!r}")
    rows, speaker = [], tokenizer() if column in chats else None
    for number, value in enumerate(columns[column], 1):
        if column in chats and is_chat(value):
            value = write_chat(value, speaker, name, number)
        if not isinstance(value, str | None):
            raise UserError(f"{name!r} has a column {column!r}, but row {number} holds a {type(value).__name__} in it: "
                            "it must hold text.")
        rows.append(value or "")
    return "\n\n".join(rows)

def python_docs() -> str:
    """Python's own reference manual, about half a million characters, from the standard library."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))

def read_dataset(name: str, config: str, tokenizer=lambda: None) -> dict[str, str]:
    """Split -> text of a hub dataset. Raises UserError where it cannot be had or has no train split."""
    try:
        data = datasets.load_dataset(name, config or None)
    except (OSError, ValueError) as error:
        raise UserError(f"dataset {name!r} cannot be had ({first_sentence(error)}): check the name, the configuration "
                        "and the network, or take --train-file or --dataset python-docs.") from None
    if "train" not in data:
        raise UserError(f"dataset {name!r} has the splits {', '.join(data)}, but 'train' is needed.")
    return {split: join_columns({key: data[split][key] for key in data[split].column_names}, name, tokenizer)
            for split in SPLITS if split in data}


# %% cellView="form" jupyter={"source_hidden": true}
# @title Reading one file
def decode(raw: bytes, path: Path) -> str:
    """Bytes as text, without a byte-order mark. Raises UserError for what is no text."""
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not UTF-8 text (byte {error.start}): convert it first.") from None
    if "\0" in text:
        raise UserError(f"{str(path)!r} has a NUL at character {text.index(chr(0))}, so it is no text: convert it "
                        "first.")
    return text

def rows_of(path: Path) -> list[dict] | str:
    """The rows of a table, or the text of a file that is none."""
    kind = kind_of(path)
    text = decode(gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes(), path)
    if kind == ".csv":
        csv.field_size_limit(2**31 - 1)
        return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    if kind not in (".json", ".jsonl"):
        return text
    lines = [(1, text)] if kind == ".json" else [line for line in enumerate(text.split("\n"), 1) if line[1].strip()]
    rows = []
    for number, line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            place = f"line {number}: " if kind == ".jsonl" else ""
            raise UserError(f"{str(path)!r} is no {kind} file ({place}{first_sentence(error)}): correct it.") from None
    if kind == ".json":
        (whole,) = rows
        rows = whole if isinstance(whole, list) else next(
            (part for part in whole.values() if isinstance(part, list) and part and isinstance(part[0], dict)),
            [whole]) if isinstance(whole, dict) else [whole]
    return [row if isinstance(row, dict) else {"text": row} for row in rows]

def read_file(path: str | Path, tokenizer=lambda: None) -> str:
    """The text of a file of KINDS; of a table, its text column. Raises UserError where it has none."""
    path = Path(path)
    try:
        if kind_of(path) == ".parquet":
            table = pyarrow.parquet.read_table(path, partitioning=None)
            columns = {key: table[key].to_pylist() for key, kind in zip(table.column_names, table.schema.types)
                       if key == "text" or not pyarrow.types.is_nested(kind)
                       or pyarrow.types.is_struct(getattr(kind, "value_type", kind))}  # no numbers by the million
        else:
            rows = rows_of(path)
            if isinstance(rows, str):
                return rows
            columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    except (OSError, EOFError, zlib.error, csv.Error, pyarrow.ArrowException) as error:
        raise UserError(f"{str(path)!r} cannot be read ({first_sentence(error)}): check that it is a "
                        f"{''.join(path.suffixes[-2:])} file.") from error
    return join_columns(columns, str(path), tokenizer)


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
        settings.model, settings.trust_remote_code, settings.revision))
    if settings.train_file:
        files = {split: find_files(path) for split in SPLITS if (path := getattr(settings, f"{split}_file"))}
        text = {split: "\n\n".join(read_file(file, tokenizer) for file in those) for split, those in files.items()}
    elif settings.dataset == "python-docs":
        text = {"train": python_docs()}
    else:
        text = read_dataset(settings.dataset, settings.dataset_config, tokenizer)
    missing = [split for split in SPLITS if split not in text]
    for number, split in enumerate(reversed(missing)):
        text["train"], text[split] = cut_tail(text["train"], 0.1 / (1 - 0.1 * number))
    for split in SPLITS:
        if (size := len(text[split].encode())) < settings.block_length:  # no token is shorter than a byte
            raise UserError(f"the {split} text has {size} bytes, but one block of {settings.block_length} tokens is "
                            "needed: take a longer text or a smaller --block-length.")
    return {split: text[split] for split in SPLITS}


# %%
if __name__ == "__main__":
    with run.step("text"):
        text = load_text(settings)
    print(settings.train_file or settings.dataset, {split: f"{len(text[split]):,} characters" for split in SPLITS})
    print(textwrap.indent(textwrap.fill(text["validation"][:300], 100), "  | "))

# %% [markdown]
# <a name="5.-Model"></a>
# ## 5. Model
#
# Any causal language model: a hub id, a local folder, or a `.gguf` file. Where there is neither network
# nor file, a GPT-2 of about a million parameters is trained here, in a minute or two. It is a toy, but
# a trained one: its heads differ, and closing the wrong ones hurts.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Folders that hold something else, and what a model's configuration says
def refuse_other_folders(name: str) -> None:
    """Raises UserError for the folder of an adapter or of a training's checkpoints, and for a pruned .gguf file."""
    folder = Path(name)
    if name.endswith(".gguf") and folder.is_file():
        with saying_cannot_be_had(f"model {name!r}", "download it again"):
            kind = gguf.GGUFReader(name).fields["general.architecture"].contents()
        if kind in ("deci", "openelm"):
            raise UserError(f"model {name!r} has layers that differ, which only llama.cpp reads: take the folder "
                            "model-compact or model-zeroed of the same run, or the model that it was made from.")
    if (folder / "adapter_config.json").is_file():
        with saying_cannot_be_had(f"model {name!r}", "write adapter_config.json again"):
            base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        raise UserError(f"model {name!r} is a LoRA adapter of {base!r}: merge the two first (peft: merge_and_unload, "
                        "save_pretrained), and take the folder of the whole model.")
    numbers = {int(path.name.split("-")[-1]): path for path in folder.glob("checkpoint-*")
               if path.name.split("-")[-1].isdecimal()}
    if numbers and not (folder / "config.json").exists():
        raise UserError(f"model {name!r} is the output folder of a training: take its newest checkpoint, "
                        f"{str(numbers[max(numbers)])!r}.")

def open_config(name: str, trust_remote_code: bool, revision: str):
    """A model's configuration. Raises UserError for one whose weights cannot be cut."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision)
    origin, kind = "take the model that it was made from", (config.architectures or [""])[0]
    if hasattr(config, "kept_heads"):
        raise UserError(f"model {name!r} is compact, its heads are cut out already: {origin}.")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"model {name!r} is quantised, and such weights can be neither cut nor trained: {origin}.")
    if not trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        if not hasattr(transformers, kind):
            raise UserError(f"model {name!r} is a {kind}, which only the code knows that it brings along: read that "
                            "code, and give --trust-remote-code.")
        print(f"{name} brings code of its own, which is not run: it is opened as transformers' own {kind}.")
    config._attn_implementation = None  # the one that is there here, not the one that it was trained with
    return config

def opener_for(config):
    """The class that opens a configuration's model: for causal language models, else for those that read images."""
    kind, (causal, images) = type(config), (AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    return images if kind not in causal._model_mapping and kind in images._model_mapping else causal

def weights_on_disk(name: str, revision: str = "") -> int | None:
    """Bytes of the files that a model's weights came in, or None where they cannot be seen."""
    if Path(name).is_file():
        return Path(name).stat().st_size
    config = transformers.utils.cached_file(name, "config.json", revision=revision or "main", local_files_only=True,
                                            _raise_exceptions_for_missing_entries=False)
    kinds = ("*.safetensors", "pytorch_model*.bin") if config else ()
    files = [sorted(Path(config).parent.glob(kind)) for kind in kinds]
    return sum(file.stat().st_size for file in next(filter(None, files), [])) or None


# %% cellView="form" jupyter={"source_hidden": true}
# @title Opening a model, or saying in one sentence why it cannot be used
def load_model(name: str, device: torch.device, trust_remote_code: bool = False, revision: str = ""):
    """Tokenizer and model in evaluation mode. Raises UserError where the model cannot be had or used.

    It computes with float32 weights, whatever they came in; `model.came_in` is the format that they came in.
    """
    path, is_gguf, named = name, name.endswith(".gguf"), f"model {name!r}" + (f" at {revision!r}" if revision else "")
    options = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    refuse_other_folders(name)
    remedy = ("it must be a causal language model on the hub (with a network), a local folder, a .gguf file, or 'demo'"
              + ("" if trust_remote_code else "; one with code of its own needs --trust-remote-code"))
    with saying_cannot_be_had(named, remedy):
        if is_gguf and not Path(name).is_file():
            raise OSError("no such file")
        config = None if is_gguf else open_config(name, **options)
        came_in = torch.bfloat16 if is_gguf else getattr(config.get_text_config(), "dtype", None) or torch.float32
    tokenizer = load_tokenizer(name, trust_remote_code, revision)
    with saying_cannot_be_had(named, remedy):
        if is_gguf:
            path, options["gguf_file"] = str(Path(name).parent), Path(name).name
        else:
            options["config"] = config
        model, found = opener_for(config).from_pretrained(path, **options, dtype=torch.float32,
                                                          output_loading_info=True)
    if lacking := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        raise UserError(f"model {name!r} lacks {len(lacking)} of its weights ({lacking[0]} first), which would be "
                        "random: download it again.")
    broken = next((path for path, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if broken:
        raise UserError(f"model {name!r} has numbers that are not finite in {broken}: download it again, or take "
                        "another one.")
    if is_gguf:  # the weights are plain float32 now, but save_pretrained would refuse the model as quantised
        model.hf_quantizer, model.is_quantized = None, False
        model.config.__dict__.pop("quantization_config", None)
    model.came_in = came_in
    model = move(model, device).eval()
    if not is_causal(model):
        raise UserError(f"model {name!r} is a {type(model).__name__} whose tokens see those after them: take a causal "
                        "language model.")
    return tokenizer, model

@torch.no_grad()
def is_causal(model) -> bool:
    """True where no token's prediction depends on a later token."""
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    other = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)  # another last token
    first, second = (model(tokens, use_cache=False).logits[:, :-1].float() for tokens in (ids, other))
    return torch.allclose(first, second, rtol=1e-3, atol=1e-3 * first.abs().max().item())


# %% cellView="form" jupyter={"source_hidden": true}
# @title The demo's recipe: byte-level BPE of 1,024 tokens, 4 layers of 8 heads, 128 numbers wide
ADAMW = "adamw_torch" if is_torch_xla_available() else "adamw_torch_fused"  # XLA fuses it by itself

def demo_tokenizer(text: str):
    """A byte-level BPE tokenizer of 1,024 tokens."""
    bpe, end = tokenizers.Tokenizer(tokenizers.models.BPE()), "<|endoftext|>"
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(text.splitlines(keepends=True), tokenizers.trainers.BpeTrainer(
        vocab_size=1024, special_tokens=[end], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, bos_token=end)

def make_demo(text: str, steps: int = 600) -> str:
    """Trains the demo model, once; the folder that holds it. Raises UserError in one of several processes."""
    # No dropout: on a processor it makes attention several times slower.
    config = transformers.GPT2Config(vocab_size=1024, n_positions=512, n_embd=128, n_layer=4, n_head=8, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    key = hashlib.sha256(f"{text}{config.to_json_string()}{steps}".encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "PruningAndFineTuningColab")
    if (folder := cache / f"demo-{key}").exists():
        return str(folder)
    if rank_and_world()[1] > 1:
        raise UserError("model is 'demo', which several processes cannot train together: run it once without torchrun, "
                        "or take another model.")
    print("Training the demo model, once: a minute or two.")
    tokenizer = demo_tokenizer(text)
    transformers.set_seed(0)
    model, blocks = transformers.GPT2LMHeadModel(config), pack(text, tokenizer, 128)
    part = folder.with_name(f"{folder.name}.{os.getpid()}")
    arguments = TrainingArguments(str(part), max_steps=steps, per_device_train_batch_size=16, learning_rate=3e-3,
                                  warmup_steps=steps // 10, lr_scheduler_type="cosine", seed=0, report_to="none",
                                  optim=ADAMW, save_strategy="no", logging_strategy="no", use_cpu=True,
                                  dataloader_pin_memory=False)
    Trainer(model, arguments, train_dataset=[{"input_ids": block, "labels": block} for block in blocks]).train()
    model.config.use_cache = True  # which the Trainer switched off
    move(model, "cpu").save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)
    return str(folder)


# %% cellView="form" jupyter={"source_hidden": true}
# @title A long text is tokenised in pieces: a tokenizer needs some 250 bytes for every token that it makes at once
def in_pieces(text: str, ids_of, size: int = 1_000_000):
    """The text in pieces of about `size` characters, whose ids (n,) are together those of the whole text.

    It is cut before a space or a line break where the tokenizer gives the same ids with the cut as without it; one
    that never does, because it begins every text with a space of its own, gets the whole text.
    """
    start = 0
    while len(text) - start > 1.5 * size:
        near = (start + size + place.start() for place in re.finditer(r"(?<=\S)\s", text[start + size:][:20_000]))
        for cut in near:
            before, after = text[max(start, cut - 200): cut], text[cut: cut + 200]
            if torch.equal(torch.cat([ids_of(before), ids_of(after)]), ids_of(before + after)):
                break
        else:
            break
        yield text[start: cut]
        start = cut
    yield text[start:]


# %% [markdown]
# The model reads tokens, not letters. They are packed into full blocks: no padding, so nothing is wasted
# and no loss is counted on it.

# %%
def pack(text: str, tokenizer, block_length: int) -> torch.Tensor:
    """Token ids (blocks, block_length): the whole text, in order, but for a tail shorter than one block."""
    def ids_of(part):
        return torch.tensor(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)

    ids = torch.cat([ids_of(piece) for piece in in_pieces(text, ids_of)])
    return ids[: len(ids) // block_length * block_length].view(-1, block_length)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Do text, tokenizer and model fit together?
def longest_text(model) -> int | None:
    """The most tokens that a model can read at once, or None where its configuration names no limit."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx", "context_length")
    config = model.config.get_text_config()
    return next((getattr(config, name) for name in names if getattr(config, name, None)), None)

def pack_all(text: dict[str, str], tokenizer, model, settings: Settings) -> dict[str, torch.Tensor]:
    """Split -> token ids (blocks, block_length). Raises UserError where text, tokenizer, model or prompt do not fit."""
    longest, new_tokens = longest_text(model) or settings.block_length + 40, 40
    if settings.block_length > longest:
        raise UserError(f"block_length is {settings.block_length}, but the model reads at most {longest} tokens: take "
                        f"--block-length {longest} or less.")
    prompt = len(tokenizer(settings.prompt)["input_ids"])
    if not 1 <= prompt <= longest - new_tokens:
        raise UserError(f"prompt has {prompt} tokens, but must have 1 to {longest - new_tokens}: write a "
                        f"{'shorter' if prompt else 'longer'} one.")
    if settings.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(f"gradient_checkpointing is on, but {type(model).__name__} does not have it: leave it off.")
    blocks = {split: pack(part, tokenizer, settings.block_length) for split, part in text.items()}
    vocabulary = model.get_input_embeddings().num_embeddings
    for split, packed in blocks.items():
        if not len(packed):
            raise UserError(f"the {split} text has fewer than {settings.block_length} tokens, but one block is needed: "
                            "take a longer text or a smaller --block-length.")
        if packed.max() >= vocabulary:
            raise UserError(f"the tokenizer of model {settings.model!r} has a token {packed.max()}, but the model "
                            f"knows only {vocabulary}: they do not belong together.")
    return blocks


# %% cellView="form" jupyter={"source_hidden": true}
# @title The number format of the saved weights: that of the weights as they came, or the one that was chosen
def describe_model(model, settings: Settings) -> dict:
    """What the record says of a model that was just loaded; the model is told the format that it will be saved in."""
    formats = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    saved = formats.get(settings.save_format, model.came_in if model.came_in in formats.values() else torch.float32)
    model.saved_in = saved
    return {"class": type(model).__name__, "parameters": model.num_parameters(),
            "came_in": str(model.came_in).removeprefix("torch."), "saved_in": str(saved).removeprefix("torch."),
            "file_bytes": None if settings.model == "demo" else weights_on_disk(settings.model, settings.revision)}

def saved_format(run: Run) -> torch.dtype:
    return getattr(torch, run.metrics["model"]["saved_in"])

@torch.no_grad()
def rounded(model, dtype: torch.dtype):
    """The model with its weights rounded to a number format, in float32. Raises RunError where they do not fit."""
    for name, weight in model.named_parameters():
        weight.copy_(weight.to(dtype))
        if not weight.isfinite().all():
            raise RunError(f"{name} does not fit into {dtype}: take --save-format bf16 or fp32.")
    return model


# %%
if __name__ == "__main__":
    with run.step("load model"):
        tokenizer, model = load_model(make_demo(text["train"]) if settings.model == "demo" else settings.model,
                                      run.device, settings.trust_remote_code, settings.revision)
        blocks = pack_all(text, tokenizer, model, settings)
    test_blocks = blocks["test"][: settings.eval_blocks or None]
    run.metrics["blocks"] = {split: len(blocks[split]) for split in SPLITS} | {"tested": len(test_blocks)}
    run.metrics["model"] = describe_model(model, settings)
    print(f"{settings.model}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters, came in "
          f"{run.metrics['model']['came_in']}, will be saved in {run.metrics['model']['saved_in']}")
    print(f"blocks of {settings.block_length} tokens: {run.metrics['blocks']}")

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


# %%
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
    """The gates of a model, (layers, units), on the processor."""
    return torch.stack([torch.cat([units.projection.gates.detach().float().cpu() for units in layer])
                        for layer in find_units(model)])


# %% cellView="form" jupyter={"source_hidden": true}
# @title Gates for a while: all open, or none at all
def sharing_copy(model):
    """A copy of a gated model that shares its weights and has gates of its own."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})

def remove_gates(model) -> None:
    """Takes all gates away: the model is again as the library made it."""
    for units in all_units(model):
        if hasattr(units.projection, "gates"):
            units.projection.gate_hook.remove()
            del units.projection.gates, units.projection.gate_hook

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

@contextlib.contextmanager
def without_gates(model):
    """Within it the model has no gates at all, not even open ones: for timing it as it came."""
    before = get_gates(model)
    remove_gates(model)
    try:
        yield
    finally:
        set_gates(model, before)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Gates that gradients flow to, with frozen weights
@contextlib.contextmanager
def frozen(model):
    """Within it no parameter asks for a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)

@contextlib.contextmanager
def movable_gates(model):
    """Within it weights are frozen; `substitute(rows)` puts tensors in the place of the gates, one for each layer."""
    add_gates(model)
    layers = find_units(model)
    before = [(units.projection, units.projection.gates) for layer in layers for units in layer]

    def substitute(rows):  # each (..., units)
        for layer, row in zip(layers, rows, strict=True):
            for units, part in zip(layer, row.split([units.number for units in layer], dim=-1)):
                units.projection.gates = part

    with frozen(model):
        try:
            yield substitute
        finally:
            for projection, gates in before:
                projection.gates = gates


# %% [markdown]
# A closed gate still costs what an open one costs: what it multiplies by zero has been computed all the
# same. To make the model smaller, a closed head is **cut** out: its rows of the query, key and value
# projections go, and its columns of the output projection. Where several query heads share a key/value
# head, that one goes when the last query head that reads it is gone. What is left is the same function
# with fewer numbers.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Which rows of the query, key and value projections belong to a head
def find_rows(attention, heads: int, head_dim: int) -> list[tuple[str, torch.Tensor]]:
    """For query, key and value: the projection that computes it, and its outputs that each head owns, (n, size).

    Models keep these weights as three matrices, as one with queries, keys and values one after the other (GPT-2,
    Phi-3, MPT), or as one in which every group of heads has its queries, key and value together (GPT-NeoX, BLOOM,
    Falcon). Raises ValueError for an attention module that keeps them in another way.
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

def norm_over_heads(attention, name: str):
    """The norm that computes one mean over all heads of a query or key projection (OLMo 2), or None."""
    norm = getattr(attention, name.replace("_proj", "_norm"), None)
    weight = getattr(norm, "weight", None)
    whole = weight is not None and weight.numel() == inputs_first(getattr(attention, name)).shape[1]
    return norm if whole and weight.dim() == 1 else None

def head_parameters(attention, heads: int, shared: int, head_dim: int):
    """Parameters beside the projections that have a row for each of `heads`, or of `shared` key/value heads."""
    for path, parameter in attention.named_parameters():
        of_attention = "." not in path and parameter.dim() == 1  # the sinks of GPT-OSS
        of_norm = "norm" in path and parameter.dim() == 2 and parameter.shape[1] == head_dim  # the norms of Cohere
        if (of_attention or of_norm) and parameter.shape[0] in (heads, shared):
            yield path, parameter, parameter.shape[0] == heads


# %%
def slice_projection(projection, rows: torch.Tensor, inputs: bool = False) -> None:
    """Keeps only these outputs, or inputs, of a Linear or Conv1D, in this order; rows are (n,)."""
    is_conv = isinstance(projection, Conv1D)  # its weight is (inputs, outputs), that of a Linear (outputs, inputs)
    weight, bias = projection.weight, projection.bias
    rows = rows.to(weight.device)
    sliced = weight.detach().index_select(int(is_conv != inputs), rows)
    projection.weight = torch.nn.Parameter(sliced, weight.requires_grad)
    if bias is not None and not inputs:
        projection.bias = torch.nn.Parameter(bias.detach()[rows], bias.requires_grad)
    for name, size in zip(("nx", "nf") if is_conv else ("out_features", "in_features"), projection.weight.shape):
        setattr(projection, name, size)

def cut_attention(attention, output: str, kept: list[int], heads: int):
    """The attention module of `heads` heads with only those in `kept`, cut in place; `output`: its last projection."""
    if not kept:
        return NoHeads(attention, output)
    projection = getattr(attention, output)
    columns = torch.arange(inputs_first(projection).shape[0], device="cpu").view(heads, -1)  # (heads, head_dim)
    parts = find_rows(attention, heads, columns.shape[1])
    sharing = heads // len(parts[1][1])  # query heads that read the same key/value head
    kept_shared = sorted({head // sharing for head in kept})
    rows = {}
    for (name, table), wanted in zip(parts, (kept, kept_shared, kept_shared)):
        if (norm := norm_over_heads(attention, name)) is None:
            rows.setdefault(name, []).append(table[wanted].flatten())
        else:  # it needs all heads; those that stay are taken after it
            norm.order, norm.size = wanted, table.shape[1]
            norm.register_forward_hook(in_order)
    for name, numbers in rows.items():
        slice_projection(getattr(attention, name), torch.cat(numbers).sort().values)
    slice_projection(projection, columns[kept].flatten(), inputs=True)
    for path, parameter, of_queries in head_parameters(attention, heads, len(parts[1][1]), columns.shape[1]):
        owner, _, name = path.rpartition(".")
        part = parameter.detach()[kept if of_queries else kept_shared]
        setattr(attention.get_submodule(owner), name, torch.nn.Parameter(part, parameter.requires_grad))
    tell_attention(attention, kept, heads, parts)
    return attention

def cut_neurons(model, kept_neurons: dict[str, list[int]]) -> None:
    """Cuts a model in place. `kept_neurons`: path of an MLP's output projection -> the neurons that stay."""
    for path, kept in kept_neurons.items():
        parent, _, output = path.rpartition(".")
        parts, rows = dict(model.get_submodule(parent).named_children()), torch.tensor(list(kept), device="cpu")
        number = inputs_first(parts[output]).shape[0]
        for name, part in parts.items():  # one projection, or gate and up, or both of them in one
            if name != output and isinstance(part, (torch.nn.Linear, Conv1D)):
                outputs = inputs_first(part).shape[1]
                if outputs in (number, 2 * number):
                    slice_projection(part, torch.cat([rows + number * i for i in range(outputs // number)]))
        slice_projection(parts[output], rows, inputs=True)

def cut_heads(model, kept_heads: dict[str, list[int]]) -> None:
    """Cuts a model in place. `kept_heads`: path of an attention output projection -> the heads that stay."""
    heads = model.config.get_text_config().num_attention_heads
    for path, kept in kept_heads.items():
        parent, _, output = path.rpartition(".")
        model.set_submodule(parent, cut_attention(model.get_submodule(parent), output, kept, heads))


# %% cellView="form" jupyter={"source_hidden": true}
# @title What the attention has to be told: how many heads it has, and which of them read the same key
def tell_attention(attention, kept: list[int], heads: int, parts: list) -> None:
    """Sets what a cut attention module knows of its heads; `parts` are what find_rows() said of it before."""
    (fused, query), (name, key), (_, value) = parts
    sharing, size = heads // len(key), key.shape[1]
    kept_shared = sorted({head // sharing for head in kept})
    readers = [sum(head // sharing == shared for head in kept) for shared in kept_shared]
    group, shared = readers[0], len(kept_shared)
    if len(set(readers)) > 1 and fused == "query_key_value":  # every query gets a key and a value of its own
        blocks = [part[:, 0] // size for part in (query, key, value)]  # where each stood, counted in heads
        stay = sorted({int(block) for part, wanted in zip(blocks, (kept, kept_shared, kept_shared))
                       for block in part[wanted]})
        projection, group, shared = getattr(attention, fused), 1, len(kept)
        projection.size, projection.order = size, [stay.index(int(block)) for head in kept for block in (
            blocks[0][head], blocks[1][head // sharing], blocks[2][head // sharing])]
        projection.register_forward_hook(in_order)
    elif len(set(readers)) > 1:
        attention.queries_per_key, group = readers, 1
        attention.register_forward_pre_hook(repeat_keys, with_kwargs=True)
    if {"alibi", "position_bias"} & set(inspect.signature(attention.forward).parameters):
        attention.kept_of = (kept, heads)
        attention.register_forward_pre_hook(pick_bias, with_kwargs=True)
    numbers = {len(kept): ("num_heads", "num_attention_heads", "n_heads", "n_head"),
               len(kept) * size: ("split_size", "embed_dim", "hidden_size")}
    numbers = [*numbers.items(), (shared, ("num_key_value_heads", "num_kv_heads", "kv_heads")),
               (group, ("num_key_value_groups",)), (shared * size, ("kv_dim",))]
    for number, names in numbers:
        for name in names:
            if hasattr(attention, name):
                setattr(attention, name, number)
    if hasattr(attention, "config"):
        attention.config = LayerConfig(attention.config, len(kept))


# %% cellView="form" jupyter={"source_hidden": true}
# @title Hooks with which an attention module reads its heads in another order, or one key for several queries
def in_order(module, args, output):
    """Forward hook: the parts of an output (batch, time, width) that `order` names, each `size` wide."""
    return output.unflatten(-1, (-1, module.size))[..., module.order, :].flatten(-2)

def pick_bias(attention, args, kwargs):
    """Forward pre-hook: of biases that have a row for every head (ALiBi), those of the heads that stay."""
    kept, heads = attention.kept_of

    def pick(bias):  # (batch, heads, time, time), (batch x heads, time, time), or for all heads alike
        if not isinstance(bias, torch.Tensor) or bias.dim() == 4:
            return bias[:, kept] if isinstance(bias, torch.Tensor) and bias.shape[1] == heads else bias
        return bias.unflatten(0, (-1, heads))[:, kept].flatten(0, 1)

    names = {"alibi", "position_bias", "attention_mask"} & set(kwargs)
    return args, kwargs | {name: pick(kwargs[name]) for name in names}

def find_cache(arguments: dict):
    """(name, KV cache) among an attention module's arguments; the name depends on family and version."""
    names = (name for name in ("past_key_values", "layer_past", "cache") if name in arguments)
    return next(((name, arguments[name]) for name in names), ("", None))

def repeat_keys(attention, args, kwargs):
    """Forward pre-hook: the cache holds few key/value heads, but hands out one for each query head that reads it."""
    name, cache = find_cache(kwargs)

    def repeat(states):  # (batch, key/value heads, time, head_dim)
        copies = [states[:, i, None].expand(-1, n, -1, -1) for i, n in enumerate(attention.queries_per_key)]
        return torch.cat(copies, dim=1)

    def update(keys, values, *position, **options):
        if cache is not None:
            keys, values = cache.update(keys, values, *position, **options)
        return repeat(keys), repeat(values)

    return args, kwargs | {name: SimpleNamespace(update=update)}


# %% cellView="form" jupyter={"source_hidden": true}
# @title What transformers does not expect: a layer without heads, and a number of heads for each layer
class NoHeads(torch.nn.Module):
    """The attention of a layer that has lost all its heads: what remains is the output projection's bias."""

    def __init__(self, attention, output: str):
        super().__init__()
        self.layer_idx, self.names = attention.layer_idx, list(inspect.signature(attention.forward).parameters)
        dropout = getattr(attention, "resid_dropout", None)
        self.dropout = dropout if isinstance(dropout, torch.nn.Module) else torch.nn.Identity()
        self.register_parameter("output_bias", getattr(attention, output).bias)

    def forward(self, *args, **kwargs):
        arguments = dict(zip(self.names, args)) | kwargs
        hidden, (_, cache) = arguments[self.names[0]], find_cache(arguments)
        if cache is not None:  # it knows how many tokens it has seen by what its layers hold: here one number each
            token = hidden.new_zeros(len(hidden), 1, hidden.shape[1], 1)
            cache.update(token, token, self.layer_idx)
        written = torch.zeros_like(hidden) if self.output_bias is None else torch.zeros_like(hidden) + self.output_bias
        return self.dropout(written) + arguments.get("residual", 0), None  # BLOOM's attention adds the stream itself

class LayerConfig:
    """The model's config as one layer sees it: with the number of heads that this layer has left."""

    def __init__(self, config, heads: int):
        self.config, self.num_attention_heads = config, heads

    def __getattr__(self, name):
        if name == "config":  # asked for while a copy is made, when nothing is there yet
            raise AttributeError(name)
        return getattr(self.config, name)


# %% [markdown]
# To compact a model is to cut out all heads whose gates are closed, and to multiply the other gates into
# the weights.

# %%
@torch.no_grad()
def cut_closed(model):
    """The gated model without gates and without the units that they close; its config lists what stays.

    `kept_heads` has the heads of each layer, `kept_neurons` their number; which neurons is in `model.neurons_kept`.
    """
    kept, values = {"heads": {}, "neurons": {}}, {}
    for units in all_units(model):
        gates = values[units.path] = units.projection.gates.cpu()
        needed = units.kind == "neurons" or getattr(model, "needs_heads", False)  # one stays, and writes zeros
        kept[units.kind][units.path] = gates.nonzero().flatten().tolist() or [0] * needed
    remove_gates(model)
    cut_heads(model, kept["heads"])
    cut_neurons(model, kept["neurons"])
    for path, stay in (kept["heads"] | kept["neurons"]).items():
        if stay:  # a gate that was trained may be any number
            weight = inputs_first(model.get_submodule(path))
            weight.mul_(values[path][stay].to(weight).repeat_interleave(len(weight) // len(stay))[:, None])
    model.config.kept_heads, model.neurons_kept = kept["heads"], kept["neurons"]
    if kept["neurons"]:
        model.config.kept_neurons = {path: len(stay) for path, stay in kept["neurons"].items()}
    return model

def compact(model):
    """A copy of a gated model without the heads that its gates close. Raises UserError where they cannot be cut out."""
    if not can_compact(model):
        raise UserError(f"the heads of {type(model).__name__} cannot be cut out ({why_not_compact(model)}): keep its "
                        "gates.")
    return cut_closed(copy.deepcopy(model))

# %% [markdown]
# Does it work for this model? That is not looked up in a list of models: it is tried. Some heads are
# closed at random, and cut out of a copy that shares all other weights. It has to give the same logits as
# the gated model, read in one go and written token by token from a key/value cache, also where texts of
# different length are padded. Where it does not, the model keeps its gates: it is pruned, not smaller.

# %% cellView="form" jupyter={"source_hidden": true}
# @title The proof that heads can be cut out
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
    output = model.eval().generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False,
                                   pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    return torch.stack(output.logits).float()

def try_cutting(model, gates: torch.Tensor) -> str:
    """What goes wrong where heads are cut out that gates (layers, heads) close; "" where nothing does."""
    gated = sharing_copy(model)
    set_gates(gated, gates)
    ids = (torch.arange(24).view(2, 12) * 7) % model.get_input_embeddings().num_embeddings
    wanted = written_logits(gated)
    try:
        small = cut_closed(sharing_copy(gated))
        difference = max(largest_difference(gated, small, ids),
                         ((written_logits(small) - wanted).abs().max() / wanted.abs().max()).item())
    except Exception as error:  # code that was written for whole layers breaks in many ways; the sentence says how
        return f"cut, it fails: {first_sentence(error)}"
    return "" if difference < 1e-3 else f"cut, its logits differ by {difference:.0e} of the largest"

def why_not_compact(model) -> str:
    """Why the heads of a gated model cannot be cut out, or "" where they can; tried once, and then known."""
    prunes = getattr(model, "prunes", "heads")
    if getattr(model, "tried", "") != prunes:
        plain = move(copy.deepcopy(model), "cpu") if model.device.type == "xla" else model
        layers, heads = find_units(model), number_of_heads(model)
        number = sum(units.number for units in layers[0])
        gates = torch.rand(len(layers), number, generator=torch.Generator().manual_seed(0)).gt(0.5).float()
        gates[:, 0], gates[:, 1:2], gates[0, heads - 1] = 1, 0, 0.5
        model.tried, model.not_compact, model.needs_heads = prunes, "its class brings its own code", False
        if type(model).__module__.startswith("transformers.models."):
            model.not_compact = try_cutting(plain, gates)
        gates[-1, :heads] = 0
        model.needs_heads = not model.not_compact and heads > 0 and bool(try_cutting(plain, gates))
    return model.not_compact

def can_compact(model) -> bool:
    return not why_not_compact(model)


# %% [markdown]
# llama.cpp, and Ollama and LM Studio with it, reads **GGUF** files. One of its architectures, `deci`, is Llama
# with other numbers of heads and neurons in every layer, so it has a place for what is left here. Whether a
# model fits into it is tried, too, where `SAVE_MODEL` asks for `gguf`: its weights, arranged as they will be
# written, have to give the same logits by llama.cpp's formulas.

# %% cellView="form" jupyter={"source_hidden": true}
# @title What llama.cpp computes: the formulas of its architectures whose layers may differ
@torch.no_grad()
def llama_cpp_logits(tensors: dict[str, torch.Tensor], numbers: dict, ids: torch.Tensor) -> torch.Tensor:
    """Logits (time, vocabulary) of ids (time,), as llama.cpp computes them from what is written to a file.

    Its `deci` is Llama; `openelm` normalises queries and keys, has them in one matrix, and no output matrix.
    """
    size, positions = numbers["head_dim"], torch.arange(len(ids)).double()
    frequencies = numbers["base"] ** -(torch.arange(0, size, 2).double() / size)
    angles = positions[:, None] * frequencies / tensors.get("rope_freqs.weight", torch.ones(())).double()
    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    def norm(x, name):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], tensors[f"{name}.weight"].float(), numbers["epsilon"])

    def linear(x, name):
        bias = tensors.get(f"{name}.bias")
        return torch.nn.functional.linear(x, tensors[f"{name}.weight"].float(), None if bias is None else bias.float())

    def rotated(x, name):  # (heads, time, size): neighbours are turned together; openelm: halves, which stay so here
        if f"{name}.weight" in tensors:
            x = norm(x, name).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)

    x = tensors["token_embd.weight"][ids].float()
    for layer, (heads, shared) in enumerate(zip(numbers["heads"], numbers["key_value_heads"])):
        name = f"blk.{layer}"
        if heads:
            inner, names = norm(x, f"{name}.attn_norm"), [f"{name}.attn_{part}" for part in ("q", "k", "v", "qkv")]
            parts = torch.cat([linear(inner, part) for part in names if f"{part}.weight" in tensors], dim=-1)
            parts = parts.split([heads * size, shared * size, shared * size], dim=-1)
            queries, *others = (part.unflatten(-1, (-1, size)).transpose(0, 1) for part in parts)
            keys, values = (part.repeat_interleave(heads // shared, 0) for part in others)
            queries, keys = rotated(queries, f"{name}.attn_q_norm"), rotated(keys, f"{name}.attn_k_norm")
            read = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
            x = x + linear(read.transpose(0, 1).flatten(1), f"{name}.attn_output")
        inner = norm(x, f"{name}.ffn_norm")
        gate = torch.nn.functional.silu(linear(inner, f"{name}.ffn_gate"))
        x = x + linear(gate * linear(inner, f"{name}.ffn_up"), f"{name}.ffn_down")
    return linear(norm(x, "output_norm"), "output" if "output.weight" in tensors else "token_embd")


# %% cellView="form" jupyter={"source_hidden": true}
# @title Heads in groups, and in the order that llama.cpp rotates them
def plan_groups(readers: list[int]) -> tuple[list[int], list[int]]:
    """Query heads and key/value heads to write, by number, -1 being one of zeros; `readers` of each key/value head.

    llama.cpp wants equally many query heads for every key/value head. One that has more is written several times, and
    where a group lacks some, they are heads of zeros; the size of the groups is the one that needs fewest heads.
    """
    # Where two sizes need as many, the larger one has the smaller KV cache.
    size = min(range(1, max(readers) + 1), key=lambda g: (sum(math.ceil(n / g) for n in readers) * (g + 1), -g))
    queries, shared, first = [], [], 0
    for number, count in enumerate(readers):
        for start in range(0, count, size):
            part = range(first + start, first + min(start + size, count))
            queries += [*part, *[-1] * (size - len(part))]
            shared.append(number)
        first += count
    return queries, shared

def pick_heads(weight: torch.Tensor, heads: list[int], size: int, turned: bool = False) -> torch.Tensor:
    """Rows of a weight or bias (heads x size, ...) by head, -1 being zeros.

    `turned` heads are rotated by position: transformers pairs the halves of a head, llama.cpp neighbours.
    """
    rows = weight.unflatten(0, (-1, size))
    rows = torch.cat([rows, torch.zeros_like(rows[:1])])[heads]
    if turned:
        rows = rows.unflatten(1, (2, size // 2)).transpose(1, 2).flatten(1, 2)
    return rows.flatten(0, 1)


# %% cellView="form" jupyter={"source_hidden": true}
# @title An attention module in the words of llama.cpp
def fuse(parts: dict, attention, size: int) -> dict:
    """Weights of an attention module as `openelm` has them: one matrix, with norms of queries and keys."""
    parts["qkv.weight"] = torch.cat([parts.pop(f"{name}.weight") for name in "qkv"])
    norms = {name: getattr(attention, name, None) for name in ("q_norm", "k_norm")}
    return parts | {f"{name}.weight": norm.weight if norm else torch.ones(size) for name, norm in norms.items()}

def attention_for_llama_cpp(attention, size: int, width: int, first: bool, normed: bool) -> tuple[dict, int, int]:
    """({name: weight or bias}, heads, key/value heads) of a cut attention module; heads are `size` wide.

    `normed` says that queries and keys are normalised in this model.
    """
    if isinstance(attention, NoHeads):
        if not first and attention.output_bias is None and not normed:
            return {}, 0, 0
        # llama.cpp finds the size of heads in the first layer, and wants a head where there is a bias: one of zeros.
        zeros = torch.zeros(size, width)
        parts = {"q.weight": zeros, "k.weight": zeros, "v.weight": zeros, "output.weight": zeros.T}
        parts |= {"output.bias": attention.output_bias}
        return fuse(parts, attention, size) if normed else parts, 1, 1
    output, parts = attention.o_proj, {}
    inputs = [part for part in attention.children() if isinstance(part, torch.nn.Linear) and part is not output]
    heads = output.in_features // size
    shared = (sum(part.out_features for part in inputs) // size - heads) // 2
    queries, keys = plan_groups(getattr(attention, "queries_per_key", [heads // shared] * shared))
    for kind in ("weight", "bias"):
        if getattr(inputs[0], kind) is not None:
            rows = torch.cat([getattr(part, kind) for part in inputs])
            rows = rows.split([heads * size, shared * size, shared * size])
            for name, part, wanted in zip("qkv", rows, (queries, keys, keys)):
                parts[f"{name}.{kind}"] = pick_heads(part, wanted, size, turned=name != "v" and not normed)
    parts |= {"output.weight": pick_heads(output.weight.T, queries, size).T, "output.bias": output.bias}
    return fuse(parts, attention, size) if normed else parts, len(queries), len(keys)


# %% cellView="form" jupyter={"source_hidden": true}
# @title A compact model in the words of llama.cpp
def context_length(config) -> int:
    """Tokens up to which a model reads as llama.cpp's plain attention does: before windows and stretched positions."""
    rope, window = config.rope_parameters, getattr(config, "sliding_window", None)
    stretched = rope.get("rope_type", "default") not in ("default", "linear", "llama3")
    limits = [config.max_position_embeddings, window, stretched and rope.get("original_max_position_embeddings")]
    return min(limit for limit in limits if limit)

@torch.no_grad()
def in_words_of_llama_cpp(small) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, numbers) of a compact model: its weights by llama.cpp's names, and what each layer has.

    Raises AttributeError where the model is not built like Llama, ValueError where it rotates heads in another way.
    """
    base, config = small.base_model, small.config
    width, rope = config.hidden_size, config.rope_parameters
    size = getattr(config, "head_dim", None) or width // config.num_attention_heads
    tensors = {"token_embd.weight": base.embed_tokens.weight, "output_norm.weight": base.norm.weight}
    normed = any(hasattr(block.self_attn, "q_norm") for block in base.layers)
    if small.lm_head.weight is not base.embed_tokens.weight:
        tensors["output.weight"] = small.lm_head.weight
        if normed:
            raise ValueError("queries and keys are normalised, and there is an output matrix")
    plain, used = rope["rope_theta"] ** -(torch.arange(0, size, 2).double() / size), base.rotary_emb.inv_freq.cpu()
    if len(plain) != len(used):
        raise ValueError("only a part of each head is rotated by position")
    if ((factors := plain / used.double()) - 1).abs().max() > 1e-4:  # Llama 3's and linear scaling
        tensors["rope_freqs.weight"] = factors.float()
    numbers = {"heads": [], "key_value_heads": [], "neurons": [], "head_dim": size, "base": rope["rope_theta"],
               "epsilon": config.rms_norm_eps, "width": width, "context": context_length(config),
               "architecture": "openelm" if normed else "deci"}
    for layer, block in enumerate(base.layers):
        parts, heads, shared = attention_for_llama_cpp(block.self_attn, size, width, layer == 0, normed)
        parts = {f"attn_{name}": part for name, part in parts.items()}
        parts |= {"attn_norm.weight": block.input_layernorm.weight if heads else None,
                  "ffn_norm.weight": block.post_attention_layernorm.weight}
        down = block.mlp.down_proj
        inputs = [part for part in block.mlp.children() if isinstance(part, torch.nn.Linear) and part is not down]
        for kind in ("weight", "bias"):
            if getattr(down, kind) is not None:
                gate, up = torch.cat([getattr(part, kind) for part in inputs]).chunk(2)
                parts |= {f"ffn_gate.{kind}": gate, f"ffn_up.{kind}": up, f"ffn_down.{kind}": getattr(down, kind)}
        tensors |= {f"blk.{layer}.{name}": part for name, part in parts.items() if part is not None}
        for name, number in (("heads", heads), ("key_value_heads", shared), ("neurons", down.in_features)):
            numbers[name].append(number)
    return {name: part.detach().cpu() for name, part in tensors.items()}, numbers


# %% cellView="form" jupyter={"source_hidden": true}
# @title Does a model fit? It is arranged, computed by these formulas, and compared
def largest_difference_from(small, tensors: dict[str, torch.Tensor], numbers: dict, ids: torch.Tensor) -> float:
    """The largest difference of llama_cpp_logits() of ids (time,) from the model's, relative to the largest logit."""
    with torch.no_grad():
        wanted = small.eval()(ids[None].to(small.device), use_cache=False).logits[0].float().cpu()
    return ((llama_cpp_logits(tensors, numbers, ids) - wanted).abs().max() / wanted.abs().max()).item()

def why_not_gguf(model) -> str:
    """Why a gated model, cut, cannot be written for llama.cpp; "" where it can. Tried with some heads and neurons."""
    if not can_compact(model):
        return f"nothing can be cut out, because {why_not_compact(model)}"
    small = sharing_copy(model)
    gates = torch.rand(get_gates(model).shape, generator=torch.Generator().manual_seed(0)).gt(0.5).float()
    gates[:, 0] = 1
    set_gates(small, gates)
    small = cut_closed(small)
    ids = torch.arange(24) * 7 % model.get_input_embeddings().num_embeddings
    try:
        difference = largest_difference_from(small, *in_words_of_llama_cpp(small), ids)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:  # parts are elsewhere
        return f"it is not built like Llama: {first_sentence(error)}"
    return "" if difference < 1e-3 else f"by llama.cpp's formulas its logits differ by {difference:.0e} of the largest"


# %% cellView="form" jupyter={"source_hidden": true}
# @title Does its tokenizer have a name in llama.cpp? Unknown ones are refused, not guessed
LETTERS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
BYTES = {"type": "ByteLevel", "add_prefix_space": False}
PRE_TOKENIZERS = {  # llama.cpp's name -> how a text is cut before its bytes are merged
    "gpt-2": [BYTES | {"use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}],
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": LETTERS % "{1,3}"}}, BYTES | {"use_regex": False}],
    "qwen2": [{"type": "Split", "pattern": {"Regex": LETTERS % ""}}, BYTES | {"use_regex": False}],
}

def pre_tokenizer_name(tokenizer) -> str:
    """What llama.cpp calls the way in which a tokenizer cuts texts. Raises UserError where that has no name here."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = (parts["pre_tokenizer"] or {}).get("pretokenizers", [parts["pre_tokenizer"] or {}])
    for name, wanted in PRE_TOKENIZERS.items():
        if parts["model"]["type"] == "BPE" and len(steps) == len(wanted) and all(
                want.items() <= step.items() for want, step in zip(wanted, steps)):
            return name
    raise UserError("save_model asks for gguf, but llama.cpp's name for the tokenizer is not known here (known are "
                    f"{', '.join(PRE_TOKENIZERS)}): take --save-model compact, or a .gguf file of the same model as "
                    "--model, whose tokenizer is copied.")

def check_gguf(model, tokenizer, settings: Settings) -> None:
    """Raises UserError, before the run, where a .gguf is wanted and model or tokenizer have no place in llama.cpp."""
    if "gguf" not in settings.save_model.split():
        return
    if reason := why_not_gguf(model):
        raise UserError(f"save_model asks for gguf, but llama.cpp cannot run a pruned {type(model).__name__} "
                        f"({reason}): take --save-model compact.")
    if not settings.model.endswith(".gguf"):
        pre_tokenizer_name(tokenizer)
    print("tried: it can be written for llama.cpp")


# %% cellView="form" jupyter={"source_hidden": true}
# @title What a model can: which level it can reach, in all or in every layer
def heads_to_close(layers: int, heads: int, level: float, min_heads: int) -> int:
    """round(level x all heads). Raises UserError where `min_heads` open heads in every layer do not allow so many."""
    wanted, possible = round(level * layers * heads), layers * max(heads - min_heads, 0)
    if wanted > possible:
        raise UserError(f"pruning_level is {level:g} with min_heads {min_heads}, but at most {possible} of "
                        f"{layers * heads} heads ({possible / (layers * heads):.2f}) can be closed so: lower one of "
                        "the two.")
    return wanted


# %% cellView="form" jupyter={"source_hidden": true}
# @title Can the family's own configuration say it? Tried, without weights
def without_weights(model):
    """A copy of a model whose weights are only shapes: it takes no memory, and computes nothing."""
    shapes = {id(t): t.to("meta") for t in [*model.parameters(), *model.buffers()]}
    for parameter in model.parameters():
        shapes[id(parameter)] = torch.nn.Parameter(shapes[id(parameter)])
    return copy.deepcopy(model, shapes)

def native_class(model) -> type:
    """The class of transformers that a model has, or is derived from."""
    return next(base for base in type(model).__mro__ if base.__module__.startswith("transformers.models."))

def why_not_shaped(small, config) -> str:
    """Why a cut model's class, built from a config without weights, has other shapes; "" where it has the same."""
    with torch.device("meta"):
        built = native_class(small)(config)
    shapes = [{name: tuple(part.shape) for name, part in model.named_parameters()} for model in (built, small)]
    return "" if shapes[0] == shapes[1] else "the shapes of its weights differ then"

def config_with_fewer(small, heads: int, key_value_heads: int, head_dim: int):
    """The config of a cut model in the words of its family. Raises UserError where the family has no words for it.

    Tried, not looked up: the family's class is built from it, without weights, and must have the shapes of `small`.
    """
    config, name = copy.deepcopy(small.config), type(small).__name__
    fewer = {"num_attention_heads": heads, "num_key_value_heads": key_value_heads, "head_dim": head_dim}
    try:
        config.__dict__.pop("kept_heads", None)
        text = config.get_text_config()
        changed = type(text).from_dict(text.to_dict() | fewer)
        if text is config:
            config = changed
        else:
            setattr(config, next(key for key in config.sub_configs if getattr(config, key) is text), changed)
        reason = why_not_shaped(small, config)
    except Exception as error:  # a config of numbers that nobody foresaw fails in every way; the sentence says how
        reason = first_sentence(str(error).strip().rpartition("\n")[2] or error)
    if reason:
        raise UserError(f"the configuration of {name} cannot say that it has {heads} heads over {key_value_heads} "
                        f"key/value heads in every layer ({reason}): take another pruning_level, or leave uniform off, "
                        "compacting does not need it.")
    return config


# %% cellView="form" jupyter={"source_hidden": true}
# @title What a unit costs: the parameters that go with it
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
        if units.kind == "heads":
            parts = [part for part in units.module.modules() if isinstance(part, (torch.nn.Linear, Conv1D))]
            return sum(part.weight.numel() for part in parts) / units.number
        return sum(weight[0].numel() for weight in [*own_weights(units), units.output_weight])

    return torch.stack([torch.cat([torch.full((units.number,), float(cost(units))) for units in layer])
                        for layer in find_units(model)])

def relative_costs(model) -> torch.Tensor:
    """Costs (layers, units) as shares of the largest: importance is divided by them, so that kinds can be compared."""
    costs = unit_costs(model)
    return costs / costs.max()


# %% cellView="form" jupyter={"source_hidden": true}
# @title How many heads the settings will close, before anything is computed
def plan_uniform(model, level: float, min_heads: int) -> tuple[int, int]:
    """(query heads in a group, groups to close in every layer). Raises UserError where level or family do not allow it.

    Heads that share a key/value head are a group, and stay or go together.
    """
    layer, config = find_heads(model)[0], model.config.get_text_config()
    groups = getattr(config, "num_key_value_heads", None) or layer.number
    size, close = layer.number // groups, round(level * groups)
    if (level and not close) or (groups - close) * size < max(min_heads, 1):
        possible = [f"{n / groups:.2f}" for n in range(1, groups) if (groups - n) * size >= min_heads]
        raise UserError(f"pruning_level is {level:g} with uniform and min_heads {min_heads}, but every layer has "
                        f"{groups} groups of heads: take {', '.join(possible) or 'a smaller min_heads'}.")
    if not can_compact(model):
        raise UserError(f"uniform is on, but no head can be cut out, because {why_not_compact(model)}: leave it off.")
    stay, small = (groups - close) * size, without_weights(model)
    remove_gates(small)
    cut_heads(small, {layer.path: list(range(stay)) for layer in find_heads(model)})
    config_with_fewer(small, stay, groups - close, layer.size)
    return size, close

def has_shared_keys(model) -> bool:
    """True where several heads read the same key/value head, and heads are pruned."""
    layer = find_heads(model)[0]
    return number_of_heads(model) > 0 and len(find_rows(layer.module, layer.number, layer.size)[1][1]) < layer.number

def check_reach(model, settings: Settings) -> None:
    """Raises UserError where so much cannot be closed, because every layer keeps some heads and some neurons."""
    layer, heads, costs = find_units(model)[0], number_of_heads(model), unit_costs(model)
    if len(layer) == 1 and heads:
        heads_to_close(len(costs), heads, settings.pruning_level, settings.min_heads)
        return
    kept = {"heads": min(settings.min_heads, heads), "neurons": settings.multiple(len(costs[0]) - heads)}
    spare = sum(max(units.number - kept[units.kind], 0) * costs[:, 0 if units.kind == "heads" else -1].sum().item()
                for units in layer) / costs.sum().item()
    if settings.pruning_level > spare:
        raise UserError(f"pruning_level is {settings.pruning_level:g} with min_heads {settings.min_heads} and "
                        f"round_neurons {kept['neurons']}, but at most {spare:.2f} can be closed so: lower one "
                        "of the three.")

def plan_closing(model, settings: Settings) -> str:
    """What the settings will close, in words; the model is told. Raises UserError where they cannot."""
    prune_only(model, settings.prune)
    layers, heads = len(find_units(model)), number_of_heads(model)
    neurons, level = sum(units.number for units in find_units(model)[0]) - heads, settings.pruning_level
    wanted, words = 0, f"{layers * heads} heads and {layers * neurons} neurons, {level:.0%} of whose parameters will go"
    if not neurons:
        wanted = heads_to_close(layers, heads, level, settings.min_heads)
        if settings.uniform:
            wanted = layers * math.prod(plan_uniform(model, level, settings.min_heads))
        words = f"{layers * heads} gates, {wanted} of which will be closed"
        if settings.even() and has_shared_keys(model):
            words = f"{layers * heads} heads, {level:.0%} of whose parameters will go, in even groups"
    for other in {level, *map(float, settings.sweep_levels.split() if settings.sweep else ())}:
        check_reach(model, dataclasses.replace(settings, pruning_level=other))
    cut = f"nothing can be cut out, because {why_not_compact(model)}: the model keeps its gates, and its size"
    return f"{words}\n{'tried: what is closed can be cut out' if can_compact(model) else cut}"


# %%
if __name__ == "__main__":
    print(plan_closing(model, settings))
    check_gguf(model, tokenizer, settings)

# %% [markdown]
# <a name="7.-Perplexity"></a>
# ## 7. Perplexity
#
# How good is the model? Perplexity is $\exp\big(\tfrac1N\sum_i -\log p(x_i \mid x_{<i})\big)$: the number
# of tokens that the model is, on average, undecided between. Lower is better. It is measured on test
# blocks that do not overlap; the first token of each block is context only.

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

    return math.exp(over_blocks(model, blocks, per_block, "perplexity").cpu().double().mean())


# %% [markdown]
# A number says how much; a sample says what it feels like. Both are recorded at every stage.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Recording a stage: its test perplexity, a sample, and the conditions that belong to the numbers
STAGES = {"dense": "dense, untouched", "pruned": "pruned", "repaired": "pruned + repaired",
          "fine_tuned": "pruned + fine-tuned", "dense_fine_tuned": "dense + fine-tuned",
          "fine_tuned_as_long": "pruned + fine-tuned for the same time"}

@torch.no_grad()
def sample(model, tokenizer, prompt: str, new_tokens: int = 40) -> str:
    """The prompt and the model's most likely continuation, the same every time."""
    if model.device.type == "xla":
        model = move(copy.deepcopy(model), "cpu")  # a TPU would compile the model anew for every length of the text
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id,
               "attention_mask": torch.ones_like(ids)}
    output = fit_batch_size(lambda _: model.eval().generate(ids, **options), 1, "writing a sample")
    return tokenizer.decode(output[0], skip_special_tokens=True)

def drop_outdated(run: Run, stage: str) -> None:
    """Drops what was measured of a stage and of later ones."""
    for outdated in list(STAGES)[list(STAGES).index(stage):]:
        for record in ("perplexity", "parameters", "samples", "size"):
            run.metrics[record].pop(outdated, None)

def measure(run: Run, stage: str, model, tokenizer, blocks: torch.Tensor) -> None:
    """Records a stage's perplexity on blocks (n, time) and its sample; what was measured of later stages is dropped."""
    run.metrics["settings"], prompt = dataclasses.asdict(run.settings), run.settings.prompt
    drop_outdated(run, stage)

    def compute():
        return {}, {"perplexity": perplexity(model, blocks), "samples": sample(model, tokenizer, prompt),
                    "parameters": model.num_parameters()}

    with run.step(f"measure {stage}"):
        _, record = run.load_or_compute(f"measure_{stage}", (model, blocks, prompt), compute)
        for name, value in record.items():
            run.metrics[name][stage] = value
    print(f"{stage}: perplexity {record['perplexity']:.2f}")

def bare_name(name: str) -> str:
    """A model or file name without the folders of this machine."""
    return Path(name).name if Path(name).exists() else name

def conditions(metrics: dict) -> str:
    """One paragraph: everything that the numbers depend on."""
    s, blocks, versions = metrics["settings"], metrics["blocks"], metrics["versions"]
    files = [(split, s[f"{split}_file"]) for split in SPLITS]
    text = s["train_file"] and ", ".join(bare_name(file) if file else f"{split} cut from it" for split, file in files)
    by_hand = metrics.get("heads", {}).get("by_hand")
    how = " in every layer alike" if s["uniform"] else ""
    how += f" of {'the neurons' if s['prune'] == 'neurons' else 'parameters'}" if s["prune"] != "heads" else ""
    how += f", {by_hand} gates set by hand" if by_hand else ""
    how += f", {s['gate_steps']} gate steps" if s["strategy"] == "learned" else ""
    how += f", repaired on {min(s['repair_blocks'], blocks['train'])} training blocks" if s["repair"] else ""
    precision = metrics["precision"]
    precision += f" (float32 from {metrics['float32_from']!r} on)" if "float32_from" in metrics else ""
    how += f", distillation {s['distillation']:g} in fine-tuning" if s["distillation"] else ""
    return (f"Model {bare_name(s['model'])}; text {text or s['dataset']}; strategy {s['strategy']}, level "
            f"{s['pruning_level']:g}{how}, scored on {min(s['calibration_blocks'], blocks['validation'])} validation "
            f"blocks; tested on {blocks['tested']} test blocks of {s['block_length']} tokens; seed {s['seed']}; "
            f"{precision} on {metrics['device']}; "
            + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")


# %%
if __name__ == "__main__":
    measure(run, "dense", model, tokenizer, test_blocks)
    print(run.metrics["samples"]["dense"])

# %% [markdown]
# Now try a gate: close one head, see the perplexity move on some validation text, and open it again. Change
# `layer` and `head` and run the cell again: not all heads matter alike.

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
# <a name="8.-Importance"></a>
# ## 8. Importance
#
# Which heads matter? A **strategy** gives every head a number, its importance. All strategies share one
# interface: `get_strategy(name).score(model, blocks)` returns a table (layers, units), higher meaning
# more important. Where neurons are pruned they stand in the table behind the heads, and a score is divided
# by the number of parameters that go with the unit, so that the two can be compared. A new strategy is one
# small class and one line in `STRATEGIES`.
#
# **Random** is the yardstick: a strategy that is no better knows nothing.

# %%
@dataclasses.dataclass
class Random:
    """Random importance, the same for the same seed."""

    seed: int = 0

    def score(self, model, blocks=None) -> torch.Tensor:
        """Importance (layers, units)."""
        layers = find_units(model)
        number = sum(units.number for units in layers[0])
        return torch.rand(len(layers), number, generator=torch.Generator().manual_seed(self.seed))

if __name__ == "__main__":
    print("the first layer's heads, at random:", Random().score(model)[0].numpy().round(2))


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
            try:
                own = [[*own_weights(units), units.output_weight] for units in layer]
            except ValueError as error:
                raise UserError(f"strategy 'magnitude' cannot find the weights of a head ({error}): take another "
                                "strategy.") from None
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
# The rule here repairs both. Entropy is divided by its maximum at that position, which gives a *focus*
# between 0 and 1; and focus only counts as far as the head *writes* something, measured against the
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
# @title Attention weights, which the fast kernels never build
@contextlib.contextmanager
def eager_attention(model):
    """Within it the model hands out its attention weights, which the fast kernels never build."""
    # Not set_attn_implementation(): it refuses families that read this attribute themselves, such as Falcon.
    config, names = model.config, ("_attn_implementation", "_experts_implementation")
    before = {name: getattr(config, name) for name in names if getattr(config, name, None)}
    for name in before:
        setattr(config, name, "eager")
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)

def first_of(output):
    """What a module returns, or the first of several things."""
    return output[0] if isinstance(output, (tuple, list)) else output

def maps_in(output, heads: int) -> torch.Tensor | None:
    """Attention weights (batch, heads, time, time) among what an attention module returns, or None."""
    others = output[1:] if isinstance(output, (tuple, list)) else []
    return next((part for part in others if isinstance(part, torch.Tensor) and part.dim() == 4
                 and part.shape[1] == heads and part.shape[2] == part.shape[3] == first_of(output).shape[1]), None)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Watching a layer: what comes in, what heads and MLP write, what goes out
def watch_layer(layer: Units, seen: dict):
    """Hooks that note in `seen`, and yield their handles:

    "in" and "out", the stream before and after the layer; "heads", the output projection's input; "attention" and
    "mlp", what they add to it, all (batch, time, width); "maps" (batch, heads, time, time) where they are built.
    """
    def keep(name):
        def hook(module, args, output):
            seen[name] = first_of(output).clone()  # Falcon goes on adding to it
        return hook

    def keep_maps(attention, args, output):
        seen["maps"] = maps_in(output, layer.number)

    def enter(block, args, kwargs):
        seen["in"] = args[0] if args else kwargs["hidden_states"]

    yield layer.block.register_forward_pre_hook(enter, with_kwargs=True)
    yield layer.projection.register_forward_pre_hook(lambda projection, args: seen.update(heads=args[0]))
    yield layer.projection.register_forward_hook(keep("attention"))
    yield layer.module.register_forward_hook(keep_maps)
    if find_mlp_output(layer) is not None:
        yield find_mlp_output(layer).register_forward_pre_hook(lambda projection, args: seen.update(neurons=args[0]))
        yield find_mlp_output(layer).register_forward_hook(keep("mlp"))
    yield layer.block.register_forward_hook(keep("out"))

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
        scores = []

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
                scores.append(torch.cat(each, dim=1))  # (batch, units)
                seen.clear()

            yield from watch_layer(layer, seen)
            yield layer.block.register_forward_hook(leave)

        def per_block(batch):
            scores.clear()
            model.base_model(batch, use_cache=False)
            return torch.stack(scores, 1)  # (batch, layers, units)

        watched = zip(find_heads(model), find_units(model))
        with eager_attention(model), hooks(handle for pair in watched for handle in watch(*pair)):
            scored = over_blocks(model, blocks, per_block, "scoring by entropy", memory="maps")
        return scored.mean(0).cpu() / relative_costs(model)


# %% [markdown]
# **Gradient** asks the loss instead: by how much would it change if the head's gate moved a little? One
# backward pass answers for all heads at once. The importance is the mean over texts of
# $|\partial L/\partial g|$ ([Michel et al. 2019](https://arxiv.org/abs/1905.10650)); squared, it is the
# diagonal of the **Fisher** information, which says how fast the model's predictions change
# ([Kwon et al. 2022](https://arxiv.org/abs/2204.09656)).

# %%
SCALE = 1024.0  # lifts small gradients into the range of float16; a power of two, so that nothing else changes

@dataclasses.dataclass
class Gradient:
    """Mean over blocks of |d loss / d gate|; `squared=True` is the mean square instead (Fisher)."""

    squared: bool = False

    def score(self, model, blocks: torch.Tensor) -> torch.Tensor:
        """Importance (layers, heads) on blocks (n, time), at the gates that the model has."""
        with movable_gates(model) as substitute:
            gates = get_gates(model).to(model.device)

            def per_block(batch):
                own = gates[:, None, None].repeat(1, len(batch), 1, 1).requires_grad_()  # (layers, batch, 1, heads)
                substitute(own)
                loss = nll(model(batch[:, :-1], use_cache=False).logits, batch).sum()
                (slope,) = torch.autograd.grad(SCALE * loss, own)  # no block's gate moves another block's loss
                return slope[:, :, 0].transpose(0, 1) / SCALE  # (batch, layers, heads)

            slopes = over_blocks(model, blocks, per_block, "scoring by gradient", memory="backward")
        return (slopes.square() if self.squared else slopes.abs()).mean(0).cpu() / relative_costs(model)


# %% [markdown]
# **Learned** goes all the way: the gates are trained, with all weights frozen, to keep the predictions of
# the dense model while only so many may be open. In training a gate is a number between 0 and 1,
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
# Of neurons there are too many to learn each one from so little text: Fisher ranks the neurons of a layer, and
# one number for each layer is learned, which moves all of them up or down.
#
# It takes minutes where Fisher takes half a minute, and costs the least perplexity on most models that we
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
def cut_shorter(blocks: torch.Tensor, longest: int = 128) -> torch.Tensor:
    """Blocks (n, time) cut into equal parts of at most `longest` tokens: (more, shorter time)."""
    parts = math.ceil(blocks.shape[1] / longest)
    length = blocks.shape[1] // parts
    return blocks[:, : parts * length].reshape(-1, length)

def divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean Kullback-Leibler divergence per token, (batch,), from wanted ones; both are logits (batch, time, n)."""
    given, wanted = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)  # (XLA does not vouch for kl_div)
    return (wanted.exp() * (wanted - given)).sum(-1).mean(1)


# %%
@dataclasses.dataclass
class Learned:
    """Gates trained on the dense model's predictions, with frozen weights and exactly `level` of them closed."""

    level: float
    steps: int = 240
    seed: int = 0
    rate: float = 0.1  # Adam's, falling to a tenth
    first_temperature: float = 1.0
    last_temperature: float = 0.03
    noise: float = 0.5  # scale of the logistic noise, in temperatures

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
        with movable_gates(model) as substitute:
            per_text = functools.partial(self.slope, model, substitute)
            for step, chosen in enumerate(long_loop(self.draw(*texts.shape, generator), "learning gates")):
                done = step / max(self.steps - 1, 1)
                optimizer.param_groups[0]["lr"] = self.rate * (1 - 0.9 * done)
                temperature = self.first_temperature * (self.last_temperature / self.first_temperature) ** done
                chance = torch.rand(len(chosen), *own.shape, generator=generator).clamp(1e-4, 1 - 1e-4).logit()
                noise = self.noise * temperature * chance.to(model.device)  # every text has its own
                scores = torch.cat([own + noise, (start[:, heads:] + moved).expand(len(chosen), -1, -1)], dim=-1)
                gates = soft_gates(scores, budget, temperature, costs)  # (texts, layers, units)
                slopes = over_blocks(model, (texts[chosen], gates.detach()), per_text, "learning gates", "backward")
                for part, slope in zip(learned, torch.autograd.grad(gates, learned, slopes / len(chosen))):
                    part.grad = slope
                optimizer.step()
                look = step % 24 == 23 or step + 1 == self.steps  # not in every step: to look is to wait
                if look and not learned[0].isfinite().all():
                    raise RunError(f"the gates are not finite after step {step + 1} of {self.steps}: take --precision "
                                   "fp32, or another strategy.")
        return (torch.cat([own, start[:, heads:] + moved], dim=1).detach().cpu() * spread + middle).exp()

    def draw(self, texts: int, length: int, generator) -> list[torch.Tensor]:
        """For each step the numbers of the texts that it learns from."""
        per_step = min(texts, max(1, 256 // length))
        order = [torch.randperm(texts, generator=generator) for _ in range(math.ceil(self.steps * per_step / texts))]
        return torch.cat(order).split(per_step)[: self.steps]

    def slope(self, model, substitute, batch: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """d divergence / d gate of each text: (batch, layers, heads), like `gates`; `batch` is (batch, time)."""
        with torch.no_grad():
            substitute(torch.ones_like(gates[0]))
            wanted = model(batch, use_cache=False).logits
        substitute(gates.requires_grad_()[:, None].unbind(2))  # for each layer (batch, 1, heads)
        loss = divergence(model(batch, use_cache=False).logits, wanted).sum()
        return torch.autograd.grad(SCALE * loss, gates)[0] / SCALE


# %% [markdown]
# All strategies by name, and the one that you chose at work, on validation text:

# %%
STRATEGIES = {"learned": Learned, "fisher": functools.partial(Gradient, squared=True), "gradient": Gradient,
              "entropy": Entropy, "magnitude": Magnitude, "random": Random,
              "entropy-literal": functools.partial(Entropy, literal=True)}

def get_strategy(name: str, **options):
    """A strategy by name, for every architecture. Raises UserError for a name or an option that it does not have.

    Options: `random` takes seed; `learned` takes level, steps, seed, rate, first_temperature, last_temperature, noise.
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


# %%
def score_heads(run: Run, model, calibration: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Importance (layers, heads) by the chosen strategy on blocks (n, time), kept with the run."""
    options = options_for(settings)

    def compute():
        return {"importance": get_strategy(settings.strategy, **options).score(model, calibration)}, {}

    with run.step("importance"), all_open(model):
        stored, _ = run.load_or_compute("importance", (model, calibration, settings.strategy, options), compute)
    run.metrics["importance"] = heads_part(model, stored["importance"]).tolist()
    return stored["importance"]

if __name__ == "__main__":
    calibration = blocks["validation"][: settings.calibration_blocks]
    importance = score_heads(run, model, calibration, settings)
    print(f"{settings.strategy}, on {len(calibration)} blocks of validation text; of the first layer's heads:")
    print(importance[0])

# %% [markdown]
# <a name="9.-Prune"></a>
# ## 9. Prune
#
# The least important share of all heads is closed, wherever they are, but every layer keeps at least
# `min_heads`. With `PRUNE = "both"` heads and neurons share one budget: the level is the share of all their
# parameters. No weight is touched, so this cell can be run again with another level.
#
# What to expect: a model of a hundred million parameters loses a few percent of its perplexity with a
# tenth of its heads, a quarter with a third of them, and falls apart somewhere beyond a half; larger
# models can spare more. Repair gives back about half of the loss. Fine-tuning gives back more than was
# lost, because it also teaches the model this kind of text: so the comparison that counts is with the
# dense model after the same fine-tuning (section 15).

# %%
def choose_gates(importance: torch.Tensor, level: float, min_heads: int = 1) -> torch.Tensor:
    """Gates (layers, heads): the least important of a table (layers, heads) are 0, as many as heads_to_close() says."""
    layers, heads = importance.shape
    wanted, gates = heads_to_close(layers, heads, level, min_heads), torch.ones(layers, heads)
    for index in importance.flatten().argsort(stable=True).tolist():
        layer, head = divmod(index, heads)
        if wanted and gates[layer].sum() > min_heads:
            gates[layer, head] = 0
            wanted -= 1
    return gates

def choose_uniform_gates(importance: torch.Tensor, size: int, close: int) -> torch.Tensor:
    """Gates (layers, heads): in every layer the `close` least important groups of `size` neighbouring heads are 0."""
    groups = importance.unflatten(1, (-1, size)).mean(-1)
    lowest = groups.argsort(dim=1, stable=True)[:, :close]
    return torch.ones_like(groups).scatter(1, lowest, 0).repeat_interleave(size, 1)

def choose_units(model, importance: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Gates (layers, units): the least important of a table (layers, units) are 0, `level` of all parameters' worth.

    Every layer keeps `min_heads` heads, and a multiple of `round_neurons` neurons, at least one. Raises UserError where
    so many cannot be closed.
    """
    check_reach(model, settings)
    costs, heads = unit_costs(model), number_of_heads(model)
    multiple = settings.multiple(costs.shape[1] - heads)
    number, each, left = importance.shape[1], costs.flatten().tolist(), settings.pruning_level * costs.sum().item()
    spare = [[heads - settings.min_heads, number - heads - multiple] for _ in importance]
    closed = []
    for index in importance.flatten().argsort(stable=True).tolist():
        layer, kind = index // number, int(index % number >= heads)
        if each[index] / 2 <= left and spare[layer][kind] > 0:
            closed.append(index)
            spare[layer][kind] -= 1
            left -= each[index]
    gates = torch.ones_like(importance)
    gates.view(-1)[closed] = 0
    return round_neurons(gates, importance, heads, multiple)

def round_neurons(gates: torch.Tensor, importance: torch.Tensor, heads: int, multiple: int) -> torch.Tensor:
    """Gates (layers, units) that leave a multiple of neurons in every layer, by importance (layers, units)."""
    for row, scores in zip(gates[:, heads:], importance[:, heads:]):
        if multiple > 1 and len(row):
            keep = min(max(round(int(row.sum()) / multiple), 1) * multiple, len(row))
            row.zero_()[scores.argsort(descending=True, stable=True)[:keep]] = 1
    return gates


# %% cellView="form" jupyter={"source_hidden": true}
# @title Even groups: a choice for each layer, under one budget of parameters
def best_groups(worth: torch.Tensor, sharing: int, min_heads: int) -> dict[int, tuple[float, list]]:
    """For every cost, in heads and key/value heads, the (worth, gates of each layer) of the best even choice.

    `worth` is (layers, heads); `sharing` heads in a row read the same key/value head.
    """
    best = {0: (0.0, [])}
    for row in worth.unflatten(1, (-1, sharing)):
        choices = [(0, 0.0, torch.zeros_like(row))] if min_heads == 0 else []
        for readers in range(1, sharing + 1):
            top, order = row.sort(dim=1, descending=True)
            groups = top[:, :readers].sum(1).argsort(descending=True)
            for number in range(1, len(row) + 1):
                gates = torch.zeros_like(row)
                for group in groups[:number]:
                    gates[group, order[group, :readers]] = 1
                if gates.sum() >= min_heads:
                    choices.append((number * (readers + 1), (gates * row).sum().item(), gates))
        longer = {}
        for cost, (value, rows) in best.items():
            for extra, gain, gates in choices:
                if cost + extra not in longer or longer[cost + extra][0] < value + gain:
                    longer[cost + extra] = (value + gain, [*rows, gates.flatten()])
        best = longer
    return best

def choose_even(model, importance: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Gates (layers, units) whose worth is the largest, where every key/value head that stays has equally many readers.

    The level is the share of parameters; worth is importance x cost, so that scores are additive as Fisher's are.
    """
    check_reach(model, settings)
    layer, heads, costs = find_heads(model)[0], number_of_heads(model), unit_costs(model)
    sharing = layer.number // len(find_rows(layer.module, layer.number, layer.size)[1][1])
    worth = (importance - min(importance.min().item(), 0)) * costs
    unit = costs[0, 0].item() * sharing / (sharing + 1)  # what a head costs without its share of the key/value head
    budget, (layers, number) = (1 - settings.pruning_level) * costs.sum().item(), costs.shape
    neurons, multiple = worth[:, heads:].clone(), settings.multiple(number - heads)
    if number > heads:  # so many stay in every layer
        neurons.scatter_(1, neurons.topk(multiple, dim=1).indices, math.inf)
    order = neurons.flatten().argsort(descending=True, stable=True)
    sums = torch.cat([torch.zeros(1), worth[:, heads:].flatten()[order].cumsum(0)])

    def total(cost):  # the worth of the best even choice of that cost, with the neurons that the rest pays for
        rest = int((budget - cost * unit) // costs[0, -1].item()) if number > heads else 0
        small = rest < layers * multiple if number > heads else cost * unit > budget
        return (-math.inf, 0) if small else (found[cost][0] + sums[min(rest, len(order))].item(), rest)

    found = best_groups(worth[:, :heads], sharing, settings.min_heads)
    cost = max(found, key=total)
    if total(cost)[0] == -math.inf:
        raise UserError(f"pruning_level is {settings.pruning_level:g} with even_groups and min_heads "
                        f"{settings.min_heads}, which leaves too little in every layer: lower one of the two.")
    gates = torch.zeros(layers, number - heads)
    gates.view(-1)[order[: total(cost)[1]]] = 1
    gates = torch.cat([torch.stack(found[cost][1]), gates], dim=1)
    return round_neurons(gates, importance, heads, multiple)


# %% cellView="form" jupyter={"source_hidden": true}
# @title The gates that the settings want
def gates_for(model, importance: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Gates (layers, units) as the settings want them, from importance (layers, units)."""
    if settings.uniform:
        return choose_uniform_gates(importance, *plan_uniform(model, settings.pruning_level, settings.min_heads))
    if settings.even() and has_shared_keys(model):
        return choose_even(model, importance, settings)
    if number_of_heads(model) == importance.shape[1]:
        return choose_gates(importance, settings.pruning_level, settings.min_heads)
    return choose_units(model, importance, settings)


# %% cellView="form" jupyter={"source_hidden": true}
# @title What gates save, by arithmetic: parameters, bytes, FLOPs
def lost_weights(layer: Units, row: torch.Tensor) -> tuple[int, int]:
    """(parameters, weights of matrix products) that go where a layer keeps the heads that `row` (heads,) says."""
    freed, biases = int((~row).sum()) * layer.output_weight[0].numel(), 0
    parts = find_rows(layer.module, layer.number, layer.size)
    for name, rows in parts:
        if norm_over_heads(layer.module, name) is None:
            projection = getattr(layer.module, name)
            closed = int((~row.view(len(rows), -1).any(1)).sum()) * rows.shape[1]  # outputs that nobody reads
            freed += closed * inputs_first(projection).shape[0]
            biases += closed * (projection.bias is not None)
    shared = len(parts[1][1])
    for _, parameter, of_queries in head_parameters(layer.module, layer.number, shared, layer.size):
        open_rows = row if of_queries else row.view(shared, -1).any(1)
        biases += int((~open_rows).sum()) * parameter[0].numel()
    return freed + biases, freed

def predict_cost(model, gates: torch.Tensor, tokens: int) -> dict[str, float]:
    """`parameters` and `flops_per_token` of the model with only the heads that gates (layers, heads) leave.

    A closed query head frees its rows of the query projection and its columns of the output projection; a key/value
    head is free when no open head reads it any more. FLOPs are those of matrix products in texts of `tokens` tokens.
    """
    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D)))
    layers, parameters, heads = find_heads(model), model.num_parameters(), number_of_heads(model)
    for (*_, units), row in zip(find_units(model), gates == 0):
        if units.kind == "neurons":
            inputs = [part for part in units.module.children() if isinstance(part, (torch.nn.Linear, Conv1D))
                      and part is not units.projection and part.bias is not None]
            closed, weights = int(row[heads:].sum()), [*own_weights(units), units.output_weight]
            biases = sum(len(part.bias) // units.number for part in inputs)
            freed = closed * sum(weight[0].numel() for weight in weights)
            parameters, products = parameters - freed - closed * biases, products - freed
    open_heads = gates[:, :heads] != 0 if heads else torch.ones(len(layers), layers[0].number, dtype=torch.bool)
    for layer, row in zip(layers, open_heads):
        if row.any() or getattr(model, "needs_heads", False):
            row = row if row.any() else torch.arange(layer.number) == 0
            fewer, freed = lost_weights(layer, row)
        else:  # all goes but the output projection's bias
            freed = sum(m.weight.numel() for m in layer.module.modules() if isinstance(m, (torch.nn.Linear, Conv1D)))
            bias = layer.projection.bias
            fewer = sum(p.numel() for p in layer.module.parameters()) - (0 if bias is None else bias.numel())
        parameters, products = parameters - fewer, products - freed
    attention = 4 * tokens * layers[0].size * int(open_heads.sum())
    return {"parameters": parameters, "flops_per_token": 2 * products + attention}

def words_for_size(model, gates: torch.Tensor, tokens: int) -> str:
    """predict_cost() of gates (layers, units) in words, beside the dense model's."""
    before, after = (predict_cost(model, table, tokens) for table in (torch.ones_like(gates), gates))
    fewer, less = (f"{after[name] / before[name] - 1:+.1%}" for name in ("parameters", "flops_per_token"))
    saved = after["parameters"] * getattr(model, "saved_in", torch.float32).itemsize
    return (f"{after['parameters'] / 1e6:,.2f} M parameters ({fewer}), {saved / 1e6:,.1f} MB as saved, "
            f"{after['flops_per_token'] / 1e6:,.1f} MFLOP a token ({less})")


# %% cellView="form" jupyter={"source_hidden": true}
# @title The record of what was closed
def describe_neurons(model, gates: torch.Tensor) -> dict | None:
    """Counts for the record, of gates (layers, units); None where neurons are not pruned."""
    part = gates[:, number_of_heads(model):] != 0
    if not part.numel():
        return None
    return {"total": part.numel(), "closed": int((~part).sum()), "open_per_layer": part.sum(1).tolist()}

def describe_heads(gates: torch.Tensor) -> dict:
    """Counts for the record, of gates (layers, heads); closed_list has [layer, head] pairs."""
    closed = gates == 0
    return {"total": gates.numel(), "closed": int(closed.sum()), "open_per_layer": (~closed).sum(1).tolist(),
            "closed_per_layer": closed.sum(1).tolist(), "closed_list": closed.nonzero().tolist()}


# %% cellView="form" jupyter={"source_hidden": true}
# @title The picture of what was closed
def plot_heads(axes, importance: torch.Tensor, gates: torch.Tensor) -> None:
    """Heat map of (layers, heads), layers from left to right: colour is the rank of importance, × a closed gate."""
    layers, heads = importance.shape
    shades = (ranks(importance).T / max(importance.numel() - 1, 1)).numpy()
    image = axes.imshow(shades, cmap="cividis", aspect="auto", vmin=0, vmax=1)
    axes.scatter(*(gates == 0).nonzero(as_tuple=True), marker="x", color="white", s=26, linewidths=1.6)
    axes.set(xlabel="layer", ylabel="head (×: closed)", xticks=range(0, layers, math.ceil(layers / 20)),
             yticks=range(0, heads, math.ceil(heads / 16)))
    bar = axes.figure.colorbar(image, ax=axes, label="importance (rank)", ticks=[0, 1], pad=0.01)
    bar.ax.set_yticklabels(["least", "most"])

def words_for_closed(metrics: dict) -> str:
    """What was closed, in words: heads, neurons, or both."""
    counts = [f"{counts['closed']:,} of {counts['total']:,} {kind}"
              for kind in ("heads", "neurons") if (counts := metrics.get(kind)) and counts["closed"]]
    return " and ".join(counts) or "nothing"

def plot_neurons(axes, neurons: dict) -> None:
    """How many neurons each layer has left, beside how many it had."""
    left, layers = neurons["open_per_layer"], len(neurons["open_per_layer"])
    axes.bar(range(layers), left, color="#009E73")
    axes.axhline(neurons["total"] / layers, color="#999999", linestyle="--", linewidth=1)
    axes.set(xlabel="layer", ylabel="neurons left", xlim=(-0.5, layers - 0.5),
             xticks=range(0, layers, math.ceil(layers / 20)))

def draw_units(run: Run, model, importance: torch.Tensor) -> Figure:
    """The heads of importance (layers, units) as a heat map, and the neurons that are left; the title says the cost."""
    gates, perplexities, neurons = get_gates(model), run.metrics["perplexity"], run.metrics["neurons"]
    layers, heads = heads_part(model, gates).shape
    drawn = [name for name, there in (("heads", number_of_heads(model)), ("neurons", neurons)) if there]
    height = max(2.6, 0.24 * heads + 1.2) * ("heads" in drawn) + 2 * ("neurons" in drawn)
    figure = new_figure(max(5, 0.3 * layers + 2), height)
    for axes, name in zip(figure.subplots(len(drawn), squeeze=False)[:, 0], drawn):
        if name == "heads":
            plot_heads(axes, heads_part(model, importance), heads_part(model, gates))
        else:
            plot_neurons(axes, neurons)
    figure.axes[0].set_title(f"{words_for_closed(run.metrics)} closed by {run.metrics['settings']['strategy']}: "
                             f"perplexity {perplexities['dense']:.1f} → {perplexities['pruned']:.1f}")
    return figure

def close_heads(run: Run, model, tokenizer, gates: torch.Tensor, blocks: torch.Tensor, taken: dict | None = None):
    """Sets a model's gates (layers, units), and measures it on blocks (n, time). `taken` is section 10's choice."""
    set_gates(model, gates)
    run.metrics["heads"] = describe_heads(heads_part(model, gates)) | {"by_hand": taken["by_hand"] if taken else 0}
    run.metrics["neurons"] = describe_neurons(model, gates)
    run.metrics["taken"] = taken or run.taken
    measure(run, "pruned", model, tokenizer, blocks)
    print(f"heads lost, layer by layer: {' '.join(map(str, run.metrics['heads']['closed_per_layer']))}")
    if run.metrics["neurons"]:
        print(f"neurons left, layer by layer: {' '.join(map(str, run.metrics['neurons']['open_per_layer']))}")
    if can_compact(model):
        print(f"when that is cut out: {words_for_size(model, gates, blocks.shape[1])}")


# %%
if __name__ == "__main__":
    run.settings = settings
    pruned = model  # until it is repaired
    close_heads(run, model, tokenizer, gates_for(model, importance, settings), test_blocks)
    run.show(draw_units(run, model, importance), "heads.png")
    print(run.metrics["samples"]["pruned"])

# %% [markdown]
# <a name="10.-Explore"></a>
# ## 10. Explore
#
# Look and play before you go on. In the explorer every square is a head, layers from left to right, dark
# where it matters least, × where its gate is closed. Drag the level, change the strategy, click single
# heads; see what the smaller model would weigh, measure it on validation text, let it write. Nothing of
# that touches the run, until you press *Take it*: then go on from section 11.

# %% cellView="form" jupyter={"source_hidden": true}
# @title A panel: one long job at a time, in a thread, with a bar, and whatever goes wrong is said in it
class Cancelled(Exception):
    """Somebody pressed Cancel."""

class Panel:
    """A line of text, and a bar with a button to cancel while a job runs; who shows them puts them into a box."""

    def __init__(self):
        self.text, self.bar = widgets.HTML(), widgets.FloatProgress(max=1.0)
        self.cancel = widgets.Button(description="Cancel")
        self.busy = widgets.HBox([self.bar, self.cancel], layout=widgets.Layout(display="none"))
        self.stop, self.thread = threading.Event(), None
        self.cancel.on_click(lambda _: self.stop.set())

    def say(self, words: str, wrong: bool = False):
        color = "color: #d55e00" if wrong else ""
        self.text.value = f'<div style="line-height: 1.4; white-space: pre-wrap; {color}">{html.escape(words)}</div>'

    def guard(self, work):
        """work(), and what it returns is said; what it raises too, for nobody reads the log that it would end in."""
        try:
            self.say(work() or "")
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


# %% cellView="form" jupyter={"source_hidden": true}
# @title The grid of heads: a button for each, coloured by a stylesheet
COLORS = [to_hex(color) for color in matplotlib.colormaps["cividis"].resampled(16).colors]
STYLE = """<style>
.prune-head.prune-head {width: 22px; height: 17px; line-height: 17px; padding: 0; margin: 0; min-width: 0; border: 0;
  border-radius: 2px; font-size: 13px; font-weight: bold; overflow: hidden}
.prune-head.prune-head:hover {outline: 2px solid #d55e00}
.prune-label.prune-label, .prune-label .widget-html-content {width: 22px; height: 17px; line-height: 17px; margin: 0;
  font-size: 10px; text-align: center; overflow: hidden}
""" + "".join(f".prune-head.prune-head.prune-{number} {{background: {color}; "
              f"color: {'#fff' if number < 10 else '#000'}}}\n" for number, color in enumerate(COLORS)) + "</style>"

class HeadGrid:
    """Layers from left to right, heads from top to bottom; `clicked(layer, head)` is called where one is clicked."""

    def __init__(self, layers: int, heads: int, clicked):
        layout, self.buttons, self.colors = widgets.Layout(), {}, {}
        cells = [widgets.HTML(str(name)).add_class("prune-label") for name in ("", *range(layers))]
        for head in range(heads):
            cells.append(widgets.HTML(str(head)).add_class("prune-label"))
            for layer in range(layers):
                button = widgets.Button(tooltip=f"layer {layer}, head {head}", layout=layout).add_class("prune-head")
                button.on_click(lambda _, place=(layer, head): clicked(*place))
                self.buttons[layer, head] = button
                cells.append(button)
        columns = f"repeat({layers + 1}, 22px)"
        self.box = widgets.GridBox(cells, layout=widgets.Layout(grid_template_columns=columns, grid_gap="1px",
                                                                align_items="center", overflow="auto"))

    def show(self, importance: torch.Tensor, gates: torch.Tensor):
        """Colours by the rank of importance (layers, heads), a cross where a gate is 0. Only what changes is sent."""
        shades = ranks(importance) * 16 // importance.numel()
        for (layer, head), button in self.buttons.items():
            color = f"prune-{shades[layer, head]}"
            if self.colors.get((layer, head)) != color:
                button.remove_class(self.colors.get((layer, head), ""))
                button.add_class(color)
                self.colors[layer, head] = color
            button.description = "\N{NO-BREAK SPACE}" if gates[layer, head] else "×"  # (an empty one is not sent)


# %% cellView="form" jupyter={"source_hidden": true}
# @title The explorer (1): what it shows
class ExplorerView(Panel):
    """Strategy, level, grid and buttons. Scores (layers, heads) of each strategy scored are in `importance`."""

    def __init__(self, model, settings: Settings, importance: torch.Tensor):
        super().__init__()
        self.model, self.settings, self.importance = sharing_copy(model), settings, {settings.strategy: importance}
        self.gates, self.chosen, self.heads = get_gates(model), get_gates(model), number_of_heads(model)
        wide, names = {"style": {"description_width": "70px"}}, ("Measure", "Take it", "Write")
        slider = {"min": 0, "max": 0.95, "step": 0.01, "readout_format": ".0%"}
        self.strategy = widgets.Dropdown(options=STRATEGY_NAMES, description="strategy", **wide)
        self.strategy.value = settings.strategy
        self.level = widgets.FloatSlider(settings.pruning_level, description="level", **slider, **wide)
        self.min_heads = widgets.BoundedIntText(settings.min_heads, min=0, max=self.heads,
                                                description="min heads", **wide)
        self.prompt = widgets.Text(settings.prompt, description="prompt", layout=widgets.Layout(width="480px"), **wide)
        self.measure, self.taking, self.write = (widgets.Button(description=name) for name in names)
        self.counts, self.grid = widgets.HTML(), HeadGrid(len(importance), self.heads, self.toggle)
        rows = ([self.strategy, self.level, self.min_heads], [self.grid.box], [self.counts],
                [self.measure, self.taking], [self.prompt, self.write])
        self.box = widgets.VBox([widgets.HTML(STYLE), *map(widgets.HBox, rows), self.busy, self.text])
        self.refresh()

    def toggle(self, layer: int, head: int):
        self.gates[layer, head] = 1 - (self.gates[layer, head] != 0).float()
        self.refresh()

    def refresh(self):
        """Grid and counts as the gates are."""
        scores, gates = self.importance.get(self.strategy.value, self.gates), self.gates[:, :self.heads]
        self.grid.show(scores[:, :self.heads], gates)
        closed, total = int((gates == 0).sum()), gates.numel()
        words = f"<b>{total - closed} heads open, {closed} closed</b> ({closed / total:.0%})"
        if neurons := describe_neurons(self.model, self.gates):
            words += f" · {neurons['closed']:,} of {neurons['total']:,} neurons closed"
        if can_compact(self.model):
            words += f" · {words_for_size(self.model, self.gates, self.settings.block_length)}"
        self.counts.value = words


# %% cellView="form" jupyter={"source_hidden": true}
# @title The explorer (2): what its controls do
class Explorer(ExplorerView):
    """`take` gets what the button *Take it* hands over, and returns a perplexity; `validation` are blocks (n, time)."""

    def __init__(self, model, tokenizer, validation: torch.Tensor, settings: Settings, importance: torch.Tensor, take):
        super().__init__(model, settings, importance)
        self.tokenizer, self.validation, self.take, self.dense = tokenizer, validation, take, None
        for control in (self.strategy, self.level, self.min_heads):
            control.observe(lambda _: self.choose(), "value")
        for button, job in ((self.measure, self.perplexity), (self.taking, self.take_it), (self.write, self.samples)):
            button.on_click(lambda _, job=job: self.start(job))

    def choose(self):
        """The gates that strategy, level and minimum ask for; scores first where there are none yet."""
        if self.strategy.value in self.importance:
            self.guard(self.close)
        else:
            self.say(f"Scoring with {self.strategy.value}, once.")
            self.start(self.score)

    def close(self):
        settings = dataclasses.replace(self.settings, pruning_level=self.level.value, min_heads=self.min_heads.value,
                                       uniform=False)
        self.gates = gates_for(self.model, self.importance[self.strategy.value], settings)
        self.chosen = self.gates.clone()
        self.refresh()

    def score(self):
        name = self.strategy.value
        options = options_for(dataclasses.replace(self.settings, strategy=name, pruning_level=self.level.value))
        with all_open(self.model):
            calibration = self.validation[: self.settings.calibration_blocks]
            self.importance[name] = get_strategy(name, **options).score(self.model, calibration)
        self.close()

    def perplexity(self) -> str:
        gates, text = self.gates.clone(), self.validation[:16]
        if self.dense is None:
            with all_open(self.model):
                self.dense = perplexity(self.model, text)
        set_gates(self.model, gates)
        return (f"Validation perplexity {perplexity(self.model, text):.2f}, dense {self.dense:.2f} ({len(text)} "
                "blocks), before repair and fine-tuning.")

    def samples(self) -> str:
        set_gates(self.model, self.gates.clone())
        shown = sample(self.model, self.tokenizer, self.prompt.value)
        with all_open(self.model):
            return f"dense:\n{sample(self.model, self.tokenizer, self.prompt.value)}\n\nshown:\n{shown}"

    def take_it(self) -> str:
        strategy, scores = self.strategy.value, self.importance[self.strategy.value]
        value = self.take({"gates": self.gates.tolist(), "scores": scores.tolist(), "strategy": strategy,
                           "level": self.level.value, "by_hand": int((self.gates != self.chosen).sum())})
        return f"Taken: test perplexity {value:.2f}. Now run the cells from section 11 on."


# %% cellView="form" jupyter={"source_hidden": true}
# @title Heads that are taken become those of the run, also of one that goes on after an interruption
def take_heads(run: Run, model, tokenizer, blocks: torch.Tensor, taken: dict) -> float:
    """Closes heads that were chosen in the explorer; the perplexity of blocks (n, time). `taken` is recorded."""
    gates, scores = torch.tensor(taken["gates"]), torch.tensor(taken["scores"])
    run.settings = dataclasses.replace(run.settings, strategy=taken["strategy"], pruning_level=taken["level"],
                                       uniform=False, min_heads=int(heads_part(model, gates).sum(1).min()))
    run.metrics["importance"] = heads_part(model, scores).tolist()
    close_heads(run, model, tokenizer, gates, blocks, taken)
    run.keep(draw_units(run, model, scores), "heads.png")
    return run.metrics["perplexity"]["pruned"]

def show_explorer(run: Run, model, tokenizer, blocks: dict[str, torch.Tensor], importance: torch.Tensor):
    """The Explorer, shown; None in a script, where there is nobody to press a button, and where no heads are pruned.

    Blocks are (n, time), importance is (layers, units).
    """
    tested = blocks["test"][: run.settings.eval_blocks or None]
    take = functools.partial(take_heads, run, model, tokenizer, tested)
    if run.taken:
        take(run.taken)
        print("These are the heads that were taken before the run was interrupted (section 9, run again, goes back to "
              "the strategy's).")
    run.taken = None
    if in_notebook() and number_of_heads(model):
        explorer = Explorer(model, tokenizer, blocks["validation"], run.settings, importance, take)
        show_widget(explorer.box, run.folder / "heads.png")
        return explorer


# %%
if __name__ == "__main__":
    explorer = show_explorer(run, model, tokenizer, blocks, importance)

# %% [markdown]
# What does a head look at? The map of a head has a row for every token: how it spreads its attention over
# the tokens before it. A column that is bright from top to bottom is an attention sink: there the head
# rests. On such a map you can see why a low entropy does not make a head important. First the most and
# the least important head, then a viewer for any head and sentence.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Attention maps, and a viewer for them
@torch.no_grad()
def attention_maps(model, tokenizer, sentence: str, longest: int = 40) -> tuple[torch.Tensor, list[str]]:
    """Attention (layers, heads, time, time) of a sentence's first tokens, all gates open, and each token as text.

    Raises UserError for fewer than two tokens, and for a model that gives no attention weights.
    """
    ids = tokenizer(sentence, return_tensors="pt")["input_ids"][:, :longest]
    if ids.shape[1] < 2:
        raise UserError(f"the sentence {sentence!r} has {ids.shape[1]} tokens, but two are needed: write a few words.")
    maps, layers = [], find_heads(model)
    look = (layer.module.register_forward_hook(lambda module, args, output: maps.append(
        maps_in(output, layers[0].number))) for layer in layers)
    with eager_attention(model), all_open(model), hooks(look):
        model.eval().base_model(ids.to(model.device), use_cache=False)
    if any(weights is None for weights in maps):
        raise UserError(f"{type(model).__name__} does not give its attention weights: there is nothing to look at.")
    return torch.cat(maps).float().cpu(), [tokenizer.decode([token]) for token in ids[0].tolist()]

def describe_head(attention: torch.Tensor, importance: dict[str, torch.Tensor], layer: int, head: int) -> str:
    """What can be said of one head: entropy and sink share of its map (time, time), and its rank by every strategy."""
    total = next(iter(importance.values())).numel()
    places = ", ".join(f"{name} {total - int(ranks(scores)[layer, head])}" for name, scores in importance.items())
    return (f"layer {layer}, head {head}\nentropy {1 - focus(attention)[1:].mean():.0%} of its maximum, "
            f"{attention[1:, 0].mean():.0%} on the first token\nimportance rank of {total}: {places}")

def draw_attention(maps: list[torch.Tensor], titles: list[str], tokens: list[str]) -> Figure:
    """One map (time, time) for each head: rows read, columns are read from, both labelled with the tokens."""
    size = max(4.2, 0.17 * len(tokens) + 1.2)
    figure = new_figure(size * len(maps), size + 0.5)
    names = [token.replace("$", r"\$").strip() or "␣" for token in tokens]
    for axes, weights, title in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, titles):
        seen = weights.masked_fill(torch.ones_like(weights).triu(1).bool(), float("nan"))
        image = axes.imshow(seen.numpy(), cmap="cividis", norm=PowerNorm(0.5, 0, 1))
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=figure.axes, label="attention", ticks=[0, 0.1, 0.3, 1], shrink=0.7, pad=0.01)
    return figure


# %% cellView="form" jupyter={"source_hidden": true}
# @title The viewer: any head, any sentence
def attention_viewer(model, tokenizer, sentence: str, importance: dict[str, torch.Tensor]):
    """Sliders for layer and head, a sentence, and the map; `importance` holds scores (layers, units), and may grow."""
    from IPython.display import Image, display

    model, (layers, heads) = sharing_copy(model), heads_part(model, get_gates(model)).shape
    maps_of = functools.lru_cache(1)(lambda sentence: attention_maps(model, tokenizer, sentence))

    def look(sentence, layer, head):
        try:
            maps, tokens = maps_of(sentence)
        except UserError as error:
            print(error)
            return str(error)
        of_heads = {name: heads_part(model, scores) for name, scores in importance.items()}
        title = describe_head(maps[layer, head], of_heads, layer, head)
        picture = png(draw_attention([maps[layer, head]], [title], tokens))
        display(Image(picture))
        return picture

    wide = widgets.Layout(width="600px")
    words = widgets.Text(sentence, description="sentence", continuous_update=False, layout=wide)
    layer, head = (widgets.IntSlider(0, 0, top - 1) for top in (layers, heads))
    viewer = widgets.interactive(look, sentence=words, layer=layer, head=head)
    viewer.update()
    return viewer


# %%
def show_attention(run: Run, model, tokenizer, explorer: Explorer | None) -> None:
    """The maps of the most and the least important head, and in a notebook the viewer."""
    importance, strategy = torch.tensor(run.metrics["importance"]), run.settings.strategy
    if not number_of_heads(model):
        return print("No heads are pruned: no map is drawn.")
    sentence = f"{run.settings.prompt}. The city was old, and the river was older than the city."
    try:
        maps, tokens = attention_maps(model, tokenizer, sentence)
    except UserError as error:  # nothing that follows needs the picture
        return print(error)
    places = [divmod(int(index), importance.shape[1]) for index in (importance.argmax(), importance.argmin())]
    titles = [describe_head(maps[place], {strategy: importance}, *place) for place in places]
    run.show(draw_attention([maps[place] for place in places], titles, tokens), "attention.png", width=1000)
    if explorer is not None:
        show_widget(attention_viewer(model, tokenizer, sentence, explorer.importance), run.folder / "attention.png")

if __name__ == "__main__":
    show_attention(run, model, tokenizer, explorer)

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
# It is solved layer by layer from the bottom, on what the *pruned* model computes: $Y$ is what the stream
# has to receive to be where the dense model's is, so a layer also corrects what was lost below it. The
# MLP's output projection is refitted too, more carefully where it lost no neuron. (Relatives:
# [FLAP](https://arxiv.org/abs/2312.11983), [SlimGPT](https://arxiv.org/abs/2412.18110).)

# %%
RIDGE = {"attention": 0.1, "mlp": 1.0, "mlp that lost neurons": 0.1}  # lambda, as a share of X'X's mean diagonal

@torch.no_grad()
def refit(projection, inputs: torch.Tensor, target: torch.Tensor, ridge: float, kept=slice(None)) -> None:
    """Least squares in place: the `kept` inputs (..., in) are to give `target` (..., out), close to the old weight."""
    weight, bias = inputs_first(projection), projection.bias
    x, y = inputs.flatten(0, -2).float()[:, kept], target.flatten(0, -2).float()
    error = y - x @ weight[kept].float() - (0 if bias is None else bias.float())
    if bias is not None:  # the bias takes care of the means
        x_mean, error_mean = x.mean(0), error.mean(0)
        x, error = x - x_mean, error - error_mean
    gram, wanted = (x.T @ x).cpu().double(), (x.T @ error).cpu().double()
    if not (gram.isfinite().all() and wanted.isfinite().all()):
        raise FloatingPointError("the layer's inputs are not finite")
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(1e-12))
    change = torch.linalg.solve(gram, wanted).to(weight)
    weight[kept] += change
    if bias is not None:
        bias += error_mean - x_mean @ change


# %% cellView="form" jupyter={"source_hidden": true}
# @title Where the dense model's stream is
@torch.no_grad()
def dense_streams(model, blocks: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
    """The dense model's stream on blocks (n, time) after each attention and each layer, (n, layers, 2, time, hidden).

    In bfloat16, on the processor. The list says in which layers what attention and MLP write adds up to the stream.
    Where it does not (Gemma 2 and 3 normalise it first, Granite scales it), the two outputs stand there themselves.
    """
    layers, seen, targets, fits = find_heads(model), {}, [], []
    shape = (len(blocks), len(layers), 2, blocks.shape[1], layers[0].output_weight.shape[2])
    streams = torch.empty(shape, dtype=torch.bfloat16)

    def leave(*_):
        out, attention = seen["out"].float(), seen["attention"].float()
        mlp = seen.get("mlp", torch.zeros_like(out)).float().view_as(out)  # (that of OPT sees a batch in one row)
        middle = seen["in"].float() + attention
        fits.append(torch.dist(middle + mlp, out) < 0.02 * out.norm())
        pairs = ((middle, attention), (out, mlp))
        targets.append(torch.stack([torch.where(fits[-1], *pair) for pair in pairs], 1).bfloat16().cpu())
        seen.clear()

    def per_block(batch, places):
        targets.clear()
        fits.clear()
        model.base_model(batch, use_cache=False)
        for number, target in enumerate(targets):
            streams[places.cpu(), number] = target
        finite = torch.stack([target.isfinite().all() for target in targets])
        return torch.where(finite, torch.stack(fits).float().cpu(), torch.nan).expand(len(batch), -1)

    def watch(layer):
        yield from watch_layer(layer, seen)
        yield layer.block.register_forward_hook(leave)

    with all_open(model), hooks(handle for layer in layers for handle in watch(layer)):
        numbered = (blocks, torch.arange(len(blocks)))
        adds_up = over_blocks(model, numbered, per_block, "looking at the dense model", share=False)
    return streams, adds_up.bool().all(0).tolist()


# %% cellView="form" jupyter={"source_hidden": true}
# @title Hooks that refit a layer when its turn comes
def refit_layer(layer: Units, stream: torch.Tensor, adds_up: bool):
    """Hooks that refit a layer to the dense stream (n, 2, time, hidden) when its turn comes; yields their handles."""
    seen = {}

    def before_projection(projection, args):
        gates = getattr(projection, "gates", torch.ones(layer.number, device=projection.weight.device))
        kept = (gates != 0).repeat_interleave(layer.size)
        wanted = stream[:, 0].to(args[0].device) - (seen["in"].float() if adds_up else 0)
        if kept.any():
            with torch.autocast(args[0].device.type, enabled=False):  # a solution needs all of float32
                refit(projection, args[0], wanted, RIDGE["attention"], kept)

    def before_mlp_output(projection, args):
        wanted = stream[:, 1].to(args[0].device) - (seen["in"].float() + seen["attention"] if adds_up else 0)
        kept = projection.gates != 0 if hasattr(projection, "gates") else slice(None)
        lost = hasattr(projection, "gates") and not kept.all()
        with torch.autocast(args[0].device.type, enabled=False):
            refit(projection, args[0], wanted, RIDGE["mlp that lost neurons" if lost else "mlp"], kept)

    yield from watch_layer(layer, seen)
    yield layer.projection.register_forward_pre_hook(before_projection)  # after the gates' own hook, which is older
    if find_mlp_output(layer) is not None:
        yield find_mlp_output(layer).register_forward_pre_hook(before_mlp_output)
    yield layer.block.register_forward_hook(lambda *_: seen.clear())  # what is noted of a layer is large


# %% [markdown]
# Both passes are ordinary forward passes with hooks: the first notes where the dense model's stream is,
# the second refits each projection just before it is used.

# %%
@torch.no_grad()
def repair(model, blocks: torch.Tensor):
    """A copy of a gated model, refitted on blocks (n, time) to follow the model with open gates."""
    streams, adds_up = dense_streams(model, blocks)

    def refitted(blocks):
        fixed = copy.deepcopy(model).eval()
        layers = zip(find_heads(fixed), streams[:len(blocks)].unbind(1), adds_up)
        with hooks(handle for layer in layers for handle in refit_layer(*layer)):
            fixed.base_model(blocks, use_cache=False)
        return fixed

    return all_at_once(model, blocks, refitted, "repair")


# %% cellView="form" jupyter={"source_hidden": true}
# @title Repaired weights are kept with the run
def put_weights(model, weights: dict[str, torch.Tensor]) -> None:
    """Gives a model kept weights (name -> tensor, as in its state_dict); others stay. Raises RunError for strangers."""
    strangers = model.load_state_dict(weights, strict=False).unexpected_keys
    if strangers:
        raise RunError(f"what was kept is of another model ({strangers[0]}): start anew with --resume no.")

def evenly_spaced(blocks: torch.Tensor, number: int) -> torch.Tensor:
    """So many blocks (number, time), evenly spaced over all of them (n, time)."""
    return blocks[torch.linspace(0, len(blocks) - 1, min(number, len(blocks))).round().long()]

def repaired(run: Run, model, text: torch.Tensor):
    """repair() on blocks (n, time), kept with the run; the model itself where nothing is to be repaired."""
    if not run.settings.repair or get_gates(model).all():
        return model

    def compute():
        old, fixed = dict(model.named_parameters()), repair(model, text)
        return {name: value for name, value in fixed.named_parameters() if not torch.equal(value, old[name])}, {}

    with run.step("repair"):
        stored, _ = run.load_or_compute("repair", (model, text, RIDGE), compute)
        fixed = copy.deepcopy(model)
        put_weights(fixed, stored)
    return fixed


# %%
if __name__ == "__main__":
    repair_text = evenly_spaced(blocks["train"], run.settings.repair_blocks)
    drop_outdated(run, "repaired")
    pruned = repaired(run, model, repair_text)
    if pruned is not model:
        measure(run, "repaired", pruned, tokenizer, test_blocks)

# %% [markdown]
# <a name="12.-Sweep"></a>
# ## 12. Sweep
#
# Which strategy, how many heads? One strategy at one level says little. With `SWEEP` every strategy meets
# every level, on the same model and text. Heads are scored once per strategy (once per level where the
# score depends on it). A point is written down the moment it is known, so an interrupted sweep goes on. A
# second picture asks what to prune: heads, neurons or both, each against the size and speed that it leaves.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Strategies x levels: the points, kept one by one
def sweep_file(run: Run, settings: Settings, texts: tuple[torch.Tensor, ...]) -> Path:
    """Where the points of a sweep are kept: one file for each model, blocks (n, time) and settings."""
    names = ("model", "seed", "prune", "round_neurons", "min_heads", "gate_steps", "repair")
    depends = [run.metrics["perplexity"]["dense"], run.metrics["versions"], run.metrics["precision"], settings.even(),
               [getattr(settings, name) for name in names]]
    return run.folder.parent / f"sweep-{fingerprint(*depends, *texts)}.json"

def closed_share(model, gates: torch.Tensor) -> float:
    """The share of what is pruned that gates (layers, units) close, in parameters: with heads only, of all heads."""
    costs = unit_costs(model)
    return ((costs * (gates == 0)).sum() / costs.sum()).item()

def sweep(model, texts: tuple[torch.Tensor, ...], settings: Settings, file: Path, known=()) -> list[dict]:
    """Prunes with every strategy at every level: a list of {strategy, level, closed, …, pruned, repaired}.

    `texts` are the blocks (n, time) to score on, to repair on and to test on. Points that are in `file` or `known` are
    not computed again. Raises UserError, before anything is computed, for a level that is out of reach.
    """
    calibration, repair_text, test = texts
    names, levels = settings.sweep_strategies.split(), [float(level) for level in settings.sweep_levels.split()]
    for level in levels:
        check_reach(model, dataclasses.replace(settings, pruning_level=level))
    before = from_all_processes(json.loads(file.read_text()) if file.exists() else [])[0]
    points = {(point["strategy"], point["level"]): point for point in [*before, *known]}
    wanted, last = [(name, level) for name in names for level in levels], None
    with all_open(model):
        for name, level in long_loop([pair for pair in wanted if pair not in points], "sweep"):
            options = options_for(dataclasses.replace(settings, strategy=name, pruning_level=level))
            if last != name or "level" in options:  # else the score of the last level serves this one too
                set_gates(model, torch.ones_like(get_gates(model)))
                importance, last = get_strategy(name, **options).score(model, calibration), name
            gates = gates_for(model, importance, dataclasses.replace(settings, pruning_level=level))
            set_gates(model, gates)
            point = {"strategy": name, "level": level, "closed": int((gates == 0).sum()),
                     "share": closed_share(model, gates), **predict_cost(model, gates, test.shape[1]),
                     "pruned": perplexity(model, test), "repaired": None}
            if settings.repair:
                point["repaired"] = perplexity(repair(model, repair_text) if point["closed"] else model, test)
            points[name, level] = point
            if rank_and_world()[0] == 0:
                with in_one_move(file) as part:
                    part.write_text(json.dumps(list(points.values()), indent=1))
    return [points[pair] for pair in wanted]


# %% cellView="form" jupyter={"source_hidden": true}
# @title The sweep as a table and as a picture
def sweep_table(points: list[dict], dense: float) -> str:
    """Strategies x levels as a Markdown table: perplexity after pruning → after repair."""
    levels = sorted({point["level"] for point in points})
    rows = ["| strategy | " + " | ".join(f"{level:.0%}" for level in levels) + " |", "|---" * (len(levels) + 1) + "|"]
    for name in dict.fromkeys(point["strategy"] for point in points):
        mine = {point["level"]: [point["pruned"], *filter(None, [point["repaired"]])]
                for point in points if point["strategy"] == name}
        cells = [" → ".join(f"{value:.2f}" for value in mine[level]) for level in levels]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    after = " → after repair" if points[0]["repaired"] else ""
    return "\n".join([*rows, "", f"Test perplexity after pruning{after}; dense: {dense:.2f}."])

def draw_sweep(points: list[dict], dense: float, kind: str = "heads") -> Figure:
    """Perplexity (log axis) against the share that is closed of a kind: a line a strategy, dotted before repair."""
    figure = new_figure(8, 4.6)
    axes, end = figure.subplots(), lambda point: point["repaired"] or point["pruned"]
    axes.axhline(dense, color="#555555", linestyle="--", linewidth=1.2, label="dense")
    colors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    for name, color, marker in zip(STRATEGY_NAMES, colors, "os^Dv<>"):
        if mine := sorted((point for point in points if point["strategy"] == name), key=lambda point: point["closed"]):
            shares = [point["share"] for point in mine]
            if mine[0]["repaired"]:
                axes.plot(shares, [point["pruned"] for point in mine], color=color, linestyle=":", linewidth=1)
            axes.plot(shares, [end(point) for point in mine], color=color, marker=marker, markersize=5, label=name)
    best = min(points, key=lambda point: (-point["level"], end(point)))
    what = "parameters of heads and neurons" if kind == "both" else kind
    axes.set(yscale="log", xlabel=f"share of {what} closed", ylabel="test perplexity (log scale)",
             title=f"Closing {best['level']:.0%} of the {what}: {best['strategy']} leaves perplexity {end(best):.1f} "
                   f"(dense {dense:.1f})")
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.yaxis.set_major_formatter("{x:g}")
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# %% cellView="form" jupyter={"source_hidden": true}
# @title Heads, neurons or both? The run's strategy with each of the three, against size and speed
@contextlib.contextmanager
def pruning(model, kind: str):
    """Within it another kind of units is pruned in the model; afterwards its gates are as they were."""
    before, gates = getattr(model, "prunes", "heads"), get_gates(model)
    prune_only(model, kind)
    try:
        yield
    finally:
        prune_only(model, before)
        set_gates(model, gates)

def sweep_kinds(run: Run, model, texts: tuple[torch.Tensor, ...]) -> dict[str, list[dict]]:
    """sweep() on blocks (n, time) with the run's strategy for heads, neurons and both, as far as there are such."""
    found = {}
    for kind in ("heads", "neurons", "both"):
        try:
            settings = dataclasses.replace(run.settings, prune=kind, sweep_strategies=run.settings.strategy)
            with pruning(model, kind):
                found[kind] = sweep(model, texts, settings, sweep_file(run, settings, texts))
        except UserError as error:  # no neurons, or a level that is out of reach there
            print(f"{kind}: left out, {error}")
    return found

def draw_frontier(frontier: dict[str, list[dict]], dense: dict, strategy: str) -> Figure:
    """Perplexity (log axis) against parameters and FLOPs, a line for each kind, repaired; the dense model is a point.

    The title says how small each kind makes the model with at most a tenth more perplexity.
    """
    figure, end = new_figure(11, 4.2), lambda point: point["repaired"] or point["pruned"]
    axes, within = figure.subplots(1, 2, sharey=True), []
    looks = {"heads": ("#0072B2", "o"), "neurons": ("#009E73", "s"), "both": ("#D55E00", "^")}
    units = {"parameters": "parameters, million", "flops_per_token": "forward pass, MFLOP per token"}
    for kind, points in frontier.items():
        fine = [point["parameters"] for point in points if end(point) <= 1.1 * dense["perplexity"]]
        within.append(f"{kind} {1 - min([*fine, dense['parameters']]) / dense['parameters']:.0%}")
        for part, (name, label) in zip(axes, units.items()):
            line = sorted((point[name] / 1e6, end(point)) for point in points)
            part.plot(*zip(*line, (dense[name] / 1e6, dense["perplexity"])), color=looks[kind][0],
                      marker=looks[kind][1], label=kind)
            part.set(xlabel=label, yscale="log")
    for part, name in zip(axes, units):
        part.plot(dense[name] / 1e6, dense["perplexity"], "o", color="#000000", markersize=9, label="dense")
        part.grid(alpha=0.3, which="both")
        part.yaxis.set_major_formatter("{x:g}")
        part.yaxis.set_minor_formatter("{x:g}")
        part.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test perplexity (log scale)")
    axes[1].legend(frameon=False, fontsize=9)
    figure.suptitle(f"Parameters gone within +10 % perplexity, by {strategy}: {', '.join(within)}", fontsize=11)
    return figure


# %% cellView="form" jupyter={"source_hidden": true}
# @title The sweep, recorded and shown; a script ends with it
def run_sweep(run: Run, model, texts: tuple[torch.Tensor, ...]) -> None:
    """sweep() on blocks (n, time), recorded, as a CSV file, and shown; what sections 9 and 11 measured is known."""
    heads, values, settings, gates = run.metrics["heads"], run.metrics["perplexity"], run.settings, get_gates(model)
    own = {"strategy": settings.strategy, "level": settings.pruning_level, "closed": int((gates == 0).sum()),
           "share": closed_share(model, gates), **predict_cost(model, gates, texts[-1].shape[1]),
           "pruned": values["pruned"], "repaired": values.get("repaired")}
    with run.step("sweep"):
        known = [own] if own["closed"] and not heads["by_hand"] else []
        points = run.metrics["sweep"] = sweep(model, texts, settings, sweep_file(run, settings, texts), known)
        frontier = run.metrics["frontier"] = sweep_kinds(run, model, texts)
        if run.writes:
            with (run.folder / "sweep.csv").open("w", newline="") as file:
                rows = [{"prune": settings.prune} | point for point in points]
                rows += [{"prune": kind} | point for kind in frontier if kind != settings.prune
                         for point in frontier[kind]]
                table = csv.DictWriter(file, rows[0])
                table.writeheader()
                table.writerows(rows)
    show_markdown(sweep_table(points, values["dense"]) + "\n\n" + conditions(run.metrics))
    run.show(draw_sweep(points, values["dense"], settings.prune), "sweep.png")
    dense = predict_cost(model, torch.ones_like(gates), texts[-1].shape[1]) | {"perplexity": values["dense"]}
    run.show(draw_frontier(frontier, dense, settings.strategy), "frontier.png", width=1000)
    if not in_notebook():
        if run.writes:
            print(f"results: {run.finish()}")
        raise SystemExit


# %%
if __name__ == "__main__" and settings.sweep:
    run_sweep(run, model, (calibration, repair_text, test_blocks))

# %% [markdown]
# **How far may it go?** With `--pruning-level auto --max-loss 0.05` the level is found: the largest one whose
# repaired model is at most 5 % worse than the dense one, on validation text. The units are scored once; the
# level is halved in, six times, and every point is recorded. Then the model is pruned and repaired at that level.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Halving in on the level
def find_level(run: Run, model, importance: torch.Tensor, texts: tuple[torch.Tensor, ...]) -> float:
    """The largest level within settings.max_loss, by importance (layers, units); recorded, with all points.

    `texts` are blocks (n, time) to repair on and to look at. The gates stay as they were.
    """
    (repair_text, seen), length = texts, run.settings.block_length
    with all_open(model):
        dense = perplexity(model, seen)
        low, high, points = 0.0, 1.0, []
        for _ in range(6):
            level = (low + high) / 2
            try:
                gates = gates_for(model, importance, dataclasses.replace(run.settings, pruning_level=level))
            except UserError:  # out of reach: every layer keeps some
                high = level
                continue
            set_gates(model, gates)
            value = perplexity(repair(model, repair_text) if run.settings.repair else model, seen)
            points.append({"level": level, "perplexity": value, **predict_cost(model, gates, length),
                           "within": value <= dense * (1 + run.settings.max_loss)})
            low, high = (level, high) if points[-1]["within"] else (low, level)
            size = words_for_size(model, gates, length)
            print(f"level {level:.3f}: validation perplexity {value:.2f}, {value / dense - 1:+.1%}; {size}")
    run.metrics["level"] = {"dense": dense, "found": low, "points": points}
    return low

def draw_levels(record: dict, max_loss: float) -> Figure:
    """Validation perplexity against the level, every point that was tried, and the line that it may not cross."""
    figure, points = new_figure(6, 3.6), sorted(record["points"], key=lambda point: point["level"])
    axes, levels = figure.subplots(), [point["level"] for point in points]
    axes.plot([0, *levels], [record["dense"], *(point["perplexity"] for point in points)], "o-", color="#0072B2")
    axes.axhline(record["dense"] * (1 + max_loss), color="#D55E00", linestyle="--", label=f"dense + {max_loss:.0%}")
    axes.axvline(record["found"], color="#009E73", linewidth=1, label=f"level {record['found']:.2f}")
    axes.set(xlabel="level", ylabel="validation perplexity, repaired", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=9)
    return figure

def prune_as_far(run: Run, model, tokenizer, importance: torch.Tensor, blocks: dict[str, torch.Tensor]):
    """The model pruned and repaired at the level of find_level(); blocks are (n, time), importance (layers, units)."""
    text, tested = evenly_spaced(blocks["train"], run.settings.repair_blocks), blocks["test"]
    tested = tested[: run.settings.eval_blocks or None]
    with run.step("level"):
        level = find_level(run, model, importance, (text, blocks["validation"][-16:]))
    run.settings = dataclasses.replace(run.settings, pruning_level=level)
    run.show(draw_levels(run.metrics["level"], run.settings.max_loss), "level.png", width=500)
    close_heads(run, model, tokenizer, gates_for(model, importance, run.settings), tested)
    run.keep(draw_units(run, model, importance), "heads.png")
    pruned = repaired(run, model, text)
    if pruned is not model:
        measure(run, "repaired", pruned, tokenizer, tested)
    return pruned


# %%
if __name__ == "__main__" and settings.max_loss:
    pruned = prune_as_far(run, model, tokenizer, importance, blocks)

# %% [markdown]
# <a name="13.-Compact"></a>
# ## 13. Compact
#
# So far the model is as large and as slow as before. Now the closed heads really go, as section 6 has
# tried: the same function with fewer numbers. The cell that does it checks that the logits agree, counts
# what was saved, and measures what that brings, in turns with the dense model.
#
# No configuration file can say "layer 3 has 7 heads", which is why pruned models usually cannot be opened
# again. Here the functions that cut travel with the saved model (section 16), and cut the full model
# anew when it is opened. So they need torch and transformers, and nothing else.

# %% cellView="form" jupyter={"source_hidden": true}
# @title What did it bring? Counted: parameters, bytes, KV cache, FLOPs. Measured in turns: speed
@torch.no_grad()
def count_flops(model, block: torch.Tensor) -> float:
    """Floating-point operations of matrix products per token, in a forward pass over a block (1, time)."""
    # Eager attention and experts, because the counter does not know the fast kernels of every device.
    with frozen(model), eager_attention(model), FlopCounterMode(display=False) as counter:
        model.eval()(block.to(model.device), use_cache=False)
    return counter.get_total_flops() / block.numel()

@torch.no_grad()
def cache_bytes(model, tokens: int = 8) -> int:
    """Bytes of keys and values that the model keeps for each token it has read; 0 where it keeps none."""
    output = model.eval()(torch.zeros(1, tokens, dtype=torch.long, device=model.device), use_cache=True)
    cache = getattr(output, "past_key_values", None) or getattr(output, "cache", None)
    kept = [part for layer in getattr(cache, "layers", []) for name in ("keys", "values")
            if isinstance(part := getattr(layer, name, None), torch.Tensor)]
    return sum(part.nbytes for part in kept) // tokens

def tokens_per_second(models: dict, batch: torch.Tensor, training: bool = False, rounds: int = 5) -> dict[str, float]:
    """Median speed of models on ids (batch, time), in turns, after a warm-up; training is forward and backward."""
    seconds = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            ids, start = batch.to(model.device), time.perf_counter()
            with torch.set_grad_enabled(training), autocast(model.device):
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

def measure_sizes(models: dict, block: torch.Tensor) -> dict[str, dict]:
    """Size and speed of models without gates, as {name: {quantity: number}}; speeds on one block (1, time)."""
    sizes = {name: {"parameters": model.num_parameters(), "bytes": sum(p.nbytes for p in model.parameters()),
                    "cache_bytes_per_token": cache_bytes(model), "flops_per_token": count_flops(model, block)}
             for name, model in models.items()}
    for kind, training in (("forward", False), ("training", True)):
        for name, speed in tokens_per_second(models, block, training).items():
            sizes[name][f"{kind}_tokens_per_second"] = speed
    return sizes


# %% cellView="form" jupyter={"source_hidden": true}
# @title Compacting, checked and recorded
def size_table(sizes: dict[str, dict]) -> str:
    """Dense and compact model side by side, as a Markdown table."""
    rows = [("parameters, million", "parameters", 1e-6, ",.2f"), ("weights as saved, MB", "bytes", 1e-6, ",.1f"),
            ("KV cache, bytes per token", "cache_bytes_per_token", 1, ",.0f"),
            ("forward pass, MFLOP per token", "flops_per_token", 1e-6, ",.1f"),
            ("forward pass, tokens/s", "forward_tokens_per_second", 1, ",.0f"),
            ("training, tokens/s", "training_tokens_per_second", 1, ",.0f")]
    lines = ["| | dense | compact | ratio |", "|---|---|---|---|"]
    for title, key, unit, form in rows:
        before, after = sizes["dense"][key], sizes["pruned"][key]
        ratio = f"{after / before:.3f}" if before else "-"
        lines.append(f"| {title} | {before * unit:{form}} | {after * unit:{form}} | {ratio} |")
    return "\n".join(lines)

def require_same_gates(model, pruned) -> None:
    """Raises UserError where heads were taken in section 10, and what was repaired before belongs to others."""
    if not torch.equal(get_gates(model), get_gates(pruned)):
        raise UserError("other heads were closed since the model was repaired: run section 11, and then this cell.")

def check_compact(run: Run, model, pruned, block: torch.Tensor) -> str:
    """Compacts `pruned`, compares logits on a block (1, time), and measures it beside the dense `model`; in words."""
    require_same_gates(model, pruned)
    run.metrics["size"] = {}
    if not can_compact(model):
        return f"{type(model).__name__} keeps its gates, and its size: {why_not_compact(model)}."
    def compute():
        with without_gates(model):
            return {}, measure_sizes({"dense": model, "pruned": small}, block)

    with run.step("compact"):
        small = compact(pruned)
        difference = run.metrics["compact_difference"] = largest_difference(pruned, small, block)
        _, sizes = run.load_or_compute("size", (model, pruned, block), compute)
        run.metrics["size"] = sizes
        for size in sizes.values():
            size["bytes"] = size["parameters"] * saved_format(run).itemsize
        for stage in {"pruned", "repaired"} & set(run.metrics["parameters"]):
            run.metrics["parameters"][stage] = small.num_parameters()
    if difference > 1e-3:
        raise RuntimeError(f"the compact model differs from the gated one by {difference:.1e}: please report this, "
                           "naming the model.")
    expected = sizes["dense"]["flops_per_token"] / sizes["pruned"]["flops_per_token"]
    measured = sizes["pruned"]["forward_tokens_per_second"] / sizes["dense"]["forward_tokens_per_second"]
    return (f"{size_table(sizes)}\n\nForward pass {measured:.2f} x as fast, {expected:.2f} x by arithmetic; largest "
            f"difference to the gated logits: {difference:.1e} of the largest logit.")


# %%
if __name__ == "__main__":
    show_markdown(check_compact(run, model, pruned, test_blocks[:1]))

# %% [markdown]
# <a name="14.-Fine-tune"></a>
# ## 14. Fine-tune
#
# The remaining heads can learn to do without the closed ones. Training is `transformers.Trainer`: AdamW, a
# short warmup, then a cosine decay. A step is `batch_size` blocks, however many fit at once. The weights
# that are kept are those with the best perplexity on validation text, and training stops early when that
# has not improved for `patience` evaluations. `MAX_STEPS = "auto"` is one pass over the training text with an
# accelerator, and 200 steps on a processor.
#
# What is trained is the compact model: a closed gate lets no gradient through, so with gates it would be
# the same training, only slower. It is a copy. With `distillation` a share of the loss asks for the dense
# model's predictions instead of the text's next token ([Hinton et al. 2015](https://arxiv.org/abs/1503.02531),
# for pruned models [Muralidharan et al. 2024](https://arxiv.org/abs/2407.14679)).

# %%
def training_plan(settings: Settings, blocks: torch.Tensor) -> dict:
    """What decides the result of training on blocks (n, time), as TrainingArguments takes it."""
    passes, given = settings.epochs or 1, settings.max_steps
    steps = math.ceil(passes * len(blocks) / settings.batch_size) if given == "auto" else int(given)
    return {"max_steps": steps, "learning_rate": settings.learning_rate, "weight_decay": settings.weight_decay,
            "warmup_steps": round(settings.warmup * steps), "lr_scheduler_type": "cosine", "max_grad_norm": 1.0,
            "seed": settings.seed}

def with_labels(blocks: torch.Tensor) -> list[dict]:
    """Blocks (n, time) as the Trainer takes them; the first label is masked, since nothing predicts it."""
    return [{"input_ids": block, "labels": torch.cat([block.new_tensor([-100]), block[1:]])} for block in blocks]

if __name__ == "__main__":
    print(training_plan(run.settings, blocks["train"]))

# %% cellView="form" jupyter={"source_hidden": true}
# @title Heads that may come back (reopen_heads): gates are trained too, for the first half of the steps
GATE_LEARNING_RATE = 3e-2  # gates have to travel from 0 to about 1; weights hardly move

def train_gates(model, trained: bool) -> None:
    """Turns the gates from buffers into parameters, or back: a closed head has a gradient on its gate even at zero."""
    for layer in find_heads(model):
        gates = layer.projection.gates.detach().clone()
        del layer.projection.gates
        if trained:
            layer.projection.gates = torch.nn.Parameter(gates)
        else:
            layer.projection.register_buffer("gates", gates)

def gate_optimizer(model, settings: Settings) -> torch.optim.Optimizer:
    """AdamW with a learning rate of their own for the gates."""
    gates, weights = [], []
    for name, parameter in model.named_parameters():
        (gates if name.endswith(".gates") else weights).append(parameter)
    groups = [{"params": weights, "weight_decay": settings.weight_decay},
              {"params": gates, "lr": GATE_LEARNING_RATE, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate)

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

@torch.no_grad()
def fold_gates(model):
    """The gated model with gates that are 0 or 1 only: others go into the weights that they multiply."""
    gates = get_gates(model)
    for layer, row in zip(find_heads(model), gates):
        layer.output_weight.mul_(torch.where(row != 0, row, 1).to(layer.output_weight)[:, None, None])
    set_gates(model, (gates != 0).float())
    return model

def record_reopened(run: Run, model, tuned):
    """Records which heads of `model` came back in `tuned`, which is compacted where it can be."""
    came_back = ((get_gates(model) == 0) & (get_gates(tuned) != 0)).nonzero().tolist()
    run.metrics["heads_after_fine_tuning"] = describe_heads(get_gates(tuned)) | {"came_back": came_back}
    print(f"{len(came_back)} of {run.metrics['heads']['closed']} closed heads came back [layer, head]: {came_back}")
    return compact(tuned) if can_compact(tuned) else fold_gates(tuned)


# %% cellView="form" jupyter={"source_hidden": true}
# @title What is drawn and kept of a training
CURVES = {"loss": "training loss", "perplexity": "validation perplexity", "learning_rate": "learning rate",
          "memory": "memory (GiB)"}

def history_of(state) -> dict[str, list]:
    """[step, value] pairs of each of CURVES, from the Trainer's log."""
    return {key: [[logs["step"], logs[key]] for logs in state.log_history if key in logs] for key in CURVES}

def draw_training(history: dict[str, list], title: str, dense: float | None) -> Figure:
    """The four curves side by side; `dense` is the untouched dense model's validation perplexity."""
    figure = new_figure(11, 2.8)
    figure.suptitle(title, fontsize=11)
    for axes, (key, points) in zip(figure.subplots(1, 4), history.items()):
        axes.plot(*zip(*points) if points else ([], []), color="#0072B2")
        axes.set_title(CURVES[key], fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if key == "perplexity" and dense:
            axes.axhline(dense, color="#D55E00", linestyle="--", label="dense, untouched")
            axes.legend(fontsize=8)
        if key == "memory" and points:
            axes.set_ylim(0, 1.15 * max(used for _, used in points))  # a level line at the very top cannot be seen
    return figure

def training_record(trainer: Trainer, plot, seconds: float) -> dict:
    """What metrics.json keeps: steps, tokens, speed and curves of a training that took so many seconds."""
    args, steps, history = trainer.args, trainer.state.global_step, history_of(trainer.state)
    best = min(history["perplexity"], key=lambda point: point[1])[0]
    return {"steps": steps, "planned_steps": args.max_steps,
            "kept_step": best if args.load_best_model_at_end else args.max_steps,
            "tokens_per_step": plot.tokens_per_step, "micro_batch": args.per_device_train_batch_size,
            "train_tokens_per_second": round((steps - plot.first_step) * plot.tokens_per_step / seconds, 1),
            "history": history}


# %% cellView="form" jupyter={"source_hidden": true}
# @title The live picture: redrawn in place, for at most a twentieth of the time
class LivePlot(TrainerCallback):
    """Draws what the Trainer logs, and keeps the last picture. Raises RunError for a loss that is no number."""

    display, drawn, cost = None, 0.0, 0.0

    def __init__(self, run: Run, name: str, tokens_per_step: int):
        self.run, self.name, self.tokens_per_step = run, name, tokens_per_step

    def on_train_begin(self, args, state, control, **_):
        self.begun, self.first_step = time.monotonic(), state.global_step

    def on_log(self, args, state, control, **_):
        logs, used = state.log_history[-1], memory_used(self.run.device)
        value = logs.get("loss", logs.get("eval_loss", 0.0))
        if not math.isfinite(value):
            raise RunError(f"the loss is {value} at step {state.global_step} of {state.max_steps}: take a lower "
                           "--learning-rate, or --precision fp32.")
        logs["memory"] = used.get("accelerator", used["ram"]) / 2**30
        if "eval_loss" in logs:
            logs["perplexity"] = math.exp(logs["eval_loss"])

    def on_step_end(self, args, state, control, **_):
        if in_notebook() and time.monotonic() - self.drawn > max(0.5, 20 * self.cost):
            self.redraw(state)

    def on_train_end(self, args, state, control, **_):
        if in_notebook():
            self.redraw(state)
        self.run.keep(self.draw(state), f"{self.name}.png")

    def draw(self, state) -> Figure:
        """The picture; its title says how far, how well, how fast, how long still."""
        history = history_of(state)
        words = [f"{STAGES.get(self.name, self.name)}: step {state.global_step} of {state.max_steps}"]
        if seen := history["perplexity"]:
            words.append("validation perplexity " + " → ".join(f"{value:.1f}" for _, value in seen[:1] + seen[-1:]))
        seconds, done = time.monotonic() - self.begun, state.global_step - self.first_step
        if done:
            words.append(f"{self.tokens_per_step * done / seconds:,.0f} tokens/s")
            left = seconds / done * (state.max_steps - state.global_step)
            minutes, rest = divmod(left or seconds, 60)
            words.append(f"{minutes:.0f} min {rest:02.0f} s{' left' if left else ''}")
        return draw_training(history, " · ".join(words), self.run.dense_validation)

    def redraw(self, state):
        from IPython.display import Image, display

        start, picture = time.monotonic(), Image(png(self.draw(state)))
        if self.display is None:
            self.display = display(picture, display_id=True)
        else:
            self.display.update(picture)
        self.drawn = time.monotonic()
        self.cost = self.drawn - start


# %% cellView="form" jupyter={"source_hidden": true}
# @title The Trainer, and what it and accelerate need before and after
class DistillingTrainer(Trainer):
    """A Trainer whose loss is, to a `share`, the divergence from the predictions of a `teacher` (None: share 0)."""

    teacher, share = None, 0.0

    def compute_loss(self, model, inputs, return_outputs=False, **others):
        if not self.share or not model.training:  # validation stays comparable: the text's own tokens
            return super().compute_loss(model, inputs, return_outputs, **others)
        output = model(**inputs)
        with torch.no_grad():
            wanted = self.teacher(inputs["input_ids"], use_cache=False).logits
        taught = divergence(output.logits[:, :-1], wanted[:, :-1]).mean()
        loss = (1 - self.share) * output.loss + self.share * taught
        return (loss, output) if return_outputs else loss

@contextlib.contextmanager
def trainable(model, settings: Settings):
    """Within it a model is as Trainer and accelerate need it; afterwards nothing of that is left in it."""
    use_cache = getattr(model.config, "use_cache", None)
    names = [dict(model.named_parameters(remove_duplicate=unique)).keys() for unique in (False, True)]
    model._keys_to_ignore_on_save = list(names[0] - names[1]) or None  # tied weights are not missed in checkpoints
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.reopen_heads:
        train_gates(model, True)
    yield
    if settings.reopen_heads:
        train_gates(model, False)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    for attribute in ("_keys_to_ignore_on_save", "forward", "_original_forward"):  # accelerate's computes in 16 bits
        vars(model).pop(attribute, None)
    if use_cache is not None:
        model.config.use_cache = use_cache  # which the Trainer switches off, and would be saved so
    model.eval()

def make_trainer(model, data: dict, settings: Settings, plan: dict, folder: Path, micro_batch: int) -> Trainer:
    """The Trainer of fine_tune(). Whole checkpoints every tenth of the way, from which it goes on bit for bit."""
    tenth, device, free = max(1, plan["max_steps"] // 10), model.device.type, settings.reopen_heads
    accumulated = settings.batch_size // rank_and_world()[1] // micro_batch
    arguments = TrainingArguments(
        str(folder / f"micro-batch-{micro_batch}"), **plan, per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch, gradient_accumulation_steps=accumulated, prediction_loss_only=True,
        logging_nan_inf_filter=False, logging_steps=max(1, plan["max_steps"] // 25), eval_strategy="steps",
        eval_steps=tenth, save_strategy="steps", save_steps=tenth, save_total_limit=1,
        restore_callback_states_from_checkpoint=True,
        load_best_model_at_end=not free,  # gates that are being chosen have no best moment: the last weights count
        metric_for_best_model="loss", optim=ADAMW, bf16=COMPUTING.dtype == torch.bfloat16,
        fp16=COMPUTING.dtype == torch.float16, use_cpu=device == "cpu", report_to="none", disable_tqdm=in_notebook(),
        dataloader_pin_memory=device == "cuda", remove_unused_columns=False,
        label_names=["labels"])  # also where forward() does not say what it takes
    callbacks = [transformers.EarlyStoppingCallback(settings.patience)] if settings.patience and not free else []
    callbacks += [CommitGates(settings.pruning_level, settings.min_heads)] if free else []
    optimizers = (gate_optimizer(model, settings) if free else None, None)
    trainer = DistillingTrainer(model, arguments, train_dataset=data["train"], eval_dataset=data["validation"],
                                callbacks=callbacks, optimizers=optimizers)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


# %% cellView="form" jupyter={"source_hidden": true}
# @title fine_tune(), and how it goes on after an interruption
def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint in a Trainer's folder, or None; those that are not whole are removed."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        try:
            whole.append((json.loads((path / "trainer_state.json").read_text())["global_step"], str(path)))
        except (OSError, ValueError):
            shutil.rmtree(path)
    return max(whole, default=(0, None))[1]

def training_key(model, blocks: dict[str, torch.Tensor], settings: Settings) -> str:
    """A fingerprint of all that a model depends on that is fine-tuned on blocks (n, time)."""
    names = [name for name, *_ in SETTINGS["fine-tuning"]]
    names += ["reopen_heads", "pruning_level", "min_heads"] if settings.reopen_heads else []
    return fingerprint(model, blocks["train"], blocks["validation"], [getattr(settings, name) for name in names])

def fine_tune(run: Run, name: str, make, blocks: dict[str, torch.Tensor], settings: Settings, teacher=None):
    """The model that `make()` returns, fine-tuned on blocks (n, time); `name` is that of its record and picture.

    The weights are those with the best validation loss. `teacher` is the dense model, for settings.distillation.
    Raises UserError where the processes cannot share a batch, RunError for a loss that is no number.
    """
    world, plan = rank_and_world()[1], training_plan(settings, blocks["train"])
    if settings.batch_size % world:
        raise UserError(f"batch_size is {settings.batch_size}, but must be a multiple of {world}, the number of "
                        "processes: change one of the two.")
    data = {"train": with_labels(blocks["train"]), "validation": with_labels(blocks["validation"][:16])}
    model = make()
    folder = run.state / f"trainer-{name}-{training_key(model, blocks, settings)}"
    kind = "forward" if settings.gradient_checkpointing else "backward"
    room = room_for_blocks(model, blocks["train"].shape[1], kind, 16 * model.num_parameters())
    del model

    def attempt(micro_batch: int):
        transformers.set_seed(settings.seed)
        tuned, plot = make(), LivePlot(run, name, settings.batch_size * blocks["train"].shape[1])
        with trainable(tuned, settings), all_open(teacher) if teacher is not None else contextlib.nullcontext():
            trainer = make_trainer(tuned, data, settings, plan, folder, micro_batch)
            trainer.add_callback(plot)
            if teacher is not None and settings.distillation:
                trainer.teacher, trainer.share = teacher, settings.distillation
                trainer.model_accepts_loss_kwargs = False  # that loss is a mean over the micro-batch
            checkpoint = from_all_processes(last_checkpoint(Path(trainer.args.output_dir)) if run.writes else None)[0]
            result = trainer.train(resume_from_checkpoint=checkpoint)
        run.metrics.setdefault("training", {})[name] = training_record(trainer, plot, result.metrics["train_runtime"])
        return tuned

    tuned = fit_batch_size(attempt, settings.batch_size // world, "fine-tuning", room, in_step=True)
    wait_for_all()  # for those that still read the best weights
    shutil.rmtree(folder, ignore_errors=True)
    return tuned


# %% cellView="form" jupyter={"source_hidden": true}
# @title A fine-tuned model is kept with the run
def fine_tuned(run: Run, name: str, make, blocks: dict[str, torch.Tensor], settings: Settings, teacher=None):
    """fine_tune() on blocks (n, time), once: where it was done before, the weights that were kept."""
    found = []

    def compute():
        found.append(fine_tune(run, name, make, blocks, settings, teacher))
        gates = {key: value for key, value in found[0].named_buffers() if key.endswith(".gates")}
        return dict(found[0].named_parameters()) | gates, run.metrics["training"][name]

    weights, record = run.load_or_compute(name, (training_key(make(), blocks, settings),), compute)
    run.metrics.setdefault("training", {})[name] = record
    if not found:  # it was kept from before
        found.append(make().eval())
        put_weights(found[0], weights)
    return move(found[0], run.device)

def fine_tune_pruned(run: Run, model, pruned, blocks: dict[str, torch.Tensor]):
    """`pruned`, compacted where it can be and fine-tuned on blocks (n, time); `model` is the gated dense one."""
    require_same_gates(model, pruned)
    settings = run.settings
    make = functools.partial(compact if can_compact(model) and not settings.reopen_heads else copy.deepcopy, pruned)
    run.metrics.pop("heads_after_fine_tuning", None)
    with run.step("fine-tune"):
        with all_open(model):
            run.dense_validation = perplexity(model, blocks["validation"][:16])
        tuned = fine_tuned(run, "fine_tuned", make, blocks, settings, teacher=model)
    tuned = record_reopened(run, model, tuned) if settings.reopen_heads else tuned
    return rounded(tuned, saved_format(run))  # so that what is measured is what is saved


# %% cellView="form" jupyter={"source_hidden": true}
# @title The controls: the dense model with the same steps, the pruned one for the same time
def fine_tune_dense(run: Run, model, tokenizer, blocks: dict[str, torch.Tensor], test_blocks: torch.Tensor) -> None:
    """Fine-tunes the dense model on blocks (n, time) with the same budget, where that is wanted, and measures it."""
    run.metrics.get("training", {}).pop("dense_fine_tuned", None)
    slow = run.device.type == "cpu" and model.num_parameters() > 50e6
    if run.settings.control == "no" or (run.settings.control == "auto" and slow):
        return print("No control: for so large a model it takes long without an accelerator. --control runs it."
                     if slow else "No control.")
    with run.step("fine-tune control"), all_open(model):
        settings, make = dataclasses.replace(run.settings, reopen_heads=False), functools.partial(copy.deepcopy, model)
        tuned = rounded(fine_tuned(run, "dense_fine_tuned", make, blocks, settings), saved_format(run))
    measure(run, "dense_fine_tuned", tuned, tokenizer, test_blocks)

def steps_in_the_same_time(metrics: dict, steps: int, teaching: bool) -> int:
    """Steps of the compact model in the time of so many of the dense one, by the speeds that section 13 measured."""
    dense, small = metrics["size"]["dense"], metrics["size"]["pruned"]
    teacher = 1 / dense["forward_tokens_per_second"] if teaching else 0.0
    return round(steps / dense["training_tokens_per_second"] / (1 / small["training_tokens_per_second"] + teacher))

def fine_tune_as_long(run: Run, model, pruned, tokenizer, blocks: dict[str, torch.Tensor], test_blocks: torch.Tensor):
    """Fine-tunes the compact model on blocks (n, time) for as long as the dense one took, and measures it."""
    run.metrics.get("training", {}).pop("fine_tuned_as_long", None)
    if "dense_fine_tuned" not in run.metrics["perplexity"] or not run.metrics["size"] or run.settings.reopen_heads:
        return
    same = run.metrics["training"]["fine_tuned"]["planned_steps"]
    steps = steps_in_the_same_time(run.metrics, same, run.settings.distillation > 0)
    print(f"The dense model makes {same} steps in the time in which the smaller one makes {steps}.")
    if steps == same:
        return
    settings = dataclasses.replace(run.settings, max_steps=str(max(steps, 1)), epochs=0.0)
    with run.step("fine-tune for the same time"):
        make = functools.partial(compact, pruned)
        tuned = fine_tuned(run, "fine_tuned_as_long", make, blocks, settings, teacher=model)
    measure(run, "fine_tuned_as_long", rounded(tuned, saved_format(run)), tokenizer, test_blocks)


# %%
if __name__ == "__main__":
    tuned = None  # lets the last one go, if this cell is run again
    tuned = fine_tune_pruned(run, model, pruned, blocks)
    measure(run, "fine_tuned", tuned, tokenizer, test_blocks)
    print(run.metrics["samples"]["fine_tuned"])

# %% [markdown]
# **The control.** Fine-tuning on text like the test text helps *any* model. To know what pruning cost, the
# pruned model has to be compared with the dense one after the same number of steps on the same text.

# %%
if __name__ == "__main__":
    fine_tune_dense(run, model, tokenizer, blocks, test_blocks)

# %% [markdown]
# **The same time.** A smaller model makes more steps in an hour. Who pays for hours wants to know what it
# reaches in the time in which the dense model made its own.

# %%
if __name__ == "__main__":
    fine_tune_as_long(run, model, pruned, tokenizer, blocks, test_blocks)

# %% [markdown]
# <a name="15.-Compare"></a>
# ## 15. Compare
#
# The numbers side by side. *Pruned + fine-tuned* against *dense + fine-tuned* is what pruning really cost at
# the same number of steps; *for the same time*, what it cost where time is what you pay for.

# %% cellView="form" jupyter={"source_hidden": true}
# @title The comparison as a table
def require_fine_tuned(metrics: dict) -> None:
    """Raises UserError where the heads were pruned anew and nothing was fine-tuned since."""
    if "fine_tuned" not in metrics["perplexity"]:
        raise UserError("the model was pruned after it was fine-tuned: run sections 9 to 14 again, and then this cell.")

def comparison(metrics: dict) -> str:
    """The comparison as a Markdown table."""
    heads, dense = metrics["heads"], metrics["perplexity"]["dense"]
    after = metrics.get("heads_after_fine_tuning", heads)
    closed = {"pruned": heads["closed"], "repaired": heads["closed"], "fine_tuned": after["closed"],
              "fine_tuned_as_long": heads["closed"]}
    model, bits = metrics["model"], getattr(torch, metrics["model"]["saved_in"]).itemsize
    neurons = metrics.get("neurons")
    more = " neurons |" if neurons else ""
    rows = [f"| model | heads |{more} parameters | file, MB | test perplexity | against dense |",
            "|---|---|---|---|---|---|" + ("---|" if neurons else "")]
    for stage, value in metrics["perplexity"].items():
        left = neurons["total"] - (neurons["closed"] if stage in closed else 0) if neurons else 0
        size = model["file_bytes"] if stage == "dense" and model["file_bytes"] else metrics["parameters"][stage] * bits
        rows.append(f"| {STAGES[stage]} | {heads['total'] - closed.get(stage, 0)} / {heads['total']} | "
                    + (f"{left:,} / {neurons['total']:,} | " if neurons else "") +
                    f"{metrics['parameters'][stage] / 1e6:,.2f} M | {size / 1e6:,.1f} | {value:.2f} | "
                    f"{value / dense - 1:+.1%} |")
    return "\n".join(rows)

def finding(metrics: dict) -> str:
    """The result in one line."""
    values, heads = metrics["perplexity"], metrics["heads"]
    names = {"dense": "", "pruned": "", "repaired": " repaired", "fine_tuned": " fine-tuned"}
    words = " → ".join(f"{values[stage]:.1f}{name}" for stage, name in names.items() if stage in values)
    share = f"{heads['closed'] / heads['total']:.0%} of heads"
    gone = words_for_closed(metrics) if metrics.get("neurons") else share
    return f"{gone} gone: perplexity {words}"


# %% cellView="form" jupyter={"source_hidden": true}
# @title The comparison as a picture (1): its parts
COLOR = {"dense": "#999999", "pruned": "#D55E00", "repaired": "#E69F00", "fine_tuned": "#0072B2",
         "dense_fine_tuned": "#56B4E9", "fine_tuned_as_long": "#009E73"}

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

def plot_sizes(axes, sizes: dict[str, dict]) -> None:
    """The compact model's size and speed in percent of the dense one's."""
    if not sizes:
        axes.set_axis_off()
        return axes.text(0, 0.5, "keeps its gates:\nas large and as fast as before")
    rows = {"parameters": "parameters", "KV cache": "cache_bytes_per_token", "FLOPs": "flops_per_token",
            "forward speed": "forward_tokens_per_second", "training speed": "training_tokens_per_second"}
    rows = {name: key for name, key in rows.items() if sizes["dense"][key]}
    shares = [100 * sizes["pruned"][key] / sizes["dense"][key] for key in rows.values()]
    axes.barh(list(rows), shares, color=["#0072B2" if "speed" in name else "#009E73" for name in rows], height=0.6)
    for row, share in enumerate(shares):
        axes.annotate(f"{share:.0f} %", (share, row), (-4, 0), textcoords="offset points", va="center", ha="right",
                      color="white", fontsize=9)
    axes.axvline(100, color=COLOR["dense"], linestyle="--", linewidth=1)
    axes.set(xlabel="compact model, % of the dense one", xlim=(0, 1.05 * max(100, *shares)))
    axes.invert_yaxis()

def plot_training(axes, training: dict[str, dict]) -> None:
    """Validation perplexity while fine-tuning, the pruned model and the control."""
    for stage, record in training.items():
        curve, look = zip(*record["history"]["perplexity"]), {"color": COLOR[stage], "label": STAGES[stage]}
        axes.plot(*curve, marker="o", markersize=3, **look)
    axes.set(xlabel="step", ylabel="validation perplexity")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


# %% cellView="form" jupyter={"source_hidden": true}
# @title The comparison as a picture (2), and the report
def draw_dashboard(metrics: dict, gates: torch.Tensor) -> Figure:
    """Gates of heads (layers, heads), perplexities, size and speed, training, samples; the title states the finding."""
    figure = new_figure(13, 7.4)
    figure.suptitle(finding(metrics), fontsize=15, fontweight="bold")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 0.95))
    parts = [*top.subplots(1, 2, width_ratios=(1.25, 1)), *bottom.subplots(1, 3, width_ratios=(0.8, 0.9, 1.1))]
    if metrics.get("neurons") and gates.all():  # no head was closed
        plot_neurons(parts[0], metrics["neurons"])
    else:
        plot_heads(parts[0], torch.tensor(metrics["importance"]), gates)
    plot_perplexities(parts[1], metrics["perplexity"])
    plot_sizes(parts[2], metrics["size"])
    plot_training(parts[3], metrics["training"])
    closed = f"{bare_name(metrics['settings']['model'])}: {words_for_closed(metrics)} closed by "
    titles = (closed + metrics["settings"]["strategy"], "what it cost, what came back", "size and speed", "fine-tuning",
              "what it writes")
    for axes, title in zip(parts, titles):
        axes.set_title(title, fontsize=11)
    for axes in parts[1:4]:
        axes.spines[["top", "right"]].set_visible(False)
    parts[4].set_axis_off()
    text = ""
    for stage in ("dense", "pruned", "fine_tuned"):
        lines = textwrap.wrap(" ".join(metrics["samples"][stage].replace("$", r"\$").split()), 62)
        text += f"{STAGES[stage]}:\n" + "\n".join(lines[:5]) + (" …" if len(lines) > 5 else "") + "\n\n"
    parts[4].text(0, 1, text, va="top", fontsize=8, transform=parts[4].transAxes)
    return figure

@saying_disk_trouble()
def write_report(run: Run) -> None:
    """Writes report.md into the run's folder."""
    if not run.writes:
        return
    metrics, heads = run.metrics, run.metrics["heads"]
    samples = [f"**{STAGES[stage]}**\n\n> " + text.replace("\n", "\n> ") for stage, text in metrics["samples"].items()]
    rows = {"layer": range(len(heads["open_per_layer"])), "---": ["---"] * len(heads["open_per_layer"]),
            "heads open": heads["open_per_layer"], "heads lost": heads["closed_per_layer"]}
    if metrics["neurons"]:
        rows["neurons left"] = metrics["neurons"]["open_per_layer"]
    layers = "\n".join(f"| {name} | {' | '.join(map(str, row))} |" for name, row in rows.items())
    name = bare_name(metrics["settings"]["model"])
    title = f"# {name}, {words_for_closed(metrics)} closed"
    parts = [title, comparison(metrics), conditions(metrics),
             *([size_table(metrics["size"])] if metrics["size"] else []), "![dashboard](dashboard.png)",
             "![heads](heads.png)", layers, "![fine-tuning](fine_tuned.png)", "## Samples", *samples]
    (run.folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


# %%
if __name__ == "__main__":
    require_fine_tuned(run.metrics)
    write_report(run)
    show_markdown(comparison(run.metrics) + "\n\n" + conditions(run.metrics))
    run.show(draw_dashboard(run.metrics, heads_part(model, get_gates(model))), "dashboard.png", width=1100)

# %% [markdown]
# <a name="16.-Save-and-download"></a>
# ## 16. Save and download
#
# The **compact** model is saved so that anyone can open it, without this notebook: weights as safetensors,
# configuration, tokenizer, a model card, and `modeling_pruned.py`, a short file with the functions of
# section 13, which cuts the model while it is being opened. It is written from the source of those very
# functions, so the logic exists once. Where all layers have lost equally many heads and the family's own
# configuration can say so (`uniform`), no code has to travel: the folder is an ordinary, smaller checkpoint.

# %% cellView="form" jupyter={"source_hidden": true}
# @title modeling_pruned.py
@functools.cache  # to parse all of the script takes a moment
def definitions(text: str) -> dict[str, str]:
    """The source of each function and class of a Python text, by name, without decorators."""
    lines = text.splitlines()
    return {node.name: "\n".join(lines[node.lineno - 1: node.end_lineno]) for node in ast.parse(text).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}

def source_of(thing) -> str:
    """The source of a function or class of this file; inspect.getsource cannot find the classes of a notebook."""
    code = (thing.__init__ if isinstance(thing, type) else thing).__code__
    return definitions("".join(linecache.getlines(code.co_filename)))[thing.__name__]

def modeling_code(name: str, kind: str) -> str:
    """The text of modeling_pruned.py: the class Pruned<name>, derived from <name>; `kind` is its model_type."""
    pieces = (inputs_first, find_rows, norm_over_heads, head_parameters, slice_projection, cut_attention, cut_neurons,
              cut_heads, tell_attention, in_order, pick_bias, find_cache, repeat_keys, NoHeads, LayerConfig)
    return f'''"""{name} with some of its attention heads removed; `kept_heads` in config.json lists those that stay.

Written by PruningAndFineTuningColab. Needs torch and transformers, nothing else.
"""

import inspect
from types import SimpleNamespace

import torch
from transformers import {name}
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.pytorch_utils import Conv1D

# Some weights have another name in files than in models; the class here has the same ones as the class it derives from.
renamed = get_checkpoint_conversion_mapping("{name}") or get_checkpoint_conversion_mapping("{kind}")
if renamed:
    register_checkpoint_conversion_mapping("Pruned{name}", renamed, overwrite=True)


class Pruned{name}({name}):
    """Builds the full model and cuts it before its weights are loaded."""

    _auto_class = "AutoModelForCausalLM"  # so that save_pretrained takes this file along

    def __init__(self, config):
        super().__init__(config)
        cut_heads(self, getattr(config, "kept_heads", {{}}))
        cut_neurons(self, {{path: range(kept) for path, kept in getattr(config, "kept_neurons", {{}}).items()}})


''' + "\n\n\n".join(source_of(piece) for piece in pieces) + "\n"


# %% cellView="form" jupyter={"source_hidden": true}
# @title Saving the compact form, with code or natively
def native_width(model):
    """native_config() of a model that lost neurons: the family's word for their number, if all layers have as many."""
    numbers = set(model.config.kept_neurons.values())
    if model.config.kept_heads or len(numbers) > 1:
        return None
    for word in ("intermediate_size", "n_inner", "ffn_dim"):
        config = copy.deepcopy(model.config)
        config.__dict__.pop("kept_heads"), config.__dict__.pop("kept_neurons")
        if config.get_text_config() is config and hasattr(config, word):
            setattr(config, word, *numbers)
            if not why_not_shaped(model, config):
                return config
    return None

def native_config(model):
    """A compact model's configuration in the words of its family alone, or None where they do not suffice."""
    config, kept_heads = model.config.get_text_config(), model.config.kept_heads
    if not kept_heads or hasattr(model.config, "kept_neurons"):
        return native_width(model)
    sharing = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    groups = {tuple(collections.Counter(head // sharing for head in kept).values()) for kept in kept_heads.values()}
    if len(groups) > 1 or len(set(min(groups))) != 1:
        return None  # layers differ, key/value heads are read by different numbers of query heads, or no head is left
    (group,) = groups
    inputs = inputs_first(model.get_submodule(next(iter(kept_heads)))).shape[0]
    try:
        return config_with_fewer(model, sum(group), len(group), inputs // sum(group))
    except UserError:
        return None

def save_compact(model, tokenizer, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Saves a compact model for from_pretrained: natively where that is possible, else with modeling_pruned.py."""
    model = move(copy.deepcopy(model), "cpu").to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = native_config(model)
    if config is None:
        config, name = copy.deepcopy(model.config), native_class(model).__name__
        config.architectures = [f"Pruned{name}"]
        config.auto_map = {"AutoModelForCausalLM": f"modeling_pruned.Pruned{name}"}
        (folder / "modeling_pruned.py").write_text(modeling_code(name, config.model_type), encoding="utf-8")
    config.save_pretrained(folder)


# %% [markdown]
# Some tools allow no code at all. For them there is the **zeroed** form, the full-sized model with the
# gates multiplied into its output projections: it opens plainly and has the same logits. What the gates
# erased is kept beside it, so that `load_gated` can open any head again.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Saving the zeroed form, and opening it again with its gates
@torch.no_grad()
def expand(small, model):
    """A copy of the gated `model` with the weights of `small`, which was cut from it; closed heads keep their own."""
    full, weights = copy.deepcopy(model), dict(small.named_parameters())
    heads, kept_neurons = find_heads(model)[0].number, getattr(small, "neurons_kept", {})
    for path, kept in (small.config.kept_heads | kept_neurons).items():
        parent, _, output = path.rpartition(".")
        origin = torch.nn.ModuleDict({"parent": copy.deepcopy(model.get_submodule(parent))})
        for parameter in origin.parameters():  # every number says where it stands, and is then cut with the rest
            places = torch.arange(parameter.numel(), device=parameter.device)
            parameter.requires_grad_(False).data = places.view_as(parameter)
        if path in kept_neurons:
            cut_neurons(origin, {f"parent.{output}": kept})
        else:
            origin["parent"] = cut_attention(origin["parent"], output, kept, heads)
        for name, position in origin["parent"].named_parameters():
            target = full.get_parameter(f"{parent}.{name.replace('output_bias', f'{output}.bias')}")
            if f"{parent}.{name}" in weights and weights[f"{parent}.{name}"].shape == position.shape:
                target.view(-1)[position.flatten()] = weights.pop(f"{parent}.{name}").flatten()
    for name, weight in weights.items():
        full.get_parameter(name).copy_(weight)
    kept = small.config.kept_heads | kept_neurons
    set_gates(full, torch.stack([torch.cat([torch.zeros(units.number).index_fill(0, torch.tensor(kept[units.path]), 1.0)
                                            if kept[units.path] else torch.zeros(units.number) for units in layer])
                                 for layer in find_units(full)]))
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
    remove_gates(plain)
    plain.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(erased, folder / "gates.safetensors", {"prunes": getattr(plain, "prunes", "heads")})

@torch.no_grad()
def load_gated(folder: Path, device: str | torch.device = "cpu"):
    """Tokenizer and model that save_gated wrote, with its gates, every one of which can be opened again."""
    tokenizer, model = load_model(str(folder), device)
    with safe_open(Path(folder) / "gates.safetensors", "pt") as stored:
        model.prunes = (stored.metadata() or {}).get("prunes", "heads")
        set_gates(model, stored.get_tensor("gates"))
        for number, units in enumerate(all_units(model)):
            units.output_weight[units.projection.gates != 1] = stored.get_tensor(f"output_weight.{number}").to(device)
    return tokenizer, model


# %% [markdown]
# For llama.cpp and the programs around it there is **GGUF**: the compact model in one file, with its tokenizer
# and chat template. The file is read again and computed by llama.cpp's formulas; where llama.cpp itself can be
# imported (`pip install llama-cpp-py-sync`), it opens the file and has to give the same logits and tokens.

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
    added, words = tokenizer.added_tokens_decoder, {number: word for word, number in tokenizer.get_vocab().items()}
    tokens, kinds = [], []
    for number in range(vocabulary):  # a model may have room for more than its tokenizer knows
        tokens.append(words.get(number, f"[PAD{number}]"))
        kind = "NORMAL" if number in words else "UNUSED"
        if number in added:
            kind = "CONTROL" if added[number].special else "USER_DEFINED"
        kinds.append(gguf.TokenType[kind])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocabulary)
    special.add_special_token["bos"] = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    special.chat_template = special.chat_template or tokenizer.chat_template
    special.add_to_gguf(writer, quiet=True)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Writing a .gguf file, and reading it again
GGUF_FORMATS = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}

def write_gguf(path: Path, small, tokenizer, source: str, words: dict) -> None:
    """Writes a compact model. `source`: the tokenizer's model or file; `words`: format, name, base and description."""
    tensors, numbers = in_words_of_llama_cpp(small)
    each = [numbers[name] for name in ("heads", "key_value_heads", "neurons")]
    alike = all(len(set(part)) == 1 for part in each)
    plain = alike and numbers["architecture"] == "deci" and not any(name.endswith(".bias") for name in tensors)
    writer = gguf.GGUFWriter(path, "llama" if plain else numbers["architecture"])  # which transformers reads, too
    heads, shared, neurons = (part[0] if alike else part for part in each)
    for add, value in ((writer.add_name, words["name"]), (writer.add_description, words["description"]),
                       (writer.add_block_count, len(each[0])), (writer.add_context_length, numbers["context"]),
                       (writer.add_embedding_length, numbers["width"]), (writer.add_feed_forward_length, neurons),
                       (writer.add_head_count, heads), (writer.add_head_count_kv, shared),
                       (writer.add_key_length, numbers["head_dim"]), (writer.add_value_length, numbers["head_dim"]),
                       (writer.add_rope_dimension_count, numbers["head_dim"]),
                       (writer.add_rope_freq_base, numbers["base"]),
                       (writer.add_layer_norm_rms_eps, numbers["epsilon"]),
                       (writer.add_vocab_size, len(tensors["token_embd.weight"])),
                       (writer.add_file_type, gguf.LlamaFileType[GGUF_FORMATS[words["format"]]])):
        add(value)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, words["base"])
    write_tokenizer(writer, tokenizer, source, len(tensors["token_embd.weight"]))
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType["F32" if tensor.ndim == 1 else words["format"].upper()]
        if kind == gguf.GGMLQuantizationType.Q8_0 and tensor.shape[-1] % 32:  # its blocks are 32 numbers long
            kind = gguf.GGMLQuantizationType.F16
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().contiguous().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

def read_gguf(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .gguf file in float32, by name: a state_dict in llama.cpp's words."""
    return {tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            for tensor in gguf.GGUFReader(path).tensors}


# %% cellView="form" jupyter={"source_hidden": true}
# @title Where llama.cpp can be imported, it opens the file, too
def run_llama_cpp(file: str, folder: str) -> None:
    """Runs in a process of its own, because llama.cpp ends it where it does not like a file; imports all it needs.

    Of `asked.json` in a folder (ids, text) it writes `logits.npy` (time, vocabulary), and `tokens.json` of the text.
    """
    import json
    from pathlib import Path

    import numpy
    from llama_cpp_py_sync import Llama

    try:
        Llama.print_system_info()
    except RuntimeError as error:
        raise SystemExit(f"cannot be loaded: {error}") from None
    asked = json.loads(Path(folder, "asked.json").read_text())
    number = len(asked["ids"])
    model = Llama(file, n_ctx=number, n_batch=number)
    batch = model._lib.llama_batch_init(number, 0, 1)
    batch.n_tokens = number
    for place, token in enumerate(asked["ids"]):
        batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
        batch.seq_id[place][0], batch.logits[place] = 0, 1
    if model._lib.llama_decode(model._ctx, batch):
        raise SystemExit("llama.cpp cannot compute it")
    rows = [model._ffi.buffer(model._lib.llama_get_logits_ith(model._ctx, place), 4 * model.n_vocab)
            for place in range(number)]
    numpy.save(Path(folder, "logits.npy"), numpy.stack([numpy.frombuffer(row, "float32") for row in rows]))
    Path(folder, "tokens.json").write_text(json.dumps(model.tokenize(asked["text"], add_special=False)))

def check_in_llama_cpp(file: Path, small, tokenizer, ids: torch.Tensor) -> dict:
    """Logits, perplexity and tokens of ids (time,) in llama.cpp beside those here. Raises RuntimeError for others."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "asked.json").write_text(json.dumps({"ids": ids.tolist(), "text": text}))
        code = f"{source_of(run_llama_cpp)}\nrun_llama_cpp({str(file)!r}, {folder!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace")
        if "cannot be loaded: " in done.stderr:
            print("llama.cpp is installed, but " + done.stderr[done.stderr.rindex("cannot be loaded"):].strip())
            return {}
        if done.returncode:
            raise RuntimeError(f"llama.cpp cannot open {file} ({done.stderr.strip()[-300:]}): please report this.")
        given = torch.from_numpy(numpy.load(Path(folder, "logits.npy")))[None]
        tokens = json.loads(Path(folder, "tokens.json").read_text())
    with torch.no_grad():
        wanted = small.eval()(ids[None].to(small.device), use_cache=False).logits.float().cpu()
    here, there = (math.exp(nll(logits, ids[None]).item()) for logits in (wanted, given))
    found = {"version": importlib.metadata.version("llama-cpp-py-sync"), "divergence": divergence(given, wanted).item(),
             "largest_difference": ((given - wanted).abs().max() / wanted.abs().max()).item(),
             "perplexity": there, "perplexity_here": here, "tokens": len(tokens)}
    if found["divergence"] > 0.02 or tokens != tokenizer(text, add_special_tokens=False).input_ids:
        raise RuntimeError(f"{file} is another model in llama.cpp, or has other tokens ({found}): please report this.")
    print(f"llama.cpp opens it: perplexity of a block {there:.3f}, here {here:.3f}; {len(tokens)} tokens alike")
    return found


# %% cellView="form" jupyter={"source_hidden": true}
# @title The .gguf of a run
def save_gguf(run: Run, small, tokenizer, folder: Path, ids: torch.Tensor) -> float:
    """Writes a compact model into a folder as .gguf, and compares what is in it on ids (time,): the difference."""
    name, saved = bare_name(run.metrics["settings"]["model"]), saved_format(run)
    wanted, auto = run.settings.gguf_format, "bf16" if saved == torch.bfloat16 else "f16"
    bits = auto if wanted == "auto" else wanted
    file = folder / f"{name.split('/')[-1].removesuffix('.gguf')}-pruned.gguf"
    words = {"format": bits, "name": f"{name}, pruned", "base": name, "description":
             f"{words_for_closed(run.metrics)} removed from {name}, then fine-tuned, by PruningAndFineTuningColab"}
    folder.mkdir()
    write_gguf(file, small, tokenizer, run.settings.model, words)
    difference = largest_difference_from(small, read_gguf(file), in_words_of_llama_cpp(small)[1], ids)
    run.metrics["llama_cpp"] = {"format": bits}
    if importlib.util.find_spec("llama_cpp_py_sync"):
        run.metrics["llama_cpp"] |= check_in_llama_cpp(file, small, tokenizer, ids)
    return difference


# %% cellView="form" jupyter={"source_hidden": true}
# @title The model card: what the model is made from, what was removed, what that cost, and how to open it
def how_to_open(folder: Path) -> str:
    """What a model card says of how a saved folder is used, for transformers or for llama.cpp."""
    for file in folder.glob("*.gguf"):
        return f"""```sh
llama-cli -m {file.name} -p "The history of the city began"
echo "FROM ./{file.name}" > Modelfile && ollama create pruned -f Modelfile && ollama run pruned
```"""
    code = ", trust_remote_code=True" if list(folder.glob("*.py")) else ""
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{code})
```"""

def model_card(metrics: dict, folder: Path) -> str:
    """The README.md of a saved model, with the metadata that the Hugging Face hub reads."""
    name, heads = bare_name(metrics["settings"]["model"]), metrics.get("heads_after_fine_tuning", metrics["heads"])
    lost = collections.defaultdict(list)
    for layer, head in heads["closed_list"]:
        lost[layer].append(str(head))
    on_hub = name == metrics["settings"]["model"] and name != "demo"
    is_gguf = any(folder.glob("*.gguf"))
    data = huggingface_hub.ModelCardData(base_model=name if on_hub else None, pipeline_tag="text-generation",
                                         library_name=None if is_gguf else "transformers",
                                         tags=["attention-head-pruning", *["gguf"] * is_gguf])
    code = sorted(file.name for file in folder.glob("*.py"))
    closed = "closed (their output weights are zero)" if (folder / "gates.safetensors").exists() else "removed"
    warning = (f"\n`trust_remote_code=True` runs {' and '.join(f'`{name}`' for name in code)}, which is in this "
               "folder: read it first.\n" if code else "")
    layers = "; ".join(f"{layer}: {', '.join(part)}" for layer, part in lost.items())
    neurons, kinds = metrics.get("neurons"), {"both": "heads and neurons"}.get(metrics["settings"]["prune"])
    kinds = kinds or metrics["settings"]["prune"]
    what = f"{heads['closed']} of {heads['total']} attention heads"
    if neurons:
        what += f" and {neurons['closed']:,} of {neurons['total']:,} neurons"
        layers += f"\n\nNeurons left, by layer: {', '.join(map(str, neurons['open_per_layer']))}"
    return f"""---
{data.to_yaml()}
---

# {name}, {what} {closed.split()[0]}

Made from `{name}` with PruningAndFineTuningColab: {kinds} were scored, the least important ones {closed}, and what
is left was fine-tuned.

{how_to_open(folder)}
{warning}
{comparison(metrics)}

{conditions(metrics)}

Heads {closed.split()[0]}, by layer: {layers or "none"}.
"""


# %% cellView="form" jupyter={"source_hidden": true}
# @title Opening a saved folder as a stranger would
def reopen(folder: Path):
    """The model of a saved folder, opened as AutoModelForCausalLM.from_pretrained(trust_remote_code=True) does."""
    # Step by step, because some versions of AutoModelForCausalLM then use the folder's class for the whole family.
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)  # its code is ours, or was trusted before
    code = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
    opener = get_class_from_dynamic_module(code, folder) if code else opener_for(config)
    return opener.from_pretrained(folder, dtype=torch.float32)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Every saved folder is opened again and compared before it is handed over
def save_models(run: Run, tuned, model, tokenizer, block: torch.Tensor) -> None:
    """Saves `tuned`, made from the gated `model`, in the forms wanted; each is opened again, on a block (1, time)."""
    is_compact = hasattr(tuned.config, "kept_heads")
    forms = [form for form in ("compact", "gguf", "zeroed") if form in run.settings.save_model.split()]
    if forms and not is_compact:
        print(f"{type(tuned).__name__} is not compact, so it is saved in the zeroed form, with its gates.")
        forms = ["zeroed"]
    run.metrics["reopened_difference"] = {}
    for form in forms:
        folder = run.folder / f"model-{form}"
        shutil.rmtree(folder, ignore_errors=True)  # from an earlier run of this cell
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, folder, ignore_errors=True)  # a folder that is not whole is removed
            if form == "gguf":
                difference = save_gguf(run, tuned, tokenizer, folder, block[0])
            elif form == "compact":
                save_compact(tuned, tokenizer, folder, saved_format(run))
            else:
                save_gated(expand(tuned, model) if is_compact else tuned, tokenizer, folder, saved_format(run))
            (folder / "README.md").write_text(model_card(run.metrics, folder), encoding="utf-8")
            undo.pop_all()
        if form != "gguf":
            difference = largest_difference(tuned, move(reopen(folder), run.device), block)
        run.metrics["reopened_difference"][form] = difference
        size = sum(path.stat().st_size for kind in ("model*.safetensors", "*.gguf") for path in folder.glob(kind)) / 1e6
        came = run.metrics["model"]["file_bytes"]
        before = f" (it came as {came / 1e6:.1f} MB)" if came else ""
        run.metrics.setdefault("file_bytes", {})[form] = round(size * 1e6)
        differ = f"logits differ by {difference:.0e} of the largest" if difference else "with the same logits"
        bits = run.metrics["llama_cpp"]["format"] if form == "gguf" else run.metrics["model"]["saved_in"]
        print(f"{folder}: {size:.1f} MB in {bits}{before}; opened again, {differ}")
        if difference > (0.1 if form == "gguf" else 1e-3):  # a .gguf may be in fewer bits
            raise RuntimeError(f"{folder} does not open as the model that was saved: please report this and the model.")

def offer_download(archive: Path) -> None:
    """Downloads a file in Colab, if it is not on Drive; elsewhere says where it is, with a link in a notebook."""
    if "google.colab" in sys.modules and not archive.is_relative_to("/content/drive"):
        from google.colab import files

        files.download(str(archive))
    elif in_notebook():
        from IPython.display import HTML, display

        # Not IPython's FileLink: JupyterLab would open the zip as a text.
        address = urllib.parse.quote(os.path.relpath(archive))
        display(HTML(f'<a href="{address}" download>{html.escape(archive.name)}</a>'))
    print(f"results: {archive} ({archive.stat().st_size / 2**20:.1f} MB)")

def hand_over(run: Run, tuned, model, tokenizer, block: torch.Tensor) -> None:
    """save_models(), with a block (1, time) to compare on, and the download; the last step of a run."""
    require_fine_tuned(run.metrics)
    if run.writes:
        with run.step("save model"):
            save_models(run, tuned, model, tokenizer, block)
        offer_download(run.finish())
    wait_for_all()


# %% [markdown]
# Before it is handed over, the folder is opened again as a stranger would do it, and must give the same
# logits. In Colab this cell then downloads everything as one zip file; elsewhere it says where that is.

# %%
if __name__ == "__main__":
    hand_over(run, tuned, pruned, tokenizer, test_blocks[:1])
