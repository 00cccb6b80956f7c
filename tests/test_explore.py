"""The panels of section 10 without a browser, and the parts they are made of; in a browser: test_browser.py."""

import pytest
import torch
from conftest import gated, new_run, random_blocks, tiny_tokenizer

import PruningAndFineTuningColab as nb


def test_attention_maps_are_those_that_the_model_gives():
    model, ids = gated("gpt2"), torch.tensor([[1, 1, 0]])
    maps = nb.attention_maps(model, ids)
    model.config._attn_implementation = "eager"
    with nb.all_open(model), torch.no_grad():
        wanted = model(ids, output_attentions=True).attentions
    assert len(maps) == 2 and all(map(torch.equal, maps, wanted))
    assert torch.equal(nb.get_gates(model)[0], torch.tensor([1.0, 0, 1, 1])), "the gates are as they were"


@pytest.fixture
def explorer(tmp_path):
    importance = torch.arange(8.0).view(2, 4)
    model, blocks = gated("gpt2", nb.choose_gates(importance, 0.25)), dict.fromkeys(nb.SPLITS, random_blocks(6))
    run = new_run(tmp_path / "explored", strategy="entropy", pruning_level=0.25, block_length=16, batch_size=2)
    nb.COMPUTING.batch_size = 2
    return nb.Explorer(run, model, tiny_tokenizer(), blocks, importance)


def crosses(explorer):
    return [button.description for button in explorer.buttons.values()].count("×")


def test_the_level_closes_heads_and_a_mistake_is_said_in_the_panel(explorer, capsys):
    before = nb.get_gates(explorer.original)
    assert "2 of 8 heads closed" in explorer.counts.value and crosses(explorer) == 2
    explorer.level.value = 0.9
    assert "pruning_level is 0.9 with min_heads 1" in capsys.readouterr().out
    assert "2 of 8 heads closed" in explorer.counts.value, "what is shown stays"
    explorer.level.value = 0.5
    assert "4 of 8 heads closed" in explorer.counts.value and crosses(explorer) == 4
    assert torch.equal(explorer.gates, nb.choose_gates(explorer.importance["entropy"], 0.5))
    assert torch.equal(nb.get_gates(explorer.original), before), "the run's model is left alone"
    with pytest.raises(ZeroDivisionError):  # anything else is not hidden
        explorer.do(lambda: 1 / 0)


def test_a_click_on_a_head_toggles_its_gate_and_what_is_shown_is_measured_and_writes(explorer, capsys):
    before = nb.get_gates(explorer.original)
    explorer.buttons[1, 3].click()
    assert explorer.gates[1, 3] == 0 and explorer.buttons[1, 3].description == "×"
    assert "3 of 8 heads closed" in explorer.counts.value
    explorer.measuring.click()
    assert {id(p) for p in explorer.model.parameters()} == {id(p) for p in explorer.original.parameters()}
    assert torch.equal(nb.get_gates(explorer.original), before), "weights are shared, but not gates"
    nb.set_gates(explorer.original, explorer.gates)
    value = nb.perplexity(explorer.original, explorer.blocks["validation"])
    with nb.all_open(explorer.original):
        dense = nb.perplexity(explorer.original, explorer.blocks["validation"])
    said = capsys.readouterr().out
    assert f"{value:.2f}" != f"{dense:.2f}" and f"{value:.2f}" in said and f"dense {dense:.2f}" in said
    explorer.prompt.value = "a <b>"
    explorer.writing.click()
    said = capsys.readouterr().out
    assert "dense:\na" in said and "shown:\na" in said
    explorer.buttons[1, 3].click()
    assert explorer.gates[1, 3] == 1


def test_a_strategy_is_scored_once_on_open_gates(explorer, capsys):
    explorer.strategy.value = "magnitude"
    assert "Scoring with magnitude, once." in capsys.readouterr().out
    nb.set_gates(explorer.original, torch.ones(2, 4))
    assert torch.allclose(explorer.importance["magnitude"], nb.get_strategy("magnitude").score(explorer.original))
    assert torch.equal(explorer.gates, nb.choose_gates(explorer.importance["magnitude"], 0.25))
    explorer.strategy.value = "entropy"
    explorer.strategy.value = "magnitude"
    assert "Scoring" not in capsys.readouterr().out


def parts_of(widget) -> list:
    return [widget, *(part for child in getattr(widget, "children", ()) for part in parts_of(child))]


def test_what_is_taken_is_measured_recorded_and_drawn(explorer, tmp_path, monkeypatch, capsys):
    shown, tokenizer, text = [], tiny_tokenizer(), random_blocks(6, seed=2)
    blocks = dict.fromkeys(nb.SPLITS, text)
    run, model = new_run(tmp_path, prompt="a", block_length=16), explorer.original
    run.metrics["perplexity"] = {"dense": 3.0, "repaired": 4.0}
    assert nb.show_explorer(run, model, tokenizer, blocks, torch.rand(2, 4)) is None
    monkeypatch.setattr(nb, "in_notebook", lambda: True)
    monkeypatch.setattr(nb, "display", lambda *what, **_: shown.extend(what))
    importance = explorer.importance["entropy"]
    nb.show_explorer(run, model, tokenizer, blocks, importance)
    (box,) = (thing for thing in shown if isinstance(thing, nb.widgets.VBox))
    named = {getattr(part, "tooltip", None) or getattr(part, "description", ""): part for part in parts_of(box)}
    named["strategy"].value, named["level"].value = "magnitude", 0.5
    named["layer 0, head 0"].click()
    named["Take it"].click()
    scores, value = nb.get_strategy("magnitude").score(model), nb.perplexity(model, text)
    wanted = nb.choose_gates(scores, 0.5)
    wanted[0, 0] = 1 - wanted[0, 0]
    assert torch.equal(nb.get_gates(model), wanted) and run.metrics["by_hand"] == 1
    assert torch.allclose(torch.tensor(run.metrics["importance"]), scores)
    assert run.metrics["perplexity"] == {"dense": 3.0, "pruned": pytest.approx(value)}
    assert f"Taken: test perplexity {value:.2f}" in capsys.readouterr().out
    assert (run.settings.strategy, run.settings.pruning_level) == ("magnitude", 0.5)
    assert run.metrics["settings"]["strategy"] == "magnitude" and (run.folder / "heads.png").exists()


def test_maps_of_chosen_heads_and_of_the_most_and_least_important_are_drawn(explorer, tmp_path, monkeypatch, capsys):
    run, drawn = new_run(tmp_path, prompt="a", block_length=16), []
    run.metrics["importance"] = [[0.0, 9, 2, 3], [4, 5, 6, 7]]
    monkeypatch.setattr(run, "show", lambda figure, *_, **__: drawn.extend(axes.get_title() for axes in figure.axes))
    nb.show_attention(run, explorer.original, tiny_tokenizer())
    nb.show_attention(run, explorer.original, tiny_tokenizer(), "a a a", [(1, 2)])
    heads = [title.partition(" by")[0] for title in drawn if title]
    assert heads == ["layer 0, head 1: number 1 of 8", "layer 0, head 0: number 8 of 8",
                     "layer 1, head 2: number 3 of 8"]  # fmt: skip
    nb.show_attention(run, explorer.original, tiny_tokenizer(), "a")
    assert "has 1 tokens, but two are needed" in capsys.readouterr().out
    monkeypatch.setattr(nb, "maps_in", lambda *_: None)
    nb.show_attention(run, explorer.original, tiny_tokenizer(), "a a")
    assert "does not give its attention weights" in capsys.readouterr().out
