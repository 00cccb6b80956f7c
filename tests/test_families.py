"""What a model can is tried, not looked up: families of the catalogue, code of its own, and what no model brings."""

import copy
import json

import families
import pytest
import torch
import transformers
from conftest import CPU, count_flops, edit, new_run, random_blocks, saved, tiny_tokenizer
from families import CATALOGUE, KEEP_THEIR_GATES, SIZES

import PruningAndFineTuningColab as nb

BLOCKS = random_blocks(3, most=80)
HEADS = [name for name in CATALOGUE if name != "Mamba"]
WITH_NEURONS = ["GPT-2", "OPT", "GPT-NeoX, Pythia", "Llama, SmolLM2"]
BOTH = [(name, "both") for name in (*WITH_NEURONS, "Gemma 2", "Phi-3", "GPT-J", "StarCoder2", "GLM-4", "XGLM")]
NEURONS = [(name, "neurons") for name in (*WITH_NEURONS, "BLOOM", "MPT", "Falcon RW")]  # the last three keep heads
SAVED = ["OLMo 2", "Cohere, queries and keys normalised", "GPT-OSS", "Falcon 40B", "GPT", "Qwen 3 Next",
         "Gemma 3, with images", "Qwen 2 VL"]  # fmt: skip


def gated(name, prunes):
    """A model with closed units: a head of the first layer and two of the last, and a third of the neurons."""
    model = families.make(name)
    nb.prune_only(model, prunes)
    gates, heads = torch.ones_like(nb.get_gates(model)), nb.number_of_heads(model)
    if prunes != "neurons":
        gates[0, 1] = gates[-1, 0] = gates[-1, heads - 1] = 0
    gates[:, heads:] = torch.rand(gates[:, heads:].shape).gt(0.3).float()
    nb.set_gates(model, gates)
    return model, gates


@pytest.mark.parametrize("name, prunes", [*((name, "heads") for name in HEADS), *BOTH, *NEURONS])
def test_what_is_closed_is_cut_out_where_it_is_proven_and_the_arithmetic_agrees(name, prunes):
    model, gates = gated(name, prunes)
    assert nb.is_causal(model)
    if prunes == "heads" and name in KEEP_THEIR_GATES:
        assert KEEP_THEIR_GATES[name] in nb.why_not_compact(model)
        with pytest.raises(nb.UserError, match=f"heads of {type(model).__name__} cannot be cut out .*keep its gates"):
            nb.compact(model)
        return
    assert nb.why_not_compact(model) == ""
    small = nb.compact(model)
    assert nb.largest_difference(model, small, BLOCKS) < 1e-5
    wanted = nb.written_logits(model)
    assert (nb.written_logits(small) - wanted).abs().max() < 1e-5 * wanted.abs().max(), "with a cache, and padded"
    predicted, counted = nb.predict_cost(model, gates, 16), count_flops(small, BLOCKS[:1])
    assert predicted["parameters"] == small.num_parameters() < model.num_parameters()
    assert 0 < counted < count_flops(model, BLOCKS[:1]) and nb.cache_bytes(small) <= nb.cache_bytes(model)
    assert prunes == "heads" or counted == pytest.approx(predicted["flops_per_token"], rel=0.01)
    gates[-1] = 0  # a layer without heads or neurons: one stays, and writes zeros
    nb.set_gates(model, gates)
    small = nb.compact(model)
    assert small.kept[-1].any() and nb.largest_difference(model, small, BLOCKS) < 1e-5


@pytest.mark.parametrize("name, prunes", [*((name, "heads") for name in SAVED), *BOTH, *NEURONS])
def test_what_is_cut_and_what_is_zeroed_open_again(name, prunes, tmp_path):
    model, gates = gated(name, prunes)
    gates[0, -1] = 0.5  # gates need not be 0 or 1
    nb.set_gates(model, gates)
    small = nb.compact(model)
    nb.save_compact(small, tiny_tokenizer(), tmp_path / "small")
    nb.save_gated(model, tiny_tokenizer(), tmp_path / "gated")
    assert torch.equal(nb.get_gates(model), gates), "saving does not change the model"
    _, again = nb.load_gated(tmp_path / "gated")
    assert again.prunes == prunes and torch.equal(nb.get_gates(again), gates)
    for other in (nb.expand(small, model), nb.reopen(tmp_path / "small"), nb.reopen(tmp_path / "gated"), again):
        assert nb.largest_difference(model, other, BLOCKS) < 1e-5
    nb.set_gates(again, torch.ones_like(gates))
    assert nb.largest_difference(families.make(name), again, BLOCKS) < 1e-6, "all of it can be opened again"


def test_so_many_families_are_cut():
    assert len(HEADS) - len(KEEP_THEIR_GATES) == 61 and len(CATALOGUE) == 72


