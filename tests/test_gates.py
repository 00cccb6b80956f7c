"""A closed gate removes its head exactly, in every family, and an opened one brings it back bit for bit."""

import copy

import pytest
import torch
from conftest import FAMILIES, gated, logits, make, zero_units

import PruningAndFineTuningColab as nb


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_closed_gates_equal_zeroed_weights(family, attention, tokens, gates):
    model = make(family)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{family} has no sdpa attention")
    model.set_attn_implementation(attention)
    dense = logits(model, tokens)
    expected = logits(zero_units(copy.deepcopy(model), FAMILIES[family][1], gates), tokens)
    nb.set_gates(model, gates)
    assert not torch.allclose(logits(model, tokens), dense, atol=1e-3), "nothing was pruned"
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5)


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


def test_all_open_closes_again_also_after_an_error(gates):
    model = gated("opt", gates)
    with pytest.raises(KeyboardInterrupt), nb.all_open(model):
        assert nb.get_gates(model).all()
        raise KeyboardInterrupt
    assert torch.equal(nb.get_gates(model), gates)


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
