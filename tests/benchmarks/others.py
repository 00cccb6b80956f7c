"""Our pruning beside that of others, on the same OPT model and text, with equally many parameters removed.

    python3 -m venv tp && tp/bin/pip install 'torch>=2.9,<2.14' torch-pruning==1.6.1 transformers==4.46.3 safetensors
    python tests/benchmarks/others.py --torch-pruning tp/bin/python --prune both --pruning-level 0.2 OPTIONS

OPTIONS are those of PruningAndFineTuningColab.py; --model has to be a local OPT. Perplexity after pruning, after
repair, and after fine-tuning. The user's original rule is `entropy-literal` (heads only), Michel et al.'s score is
`gradient`. `Wanda` is weight norm x input norm (Sun et al. 2023, https://arxiv.org/abs/2306.11695), the same share in
every layer, as theirs. Torch-Pruning chooses in a process of its own, under a time limit, because it cannot trace the
models of transformers 5; its choice is then closed here with gates, which must give the perplexity that it measured.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import begin, closed_in, head, nb, parser_for, say, scores, trained


@torch.no_grad()
def wanda(model, blocks):
    """Weight norm x norm of what comes in, as a rank within heads and neurons of the layer: (layers, units)."""
    powers = {}

    def add(projection, args):
        inputs = args[0].reshape(-1, args[0].shape[-1]).float()
        powers[projection] = powers.get(projection, 0) + inputs.square().sum(0)

    units = nb.all_units(model)
    with nb.hooks(part.projection.register_forward_pre_hook(add) for part in units):
        for batch in blocks.split(4):
            model(batch.to(model.device), use_cache=False)
    rows = []
    for layer in nb.find_units(model):
        parts = []
        for part in layer:
            norms = powers[part.projection].sqrt().view(part.number, part.size, 1)
            scores = (part.output_weight.float().abs() * norms).flatten(1).sum(1)
            parts.append((scores.argsort().argsort() + 0.5) / part.number)
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def torch_pruning(python, limit, folder, kind, settings, model):
    """(gates (layers, units), what it measured) or None, where it was not back in time."""
    command = [python, str(Path(__file__).with_name("torch_pruning_opt.py")), settings.model, f"{folder}/blocks.pt"]
    command += [kind, settings.prune, str(settings.pruning_level), f"{folder}/out.json"]
    try:
        subprocess.run(command, check=True, timeout=limit, stdout=sys.stderr)
    except subprocess.TimeoutExpired:
        return None
    found = json.loads(Path(folder, "out.json").read_text())
    rows = []
    for number, layer in enumerate(nb.find_units(model)):
        left = [found[part.kind][number] for part in layer]
        rows.append([float(unit in kept) for part, kept in zip(layer, left) for unit in range(part.number)])
    return torch.tensor(rows), found


def main():
    parser = parser_for(__doc__)
    parser.add_argument("--torch-pruning", required=True, help="a Python that has torch-pruning")
    parser.add_argument("--limit", type=float, default=600, help="seconds that Torch-Pruning may take")
    chosen, rest = parser.parse_known_args()
    run, _, model, blocks = begin(rest)
    settings, test, calibration = run.settings, blocks["tested"], blocks["calibration"]
    open_gates, costs, versions = nb.get_gates(model), nb.unit_costs(model), ""
    head("", "parameters of what is pruned", "heads closed", "neurons closed", "pruned", "repaired", "fine-tuned",
         "time to choose, gradient = 1")  # fmt: skip

    def row(name, gates, seconds):
        nb.set_gates(model, gates)
        values = [nb.perplexity(model, test)]
        fixed = nb.repair(model, blocks["repair"]) if not gates.all() else model
        tuned = trained(run, nb.compact(fixed), blocks, settings)[0]
        values += [nb.perplexity(fixed, test), nb.perplexity(tuned, test)]
        share = ((costs * (gates == 0)).sum() / costs.sum()).item()
        cells = [*closed_in(model, gates), *(f"{value:.3f}" for value in values)]
        say(name, f"{share:.1%}", *cells, f"{seconds:.1f}")
        return share

    with tempfile.TemporaryDirectory() as folder:
        torch.save({"calibration": calibration, "test": test}, f"{folder}/blocks.pt")
        start = time.perf_counter()
        nb.get_strategy("gradient").score(model, calibration)
        unit = time.perf_counter() - start
        row("dense", open_gates, 0)
        level = settings.pruning_level
        for kind in ("magnitude", "taylor"):
            answer = torch_pruning(chosen.torch_pruning, chosen.limit, folder, kind, settings, model)
            if answer is None:
                say(f"Torch-Pruning, {kind}: not back after {chosen.limit:g} s", *[""] * 7)
                continue
            gates, found = answer
            nb.set_gates(model, gates)
            pruned, versions = nb.perplexity(model, test), found["versions"]
            if abs(pruned / found["perplexity"] - 1) > 1e-3:
                raise RuntimeError(f"Torch-Pruning measured {found['perplexity']}, gates give {pruned}")
            level = row(f"Torch-Pruning, {kind}", gates, found["seconds"] / unit)
    for name in ("entropy-literal", "magnitude", "gradient", "Wanda", "fisher", "learned"):
        if name == "entropy-literal" and settings.prune != "heads":
            continue
        nb.set_gates(model, open_gates)
        now = dataclasses.replace(settings, pruning_level=level, strategy="fisher" if name == "Wanda" else name)
        start = time.perf_counter()
        importance = wanda(model, calibration) if name == "Wanda" else scores(model, blocks, now)
        gates = nb.gates_for(model, importance, now)
        row(f"{name} (ours)" if name in ("fisher", "learned") else name, gates, (time.perf_counter() - start) / unit)
    print(f"\n{nb.conditions(run.metrics)} Torch-Pruning ran with {versions}.")


if __name__ == "__main__":
    main()
