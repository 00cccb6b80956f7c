"""Texts stay apart and whole; settings are checked before anything is loaded."""

import dataclasses
import json
import math
import sys

import datasets
import pytest
import torch
from conftest import logits, make, new_run, run_python

import PruningAndFineTuningColab as nb


def letters(text, **options):
    """A tokenizer of one token a letter."""
    assert options["add_special_tokens"] is False
    return {"input_ids": [ord(letter) % 97 for letter in text]}


def settings(**changes):
    return dataclasses.replace(nb.Settings(block_length=8), **changes)


@pytest.mark.parametrize("length, times", [(2, 5), (5, 5), (7, 5), (100, 5), (64, 100_000)])
def test_packing_loses_no_token(length, times):
    """The last text is longer than what is tokenized at once."""
    text = "the quick brown fox jumps over the lazy dog " * times
    ids = torch.tensor([ord(letter) % 97 for letter in text])
    blocks = nb.pack(text, letters, length)
    assert blocks.shape[1] == length and len(ids) - blocks.numel() < length
    assert torch.equal(blocks.flatten(), ids[: blocks.numel()])


def test_perplexity_equals_its_definition():
    model, blocks = make("opt"), torch.randint(3, 97, (5, 12))
    probabilities = logits(model, blocks).softmax(-1)
    nll = [-math.log(probabilities[b, t - 1, blocks[b, t]]) for b in range(5) for t in range(1, 12)]
    for nb.COMPUTING.batch_size in (1, 2, 4, 5):
        assert nb.perplexity(model, blocks) == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)


def test_a_file_without_splits_is_cut_into_contiguous_parts(tmp_path):
    text = "\n".join(f"line {number}" for number in range(1000))
    (tmp_path / "a.txt").write_text(text)
    parts = nb.load_text(settings(train_file=str(tmp_path / "a.txt")))
    assert parts["train"] + parts["validation"] + parts["test"] == text
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert len(parts[split]) / len(text) == pytest.approx(share, abs=0.01)
    text = "word " * 2000 + "\n"  # long lines
    head, tail = nb.cut_tail(text, 0.1)
    assert head + tail == text and len(tail) / len(text) == pytest.approx(0.1, abs=0.011) and head.endswith(" ")
    assert [len(part) for part in nb.cut_tail("x" * 1000, 0.1)] == [900, 100]


def test_a_hub_dataset_keeps_its_splits(monkeypatch):
    texts = {split: [f"{split} {number}\n" for number in range(50)] for split in nb.SPLITS}
    rows, asked = {split: datasets.Dataset.from_dict({"text": text}) for split, text in texts.items()}, []
    monkeypatch.setattr(datasets, "load_dataset", lambda *words: asked.append(words) or datasets.DatasetDict(rows))
    parts = nb.load_text(settings(dataset="some/dataset:part"))
    assert parts == {split: "\n\n".join(text) for split, text in texts.items()}
    del rows["validation"]
    fewer = nb.load_text(settings(dataset="some/dataset"))
    assert asked == [("some/dataset", "part"), ("some/dataset",)]
    assert fewer["train"] + fewer["validation"] == parts["train"] and len(fewer["validation"]) > 0
    assert fewer["test"] == parts["test"]
    del rows["train"]
    with pytest.raises(nb.UserError, match="'some/dataset' has the splits test, but 'train'"):
        nb.load_text(settings(dataset="some/dataset"))


