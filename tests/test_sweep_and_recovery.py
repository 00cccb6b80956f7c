"""The sweep, and what fine-tuning keeps: on small random models, without a network."""

import copy
import json

import families
import pytest
import torch
from conftest import make

import PruningAndFineTuningColab as nb


@pytest.fixture
def place(tmp_path):
    settings = nb.Settings(
        output_dir=str(tmp_path),
        sweep_strategies="random gradient learned",
        sweep_levels="0 0.25 0.5",
        gate_steps=2,
        batch_size=2,
        max_steps=10,
        learning_rate=1e-2,
        block_length=16,
    )
    return settings, nb.Run(settings, torch.device("cpu"), torch.float32), tmp_path / "sweep.json"


@pytest.fixture
def blocks():
    text = torch.randint(3, 97, (24, 16), generator=torch.Generator().manual_seed(5))
    return {"train": text[:12], "validation": text[12:18], "test": text[18:]}


def three(blocks):
    """The texts to score on, to repair on, and to test on."""
    return blocks["validation"], blocks["train"], blocks["test"]


def test_a_sweep_goes_on_where_it_was_interrupted(place, blocks, monkeypatch):
    settings, _, file = place
    model = make("gpt2")
    nb.add_gates(model)
    scored, measured, real, score = [], [], nb.perplexity, nb.Gradient.score

    def counting(*arguments):
        measured.append(1)
        if len(measured) == 8:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(nb, "perplexity", counting)
    monkeypatch.setattr(
        nb.Gradient, "score", lambda self, *arguments: scored.append(self.squared) or score(self, *arguments)
    )
    with pytest.raises(KeyboardInterrupt):
        nb.sweep(model, three(blocks), settings, file)
    kept = json.loads(file.read_text())
    assert len(kept) == 3 and (nb.get_gates(model) == 1).all(), "what was finished is kept, and the model is as it was"
    points = nb.sweep(model, three(blocks), settings, file)
    assert points[:3] == kept and len(points) == 9
    assert [(point["strategy"], point["level"]) for point in points] == [
        (s, v) for s in ("random", "gradient", "learned") for v in (0, 0.25, 0.5)
    ]
    assert [point["closed"] for point in points] == [0, 2, 4] * 3
    assert scored.count(False) == 2, "the interrupted scoring and one more: once for all levels"
    assert scored.count(True) == 3, "learned gates depend on the level"
    done = len(measured)
    assert nb.sweep(model, three(blocks), settings, file) == points and len(measured) == done


def test_the_points_of_a_sweep_are_right(place, blocks):
    settings, _, file = place
    model = make("opt")
    nb.add_gates(model)
    dense = nb.perplexity(model, blocks["test"])
    points = nb.sweep(model, three(blocks), settings, file)
    assert points[0]["pruned"] == points[3]["pruned"] == points[0]["repaired"] == pytest.approx(dense)
    nb.set_gates(model, nb.choose_gates(nb.get_strategy("gradient").score(model, blocks["validation"]), 0.5))
    assert points[5]["pruned"] == pytest.approx(nb.perplexity(model, blocks["test"]))
    assert points[5]["repaired"] == pytest.approx(nb.perplexity(nb.repair(model, blocks["train"]), blocks["test"]))
    table = nb.sweep_table(points, dense).splitlines()
    assert (
        table[0] == "| strategy | 0% | 25% | 50% |"
        and f"{points[5]['pruned']:.2f} → {points[5]['repaired']:.2f}" in table[3]
    )
    figure = nb.draw_sweep(points, dense)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log" and [text.get_text() for text in axes.get_legend().get_texts()] == [
        "dense",
        "learned",
        "gradient",
        "random",
    ]


