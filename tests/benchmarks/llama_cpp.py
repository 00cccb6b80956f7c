"""Dense and pruned models in llama.cpp: file size, perplexity, speed of prompts and of writing, in turns.

    pip install -r tests/requirements-llama.txt
    python tests/benchmarks/llama_cpp.py --model SmolLM2.gguf --train-file $D/valid.txt --test-file $D/test.raw.txt \
        --strategy fisher --cases heads:0.3 heads:0.3:groups heads:0.5 heads:0.5:groups both:0.2

Takes the options of the notebook; a case is what is pruned, the level, and a value of `uniform` (no, groups, yes).
Repaired, not fine-tuned. Median of five, in turns.
"""

import dataclasses
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import gguf
import torch
from common import begin, close, closed_in, head, nb, parser_for, say, scores
from llama_cpp import rows_of


def perplexity(llm, blocks):
    losses = []
    for block in blocks:
        llm._clear_context_state()
        rows = torch.from_numpy(rows_of(llm, block.tolist()))
        losses.append(nb.nll(rows[None], block[None]).item())
    return math.exp(statistics.mean(losses))


def seconds(llm, prompt, written=32):
    """(seconds of reading a prompt, of writing tokens one by one)"""
    llm._clear_context_state()
    start = time.perf_counter()
    past = llm._eval_tokens(prompt, 0)
    middle = time.perf_counter()
    for _ in range(written):
        past = llm._eval_tokens([prompt[0]], past)
    return middle - start, time.perf_counter() - middle


def main():
    parser = parser_for(__doc__)
    cases = ["heads:0.3", "heads:0.3:groups", "heads:0.5", "heads:0.5:groups"]
    parser.add_argument("--cases", nargs="+", default=cases)
    parser.add_argument("--bits", default="f16")
    own, rest = parser.parse_known_args()
    from llama_cpp_py_sync import Llama

    run, tokenizer, model, blocks = begin(rest)
    test, settings, importance, models = blocks["tested"], run.settings, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for case in ["heads:0", *own.cases]:
            prune, level, uniform = (*case.split(":"), "no")[:3]
            now = dataclasses.replace(settings, prune=prune, pruning_level=level, uniform=uniform)
            nb.prune_only(model, prune)
            nb.set_gates(model, torch.ones_like(nb.get_gates(model)))
            fixed = model
            if level != "0":
                importance[prune] = importance[prune] if prune in importance else scores(model, blocks, now)
                close(model, importance[prune], now)
                fixed = nb.repair(model, blocks["repair"])
            small, file = nb.compact(fixed), Path(folder, f"{len(models)}.gguf")
            words = {"format": own.bits, "name": case, "base": settings.model, "description": case}
            nb.write_gguf(file, small, tokenizer, settings.model, words)
            written = sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(file).tensors)
            closed, _ = closed_in(model, nb.get_gates(model))
            models[case] = (file, closed, small.num_parameters(), written, nb.perplexity(small, test))
            print(case, models[case], file=sys.stderr, flush=True)
        opened = {case: Llama(str(file), n_ctx=1024, n_batch=512) for case, (file, *_) in models.items()}
        prompt, times = test[0].tolist(), {case: [] for case in opened}
        for _ in range(6):
            for case, llm in opened.items():
                times[case].append(seconds(llm, prompt))
        middle = {case: [statistics.median(part) for part in zip(*rows[1:])] for case, rows in times.items()}
        head("", "heads closed", "parameters, million", "in the file, million", "file, MB", "perplexity here",
             "in llama.cpp", "prompt", "writing")  # fmt: skip
        for case, (file, closed, parameters, written, here) in models.items():
            faster = [before / after for before, after in zip(middle["heads:0"], middle[case])]
            numbers = (parameters / 1e6, written / 1e6, file.stat().st_size / 1e6)
            say(case, closed, *(f"{number:.1f}" for number in numbers), f"{here:.2f}",
                f"{perplexity(opened[case], test):.2f}", *(f"{ratio:.2f} x" for ratio in faster))  # fmt: skip


if __name__ == "__main__":
    main()
