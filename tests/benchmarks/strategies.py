"""Strategies side by side on one model: test perplexity after pruning and after repair, without fine-tuning.

    python tests/benchmarks/strategies.py --levels 0.1 0.3 0.5 --calibrations 3 --cost OPTIONS

OPTIONS are those of PruningAndFineTuningColab.py: --model, --train-file, --eval-blocks, ... Every calibration is
another random choice of blocks, for scoring from train and validation and for repair from train, and another seed for
what is random. Prints Markdown tables of means, with the smallest and the largest. Costs are medians of five passes
in turns, as multiples of a plain forward pass over the same tokens.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import PruningAndFineTuningColab as nb


def spread(values):
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


def choose(blocks, number, seed):
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:number]]


def costs(model, few):
    """Medians of five passes in turns, as multiples of the first."""

    @torch.no_grad()
    def plain():
        with nb.autocast(model.device):
            model(few, use_cache=False)

    def bare():
        with nb.without_gates(model):
            plain()

    jobs = {"plain forward pass without gates": bare, "with open gates": plain} | {
        name: lambda name=name: nb.get_strategy(name).score(model, few) for name in ("entropy", "gradient", "fisher")
    }
    seconds = {name: [] for name in jobs}
    for _ in range(6):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    return {name: value / first for name, value in medians.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="*", default=["0.1", "0.3", "0.5"])
    parser.add_argument("--strategies", nargs="+", default=list(nb.STRATEGIES))
    parser.add_argument("--calibrations", type=int, default=1)
    parser.add_argument("--cost", action="store_true", help="also time the scoring")
    chosen, rest = parser.parse_known_args()
    settings = dataclasses.replace(
        nb.choose_sources(nb.read_settings(rest)),
        sweep_strategies=" ".join(chosen.strategies),
        sweep_levels=" ".join(chosen.levels),
    )
    device = nb.find_device(settings.device)
    run = nb.Run(settings, device, nb.find_precision(device, settings.precision))
    text = nb.load_text(settings)
    tokenizer, model = nb.load_model(
        nb.make_demo(text["train"]) if settings.model == "demo" else settings.model, device
    )
    blocks = nb.pack_all(text, tokenizer, model, settings)
    test = blocks["test"][: settings.eval_blocks or None]
    run.metrics["blocks"] = {split: len(part) for split, part in blocks.items()} | {"tested": len(test)}
    nb.add_gates(model)
    if chosen.levels:
        run.metrics["perplexity"]["dense"] = dense = nb.perplexity(model, test)
        results = {}
        for seed in range(chosen.calibrations):
            calibration = choose(torch.cat([blocks["train"], blocks["validation"]]), settings.calibration_blocks, seed)
            texts = (calibration, choose(blocks["train"], settings.repair_blocks, seed), test)
            own = dataclasses.replace(settings, seed=seed)
            for point in nb.sweep(model, texts, own, nb.sweep_file(run, own, texts)):
                results.setdefault((point["strategy"], f"{point['level']:.0%}"), []).append(point)
        levels = list(dict.fromkeys(level for _, level in results))
        for kind in ("pruned", "repaired") if settings.repair else ("pruned",):
            print(f"\n| {kind} | " + " | ".join(levels) + " |\n|" + "---|" * (len(levels) + 1))
            for name in chosen.strategies:
                print(
                    f"| {name} | "
                    + " | ".join(spread([point[kind] for point in results[name, level]]) for level in levels)
                    + " |"
                )
        print(f"\nDense: {dense:.2f}. {chosen.calibrations} choices of calibration text. {nb.conditions(run.metrics)}")
    if chosen.cost:
        for name, ratio in costs(model, blocks["validation"][:4]).items():
            print(f"{name}: {ratio:.2f} x")


if __name__ == "__main__":
    main()
