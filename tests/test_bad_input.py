"""A mistake costs one sentence: it names the value, what is allowed and what to do, and leaves nothing half written."""

import dataclasses
import json
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CPU, SCRIPT, change_weights, edit, make, new_run, random_blocks, run_python, saved, tiny_tokenizer
from families import SIZES
from hypothesis import HealthCheck, given
from hypothesis import settings as budget
from hypothesis import strategies as st

import PruningAndFineTuningColab as nb


@pytest.fixture
def folder(tmp_path):
    """A whole model in a folder, to be spoilt."""
    return saved(tmp_path / "model", "gpt2")


def spoil(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def config(**changes):
    return lambda folder: edit(folder / "config.json", **changes)


def weights(change):
    return lambda folder: change_weights(folder, change)


class Hostile:
    """In a pickle it leaves a trace where it is opened."""

    def __reduce__(self):
        return Path.touch, (Path("trace of a pickle"),)


def pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Hostile()}, folder / "pytorch_model.bin")


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_shard(folder):
    (folder / "model.safetensors").unlink()
    make("gpt2").save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("model-*"))[1].unlink()


def lose(*names):
    return lambda folder: [file.unlink() for name in names for file in folder.glob(name)]


def bert(folder):
    transformers.BertLMHeadModel(transformers.BertConfig(**SIZES)).save_pretrained(folder)


def filled(value):
    return lambda found: found | {"transformer.h.1.mlp.c_fc.weight": torch.full((32, 128), float(value))}


