"""What runs on a TPU runs through XLA, which runs on a processor too. In a virtual environment of its own (several GB):

    python3 -m venv xla && xla/bin/pip install torch==2.9.0 torch_xla==2.9.0 transformers==5.15.0 datasets accelerate \
        matplotlib ipywidgets psutil jupytext gguf pytest
    PJRT_DEVICE=CPU xla/bin/python -m pytest tests/test_xla.py
"""

import pytest
from conftest import FEW_WORDS, SCRIPT, make, random_blocks, results_in, run_python

pytest.importorskip("torch_xla", reason="torch_xla is not installed")

import torch_xla
from torch_xla.debug import metrics

import PruningAndFineTuningColab as nb


def walk(cwd, *words, **environment):
    cwd.mkdir()
    run_python(SCRIPT, "--dataset", "python-docs", *FEW_WORDS, *words, cwd=cwd, **environment)
    return results_in(cwd / "results")[1]


def test_the_whole_walk_has_the_numbers_of_the_processor(demo, tmp_path):
    plain = walk(tmp_path / "plain", "--model", demo, USE_TORCH_XLA="0")
    xla = walk(tmp_path / "xla", "--model", demo, "--device", "tpu", "--precision", "fp32")
    assert xla["device"].startswith("XLA") and plain["device"].startswith("CPU")
    assert xla["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-4)
    assert xla["heads"] == plain["heads"] and set(xla["training"]) == set(plain["training"])
    for stage in xla["training"]:
        here, there = (dict(run["training"][stage]["history"]["perplexity"]) for run in (plain, xla))
        assert there == pytest.approx(here, rel=1e-3)


def test_bf16_runs_too(demo, tmp_path):
    found = walk(tmp_path / "bf16", "--model", demo, "--device", "tpu", "--strategy", "entropy", "--no-control")
    assert found["precision"] == "bfloat16"
    assert found["perplexity"]["fine_tuned"] < 1.3 * found["perplexity"]["dense"]


def count(work):
    """(graphs compiled, numbers read back) while `work()` runs."""

    def numbers():
        torch_xla.sync()
        return [(metrics.metric_data(name) or (0,))[0] for name in ("CompileTime", "TransferFromDeviceTime")]

    before = numbers()
    work()
    return [after - first for after, first in zip(numbers(), before)]


def scored(name, model, texts, **options):
    return nb.get_strategy(name, **options).score(model, random_blocks(texts))


WORK = {
    "perplexity": lambda model, n: nb.perplexity(model, random_blocks(4 * n)),
    "entropy": lambda model, n: scored("entropy", model, 4 * n),
    "gradient": lambda model, n: scored("gradient", model, 4 * n),
    "learned": lambda model, n: scored("learned", model, 16, level=0.25, steps=6 * n),
}


@pytest.mark.parametrize("work", WORK)
def test_more_steps_compile_nothing_new_and_wait_for_nothing(work):
    model = nb.move(make("llama"), torch_xla.device())
    nb.add_gates(model)
    nb.COMPUTING.batch_size = 16 if work == "learned" else 4  # all texts of a step at once
    for n in (2, 2, 4, 2, 4):
        count(lambda n=n: WORK[work](model, n))  # all shapes are known now
    few, many = (count(lambda n=n: WORK[work](model, n)) for n in (2, 4))
    assert few[0] == many[0] == 0, "compiled anew"
    # One number is read back in every forward pass, by transformers: it looks whether several texts are packed into
    # one. Learned gates take two passes in each of their 12 steps more: one with open gates, one with their own,
    # and what comes out is looked at, whether it is finite.
    assert many[1] - few[1] <= (36 if work == "learned" else 2), "numbers are read back in every step"


def test_tied_embeddings_stay_tied():
    model = nb.move(make("gpt2"), torch_xla.device())
    assert model.lm_head.weight is model.transformer.wte.weight
