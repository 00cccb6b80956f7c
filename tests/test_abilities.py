"""What a model can still do: last words of sentences, repetition, bits per byte; and the box to talk to it."""

import dataclasses
import math
import re
from unittest.mock import Mock

import pytest
import torch
import transformers
from conftest import logits, make, random_blocks

import PruningAndFineTuningColab as nb

TEXT = "The old city lies by the river . It was burned in the war ! Many people left the town . They came back later . "


@pytest.fixture(scope="module")
def tokenizer():
    return nb.demo_tokenizer(TEXT * 20)


@pytest.fixture(scope="module")
def blocks(tokenizer):
    return nb.pack(TEXT * 40, tokenizer, 64)


def test_last_words_are_whole_words_at_the_ends_of_sentences(tokenizer, blocks):
    ids, is_word = nb.last_words(tokenizer, blocks)
    assert ids.shape == is_word.shape and ids.shape[1] == 16 and len(ids) > 5
    words = {tokenizer.decode(row[mask]) for row, mask in zip(ids, is_word)}
    assert words <= {" river", " war", " town", " later"} and len(words) > 2
    assert is_word[:, -1].all() and not is_word[:, 0].any()
    assert len(nb.last_words(tokenizer, blocks, number=3)[0]) <= 3


def test_a_word_counts_where_every_token_of_it_is_right():
    model, ids = make("gpt2"), random_blocks(5, 12)
    for _ in range(2):  # a word of two tokens, as the model predicts them; of what is before it nothing counts
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    is_word = torch.arange(14).ge(12).repeat(5, 1)
    assert nb.last_word_accuracy(model, (ids, is_word)) == 1
    for row, place in ((0, -1), (1, -2)):
        ids[row, place] = (ids[row, place] + 1) % 97
    assert nb.last_word_accuracy(model, (ids, is_word)) == pytest.approx(3 / 5)
    assert nb.last_word_accuracy(model, (ids[:0], is_word[:0])) is None


def test_repetition_is_the_share_of_repeated_4_grams_in_what_never_ends_early(monkeypatch):
    model, said, blocks = make("gpt2"), {}, torch.arange(3 * 24).view(3, 24) % 97
    model.generation_config.eos_token_id = list(range(97))
    assert 0 <= nb.repetition(model, blocks) <= 1
    monkeypatch.setattr(nb, "greedy", lambda model, ids, **options: transformers.generation.GenerateDecoderOnlyOutput(
        sequences=torch.cat([ids, said["ids"].expand(len(ids), -1)], 1)))  # fmt: skip
    said["ids"] = torch.arange(12)
    assert nb.repetition(model, blocks) == 0
    said["ids"] = torch.tensor([1, 2, 3] * 4)  # nine 4-grams, three different ones
    assert nb.repetition(model, blocks) == pytest.approx(6 / 9)
    assert nb.repetition(model, blocks[:, :8]) is None  # too short to say


def test_bits_per_byte(tokenizer, blocks):
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=1024, n_embd=8, n_layer=1, n_head=1)).eval()
    found = nb.abilities(model, tokenizer, blocks)
    size = sum(len(tokenizer.decode(block[1:]).encode()) for block in blocks)
    tokens = blocks[:, 1:].numel()
    assert found["bits_per_byte"] == pytest.approx(math.log2(nb.perplexity(model, blocks)) * tokens / size)


def test_the_table_says_where_a_stage_repeats_more():
    stages = ("dense", "pruned", "repaired")
    metrics = {"perplexity": dict.fromkeys(stages, 10.0), "parameters": dict.fromkeys(stages, 10**6),
               "bits_per_byte": dict.fromkeys(stages, 1.0), "last_words": dict.fromkeys(stages),
               "repetition": {"dense": 0.3, "pruned": 0.45, "repaired": 0.35},
               "model": {"saved_in": "float32"}}  # fmt: skip
    said = nb.comparison(metrics)
    assert "more than the dense model: pruned." in said and "| 45% |" in said and "| - |" in said


def test_the_conditions_name_what_the_form_says(monkeypatch):
    """In a notebook the form's values are the defaults."""
    chosen = {"train_file": "my.txt", "max_steps": 100}
    for field in dataclasses.fields(nb.Settings):
        monkeypatch.setattr(field, "default", chosen.get(field.name, field.default))
    settings = dataclasses.asdict(nb.Settings()) | chosen
    metrics = {"settings": settings, "blocks": {"test": 9, "tested": 7}, "precision": "float32", "device": "CPU"}
    said = nb.conditions(metrics | {"versions": {"torch": "2.13"}})
    assert "; train_file my.txt;" in said and "; max_steps 100;" in said and "tested on 7 of 9 test blocks" in said


@pytest.mark.parametrize("text, prompt", [
    ("= A title =\n\nshort line\n" + "word " * 30, " ".join(["word"] * 8)),
    ("no long line", "no long line"),
    ("漢" * 500, "漢" * 80),
])  # fmt: skip
def test_the_prompt_is_the_beginning_of_a_passage(text, prompt):
    assert nb.with_prompt(nb.Settings(), text).prompt == prompt
    assert nb.with_prompt(nb.Settings(prompt="mine"), text).prompt == "mine"


def write(box, capsys):
    """What a talk_box() says when its button is pressed."""
    box.children[1].click()
    return re.sub(r"\x1b\[2K|\r", "", capsys.readouterr().out)  # (how an area is cleared outside of a notebook)


def test_talk_shows_what_every_model_writes_until_it_is_interrupted(tokenizer, monkeypatch, capsys):
    models = {name: make("gpt2", seed, vocab_size=1024) for seed, name in enumerate(("dense", "fine-tuned"))}
    box = nb.talk_box(models, tokenizer, "The old city", new_tokens=5)
    written = write(box, capsys)
    said = [nb.sample(model, tokenizer, "The old city", new_tokens=5) for model in models.values()]
    wanted = [f"{name}:\n{text.removeprefix('The old city')}\n" for name, text in zip(models, said)]
    assert written == "".join(wanted) and len(set(said)) == 2
    monkeypatch.setattr(nb, "greedy", Mock(side_effect=KeyboardInterrupt))
    assert write(box, capsys) == "dense:\nfine-tuned:\n", "to interrupt one is to go on with the next"
    box.children[0].value = ""
    assert write(box, capsys) == "Write a prompt first.\n" * 2


def test_a_model_that_chats_gets_a_message(monkeypatch, capsys):
    tokenizer = nb.demo_tokenizer(TEXT)
    tokenizer.chat_template = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}<me>"
    asked = []
    monkeypatch.setattr(nb, "greedy", lambda model, ids, *rest, **options: asked.append(tokenizer.decode(ids[0])))
    write(nb.talk_box({"dense": make("gpt2")}, tokenizer, "Hello"), capsys)
    assert asked == ["<user>Hello<me>"]