def test_kinds_of_units_are_compared_by_what_they_leave(place, blocks, capsys):
    settings, run, _ = place
    settings = run.settings = nb.dataclasses.replace(settings, strategy="gradient", sweep_levels="0.25 0.5")
    run.metrics["perplexity"]["dense"] = 1.0
    model = make("llama")
    nb.add_gates(model)
    closed = torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 1]])
    nb.set_gates(model, closed)
    found = nb.sweep_kinds(run, model, three(blocks))
    assert list(found) == ["heads", "neurons", "both"] and all(len(points) == 2 for points in found.values())
    assert torch.equal(nb.get_gates(model), closed) and model.prunes == "heads", "the model is as it was"
    other = make("llama")
    nb.prune_only(other, "both")
    importance = nb.get_strategy("gradient").score(other, blocks["validation"])
    wanted = nb.dataclasses.replace(settings, prune="both", pruning_level=0.5)
    nb.set_gates(other, nb.gates_for(other, importance, wanted))
    point = found["both"][1]
    assert point["pruned"] == pytest.approx(nb.perplexity(other, blocks["test"]))
    small = nb.compact(other)
    assert point["parameters"] == small.num_parameters()
    assert point["flops_per_token"] == pytest.approx(nb.count_flops(small, blocks["test"][:1]), rel=0.01)
    dense = nb.predict_cost(model, torch.ones_like(closed), 16) | {"perplexity": nb.perplexity(small, blocks["test"])}
    figure = nb.draw_frontier(found, dense, "gradient")
    drawn = [line.get_label() for line in figure.axes[0].get_lines()]
    assert drawn == ["heads", "neurons", "both", "dense"] and "within +10 %" in figure.get_suptitle()
    assert not capsys.readouterr().out

    experts = families.make("Mixtral")
    nb.add_gates(experts)
    text = {split: part % 80 for split, part in blocks.items()}
    assert list(nb.sweep_kinds(run, experts, three(text))) == ["heads"]
    assert "neurons: left out, the neurons of" in capsys.readouterr().out


def test_the_smaller_model_is_trained_for_the_same_time(place, blocks, monkeypatch, capsys):
    speeds = {
        "dense": {"training_tokens_per_second": 100, "forward_tokens_per_second": 300},
        "pruned": {"training_tokens_per_second": 125, "forward_tokens_per_second": 400},
    }
    assert nb.steps_in_the_same_time({"size": speeds}, 100, teaching=False) == 125
    assert nb.steps_in_the_same_time({"size": speeds}, 100, teaching=True) == 88, "0.01 / (0.008 + 0.00333)"
    _, run, _ = place
    run.metrics["model"] = {"saved_in": "float32"}
    model = make("opt")
    nb.add_gates(model)
    nb.set_gates(model, torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 1]]))
    asked = []
    monkeypatch.setattr(nb, "measure", lambda run, stage, tuned, *_: asked.append((stage, tuned.num_parameters())))
    nb.fine_tune_as_long(run, model, model, None, blocks, blocks["test"])
    assert not asked, "without a control there is nothing to compare with"
    run.metrics["perplexity"]["dense_fine_tuned"] = 1.0
    run.metrics["training"] = {"fine_tuned": {"planned_steps": 8}}
    for speed, steps in ((100, 8), (125, 10)):
        speeds["pruned"]["training_tokens_per_second"] = speed
        run.metrics["size"] = speeds
        nb.fine_tune_as_long(run, model, model, None, blocks, blocks["test"])
        assert f"in the time in which the smaller one makes {steps}" in capsys.readouterr().out
    assert asked == [("fine_tuned_as_long", nb.compact(model).num_parameters())]
    assert run.metrics["training"]["fine_tuned_as_long"]["planned_steps"] == 10


def test_a_level_out_of_reach_is_refused_before_anything_is_computed(place, blocks):
    settings, _, file = place
    model = make("gpt2")
    nb.add_gates(model)
    with pytest.raises(nb.UserError, match="pruning_level is 0.95"):
        nb.sweep(model, three(blocks), nb.dataclasses.replace(settings, sweep_levels="0.1 0.95"), file)
    assert not file.exists()
    with pytest.raises(nb.UserError, match="sweep_levels is '0.1 1.5'"):
        nb.dataclasses.replace(settings, sweep_levels="0.1 1.5")
    for nothing in ("sweep_levels", "sweep_strategies"):
        with pytest.raises(nb.UserError, match=f"{nothing} is ''"):
            nb.dataclasses.replace(settings, **{nothing: ""})
    with pytest.raises(nb.UserError, match="sweep_strategies is 'best'"):
        nb.dataclasses.replace(settings, sweep_strategies="best")


