"""A closed gate removes its head exactly, in every family, and an opened one brings it back bit for bit."""

import copy

import pytest
import torch
import transformers
from conftest import gated, logits, make, tiny_tokenizer, zero_heads

import PruningAndFineTuningColab as nb

FOUR = pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "llama"])


def check_gates(model, family, tokens, gates, close):
    """Raises AssertionError unless `close(model, gates)` really removes the closed heads."""
    dense = logits(model, tokens)
    expected = logits(zero_heads(copy.deepcopy(model), family, gates), tokens)
    close(model, gates)
    assert not torch.allclose(logits(model, tokens), dense, atol=1e-3), "nothing was pruned"
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_closed_gates_equal_zeroed_weights(family, attention, tokens, gates):
    model = make(family)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{family} has no sdpa attention")
    model.set_attn_implementation(attention)
    check_gates(model, family, tokens, gates, nb.set_gates)


def test_multiplying_returned_attention_weights_is_not_a_gate(tokens, gates):
    """What well-known notebooks do; the check above must catch it."""

    def close(model, gates):
        for layer, row in zip(nb.find_heads(model), gates):
            layer.module.register_forward_hook(lambda module, args, out, row=row: (out[0], out[1] * row[:, None, None]))

    model = make("gpt2")
    model.set_attn_implementation("eager")
    with pytest.raises(AssertionError, match="nothing was pruned"):
        check_gates(model, "gpt2", tokens, gates, close)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "llama", "falcon", "gpt_bigcode"])
def test_opened_again_taken_off_or_copied_they_are_exact(family, tokens, gates):
    model = make(family)
    dense = logits(model, tokens)
    nb.set_gates(model, gates)
    closed = logits(model, tokens)
    assert not torch.equal(closed, dense)
    twin, plain = copy.deepcopy(model), nb.remove_gates(copy.deepcopy(model))
    assert torch.equal(logits(plain, tokens), dense)
    assert not any(module._forward_pre_hooks for module in plain.modules())
    assert torch.equal(logits(twin, tokens), closed) and torch.equal(logits(model, tokens), closed)
    nb.set_gates(model, torch.ones_like(gates))
    assert torch.equal(logits(model, tokens), dense) and torch.equal(nb.get_gates(twin), gates)
    model.load_state_dict(twin.state_dict())  # they live in the state_dict
    assert torch.equal(nb.get_gates(model), gates) and torch.equal(logits(model, tokens), closed)


@FOUR
def test_generate_with_cache_equals_without(family, tokens, gates):
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    model = gated(family, gates)
    assert torch.equal(*(model.generate(tokens, use_cache=cache, **options) for cache in (True, False)))


def test_all_open_closes_again_also_after_an_error(gates):
    model = gated("opt", gates)
    with pytest.raises(KeyboardInterrupt), nb.all_open(model):
        assert nb.get_gates(model).all()
        raise KeyboardInterrupt
    assert torch.equal(nb.get_gates(model), gates)


@FOUR
def test_saved_model_opens_plainly_and_can_be_reopened(family, tokens, gates, tmp_path):
    model = make(family)
    dense = logits(model, tokens)
    gates[0, 0] = 0.5  # trained gates need not be 0 or 1
    nb.set_gates(model, gates)
    nb.save_gated(model, tiny_tokenizer(), tmp_path)
    assert torch.equal(nb.get_gates(model), gates), "saving must not change the model"
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(plain, tokens), logits(model, tokens), rtol=1e-5, atol=1e-6)
    _, again = nb.load_gated(tmp_path)
    torch.testing.assert_close(logits(again, tokens), logits(model, tokens), rtol=0, atol=0)
    nb.set_gates(again, torch.ones_like(gates))
    assert torch.equal(logits(again, tokens), dense)


def test_trying_a_head_leaves_the_gates_as_they_were(tokens, gates):
    """Its cell may be run again after heads were closed."""
    model = gated("gpt2", gates)
    said = nb.try_head(model, tokens, 0, 2)
    before, closed, after = said.split("perplexity ")[1].replace("closed ", "").replace("open again ", "").split(", ")
    assert torch.equal(nb.get_gates(model), gates) and before == after != closed


def test_what_was_repaired_for_other_heads_is_refused(gates):
    model = gated("gpt2", gates)
    repaired = copy.deepcopy(model)
    nb.require_same_gates(model, repaired)
    nb.set_gates(model, gates.flip(1))
    with pytest.raises(nb.UserError, match="other heads were closed since the model was repaired: run section 11"):
        nb.require_same_gates(model, repaired)
