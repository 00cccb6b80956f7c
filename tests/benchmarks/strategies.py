"""Strategies side by side on one model: test perplexity after pruning and, on request, after fine-tuning.

    python tests/benchmarks/strategies.py --levels 0.1 0.3 0.5 --random-seeds 5 --fine-tune-level 0.3 OPTIONS

OPTIONS are those of PruningAndFineTuningColab.py: --model, --train-file, --eval-blocks, ... Prints a Markdown table.
`random` is the mean over its seeds, with the smallest and the largest. Costs are medians of five passes in one process,
as a multiple of a plain forward pass over the same tokens.
"""

import argparse
import copy
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import PruningAndFineTuningColab as nb


def median_seconds(function, times=5):
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--strategies", nargs="+", default=list(nb.STRATEGIES))
    parser.add_argument("--random-seeds", type=int, default=5)
    parser.add_argument("--fine-tune-level", type=float, help="also fine-tune what each strategy leaves at this level")
    parser.add_argument("--cost", action="store_true", help="also time the scoring")
    chosen, rest = parser.parse_known_args()
    settings = nb.choose_sources(nb.read_settings(rest))
    device = nb.find_device(settings.device)
    run = nb.Run(settings, device, nb.find_precision(device, settings.precision))
    text = nb.load_text(settings)
    tokenizer, model = nb.load_model(nb.make_demo(text["train"]) if settings.model == "demo" else settings.model, device)
    blocks = nb.pack_all(text, tokenizer, settings, settings.block_length)
    calibration, test = blocks["validation"][:settings.calibration_blocks], blocks["test"][:settings.eval_blocks or None]
    run.metrics["blocks"] = {split: len(part) for split, part in blocks.items()} | {"tested": len(test)}
    nb.add_gates(model)
    everything_open = nb.get_gates(model)

    def measured(model):
        return nb.perplexity(model, test, run.dtype, settings.batch_size)

    def tuned(gates, name):
        nb.set_gates(model, gates)
        return measured(nb.fine_tune(model, blocks, settings, run, name, 1.0, nb.compact if nb.can_compact(model) else copy.deepcopy))

    dense = measured(model)
    level = chosen.fine_tune_level
    rows = [["dense", *[f"{dense:.2f}"] * len(chosen.levels)]]
    if level is not None:
        rows[0].append(f"{tuned(everything_open, 'dense'):.2f}")
    for name in chosen.strategies:
        results = {}
        for seed in range(chosen.random_seeds if name == "random" else 1):
            options = nb.options_for(dataclasses.replace(settings, strategy=name, seed=seed), run.dtype)
            nb.set_gates(model, everything_open)
            importance = nb.get_strategy(name, **options).score(model, calibration)
            for share in chosen.levels:
                nb.set_gates(model, nb.choose_gates(importance, share, settings.min_heads))
                results.setdefault(share, []).append(measured(model))
        cells = [f"{statistics.mean(values):.2f}" + (f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else "")
                 for values in results.values()]
        if level is not None:  # random: its last seed
            cells.append(f"{tuned(nb.choose_gates(importance, level, settings.min_heads), name):.2f}")
        rows.append([name, *cells])
        print(name, cells, file=sys.stderr)

    header = ["strategy", *[f"{share:.0%}" for share in chosen.levels]] + ([f"{level:.0%}, fine-tuned"] if level is not None else [])
    print("\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]))
    print("\n" + nb.conditions(run.metrics))
    if chosen.cost:
        few = calibration[:4]
        nb.set_gates(model, everything_open)
        with torch.no_grad():
            plain = median_seconds(lambda: model(few, use_cache=False))
        entropy = nb.get_strategy("entropy")
        print(f"\nentropy scoring costs {median_seconds(lambda: entropy.score(model, few)) / plain:.2f} x a plain forward pass")


if __name__ == "__main__":
    main()