@pytest.mark.parametrize("name", ["Granite", "Cohere", "Gemma 2", "Helium"])
def test_gates_learn_from_the_models_own_predictions(name, monkeypatch):
    """Granite and Cohere scale their logits, Gemma 2 caps them: with all gates open there is nothing to learn."""
    model, seen = families.make(name), []
    own, divergence = model(BLOCKS).logits.detach(), nb.divergence
    monkeypatch.setattr(nb, "divergence", lambda given, wanted: seen.append(wanted) or divergence(given, wanted))
    nb.add_gates(model)
    nb.Learned(level=0.25).slope(model, nb.find_units(model), BLOCKS, torch.ones(3, 2, 4))
    assert torch.allclose(seen[0], own, atol=1e-5), "what is learned from is what the model says"


def test_a_model_without_heads_and_strange_attention_are_refused_in_a_sentence():
    said = "heads of MambaForCausalLM cannot be found .there is no attention in it.*take a transformer such as GPT-2"
    for words in ({}, {"num_attention_heads": 4}):  # whatever the configuration says
        with pytest.raises(nb.UserError, match=said):
            nb.find_heads(families.make("Mamba", **words))
    model = families.make("OPT")
    attention = model.model.decoder.layers[1].self_attn
    attention.somewhere_else = attention._modules.pop("out_proj")
    with pytest.raises(nb.UserError, match="there is no OPTAttention in model.decoder.layers.1.self_attn"):
        nb.find_heads(model)
    for name in ("GPT", "MiniMax"):
        with pytest.raises(nb.UserError, match="'entropy' needs attention weights, which .* does not give"):
            nb.get_strategy("entropy").score(families.make(name), BLOCKS)


def test_gradient_checkpointing_is_refused_where_there_is_none(monkeypatch):
    model, settings = families.make("GPT"), nb.Settings(prompt="a", block_length=4, gradient_checkpointing=True)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(nb.UserError, match="gradient_checkpointing is on, but OpenAIGPTLMHeadModel does not have"):
        nb.pack_all(dict.fromkeys(nb.SPLITS, "a a a a"), tiny_tokenizer(), model, settings)


DERIVED = """
from transformers import LlamaForCausalLM

class HalvedLlamaForCausalLM(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output
"""
OWN = """
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

class OwnConfig(PretrainedConfig):
    model_type = "own-model"

class OwnAttention(nn.Module):
    def __init__(self, size, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in (self.q_proj, self.k_proj, self.v_proj))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))

class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        size = config.hidden_size
        self.embed_tokens, self.lm_head = nn.Embedding(config.vocab_size, size), nn.Linear(size, config.vocab_size)
        self.layers = nn.ModuleList([nn.ModuleDict({"attn": OwnAttention(size, config.num_attention_heads)})
                                     for _ in range(config.num_hidden_layers)])
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = x + layer["attn"](x)
        return CausalLMOutputWithPast(logits=self.lm_head(x))
"""


def derived(folder):
    """A class that is derived from Llama and gives other logits."""
    saved(folder)
    (folder / "modeling_halved.py").write_text(DERIVED)
    name = "HalvedLlamaForCausalLM"
    auto_map = {"AutoModelForCausalLM": f"modeling_halved.{name}"}
    edit(folder / "config.json", auto_map=auto_map, architectures=[name])


def own(folder):
    """A configuration and a model of its own."""
    folder.mkdir()
    (folder / "modeling_own.py").write_text(OWN)
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = {"model_type": "own-model", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(SIZES | config))
    tiny_tokenizer().save_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    nb.save_file(dict(model.state_dict()), folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("fill", [derived, own])
def test_a_model_with_code_of_its_own_keeps_its_gates_and_opens_again(fill, tmp_path):
    fill(tmp_path / "model")
    name, trace = str(tmp_path / "model"), tmp_path / "trace"
    (code,) = (tmp_path / "model").glob("*.py")
    code.write_text(f"{code.read_text()}\nopen({str(trace)!r}, 'w').close()\n")
    with pytest.raises(nb.UserError, match="--trust-remote-code"):
        nb.load_model(name, CPU)
    assert not trace.exists(), "it runs only when it is trusted"
    tokenizer, model = nb.load_model(name, CPU, trust_remote_code=True)
    assert trace.exists()
    nb.set_gates(model, torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 1]]))
    assert nb.why_not_compact(model) == "its class brings its own code"
    run = new_run(tmp_path / "out", block_length=16, max_steps=2, batch_size=1)
    tuned = nb.fine_tuned(run, "fine_tuned", copy.deepcopy(model), dict.fromkeys(nb.SPLITS, BLOCKS), run.settings)
    assert nb.largest_difference(tuned, model, BLOCKS) > 1e-4 and torch.equal(nb.get_gates(tuned), nb.get_gates(model))
    nb.save_gated(tuned, tokenizer, tmp_path / "saved")
    again = nb.reopen(tmp_path / "saved")
    assert type(again).__name__ == type(model).__name__
    assert nb.largest_difference(tuned, again, BLOCKS) < 1e-6


def test_code_that_transformers_has_too_is_not_run_unasked(tmp_path):
    derived(tmp_path / "model")
    edit(tmp_path / "model/config.json", architectures=["LlamaForCausalLM"])
    assert type(nb.load_model(str(tmp_path / "model"), CPU)[1]) is transformers.LlamaForCausalLM
