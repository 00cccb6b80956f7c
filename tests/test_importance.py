"""The strategies against closed forms, hand computations and independent code."""

import math

import pytest
import torch
from conftest import logits, make, outputs_of, random_blocks, zero_units

import PruningAndFineTuningColab as nb

KINDS = pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "falcon"])  # fused in different orders, or not


@torch.no_grad()
def test_entropy_equals_a_computation_by_hand(tokens):
    """Layer by layer, without hooks."""
    model, expected, literal = make("gpt2"), [], []
    for x, block in zip(model(tokens, output_hidden_states=True).hidden_states, model.transformer.h):
        attn = block.attn
        parts = attn.c_attn(block.ln_1(x)).split(32, dim=-1)
        q, k, v = (part.view(*part.shape[:2], 4, 8).transpose(1, 2) for part in parts)
        scores = (q @ k.mT / math.sqrt(8)).masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf)
        weights = scores.softmax(-1)  # (batch, heads, time, time)
        outputs = attn.c_proj.weight.split(8)
        written = torch.stack([(weights @ v)[:, head] @ outputs[head] for head in range(4)], 1)
        stream = x + written.sum(1) + attn.c_proj.bias
        entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1)[..., 1:]
        focus = 1 - entropy / torch.arange(2, 17).log()
        share = written.norm(dim=-1)[..., 1:] / stream.norm(dim=-1)[:, None, 1:]
        expected.append((share * (1 + focus)).mean((0, 2)))
        literal.append(-entropy.mean((0, 2)))
    for nb.COMPUTING.batch_size in (1, 2):
        score = nb.get_strategy("entropy").score(model, tokens)
        torch.testing.assert_close(score, torch.stack(expected), rtol=1e-4, atol=1e-5)
    score = nb.get_strategy("entropy-literal").score(model, tokens)
    torch.testing.assert_close(score, torch.stack(literal), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_sink_is_idle_for_entropy_but_not_for_the_literal_rule(tokens):
    """Head 0 of layer 0 stares at one token whose value is nearly zero: sharp attention, nothing written."""
    model = make("gpt2")
    attn = model.transformer.h[0].attn
    attn.c_attn.weight[:, :8] *= 50  # sharp queries
    attn.c_attn.weight[:, 64:72] *= 1e-3  # empty values
    assert nb.get_strategy("entropy").score(model, tokens).flatten().argmin() == 0
    assert nb.get_strategy("entropy-literal").score(model, tokens).flatten().argmax() == 0


@pytest.mark.parametrize("family, prunes", [
    ("gpt2", "heads"), ("gpt_neox", "heads"), ("falcon", "heads"), ("llama", "heads"), ("llama", "neurons"),
    ("llama", "both"),
])  # fmt: skip
def test_every_strategy_scores_every_unit_and_leaves_the_model_as_it_was(family, prunes, tokens):
    model = make(family)
    nb.prune_only(model, prunes)
    attention, before, dense = model.config._attn_implementation, nb.fingerprint(model), logits(model, tokens)
    for name in nb.STRATEGIES:
        if name == "entropy-literal" and prunes != "heads":
            continue
        options = {"level": 0.3, "steps": 4} if name == "learned" else {}
        score = nb.get_strategy(name, **options).score(model, tokens)
        assert score.shape == nb.get_gates(model).shape and score.isfinite().all()
        assert len(set(score.flatten().tolist())) > 1 and score[:, -4:].std() > 0
    assert model.config._attn_implementation == attention and nb.fingerprint(model) == before
    assert not any(m._forward_hooks or len(m._forward_pre_hooks) > 1 for m in model.modules())
    assert torch.equal(logits(model, tokens), dense)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@KINDS
def test_gradient_equals_finite_differences(family, tokens):
    """Moves one head's output weights a little, by path and without hooks."""

    def losses(scale):
        predicted = logits(zero_units(make(family), scale), tokens)[:, :-1].double()
        return torch.nn.functional.cross_entropy(predicted.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)

    steps = 1e-2 * torch.eye(8).view(8, 2, 4)  # one for each head
    slopes = torch.stack([losses(1 + step) - losses(1 - step) for step in steps], 1).view(2, 2, 4) / (2 * 1e-2)
    for nb.COMPUTING.batch_size in (1, 2):
        for name, expected in (("gradient", slopes.abs().mean(0)), ("fisher", slopes.square().mean(0))):
            score = nb.get_strategy(name).score(make(family), tokens).double()
            torch.testing.assert_close(score, expected, rtol=2e-2, atol=2e-2 * expected.max().item())


@pytest.mark.parametrize("temperature", [1.0, 0.03])
def test_soft_gates_keep_the_budget_and_their_slope(temperature):
    scores = torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True)
    gates = nb.soft_gates(scores, 9.0, temperature)
    torch.testing.assert_close(gates.sum((1, 2)), torch.full((2,), 9.0, dtype=torch.double), atol=1e-3, rtol=0)
    for some, own in zip(gates.detach(), scores.detach()):
        assert (some.flatten()[own.flatten().argsort()].diff() >= 0).all()
    if temperature == 1:
        assert torch.autograd.gradcheck(lambda s: nb.soft_gates(s, 9.0, temperature), scores, eps=1e-4, atol=1e-4)


