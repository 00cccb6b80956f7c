"""Cutting heads out changes the size of a model and nothing else, and what is saved opens anywhere."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import FAMILIES, logits, make, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import PruningAndFineTuningColab as nb

BLOCK = torch.ones(1, 32, dtype=torch.long)
COVERED = ["gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3"]
GROUPED = [family for family in COVERED if FAMILIES[family][1].get("num_key_value_heads") == 2]
MASKS = {
    "uneven": [[1, 0, 1, 1], [1, 1, 0, 0]],
    "first layer empty": [[0, 0, 0, 0], [1, 0, 1, 0]],
    "last layer empty": [[0, 1, 1, 1], [0, 0, 0, 0]],
    "all empty": [[0, 0, 0, 0], [0, 0, 0, 0]],
    "all open": [[1, 1, 1, 1], [1, 1, 1, 1]],
}
STRANGE = [*zip(COVERED, ["uneven", "first layer empty"] * 6), ("llama", "first layer empty")]
covered = pytest.mark.parametrize("family", COVERED)


def pair(family, mask, attention="sdpa", **changes):
    """A gated model and the compact one made from it."""
    model = make(family, **changes)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{family} has no sdpa attention")
    nb.set_gates(model, torch.tensor(mask, dtype=torch.float))
    small = nb.compact(model)
    for each in (model, small):
        each.set_attn_implementation(attention)
    return model, small


def assert_same(logits, expected, tolerance=1e-5):
    assert ((logits - expected).abs().max() / expected.abs().max()).item() <= tolerance


def test_all_the_families_of_the_promise_are_covered():
    assert set(COVERED) >= {"gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3"}
    assert set(GROUPED) >= {"llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3"}


@covered
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_logits_are_those_of_the_gated_model(family, attention, mask, tokens):
    model, small = pair(family, mask, attention)
    padding = torch.ones_like(tokens)
    padding[0, :5] = 0
    for options in ({}, {"attention_mask": padding}):
        with torch.no_grad():
            assert_same(small(tokens, **options).logits, model(tokens, **options).logits)


@covered
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", ["uneven", "first layer empty"])
def test_generate_is_that_of_the_gated_model(family, attention, mask, tokens):
    model, small = pair(family, MASKS[mask], attention)
    padding = torch.ones_like(tokens)
    padding[0, :5] = 0
    for options in (
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"do_sample": True},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "cache_implementation": "static"},
    ):
        outputs = []
        for each in (model, small):
            torch.manual_seed(0)
            outputs.append(each.generate(tokens, attention_mask=padding, max_new_tokens=12, pad_token_id=0, **options))
        assert torch.equal(*outputs), options


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
@pytest.mark.parametrize("mask", ["uneven", "first layer empty"])
def test_generate_beyond_a_sliding_window(family, mask, tokens):
    model, small = pair(family, MASKS[mask], sliding_window=8)
    outputs = [each.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0) for each in (model, small)]
    assert torch.equal(*outputs)


@covered
def test_it_is_smaller_by_what_was_cut(family, tokens):
    """One head of four goes in layer 0, with grouped queries no key/value head; a whole group in layer 1."""
    model, small = pair(family, [[1, 0, 1, 1], [1, 1, 0, 0]])
    inputs, bias = 8 * 32, 8 * (family in ("gpt2", "opt", "gpt_neox", "qwen2", "phi"))  # of one head in one projection
    shared = 1 if family in GROUPED else 3  # key/value heads that went with the three heads
    assert model.num_parameters() - small.num_parameters() == (3 + 2 * shared) * (inputs + bias) + 3 * inputs
    kept = 3 if family in GROUPED else 5
    assert nb.cache_bytes(small) == kept * 2 * 8 * 4 < nb.cache_bytes(model)
    assert nb.count_flops(small, BLOCK) < nb.count_flops(model, BLOCK)
    assert not any("gates" in name for name in small.state_dict())
    assert not any(hasattr(module, "gate_hook") for module in small.modules())


def test_flops_and_cache_of_known_shapes():
    model = make("gpt2")
    per_token = 2 * (
        2 * (3 * 32 * 32 + 32 * 32 + 2 * 4 * 32 * 32) + 97 * 32
    )  # two layers, and the head of the vocabulary
    assert nb.count_flops(model, BLOCK) == per_token + 2 * 2 * 2 * 32 * 32  # and attention: every token to all 32
    assert nb.cache_bytes(model) == 2 * 2 * 32 * 4


@settings(max_examples=60, deadline=None)
@given(family=st.sampled_from(COVERED), bits=st.lists(st.booleans(), min_size=12, max_size=12), data=st.data())
def test_random_masks(family, bits, data):
    """Any set of heads, six of them in each of two layers where queries are grouped by three."""
    shape = {"n_head": 6, "n_embd": 48} if family == "gpt2" else {"num_attention_heads": 6, "hidden_size": 48}
    if family == "opt":
        shape["word_embed_proj_dim"] = 48
    if family in GROUPED:
        shape["num_key_value_heads"] = 2
    model, small = pair(family, torch.tensor(bits).view(2, 6).tolist(), **shape)
    ids = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(3, 96), min_size=9, max_size=9), min_size=1, max_size=2))
    )
    assert_same(logits(small, ids), logits(model, ids))
    with torch.no_grad():  # in two steps, through the cache
        cache = small(ids[:, :5], use_cache=True).past_key_values
        last = small(ids[:, 5:], past_key_values=cache).logits
    assert_same(last, logits(model, ids)[:, 5:])


@covered
def test_training_is_the_same_training(family, tokens):
    """AdamW with weight decay and clipped gradients, as in the Trainer; no dropout, which would draw other numbers."""
    no_dropout = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "opt": {"dropout": 0.0}}.get(
        family, {}
    )
    curves = []
    for model in pair(family, MASKS["uneven"], **no_dropout):
        model.train()
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01), []
        for _ in range(20):
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < 0.9 * curves[0][0], "it learns"
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_trained_gates_are_folded_in(tokens):
    model, _ = pair("opt", MASKS["uneven"])
    nb.set_gates(model, torch.tensor([[0.5, 0, 1, 2], [0, 0, 0.25, 1]]))
    small = nb.compact(model)
    assert_same(logits(small, tokens), logits(model, tokens))
    assert list(small.config.kept_heads.values()) == [[0, 2, 3], [2, 3]]


def test_compacting_leaves_the_gated_model_alone(tokens):
    model = make("llama")
    nb.set_gates(model, torch.tensor(MASKS["uneven"]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    nb.compact(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model.config, "kept_heads")


def test_gates_can_be_taken_off_and_come_back(tokens):
    model = make("gpt2")
    dense = logits(model, tokens)
    nb.set_gates(model, torch.tensor(MASKS["uneven"]))
    gated = logits(model, tokens)
    twin = copy.deepcopy(model)
    with nb.without_gates(twin):
        assert torch.equal(logits(twin, tokens), dense)
        assert not any(module._forward_pre_hooks for module in twin.modules())
        assert torch.equal(logits(model, tokens), gated), "the original keeps its own"
    assert torch.equal(logits(twin, tokens), gated)


# --- what is saved

STRANGER = """
import json, sys, torch, transformers
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

