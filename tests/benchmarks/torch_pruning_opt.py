"""Prunes a small OPT with Torch-Pruning, for others.py, in a virtual environment of its own.

    python torch_pruning_opt.py FOLDER BLOCKS.pt magnitude|taylor heads|neurons|both LEVEL OUT.json

Writes which heads and neurons are left (found by looking for the rows of the old weights among the new ones), the test
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


def rows_left(now, before):
    """Which rows of a weight are left."""
    return [int(torch.cdist(row[None], before).argmin()) for row in now.weight.detach()]


def main(folder, blocks, kind, prunes, level, out):
    blocks = torch.load(blocks)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.config.use_cache = False
    attentions = [layer.self_attn for layer in model.model.decoder.layers]
    layers, before = model.model.decoder.layers, []
    for layer in layers:
        before.append([part.weight.detach().clone() for part in (layer.self_attn.q_proj, layer.fc1)])
    heads, head_dim = attentions[0].num_heads, attentions[0].head_dim
    start = time.perf_counter()
    importance = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}[
        kind
    ]()
    queries = {
        part: heads for attention in attentions for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    }
    pruned = {*(queries if prunes != "neurons" else ()), *(layer.fc1 for layer in layers if prunes != "heads")}
    everything_else = [
        module
        for module in model.modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding, torch.nn.LayerNorm)) and module not in pruned
    ]
    pruner = tp.pruner.MetaPruner(
        model,
        blocks["calibration"][:1],
        importance=importance,
        pruning_ratio=float(level),
        prune_num_heads=prunes != "neurons",
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
    heads_left, neurons_left = [], []
    for layer, attention, (queries, inputs) in zip(layers, attentions, before):
        attention.num_heads = len(attention.q_proj.weight) // head_dim
        attention.embed_dim = attention.num_heads * head_dim
        heads_left.append(sorted({row // head_dim for row in rows_left(attention.q_proj, queries)}))
        neurons_left.append(sorted(rows_left(layer.fc1, inputs)))
    result = {
        "heads": heads_left,
        "neurons": neurons_left,
        "perplexity": perplexity(model, blocks["test"]),
        "seconds": seconds,
        "versions": f"torch-pruning {importlib.metadata.version('torch-pruning')}, transformers "
        f"{transformers.__version__}, torch {torch.__version__}",
    }
    with open(out, "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
