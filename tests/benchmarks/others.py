"""Our pruning beside that of others: the same model, text and blocks, equally many parameters removed from the layers.

    python tests/benchmarks/others.py --levels 0.1 0.2 --model MODEL --prune both OPTIONS
    cat TABLES | python tests/benchmarks/others.py --draw .github/assets/others.png

OPTIONS are those of PruningAndFineTuningColab.py. A row: perplexity after pruning, after the method's own repair (only
FLAP's bias), after our repair, and after fine-tuning what that left. Each method is its paper's or its code's formula,
on the same calibration text; where keys are shared every query head counts for itself, with its share of them. Theirs
choose single neurons, ours, in wide layers, 64 at once.

- Torch-Pruning 1.6.1: GroupMagnitudeImportance and GroupTaylorImportance, both over the mean of a layer, heads and
  neurons ranked globally, each at the level. (The library itself, in transformers 4.46, closed the same units of the
  small OPT at 20 %, and 29 neurons more, because it rounds in every layer.)
- LLM-Pruner (https://arxiv.org/abs/2305.11627): element-wise Taylor, summed over a group; the same share in every layer
  but in the first and the last ones (4 and 2 of 32), which are left alone.
- Wanda-sp (the form of https://arxiv.org/abs/2306.11695 that FLAP compares with): |weight| x norm of the input, the
  same share in every layer; the inputs are those of the dense model.
- FLAP (https://arxiv.org/abs/2312.11983): variance of the input x squared weights, standardised in each layer and
  ranked globally; the mean of what is cut becomes a bias.
- 2SSP (https://arxiv.org/abs/2501.17771): neurons by the norm of their outputs, the same share in every layer, then
  whole attention modules, each time the one without which perplexity is lowest.
"""

import copy
import dataclasses
import math
import re
import sys
import time

import torch
from common import begin, closed_in, head, nb, parser_for, say, scores, trained
from matplotlib.ticker import MaxNLocator, NullLocator


def sums(model, change):
    """(layers, units) sums of change(weight) over all weights that a unit owns."""
    changed = nb.sharing_copy(model)
    for path, weight in list(changed.named_parameters()):
        owner, _, name = path.rpartition(".")
        setattr(changed.get_submodule(owner), name, torch.nn.Parameter(change(weight).detach(), False))
    return torch.stack([
        torch.cat([sum(part.float().flatten(1).sum(1) for part in [*nb.own_weights(units), units.output_weight])
                   for units in layer]) for layer in nb.find_units(changed)]).cpu()  # fmt: skip


def taylor(model, blocks):
    """(layers, units) sums of |weight x gradient of the mean loss|."""
    model.zero_grad()
    for batch in blocks.split(2):
        with nb.number_format(model.device):
            loss = nb.nll(model(batch.to(model.device), use_cache=False).logits, batch.to(model.device)).sum()
        (loss / len(blocks)).backward()
    found = sums(model, lambda weight: (weight * weight.grad).abs() if weight.grad is not None else weight * 0)
    model.zero_grad()
    return found


@torch.no_grad()
def inputs_seen(model, blocks):
    """Projection -> mean, variance and squares of its inputs over tokens, and the mean norm over texts: (inputs,)."""
    seen, tokens = {units.projection: torch.zeros(3, 1) for units in nb.all_units(model)}, blocks.numel()

    def add(projection, args):
        x = args[0].float().view(-1, blocks.shape[1], args[0].shape[-1])
        powers = x.square().sum(1)
        seen[projection] = seen[projection] + torch.stack([x.sum((0, 1)), powers.sum(0), powers.sqrt().sum(0)])

    with nb.hooks(projection.register_forward_pre_hook(add) for projection in seen), nb.number_format(model.device):
        for batch in blocks.split(2):
            model(batch.to(model.device), use_cache=False)
    return {projection: {"mean": total / tokens, "variance": (squares - total.square() / tokens) / (tokens - 1),
                         "squares": squares, "norm": norms / len(blocks)}
            for projection, (total, squares, norms) in seen.items()}  # fmt: skip


def by_inputs(model, seen, score):
    """(layers, units) means of score(units, seen, weight (inputs, outputs)) over a unit's inputs."""
    return torch.stack([
        torch.cat([score(units, seen[units.projection], nb.inputs_first(units.projection).float())
                   .view(units.number, -1).mean(1) for units in layer])
        for layer in nb.find_units(model)]).detach()  # fmt: skip


def over_layer_mean(importance, layout):
    """Heads and neurons, each over their mean in the layer."""
    parts = [part / part.mean(1, keepdim=True) for part in importance.split(sizes(importance, layout), dim=1)]
    return torch.cat(parts, dim=1)


