"""Peak RAM of every step of a run, in GB and in bytes a parameter: a random Llama, with all weights or with adapters.

    python tests/benchmarks/memory.py --billions 0.5 1.1 --train lora OPTIONS

OPTIONS are those of PruningAndFineTuningColab.py. The model is made in bf16, opened, pruned, repaired, trained for one
step, saved and opened again, in a process of its own, whose resident memory is looked at twenty times a second.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
import transformers
from common import nb, parser_for

SHAPES = {  # billions of parameters -> hidden size, layers, heads, key/value heads, neurons
    0.1: (768, 12, 12, 4, 2048), 0.5: (1280, 22, 20, 4, 3584), 1.1: (2048, 22, 32, 4, 5632),
    1.7: (2048, 24, 32, 32, 8192), 3.0: (3072, 28, 24, 8, 8192)}
STEPS = ("--dataset python-docs --prune both --strategy fisher --block-length 128 --max-steps 1 --eval-blocks 4 "
         "--calibration-blocks 8 --repair 8 --control yes").split()


def make(billions: float, folder: Path) -> int:
    """A random Llama in bf16, with a tokenizer; its number of parameters."""
    hidden, layers, heads, keys, neurons = SHAPES[billions]
    torch.set_default_dtype(torch.bfloat16)
    config = transformers.LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                                      num_key_value_heads=keys, intermediate_size=neurons, vocab_size=32000)
    model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    nb.demo_tokenizer(nb.python_docs()).save_pretrained(folder)
    return model.num_parameters()


def peaks(words: list[str]) -> tuple[list[tuple[str, int]], int]:
    """(step, most bytes of RAM in it) of a script's run, and its exit status."""
    with tempfile.TemporaryDirectory() as place:
        child = subprocess.Popen([sys.executable, "-u", nb.__file__, "--output-dir", place, *words],
                                 stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        highest, found = [0], []

        def watch():
            process = psutil.Process(child.pid)
            while child.poll() is None:
                highest[0] = max(highest[0], process.memory_info().rss)
                time.sleep(0.05)

        threading.Thread(target=watch, daemon=True).start()
        for line in child.stdout:
            if line.startswith("[") and " s, " in line:
                found.append((line[1:].partition(":")[0], highest[0]))
                highest[0] = 0
            elif "GB are free" in line or line.startswith("error"):
                print(line.strip(), flush=True)
        return found, child.wait()


def main():
    parser = parser_for(__doc__)
    parser.add_argument("--billions", nargs="+", type=float, choices=SHAPES, default=[0.5, 1.1])
    parser.add_argument("--train", nargs="+", choices=("all", "lora"), default=["lora"])
    chosen, rest = parser.parse_known_args()
    for billions in chosen.billions:
        with tempfile.TemporaryDirectory() as folder:
            number = make(billions, Path(folder))
            for way in chosen.train:
                found, status = peaks(["--model", folder, "--train", way, *STEPS, *rest])
                print(f"\n{number / 1e9:.2f} billion parameters, {way}, exit status {status}\n")
                rows = [[step, f"{size / 1e9:.2f}", f"{size / number:.1f}"] for step, size in found]
                rows.append(["highest", *max((row[1:] for row in rows), key=lambda row: float(row[0]))])
                print(nb.markdown_table(["step", "peak, GB", "bytes a parameter"], rows), flush=True)


if __name__ == "__main__":
    main()
