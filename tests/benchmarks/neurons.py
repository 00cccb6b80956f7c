"""Heads, neurons and both at equal parameters: pruned, repaired, and fine-tuned beside the dense model.

    python tests/benchmarks/neurons.py --model opt-bytes --train-file $D/valid.txt --test-file $D/test.raw.txt \
        --block-length 256 --batch-size 8 --eval-blocks 60 --steps 100
    python tests/benchmarks/neurons.py --speed        # GPT-2-small shapes: measured speed beside the arithmetic

Takes the options of the notebook, --shares (of the parameters of all layers), --kinds and --steps. The last column has
the heads and the neurons that are left, layer by layer. Heads and neurons are pruned to the level that removes as many
parameters as `both` does.
"""

import argparse
import contextlib
import copy
import dataclasses
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

import torch
import transformers

import PruningAndFineTuningColab as nb

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def told(model, kind):
    """The model, told what is pruned in it, with open gates."""
    nb.remove_gates(model)
    model.prunes = kind
    nb.add_gates(model)
    return model


def speed():
    """20 % of the parameters of GPT-2's layers, by Fisher on random tokens, cut out: speed in turns."""
    torch.manual_seed(0)
    plain = transformers.GPT2LMHeadModel(transformers.GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()
    print("| kind | tokens | by arithmetic | measured | measured / arithmetic |\n|---|---|---|---|---|")
    for kind, multiple in (("heads", 1), ("neurons", 1), ("neurons", 32), ("both", 1), ("both", 32)):
        model = told(copy.deepcopy(plain), kind)
        level = 0.2 if kind == "both" else min(0.2 * total_cost(plain, "both") / total_cost(plain, kind), 0.9)
        settings = nb.Settings(prune=kind, pruning_level=level, round_neurons=multiple)
        nb.set_gates(model, nb.gates_for(model, nb.get_strategy("random").score(model), settings))
        small = nb.compact(model)
        for shape in ((1, 512), (4, 256)):
            batch = torch.randint(0, 50257, shape)
            speeds = nb.tokens_per_second({"dense": plain, "compact": small}, batch, rounds=7)
            wanted = nb.count_flops(plain, batch) / nb.count_flops(small, batch)
            ratio = speeds["compact"] / speeds["dense"]
            print(
                f"| {kind}, multiples of {multiple} | {shape[0]} x {shape[1]} | {wanted:.3f} | {ratio:.3f} | "
                f"{ratio / wanted:.1%} |",
                flush=True,
            )


def total_cost(model, kind):
    return nb.unit_costs(told(copy.deepcopy(model), kind)).sum().item()


def fine_tuned(folder, settings, model, blocks, test, steps):
    """Test perplexity of the model after so many steps of fine-tuning."""
    settings = dataclasses.replace(settings, output_dir=folder, resume="no", max_steps=str(steps), epochs=0.0)
    run = nb.Run(settings, torch.device("cpu"), nb.COMPUTING.dtype)
    with contextlib.redirect_stdout(sys.stderr):  # where the Trainer prints its log
        return nb.perplexity(nb.fine_tune(run, "row", lambda: copy.deepcopy(model), blocks, settings), test)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.05, 0.1, 0.2])
    parser.add_argument("--kinds", nargs="+", default=["heads", "neurons", "both"])
    parser.add_argument("--steps", nargs="*", type=int, default=[100], help="of fine-tuning, for each its own columns")
    parser.add_argument("--same-time", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--speed", action="store_true")
    own, rest = parser.parse_known_args()
    if own.speed:
        return speed()
    settings = nb.read_settings(rest)
    tokenizer, dense = nb.load_model(settings.model, torch.device("cpu"))
    nb.COMPUTING.dtype = nb.find_precision(torch.device("cpu"), settings.precision)
    nb.COMPUTING.batch_size = settings.batch_size
    blocks = nb.pack_all(nb.load_text(settings), tokenizer, dense, settings)
    test, calibration = (
        blocks["test"][: settings.eval_blocks or None],
        blocks["validation"][: settings.calibration_blocks],
    )
    text = nb.evenly_spaced(blocks["train"], settings.repair_blocks)
    costs = {kind: total_cost(dense, kind) for kind in ("heads", "neurons", "both")}
    with tempfile.TemporaryDirectory() as folder:
        untouched = nb.perplexity(dense, test)
        controls = {steps: fine_tuned(folder, settings, dense, blocks, test, steps) for steps in own.steps}
        words = ", ".join(f"after {steps} steps {value:.3f}" for steps, value in controls.items())
        print(f"{settings.model}, {settings.strategy}: dense {untouched:.3f}, {words}\n")
        longer = " for the same time (steps) |" * own.same_time
        columns = "".join(f" after {steps} steps |{longer}" for steps in own.steps)
        print(
            f"| parameters of the layers | kind | heads closed | neurons closed | pruned | repaired |{columns} left |"
        )
        print("|---" * (7 + (1 + own.same_time) * len(own.steps)) + "|")
        for share in own.shares:
            for kind in own.kinds:
                level = share * costs["both"] / costs[kind]
                if level >= 0.9:
                    continue
                model = told(copy.deepcopy(dense), kind)
                chosen = dataclasses.replace(settings, prune=kind, pruning_level=level)
                importance = nb.get_strategy(chosen.strategy, **nb.options_for(chosen)).score(model, calibration)
                gates = nb.gates_for(model, importance, chosen)
                nb.set_gates(model, gates)
                fixed = nb.repair(model, text)
                cells = [f"{nb.perplexity(model, test):.3f}", f"{nb.perplexity(fixed, test):.3f}"]
                small = nb.compact(fixed)
                if own.steps:
                    speeds = nb.tokens_per_second({"dense": dense, "small": small}, test[:8], training=True, rounds=7)
                for steps in own.steps:
                    cells.append(f"{fine_tuned(folder, settings, small, blocks, test, steps):.3f}")
                    if own.same_time:
                        longer = round(steps * speeds["small"] / speeds["dense"])
                        cells.append(f"{fine_tuned(folder, settings, small, blocks, test, longer):.3f} ({longer})")
                heads, neurons = nb.heads_part(model, gates), nb.describe_neurons(model, gates)
                left = "; ".join(" ".join(map(str, part)) for part in (
                    heads.sum(1).int().tolist(), neurons["open_per_layer"] if neurons else []))  # fmt: skip
                cells = [
                    f"{share:.1%}",
                    kind,
                    int((heads == 0).sum()),
                    neurons["closed"] if neurons else 0,
                    *cells,
                    left,
                ]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
