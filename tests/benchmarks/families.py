"""Family by family, what works: gates, scores, repair, cutting, saving and opening again, fine-tuning.

    python tests/benchmarks/families.py > families.md

Real classes of transformers, small, with random weights (tests/families.py). Differences are the largest difference of
float32 logits, relative to the largest logit. Takes about two minutes.
"""

import copy
import math
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from common import nb, trained
from conftest import tiny_tokenizer
from families import CATALOGUE, make

BLOCKS = torch.randint(3, 80, (4, 16), generator=torch.Generator().manual_seed(1))


def finite(strategy, model) -> str:
    options = {"level": 0.3, "steps": 2} if strategy == "learned" else {}
    try:
        return "yes" if nb.get_strategy(strategy, **options).score(model, BLOCKS).isfinite().all() else "not finite"
    except (nb.UserError, nb.RunError) as error:
        return str(error).split(":")[0]


def losses(model, folder) -> str:
    """The loss of the first and of the last of twelve steps on the same four texts."""
    settings = nb.Settings(output_dir=folder, block_length=16, max_steps=12, learning_rate=3e-3)
    run, blocks = nb.Run(settings, torch.device("cpu"), torch.float32), dict.fromkeys(nb.SPLITS, BLOCKS)
    history = trained(run, copy.deepcopy(model), blocks, settings)[1]["history"]["loss"]
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
    small = nb.compact(model) if nb.can_compact(model) else None
    cells.append(f"{nb.largest_difference(model, small, BLOCKS):.0e}" if small else nb.why_not_compact(model)[:90])
    path = Path(folder, "saved")
    if small:
        nb.save_compact(small, tiny_tokenizer(), path)
    else:
        nb.save_gated(model, tiny_tokenizer(), path)
    difference = nb.largest_difference(small or model, nb.reopen(path), BLOCKS)
    cells += [f"{difference:.0e}" + ("" if small else " (zeroed)"), losses(small or model, folder)]
    return cells


if __name__ == "__main__":
    print(f"transformers {transformers.__version__}, torch {torch.__version__}\n")
    print("| family | heads | entropy | learned | repair | compact | opened again | fine-tuned: loss |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    stdout = sys.stdout
    for name in sys.argv[1:] or CATALOGUE:
        with tempfile.TemporaryDirectory() as folder:
            sys.stdout = sys.stderr
            cells = row(name, folder)
            sys.stdout = stdout
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
