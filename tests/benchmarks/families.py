"""Family by family, the whole way: planned, scored, closed, repaired, cut, saved, opened again, fine-tuned.

    python tests/benchmarks/families.py                the catalogue (tests/families.py), about two minutes
    python tests/benchmarks/families.py --installed    every causal class of the installed transformers, made small

Each in a process of its own, small, with random weights. A family is cut (and opens as the same model), keeps its
gates, or is refused in a sentence; a traceback is a fault. Differences are the largest difference of float32 logits,
relative to the largest logit: of the cut model from the gated one, and of the opened one from what was saved.
"""

import copy
import os
import signal
import tempfile
from collections import Counter
from pathlib import Path

import torch
import transformers
from common import cut_and_opened_again, nb, parser_for, trained
from conftest import new_run, random_blocks, tiny_tokenizer
from families import CATALOGUE, EXPERTS, GPT, make
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
    """What came of it, and what was left out on the way."""
    settings, left_out = nb.Settings(strategy="fisher", block_length=16), []
    try:
        nb.plan_closing(model, settings)
    except nb.UserError as error:
        if "--no-repair" not in str(error):
            return f"refused: {error}"
        settings, left_out = nb.dataclasses.replace(settings, repair=0), ["repair"]
        nb.plan_closing(model, settings)
    try:
        assert nb.get_strategy("entropy").score(model, BLOCKS).isfinite().all()
    except nb.UserError:
        left_out.append("entropy")
    assert nb.get_strategy("learned", level=0.3, steps=2).score(model, BLOCKS).isfinite().all()
    importance = nb.get_strategy("fisher").score(model, BLOCKS)
    nb.set_gates(model, nb.gates_for(model, importance, settings))
    fixed = nb.repair(model, BLOCKS) if settings.repair else model
    nb.predict_cost(model, nb.get_gates(model), 16)
    assert isinstance(nb.sample(fixed, tiny_tokenizer(), "a", 4), str)
    last, again = cut_and_opened_again(fixed, folder / "saved")
    cut, opened = (nb.largest_difference(last, other, BLOCKS) for other in (fixed, again))
    assert max(cut, opened) < 1e-3, f"it differs by {cut:.0e}, opened again by {opened:.0e}"
    run = new_run(folder, block_length=16, max_steps=12, learning_rate=3e-3)
    record = trained(run, copy.deepcopy(last), dict.fromkeys(nb.SPLITS, BLOCKS), run.settings)[1]
    losses = [loss for _, loss in record["history"]["loss"]]
    said = "cut" if nb.can_compact(model) else f"keeps its gates: {nb.why_not_compact(model)}"
    numbers = f"differs by {cut:.0e}, opened again by {opened:.0e}, loss {losses[0]:.1f} → {losses[-1]:.1f}"
    return f"{said}: {numbers}" + f", without {' and '.join(left_out)}" * bool(left_out)


def in_a_process_of_its_own(name: str) -> str:
    """What walk() says of a family of the catalogue, or of a class of transformers."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        signal.alarm(180)
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        try:
            model = make(name) if name in CATALOGUE else small_model(name)
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
    return said


def main():
    parser = parser_for(__doc__)
    parser.add_argument("names", nargs="*", help="only these families or classes")
    parser.add_argument("--installed", action="store_true")
    chosen = parser.parse_args()
    classes = sorted({name for name in NAMES.values() if isinstance(name, str)})
    wanted, counts = chosen.names or (classes if chosen.installed else CATALOGUE), Counter()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}: {len(wanted)}\n", flush=True)
    for name in wanted:
        said = in_a_process_of_its_own(name)
        counts[said.split(":")[0]] += 1
        print(f"- {name}: {said}", flush=True)
    print(f"\n{dict(counts)}")


if __name__ == "__main__":
    main()