SPOILT = {
    "weights cut short": (truncate, "cannot be used.*a file is cut short or broken: download or copy it again"),
    "weights are noise": (spoil("model.safetensors", b"\xff" * 1000), "cannot be used"),
    "weights claim a huge header": (spoil("model.safetensors", struct.pack("<Q", 2**60) + b"{}"), "cannot be used"),
    "weights are a pickle": (pickle, "cannot be used"),
    "a weight is missing": (
        weights(lambda found: {name: value for name, value in found.items() if "h.0.attn.c_proj.weight" not in name}),
        "lacks 1 of .*download it",
    ),
    "all have a prefix": (
        weights(lambda found: {f"_orig_mod.{name}": value for name, value in found.items()}),
        "it has _orig_mod.transformer.* instead: save it under the model's own names",
    ),
    "not a number": (weights(filled("nan")), "not finite in transformer.h.1.mlp.c_fc.weight: download it again"),
    "infinite": (weights(filled("inf")), "not finite in transformer.h.1.mlp.c_fc.weight: download it again"),
    "a shard is missing": (lose_a_shard, "a file is missing: download or copy all of them"),
    "another shape": (config(n_embd=64, n_head=4), "cannot be used|lacks"),
    "config is noise": (spoil("config.json", b"{{{"), "cannot be used"),
    "config of an unknown family": (config(model_type="no-such-family"), "cannot be used"),
    "config is a list": (spoil("config.json", b"[]"), "cannot be used"),
    "an adapter alone": (
        lambda folder: [lose("*")(folder), spoil("adapter_config.json", b'{"base_model_name_or_path": "a/b"}')(folder)],
        "cannot be used",
    ),
    "a model within": (lambda folder: [lose("*")(folder), saved(folder / "checkpoint-100")], "cannot be used"),
    "tokenizer is noise": (spoil("tokenizer.json", b"{]"), "cannot be used"),
    "tokenizer of the future": (
        lambda folder: edit(folder / "tokenizer.json", pre_tokenizer={"type": "Future"}),
        "it was made by a newer version: pip install -U transformers tokenizers",
    ),
    "no tokenizer": (
        lose("tokenizer*", "special*"),
        "the tokenizer of model .* cannot be used .*copy the tokenizer's files into the folder",
    ),
    "quantised": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantised.*take the model that it was made from",
    ),
    "tokens see those after them": (bert, "BertLMHeadModel whose tokens see those after them: take a causal"),
    "not a decoder": (config(model_type="t5"), "cannot be used .*T5Config"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_model_is_refused_by_name_and_nothing_in_it_is_run(name, folder, tmp_path, monkeypatch):
    change, message = SPOILT[name]
    change(folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(nb.UserError, match=message) as error:
        nb.load_model(str(folder), CPU)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [folder], "a pickle was opened"


GGUF = [b"", b"GGUF", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), b"GGUF" + b"\xff" * 200, b"\x00" * 500]
NOT_THERE = [("nobody/nothing", None), ("missing.gguf", None)]


@pytest.mark.parametrize("name, content", [*NOT_THERE, *(("model.gguf", content) for content in GGUF)])
def test_a_model_that_is_not_there_and_a_spoilt_gguf_are_named(name, content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(nb.UserError, match=f"model '{name}' cannot be used"):
        nb.load_model(name, CPU)


@pytest.mark.parametrize("changes, words, message", [
    ({"vocab_size": 1}, dict(prompt="a a", block_length=4), "has a token 1 .in the train., but the model"),
    ({}, dict(prompt="a " * 30, block_length=4), "prompt has 30 tokens, but must have 1 to 24: write a shorter one"),
    ({}, dict(prompt="a", block_length=65), "block_length is 65, but the model reads at most 64 tokens"),
    ({"max_seq_len": 20}, dict(prompt="a", block_length=30), "block_length is 30, but the model reads at most 20 tok"),
    ({}, dict(prompt="a", block_length=5), "the train text has fewer than 5 tokens, but one block is needed"),
])  # fmt: skip
def test_tokens_and_prompts_that_the_model_cannot_read_are_refused(changes, words, message):
    text = dict.fromkeys(nb.SPLITS, "a a a a")
    short = nb.Settings(prompt="a a", block_length=4)
    assert nb.pack_all(text, tiny_tokenizer(), make("gpt2"), short)["train"].tolist() == [[1, 1, 1, 1]]
    with pytest.raises(nb.UserError, match=message):
        nb.pack_all(text, tiny_tokenizer(), make("gpt2", **changes), nb.Settings(**words))


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(tmp_path):
    model, run = make("gpt2"), new_run(tmp_path, max_steps=4, block_length=16)
    model.transformer.h[0].mlp.c_fc.weight.data.fill_(float("nan"))
    with pytest.raises(nb.RunError, match="the loss is nan at step 1 of 4: take a lower --learning-rate"):
        nb.train(run, "fine_tuned", model, dict.fromkeys(nb.SPLITS, random_blocks(8)), run.settings)
    assert not list(run.state.glob("training-*")), "nothing is kept of it"


@pytest.mark.parametrize("words, said", [
    ("--pruning-level 1.5", "error: pruning_level is "),
    ("--model model --dataset python-docs --output-dir out", "error: model 'model' cannot be used"),
    ("--model demo --output-dir /proc/nothing", "error: output_dir is '/proc/nothing', but no folder can be made"),
])  # fmt: skip
def test_the_script_says_it_in_one_sentence_and_leaves_nothing(words, said, folder, tmp_path):
    truncate(folder)
    done = run_python(SCRIPT, *words.split(), cwd=tmp_path, status=2)
    assert "Traceback" not in done.stderr and done.stderr.splitlines()[-1].startswith(said)
    assert list(tmp_path.iterdir()) in ([folder], [folder, tmp_path / "out"], [tmp_path / "out", folder])
    assert not list(tmp_path.glob("out/*"))


def test_a_run_in_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(nb.UserError, match="WORLD_SIZE is 2, but a run is one process: start it without torchrun"):
        nb.find_device("cpu")


def test_ctrl_c_stops_with_status_130_and_says_what_is_there(folder, tmp_path):
    (tmp_path / "text.txt").write_text("a " * 3000)
    words = f"--model {folder} --train-file text.txt --block-length 16 --prompt a --max-steps 100000 --gate-steps 1"
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *words.split()], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # a shell's background jobs ignore it
    try:
        for _ in range(600):
            metrics = next(tmp_path.glob("results/*/metrics.json"), None)
            if metrics and "repaired" in json.loads(metrics.read_text())["perplexity"]:
                break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in said
    assert f"interrupted. What is there is in {metrics.parent.relative_to(tmp_path)}" in said.splitlines()[-1]
    assert {"dense", "pruned", "repaired"} <= set(json.loads(metrics.read_text())["perplexity"])


ODD = ["0", "-1", "nan", "inf", "1e400", "0.5", "1", "../..", "/", "auto", "yes", "learned 0.1", "--", "\x00", "🙂"]
WORDS = st.one_of(st.text(max_size=12), st.sampled_from(ODD))
NAMES = st.sampled_from([field.name for field in dataclasses.fields(nb.Settings)])


@budget(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(NAMES, WORDS), max_size=4))
def test_no_arguments_whatever_end_in_a_traceback(pairs):
    words = [word for name, value in pairs for word in ("--" + name.replace("_", "-"), value)]
    try:
        assert isinstance(nb.read_settings(words), nb.Settings)
    except nb.UserError as error:
        assert str(error)
    except SystemExit as stop:
        assert stop.code in (0, 2)


SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
FILES = "config.json model.safetensors tokenizer.json tokenizer_config.json generation_config.json".split()


@budget(max_examples=40, deadline=None, suppress_health_check=SLOW)
@given(st.sampled_from(FILES), st.data())
def test_no_file_whatever_ends_in_a_traceback(folder, name, data):
    path = folder / name
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    spoilt = whole[:start] + data.draw(st.binary(max_size=20)) + whole[start + data.draw(st.integers(0, 50)) :]
    path.write_bytes(spoilt)
    try:
        nb.load_model(str(folder), CPU)
    except nb.UserError as error:
        assert str(folder) in str(error)
    finally:
        path.write_bytes(whole)
