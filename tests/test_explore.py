"""The panels of section 10 without a browser, and the parts they are made of; in a browser: test_browser.py."""

import sys
import threading
import types

import pytest
import torch
from conftest import logits, make, tiny_tokenizer

import PruningAndFineTuningColab as nb

COMPACT = [
    name
    for name in ("gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3")
]

BLOCK = torch.ones(1, 32, dtype=torch.long)


@pytest.mark.parametrize("name", COMPACT)
@pytest.mark.parametrize(
    "rows", [[[1, 0, 1, 0], [0, 0, 1, 1]], [[1, 1, 0, 0], [0, 0, 0, 0]], [[1, 0, 0, 0], [1, 1, 1, 1]]]
)
def test_predicted_costs_are_those_of_the_compact_model(name, rows):
    model, gates = make(name), torch.tensor(rows).float()
    nb.set_gates(model, gates)
    small = nb.compact(model)
    predicted = nb.predict_cost(model, gates, 32)
    assert predicted["parameters"] == small.num_parameters()
    assert predicted["flops_per_token"] == pytest.approx(nb.count_flops(small, BLOCK), rel=0.01)


def test_a_sharing_copy_shares_weights_but_not_gates(tokens, gates):
    model = make("llama")
    nb.add_gates(model)
    dense = logits(model, tokens)
    other = nb.sharing_copy(model)
    assert {id(p) for p in other.parameters()} == {id(p) for p in model.parameters()}
    nb.set_gates(other, gates)
    assert torch.equal(logits(model, tokens), dense) and not torch.equal(logits(other, tokens), dense)
    assert torch.equal(nb.get_gates(model), torch.ones(2, 4)) and torch.equal(nb.get_gates(other), gates)


def test_attention_maps_are_those_that_the_model_gives():
    model = make("gpt2")
    nb.set_gates(model, torch.tensor([[1.0, 0, 1, 1], [1, 1, 1, 0]]))
    maps, words = nb.attention_maps(model, tiny_tokenizer(), "a a b")
    model.config._attn_implementation = "eager"
    with nb.all_open(model), torch.no_grad():
        wanted = torch.cat(model(torch.tensor([[1, 1, 0]]), output_attentions=True).attentions)
    assert torch.equal(maps, wanted) and maps.shape == (2, 4, 3, 3) and words == ["a", "a", "<unk>"]
    assert torch.equal(nb.get_gates(model)[0], torch.tensor([1.0, 0, 1, 1])), "the gates are as they were"


def test_a_head_is_described_by_entropy_sink_and_ranks():
    sink = torch.zeros(8, 8)
    sink[:, 0] = 1
    said = nb.describe_head(
        sink, {"entropy": torch.tensor([[3.0, 1], [2, 4]]), "random": torch.tensor([[0.0, 1], [2, 4]])}, 0, 1
    )
    assert "layer 0, head 1\nentropy 0% of its maximum, 100% on the first token" in said
    assert "rank of 4: entropy 4, random 3" in said


@pytest.fixture
def explorer():
    model, text = make("gpt2"), torch.randint(3, 97, (6, 16), generator=torch.Generator().manual_seed(1))
    nb.add_gates(model)
    importance, taken = torch.arange(8.0).view(2, 4), []
    nb.set_gates(model, nb.choose_gates(importance, 0.25))
    settings = nb.Settings(strategy="entropy", pruning_level=0.25, block_length=16, batch_size=2)

    def take(what):
        taken.append(what)
        return 12.0

    nb.COMPUTING.batch_size = 2
    made = nb.Explorer(model, tiny_tokenizer(), text, settings, importance, take)
    made.original, made.taken = model, taken
    return made


def wait(explorer):
    explorer.thread.join(60)
    return explorer.text.value


def test_the_level_closes_heads_and_counts_follow(explorer):
    assert (
        "6 heads open, 2 closed" in explorer.counts.value
        and [b.description for b in explorer.grid.buttons.values()].count("×") == 2
    )
    explorer.level.value = 0.5
    assert (
        "4 heads open, 4 closed" in explorer.counts.value
        and [b.description for b in explorer.grid.buttons.values()].count("×") == 4
    )
    assert torch.equal(explorer.gates, nb.choose_gates(explorer.importance["entropy"], 0.5))
    assert torch.equal(nb.get_gates(explorer.original), nb.choose_gates(explorer.importance["entropy"], 0.25)), (
        "the run's model is left alone"
    )


def test_a_click_on_a_head_toggles_its_gate_and_measuring_measures_what_is_shown(explorer):
    explorer.grid.buttons[1, 3].click()
    assert (
        explorer.gates[1, 3] == 0
        and explorer.grid.buttons[1, 3].description == "×"
        and "5 heads open, 3 closed" in explorer.counts.value
    )
    explorer.measure.click()
    said = wait(explorer)
    nb.set_gates(explorer.original, explorer.gates)
    assert f"Validation perplexity {nb.perplexity(explorer.original, explorer.validation):.2f}" in said
    explorer.grid.buttons[1, 3].click()
    assert explorer.gates[1, 3] == 1


