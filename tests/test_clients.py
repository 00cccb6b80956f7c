"""Practitioners' tools on a compact folder (`pytest -m slow tests/test_clients.py`, about a minute).

They are skipped where tests/requirements-clients.txt is not installed.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import make
from transformers import AutoModelForCausalLM, AutoTokenizer

import PruningAndFineTuningColab as nb

pytestmark = pytest.mark.slow
TRUST = {"trust_remote_code": True, "dtype": torch.float32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Llama with uneven layers, heads and neurons, in the compact and in the zeroed form."""
    place, tokenizer = tmp_path_factory.mktemp("saved"), nb.demo_tokenizer(nb.python_docs()[:200_000])
    model = make("llama", vocab_size=1024, max_position_embeddings=256)
    nb.prune_only(model, "both")
    gates = torch.ones_like(nb.get_gates(model))
    gates[0, 1], gates[1, :2], gates[0, 20:40] = 0, 0, 0
    nb.set_gates(model, gates)
    nb.save_compact(nb.compact(model), tokenizer, place / "compact")
    nb.save_gated(model, tokenizer, place / "zeroed")
    return place


def test_lm_eval_scores_both_forms_alike(folders, tmp_path):
    pytest.importorskip("lm_eval")
    words = nb.python_docs().split()[:400]
    rows = [{"question": " ".join(words[i : i + 20]), "choices": [words[i + 20], words[i + 21]], "answer": 0}
            for i in range(0, 320, 20)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": "local_choice", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}, "doc_to_text": "{{question}}",
            "doc_to_choice": "choices", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}]}  # fmt: skip
    (tmp_path / "local_choice.yaml").write_text(json.dumps(task))
    found = {}
    for form in ("compact", "zeroed"):
        options = f"pretrained={folders / form},dtype=float32" + ",trust_remote_code=True" * (form == "compact")
        words = ["--model", "hf", "--model_args", options, "--tasks", "local_choice", "--include_path", tmp_path,
                 "--device", "cpu", "--log_samples", "--output_path", tmp_path / form]  # fmt: skip
        done = subprocess.run([sys.executable, "-m", "lm_eval", "run", *words], capture_output=True, text=True,
                              env=os.environ | {"HF_DATASETS_OFFLINE": "1"})  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        (file,) = (tmp_path / form).rglob("samples_local_choice*.jsonl")
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        found[form] = torch.tensor([[float(part[0][0]) for part in sample["resps"]] for sample in samples])
    assert torch.allclose(found["compact"], found["zeroed"], rtol=1e-4) and len(found["compact"]) == len(rows)


def test_peft_trains_reloads_and_merges(folders, tmp_path):
    peft = pytest.importorskip("peft")
    ids = torch.arange(3, 35).view(2, 16)
    model = AutoModelForCausalLM.from_pretrained(folders / "compact", **TRUST)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4))  # targets are found by the family's name
    optimizer = torch.optim.SGD(tuned.parameters(), lr=1.0)
    for _ in range(2):
        tuned(ids, labels=ids).loss.backward()
        optimizer.step()
    wanted = tuned.eval()(ids).logits
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folders / "compact", **TRUST), tmp_path / "adapter")  # fmt: skip
    assert torch.allclose(again.eval()(ids).logits, wanted, atol=1e-5)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", **TRUST)
    assert torch.allclose(opened.eval()(ids).logits, wanted, atol=1e-3 * wanted.abs().max().item())


def test_trl_fine_tunes_one_step(folders, tmp_path):
    trl = pytest.importorskip("trl")
    import datasets

    data = datasets.Dataset.from_dict({"text": nb.python_docs().split("\n\n")[:8]})
    arguments = trl.SFTConfig(tmp_path, max_steps=1, use_cpu=True, bf16=False, report_to="none", max_length=64,
                              per_device_train_batch_size=2, save_strategy="no")  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folders / "compact", **TRUST)
    before = model.lm_head.weight.clone()
    tokenizer = AutoTokenizer.from_pretrained(folders / "compact", trust_remote_code=True)
    tokenizer.pad_token = tokenizer.eos_token
    trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer).train()
    assert not torch.equal(model.lm_head.weight, before)
