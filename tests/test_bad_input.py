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
from conftest import FAMILIES, make, tiny_tokenizer
from hypothesis import HealthCheck, given
from hypothesis import settings as budget
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import PruningAndFineTuningColab as nb

SCRIPT = Path(nb.__file__)


@pytest.fixture
def folder(tmp_path):
    """A whole model in a folder, to be spoilt."""
    path = tmp_path / "model"
    make("gpt2").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def spoil(name, content):
    def change(folder):
        (folder / name).write_bytes(content)

    return change


def config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "c_proj.weight" in name))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def escape(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "../../secret.safetensors"}})
    )


SPOILT = {
    "weights cut short": (truncate, "cannot be had"),
    "weights are noise": (spoil("model.safetensors", b"\xff" * 1000), "cannot be had"),
    "weights claim a huge header": (spoil("model.safetensors", struct.pack("<Q", 2**60) + b"{}"), "cannot be had"),
    "a weight is missing": (lose_a_weight, r"lacks 1 of its weights .*download it again"),
    "another shape": (config(n_embd=64, n_head=4), "cannot be had|lacks"),
    "weights are outside of the folder": (escape, "cannot be had"),
    "config is noise": (spoil("config.json", b"{{{"), "cannot be had"),
    "config of an unknown family": (config(model_type="no-such-family"), "cannot be had"),
    "config is a list": (spoil("config.json", b"[]"), "cannot be had"),
    "tokenizer is noise": (spoil("tokenizer.json", b"{]"), "cannot be had"),
    "quantised": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantised.*take the model that it was made from",
    ),
    "compact already": (
        config(pruned={"shapes": {}, "numbers": {}}),
        "is compact.*take the model that it was made from",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_model_is_refused_by_name(name, folder):
    change, message = SPOILT[name]
    change(folder)
    with pytest.raises(nb.UserError, match=message) as error:
        nb.load_model(str(folder), torch.device("cpu"))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_only_causal_models_are_taken(folder):
    small = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    transformers.BertLMHeadModel(transformers.BertConfig(**small)).save_pretrained(folder)
    with pytest.raises(nb.UserError, match="BertLMHeadModel whose tokens see those after them: take a causal"):
        nb.load_model(str(folder), torch.device("cpu"))
    t5 = transformers.T5Config(vocab_size=97, d_model=32, num_layers=2, num_heads=4, d_ff=64, d_kv=8)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(folder)
    with pytest.raises(nb.UserError, match="cannot be had"):
        nb.load_model(str(folder), torch.device("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_causal(family):
    assert nb.is_causal(make(family))


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), b"GGUF" + b"\xff" * 200, b"\x00" * 500]
)
def test_a_spoilt_gguf_is_refused(content, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(nb.UserError, match="model.gguf' cannot be had"):
        nb.load_model(str(tmp_path / "model.gguf"), torch.device("cpu"))


def test_tokens_and_prompts_that_the_model_cannot_read_are_refused():
    model, text = make("gpt2"), dict.fromkeys(nb.SPLITS, "a a a a")
    short = nb.Settings(prompt="a a", block_length=4)
    assert nb.pack_all(text, tiny_tokenizer(), model, short)["train"].tolist() == [[1, 1, 1, 1]]
    with pytest.raises(nb.UserError, match="has a token 1 .in the train., but the model"):
        nb.pack_all(text, tiny_tokenizer(), make("gpt2", vocab_size=1), short)
    with pytest.raises(nb.UserError, match="prompt has 30 tokens, but must have 1 to 24: write a shorter one"):
        nb.pack_all(text, tiny_tokenizer(), model, nb.Settings(prompt="a " * 30, block_length=4))
    with pytest.raises(nb.UserError, match="block_length is 65, but the model reads at most 64 tokens"):
        nb.pack_all(text, tiny_tokenizer(), model, nb.Settings(prompt="a", block_length=65))
    with pytest.raises(nb.UserError, match="the train text has fewer than 5 tokens, but one block is needed"):
        nb.pack_all(text, tiny_tokenizer(), model, nb.Settings(prompt="a", block_length=5))


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(tmp_path):
    model = make("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.fill_(float("nan"))
    blocks = {split: torch.randint(3, 97, (8, 16)) for split in nb.SPLITS}
    settings = nb.Settings(output_dir=str(tmp_path), max_steps=4, block_length=16)
    run = nb.Run(settings, torch.device("cpu"), torch.float32)
    with pytest.raises(nb.RunError, match="the loss is nan at step 1 of 4: take a lower --learning-rate"):
        nb.train(run, "fine_tuned", model, blocks, settings)
    assert not list(run.state.glob("training-*")), "nothing is kept of it"


def run_script(*words, cwd):
    return subprocess.run([sys.executable, SCRIPT, *words], cwd=cwd, capture_output=True, text=True)


def test_the_script_says_it_in_one_sentence_and_leaves_nothing(folder, tmp_path):
    truncate(folder)
    done = run_script("--model", str(folder), "--dataset", "python-docs", "--output-dir", "out", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: model") and not list(tmp_path.glob("out/*"))


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path):
    done = run_script("--output-dir", "/proc/nothing", "--model", "demo", cwd=tmp_path)
    assert done.returncode == 2 and "output_dir is '/proc/nothing', but no folder can be made there" in done.stderr


def test_ctrl_c_stops_with_status_130_and_says_what_is_there(folder, tmp_path):
    (tmp_path / "text.txt").write_text("a " * 3000)
    words = f"--model {folder} --train-file text.txt --block-length 16 --prompt a --max-steps 100000 --gate-steps 1"
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *words.split()], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # a shell's background jobs ignore it
    try:
        metrics = None
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
        nb.load_model(str(folder), torch.device("cpu"))
    except nb.UserError as error:
        assert str(folder) in str(error)
    finally:
        path.write_bytes(whole)
