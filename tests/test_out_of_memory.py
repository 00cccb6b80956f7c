"""Where memory runs out, every stage goes on with fewer blocks, says so, remembers it, and gives the same result."""

import types

import pytest
import torch
from conftest import gated, new_run, random_blocks, tiny_tokenizer

import PruningAndFineTuningColab as nb

BLOCKS, LONG = random_blocks(8), random_blocks(8, 64)


def llama():
    return gated("llama", [[1, 0, 1, 1], [1, 1, 0, 1]])


def short_of_memory(most):
    """The model, as if from its second pass on memory were too small for more than `most` blocks at once."""
    model, passes = llama(), []

    def check(module, args):
        passes.append(len(args[0]))
        if passes[-1] > most and len(passes) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    model.model.layers[1].mlp.register_forward_pre_hook(check)
    return model


def test_the_batch_becomes_the_next_smaller_divisor(capsys):
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


STAGES = {
    "perplexity": lambda model: torch.tensor(nb.perplexity(model, BLOCKS)),
    "entropy": lambda model: nb.get_strategy("entropy").score(model, BLOCKS),
    "gradient": lambda model: nb.get_strategy("gradient").score(model, BLOCKS),
    "learning gates": lambda model: nb.Learned(level=0.25, steps=3).score(model, LONG),  # two texts at once
    "repair": lambda model: torch.cat([part.flatten() for part in nb.repair(model, BLOCKS).parameters()]),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_goes_on_with_fewer_blocks_and_the_same_result(stage, capsys):
    wanted = STAGES[stage](llama())
    nb.COMPUTING.fitted.clear()
    most = 2 if stage == "repair" else 1
    result = STAGES[stage](short_of_memory(most))
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4 if stage == "learning gates" else 1e-5)
    assert capsys.readouterr().out.count(f"{stage} runs out of memory: trying {most} blocks at once") == 1
    STAGES[stage](short_of_memory(most))
    assert "out of memory" not in capsys.readouterr().out, "what fits is remembered"


def test_fine_tuning_keeps_its_effective_batch(tmp_path, capsys):
    run = new_run(tmp_path, max_steps=4, batch_size=8, block_length=16, learning_rate=1e-3)
    blocks, models = dict.fromkeys(nb.SPLITS, BLOCKS), (llama(), short_of_memory(2))
    records = [nb.train(run, f"training {n}", model, blocks, run.settings) for n, model in enumerate(models)]
    assert [record["tokens_per_step"] for record in records] == [128, 128]
    assert capsys.readouterr().out.count("fine-tuning runs out of memory: trying 2 blocks at once") == 1
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*(model.parameters() for model in models)))
    with pytest.raises(nb.RunError, match="fine-tuning runs out of memory with a single block: take a smaller --block"):
        nb.train(run, "training 2", short_of_memory(0), blocks, run.settings)


def test_a_batch_starts_with_what_the_free_memory_has_room_for(monkeypatch, capsys):
    seen, model = [], llama()
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))

    def batches(free):
        monkeypatch.setattr(nb.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=free))
        seen.clear()
        nb.perplexity(model, BLOCKS)
        return set(seen)

    nb.COMPUTING.batch_size, block = 8, 24 * 16 * 97  # logits and their copies take 24 bytes a number
    assert batches(8 * block) == {8}
    assert batches(3.5 * block) == {2}, "the largest divisor of 8 that is at most 3"
    assert batches(0) == {1}, "one block is tried in any case"
    assert not nb.COMPUTING.fitted and not capsys.readouterr().out


def test_a_single_block_that_does_not_fit_says_what_to_change():
    said = "writing a sample runs out of memory with a single block: take a smaller --block-length"
    with pytest.raises(nb.RunError, match=said):
        nb.sample(short_of_memory(0), tiny_tokenizer(), "a a a")