def test_the_best_weights_are_kept_and_training_stops(place, blocks):
    """At this learning rate a random model learns its few training texts by heart, and validation gets worse."""
    settings, run, _ = place
    settings = nb.dataclasses.replace(settings, max_steps=100, patience=2)
    tuned = nb.fine_tune(run, "fine_tuned", lambda: make("gpt2"), blocks, settings)
    record = run.metrics["training"]["fine_tuned"]
    seen = dict(record["history"]["perplexity"])
    assert record["steps"] < record["planned_steps"] == 100
    assert record["kept_step"] == min(seen, key=seen.get) == record["steps"] - 2 * 10
    assert nb.perplexity(tuned, blocks["validation"]) == pytest.approx(min(seen.values()), rel=1e-3)
    assert not (run.folder / "trainer").exists()


def test_distillation_pulls_to_the_teacher(place, blocks):
    settings, run, _ = place
    teacher = make("opt")
    nb.add_gates(teacher)
    settings = nb.dataclasses.replace(settings, distillation=1.0, learning_rate=1e-3, patience=0)
    same = nb.fine_tune(run, "same", lambda: copy.deepcopy(teacher), blocks, settings, teacher=teacher)
    for (
        name,
        value,
    ) in (
        same.state_dict().items()
    ):  # the divergence from itself is zero, so is its gradient; AdamW only decays a little
        torch.testing.assert_close(value, teacher.state_dict()[name], rtol=1e-2, atol=2e-2)

    def distance(model):
        with torch.no_grad():
            return torch.dist(model(blocks["train"]).logits.log_softmax(-1), dense)

    with torch.no_grad():
        dense = teacher(blocks["train"]).logits.log_softmax(-1)
    gates = torch.tensor([[1.0, 0, 1, 0], [0, 0, 1, 1]])
    nb.set_gates(teacher, gates)
    pruned = copy.deepcopy(teacher)  # the teacher of a pruned model is that model with all gates open
    taught = nb.fine_tune(run, "taught", lambda: copy.deepcopy(pruned), blocks, settings, teacher=teacher)
    alone = nb.fine_tune(
        run,
        "alone",
        lambda: copy.deepcopy(pruned),
        blocks,
        nb.dataclasses.replace(settings, distillation=0.0),
        teacher=teacher,
    )
    assert torch.equal(nb.get_gates(teacher), gates) and torch.equal(nb.get_gates(taught), gates)
    assert distance(taught) < distance(teacher) and distance(taught) < distance(alone)


def test_a_model_that_was_trained_in_16_bits_computes_in_32_again(place, blocks):
    """accelerate wraps its forward pass; left so, the saved model would differ from it, and the run end in an error."""
    settings, run, _ = place
    nb.COMPUTING.dtype = torch.bfloat16
    tuned = nb.fine_tune(run, "fine_tuned", lambda: make("llama"), blocks, settings)
    fresh = make("llama")
    fresh.load_state_dict({name: value for name, value in tuned.state_dict().items() if not name.endswith(".gates")})
    assert nb.largest_difference(tuned, fresh, blocks["test"]) == 0 and "forward" not in vars(tuned)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradient_checkpointing_trains_the_same(family, place, blocks):
    """On a compact model with unevenly read key/value heads and a layer without heads, whose modules are ours."""
    settings, run, _ = place
    settings = nb.dataclasses.replace(settings, patience=0)
    model = make(family)
    nb.set_gates(model, torch.tensor([[1.0, 0, 1, 1], [0, 0, 0, 0]]))
    calls = {False: 0, True: 0}

    def start(model, on):
        def count(*_):
            calls[on] += 1

        small = nb.compact(model)
        [mlp] = [module for name, module in small.named_modules() if name.endswith(".0.mlp")]
        mlp.register_forward_pre_hook(count)
        return small

    plain, thrifty = (
        nb.fine_tune(
            run,
            "fine_tuned",
            lambda on=on: start(model, on),
            blocks,
            nb.dataclasses.replace(settings, gradient_checkpointing=on),
        )
        for on in (False, True)
    )
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain.parameters(), thrifty.parameters()))
    assert calls[True] == calls[False] + settings.max_steps, "every training step computes the layer a second time"
    assert not thrifty.is_gradient_checkpointing and thrifty.config.use_cache == model.config.use_cache
