"""Texts stay apart and whole; settings are checked before anything is loaded."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from conftest import make

import PruningAndFineTuningColab as nb

SCRIPT = Path(nb.__file__)


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(self, text, **options):
        assert options["add_special_tokens"] is False
        return {"input_ids": [ord(letter) % 97 for letter in text]}


def settings(**changes):
    return dataclasses.replace(nb.Settings(block_length=8), **changes)


@pytest.mark.parametrize("length", [2, 5, 7, 100])
def test_packing_loses_no_token(length):
    text = "the quick brown fox jumps over the lazy dog " * 5
    ids = [ord(letter) % 97 for letter in text]
    blocks = nb.pack(text, Letters(), length)
    assert blocks.shape[1] == length
    assert blocks.flatten().tolist() == ids[: blocks.numel()] and len(ids) - blocks.numel() < length


def test_perplexity_equals_its_definition():
    model, blocks = make("opt"), torch.randint(3, 97, (5, 12))
    with torch.no_grad():
        probabilities = model(blocks).logits.softmax(-1)
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
    (tmp_path / "b.txt").write_text("only for testing")
    parts = nb.load_text(settings(train_file=str(tmp_path / "a.txt"), test_file=str(tmp_path / "b.txt")))
    assert parts["train"] + parts["validation"] == text and parts["test"] == "only for testing"


def test_a_hub_dataset_keeps_its_splits(monkeypatch):
    rows = {
        split: datasets.Dataset.from_dict({"text": [f"{split} {number}\n" for number in range(50)]})
        for split in nb.SPLITS
    }
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        return datasets.DatasetDict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    parts = nb.load_text(settings(dataset="some/dataset", dataset_config="part"))
    assert asked == [("some/dataset", "part")]
    assert all(parts[split] == "\n\n".join(rows[split]["text"]) for split in nb.SPLITS)
    whole = parts["train"]
    del rows["validation"]
    parts = nb.load_text(settings(dataset="some/dataset"))
    assert parts["train"] + parts["validation"] == whole and "test" not in whole and len(parts["validation"]) > 0
    assert parts["test"] == "\n\n".join(rows["test"]["text"])
    del rows["train"]
    with pytest.raises(nb.UserError, match="'some/dataset' has the splits test, but 'train'"):
        nb.load_text(settings(dataset="some/dataset"))


def test_python_docs_are_real_text():
    assert len(nb.python_docs()) > 300_000 and 'The "assert" statement' in nb.python_docs()


BAD = [
    (dict(pruning_level=1.0), "pruning_level is 1.0.*at least 0 and below 1"),
    (dict(pruning_level=float("nan")), "pruning_level is nan"),
    (dict(learning_rate=-1e-4), "learning_rate is -0.0001.*above 0"),
    (dict(strategy="entrpy"), "'entrpy'.*did you mean 'entropy'"),
    (dict(device="gpu"), "device is 'gpu'.*auto, cuda, tpu, mps, cpu"),
    (dict(block_length=1), "block_length is 1.*at least 2"),
    (dict(batch_size=0), "batch_size is 0.*at least 1"),
    (dict(max_steps=-1), "max_steps is -1.*'auto' or a number of steps, at least 1"),
    (dict(max_steps="many"), "max_steps is 'many'.*'auto' or a number of steps"),
    (dict(max_steps="0"), "max_steps is '0'.*at least 1"),
    (dict(max_steps="50", epochs=2.0), "epochs is 2.0.*left alone where max_steps is given: drop one"),
    (dict(prompt="  "), "prompt is '  '"),
    (dict(train_file="missing.txt"), "train_file is 'missing.txt'.*an existing file"),
    (dict(train_file=__file__), r"\.py'.*of a kind that can be read .*\.txt, \.md, \.jsonl.*convert it first"),
    (dict(test_file=__file__), "test_file is"),
    (dict(output_dir=__file__), "output_dir is.*a folder"),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_bad_settings_are_refused_in_one_sentence(changes, message):
    with pytest.raises(nb.UserError, match=message) as error:
        settings(**changes)
    assert "\n" not in str(error.value)


def test_the_form_the_dataclass_and_the_options_agree():
    parsed = nb.read_settings([])
    assert parsed == nb.Settings()
    arguments = {
        "--model": "demo",
        "--pruning-level": "0.5",
        "--eval-blocks": "0",
        "--strategy": "random",
        "--no-control": None,
        "--save-model": "no",
        "--uniform": None,
        "--offline": None,
        "--precision": "fp32",
    }
    changed = nb.read_settings([word for pair in arguments.items() for word in pair if word is not None])
    assert (
        changed.model,
        changed.pruning_level,
        changed.eval_blocks,
        changed.control,
        changed.save_model,
        changed.uniform,
        changed.offline,
    ) == ("demo", 0.5, 0, "no", "no", True, True)
    assert set(nb.STRATEGY_NAMES) == set(nb.STRATEGIES)


def test_no_network_and_no_model_named_means_the_demo(monkeypatch, capsys):
    monkeypatch.setattr(nb.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(nb.datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(nb, "hub_is_reachable", lambda: True)
    online = nb.choose_sources(settings())
    assert (online.model, online.dataset, online.dataset_config) == ("gpt2", "Salesforce/wikitext", "wikitext-2-raw-v1")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(nb, "hub_is_reachable", lambda: False)
    offline = nb.choose_sources(settings())
    assert (offline.model, offline.dataset, offline.offline) == ("demo", "python-docs", True)
    assert "cannot be reached" in capsys.readouterr().out
    assert nb.choose_sources(settings(model="gpt2")).model == "gpt2", "a model that was named is never replaced"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            ["--pruning-level", "1.5"],
            "error: pruning_level is 1.5, but must be at least 0 and below 1: the default is 0.3.",
        ),
        (
            ["--model", "nobody/nothing", "--dataset", "python-docs", "--offline"],
            "error: model 'nobody/nothing' cannot be had",
        ),
        (
            ["--model", "missing.gguf", "--dataset", "python-docs", "--offline"],
            "error: model 'missing.gguf' cannot be had",
        ),
        (["--pruning-level", "a lot"], "invalid number_or_auto value: 'a lot'"),
        (["--min-heads", "a few"], "invalid int value: 'a few'"),
    ],
)
def test_a_mistake_costs_one_sentence_and_exit_status_2(arguments, sentence, tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert sentence in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("results/*")), "a mistake leaves nothing behind"


def test_help_lists_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit):
        nb.read_settings(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(nb.Settings):
        assert "--" + field.name.replace("_", "-") in text
    assert "(default: 0.3)" in text


def test_importing_runs_nothing_and_prints_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import PruningAndFineTuningColab"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parent)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_a_results_folder_is_never_overwritten_and_its_record_is_whole(tmp_path):
    runs = [
        nb.Run(settings(output_dir=str(tmp_path), model="a/../b c", resume="no"), torch.device("cpu"), torch.float32)
        for _ in range(3)
    ]
    assert len({run.folder for run in runs}) == 3 and {run.folder.parent for run in runs} == {tmp_path}
    with pytest.raises(ZeroDivisionError), runs[0].step("broken"):
        runs[0].metrics["perplexity"]["dense"] = 7.0
        raise ZeroDivisionError
    record = json.loads((runs[0].folder / "metrics.json").read_text())
    assert record["perplexity"] == {"dense": 7.0} and record["seconds"]["broken"] >= 0
    assert record["peak_memory_bytes"]["broken"]["ram"] > 0


def test_the_batch_halves_where_memory_runs_out(capsys):
    tried = []

    def function(size):
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return size

    assert nb.fit_batch_size(function, 12, "a step") == 3 and tried == [12, 6, 4, 3]
    assert "a step runs out of memory: trying 6 blocks" in capsys.readouterr().out
    with pytest.raises(ValueError):  # any other failure is not swallowed
        nb.fit_batch_size(lambda size: int("x"), 4, "a step")


def test_more_takes_options_as_a_shell_does(monkeypatch):
    monkeypatch.setattr(nb, "in_notebook", lambda: True)
    monkeypatch.setattr(nb, "choose_sources", lambda settings: settings)
    made = nb.start_settings("--no-repair --prompt 'two words' --pruning-level 0.1")
    assert (made.repair, made.prompt, made.pruning_level) == (False, "two words", 0.1)
    made = nb.start_settings("--pruning-level auto")
    assert (made.pruning_level, made.max_loss) == (nb.PRUNING_LEVEL, 0.05)
    assert nb.start_settings("--pruning-level auto --max-loss 0.1").max_loss == 0.1
    for more, said in (
        ("--prompt 'two", "MORE is .*No closing quotation"),
        ("--levle 3", "unrecognized arguments: --levle 3"),
    ):
        with pytest.raises(nb.UserError, match=said):
            nb.start_settings(more)


def test_the_budget_is_steps_on_a_processor_and_a_pass_on_an_accelerator(monkeypatch):
    blocks = torch.zeros(10, 8, dtype=torch.long)

    def steps(*words, device="cpu"):
        monkeypatch.setattr(nb.sys, "argv", ["script", "--model", "demo", "--batch-size", "4", *words])
        monkeypatch.setattr(nb, "find_device", lambda choice: torch.device(device))
        return nb.training_plan(nb.start_settings(""), blocks)["max_steps"]

    monkeypatch.setattr(nb.sys, "excepthook", nb.sys.excepthook)
    assert steps() == 200 and steps(device="cuda") == 3, "10 blocks are three batches of four"
    for device in ("cpu", "cuda"):
        assert steps("--epochs", "2", device=device) == 5
        assert steps("--max-steps", "7", device=device) == 7
    monkeypatch.setattr(nb, "MAX_STEPS", 30)  # a number, written into the form
    assert steps() == 30
