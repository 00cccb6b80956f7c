"""What cutting the closed heads out brings, and that it changes nothing.

    python tests/benchmarks/compact.py --levels 0.1 0.3 0.5 OPTIONS     a table for one model
    python tests/benchmarks/compact.py --gpt2-shapes                     speed of GPT-2-small shapes against arithmetic

OPTIONS are those of PruningAndFineTuningColab.py: --model, --train-file, --strategy, --eval-blocks, ... Speeds are
ratios of medians of nine passes in turns, in one process. 'reopened' is the perplexity of the saved folder, opened
again. (tests/test_compact.py opens such folders in a process that does not know the notebook.)
"""

import dataclasses
import tempfile
from pathlib import Path

import torch
from common import begin, close, expected_ratio, gpt2_small, head, nb, parser_for, say, scores, speed_ratio


def gpt2_shapes():
    """GPT-2 small, random weights, heads and neurons closed at random."""
    model = gpt2_small()
    head("closed", "tokens", "", "by arithmetic", "measured", "measured / arithmetic")
    for prune, level in (("heads", 0.5), ("neurons", 0.3), ("both", 0.2)):
        nb.prune_only(model, prune)
        settings = nb.Settings(prune=prune, pruning_level=level)
        close(model, nb.get_strategy("random").score(model), settings)
        small = nb.compact(model)
        for shape in ((1, 512), (4, 128), (1, 1024)):
            batch = torch.randint(0, 50257, shape)
            expected = expected_ratio(model, small, batch)
            for kind in ("forward", "training"):
                ratio = speed_ratio(model, small, batch, kind == "training")
                say(f"{level:.0%} of {prune}", f"{shape[0]} x {shape[1]}", kind, f"{expected:.3f} x", f"{ratio:.3f} x",
                    f"{ratio / expected:.2f}")  # fmt: skip


def main():
    parser = parser_for(__doc__)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--gpt2-shapes", action="store_true")
    chosen, rest = parser.parse_known_args()
    if chosen.gpt2_shapes:
        return gpt2_shapes()
    run, tokenizer, model, blocks = begin(rest)
    test, settings = blocks["tested"], run.settings
    importance, dense = scores(model, blocks, settings), nb.perplexity(model, test)
    bare = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    head("level", "parameters, M", "weights, MB", "KV cache, bytes/token", "forward, measured (arithmetic)", "training",
         "perplexity: gated", "compact", "reopened", "largest difference")  # fmt: skip
    say("dense", f"{model.num_parameters() / 1e6:.2f}", f"{bare:.1f}", f"{nb.cache_bytes(model):,}", 1, 1,
        f"{dense:.4f}", "", "", "")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for level in chosen.levels:
            close(model, importance, dataclasses.replace(settings, pruning_level=level))
            small, saved = nb.compact(model), Path(folder, f"{level}")
            nb.save_compact(small, tokenizer, saved)
            size = sum(file.stat().st_size for file in saved.glob("*.safetensors")) / 1e6
            reopened = nb.reopen(saved).to(model.device)
            values = [nb.perplexity(each, test) for each in (model, small, reopened)]
            forward, training = (speed_ratio(model, small, test[:1], kind) for kind in (False, True))
            say(f"{level:.0%}", f"{small.num_parameters() / 1e6:.2f}", f"{size:.1f}", f"{nb.cache_bytes(small):,}",
                f"{forward:.2f} ({expected_ratio(model, small, test[:1]):.2f})", f"{training:.2f}",
                *(f"{value:.4f}" for value in values), f"{nb.largest_difference(model, small, test[:1]):.0e}")


if __name__ == "__main__":
    main()
