"""Cutting heads out changes the size of a model and nothing else, and what is saved opens anywhere."""

import copy
import json
import os
import shutil

import pytest
import torch
import transformers
from conftest import count_flops, gated, logits, make, random_blocks, run_python, saved, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import PruningAndFineTuningColab as nb

BLOCK = torch.ones(1, 32, dtype=torch.long)
COVERED = ["gpt2", "opt", "gpt_neox", "llama", "gemma3", "phi", "phi3"]  # for all others: test_families.py
GROUPED = ["llama", "gemma3", "phi3"]
PADDING = torch.tensor([[0] * 5 + [1] * 11, [1] * 16])  # the first of two texts starts with it
MASKS = {
    "uneven": [[1, 0, 1, 1], [1, 1, 0, 0]],
    "first layer empty": [[0, 0, 0, 0], [1, 0, 1, 0]],
    "last layer empty": [[0, 1, 1, 1], [0, 0, 0, 0]],
    "all empty": [[0, 0, 0, 0], [0, 0, 0, 0]],
    "all open": [[1, 1, 1, 1], [1, 1, 1, 1]],
}
HALF = [[1, 0, 1, 0], [0, 1, 1, 0]]
HEADS, NEURONS = {"num_attention_heads": 2}, {"intermediate_size": 32}  # half of them


def pair(family, mask="uneven", **changes):
    """A gated model and the compact one made from it."""
    model = gated(family, MASKS.get(mask) if isinstance(mask, str) else mask, **changes)
    return model, nb.compact(model)


def assert_same(logits, expected, tolerance=1e-5):
    assert ((logits - expected).abs().max() / expected.abs().max()).item() <= tolerance


@pytest.mark.parametrize("family", COVERED)
@pytest.mark.parametrize("mask", MASKS)
def test_logits_are_those_of_the_gated_model_at_the_predicted_cost(family, mask, tokens):
    model, small = pair(family, mask)
    for attention in ("eager", "sdpa"):
        for each in (model, small):
            each.set_attn_implementation(attention)
        for padding in (None, PADDING):
            with torch.no_grad():
                assert_same(small(tokens, attention_mask=padding).logits, model(tokens, attention_mask=padding).logits)
    predicted = nb.predict_cost(model, nb.get_gates(model), 32)
    assert predicted["parameters"] == small.num_parameters()
    assert count_flops(small, BLOCK) == pytest.approx(predicted["flops_per_token"], rel=0.01)


@pytest.mark.parametrize("family, attention, window", [
    ("gpt2", "eager", {}), ("opt", "sdpa", {}), ("gpt_neox", "eager", {}), ("llama", "eager", {}),
    ("llama", "sdpa", {}), ("phi3", "sdpa", {}),
    ("mistral", "sdpa", {"sliding_window": 8}), ("gemma3", "eager", {"sliding_window": 8}),  # also beyond the window
])  # fmt: skip
@pytest.mark.parametrize("mask", ["uneven", "first layer empty"])
def test_generate_is_that_of_the_gated_model(family, attention, window, mask, tokens):
    models = pair(family, mask, **window)
    static = {"cache_implementation": "static"}
    for options in ({}, {"use_cache": False}, {"do_sample": True}, {"num_beams": 3}, static):
        outputs, options = [], {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0} | options
        for each in models:
            each.set_attn_implementation(attention)
            torch.manual_seed(0)
            outputs.append(each.generate(tokens, attention_mask=PADDING, **options))
        assert torch.equal(*outputs), options


@pytest.mark.parametrize("family", COVERED)
def test_it_is_smaller_by_what_was_cut_and_the_gated_model_is_left_alone(family):
    """One head of four goes in layer 0, with grouped queries no key/value head; a whole group in layer 1."""
    model = gated(family)
    before, config = nb.fingerprint(model), model.config.to_dict()
    small = nb.compact(model)
    assert nb.fingerprint(model) == before and model.config.to_dict() == config and not hasattr(model, "kept")
    inputs, bias = 8 * 32, 8 * (family in ("gpt2", "opt", "gpt_neox", "phi"))  # a head's in one projection
    shared = 1 if family in GROUPED else 3  # key/value heads that went with the three heads
    assert model.num_parameters() - small.num_parameters() == (3 + 2 * shared) * (inputs + bias) + 3 * inputs
    kept = 3 if family in GROUPED else 5
    assert nb.cache_bytes(small) == kept * 2 * 8 * 4 < nb.cache_bytes(model)
    assert not any("gates" in name for name in small.state_dict())
    assert not any(hasattr(module, "gate_hook") for module in small.modules())


