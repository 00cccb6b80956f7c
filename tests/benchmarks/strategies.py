"""Strategies side by side on one model: test perplexity after pruning and after repair, without fine-tuning.

    python tests/benchmarks/strategies.py --levels 0.1 0.3 0.5 --calibrations 3 --cost OPTIONS

OPTIONS are those of PruningAndFineTuningColab.py: --model, --train-file, --eval-blocks, ... Every calibration is
another random choice of blocks, for scoring from train and validation and for repair from train, and another seed for
what is random. Prints Markdown tables of means, with the smallest and the largest. Costs are medians of five passes
in turns, as multiples of a plain forward pass over the same tokens.
"""

import contextlib
import dataclasses
import statistics
import sys
import time

import torch
from common import begin, head, nb, parser_for, say


def spread(values):
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


def choose(blocks, number, seed):
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:number]]


def costs(model, few):
    """Medians of five passes in turns, as multiples of the first."""

    @torch.no_grad()
    def forward(model):
        with nb.number_format(model.device):
            model(few.to(model.device), use_cache=False).logits[0, -1, 0].item()

    bare = nb.remove_gates(nb.sharing_copy(model))
    jobs = {"plain forward pass without gates": lambda: forward(bare), "with open gates": lambda: forward(model)}
    for name in ("entropy", "gradient", "fisher"):
        jobs[name] = lambda name=name: nb.get_strategy(name).score(model, few)
    seconds = {name: [] for name in jobs}
    for _ in range(6):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return {name: value / next(iter(medians.values())) for name, value in medians.items()}


def points(run, model, blocks, chosen):
    """(strategy, level) -> points, one for each choice of text."""
    found, everything = {}, torch.cat([blocks["train"], blocks["validation"]])
    for seed in range(chosen.calibrations):
        calibration = choose(everything, run.settings.calibration_blocks, seed)
        texts = (choose(blocks["train"], run.settings.repair, seed), blocks["tested"])
        for name in chosen.strategies:
            for level in chosen.levels:
                own = dataclasses.replace(run.settings, seed=seed, strategy=name, pruning_level=level)
                importance = nb.scores_of(run, model, calibration, own)
                found.setdefault((name, level), []).append(nb.try_level(run, model, importance, texts, own))
    return found


def main():
    parser = parser_for(__doc__)
    parser.add_argument("--levels", nargs="*", type=float, default=[0.1, 0.3, 0.5])
    parser.add_argument("--strategies", nargs="+", default=list(nb.STRATEGIES))
    parser.add_argument("--calibrations", type=int, default=1)
    parser.add_argument("--cost", action="store_true", help="also time the scoring")
    chosen, rest = parser.parse_known_args()
    run, _, model, blocks = begin(rest)
    if chosen.levels:
        with contextlib.redirect_stdout(sys.stderr):
            dense, found = nb.perplexity(model, blocks["tested"]), points(run, model, blocks, chosen)
        for kind in ("pruned", "repaired") if run.settings.repair else ("pruned",):
            print()
            head(kind, *(f"{level:.0%}" for level in chosen.levels))
            for name in chosen.strategies:
                say(name, *(spread([point[kind] for point in found[name, level]]) for level in chosen.levels))
        print(f"\nDense: {dense:.2f}. {chosen.calibrations} choices of calibration text. {nb.conditions(run.metrics)}")
    if chosen.cost:
        for name, ratio in costs(model, blocks["validation"][:4]).items():
            print(f"{name}: {ratio:.2f} x")


if __name__ == "__main__":
    main()
