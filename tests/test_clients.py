"""Practitioners' tools on all forms that they take of what is saved (`pytest -m slow tests/test_clients.py`: minutes).

Those of tests/requirements-clients.txt that are not installed are skipped.
"""

import functools
import json
import math
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import logits, make, run_python
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

import PruningAndFineTuningColab as nb

pytestmark = pytest.mark.slow
IDS = torch.arange(3, 35).view(2, 16)
installed = functools.partial(pytest.importorskip, reason="pip install -r tests/requirements-clients.txt")
FOLDERS = pytest.mark.parametrize("form", ["compact", "uniform", "zeroed"], indirect=True)


@pytest.fixture(scope="module", params=["compact", "uniform", "zeroed", "gguf"])
def form(request, tmp_path_factory):
    """A Llama without some heads and neurons, saved in one form: folder, words to open it, and the gated model."""
    name, folder, words = request.param, tmp_path_factory.mktemp(request.param), {}
    model, tokenizer = make("llama", vocab_size=1024), nb.demo_tokenizer(nb.python_docs()[:200_000])
    nb.prune_only(model, "both")
    gates = torch.ones_like(nb.get_gates(model))
    gates[0, 1], gates[1, 2:4], gates[0, 20:40] = 0, 0, 0  # uneven readers, a key less, neurons
    if name in ("uniform", "gguf"):  # equally many in both layers, but not the same
        gates[0, 0], gates[1, 30:50] = 0, 0
    nb.set_gates(model, gates)
    if name == "zeroed":
        nb.save_gated(model, tokenizer, folder)
    elif name == "gguf":
        words, about = {"gguf_file": "m.gguf"}, {"format": "f32", "name": "m", "base": "m", "description": "m"}
        nb.write_gguf(folder / "m.gguf", nb.compact(model), tokenizer, "", about)
    else:
        words = {"trust_remote_code": True} if name == "compact" else {}
        nb.save_compact(nb.compact(model), tokenizer, folder)
    return SimpleNamespace(folder=folder, words=words, gated=model)


def reopen(form, folder=None):
    return AutoModelForCausalLM.from_pretrained(folder or form.folder, dtype=torch.float32, **form.words).eval()


def assert_same(found, wanted, tolerance=1e-5):
    assert found.shape == wanted.shape and (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_lm_eval_scores_as_the_model_does(form, tmp_path):
    installed("lm_eval")
    words = nb.python_docs().split()[:400]
    rows = [{"question": " ".join(words[i : i + 9]), "choices": [words[i + 9], words[i + 10]], "answer": 0}
            for i in range(0, 320, 20)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": "local_choice", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}, "doc_to_text": "{{question}}",
            "doc_to_choice": "choices", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}]}  # fmt: skip
    (tmp_path / "local_choice.yaml").write_text(json.dumps(task))
    options = {"pretrained": form.folder, "dtype": "float32"} | form.words
    run_python("-m", "lm_eval", "run", "--model", "hf", "--tasks", "local_choice", "--include_path", tmp_path,
               "--model_args", ",".join(f"{name}={value}" for name, value in options.items()), "--device", "cpu",
               "--log_samples", "--output_path", "out", cwd=tmp_path, HF_DATASETS_OFFLINE="1")  # fmt: skip
    (file,) = tmp_path.rglob("samples_local_choice*.jsonl")
    tokenizer, found, wanted = AutoTokenizer.from_pretrained(form.folder, **form.words), [], []
    for sample in map(json.loads, file.read_text().splitlines()):
        found += [float(part[0][0]) for part in sample["resps"]]
        for choice in sample["doc"]["choices"]:
            start, end = tokenizer([sample["doc"]["question"], " " + choice]).input_ids
            scores = logits(form.gated, torch.tensor([start + end]))[0, len(start) - 1 : -1].log_softmax(-1)
            wanted.append(scores[range(len(end)), end].sum().item())
    assert found == pytest.approx(wanted, rel=1e-4) and len(found) == 2 * len(rows)


@FOLDERS  # transformers does not save what it opened from a .gguf file
def test_peft_trains_reloads_and_merges(form, tmp_path):
    peft = installed("peft")
    tuned = peft.get_peft_model(reopen(form), peft.LoraConfig(r=4))  # targets are found by the family's name
    assert_same(logits(tuned, IDS), logits(form.gated, IDS))
    optimizer = torch.optim.SGD(tuned.parameters(), lr=1.0)
    for _ in range(2):
        tuned(IDS, labels=IDS).loss.backward()
        optimizer.step()
    wanted = logits(tuned, IDS)
    assert not torch.allclose(wanted, logits(form.gated, IDS), atol=0.01), "it was trained"
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(reopen(form), tmp_path / "adapter")
    assert_same(logits(again, IDS), wanted)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_same(logits(reopen(form, tmp_path / "merged"), IDS), wanted, 1e-3)