tokens = torch.tensor(json.loads(sys.argv[1]))
for folder in map(Path, sys.argv[2:]):
    trust = {"trust_remote_code": True} if (folder / "modeling_pruned.py").exists() else {}
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **trust).eval()
        with torch.no_grad():
            found[str(dtype)] = model(tokens).logits
    model = AutoModelForCausalLM.from_pretrained(folder, **trust)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(folder / "trained", max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    Trainer(model, arguments, train_dataset=data).train()
    model.save_pretrained(folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again", **trust)
    with torch.no_grad():
        found["trained"], found["again"] = model.eval()(tokens).logits, again.eval()(tokens).logits
    save_file(found, folder / "found.st")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    write = pipeline("text-generation", model=str(folder), tokenizer=tokenizer, **trust)
    said = write("a a a", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    print(json.dumps([folder.name, type(model).__name__, said]))
assert "PruningAndFineTuningColab" not in sys.modules
"""


def cast(model, dtype):
    """A copy with its parameters in `dtype`, and its buffers as they are, as from_pretrained(dtype=...) makes it."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Every covered family, saved with uneven layers or an empty one, opened in a process that knows no notebook."""
    root = tmp_path_factory.mktemp("saved")
    tokens = torch.randint(3, 97, (2, 16), generator=torch.Generator().manual_seed(1))
    models = {}
    for family, mask in STRANGE:
        folder = root / f"{family} {mask}"
        model = make(family)
        nb.set_gates(model, torch.tensor(MASKS[mask]))
        models[folder.name] = small = nb.compact(model)
        nb.save_compact(small, tiny_tokenizer(), folder)
    (root / "stranger.py").write_text(STRANGER)
    # From a folder of its own, so that only what is installed and what was saved can be imported.
    result = subprocess.run(
        [sys.executable, root / "stranger.py", json.dumps(tokens.tolist()), *(root / name for name in models)],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"HF_HOME": str(root / "cache"), "PYTHONPATH": ""},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    said = {
        name: (kind, text)
        for name, kind, text in (json.loads(line) for line in result.stdout.splitlines() if line.startswith("["))
    }
    return root, models, tokens, said


@pytest.mark.parametrize("family, mask", STRANGE)
def test_a_stranger_gets_the_same_logits_bit_for_bit(strangers, family, mask):
    root, models, tokens, said = strangers
    name = f"{family} {mask}"
    found = load_file(root / name / "found.st")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(found[str(dtype)], logits(cast(models[name], dtype), tokens)), dtype
    assert not torch.equal(found["trained"], found["torch.float32"]), "it was fine-tuned"
    assert torch.equal(found["again"], found["trained"]), "saved again and opened again"
    kind, text = said[name]
    assert kind == f"Pruned{type(models[name]).__name__}"
    assert text.startswith("a a a")


def test_the_code_that_travels_is_short_and_needs_two_packages(strangers):
    root, *_ = strangers
    code = (root / "gpt2 uneven" / "modeling_pruned.py").read_text()
    assert len(code.splitlines()) < 250
    assert {line.split()[1].split(".")[0] for line in code.splitlines() if line.startswith(("import ", "from "))} == {
        "inspect",
        "torch",
        "transformers",
        "types",
    }
    assert {line.split("(")[0].split(":")[0] for line in code.splitlines() if line.startswith(("class ", "def "))} == {
        "class PrunedGPT2LMHeadModel",
        "def inputs_first",
        "def find_rows",
        "def norm_over_heads",
        "def head_parameters",
        "def slice_projection",
        "def cut_attention",
        "def cut_neurons",
        "def cut_heads",
        "def tell_attention",
        "def in_order",
        "def pick_bias",
        "def find_cache",
        "def repeat_keys",
        "class NoHeads",
        "class LayerConfig",
    }


def test_nothing_that_is_saved_is_a_pickle(strangers):
    root, *_ = strangers
    kinds = {path.suffix for path in (root / "llama uneven").rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".py", ".md", ".st", ".jinja", ".txt"}


def test_one_process_may_open_several_families_and_a_plain_model(tmp_path, tokens):
    """Folders of the same name do not get into each other's way, nor into that of the stock model."""
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\nfor f in sys.argv[1:]:\n    "
        "m = AutoModelForCausalLM.from_pretrained(f, trust_remote_code=True)\n    "
        "print(m(torch.arange(3, 19)[None]).logits.sum().item())"
    )
    folders, expected = [], []
    for family in ("gpt2", "llama"):
        model = make(family)
        nb.set_gates(model, torch.tensor(MASKS["uneven"]))
        small = nb.compact(model)
        nb.save_compact(small, tiny_tokenizer(), tmp_path / family / "model")
        make(family).save_pretrained(tmp_path / family / "plain")
        folders += [tmp_path / family / "model", tmp_path / family / "plain"]
        expected += [logits(each, torch.arange(3, 19)[None]).sum().item() for each in (small, make(family))]
    out = subprocess.run(
        [sys.executable, "-c", code, *folders],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf")},
    )
    assert [float(line) for line in out.stdout.splitlines()] == pytest.approx(expected, rel=1e-4), out.stderr[-2000:]


@covered
@pytest.mark.parametrize("mask", ["uneven", "first layer empty"])
def test_the_zeroed_form_opens_plainly_and_can_be_reopened(family, mask, tokens, tmp_path):
    model, small = pair(family, MASKS[mask])
    with torch.no_grad():
        for parameter in small.parameters():
            parameter += 0.01  # as if it had been fine-tuned
    full = nb.expand(small, model)
    assert torch.equal(nb.get_gates(full), torch.tensor(MASKS[mask], dtype=torch.float))
    assert_same(logits(full, tokens), logits(small, tokens))
    nb.save_gated(full, tiny_tokenizer(), tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is type(model) and plain.num_parameters() == model.num_parameters()
    assert_same(logits(plain, tokens), logits(small, tokens))
    assert_same(logits(nb.reopen(tmp_path), tokens), logits(small, tokens))
    _, again = nb.load_gated(tmp_path)
    nb.set_gates(again, torch.ones(2, 4))
    names = {name for name in model.state_dict() if "gates" not in name}
    for layer, row in zip(nb.find_heads(again), MASKS[mask]):
        before = nb.find_heads(model)[int(layer.path.split(".")[-3])].output_weight
        for head, gate in enumerate(row):
            torch.testing.assert_close(layer.output_weight[head], before[head] + 0.01 * gate)
    assert names == {name for name in again.state_dict() if "gates" not in name}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_uniform_pruning_saves_a_native_checkpoint(family, tokens, tmp_path):
    model = make(family)
    nb.add_gates(model)
    size, close = nb.plan_uniform(model, 0.5, 1)
    assert (size, close) == (2, 1)
    gates = nb.choose_uniform_gates(torch.tensor([[0.0, 3, 2, 2], [3, 3, 9, -9]]), size, close)
    assert gates.tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    nb.set_gates(model, gates)
    small = nb.compact(model)
    nb.save_compact(small, tiny_tokenizer(), tmp_path)
    assert not list(tmp_path.glob("*.py"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 8)
    assert not {"kept_heads", "auto_map"} & config.keys() and config["architectures"] == [type(model).__name__]
    native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(native) is type(model) and native.num_parameters() == small.num_parameters()
    assert torch.equal(logits(native, tokens), logits(small, tokens))
    assert_same(logits(native, tokens), logits(model, tokens))


def test_the_least_important_groups_go():
    importance = torch.tensor([[1.0, 9, 2, 3, 5, 4], [9, 9, 0, 0, 5, 5]])
    assert nb.choose_uniform_gates(importance, 2, 1).tolist() == [[1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1]]
    assert nb.choose_uniform_gates(importance, 1, 2).tolist() == [[0, 1, 0, 1, 1, 1], [1, 1, 0, 0, 1, 1]]
    assert nb.choose_uniform_gates(importance, 3, 0).all()


def test_uniform_is_refused_where_it_cannot_be():
    with pytest.raises(nb.UserError, match="GPT2LMHeadModel cannot say.*2 heads.*leave uniform off"):
        nb.plan_uniform(make("gpt2"), 0.5, 1)
    with pytest.raises(nb.UserError, match="pruning_level is 0.1 with uniform.*2 groups of heads: take 0.50"):
        nb.plan_uniform(make("llama"), 0.1, 1)
    with pytest.raises(nb.UserError, match="min_heads 3.*smaller min_heads"):
        nb.plan_uniform(make("llama"), 0.5, 3)
    with pytest.raises(nb.UserError, match="LlamaForCausalLM cannot say that it has 3 heads over 3.*not a multiple"):
        nb.plan_uniform(make("llama", num_key_value_heads=4), 0.25, 1)
    with pytest.raises(nb.UserError, match="uniform is True, but must be off where reopen_heads is on"):
        nb.Settings(uniform=True, reopen_heads=True)


@pytest.mark.parametrize("mask", [[[1, 1, 1, 0], [1, 1, 1, 0]], [[1, 0, 1, 0], [1, 1, 0, 0]], [[0] * 4, [0] * 4]])
def test_shapes_that_a_family_cannot_say_get_code(mask, tmp_path):
    _, small = pair("llama", mask)
    assert nb.native_config(small) is None
    nb.save_compact(small, tiny_tokenizer(), tmp_path)
    assert (tmp_path / "modeling_pruned.py").exists()


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "phi"])
@pytest.mark.parametrize("mask", [[[1, 0, 1, 0], [0, 1, 1, 0]], MASKS["all open"]])
def test_code_travels_only_where_the_family_has_no_words_for_it(family, mask, tokens, tmp_path):
    """That is tried: Phi has words for fewer heads, and a model that lost nothing needs none."""
    _, small = pair(family, mask)
    nb.save_compact(small, tiny_tokenizer(), tmp_path)
    plain = family == "phi" or mask == MASKS["all open"]
    assert (tmp_path / "modeling_pruned.py").exists() != plain
    assert torch.equal(logits(nb.reopen(tmp_path), tokens), logits(small, tokens))


# --- what is opened


def test_a_compact_model_is_not_pruned_again(tmp_path):
    _, small = pair("opt", MASKS["uneven"])
    nb.save_compact(small, tiny_tokenizer(), tmp_path)
    with pytest.raises(nb.UserError, match="is compact.*take the model that it was made from"):
        nb.load_model(str(tmp_path), torch.device("cpu"))


def test_code_of_a_model_runs_only_when_trusted(tmp_path):
    model = make("opt")
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "auto_map": {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"},
        "model_type": "hostile",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    trace = tmp_path / "trace"
    (tmp_path / "hostile.py").write_text(
        f"from transformers import OPTConfig, OPTForCausalLM\nopen({str(trace)!r}, 'w').close()\n"
        "class Config(OPTConfig):\n    model_type = 'hostile'\n"
        "class Model(OPTForCausalLM):\n    config_class = Config\n"
    )
    with pytest.raises(nb.UserError, match="cannot be had.*"):
        nb.load_model(str(tmp_path), torch.device("cpu"))
    assert not trace.exists()
    assert type(nb.load_model(str(tmp_path), torch.device("cpu"), trust_remote_code=True)[1]).__name__ == "Model"
    assert trace.exists()


class Hostile:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_a_pickle_in_place_of_weights_is_refused_and_not_run(tmp_path):
    trace = tmp_path / "trace"
    make("opt").config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    torch.save({"weight": Hostile(trace)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(nb.UserError, match="cannot be had"):
        nb.load_model(str(tmp_path), torch.device("cpu"))
    assert not trace.exists()


def write_gguf(model, path):
    """A tiny Llama as a GGUF file, the way llama.cpp's converter writes one."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(config.vocab_size - 4)] + ["a", "b", "ab", "ba"])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["a b", "b a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
    }
    for name, weight in model.state_dict().items():
        for heads, part in ((config.num_attention_heads, "q_proj"), (config.num_key_value_heads, "k_proj")):
            if part in name:  # GGUF keeps the two halves of a rotary pair side by side
                weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_model_can_be_compacted_and_saved(tokens, tmp_path):
    original = make("llama", tie_word_embeddings=False)
    write_gguf(original, tmp_path / "tiny.gguf")
    tokenizer, model = nb.load_model(str(tmp_path / "tiny.gguf"), torch.device("cpu"))
    torch.testing.assert_close(logits(model, tokens), logits(original, tokens), rtol=1e-4, atol=1e-4)
    nb.set_gates(model, torch.tensor(MASKS["uneven"]))
    small = nb.compact(model)
    nb.save_compact(small, tokenizer, tmp_path / "compact")
    assert torch.equal(logits(nb.reopen(tmp_path / "compact"), tokens), logits(small, tokens))
    nb.save_gated(nb.expand(small, model), tokenizer, tmp_path / "zeroed")
    assert_same(
        logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "zeroed"), tokens), logits(small, tokens)
    )
    for form in ("compact", "zeroed"):
        assert "quantization_config" not in json.loads((tmp_path / form / "config.json").read_text())
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / form).encode("ab") == tokenizer.encode("ab")
