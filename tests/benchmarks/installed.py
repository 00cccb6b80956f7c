"""Every causal language model of the installed transformers, made small where its configuration can be: the whole way.

    python tests/benchmarks/installed.py > installed.md

Planned, scored, closed, repaired, cut, saved and opened again, each in a process of its own, with random weights. A
family is cut (and opens as the same model), keeps its gates, or is refused in a sentence; a traceback is a fault.
"""

import os
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import transformers
from common import cut_and_opened_again, nb
from conftest import random_blocks, tiny_tokenizer
from families import EXPERTS, GPT
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

BLOCKS = random_blocks(4, most=80)
SMALL = EXPERTS | GPT | dict(
    num_layers=2, n_layers=2, decoder_layers=2, decoder_attention_heads=4, d_model=32, n_heads=4, num_heads=4, d_ff=64,
    decoder_ffn_dim=64, ffn_dim=64, n_inner=64, d_kv=8, is_decoder=True, is_encoder_decoder=False,
    word_embed_proj_dim=32, hidden_dim=32, n_routed_experts=4, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=4,
    qk_nope_head_dim=4, v_head_dim=8, n_group=1, topk_group=1, first_k_dense_replace=1, encoder_layers=2,
    encoder_attention_heads=4, rotary_dim=4, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, lru_width=32,
    vocab_size=97, num_hidden_layers=2,
)  # fmt: skip


def small_model(name: str):
    """A small random model of a class, or None where its configuration cannot be made small by the usual words."""
    torch.manual_seed(0)
    kind = getattr(transformers, name).config_class
    try:
        plain = kind()
        config = kind(**{word: value for word, value in SMALL.items() if hasattr(plain, word)})
        with torch.device("meta"):
            if sum(p.numel() for p in getattr(transformers, name)(config).parameters()) > 20e6:
                return None
        model = getattr(transformers, name)(config).eval()
        model(BLOCKS, use_cache=False)
    except Exception:
        return None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def walk(model, folder: Path) -> str:
    settings = nb.Settings(strategy="fisher", block_length=16)
    try:
        nb.plan_closing(model, settings)
    except nb.UserError as error:
        if "--no-repair" not in str(error):
            return f"refused: {error}"
        settings = nb.dataclasses.replace(settings, repair=0)
        nb.plan_closing(model, settings)
    importance = nb.get_strategy("fisher").score(model, BLOCKS)
    nb.set_gates(model, nb.gates_for(model, importance, settings))
    fixed = nb.repair(model, BLOCKS) if settings.repair else model
    nb.predict_cost(model, nb.get_gates(model), 16)
    assert isinstance(nb.sample(fixed, tiny_tokenizer(), "a", 4), str)
    difference = nb.largest_difference(*cut_and_opened_again(fixed, folder), BLOCKS)
    assert difference < 1e-3, f"opened again, it differs by {difference:.0e}"
    said = "cut" if nb.can_compact(model) else f"keeps its gates: {nb.why_not_compact(model)}"
    return said if settings.repair else f"not repaired, {said}"


if __name__ == "__main__":
    counts, wanted = Counter(), sys.argv[1:] or sorted({name for name in NAMES.values() if isinstance(name, str)})
    print(f"transformers {transformers.__version__}, torch {torch.__version__}: {len(wanted)} classes\n", flush=True)
    for name in wanted:
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            signal.alarm(180)
            torch.set_num_threads(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            try:
                model = small_model(name)
                with tempfile.TemporaryDirectory() as folder:
                    said = walk(model, Path(folder)) if model is not None else "not made small"
            except Exception as error:
                said = f"FAULT: {type(error).__name__}: {error}"
            os.write(write, said.replace("\n", " ")[:300].encode())
            os._exit(0)
        os.close(write)
        said = os.read(read, 400).decode(errors="replace") or "FAULT: died"
        os.close(read)
        os.waitpid(child, 0)
        counts[said.split(":")[0]] += 1
        print(f"- {name}: {said}", flush=True)
    print(f"\n{dict(counts)}")
