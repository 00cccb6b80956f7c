"""Repair against closed forms and against models whose closed heads can be replaced exactly."""

import pytest
import torch
from conftest import OPEN, gated, logits, make, outputs_of, random_blocks
from transformers.pytorch_utils import Conv1D

import PruningAndFineTuningColab as nb

TEXT = random_blocks(16, 24, seed=2)


@torch.no_grad()
def refit(projection, x, target):
    problem = nb.LeastSquares(projection)
    for part in zip(x, target):
        problem.add(*(texts[None] for texts in part))
    problem.solve()


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d"])
def test_refit_is_least_squares(kind, monkeypatch):
    monkeypatch.setattr(nb, "RIDGES", (1e-9,))
    projection = Conv1D(5, 8) if kind == "conv1d" else torch.nn.Linear(8, 5, bias=kind == "linear")
    x, target, kept = torch.randn(2, 30, 8), torch.randn(2, 30, 5), torch.arange(8) != 3
    before = nb.inputs_first(projection).detach().clone()
    design = x.flatten(0, 1)[:, kept]
    if projection.bias is not None:
        design = torch.cat([design, torch.ones(60, 1)], 1)
    best = torch.linalg.lstsq(design, target.flatten(0, 1)).solution
    projection.gates = kept.float()
    refit(projection, x, target)
    torch.testing.assert_close(nb.inputs_first(projection)[kept], best[:7], rtol=1e-3, atol=1e-4)
    assert torch.equal(nb.inputs_first(projection)[3], before[3]), "a closed head's weights stay as they are"
    if projection.bias is not None:
        torch.testing.assert_close(projection.bias, best[7], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("noise, weakest", [(0.0, True), (10.0, False)])
def test_the_ridge_is_the_one_that_does_best_on_tokens_that_are_held_out(noise, weakest, monkeypatch):
    """Targets that the inputs explain want a weak ridge, those that are mostly noise a strong one."""
    monkeypatch.setattr(nb, "RIDGES", (1e-9, 1e9))
    projection, x, wanted = torch.nn.Linear(8, 5), torch.randn(2, 30, 8), torch.randn(8, 5)
    before = projection.weight.detach().clone()
    refit(projection, x, x @ (wanted if weakest else before.T) + noise * torch.randn(2, 30, 5))
    torch.testing.assert_close(projection.weight, wanted.T if weakest else before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "phi"])
def test_a_head_that_another_one_repeats_is_repaired_exactly(family, monkeypatch):
    """Head 1 of every layer gets the query, key and value weights of head 0; its own output weights differ."""
    monkeypatch.setattr(nb, "RIDGES", (1e-9, 1.0))
    model = gated(family, OPEN)
    with torch.no_grad():
        for layer in nb.find_heads(model):
            for name, rows in nb.find_rows(layer.module, layer.number, layer.size):
                projection = getattr(layer.module, name)
                weight = projection.weight.T if isinstance(projection, Conv1D) else projection.weight
                weight[rows[1]] = weight[rows[0]]
                if projection.bias is not None:
                    projection.bias[rows[1]] = projection.bias[rows[0]]
    dense, unseen = logits(model, TEXT), torch.randint(3, 97, (2, 24))
    dense_unseen = logits(model, unseen)
    nb.set_gates(model, torch.tensor([[1.0, 0, 1, 1], [1, 0, 1, 1]]))
    pruned = logits(model, TEXT)
    fixed = nb.repair(model, TEXT)
    torch.testing.assert_close(logits(fixed, TEXT), dense, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(logits(fixed, unseen), dense_unseen, rtol=1e-2, atol=1e-2)
    assert (pruned - dense).abs().max() > 0.1, "closing the head did something"
    if nb.can_compact(fixed):
        assert nb.largest_difference(fixed, nb.compact(fixed), TEXT) < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_the_target_lies_halfway_to_what_all_heads_would_write(family):
    """The inputs are those before the gates, so that closed heads are among them."""
    model, seen, wanted = gated(family, [[1.0, 0, 1, 0], [1, 1, 0, 1]]), {}, torch.randn(16, 24, 32)
    layer = nb.find_heads(model)[0]
    with torch.no_grad(), nb.hooks(nb.watch_layer(layer, seen)):
        model(TEXT)
        target, closed = nb.halfway(layer.projection, seen["heads"], wanted), seen["attention"]
        nb.set_gates(model, OPEN)
        model(TEXT)
    torch.testing.assert_close(target, (wanted + seen["attention"]) / 2)
    assert torch.dist(closed, seen["attention"]) > 0.01, "closing the heads did something"


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "falcon", "phi3", "stablelm"])
def test_repair_comes_nearer_to_the_dense_model_and_touches_nothing_else(family, gates):
    model = gated(family, gates)
    dense = logits(make(family), TEXT)
    before, pruned = {name: value.clone() for name, value in model.state_dict().items()}, logits(model, TEXT)
    fixed = nb.repair(model, TEXT)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.dist(logits(fixed, TEXT), dense) < 0.95 * torch.dist(pruned, dense)
    assert torch.equal(nb.get_gates(fixed), gates)
    changed = [path for path, value in fixed.state_dict().items() if not torch.equal(value, before[path])]
    written = {path.rpartition(".")[0] for path in changed}
    assert outputs_of(model).keys() <= written and len(written) == 4, written
    for now, then, row in zip(nb.find_heads(fixed), nb.find_heads(model), gates):  # closed heads can come back
        assert torch.equal(now.output_weight[row == 0], then.output_weight[row == 0])
        assert not torch.equal(now.output_weight[row == 1], then.output_weight[row == 1])
    assert not any(module._forward_hooks or len(module._forward_pre_hooks) > 1 for module in fixed.modules())


def test_repair_with_nothing_closed_changes_nothing_that_counts():
    model = gated("gpt2", OPEN)
    fixed = logits(nb.repair(model, TEXT), TEXT)
    torch.testing.assert_close(fixed, logits(model, TEXT), rtol=1e-2, atol=1e-2)  # targets are kept in bfloat16


def test_a_layer_without_heads_is_repaired_by_the_others():
    dense, model = logits(make("opt"), TEXT), gated("opt", [[0, 0, 0, 0], [1, 1, 1, 1]])
    assert torch.dist(logits(nb.repair(model, TEXT), TEXT), dense) < torch.dist(logits(model, TEXT), dense)


@pytest.mark.parametrize("number, batch_size, taken", [(16, 4, 4), (15, 4, 3), (13, 4, 1)])
def test_any_number_of_blocks_in_batches_of_any_size(number, batch_size, taken, gates, monkeypatch):
    model, sizes, real = gated("llama", gates), set(), nb.run_layer
    nb.COMPUTING.batch_size = 1
    wanted = logits(nb.repair(model, TEXT[:number]), TEXT)
    monkeypatch.setattr(nb, "run_layer", lambda *what: sizes.add(len(what[2])) or real(*what))
    nb.COMPUTING.batch_size = batch_size
    torch.testing.assert_close(logits(nb.repair(model, TEXT[:number]), TEXT), wanted, rtol=1e-3, atol=1e-3)
    assert max(sizes) == taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_format_can_be_repaired(dtype, gates):
    nb.COMPUTING.dtype = dtype
    dense, model = logits(make("llama"), TEXT), gated("llama", gates)
    assert torch.dist(logits(nb.repair(model, TEXT), TEXT), dense) < 0.95 * torch.dist(logits(model, TEXT), dense)
