"""Family by family, what works: gates, scores, repair, cutting, saving and opening again, fine-tuning.

    python tests/benchmarks/families.py > families.md

Real classes of transformers, small, with random weights (tests/families.py). Differences are the largest difference of
float32 logits, relative to the largest logit. Takes about two minutes.
"""

import contextlib
import copy
import math
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from common import cut_and_opened_again, head, nb, say, trained
from conftest import new_run, random_blocks
from families import CATALOGUE, make

BLOCKS = random_blocks(4, most=80)


def finite(strategy, model) -> str:
    options = {"level": 0.3, "steps": 2} if strategy == "learned" else {}
    try:
        return "yes" if nb.get_strategy(strategy, **options).score(model, BLOCKS).isfinite().all() else "not finite"
    except (nb.UserError, nb.RunError) as error:
        return str(error).split(":")[0]


def losses(model, folder) -> str:
    """The loss of the first and of the last of twelve steps on the same four texts."""
    run = new_run(folder, block_length=16, max_steps=12, learning_rate=3e-3)
    blocks = dict.fromkeys(nb.SPLITS, BLOCKS)
    history = trained(run, copy.deepcopy(model), blocks, run.settings)[1]["history"]["loss"]
    return f"{history[0][1]:.1f} → {history[-1][1]:.1f}"


def row(name: str, folder: str) -> list[str]:
    model = make(name)
    try:
        layers = nb.find_heads(model)
    except nb.UserError as error:
        return [str(error).split(":")[0]] + [""] * 7
    gates = torch.ones(len(layers), layers[0].number)
    gates[0, 1] = gates[-1, 0] = gates[-1, -1] = 0
    nb.set_gates(model, gates)
    cells = [f"{gates.numel()}", finite("entropy", model), finite("learned", model)]
    dense = nb.perplexity(copy.deepcopy(model), BLOCKS)
    cells.append("yes" if math.isfinite(nb.perplexity(nb.repair(model, BLOCKS), BLOCKS) / dense) else "no")
    why_not = nb.why_not_compact(model)
    last, again = cut_and_opened_again(model, Path(folder, "saved"))
    cells.append(why_not[:90] or f"{nb.largest_difference(model, last, BLOCKS):.0e}")
    cells.append(f"{nb.largest_difference(last, again, BLOCKS):.0e}" + " (zeroed)" * bool(why_not))
    return [*cells, losses(last, folder)]


if __name__ == "__main__":
    print(f"transformers {transformers.__version__}, torch {torch.__version__}\n")
    head("family", "heads", "entropy", "learned", "repair", "compact", "opened again", "fine-tuned: loss")
    for name in sys.argv[1:] or CATALOGUE:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            cells = row(name, folder)
        say(name, *cells)
