"""Where memory runs out, every stage goes on with fewer blocks, says so, remembers it, and gives the same result."""

import copy

import pytest
import torch
from conftest import make

import PruningAndFineTuningColab as nb

BLOCKS = torch.randint(3, 97, (8, 16), generator=torch.Generator().manual_seed(1))


def short_of_memory(model, most):
    """The model, as if memory were too small for more than `most` blocks at once."""

    def check(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        if len(ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    model.base_model.register_forward_pre_hook(check, with_kwargs=True)
    return model


def gated(family="llama"):
    model = make(family)
    nb.set_gates(model, torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 1]]))
    return model


STAGES = {
    "perplexity": lambda model: torch.tensor(nb.perplexity(model, BLOCKS)),
    "entropy": lambda model: nb.get_strategy("entropy").score(model, BLOCKS),
    "gradient": lambda model: nb.get_strategy("gradient").score(model, BLOCKS),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_goes_on_with_fewer_blocks_and_the_same_result(stage, capsys):
    wanted = STAGES[stage](gated())
    nb.COMPUTING.fitted.clear()
    result = STAGES[stage](short_of_memory(gated(), 1))
    assert torch.allclose(result, wanted, rtol=1e-4, atol=1e-5)
    said = capsys.readouterr().out
    assert "runs out of memory: trying 1 blocks at once" in said
    STAGES[stage](short_of_memory(gated(), 1))
    assert "out of memory" not in capsys.readouterr().out, "what fits is remembered"


def test_learned_gates_are_the_same(capsys):
    long = torch.randint(
        3, 97, (8, 64), generator=torch.Generator().manual_seed(1)
    )  # four texts in a step, two at once
    wanted = nb.Learned(level=0.25, steps=3).score(gated(), long)
    nb.COMPUTING.fitted.clear()
    result = nb.Learned(level=0.25, steps=3).score(short_of_memory(gated(), 1), long)
    assert torch.allclose(result, wanted, atol=1e-4)
    assert capsys.readouterr().out.count("learning gates runs out of memory: trying 1 blocks at once") == 1


def test_repair_takes_fewer_blocks(capsys):
    nb.COMPUTING.batch_size = 8
    fixed = nb.repair(short_of_memory(gated(), 4), BLOCKS)
    said = capsys.readouterr().out
    assert all(
        f"{what} runs out of memory: trying 4 blocks at once" in said
        for what in ("looking at the dense model", "repair")
    )
    wanted = nb.repair(gated(), BLOCKS[:4])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(fixed.parameters(), wanted.parameters()))


def test_fine_tuning_keeps_its_effective_batch(tmp_path, capsys):
    settings = nb.Settings(output_dir=str(tmp_path), max_steps=4, batch_size=4, block_length=16, learning_rate=1e-3)
    blocks, results = dict.fromkeys(nb.SPLITS, BLOCKS), []
    for model in (gated(), short_of_memory(gated(), 2)):
        run = nb.Run(settings, torch.device("cpu"), torch.float32)
        results.append(nb.fine_tune(run, "fine_tuned", lambda model=model: copy.deepcopy(model), blocks, settings))
        record = run.metrics["training"]["fine_tuned"]
    assert record["micro_batch"] == 2 and record["tokens_per_step"] == 64
    assert "fine-tuning runs out of memory: trying 2 blocks at once" in capsys.readouterr().out
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(results[0].parameters(), results[1].parameters()))


def test_several_processes_end_in_a_sentence_and_remember_what_fits(tmp_path, monkeypatch):
    """They wait for each other's gradients, so one cannot begin anew alone: the same command goes on."""
    settings = nb.Settings(output_dir=str(tmp_path), max_steps=4, batch_size=4, block_length=16, learning_rate=1e-3)
    run, blocks = nb.Run(settings, torch.device("cpu"), torch.float32), dict.fromkeys(nb.SPLITS, BLOCKS)
    monkeypatch.setattr(nb, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(nb, "from_all_processes", lambda value: [value, value])
    said = (
        "fine-tuning runs out of memory in one of several processes: start the same command again, and it takes 1 "
        "blocks at once"
    )
    with pytest.raises(nb.RunError, match=said), run.step("fine-tune"):
        nb.fine_tune(run, "fine_tuned", lambda: short_of_memory(gated(), 1), blocks, settings)
    monkeypatch.undo()
    again = nb.Run(settings, torch.device("cpu"), torch.float32)
    assert again.folder == run.folder and nb.COMPUTING.fitted == {"fine-tuning": 1}
    with again.step("fine-tune"):
        nb.fine_tune(again, "fine_tuned", lambda: short_of_memory(gated(), 1), blocks, settings)
    with pytest.raises(
        nb.RunError, match="fine-tuning runs out of memory with a single block: take a smaller --block-length"
    ):
        nb.fine_tune(again, "fine_tuned", lambda: short_of_memory(gated(), 0), blocks, settings)


def test_a_batch_starts_with_what_the_free_memory_has_room_for(monkeypatch, capsys):
    seen, model = [], gated()
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    nb.COMPUTING.batch_size = 8
    nb.perplexity(model, BLOCKS)
    assert set(seen) == {8}
    monkeypatch.setattr(
        nb, "free_bytes", lambda device: 3.5 * (68 * 16 * 32 + 12 * 16 * 97)
    )  # room for three blocks of 16 tokens
    seen.clear()
    nb.perplexity(model, BLOCKS)
    assert set(seen) == {2}, "the largest divisor of 8 that is at most 3"
    assert capsys.readouterr().out == "perplexity: memory has room for 2 blocks at once, not 8\n"
    monkeypatch.setattr(nb, "free_bytes", lambda device: 0)
    nb.perplexity(model, BLOCKS)
    assert seen[-1] == 1, "one block is tried in any case"


def test_writing_a_sample_says_what_to_change():
    model, tokenizer = (
        short_of_memory(gated(), 0),
        lambda prompt, **_: nb.transformers.BatchEncoding({"input_ids": torch.ones(1, 3, dtype=torch.long)}),
    )
    tokenizer.eos_token_id = 2
    with pytest.raises(nb.RunError, match="writing a sample runs out of memory with a single block"):
        nb.sample(model, tokenizer, "prompt")


def test_a_single_block_that_does_not_fit_says_what_to_change():
    with pytest.raises(
        nb.RunError, match="perplexity runs out of memory with a single block: take a smaller --block-length"
    ):
        nb.perplexity(short_of_memory(gated(), 0), BLOCKS)


def test_repair_needs_no_memory_for_logits(monkeypatch):
    monkeypatch.setattr(nb, "free_bytes", lambda device: 2**34)
    model = make("llama")
    room = {kind: nb.room_for_blocks(model, 512, kind) for kind in ("forward", "streams")}
    model.config.vocab_size *= 1000
    assert nb.room_for_blocks(model, 512, "streams") == room["streams"]
    assert nb.room_for_blocks(model, 512, "forward") < room["forward"]