def test_a_strategy_is_scored_once_on_open_gates(explorer):
    explorer.strategy.value = "magnitude"
    explorer.thread.join(60)
    nb.set_gates(explorer.original, torch.ones(2, 4))
    assert torch.allclose(explorer.importance["magnitude"], nb.get_strategy("magnitude").score(explorer.original))
    assert torch.equal(explorer.gates, nb.choose_gates(explorer.importance["magnitude"], 0.25))
    explorer.importance["magnitude"] = kept = explorer.importance["magnitude"].clone()
    explorer.strategy.value = "entropy"
    explorer.strategy.value = "magnitude"
    explorer.thread.join(60)
    assert explorer.importance["magnitude"] is kept


def test_what_goes_wrong_is_said_in_the_panel(explorer):
    explorer.min_heads.value = 4
    assert "at most 0 of 8 heads" in explorer.text.value
    explorer.start(lambda: 1 / 0)
    assert "ZeroDivisionError: division by zero" in wait(explorer)


def test_a_job_can_be_cancelled_and_only_one_runs_at_a_time(explorer):
    begun, go_on = threading.Event(), threading.Event()

    def work():
        for _ in nb.long_loop(range(10**6), "long"):
            begun.set()
            go_on.wait(60)
        return "finished"

    explorer.start(work)
    assert begun.wait(60) and explorer.busy.layout.display == ""
    explorer.start(lambda: "another")
    assert "One thing at a time" in explorer.text.value
    explorer.cancel.click()
    go_on.set()
    assert "Cancelled." in wait(explorer) and explorer.busy.layout.display == "none"
    explorer.start(lambda: "works again")
    assert "works again" in wait(explorer)


def test_take_hands_over_what_is_shown_and_how_many_gates_were_set_by_hand(explorer):
    explorer.level.value = 0.5
    explorer.grid.buttons[1, 3].click()
    explorer.taking.click()
    assert "Taken: test perplexity 12.00" in wait(explorer)
    (taken,) = explorer.taken
    assert (
        torch.equal(torch.tensor(taken["gates"]), explorer.gates)
        and taken["scores"] == explorer.importance["entropy"].tolist()
    )
    assert (taken["strategy"], taken["level"], taken["by_hand"]) == ("entropy", 0.5, 1)


def test_both_models_write(explorer):
    explorer.prompt.value = "a"
    explorer.write.click()
    said = wait(explorer)
    assert "dense:" in said and "shown:" in said
    explorer.prompt.value = "<b>a</b>"
    explorer.write.click()
    assert "<b>" not in wait(explorer), "what is typed is text, not HTML"


def test_the_viewer_shows_heads_and_says_what_is_wrong(explorer):
    viewer = nb.attention_viewer(explorer.original, tiny_tokenizer(), "a a a", explorer.importance)
    sentence, layer, head = viewer.kwargs_widgets
    assert viewer.result.startswith(b"\x89PNG")
    before = viewer.result
    head.value = 2
    assert viewer.result.startswith(b"\x89PNG") and viewer.result != before
    sentence.value = "a"
    assert "has 1 tokens, but two are needed" in viewer.result


def test_results_go_to_drive_in_colab(tmp_path, monkeypatch):
    with pytest.raises(nb.UserError, match="save_to_drive is True, but must be off outside of Colab"):
        nb.Settings(save_to_drive=True)
    mounted, colab = [], types.ModuleType("google.colab")
    colab.drive = types.SimpleNamespace(mount=mounted.append)
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    assert nb.Settings(save_to_drive=True).save_to_drive
    assert str(nb.on_drive("results")) == "/content/drive/MyDrive/results" and mounted == ["/content/drive"]

    def refuse(_):
        raise ValueError("mount failed. And more")

    colab.drive.mount = refuse
    with pytest.raises(nb.UserError, match=r"cannot be mounted \(mount failed\)"):
        nb.on_drive("results")


def parts_of(widget) -> set:
    return {widget}.union(*(parts_of(part) for part in getattr(widget, "children", ())))


def test_a_panel_is_closed_with_all_that_it_made(explorer):
    """What is left open keeps the buttons, and the models behind them, for as long as the kernel lives."""
    made = {value for value in vars(explorer).values() if isinstance(value, nb.widgets.Widget)}
    parts = parts_of(explorer.box)
    assert len(made) > 8 and made <= parts, "a part that is in no box is never closed"
    nb.close_panel(explorer.box)
    assert all(part.comm is None for part in parts)
