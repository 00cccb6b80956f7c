"""What cutting the closed heads out brings, and that it changes nothing.

    python tests/benchmarks/compact.py --levels 0.1 0.3 0.5 OPTIONS     a table for one model
    python tests/benchmarks/compact.py --gpt2-shapes                     speed of GPT-2-small shapes against arithmetic

OPTIONS are those of PruningAndFineTuningColab.py: --model, --train-file, --strategy, --eval-blocks, ... Speeds are
ratios of medians of nine passes in turns, in one process. 'reopened' is the perplexity of the saved folder, opened in
a fresh process that does not know the notebook.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import PruningAndFineTuningColab as nb

STRANGER = """
import math, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
total, blocks = 0.0, load_file(sys.argv[2])["blocks"]
with torch.no_grad():
    for batch in blocks.split(int(sys.argv[3])):
        logits = model(batch, use_cache=False).logits[:, :-1]
        logits, wanted = logits.flatten(0, 1).float(), batch[:, 1:].flatten()
        total += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
print(math.exp(total / blocks[:, 1:].numel()))
"""


def speed_ratio(model, small, batch, training):
    with nb.without_gates(model):
        speeds = nb.tokens_per_second({"dense": model, "compact": small}, batch, training, rounds=9)
    return speeds["compact"] / speeds["dense"]


def gpt2_shapes():
    """GPT-2 small, random weights, half of its heads closed at random."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()
    nb.set_gates(model, nb.choose_gates(nb.get_strategy("random").score(model), 0.5))
    small = nb.compact(model)
    rows = ["| tokens | | by arithmetic | measured | measured / arithmetic |", "|---|---|---|---|---|"]
    for shape in ((1, 512), (4, 128), (1, 1024)):
        batch = torch.randint(0, 50257, shape)
        expected = nb.count_flops(model, batch) / nb.count_flops(small, batch)
        for kind, training in (("forward", False), ("training", True)):
            ratio = speed_ratio(model, small, batch, training)
            rows.append(
                f"| {shape[0]} x {shape[1]} | {kind} | {expected:.3f} x | {ratio:.3f} x | {ratio / expected:.2f} |"
            )
            print(rows[-1], file=sys.stderr)
    print("\n".join(rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--gpt2-shapes", action="store_true")
    chosen, rest = parser.parse_known_args()
    if chosen.gpt2_shapes:
        return gpt2_shapes()
    settings = nb.choose_sources(nb.read_settings(rest))
    device = torch.device("cpu")
    text = nb.load_text(settings)
    tokenizer, model = nb.load_model(
        nb.make_demo(text["train"]) if settings.model == "demo" else settings.model, device
    )
    blocks = nb.pack_all(text, tokenizer, model, settings)
    test = blocks["test"][: settings.eval_blocks or None]
    nb.add_gates(model)
    nb.COMPUTING.batch_size = settings.batch_size
    options = nb.options_for(settings)
    importance = nb.get_strategy(settings.strategy, **options).score(
        model, blocks["validation"][: settings.calibration_blocks]
    )
    dense = nb.perplexity(model, test)
    bare = sum(p.nbytes for p in model.parameters()) / 1e6
    rows = [
        "| level | parameters, M | weights, MB | KV cache, bytes/token | forward, measured (arithmetic) | training "
        "| perplexity: gated | compact | reopened | largest difference |",
        "|---|---|---|---|---|---|---|---|---|---|",
        f"| dense | {model.num_parameters() / 1e6:.2f} | {bare:.1f} | {nb.cache_bytes(model):,} | 1 | 1 | {dense:.4f} "
        "| | | |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_file({"blocks": test}, folder / "test.st")
        for level in chosen.levels:
            own = dataclasses.replace(settings, pruning_level=level)
            nb.set_gates(model, nb.gates_for(model, importance, own))
            small = nb.compact(model)
            saved = folder / f"{level}"
            nb.save_compact(small, tokenizer, saved)
            size = sum(file.stat().st_size for file in saved.glob("*.safetensors")) / 1e6
            stranger = subprocess.run(
                [sys.executable, "-c", STRANGER, saved, folder / "test.st", str(settings.batch_size)],
                cwd=folder,
                capture_output=True,
                text=True,
                check=True,
                env=os.environ | {"HF_HOME": str(folder / "hf")},
            )
            reopened = json.loads(stranger.stdout)
            gated, cut = (nb.perplexity(each, test) for each in (model, small))
            expected = nb.count_flops(model, test[:1]) / nb.count_flops(small, test[:1])
            forward, training = (speed_ratio(model, small, test[:1], kind) for kind in (False, True))
            rows.append(
                f"| {level:.0%} | {small.num_parameters() / 1e6:.2f} | {size:.1f} | {nb.cache_bytes(small):,} | "
                f"{forward:.2f} ({expected:.2f}) | {training:.2f} | {gated:.4f} | {cut:.4f} | {reopened:.4f} | "
                f"{nb.largest_difference(model, small, test[:1]):.0e} |"
            )
            print(rows[-1], file=sys.stderr)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
