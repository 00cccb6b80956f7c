"""Heads, neurons and both at equal parameters: pruned, repaired, and fine-tuned beside the dense model.

    python tests/benchmarks/neurons.py --model opt-bytes --train-file $D/valid.txt --test-file $D/test.raw.txt \
        --block-length 256 --batch-size 8 --eval-blocks 60 --steps 100

Takes the options of the notebook, --shares (of the parameters of all layers), --kinds and --steps. The last column has
the heads and the neurons that are left, layer by layer. Heads and neurons are pruned to the level that removes as many
parameters as `both` does.
"""

import argparse
import copy
import dataclasses
import itertools

from common import begin, close, closed_in, head, nb, parser_for, say, scores, trained


def told(model, kind):
    """A copy of a model, told what is pruned in it, with open gates."""
    model = nb.sharing_copy(model)
    nb.prune_only(model, kind)
    return model


def main():
    parser = parser_for(__doc__)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.05, 0.1, 0.2])
    parser.add_argument("--kinds", nargs="+", default=["heads", "neurons", "both"])
    parser.add_argument("--steps", nargs="*", type=int, default=[100], help="of fine-tuning, for each its own columns")
    parser.add_argument("--same-time", action=argparse.BooleanOptionalAction, default=True)
    own, rest = parser.parse_known_args()
    run, _, dense, blocks = begin(rest)
    settings, test = run.settings, blocks["tested"]
    costs = {kind: nb.unit_costs(told(dense, kind)).sum().item() for kind in ("heads", "neurons", "both")}

    def fine_tuned(model, steps):
        """Test perplexity of a copy of the model after so many steps of fine-tuning."""
        now = dataclasses.replace(settings, max_steps=steps)
        return nb.perplexity(trained(run, copy.deepcopy(model), blocks, now)[0], test)

    plain = nb.remove_gates(nb.sharing_copy(dense))
    words = ", ".join(f"after {steps} steps {fine_tuned(plain, steps):.3f}" for steps in own.steps)
    print(f"{settings.model}, {settings.strategy}: dense {nb.perplexity(dense, test):.3f}, {words}\n")
    longer = ["for the same time (steps)"] * own.same_time
    columns = [column for steps in own.steps for column in (f"after {steps} steps", *longer)]
    head("parameters of the layers", "kind", "heads closed", "neurons closed", "pruned", "repaired", *columns, "left")
    for share, kind in itertools.product(own.shares, own.kinds):
        if (level := share * costs["both"] / costs[kind]) >= 0.9:
            continue
        model, now = told(dense, kind), dataclasses.replace(settings, prune=kind, pruning_level=level)
        gates = close(model, scores(model, blocks, now), now)
        fixed = nb.repair(model, blocks["repair"])
        small = nb.compact(fixed)
        cells = [f"{nb.perplexity(each, test):.3f}" for each in (model, fixed)]
        if own.steps and own.same_time:
            speeds = nb.tokens_per_second({"dense": plain, "compact": small}, test[:8], training=True, rounds=7)
        for steps in own.steps:
            cells.append(f"{fine_tuned(small, steps):.3f}")
            if own.same_time:
                more = round(steps * speeds["compact"] / speeds["dense"])
                cells.append(f"{fine_tuned(small, more):.3f} ({more})")
        parts = [part for kind in ("heads", "neurons") if (part := nb.describe_units(model, gates)[kind])]
        left = "; ".join(" ".join(map(str, part["open_per_layer"])) for part in parts)
        say(f"{share:.1%}", kind, *closed_in(model, gates), *cells, left)


if __name__ == "__main__":
    main()