def sizes(importance, layout):
    return [size for size in (layout.heads, importance.shape[1] - layout.heads) if size]


def ranked_by_kind(importance, level, layout):
    """Gates: the share `level` of all heads, and of all neurons, wherever they are."""
    return torch.cat([nb.choose_gates(part, level) for part in importance.split(sizes(importance, layout), 1)], 1)


def alike(importance, level, layout, first=0.0, last=1.0):
    """Gates: the same share in every layer between two, so much that it is the share `level` of all."""
    layers = len(importance)
    rows, gates = slice(round(first * layers), round(last * layers)), torch.ones_like(importance)
    share = level * layers / len(gates[rows])
    heads = [layout.heads] if layout.heads else []
    parts = zip(importance[rows].split(sizes(importance, layout), 1), [*map(nb.Layout, heads), nb.Layout(0)])
    gates[rows] = torch.cat([nb.close_alike(part, share, own) for part, own in parts], 1)
    return gates


def flap(model, seen, level, layout):
    """Gates by fluctuation, standardised in each layer (heads' squared, as in FLAP's code)."""

    def score(units, inputs, weight):
        metric = inputs["variance"] * weight.square().sum(1)
        metric = metric.square() if units.kind == "heads" else metric
        return (metric - metric.mean()) / metric.std()

    return nb.choose_gates(by_inputs(model, seen, score), level, 1, layout._replace(readers=1, chunk=1))


@torch.no_grad()
def with_means(model, seen):
    """A copy of a gated model to whose biases the mean of what is closed is added (FLAP)."""
    fixed = nb.with_own_outputs(model)
    for units, own in zip(nb.all_units(model), nb.all_units(fixed)):
        closed = (own.projection.gates == 0).repeat_interleave(units.size)
        lost = (seen[units.projection]["mean"] * closed) @ nb.inputs_first(own.projection).float()
        bias = own.projection.bias
        own.projection.bias = torch.nn.Parameter(lost if bias is None else bias + lost)
    return fixed


@torch.no_grad()
def two_stages(model, seen, block, level, layout):
    """Gates of 2SSP; its exponent 1.5, its second stage on one text (1, time)."""
    importance = by_inputs(model, seen, lambda units, inputs, weight: inputs["norm"])
    layers, neurons = len(importance), importance.shape[1] - layout.heads
    attention, mlp = layout.heads * layout.head_cost, neurons * layout.neuron_cost
    modules = round(layers * level ** (mlp / attention / 1.5)) if layout.heads else 0
    gates = torch.ones_like(importance)
    share = (level * (attention + mlp) * layers - modules * attention) / (mlp * layers)
    gates[:, layout.heads:] = nb.close_alike(importance[:, layout.heads:], share, nb.Layout(0))
    for _ in range(modules):
        left = [number for number in range(layers) if gates[number, : layout.heads].any()]
        values = {}
        for number in left:
            tried = gates.clone()
            tried[number, : layout.heads] = 0
            nb.set_gates(model, tried)
            values[number] = nb.perplexity(model, block)
        gates[min(values, key=values.get), : layout.heads] = 0
    nb.set_gates(model, torch.ones_like(gates))
    return gates


def methods(model, blocks, settings):
    """Name -> function that chooses gates (layers, units), with all gates open."""
    calibration, level, layout = blocks["calibration"], settings.pruning_level, nb.layout_of(model, settings)
    known = {}

    def ours(strategy, **more):
        def choose():
            now = dataclasses.replace(settings, strategy=strategy, **more)
            if strategy not in known:
                known[strategy] = scores(model, blocks, now)
            return nb.gates_for(model, known[strategy], now)
        return choose

    def wanda(units, inputs, weight):
        return (weight.abs() * inputs["squares"].sqrt()[:, None]).mean(1)

    def by_taylor(choose, *ends):
        return lambda: choose(over_layer_mean(taylor(model, calibration), layout), level, layout, *ends)

    return {
        "FLAP": lambda: flap(model, inputs_seen(model, calibration), level, layout),
        "LLM-Pruner, Taylor": by_taylor(alike, 4 / 32, 30 / 32),
        "Torch-Pruning, Taylor": by_taylor(ranked_by_kind),
        "2SSP": lambda: two_stages(model, inputs_seen(model, calibration), calibration[:1], level, layout),
        "Wanda-sp": lambda: alike(by_inputs(model, inputs_seen(model, calibration), wanda), level, layout),
        "Torch-Pruning, magnitude": lambda: ranked_by_kind(
            over_layer_mean(sums(model, torch.square), layout), level, layout),
        "magnitude": ours("magnitude"),
        "fisher (ours)": ours("fisher"),
        "learned (ours)": ours("learned"),
        "learned, uniform (ours)": ours("learned", uniform="yes"),
        "learned, groups (ours)": ours("learned", uniform="groups"),
    }  # fmt: skip


