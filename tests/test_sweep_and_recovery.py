"""The sweep, the level that is found, and the training loop: on small random models, without a network."""

import copy
import json
import math

import families
import pandas
import pytest
import torch
from conftest import OPEN, gated, logits, make, new_run, random_blocks

import PruningAndFineTuningColab as nb

CLOSED = torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 1]])


@pytest.fixture
def run(tmp_path):
    few = {"gate_steps": 2, "batch_size": 2, "max_steps": 10, "block_length": 16}
    return new_run(tmp_path, sweep="random gradient learned 0 0.25 0.5", learning_rate=1e-2, **few)


@pytest.fixture
def blocks():
    text = random_blocks(24, seed=5)
    return {"train": text[:12], "validation": text[12:18], "test": text[18:]}


def three(blocks):
    """The texts to score on, to repair on, and to test on."""
    return blocks["validation"], blocks["train"], blocks["test"]


@pytest.mark.parametrize("at, kept", [(8, 4), (17, 10)])
def test_a_sweep_goes_on_where_it_was_interrupted(at, kept, run, blocks, monkeypatch):
    """In the second strategy, and among the other kinds of units."""
    model, scored, measured, real, score = gated("gpt2", CLOSED), [], [], nb.perplexity, nb.Gradient.score

    def counting(*arguments):
        measured.append(1)
        if len(measured) == at:
            raise KeyboardInterrupt
        return real(*arguments)

    def noted(self, *arguments):
        scored.append(self.squared)
        return score(self, *arguments)

    monkeypatch.setattr(nb, "perplexity", counting)
    monkeypatch.setattr(nb.Gradient, "score", noted)
    with pytest.raises(KeyboardInterrupt):
        nb.sweep(run, model, three(blocks), run.settings)
    assert len(list(run.state.glob("point-*"))) == kept, "what was finished is kept"
    assert model.prunes == "heads" and torch.equal(nb.get_gates(model), CLOSED), "and the model is as it was"
    points = nb.sweep(run, model, three(blocks), run.settings)
    rows = [("heads", "random"), ("heads", "gradient"), ("heads", "learned"), ("neurons", "random"), ("both", "random")]
    wanted = [(*row, level) for row in rows for level in (0, 0.25, 0.5)]
    assert [(point["prune"], point["strategy"], point["level"]) for point in points] == wanted
    assert [point["closed"] for point in points[:9]] == [0, 2, 4] * 3
    assert scored.count(False) == 1 and scored.count(True) == 3, "once for all levels, but learned gates depend on it"
    done = len(measured), len(scored)
    assert nb.sweep(run, model, three(blocks), run.settings) == points and (len(measured), len(scored)) == done
    assert model.prunes == "heads" and torch.equal(nb.get_gates(model), CLOSED)


def test_the_points_of_a_sweep_are_right_for_all_kinds_of_units(run, blocks, capsys):
    model = gated("llama", OPEN)
    dense = nb.perplexity(model, blocks["test"])
    run.metrics |= {"perplexity": {"dense": dense}, "blocks": {"train": 12, "validation": 6, "test": 6, "tested": 6}}
    run.settings = nb.dataclasses.replace(run.settings, sweep="gradient random 0 0.25 0.5")
    with pytest.raises(SystemExit):
        nb.run_sweep(run, model, three(blocks))
    points, said = run.metrics["sweep"], capsys.readouterr().out
    assert points[0]["pruned"] == points[3]["pruned"] == points[0]["repaired"] == pytest.approx(dense)
    for number, kind in ((2, "heads"), (8, "neurons"), (11, "both")):
        other, point = make("llama"), points[number]
        nb.prune_only(other, kind)
        importance = nb.get_strategy("gradient").score(other, blocks["validation"])
        wanted = nb.dataclasses.replace(run.settings, prune=kind, pruning_level=0.5)
        nb.set_gates(other, nb.gates_for(other, importance, wanted))
        assert (point["prune"], point["strategy"], point["level"]) == (kind, "gradient", 0.5)
        assert point["pruned"] == pytest.approx(nb.perplexity(other, blocks["test"]))
        assert point["repaired"] == pytest.approx(nb.perplexity(nb.repair(other, blocks["train"]), blocks["test"]))
        assert point["parameters"] == nb.compact(other).num_parameters()
        assert point["flops_per_token"] == nb.predict_cost(other, nb.get_gates(other), 16)["flops_per_token"]
    table = [line for line in said.splitlines() if line.startswith("| ")]
    assert table == nb.points_table(points).splitlines() and "left out" not in said
    assert table[0] == "|  | 0% | 25% | 50% |" and table[2].startswith("| heads, gradient | ")
    assert f"{points[2]['pruned']:.2f} → {points[2]['repaired']:.2f} |" in table[2]
    written = pandas.read_csv(run.folder / "sweep.csv", float_precision="round_trip")
    assert written["repaired"].tolist() == [point["repaired"] for point in points]
    assert (run.folder / "sweep.png").exists() and run.folder.with_name(run.folder.name + ".zip").exists()
    figure = nb.draw_points(points, nb.dense_point(model, 16, dense), 0.1)
    labels = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    kinds = ["heads, gradient", "heads, random", "neurons, gradient", "both, gradient"]
    assert labels == [*kinds, "dense", "dense + 10%"] and figure.axes[0].get_yscale() == "log"


