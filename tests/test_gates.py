"""Gates of heads and of neurons, which are units one number wide: exact, reversible, chosen. (Cut: test_families.py)"""

import copy

import families
import pytest
import torch
from conftest import FAMILIES, gated, logits, make, random_blocks, zero_units

import PruningAndFineTuningColab as nb

BLOCKS = random_blocks(4, most=80)
CASES = [*((family, "heads") for family in FAMILIES),
         *((family, "neurons") for family in ("gpt2", "opt", "gpt_neox", "llama", "phi3"))]  # fmt: skip


@pytest.mark.parametrize("family, prunes", CASES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_closed_gates_equal_zeroed_weights_and_open_ones_change_nothing(family, prunes, attention, tokens, gates):
    model = make(family)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{family} has no sdpa attention")
    model.set_attn_implementation(attention)
    plain, dense = copy.deepcopy(model), logits(model, tokens)
    nb.prune_only(model, prunes)
    assert torch.equal(logits(model, tokens), dense)
    gates = gates if prunes == "heads" else torch.rand(nb.get_gates(model).shape).gt(0.4).float()
    nb.set_gates(model, gates)
    assert not torch.allclose(logits(model, tokens), dense, atol=1e-2), "nothing was pruned"
    expected = logits(zero_units(plain, gates, prunes), tokens)
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


def test_what_opens_gates_for_a_while_leaves_them_as_they_were(tokens, gates):
    """Also after an error; and the cell that tries a head may be run again after heads were closed."""
    model = gated("gpt2", gates)
    with pytest.raises(KeyboardInterrupt), nb.all_open(model):
        assert nb.get_gates(model).all()
        raise KeyboardInterrupt
    assert torch.equal(nb.get_gates(model), gates)
    said = nb.try_head(model, tokens, 0, 2)
    before, closed, after = said.split("perplexity ")[1].replace("closed ", "").replace("open again ", "").split(", ")
    assert torch.equal(nb.get_gates(model), gates) and before == after != closed


def test_what_was_repaired_for_other_heads_is_refused(gates):
    model, repaired = gated("gpt2", gates.flip(1)), gated("gpt2", gates)
    with pytest.raises(nb.UserError, match="other heads were closed since the model was repaired: run section 11"):
        nb.require_same_gates(model, repaired)


def told(model, prunes):
    """The model, told what is pruned in it, with open gates."""
    nb.prune_only(model, prunes)
    return model


def by_fisher(name, prunes, level=0.3):
    """A model of the catalogue, the importance of its units by Fisher, and gates chosen by it and set."""
    model = told(families.make(name), prunes)
    importance = nb.get_strategy("fisher").score(model, BLOCKS)
    gates = nb.gates_for(model, importance, nb.Settings(prune=prunes, pruning_level=level))
    nb.set_gates(model, gates)
    return model, importance, gates


@pytest.mark.parametrize("level", [0.1, 0.3, 0.6])
def test_both_kinds_share_one_budget_of_parameters(level):
    model, importance, gates = by_fisher("Llama, SmolLM2", "both", level)
    costs = nb.unit_costs(model)
    largest = (costs.max() / costs.sum()).item()
    assert ((costs * (gates == 0)).sum() / costs.sum()).item() == pytest.approx(level, abs=largest)
    open_heads, open_neurons = gates[:, :4], gates[:, 4:]
    assert open_heads.sum(1).min() >= 1 and open_neurons.sum(1).min() >= 1
    closed, still = importance[gates == 0], importance[:, 4:][open_neurons == 1]
    assert closed.max() <= still.max(), "the least important for what they cost go first"


def test_a_unit_costs_what_goes_with_it_also_where_an_mlp_is_as_wide_as_the_stream():
    model = told(families.make("Llama, SmolLM2"), "both")
    head, neuron = nb.unit_costs(model)[0, [0, -1]].tolist()
    assert head == 2 * 8 * 32 + 2 * 8 * 32 / 2 and neuron == 3 * 32, "keys and values are shared by two heads"
    model, _, gates = by_fisher("RecurrentGemma", "both")
    assert nb.find_neurons(model)[0].number == model.config.hidden_size
    assert nb.predict_cost(model, gates, 16)["parameters"] == nb.compact(model).num_parameters()


@pytest.mark.parametrize("uniform", ["no", "yes"])
@pytest.mark.parametrize("prunes", ["neurons", "both"])
def test_neurons_of_wide_layers_stay_at_multiples_of_32(prunes, uniform):
    model = told(make("llama", intermediate_size=1040), prunes)
    importance = torch.rand(nb.get_gates(model).shape) * torch.tensor([[1.0], [2.0]])
    gates = nb.gates_for(model, importance, nb.Settings(prune=prunes, pruning_level=0.4, uniform=uniform))
    left = gates[:, nb.number_of_heads(model) :].sum(1)
    assert (left % 32 == 0).all() and left.min() >= 32 and left.max() < 1040
    assert (left[0] == left[1]) == (uniform == "yes"), "else layers differ"
    assert nb.layout_of(told(make("llama"), prunes), nb.Settings(prune=prunes)).chunk == 1


def test_learned_gates_move_a_layers_neurons_together():
    model = told(make("llama"), "both")
    fisher = nb.get_strategy("fisher").score(model, BLOCKS)
    learned = nb.get_strategy("learned", level=0.3, steps=6).score(model, BLOCKS).log()  # on Fisher's scale
    assert torch.equal(learned[:, 4:].argsort(1), fisher[:, 4:].log().argsort(1)), "ranked by Fisher within a layer"
    moved = learned[:, 4:] - fisher.log()[:, 4:]
    assert torch.allclose(moved, moved[:, :1].expand_as(moved), atol=1e-4) and moved.abs().max() > 1e-3


@pytest.mark.parametrize("name, prunes", [
    ("Llama, SmolLM2", "neurons"), ("Llama, SmolLM2", "both"),
    ("Gemma 2", "both"), ("Granite", "both"),  # normalised before it is added up; scaled
])  # fmt: skip
def test_repair_brings_a_model_nearer_to_the_dense_one(name, prunes):
    model, _, gates = by_fisher(name, prunes)
    blocks = torch.randint(3, 80, (24, 16))
    wanted = logits(families.make(name), blocks)
    fixed = nb.repair(model, blocks)
    far, near = ((logits(each, blocks) - wanted).square().mean() for each in (model, fixed))
    assert near < 0.8 * far and torch.equal(nb.get_gates(fixed), gates)


def test_what_has_no_neurons_to_prune_is_said():
    for name in ("Mixtral", "LFM2"):
        model = families.make(name)
        with pytest.raises(nb.UserError, match="neurons of .* cannot be found in .*experts.*take --prune heads"):
            nb.plan_closing(model, nb.Settings(prune="both"))
        assert nb.plan_closing(model, nb.Settings(prune="heads")), "and the cell, run again, takes the other setting"
    with pytest.raises(nb.UserError, match="different numbers of neurons: take --prune heads"):
        nb.plan_closing(families.make("DeepSeek V3"), nb.Settings(prune="neurons"))


def test_the_plan_says_what_will_go():
    model, closed = make("llama"), torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 1]])
    tried = "tried: what is closed can be cut out"
    said = nb.plan_closing(model, nb.Settings(prune="both", pruning_level=0.2))
    assert said == f"8 heads and 128 neurons, 20% of whose parameters will be closed\n{tried}"
    assert nb.get_gates(model).shape == (2, 68)
    said = nb.plan_closing(model, nb.Settings(pruning_level=0.5, uniform="yes"))
    assert said == f"8 heads, 50% of which will be closed, in every layer alike\n{tried}"
    nb.set_gates(model, closed)
    assert nb.plan_closing(model, nb.Settings(pruning_level=0.25)) == f"8 heads, 25% of which will be closed\n{tried}"
    assert torch.equal(nb.get_gates(model), closed), "its cell, run again, opens nothing"
    said = nb.plan_closing(families.make("BLOOM"), nb.Settings(pruning_level=0.25))
    assert "nothing can be cut out, because cut, it fails" in said and said.endswith("keeps its gates, and its size")


