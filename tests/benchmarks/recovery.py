"""Fine-tuning settings, one changed at a time: the pruned and repaired model beside the dense one, same budget.

    python tests/benchmarks/recovery.py --vary warmup=0,0.3 weight_decay=0,0.1 distillation=0.5,1 teacher=0.5,1 OPTIONS

OPTIONS are those of PruningAndFineTuningColab.py. `teacher` is distillation from the fine-tuned dense model instead
of the dense one. Heads are chosen and repaired once. The settings are to be chosen by the validation column; the test
column only reports.
"""

import argparse
import copy
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import PruningAndFineTuningColab as nb


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vary", nargs="+", default=[], metavar="NAME=VALUE,...")
    chosen, rest = parser.parse_known_args()
    settings = nb.choose_sources(nb.read_settings(rest))
    device = nb.find_device(settings.device)
    run = nb.Run(settings, device, nb.find_precision(device, settings.precision))
    text = nb.load_text(settings)
    tokenizer, model = nb.load_model(settings.model, device)
    blocks = nb.pack_all(text, tokenizer, model, settings)
    test, calibration = (
        blocks["test"][: settings.eval_blocks or None],
        blocks["validation"][: settings.calibration_blocks],
    )
    run.metrics["blocks"] = {split: len(part) for split, part in blocks.items()} | {"tested": len(test)}
    nb.add_gates(model)
    dense = copy.deepcopy(model)
    importance = nb.get_strategy(settings.strategy, **nb.options_for(settings)).score(model, calibration)
    nb.set_gates(model, nb.choose_gates(importance, settings.pruning_level, settings.min_heads))
    pruned = nb.repair(model, nb.evenly_spaced(blocks["train"], settings.repair_blocks))

    def tune(start, settings, teacher=None):
        source = pruned if start is nb.compact else dense
        tuned = nb.fine_tune(run, "tuned", lambda: start(source), blocks, settings, teacher=teacher)
        best = min(value for _, value in run.metrics["training"]["tuned"]["history"]["perplexity"])
        return tuned, best, nb.perplexity(tuned, test)

    print(
        "| | pruned: validation | test | dense: validation | test | gap, validation | test |\n" + "|---" * 7 + "|",
        flush=True,
    )

    def row(name, pruned, dense):
        print(
            f"| {name} | {pruned[1]:.3f} | {pruned[2]:.3f} | {dense[1]:.3f} | {dense[2]:.3f} | "
            f"{pruned[1] / dense[1] - 1:+.1%} | {pruned[2] / dense[2] - 1:+.1%} |",
            flush=True,
        )

    nothing = [(None, nb.perplexity(m, blocks["validation"][:16]), nb.perplexity(m, test)) for m in (pruned, dense)]
    row("before fine-tuning", *nothing)
    control = tune(copy.deepcopy, settings)
    row("defaults", tune(nb.compact, settings), control)
    for name, _, values in (words.partition("=") for words in chosen.vary):
        for value in values.split(","):
            own = dataclasses.replace(settings, **{"distillation" if name == "teacher" else name: float(value)})
            if name in ("distillation", "teacher"):
                row(f"{name} {value}", tune(nb.compact, own, dense if name == "distillation" else control[0]), control)
            else:
                row(f"{name} {value}", tune(nb.compact, own), tune(copy.deepcopy, own))
    print(f"\n{nb.conditions(run.metrics)}")


if __name__ == "__main__":
    main()