def test_what_cannot_be_pruned_is_left_out_of_a_sweep(run, blocks, capsys):
    experts, settings = families.make("Mixtral"), nb.dataclasses.replace(run.settings, sweep="random 0.25 0.9")
    points = nb.sweep(run, experts, three({split: part % 80 for split, part in blocks.items()}), settings)
    said = capsys.readouterr().out
    assert [(point["prune"], point["level"]) for point in points] == [("heads", 0.25)]
    assert "heads, random: left out, pruning_level is 0.9" in said and "neurons, random: left out, the neurons" in said


@pytest.mark.parametrize("loss, found, tried", [(0.1, 0.421875, 6), (1e-9, 0.0625, 6), (100, 0.8125, 3)])
def test_the_level_that_is_found_is_the_largest_within_the_loss(loss, found, tried, run, blocks, monkeypatch):
    """Perplexity is made to rise by a quarter of what is closed; beyond 6 of 8 heads nothing can be closed."""
    model = gated("gpt2", OPEN)
    run.settings = nb.dataclasses.replace(run.settings, max_loss=loss, repair=0)
    monkeypatch.setattr(nb, "perplexity", lambda model, _: 10 * (1 + float((nb.get_gates(model) == 0).sum()) / 32))
    result = nb.find_level(run, model, torch.arange(8.0).view(2, 4), (blocks["train"], blocks["validation"]), 10.0)
    assert result["dense"] == 10 and len(result["points"]) == tried
    within = [point["level"] for point in result["points"] if point["pruned"] <= 10 * (1 + run.settings.max_loss)]
    assert result["found"] == max(within, default=0.0) == found
    assert (nb.get_gates(model) == 1).all(), "the gates are as they were"
    assert json.loads(json.dumps(result)) == result


def test_without_repair_it_is_the_pruned_model_that_is_trained(run, blocks):
    """Then model and pruned model are one, and the teacher has all gates open."""
    model = gated("opt", CLOSED)
    run.metrics["model"] = {"saved_in": "float32"}
    run.settings = nb.dataclasses.replace(run.settings, repair=0, max_steps=1)
    pruned = nb.repaired(run, model, None, blocks["train"], blocks["test"])
    tuned = nb.fine_tune_pruned(run, model, pruned, blocks)
    assert tuned.num_parameters() == nb.compact(model).num_parameters() < model.num_parameters()
    assert torch.equal(tuned.kept, CLOSED) and torch.equal(nb.get_gates(model), CLOSED)


# --- the training loop


def test_training_is_adamw_with_a_warmup_and_a_cosine(run, blocks, monkeypatch):
    """The same loop, written down once more in plain PyTorch."""
    monkeypatch.setattr(nb, "PATIENCE", 100)
    settings = nb.dataclasses.replace(run.settings, max_steps=20, batch_size=3)
    model, other = make("llama"), make("llama")  # (without biases: that of a key has no gradient but rounding)
    steps = nb.draw(12, 3, 20, torch.Generator().manual_seed(settings.seed))
    assert len(steps) == 20 and all(len(step) == 3 for step in steps)
    epochs = torch.cat(steps).view(5, 12).sort().values
    assert torch.equal(epochs, torch.arange(12).expand(5, 12)), "every block once in every pass"
    weights, losses = {}, []
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.01)
    for number, step in enumerate(steps):
        rate = (number + 1) / 2 if number < 2 else (1 + math.cos(math.pi * (number - 2) / 18)) / 2
        optimizer.param_groups[0]["lr"] = 1e-2 * rate
        optimizer.zero_grad()
        loss = other(blocks["train"][step], labels=blocks["train"][step]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        weights[number + 1] = copy.deepcopy(other.state_dict())
    record = nb.train(run, "fine_tuned", model, blocks, settings)
    pairs = [[number, sum(losses[number - 2 : number]) / 2] for number in range(2, 21, 2)]
    torch.testing.assert_close(torch.tensor(record["history"]["loss"]), torch.tensor(pairs), rtol=1e-4, atol=0)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, weights[record["kept_step"]][name], rtol=1e-3, atol=1e-4)