BAD = [
    (dict(pruning_level=1.0), "pruning_level is 1.0, but must be a number, at least 0 and below 1: .* is 0.3."),
    (dict(pruning_level="much"), "pruning_level is 'much', but must be a number"),
    (dict(pruning_level=float("nan")), "pruning_level is nan"),
    (dict(learning_rate=-1e-4), "learning_rate is -0.0001.*above 0"),
    (dict(learning_rate="inf"), "learning_rate is .*above 0"),
    (dict(strategy="entrpy"), "'entrpy'.*did you mean 'entropy'"),
    (dict(device="gpu"), "device is 'gpu'.*auto, cuda, tpu, mps, cpu"),
    (dict(block_length=1), "block_length is 1.*at least 2"),
    (dict(block_length=8.5), "block_length is 8.5.*a whole number"),
    (dict(batch_size=0), "batch_size is 0.*at least 1"),
    (dict(min_heads=0), "min_heads is 0.*at least 1"),
    (dict(repair="some"), "repair is 'some'.*a whole number, at least 0"),
    (dict(max_steps=-1), "max_steps is -1.*at least 0"),
    (dict(reopen_heads=3), "reopen_heads is 3.*yes or no"),
    (dict(control="perhaps"), "control is 'perhaps'.*auto, yes, no"),
    (dict(prompt="  "), "prompt is '  '.*some words"),
    (dict(sweep="fisher"), "sweep is 'fisher'.*some of each"),
    (dict(sweep="0.1 0.3"), "sweep is '0.1 0.3'.*some of each"),
    (dict(sweep="best 0.1"), "sweep is 'best 0.1'.*strategies and levels"),
    (dict(sweep="fisher 0.1 1.5"), "sweep is 'fisher 0.1 1.5'.*from 0 to below 1"),
    (dict(save_model="tiny"), "save_model is 'tiny'.*compact, zeroed and gguf"),
    (dict(test_file=__file__), "test_file is .*given together with train_file"),
    (dict(train_file=__file__, dataset="x"), "dataset is 'x'.*left alone where files are given"),
    (dict(uniform="yes", reopen_heads=True), "uniform is 'yes'.*off where reopen_heads is on"),
    (dict(prune="both", strategy="entropy-literal"), "strategy is .*another one where neurons are pruned"),
    (dict(prune="both", reopen_heads=True), "reopen_heads is True.*neurons are pruned"),
    (dict(train="lora", reopen_heads=True), "reopen_heads is True, but must be off"),
    (dict(output_dir=__file__), "output_dir is.*a folder"),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_bad_settings_are_refused_in_one_sentence(changes, message):
    with pytest.raises(nb.UserError, match=message) as error:
        settings(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, given, meant", [
    ("repair", "yes", 128), ("repair", False, 0), ("repair", "16", 16), ("repair", True, 128),
    ("uniform", "no", "no"), ("uniform", True, "yes"), ("control", False, "no"), ("sweep", False, ""),
    ("max_steps", "auto", 0), ("max_steps", 200.0, 200), ("max_steps", "1e3", 1000), ("seed", "7", 7),
    ("reopen_heads", "Yes", True), ("reopen_heads", "false", False), ("save_model", False, "no"),
    ("learning_rate", "1e-5", 1e-5), ("pruning_level", "auto", 0.3),
])  # fmt: skip
def test_a_value_of_any_type_is_what_it_says(name, given, meant):
    value = getattr(nb.Settings(**{name: given}), name)
    assert value == meant and type(value) is type(meant)


def test_the_form_the_dataclass_and_the_options_agree():
    assert nb.read_settings([]) == nb.Settings()
    words = (
        "--model demo --pruning-level 0.5 --eval-blocks 0 --strategy random --no-control --save-model no --uniform "
        "--precision fp32 --repair --reopen-heads no --max-steps auto --sweep"
    ).split()
    wanted = nb.Settings(
        model="demo", pruning_level=0.5, eval_blocks=0, strategy="random", control="no", save_model="no",
        precision="fp32", repair=128,
    )
    with pytest.raises(nb.UserError, match="uniform is 'yes', but must be off in a sweep"):
        nb.read_settings(words)
    assert nb.read_settings(words[:-1]) == dataclasses.replace(wanted, uniform="yes")
    assert nb.read_settings(["--no-repair"]) == nb.Settings(repair=0)
    assert nb.read_settings(["--sweep", "fisher 0.1"]).sweep == "fisher 0.1"
    assert set(nb.STRATEGY_NAMES) == set(nb.STRATEGIES)


