"""GGUF files of pruned models: by llama.cpp's formulas, and, with tests/requirements-llama.txt, in llama.cpp itself."""

import json
from pathlib import Path

import families
import gguf
import pytest
import tokenizers
import torch
import transformers
from conftest import new_run
from llama_cpp import difference_by_formulas, divergence_in_llama_cpp, read_gguf, why_no_llama_cpp

import PruningAndFineTuningColab as nb

IDS = torch.arange(24) * 7 % 80
NO_LLAMA_CPP = why_no_llama_cpp()
in_llama_cpp = pytest.mark.skipif(bool(NO_LLAMA_CPP), reason=NO_LLAMA_CPP)
TEXT = "It's 2026: the 1,234 café-goers DON'T  agree…\n\n\tNaïve? 🙂 http://x.y/z?a=1 \r\n  end   "


def llama(seed=0, **changes):
    """A Llama whose norms are not all ones: equal ones would hide a wrong one."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=400, hidden_size=96, intermediate_size=128, num_hidden_layers=3, num_attention_heads=6)
    shape |= dict(num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=0, eos_token_id=0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | changes))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1, 0.3)
    return model.eval()


def of_family(name):
    """A model of the catalogue; Qwen 3 with tied embeddings, as its small ones have them."""
    return families.make(name.removesuffix(", tied"), tie_word_embeddings=name.endswith(", tied"))


def tokenizer(steps=None):
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = steps or tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    end, alphabet = "<|endoftext|>", tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=[end], show_progress=False, initial_alphabet=alphabet
    )
    bpe.train_from_iterator([TEXT, Path(__file__).read_text()], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, bos_token=end)


def real(own=None):
    """Ids of a text that decodes to what it was, so that tokens can be compared."""
    return (own or tokenizer())(TEXT, return_tensors="pt").input_ids[0]


def cut(model, prunes="both", gates=None):
    """The model without the units that gates close: the second and third reader of a key, another one, neurons."""
    nb.prune_only(model, prunes)
    if gates is None:
        gates = torch.rand(nb.get_gates(model).shape, generator=torch.Generator().manual_seed(1)).gt(0.4).float()
        gates[:, 0] = 1
    nb.set_gates(model, gates)
    return nb.compact(model)


def write(small, path, bits="f32", own=None, source=""):
    words = {"format": bits, "name": "tiny", "base": "a model", "description": "some heads removed"}
    nb.write_gguf(path, small, own or tokenizer(), source, words)
    return path


def fields_of(path, start=""):
    """What a file says, by name; or those names that start so."""
    fields = gguf.GGUFReader(path).fields.items()
    return {name: field.contents() for name, field in fields if name.startswith(start)}


MASKS = {
    "a layer without heads": [[0] * 6, [1, 1, 1, 0, 1, 0], [1, 0, 0, 1, 1, 1]],  # one stays, and writes zeros
    "uneven readers": [[1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0], [1, 0, 0, 0, 1, 1]],
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
FIT = ("Llama, SmolLM2", "Qwen 3, tied", "Mistral", "Ministral", "Qwen 2", "Phi-3", "Seed-OSS")
DO_NOT_FIT = ("GPT-2", "Qwen 3", "Gemma", "Gemma 3", "OLMo 2", "Granite", "GLM", "Mixtral", "SmolLM3", "BitNet")


@pytest.mark.parametrize("changes", [
    dict(tie_word_embeddings=True, mlp_bias=True), dict(attention_bias=True),
    dict(rope_parameters=LINEAR), dict(rope_parameters=LLAMA3),
])  # fmt: skip
@pytest.mark.parametrize("name", MASKS)
def test_what_is_written_are_the_logits_by_llama_cpps_formulas(name, changes, tmp_path):
    small = cut(llama(**changes), "heads", torch.tensor(MASKS[name]).float())
    tensors, numbers = nb.in_words_of_llama_cpp(small)
    assert difference_by_formulas(small, tensors, numbers, IDS) < 1e-5
    path = write(small, tmp_path / "m.gguf")
    back = read_gguf(path)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name].float()) for name in tensors)
    fields = fields_of(path)
    assert fields["general.architecture"] == "deci" and fields["general.base_model.0.name"] == "a model"
    assert fields["deci.attention.head_count"] == numbers["head_count"]
    assert fields["deci.attention.head_count_kv"] == numbers["head_count_kv"]
    with pytest.raises(nb.UserError, match="m.gguf' cannot be used .*deci"):  # given as a model to prune
        nb.load_model(str(path), "cpu")


def test_a_window_limits_the_context_that_is_promised():
    for window, context in ((16, 16), (None, 64)):
        model = families.make("Mistral", sliding_window=window)
        assert nb.in_words_of_llama_cpp(cut(model))[1]["context_length"] == context


@pytest.mark.parametrize("name", [*FIT, *DO_NOT_FIT])
def test_which_families_fit(name):
    model = of_family(name)
    nb.add_gates(model)
    assert (nb.why_not_gguf(model) == "") == (name in FIT), nb.why_not_gguf(model)
    if name in FIT:
        small = cut(model)
        assert type(model).__name__ in nb.LLAMA_CPP and len(FIT) == len(nb.LLAMA_CPP), "all that are listed"
        assert difference_by_formulas(small, *nb.in_words_of_llama_cpp(small), IDS) < 1e-5


def test_what_does_not_fit_is_said_before_the_run():
    settings, foreign = nb.Settings(save_model="compact gguf"), tokenizer(tokenizers.pre_tokenizers.Whitespace())
    for model, own, said in (
        (families.make("GPT-2"), None, "llama.cpp cannot run a pruned GPT2LMHeadModel .*take --save-model compact"),
        (llama(rope_parameters=YARN), tokenizer(), "no positions of the type 'yarn'"),
        (llama(hidden_act="relu"), tokenizer(), "relu"),
        (llama(), foreign, "llama.cpp's name for the tokenizer is unknown.*gpt-2, smollm"),
    ):
        nb.add_gates(model)
        with pytest.raises(nb.UserError, match=said):
            nb.check_gguf(model, own, settings)
    nb.check_gguf(model, tokenizer(), settings)
    nb.check_gguf(families.make("GPT-2"), None, nb.Settings())  # not asked for


def test_an_even_one_is_an_ordinary_llama_file_which_can_be_pruned_again(tmp_path):
    small = cut(llama(tie_word_embeddings=False), "heads", torch.tensor([[1.0, 1, 1, 0, 0, 0]] * 3))
    path = write(small, tmp_path / "m.gguf")
    assert fields_of(path)["general.architecture"] == "llama"
    own, again = nb.load_model(str(path), "cpu")
    assert nb.largest_difference(small, again, IDS[None]) < 1e-5
    nb.set_gates(again, torch.tensor([[1.0, 0, 1], [1, 1, 0], [0, 1, 0]]))
    smaller = nb.compact(again)
    nb.save_compact(smaller, own, tmp_path / "compact")
    nb.save_gated(nb.expand(smaller, again), own, tmp_path / "zeroed")
    for form in ("compact", "zeroed"):
        assert nb.largest_difference(smaller, nb.reopen(tmp_path / form), IDS[None]) < 1e-5
        assert "quantization_config" not in json.loads((tmp_path / form / "config.json").read_text())
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / form).encode(TEXT) == own.encode(TEXT)


def test_the_tokenizer_of_a_file_is_copied(tmp_path):
    first, small, own = tmp_path / "first.gguf", cut(llama()), tokenizer()
    own.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    write(small, first, own=own)
    fields = fields_of(first, "tokenizer.")
    second = write(small, tmp_path / "second.gguf", "f16", source=str(first))
    assert fields == fields_of(second, "tokenizer.")
    assert fields["tokenizer.ggml.pre"] == "gpt-2" and fields["tokenizer.chat_template"] == own.chat_template


def steps(first, use_regex=False):
    last = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return tokenizers.pre_tokenizers.Sequence([first, last])


def letters(digits):
    return tokenizers.pre_tokenizers.Split(tokenizers.Regex(nb.LETTERS % digits), "isolated")


STEPS = {
    "gpt-2": None,
    "smollm": steps(tokenizers.pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "llama-bpe": steps(letters("{1,3}")),
    "qwen2": steps(letters("")),
}
BITS = {"f32": 1e-6, "f16": 1e-4, "bf16": 1e-3}
CASES = [(name, bits, "gpt-2", limit) for name in (*MASKS, "neurons, too") for bits, limit in BITS.items()]
CASES += [(name, "f32", "gpt-2", 1e-5) for name in FIT] + [("neurons, too", "f32", steps, 1e-5) for steps in STEPS]


@pytest.mark.parametrize("name", STEPS)
def test_a_tokenizer_is_named_by_how_it_cuts(name):
    assert nb.pre_tokenizer_name(tokenizer(STEPS[name])) == name


@in_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("name, bits, steps, limit", CASES)
def test_llama_cpp_opens_it_with_the_same_logits_and_tokens(name, bits, steps, limit, tmp_path):
    model = of_family(name) if name in FIT else llama(attention_bias=name == "uneven readers")
    model.resize_token_embeddings(400)  # a byte-level tokenizer has more tokens than the models of the catalogue
    gates = torch.tensor(MASKS[name]).float() if name in MASKS else None
    own, small = tokenizer(STEPS[steps]), cut(model, "both" if gates is None else "heads", gates)
    path = write(small, tmp_path / "m.gguf", bits, own)
    assert divergence_in_llama_cpp(path, small, own, real(own)) < limit


@in_llama_cpp
@pytest.mark.slow
def test_another_model_is_noticed(tmp_path):
    path = write(cut(llama()), tmp_path / "m.gguf")
    assert divergence_in_llama_cpp(path, cut(llama(seed=1)), tokenizer(), real()) > 1e-3


@pytest.mark.parametrize("level", [0.2, 0.5])
@pytest.mark.parametrize("prunes", ["heads", "both"])
def test_groups_leave_equally_many_readers_and_cost_what_was_planned(prunes, level):
    model = llama()
    nb.prune_only(model, prunes)
    costs = nb.unit_costs(model)
    importance = torch.rand(costs.shape, generator=torch.Generator().manual_seed(2))

    def choose(**changes):
        gates = nb.gates_for(model, importance, nb.Settings(prune=prunes, pruning_level=level, **changes))
        readers = gates[:, :6].unflatten(1, (2, 3)).sum(-1)
        return gates, all(len(set(row[row > 0].tolist())) == 1 for row in readers)

    gates, even = choose(save_model="compact gguf")
    assert even and torch.equal(gates, choose(uniform="groups")[0])
    assert not choose()[1] and not choose(save_model="compact gguf", uniform="no")[1]
    nb.set_gates(model, gates)
    freed, group = model.num_parameters() - nb.compact(model).num_parameters(), 3 * costs[0, 0].item()
    assert freed == pytest.approx(level * costs.sum().item(), abs=group / 2)


def test_what_is_worth_least_for_its_cost_goes_first_a_head_of_every_key_or_a_key():
    """(A key and its values cost as much as a query head and its outputs.)"""
    layout = nb.Layout(6, readers=3)
    for scores, level, expected in (
        ([5, 1, 1, 4, 2, 0.5], 0.25, [1, 0, 1, 1, 1, 0]),
        ([5, 1, 1, 4, 2, 0.5], 0.5, [1, 0, 0, 1, 0, 0]),
        ([5, 1, 1, 4, 2, 0.5], 0.8, [1, 0, 0, 0, 0, 0]),
        ([0.1, 0.2, 0.1, 4, 3, 5], 0.5, [0, 0, 0, 1, 1, 1]),
    ):
        assert nb.choose_gates(torch.tensor([scores]), level, 1, layout).tolist() == [expected]


def test_a_run_hands_over_a_gguf_file_and_where_layers_are_alike_a_folder_without_code(tmp_path):
    run = new_run(tmp_path, save_model="compact gguf", pruning_level=0.5)
    model, gates = llama(), torch.tensor([[1.0, 1, 1, 0, 0, 0]] * 3)
    nb.set_gates(model, gates)
    small = nb.compact(model)
    run.metrics |= {
        "model": {"saved_in": "float32", "file_bytes": None},
        **nb.describe_units(model, gates),
        "perplexity": {"dense": 2.0, "fine_tuned": 2.0},
        "parameters": {"dense": model.num_parameters(), "fine_tuned": small.num_parameters()},
        "blocks": {"train": 1, "validation": 1, "test": 1, "tested": 1},
    }
    nb.save_models(run, small, model, tokenizer(), real()[None])
    (file,) = (run.folder / "model-gguf").glob("*.gguf")
    numbers = nb.in_words_of_llama_cpp(small)[1]
    assert 0 < difference_by_formulas(small, read_gguf(file), numbers, real()) < 1e-2, "in 16 bits"
    assert run.metrics["file_bytes"]["gguf"] == file.stat().st_size
    card = (run.folder / "model-gguf" / "README.md").read_text()
    assert f"llama-cli -m {file.name}" in card and "from_pretrained" not in card
    card = (run.folder / "model-compact" / "README.md").read_text()
    assert "from_pretrained" in card and "trust_remote_code" not in card and "9 of 18 heads removed" in card