def number(value):
    return "" if math.isnan(value) else f"{value:.{3 if value < 10 else 2}f}"


def draw(path, rows):
    """Perplexity against parameters: pruned, after our repair and fine-tuned, a line for each method in the tables."""
    cells = [[cell.strip() for cell in row.strip()[1:-1].split("|")] for row in rows if row.startswith("|")]
    figure, points = nb.new_figure(13, 4.4), {}
    cells = [row for row in cells if row[0] not in ("method", "---")]
    for name, *_, parameters, pruned, _, repaired, tuned, _ in cells:
        values = (parameters.split()[0], pruned, repaired or pruned, tuned or math.nan)
        points.setdefault(name, []).append(tuple(map(float, values)))
    (dense,) = points.pop("dense")
    titles, highest = ("pruned", "after our repair", "then fine-tuned"), (3.4, 1.8, 1.8)
    for column, axes in enumerate(figure.subplots(1, 3)):
        for name, found in points.items():
            sizes, *values = zip(*sorted([dense, *found]))
            axes.plot(sizes, values[column], "o-" if "(ours)" in name else "o:", label=name)
        lowest = dense[1 + column]
        axes.set(xlabel="parameters, million", ylabel="test perplexity", title=titles[column], yscale="log",
                 ylim=(0.96 * lowest, highest[column] * lowest))  # fmt: skip
        axes.yaxis.set(major_locator=MaxNLocator(8), major_formatter="{x:g}", minor_locator=NullLocator())
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def main():
    parser = parser_for(__doc__)
    parser.add_argument("--levels", nargs="+", type=float, default=[0.1, 0.2])
    parser.add_argument("--only", default="", help="methods, a regular expression")
    parser.add_argument("--train", default="(?!)", help="methods to fine-tune, beside the dense model, alike")
    parser.add_argument("--draw", help="a picture to make of tables")
    chosen, rest = parser.parse_known_args()
    if chosen.draw:
        return draw(chosen.draw, sys.stdin)
    run, _, model, blocks = begin(rest)
    settings, test = run.settings, blocks["tested"]
    watched = blocks | {"validation": blocks["validation"][-4:]}  # to keep the best moment by
    dense, costs = nb.perplexity(model, test), nb.unit_costs(model)

    def tuned(name, start):
        """Test perplexity after fine-tuning, where that is wanted."""
        wanted = re.search(chosen.train, name)
        return nb.perplexity(trained(run, start, watched, settings)[0], test) if wanted else math.nan

    plain = nb.remove_gates(nb.sharing_copy(model))
    control = tuned("dense", copy.deepcopy(plain))
    start = time.perf_counter()
    nb.Gradient().score(model, blocks["calibration"])
    unit = time.perf_counter() - start
    head("method", "level", "removed", "heads closed", "neurons closed", "parameters", "pruned", "own repair",
         "our repair", "fine-tuned", "time to choose, gradient = 1")  # fmt: skip
    say("dense", *[""] * 4, f"{plain.num_parameters() / 1e6:.2f} M", f"{dense:.2f}", "", "", number(control), "")
    for level in chosen.levels:
        for name, choose in methods(model, blocks, dataclasses.replace(settings, pruning_level=level)).items():
            if not re.search(chosen.only, name):
                continue
            nb.set_gates(model, torch.ones_like(costs))
            start = time.perf_counter()
            gates = choose()
            seconds = time.perf_counter() - start
            nb.set_gates(model, gates)
            values = [nb.perplexity(model, test), math.nan]
            if name == "FLAP":
                with nb.all_open(model):
                    seen = inputs_seen(model, blocks["calibration"])
                values[1] = nb.perplexity(with_means(model, seen), test)
            fixed = nb.repair(model, blocks["repair"])
            small = nb.compact(fixed)
            values += [nb.perplexity(fixed, test), tuned(name, copy.deepcopy(small))]
            share = ((costs * (gates == 0)).sum() / costs.sum()).item()
            cells = [*closed_in(model, gates), f"{small.num_parameters() / 1e6:.2f} M"]
            say(name, f"{level:.0%}", f"{share:.1%}", *cells, *map(number, values), f"{seconds / unit:.1f}")
    print(f"\n{nb.conditions(run.metrics)}")


if __name__ == "__main__":
    main()