def test_no_network_and_no_model_named_means_the_demo(tmp_path, monkeypatch, capsys):
    for place in (nb.huggingface_hub.constants, nb.datasets.config):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(nb, "hub_is_reachable", lambda: 1 / 0)
    (tmp_path / "a.txt").write_text("words")
    for name in ("demo", str(tmp_path)):  # where nothing comes from the hub it is not asked
        made = nb.choose_sources(settings(model=name, train_file=str(tmp_path / "a.txt")))
        assert (made.model, made.dataset) == (name, "auto")
        assert nb.choose_sources(settings(model=name, dataset="python-docs")).dataset == "python-docs"
    monkeypatch.setattr(nb, "hub_is_reachable", lambda: True)
    online = nb.choose_sources(settings())
    assert (online.model, online.dataset) == ("gpt2", "Salesforce/wikitext:wikitext-2-raw-v1")
    assert capsys.readouterr().out == "" and not nb.huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(nb, "hub_is_reachable", lambda: False)
    offline = nb.choose_sources(settings())
    assert (offline.model, offline.dataset) == ("demo", "python-docs")
    assert "cannot be reached" in capsys.readouterr().out
    assert nb.huggingface_hub.constants.HF_HUB_OFFLINE and nb.datasets.config.HF_HUB_OFFLINE
    assert nb.choose_sources(settings(model="gpt2")).model == "gpt2", "a model that was named is never replaced"


def test_help_lists_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit):
        nb.read_settings(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(nb.Settings):
        assert "--" + field.name.replace("_", "-") in text
    assert "(default: 0.3)" in text


def test_importing_runs_nothing_and_prints_nothing(tmp_path):
    done = run_python("-c", "import PruningAndFineTuningColab", cwd=tmp_path)
    assert not (done.stdout or done.stderr or list(tmp_path.iterdir()))


def test_a_record_is_whole_also_where_a_step_fails(tmp_path):
    run = new_run(tmp_path)
    with pytest.raises(ZeroDivisionError), run.step("broken"):
        run.metrics["perplexity"]["dense"] = 7.0
        raise ZeroDivisionError
    record = json.loads((run.folder / "metrics.json").read_text())
    assert record["perplexity"] == {"dense": 7.0} and record["seconds"]["broken"] >= 0
    assert record["peak_memory_bytes"]["broken"]["ram"] > 0
    with pytest.raises(nb.UserError), run.step("a mistake after that"):
        raise nb.UserError
    assert (run.folder / "metrics.json").exists(), "what was computed stays"


def test_more_takes_options_as_they_are_written_and_run_takes_its_own(monkeypatch):
    monkeypatch.setattr(nb, "in_notebook", lambda: True)
    monkeypatch.setattr(nb, "choose_sources", lambda settings: settings)
    made = nb.start_settings(r"""--no-repair --prompt 'it # is' --train-file "C:\my data\a.txt" --pruning-level 0.1""")
    assert (made.repair, made.prompt, made.pruning_level) == (0, "it # is", 0.1)
    assert made.train_file == r"C:\my data\a.txt"
    made = nb.start_settings("--pruning-level auto")
    assert (made.pruning_level, made.max_loss) == (nb.PRUNING_LEVEL, 0.05)
    assert nb.start_settings("--pruning-level auto --max-loss 0.1").max_loss == 0.1
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [nb.__file__, "--model", "demo", "--strategy", "fisher"])
        assert nb.start_settings("").strategy == "fisher"
    for more, said in (
        ("--prompt 'two", "MORE is .*No closing quotation"),
        ("--levle 3", "unrecognized arguments: --levle 3"),
    ):
        with pytest.raises(nb.UserError, match=said):
            nb.start_settings(more)


def test_the_budget_is_steps_on_a_processor_and_a_pass_on_an_accelerator(monkeypatch):
    blocks = {"train": torch.zeros(10, 8, dtype=torch.long)}

    def steps(*words, device="cpu"):
        made = nb.read_settings(["--batch-size", "4", *words])
        return nb.with_steps(made, blocks, torch.device(device)).max_steps

    assert steps() == 200 and steps(device="cuda") == 3, "10 blocks are three batches of four"
    for device in ("cpu", "cuda"):
        assert steps("--max-steps", "7", device=device) == 7
    monkeypatch.setattr(nb, "MAX_STEPS", 30)  # a number, written into the form
    assert steps() == 30
