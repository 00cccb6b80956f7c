"""What the benchmarks share: the options, a run in a folder that is thrown away, training, speeds, tables."""

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from pathlib import Path

import transformers

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from conftest import tiny_tokenizer

import PruningAndFineTuningColab as nb

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def parser_for(doc: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def say(*cells):
    """Prints a row of a Markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def head(*cells):
    """Prints the first two rows of a Markdown table."""
    say(*cells)
    print("|---" * len(cells) + "|", flush=True)


def begin(words: list[str]):
    """(run, tokenizer, gated model, blocks) for options of the notebook.

    Blocks are those of the three splits, and what is made of them: "calibration", "repair" and "tested".
    """
    settings, place = nb.choose_sources(nb.read_settings(words)), tempfile.TemporaryDirectory()
    device, settings = nb.find_device(settings.device), dataclasses.replace(settings, output_dir=place.name)
    run, text = nb.Run(settings, device, nb.find_precision(device, settings.precision)), nb.load_text(settings)
    name = nb.make_demo(text["train"], device) if settings.model == "demo" else settings.model
    tokenizer, model = nb.load_model(name, device, settings.trust_remote_code)
    blocks = nb.pack_all(text, tokenizer, model, settings)
    tested = blocks["test"][: settings.eval_blocks or None]
    run.metrics["blocks"] = {split: len(part) for split, part in blocks.items()} | {"tested": len(tested)}
    blocks |= {"tested": tested, "calibration": nb.evenly_spaced(blocks["train"], settings.calibration_blocks),
               "repair": nb.evenly_spaced(blocks["train"], settings.repair)}  # fmt: skip
    nb.prune_only(model, settings.prune)
    run.settings, run.place = nb.with_steps(settings, blocks, device), place  # removed with the run
    return run, tokenizer, model, blocks


def scores(model, blocks, settings):
    """Importance (layers, units) by the strategy of the settings."""
    with nb.all_open(model):
        return nb.get_strategy(settings.strategy, **nb.options_for(settings)).score(model, blocks["calibration"])


def close(model, importance, settings):
    """Gates (layers, units), set as the settings choose them by importance."""
    gates = nb.gates_for(model, importance, settings)
    nb.set_gates(model, gates)
    return gates


def closed_in(model, gates):
    """How many heads and how many neurons are closed."""
    heads, neurons = nb.heads_part(model, gates), nb.describe_units(model, gates)["neurons"]
    return [int((heads == 0).sum()), neurons["closed"] if neurons else 0]


def trained(run, model, blocks, settings, teacher=None):
    """(model, its record), trained in place; nothing is kept that a training could go on from."""
    with contextlib.redirect_stdout(sys.stderr):
        record = nb.train_all_or_adapters(run, "row", model, blocks, settings, teacher)
    for file in run.state.glob("training-*"):
        file.unlink()
    return model, record


def cut_and_opened_again(model, folder):
    """(what is handed on: the compact model, or the gated one where it cannot be cut, and that, saved and opened)"""
    cut = nb.can_compact(model)
    last = nb.compact(model) if cut else model
    (nb.save_compact if cut else nb.save_gated)(last, tiny_tokenizer(), folder)
    return last, nb.reopen(folder)