@FOLDERS  # nor does its Trainer train it
@pytest.mark.parametrize("way, sizes", [("SFT", {"text": 500}), ("DPO", {"prompt": 30, "chosen": 40, "rejected": 50})])
def test_trl_fine_tunes_one_step(way, sizes, form, tmp_path):
    trl, texts = installed("trl"), [nb.python_docs()[place:] for place in range(0, 2000, 500)]
    data = Dataset.from_dict({name: [text[:size] for text in texts] for name, size in sizes.items()})
    arguments = getattr(trl, f"{way}Config")(
        tmp_path, max_steps=1, use_cpu=True, bf16=False, report_to="none", max_length=64, save_strategy="no",
        per_device_train_batch_size=4, **form.words)  # fmt: skip
    model, tokenizer = reopen(form), AutoTokenizer.from_pretrained(form.folder, **form.words)
    before, tokenizer.pad_token = model.lm_head.weight.clone(), tokenizer.eos_token
    trainer = getattr(trl, f"{way}Trainer")(model, args=arguments, train_dataset=data, processing_class=tokenizer)
    loss, wanted = trainer.train().training_loss, math.log(2)  # DPO opens the folder again, to compare with it
    if way == "SFT":
        ids = torch.tensor(list(trainer.train_dataset["input_ids"]))
        wanted = form.gated(ids, labels=ids).loss.item()
    assert loss == pytest.approx(wanted, rel=1e-4) and not torch.equal(model.lm_head.weight, before)


def test_it_compiles_to_one_graph(form):
    torch.compiler.reset()
    backend = "inductor" if shutil.which(os.environ.get("CXX", "g++")) else "aot_eager"
    assert_same(logits(torch.compile(reopen(form), fullgraph=True, backend=backend), IDS), logits(form.gated, IDS))


def test_onnxruntime_computes_the_same_for_texts_of_any_number_and_length(form):
    installed("onnxscript")
    installed("onnxruntime")
    model, free = reopen(form), torch.export.Dim.DYNAMIC
    model.config.use_cache = False
    program = torch.onnx.export(model, (IDS,), dynamo=True, dynamic_shapes={"input_ids": {0: free, 1: free}})
    other = torch.arange(50, 95).view(3, 15)
    assert_same(program(other)[0], logits(form.gated, other))


@pytest.mark.parametrize("form", ["uniform", "zeroed", "gguf"], indirect=True)
def test_continuous_batching_writes_what_the_model_writes(form):
    """A compact model, too, if every layer keeps all its keys: their number is taken from the configuration."""
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # else it takes most of the memory
    prompts = [[5, 6, 7, 8, 9], [10, 11, 12]]
    found = reopen(form).generate_batch(prompts, GenerationConfig(**greedy), continuous_batching_config=small)
    wanted = [form.gated.generate(torch.tensor([prompt]), **greedy)[0].tolist() for prompt in prompts]
    assert [prompt + found[name].generated_tokens for prompt, name in zip(prompts, sorted(found))] == wanted


@FOLDERS
def test_mergekit_merges_two_with_the_same_shapes(form, tmp_path):
    installed("mergekit")
    model, other = reopen(form), reopen(form)
    for parameter, another in zip(model.parameters(), other.parameters()):
        another.data += 0.1 * torch.randn_like(another)
        parameter.data.lerp_(another.data, 0.25)
    other.save_pretrained(tmp_path / "other")
    parts = [{"model": str(folder), "parameters": {"weight": weight}}
             for folder, weight in ((form.folder, 0.75), (tmp_path / "other", 0.25))]  # fmt: skip
    (tmp_path / "m.yml").write_text(json.dumps({"merge_method": "linear", "dtype": "float32", "models": parts}))
    trust = ["--trust-remote-code"] * len(form.words)
    run_python("-m", "mergekit.scripts.run_yaml", "m.yml", "merged", *trust, cwd=tmp_path)
    assert_same(logits(reopen(form, tmp_path / "merged"), IDS), logits(model, IDS))


@pytest.mark.parametrize("form", ["uniform", "zeroed"], indirect=True)  # it refuses what has code
def test_llama_cpps_own_converter_writes_what_transformers_opens(form, tmp_path, monkeypatch):
    converter = installed("convert_hf_to_gguf")
    # It knows a tokenizer by the hash of what it makes of a text, and no hash of the demo's.
    monkeypatch.setattr(sys.modules["conversion.base"].TextModel, "get_vocab_base_pre", lambda *_: "gpt-2")
    monkeypatch.setattr(sys, "argv", ["", str(form.folder), "--outfile", f"{tmp_path}/m.gguf", "--outtype", "f32"])
    converter.main()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert_same(logits(opened, IDS), logits(form.gated, IDS))