def test_flops_and_cache_of_known_shapes():
    model = make("gpt2")
    per_token = 2 * (2 * (3 * 32 * 32 + 32 * 32 + 2 * 4 * 32 * 32) + 97 * 32)  # two layers, and the vocabulary
    per_token += 2 * 2 * 2 * 32 * 32  # and attention: every token to all 32
    assert count_flops(model, BLOCK) == per_token == nb.predict_cost(model, torch.ones(2, 4), 32)["flops_per_token"]


@settings(max_examples=40, deadline=None)
@given(family=st.sampled_from(COVERED), bits=st.lists(st.booleans(), min_size=12, max_size=12), data=st.data())
def test_random_masks(family, bits, data):
    """Any set of heads, six of them in each of two layers where queries are grouped by three."""
    shape = {"n_head": 6, "n_embd": 48} if family == "gpt2" else {"num_attention_heads": 6, "hidden_size": 48}
    if family == "opt":
        shape["word_embed_proj_dim"] = 48
    if family in GROUPED:
        shape["num_key_value_heads"] = 2
    model, small = pair(family, torch.tensor(bits).view(2, 6).tolist(), **shape)
    texts = st.lists(st.lists(st.integers(3, 96), min_size=9, max_size=9), min_size=1, max_size=2)
    ids = torch.tensor(data.draw(texts))
    assert_same(logits(small, ids), logits(model, ids))
    with torch.no_grad():  # in two steps, through the cache
        cache = small(ids[:, :5], use_cache=True).past_key_values
        assert_same(small(ids[:, 5:], past_key_values=cache).logits, logits(model, ids)[:, 5:])


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "phi3"])
def test_it_learns_as_the_gated_model_does(family, tokens):
    """By the gradients of all weights that both have whole."""
    model, small = pair(family)
    for each in (model, small):
        each(tokens, labels=tokens).loss.backward()
    parts = dict(model.named_parameters())
    whole = [name for name, part in small.named_parameters() if part.shape == parts[name].shape]
    assert len(whole) > 5
    for name in whole:
        assert_same(small.get_parameter(name).grad, parts[name].grad, 1e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_uneven_readers_compile_to_one_graph(cached, tokens):
    """Hooks that stay after the cut must not break torch.compile."""
    _, small = pair("llama")
    torch.compiler.reset()
    backend = "inductor" if shutil.which(os.environ.get("CXX", "g++")) else "aot_eager"
    compiled = torch.compile(small, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert_same(compiled(tokens, use_cache=cached).logits, small(tokens, use_cache=cached).logits)


STRANGER = """
import json, sys, torch, transformers
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

tokens, trust = torch.tensor(json.loads(sys.argv[1])), {"trust_remote_code": True}
for folder in map(Path, sys.argv[2:]):
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
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    write = pipeline("text-generation", model=str(folder), tokenizer=tokenizer, **trust)
    said = write("a a a", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    (folder / "said.json").write_text(json.dumps([type(model).__name__, said]))
assert "PruningAndFineTuningColab" not in sys.modules
"""
STRANGE = [("gpt2", "uneven"), ("gpt2", "plain"), ("opt", "first layer empty"), ("gpt_neox", "uneven"),
           ("llama", "uneven"), ("llama", "first layer empty"), ("llama", "plain"), ("gemma3", "first layer empty"),
           ("phi3", "uneven")]  # fmt: skip


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Models and their folders, all called `model`, opened in one process that knows no notebook; some are plain."""
    root, tokens, models = tmp_path_factory.mktemp("saved"), random_blocks(2), {}
    for family, mask in STRANGE:
        folder = root / f"{family} {mask}" / "model"
        if mask == "plain":
            models[folder] = make(family)
            saved(folder, family)
        else:
            models[folder] = pair(family, mask)[1]
            nb.save_compact(models[folder], tiny_tokenizer(), folder)
    (root / "stranger.py").write_text(STRANGER)
    # From a folder of its own, so that only what is installed and what was saved can be imported.
    own = {"HF_HOME": str(root / "cache"), "PYTHONPATH": ""}
    run_python(root / "stranger.py", json.dumps(tokens.tolist()), *models, cwd=root, **own)
    return root, models, tokens


@pytest.mark.parametrize("family, mask", STRANGE)
def test_a_stranger_gets_the_same_logits_bit_for_bit(strangers, family, mask):
    root, models, tokens = strangers
    folder = root / f"{family} {mask}" / "model"
    found = load_file(folder / "found.st")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = copy.deepcopy(models[folder])
        for parameter in model.parameters():  # buffers stay as they are, as from_pretrained(dtype=...) leaves them
            parameter.data = parameter.data.to(dtype)
        assert torch.equal(found[str(dtype)], logits(model, tokens)), dtype
    assert not torch.equal(found["trained"], found["torch.float32"]), "it was fine-tuned"
    assert torch.equal(found["again"], found["trained"]), "saved again and opened again"
    kind, said = json.loads((folder / "said.json").read_text())
    assert kind == "Pruned" * (mask != "plain") + type(model).__name__ and said.startswith("a a a")


def test_the_code_that_travels_is_short_and_needs_two_packages(strangers):
    code = (strangers[0] / "gpt2 uneven/model/modeling_pruned.py").read_text()
    assert len(code.splitlines()) < 110
    lines = [line.split() for line in code.splitlines() if line.startswith(("import ", "from "))]
    assert {words[1].split(".")[0] for words in lines} == {"copy", "torch", "transformers"}


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "llama", "phi3"])
@pytest.mark.parametrize("mask", ["uneven", "first layer empty"])
def test_the_zeroed_form_opens_plainly_and_can_be_reopened(family, mask, tokens, tmp_path):
    """(The head that stays in a layer where all were closed writes zeros, until it is fine-tuned.)"""
    model, small = pair(family, mask)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter += 0.01  # as if it had been fine-tuned
    full = nb.expand(small, model)
    assert torch.equal(nb.get_gates(full), small.kept)
    nb.save_gated(full, tiny_tokenizer(), tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is type(model) and plain.num_parameters() == model.num_parameters()
    for each in (full, plain):
        assert_same(logits(each, tokens), logits(small, tokens))
    _, again = nb.load_gated(tmp_path)
    nb.set_gates(again, torch.ones(2, 4))
    open_before = torch.tensor(MASKS[mask])
    for now, then, gates, kept in zip(nb.find_heads(again), nb.find_heads(model), open_before, small.kept):
        erased = ((gates == 0) & (kept == 1)).float()[:, None, None]
        expected = then.output_weight * (1 - erased) + 0.01 * kept[:, None, None]
        torch.testing.assert_close(now.output_weight, expected)
    assert model.state_dict().keys() == again.state_dict().keys()


def uniform(model, level, prune="heads"):
    """The compact model of the gates that uniform=yes chooses by random importance."""
    settings = nb.Settings(uniform="yes", pruning_level=level, prune=prune)
    nb.plan_closing(model, settings)
    nb.set_gates(model, nb.gates_for(model, torch.rand(nb.get_gates(model).shape), settings))
    return nb.compact(model)


@pytest.mark.parametrize("family, prune, halved", [
    *((family, prune, halved) for family in ("llama", "qwen2", "gemma3", "phi3", "phi")
      for prune, halved in (("heads", HEADS), ("neurons", NEURONS), ("both", HEADS | NEURONS))),
    ("gpt2", "neurons", {"n_inner": 64}),
])  # fmt: skip
def test_uniform_pruning_saves_a_native_checkpoint(family, prune, halved, tokens, tmp_path):
    model = make(family)
    small = uniform(model, 0.5, prune)
    nb.save_compact(small, tiny_tokenizer(), tmp_path)
    assert not list(tmp_path.glob("*.py"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert halved.items() <= config.items() and not {"pruned", "auto_map"} & config.keys()
    assert config["architectures"] == [type(model).__name__]
    native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(native) is type(model) and native.num_parameters() == small.num_parameters()
    assert torch.equal(logits(native, tokens), logits(small, tokens))
    assert_same(logits(native, tokens), logits(model, tokens))


def test_a_llama_with_a_number_of_heads_that_its_configuration_refuses_is_saved_as_a_mistral(tokens, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}
    small = uniform(make("llama", num_key_value_heads=4, rope_parameters=rope, rms_norm_eps=1e-3), 0.25)
    assert small.words == [{"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}] * 2
    nb.save_compact(small, tiny_tokenizer(), tmp_path)
    native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(native) is transformers.MistralForCausalLM and not list(tmp_path.glob("*.py"))
    assert torch.equal(logits(native, tokens), logits(small, tokens))
    outputs = [each.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0) for each in (native, small)]
    assert torch.equal(*outputs)
    with pytest.raises(nb.UserError, match="take 0.5, 0.75"):  # MistralConfig knows no biases
        uniform(make("llama", num_key_value_heads=4, attention_bias=True), 0.25)


def test_the_least_important_groups_and_neurons_go():
    importance = torch.tensor([[1.0, 9, 2, 3, 5, 4], [9, 9, 0, 0, 5, 5]])
    assert nb.close_alike(importance, 1 / 3, nb.Layout(6, 2)).tolist() == [[1, 1, 0, 0, 1, 1]] * 2
    assert nb.close_alike(importance, 1 / 3, nb.Layout(6)).tolist() == [[0, 1, 0, 1, 1, 1], [1, 1, 0, 0, 1, 1]]
    half = nb.close_alike(importance, 0.5, nb.Layout(2, 2))  # half a group of heads: neurons make up for it
    assert half.tolist() == [[1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1]]
    found = nb.close_alike(importance, 0.5, nb.Layout(4, 2, chunk=2))
    assert found.tolist() == [[1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1]]
    assert nb.close_alike(importance, 0, nb.Layout(6, 2)).all()


def test_uniform_is_refused_where_it_cannot_be():
    with pytest.raises(nb.UserError, match="pruning_level is 0.1 with uniform.*2 parts that go together.*take 0.5"):
        uniform(make("llama"), 0.1)
    with pytest.raises(nb.UserError, match="pruning_level is 0.25 with uniform.*leave uniform off"):
        nb.plan_closing(make("llama"), nb.Settings(uniform="yes", pruning_level=0.25, min_heads=3))
    with pytest.raises(nb.UserError, match="nothing can be cut out, because cut, it fails.*leave it off"):
        uniform(make("bloom"), 0.5)
    for prune in ("heads", "both"):
        with pytest.raises(nb.UserError, match="GPT2LMHeadModel has 4 parts.*words for some.*leave uniform off"):
            uniform(make("gpt2"), 0.5, prune)


@pytest.mark.parametrize("family, mask, plain", [
    ("llama", [[1, 1, 1, 0], [1, 1, 1, 0]], False),  # uneven readers
    ("llama", [[1, 0, 1, 0], [1, 1, 0, 0]], False),  # layers that differ
    ("llama", "all empty", True),  # one head always stays
    ("gpt2", HALF, False), ("opt", HALF, False), ("gpt_neox", HALF, False), ("phi", HALF, True),
    ("gpt2", "all open", True), ("opt", "all open", True), ("gpt_neox", "all open", True),
])  # fmt: skip
def test_code_travels_only_where_the_family_has_no_words_for_it(family, mask, plain, tokens, tmp_path):
    """That is tried: Phi has words for fewer heads, and a model that lost nothing needs none."""
    _, small = pair(family, mask)
    nb.save_compact(small, tiny_tokenizer(), tmp_path)
    assert (tmp_path / "modeling_pruned.py").exists() != plain
    assert torch.equal(logits(nb.reopen(tmp_path), tokens), logits(small, tokens))
