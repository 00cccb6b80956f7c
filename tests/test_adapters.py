"""What fits into memory is found and said; adapters are trained on frozen weights, in 16 bits where that is needed."""

import copy
import dataclasses

import pytest
import torch
from conftest import gated, logits, make, new_run, random_blocks

import PruningAndFineTuningColab as nb


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Makes a record in which so much memory is free."""

    def begin(free: float, **settings):
        monkeypatch.setattr(nb, "memory_free", lambda device: free)
        return new_run(tmp_path, **settings)

    return begin


@pytest.mark.parametrize("free, asked, way, weights", [
    (1e12, "auto", "all", torch.float32),
    (20e9, "auto", "lora", torch.bfloat16),
    (1e12, "lora", "lora", torch.bfloat16),
])  # fmt: skip
def test_all_weights_where_they_fit_else_adapters_on_16_bits(run, capsys, free, asked, way, weights):
    record = run(free, train=asked)
    assert nb.choose_training(record, record.settings, 10**9, torch.bfloat16).train == way
    assert nb.COMPUTING.weights == weights and record.settings.train == way
    said = capsys.readouterr().out
    assert "1,000.0 M parameters" in said and f"{free / 1e9:.1f} GB are free" in said


@pytest.mark.parametrize("free, settings, said", [
    (20e9, {"train": "all"}, r"train is 'all', .* about \d+\.\d GB .* GB are free: take --train lora, a smaller model"),
    (5e9, {"train": "auto"}, r"train is 'auto', .* about \d+\.\d GB .* GB are free: take a smaller model"),
    (5e9, {"train": "lora"}, r"train is 'lora', .* about \d+\.\d GB .* GB are free: take a smaller model"),
    (20e9, {"reopen_heads": True}, "reopen_heads is True, but must be off"),  # it is the memory that asks for adapters
])  # fmt: skip
def test_what_does_not_fit_or_go_together_is_refused(run, free, settings, said):
    record = run(free, **settings)
    with pytest.raises(nb.UserError, match=said):
        nb.choose_training(record, record.settings, 10**9, torch.float32)


DIFFER = [[1, 0, 1, 0], [1, 1, 1, 0]]  # gates of layers that differ


def cut_model(family: str, dtype=torch.float32):
    return nb.compact(gated(family, DIFFER)).to(dtype)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_adapters_are_the_adapted_model(family, dtype, tokens):
    model = cut_model(family, dtype)
    names, before = set(model.state_dict()), copy.deepcopy(model.state_dict())
    adapted = nb.add_adapters(model, seed=0)
    learns = nb.trained(model)
    assert all("lora" in name and part.dtype == torch.float32 for name, part in learns.items())
    linear = [part for part in cut_model(family).modules() if isinstance(part, torch.nn.Linear | nb.Conv1D)]
    assert len(learns) == 2 * (len(linear) - 1)  # all but the output matrix
    for parameter in learns.values():
        parameter.data.normal_(std=0.1)
    wanted = logits(model, tokens).float()
    adapted.merge_and_unload()
    assert set(model.state_dict()) == names
    changed = [name for name, part in model.state_dict().items() if not torch.equal(part, before[name])]
    assert len(changed) == len(linear) - 1
    assert (logits(model, tokens).float() - wanted).abs().max() / wanted.abs().max() < nb.tolerated(model)


def test_no_adapter_stands_where_a_gate_does_not_reach_it():
    model = gated("bloom", DIFFER)
    nb.add_adapters(model, seed=0)
    assert not [name for name in nb.trained(model) if "self_attention.dense" in name]
    assert [name for name in nb.trained(model) if "query_key_value" in name]


def test_training_adapters_changes_nothing_else_and_learns(run):
    record = run(1e12, train="lora", model="demo", max_steps=20, batch_size=2, learning_rate=1e-3)
    settings, model = record.settings, cut_model("gpt2")
    blocks = dict.fromkeys(("train", "validation"), torch.arange(64).view(2, 32) % 90)
    before, embedding = nb.perplexity(model, blocks["train"]), model.get_input_embeddings().weight.clone()
    tuned = nb.fine_tuned(record, "fine_tuned", model, blocks, settings)
    assert nb.perplexity(tuned, blocks["train"]) < 0.9 * before
    assert torch.equal(tuned.get_input_embeddings().weight, embedding)
    again = nb.fine_tuned(record, "fine_tuned", cut_model("gpt2"), blocks, settings)  # kept from before
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), again.parameters(), strict=True))
    other = nb.fine_tuned(record, "fine_tuned", cut_model("gpt2"), blocks, dataclasses.replace(settings, train="all"))
    assert not torch.equal(other.get_input_embeddings().weight, embedding)


@pytest.mark.parametrize("prune", ["heads", "both"])
def test_weights_in_16_bits_go_the_whole_way(tmp_path, prune):
    """Scored, closed, repaired, cut, saved, and opened again."""
    model = make("llama").to(torch.bfloat16)
    blocks = random_blocks(8)
    nb.COMPUTING.dtype = nb.COMPUTING.weights = torch.bfloat16
    settings = nb.Settings(prune=prune, pruning_level=0.25)
    assert "can be cut out" in nb.plan_closing(model, settings)
    for name in ("fisher", "entropy", "magnitude"):
        assert nb.get_strategy(name).score(model, blocks).isfinite().all()
    scores = nb.get_strategy("learned", level=0.25, steps=3).score(model, blocks)
    nb.set_gates(model, nb.gates_for(model, scores, settings))
    fixed = nb.repair(model, blocks)
    assert fixed.dtype == torch.bfloat16
    small = nb.compact(fixed)
    assert nb.largest_difference(fixed, small, blocks) < nb.tolerated(small)
    nb.save_config(small, tmp_path, torch.bfloat16)
    assert nb.largest_difference(small, nb.reopen(tmp_path, small), blocks) < nb.tolerated(small)
