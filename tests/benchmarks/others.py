"""Our pruning beside that of others, on the same OPT model, text and level: perplexity after pruning and fine-tuning.

    python3 -m venv tp && tp/bin/pip install 'torch>=2.9,<2.14' torch-pruning==1.6.0 transformers==4.46.3 safetensors
    python tests/benchmarks/others.py --torch-pruning tp/bin/python OPTIONS

OPTIONS are those of PruningAndFineTuningColab.py; --model has to be a local OPT. The user's original rule is
`entropy-literal`, Michel et al.'s score is `gradient`. Torch-Pruning chooses heads in a process of its own, under a
time limit, because it cannot trace the models of transformers 5; its choice is then closed here with gates, which
must give the perplexity that it measured itself.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import PruningAndFineTuningColab as nb


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-pruning", required=True, help="a Python that has torch-pruning")
    parser.add_argument("--limit", type=float, default=600, help="seconds that Torch-Pruning may take")
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
    open_gates = nb.get_gates(model)

    rows, versions = [], ""

    def row(name, closed, pruned, model, seconds):
        tuned = nb.fine_tune(run, f"row_{len(rows)}", lambda: nb.compact(model), blocks, settings)
        rows.append((name, closed, pruned, nb.perplexity(tuned, test), seconds))
        print(rows[-1], file=sys.stderr)

    row("dense", 0, nb.perplexity(model, test), model, None)
    for name in ("entropy-literal", "gradient", "learned"):
        nb.set_gates(model, open_gates)
        start = time.perf_counter()
        options = nb.options_for(dataclasses.replace(settings, strategy=name))
        gates = nb.choose_gates(
            nb.get_strategy(name, **options).score(model, calibration), settings.pruning_level, settings.min_heads
        )
        seconds = time.perf_counter() - start
        nb.set_gates(model, gates)
        closed = int((gates == 0).sum())
        row(name, closed, nb.perplexity(model, test), model, seconds)
        if name == "learned":
            start = time.perf_counter()
            fixed = nb.repair(model, nb.evenly_spaced(blocks["train"], settings.repair_blocks))
            row(
                "learned + repair (ours)",
                closed,
                nb.perplexity(fixed, test),
                fixed,
                seconds + time.perf_counter() - start,
            )
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"calibration": calibration, "test": test}, f"{folder}/blocks.pt")
        for kind in ("magnitude", "taylor"):
            command = [
                chosen.torch_pruning,
                str(Path(__file__).with_name("torch_pruning_heads.py")),
                settings.model,
                f"{folder}/blocks.pt",
                kind,
                str(settings.pruning_level),
                f"{folder}/out.json",
            ]
            try:
                subprocess.run(command, check=True, timeout=chosen.limit)
            except subprocess.TimeoutExpired:
                rows.append((f"Torch-Pruning, {kind}: not back after {chosen.limit:g} s", None, None, None, None))
                continue
            found = json.loads(Path(folder, "out.json").read_text())
            gates = torch.tensor(
                [[float(head in kept) for head in range(open_gates.shape[1])] for kept in found["kept"]]
            )
            nb.set_gates(model, gates)
            pruned, versions = nb.perplexity(model, test), found["versions"]
            if abs(pruned / found["perplexity"] - 1) > 1e-3:
                raise RuntimeError(f"Torch-Pruning measured {found['perplexity']}, gates give {pruned}")
            row(f"Torch-Pruning, {kind}", int((gates == 0).sum()), pruned, model, found["seconds"])

    unit = next(seconds for name, *_, seconds in rows if name == "gradient")
    print("| | heads closed | pruned | fine-tuned | time to choose, gradient = 1 |\n|---|---|---|---|---|")
    for name, closed, pruned, after, seconds in rows:
        cells = (
            [closed, f"{pruned:.2f}", f"{after:.2f}", "" if seconds is None else f"{seconds / unit:.1f}"]
            if pruned
            else [""] * 4
        )
        print(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    print(f"\n{nb.conditions(run.metrics)} Torch-Pruning ran with {versions}.")


if __name__ == "__main__":
    main()