@pytest.mark.parametrize("prunes, least, most", [
    ("heads", 1, "0.75"), ("heads", 2, "0.50"), ("neurons", 1, "0.94"), ("both", 1, "0.93"),
])  # fmt: skip
def test_a_level_out_of_reach_is_said_with_what_can_be_reached(prunes, least, most):
    """Wide layers keep 32 of their 1,024 neurons; every layer keeps so many of its four heads. A sweep is asked too."""
    model = make("llama", intermediate_size=1024)
    for level in (dict(pruning_level=0.99), dict(sweep="random 0.1 0.99")):
        with pytest.raises(nb.UserError, match=f"is 0.99 with min_heads {least}, but at most {most} can be closed so"):
            nb.plan_closing(model, nb.Settings(prune=prunes, min_heads=least, **level))
    if prunes == "neurons":  # a level that is less than half a chunk out of reach, too
        with pytest.raises(nb.UserError, match="is 0.95 with min_heads 1, but at most 0.94 can be closed so"):
            nb.plan_closing(model, nb.Settings(prune=prunes, pruning_level=0.95))
    settings = nb.Settings(prune=prunes, min_heads=least, pruning_level=float(most) - 0.01)
    nb.plan_closing(model, settings)
    assert nb.gates_for(model, torch.rand(nb.get_gates(model).shape), settings).sum() > 0, "and so it is"
