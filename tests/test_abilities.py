"""What a model can still do: last words of sentences, repetition, bits per byte; and the box to talk to it."""

import dataclasses
import math
import re

import pytest
import torch
import transformers
from conftest import make

import PruningAndFineTuningColab as nb

TEXT = "The old city lies by the river . It was burned in the war ! Many people left the town . They came back later . "


@pytest.fixture(scope="module")
def tokenizer():
    return nb.demo_tokenizer(TEXT * 20)


@pytest.fixture(scope="module")
def blocks(tokenizer):
    return nb.pack(TEXT * 40, tokenizer, 64)


class Knows(torch.nn.Module):
    """A model that predicts the ids that it was told, and afterwards token 1."""

    def __init__(self, answers: torch.Tensor):
        super().__init__()
        self.answers, self.device = answers, torch.device("cpu")
        self.config = transformers.GPT2Config(vocab_size=1024)

    def forward(self, ids, use_cache=False):
        nxt = torch.ones_like(ids)
        for row, seen in zip(nxt, ids):
            (place,) = (number for number, own in enumerate(self.answers) if torch.equal(own[1:-1], seen[1:-1]))
            row[:-1] = self.answers[place, 1:]
        logits = torch.nn.functional.one_hot(nxt, 1024).float()
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def test_last_words_are_whole_words_at_the_ends_of_sentences(tokenizer, blocks):
    ids, is_word = nb.last_words(tokenizer, blocks)
    assert ids.shape == is_word.shape and ids.shape[1] == 16 and len(ids) > 5
    words = {tokenizer.decode(row[mask]) for row, mask in zip(ids, is_word)}
    assert words <= {" river", " war", " town", " later"} and len(words) > 2
    assert is_word[:, -1].all() and not is_word[:, 0].any()
    assert len(nb.last_words(tokenizer, blocks, number=3)[0]) <= 3


def test_a_word_counts_where_every_token_of_it_is_right(tokenizer, blocks):
    ids, is_word = nb.last_words(tokenizer, blocks)
    first = {tuple(row.tolist()): number for number, row in reversed(list(enumerate(ids)))}  # each passage once
    ids, is_word = ids[sorted(first.values())], is_word[sorted(first.values())]
    assert nb.last_word_accuracy(Knows(ids), (ids, is_word)) == 1
    wrong = ids.clone()
    wrong[0, -1] += 1  # the last token of the first passage's word
    model = Knows(wrong)
    assert nb.last_word_accuracy(model, (ids, is_word)) == pytest.approx(1 - 1 / len(ids))
    assert nb.last_word_accuracy(model, (ids[:0], is_word[:0])) is None


def test_repetition_is_the_share_of_repeated_4_grams(monkeypatch):
    model, said = make("gpt2"), {}
    blocks = torch.arange(3 * 24).view(3, 24) % 97
    monkeypatch.setattr(nb, "greedy", lambda model, ids, **options: transformers.generation.GenerateDecoderOnlyOutput(
        sequences=torch.cat([ids, said["ids"].expand(len(ids), -1)], 1)))  # fmt: skip
    said["ids"] = torch.arange(12)
    assert nb.repetition(model, blocks) == 0
    said["ids"] = torch.tensor([1, 2, 3] * 4)  # nine 4-grams, three different ones
    assert nb.repetition(model, blocks) == pytest.approx(6 / 9)
    assert nb.repetition(model, blocks[:, :8]) is None  # too short to say


def test_what_is_written_for_repetition_never_ends_early():
    model = make("gpt2")
    model.generation_config.eos_token_id = list(range(97))
    assert 0 <= nb.repetition(model, torch.arange(3 * 24).view(3, 24) % 97) <= 1


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


def test_talk_shows_what_every_model_writes(tokenizer, capsys):
    models = {name: make("gpt2", seed, vocab_size=1024) for seed, name in enumerate(("dense", "fine-tuned"))}
    box = nb.talk_box(models, tokenizer, "The old city", new_tokens=5)
    written = write(box, capsys)
    said = [nb.sample(model, tokenizer, "The old city", new_tokens=5) for model in models.values()]
    wanted = [f"{name}:\n{text.removeprefix('The old city')}\n" for name, text in zip(models, said)]
    assert written == "".join(wanted) and len(set(said)) == 2
    box.children[0].value = ""
    assert write(box, capsys) == "Write a prompt first.\n" * 2


def test_a_model_that_chats_gets_a_message(tokenizer, monkeypatch, capsys):
    tokenizer = nb.demo_tokenizer(TEXT)
    tokenizer.chat_template = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}<me>"
    asked = []
    monkeypatch.setattr(nb, "greedy", lambda model, ids, *rest, **options: asked.append(tokenizer.decode(ids[0])))
    write(nb.talk_box({"dense": make("gpt2")}, tokenizer, "Hello"), capsys)
    assert asked == ["<user>Hello<me>"]


def test_to_interrupt_is_to_stop_writing(tokenizer, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(nb, "greedy", stop)
    assert write(nb.talk_box({"dense": make("gpt2")}, tokenizer, "Hello"), capsys) == "dense:\n"
