"""Prunes the heads of a small OPT with Torch-Pruning, for others.py, in a virtual environment of its own.

    python torch_pruning_heads.py FOLDER BLOCKS.pt magnitude|taylor LEVEL OUT.json

Writes which heads are left (found by looking for the rows of the old query weights among the new ones), the test
perplexity, and the seconds.
"""

import importlib.metadata
import json
import math
import sys
import time

import torch
import torch_pruning as tp
import transformers


@torch.no_grad()
def perplexity(model, blocks):
    total = sum(
        torch.nn.functional.cross_entropy(
            model(batch, use_cache=False).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        ).item()
        for batch in blocks.split(4)
    )
    return math.exp(total / blocks[:, 1:].numel())


def main(folder, blocks, kind, level, out):
    blocks = torch.load(blocks)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.config.use_cache = False
    attentions = [layer.self_attn for layer in model.model.decoder.layers]
    before = [attention.q_proj.weight.detach().clone() for attention in attentions]
    heads, head_dim = attentions[0].num_heads, attentions[0].head_dim
    start = time.perf_counter()
    importance = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}[
        kind
    ]()
    queries = {
        part: heads for attention in attentions for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    }
    everything_else = [
        module
        for module in model.modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding, torch.nn.LayerNorm)) and module not in queries
    ]
    pruner = tp.pruner.MetaPruner(
        model,
        blocks["calibration"][:1],
        importance=importance,
        pruning_ratio=float(level),
        prune_num_heads=True,  # at 0 nothing is pruned
        prune_head_dims=False,
        head_pruning_ratio=float(level),
        global_pruning=True,
        num_heads=queries,
        ignored_layers=everything_else,
        output_transform=lambda output: output.logits,
    )
    if kind == "taylor":
        for batch in blocks["calibration"].split(4):
            model(batch, labels=batch).loss.backward()
    pruner.step()
    seconds = time.perf_counter() - start
    kept = []
    for attention, old in zip(attentions, before):
        attention.num_heads = len(attention.q_proj.weight) // head_dim
        attention.embed_dim = attention.num_heads * head_dim
        rows = [int(torch.cdist(row[None], old).argmin()) for row in attention.q_proj.weight.detach()]
        kept.append(sorted({row // head_dim for row in rows}))
    result = {
        "kept": kept,
        "perplexity": perplexity(model, blocks["test"]),
        "seconds": seconds,
        "versions": f"torch-pruning {importlib.metadata.version('torch-pruning')}, transformers "
        f"{transformers.__version__}, torch {torch.__version__}",
    }
    with open(out, "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
