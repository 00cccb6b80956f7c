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
    total = 0.0
    for batch in blocks.split(4):
        rows = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += torch.nn.functional.cross_entropy(rows, batch[:, 1:].flatten(), reduction="sum").item()
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
    layers = model.model.decoder.layers
    attentions = [layer.self_attn for layer in layers]
    before = [[part.weight.detach().clone() for part in (layer.self_attn.q_proj, layer.fc1)] for layer in layers]
    heads, head_dim = attentions[0].num_heads, attentions[0].head_dim
    start = time.perf_counter()
    kinds = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
    queries = {part: heads for each in attentions for part in (each.q_proj, each.k_proj, each.v_proj)}
    pruned = {*(queries if prunes != "neurons" else ()), *(layer.fc1 for layer in layers if prunes != "heads")}
    weighted = (torch.nn.Linear, torch.nn.Embedding, torch.nn.LayerNorm)
    everything_else = [part for part in model.modules() if isinstance(part, weighted) and part not in pruned]
    pruner = tp.pruner.MetaPruner(
        model, blocks["calibration"][:1], importance=kinds[kind](), pruning_ratio=float(level),
        prune_num_heads=prunes != "neurons", prune_head_dims=False, head_pruning_ratio=float(level),
        global_pruning=True, num_heads=queries, ignored_layers=everything_else,
        output_transform=lambda output: output.logits,
    )  # fmt: skip
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
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    versions = f"torch-pruning {importlib.metadata.version('torch-pruning')}, {versions}"
    tested = {"perplexity": perplexity(model, blocks["test"]), "seconds": seconds, "versions": versions}
    with open(out, "w") as file:
        json.dump({"heads": heads_left, "neurons": neurons_left} | tested, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