@KINDS
def test_learned_gates_find_the_heads_that_do_nothing(family, tokens):
    dead = torch.tensor([[1.0, 0, 1, 1], [0, 1, 0, 1]])
    model = zero_units(make(family), dead)
    score = nb.get_strategy("learned", level=3 / 8, steps=40).score(model, tokens)
    assert torch.equal(nb.choose_gates(score, 3 / 8), dead)


def test_what_is_random_depends_on_its_seed_only(tokens):
    def learned(seed):
        return nb.get_strategy("learned", level=0.5, steps=10, seed=seed).score(make("gpt2"), tokens)

    def random(seed, model=0):
        return nb.get_strategy("random", seed=seed).score(make("opt", seed=model))

    assert torch.equal(learned(3), learned(3)) and not torch.equal(learned(3), learned(4))
    assert torch.equal(random(3), random(3, 1)) and not torch.equal(random(3), random(4))


# the first of the 8 rows (columns of the output) of head 1 in layer 1, for query, key, value and output
BY_HAND = {
    "gpt2": {"c_attn": (8, 32 + 8, 64 + 8), "c_proj": (8,)},
    "opt": {"q_proj": (8,), "k_proj": (8,), "v_proj": (8,), "out_proj": (8,)},
    "gpt_neox": {"query_key_value": (24, 24 + 8, 24 + 16), "dense": (8,)},
    "llama": {"q_proj": (8,), "k_proj": (0,), "v_proj": (0,), "o_proj": (8,)},  # heads 0 and 1 share key/value head 0
    "phi3": {"qkv_proj": (8, 32, 48), "o_proj": (8,)},
    "gpt_bigcode": {"c_attn": (8, 32, 40), "c_proj": (8,)},
    "falcon": {"query_key_value": (8, 16, 24), "dense": (8,)},  # a group is: query, query, key, value
    "falcon_multi_query": {"query_key_value": (8, 32, 40), "dense": (8,)},
}


@pytest.mark.parametrize("family", BY_HAND)
@torch.no_grad()
def test_magnitude_equals_a_hand_computation(family):
    model, squares = make(family), []
    path, output = list(outputs_of(model).items())[1]
    for name, firsts in BY_HAND[family].items():
        part = model.get_submodule(f"{path.rpartition('.')[0]}.{name}")
        rows = part.weight.T if (part is output) != (family == "gpt2") else part.weight  # (GPT-2's Conv1D is turned)
        squares += [rows[first : first + 8].square().sum() for first in firsts]
    torch.testing.assert_close(nb.get_strategy("magnitude").score(model)[1, 1], torch.stack(squares).sum().sqrt())


def test_unknown_strategies_and_options_are_refused():
    with pytest.raises(nb.UserError, match="'entropie'.*learned, fisher.*mean 'entropy'"):
        nb.get_strategy("entropie")
    with pytest.raises(nb.UserError, match="'magnitude'.*seed"):
        nb.get_strategy("magnitude", seed=1)


@pytest.mark.parametrize("level, min_heads, closed", [(0, 1, 0), (0.3, 1, 7), (0.5, 4, 12), (0.87, 1, 21)])
def test_level_and_minimum_are_kept(level, min_heads, closed):
    importance = torch.rand(3, 8)
    importance[0] = 0  # the whole first layer looks useless
    gates = nb.choose_gates(importance, level, min_heads)
    assert (gates == 0).sum() == closed and gates.sum(1).min() >= min_heads
    report = nb.describe_units(make("gpt2", n_layer=3, n_head=8), gates)["heads"]
    assert (report["total"], report["closed"], sum(report["open_per_layer"])) == (24, closed, 24 - closed)
    assert report["closed_list"] == (gates == 0).nonzero().tolist()


def test_the_least_important_heads_are_closed_as_far_as_the_minimum_allows():
    importance = torch.tensor([[5.0, 1, 4], [2.0, 6, 3]])
    assert nb.choose_gates(importance, 1 / 3).tolist() == [[1, 0, 1], [0, 1, 1]]
    assert nb.choose_gates(importance, 2 / 3).tolist() == [[1, 0, 0], [0, 1, 0]]
    with pytest.raises(nb.UserError, match="0.8 with min_heads 2, but at most 0.50 can be closed so"):
        nb.choose_gates(torch.rand(6, 4), 0.8, min_heads=2)


@pytest.mark.parametrize("strategy", ["fisher", "learned"])
def test_float16_is_enough(strategy):
    """In which GPUs without bfloat16 score."""
    model = make("llama", max_position_embeddings=1024)
    blocks = random_blocks(4, 512, seed=0)
    rule = nb.get_strategy(strategy, **({"level": 0.25, "steps": 8} if strategy == "learned" else {}))
    exact, half = (rule.score(model, blocks) for nb.COMPUTING.dtype in (torch.float32, torch.float16))
    if strategy == "fisher":
        exact, half = exact.log(), half.log()
    assert torch.corrcoef(torch.stack([exact.flatten(), half.flatten()]))[0, 1] > 0.99