def test_the_best_weights_are_kept_and_training_stops(run, blocks):
    """At this learning rate a random model learns its few training texts by heart, and validation gets worse."""
    settings, tuned = nb.dataclasses.replace(run.settings, max_steps=100), make("gpt2")
    record = nb.train(run, "fine_tuned", tuned, blocks, settings)
    seen = dict(record["history"]["perplexity"])
    assert record["steps"] < record["planned_steps"] == 100
    assert record["kept_step"] == min(seen, key=seen.get) == record["steps"] - nb.PATIENCE * 10
    assert nb.perplexity(tuned, blocks["validation"]) == pytest.approx(min(seen.values()), rel=1e-3)
    assert not tuned.training and all(parameter.grad is None for parameter in tuned.parameters())


def test_distillation_pulls_to_the_teacher(run, blocks, monkeypatch):
    monkeypatch.setattr(nb, "PATIENCE", 100)
    teacher, texts = gated("opt", OPEN), blocks["train"]
    settings = nb.dataclasses.replace(run.settings, distillation=1.0, learning_rate=1e-3)

    def trained(name, model, **changes):
        model = copy.deepcopy(model)
        nb.train(run, name, model, blocks, nb.dataclasses.replace(settings, **changes), teacher)
        return model

    for name, value in trained("same", teacher).state_dict().items():
        # the divergence from itself is zero, so is its gradient; AdamW only decays a little
        torch.testing.assert_close(value, teacher.state_dict()[name], rtol=1e-2, atol=2e-2)

    pruned, dense = gated("opt", CLOSED), logits(teacher, texts).log_softmax(-1)
    taught, alone = trained("taught", pruned), trained("alone", pruned, distillation=0.0)
    models = (pruned, taught, alone)
    before, after, without = (torch.dist(logits(model, texts).log_softmax(-1), dense) for model in models)
    assert torch.equal(nb.get_gates(taught), CLOSED) and after < before and after < without


def test_a_model_that_was_trained_in_16_bits_computes_in_32_again(run, blocks):
    nb.COMPUTING.dtype = torch.bfloat16
    tuned, exact, fresh = make("llama"), make("llama"), make("llama")
    seen = nb.train(run, "fine_tuned", tuned, blocks, run.settings)["history"]["loss"]
    assert all(parameter.dtype == torch.float32 for parameter in tuned.parameters()) and "forward" not in vars(tuned)
    fresh.load_state_dict(tuned.state_dict())
    assert nb.largest_difference(tuned, fresh, blocks["test"]) == 0
    nb.COMPUTING.dtype = torch.float32
    wanted = nb.train(run, "exact", exact, blocks, run.settings)["history"]["loss"]
    assert seen != wanted and torch.allclose(torch.tensor(seen), torch.tensor(wanted), rtol=0.02)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradient_checkpointing_trains_the_same(family, run, blocks, monkeypatch):
    """On a compact model with unevenly read key/value heads and a layer with a single head."""
    monkeypatch.setattr(nb, "PATIENCE", 100)
    model, calls, tuned = gated(family, [[1, 0, 1, 1], [0, 0, 0, 1]]), {False: [], True: []}, {}
    for on in calls:
        tuned[on] = nb.compact(model)
        (mlp,) = (module for name, module in tuned[on].named_modules() if name.endswith(".0.mlp"))
        mlp.register_forward_pre_hook(lambda *_, on=on: calls[on].append(1))
        settings = nb.dataclasses.replace(run.settings, gradient_checkpointing=on)
        nb.train(run, f"training-{on}", tuned[on], blocks, settings)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(tuned[False].parameters(), tuned[True].parameters()))
    assert len(calls[True]) == len(calls[False]) + settings.max_steps, "every step computes the layer twice"
    assert not tuned[True].is_gradient_checkpointing and tuned[True].config.use_cache == model.config.use_cache
