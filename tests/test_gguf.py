"""GGUF files of pruned models: by llama.cpp's formulas, and, where it is installed, in llama.cpp itself.

    pip install -r tests/requirements-llama.txt

Without it the tests of llama.cpp itself are skipped, and say so.
"""

import json
import shutil
from pathlib import Path

import families
import gguf
import pytest
import tokenizers
import torch
import transformers

import PruningAndFineTuningColab as nb

IDS = torch.arange(24) * 7 % 80


def why_no_llama_cpp():
    try:
        from llama_cpp_py_sync import Llama

        Llama.print_system_info()
    except ImportError:
        return "pip install -r tests/requirements-llama.txt"
    except RuntimeError as error:  # it wants a newer libc than Debian 12 has
        return str(error)
    return ""


NO_LLAMA_CPP = why_no_llama_cpp()
needs_llama_cpp = pytest.mark.skipif(bool(NO_LLAMA_CPP), reason=NO_LLAMA_CPP)
TEXT = "It's 2026: the 1,234 café-goers DON'T  agree…\n\n\tNaïve? 🙂 http://x.y/z?a=1 \r\n  end   "


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 400,
            "hidden_size": 96,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        | changes
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1, 0.3)
    return model


def tokenizer(steps=None, vocabulary=400):
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = steps or tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([TEXT, Path(__file__).read_text()], trainer)
    end = "<|endoftext|>"
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


def write(small, path, bits="f32", source=None, name="tiny"):
    words = {"format": bits, "name": name, "base": "a model", "description": "some heads removed"}
    nb.write_gguf(path, small, source or tokenizer(), "", words)
    return path


WITHOUT_HEADS = {
    "a layer without heads": [[1, 1, 1, 0, 1, 0], [0] * 6, [1, 0, 0, 1, 1, 1]],
    "the first layer without heads": [[0] * 6, [1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0]],
    "uneven readers": [[1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0], [1, 0, 0, 0, 1, 1]],
}


@pytest.mark.parametrize("name", WITHOUT_HEADS)
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_are_the_logits_by_llama_cpps_formulas(name, tied, tmp_path):
    model = llama(tie_word_embeddings=tied, attention_bias=name == "uneven readers")
    small = cut(model, "heads", torch.tensor(WITHOUT_HEADS[name]).float())
    tensors, numbers = nb.in_words_of_llama_cpp(small)
    assert nb.largest_difference_from(small, tensors, numbers, IDS) < 1e-5
    assert all(not shared or heads % shared == 0 for heads, shared in zip(numbers["heads"], numbers["key_value_heads"]))
    path = write(small, tmp_path / "m.gguf")
    back = nb.read_gguf(path)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name].float()) for name in tensors)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "deci"
    assert reader.fields["deci.attention.head_count"].contents() == numbers["heads"]
    assert reader.fields["general.base_model.0.name"].contents() == "a model"


def test_other_rotations_of_positions_are_written_or_refused():
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for rope in (
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        llama3 | {"original_max_position_embeddings": 64},
    ):
        model = llama(rope_parameters=rope)
        nb.add_gates(model)
        assert nb.why_not_gguf(model) == ""
        assert "rope_freqs.weight" in nb.in_words_of_llama_cpp(nb.compact(model))[0]
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
    model = llama(rope_parameters=yarn)
    nb.add_gates(model)
    assert "its logits differ" in nb.why_not_gguf(model)


def test_a_window_limits_the_context_that_is_promised():
    config = transformers.MistralConfig(sliding_window=100, max_position_embeddings=512)
    assert nb.context_length(config) == 100
    config.sliding_window = None
    assert nb.context_length(config) == 512


def family(name):
    """A model of the catalogue; Qwen 3 with tied embeddings, as its small ones have them."""
    if name != "Qwen 3, tied":
        return families.make(name)
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**families.WIDE, tie_word_embeddings=True)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1, 0.3)
    return model


FIT = ("Llama, SmolLM2", "Qwen 3, tied", "Mistral", "Ministral", "Qwen 2", "Phi-3", "SmolLM3", "Seed-OSS")


@pytest.mark.parametrize("name", [*FIT, "GPT-2", "Qwen 3", "Gemma", "Gemma 3", "OLMo 2", "Granite", "GLM", "Mixtral"])
def test_which_families_fit_is_tried(name):
    """(SmolLM3 of two layers; a real one has layers without positions, and is refused.)"""
    model = family(name)
    nb.add_gates(model)
    assert (nb.why_not_gguf(model) == "") == (name in FIT), nb.why_not_gguf(model)


def test_what_does_not_fit_is_said_before_the_run():
    model, settings = families.make("GPT-2"), nb.Settings(save_model="compact gguf")
    nb.add_gates(model)
    with pytest.raises(nb.UserError, match="llama.cpp cannot run a pruned GPT2LMHeadModel .*take --save-model compact"):
        nb.check_gguf(model, None, settings)
    model = llama()
    nb.add_gates(model)
    nb.check_gguf(model, tokenizer(), settings)
    with pytest.raises(nb.UserError, match="llama.cpp's name for the tokenizer is not known.*gpt-2, smollm"):
        nb.check_gguf(model, tokenizer(tokenizers.pre_tokenizers.Whitespace()), settings)
    nb.check_gguf(families.make("GPT-2"), None, nb.Settings())  # not asked for


def test_a_pruned_file_given_again_is_said(tmp_path):
    path = write(cut(llama()), tmp_path / "m.gguf")
    with pytest.raises(nb.UserError, match="layers that differ.*model-compact or model-zeroed of the same run"):
        nb.load_model(str(path), "cpu")


def test_an_even_one_is_an_ordinary_llama_file(tmp_path):
    gates = torch.tensor([[1.0, 1, 1, 0, 0, 0]] * 3)
    small = cut(llama(), "heads", gates)
    path = write(small, tmp_path / "m.gguf")
    assert gguf.GGUFReader(path).fields["general.architecture"].contents() == "llama"
    _, again = nb.load_model(str(path), "cpu")
    assert nb.largest_difference(small, again, IDS[None]) < 1e-5


def test_the_tokenizer_of_a_file_is_copied(tmp_path):
    first, small = tmp_path / "first.gguf", cut(llama())
    write(small, first)
    words = {"format": "f16", "name": "tiny", "base": "a model", "description": ""}
    nb.write_gguf(tmp_path / "second.gguf", small, None, str(first), words)
    fields = [
        {name: part.contents() for name, part in gguf.GGUFReader(path).fields.items() if name.startswith("tokenizer.")}
        for path in (first, tmp_path / "second.gguf")
    ]
    assert fields[0] == fields[1] and fields[0]["tokenizer.ggml.pre"] == "gpt-2"


def test_groups_that_llama_cpp_can_read():
    assert nb.plan_groups([3, 3]) == ([0, 1, 2, 3, 4, 5], [0, 1])
    assert nb.plan_groups([4, 2]) == ([0, 1, 2, 3, 4, 5], [0, 0, 1])
    assert nb.plan_groups([3, 2]) == ([0, 1, 2, 3, 4, -1], [0, 1])
    assert nb.plan_groups([1]) == ([0], [0])


STEPS = {
    "gpt-2": tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    **{
        name: tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(nb.LETTERS % digits), "isolated"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        for name, digits in (("llama-bpe", "{1,3}"), ("qwen2", ""))
    },
}


@pytest.mark.parametrize("name", STEPS)
def test_a_tokenizer_is_named_by_how_it_cuts(name):
    assert nb.pre_tokenizer_name(tokenizer(STEPS[name])) == name


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_llama_cpp_has_the_same_tokens(name, tmp_path):
    own = tokenizer(STEPS[name])
    small = cut(llama())
    path = write(small, tmp_path / "m.gguf", source=own)
    found = nb.check_in_llama_cpp(path, small, own, real(own))
    assert found["tokens"] > 20 and found["divergence"] < 1e-5


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("bits, limit", [("f32", 1e-6), ("f16", 1e-4), ("bf16", 1e-3), ("q8_0", 1e-2)])
@pytest.mark.parametrize("name", [*WITHOUT_HEADS, "neurons, too"])
def test_llama_cpp_opens_it_with_the_same_logits(name, bits, limit, tmp_path):
    gates = torch.tensor(WITHOUT_HEADS[name]).float() if name in WITHOUT_HEADS else None
    small = cut(llama(attention_bias=name == "uneven readers"), "both" if gates is None else "heads", gates)
    path = write(small, tmp_path / "m.gguf", bits)
    assert nb.check_in_llama_cpp(path, small, tokenizer(), real())["divergence"] < limit


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("name", FIT)
def test_llama_cpp_opens_every_family_that_fits(name, tmp_path):
    model = family(name)
    model.resize_token_embeddings(400)  # a byte-level tokenizer has more tokens than the models of the catalogue
    small = cut(model)
    path = write(small, tmp_path / "m.gguf")
    assert nb.check_in_llama_cpp(path, small, tokenizer(), real())["divergence"] < 1e-5


@needs_llama_cpp
@pytest.mark.slow
def test_another_model_is_noticed(tmp_path):
    small = cut(llama())
    path = write(small, tmp_path / "m.gguf")
    with pytest.raises(RuntimeError, match="is another model in llama.cpp"):
        nb.check_in_llama_cpp(path, cut(llama(seed=1)), tokenizer(), real())
    (tmp_path / "broken.gguf").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(RuntimeError, match="llama.cpp cannot open"):
        nb.check_in_llama_cpp(tmp_path / "broken.gguf", small, tokenizer(), real())


def test_even_groups_leave_equally_many_readers_at_no_more_parameters():
    model = llama()
    for prunes in ("heads", "both"):
        nb.prune_only(model, prunes)
        costs = nb.unit_costs(model)
        for level in (0.2, 0.5):
            settings = nb.Settings(prune=prunes, pruning_level=level, even_groups="yes")
            importance = torch.rand(costs.shape, generator=torch.Generator().manual_seed(2))
            gates = nb.gates_for(model, importance, settings)
            readers = gates[:, :6].unflatten(1, (2, 3)).sum(-1)
            assert all(len(set(row[row > 0].tolist())) == 1 for row in readers)
            nb.set_gates(model, gates)
            freed = model.num_parameters() - nb.compact(model).num_parameters()
            assert level * costs.sum() - 1 <= freed < (level + 0.15) * costs.sum()
    assert not nb.Settings().even() and nb.Settings(save_model="compact gguf").even()
    assert not nb.Settings(save_model="gguf", even_groups="no").even()


def test_even_groups_are_the_best_ones():
    """Beside all even choices of one layer."""
    worth = torch.tensor([[5.0, 1, 1, 4, 3, 0.5]])
    found = nb.best_groups(worth, 3, 1)
    assert {cost: value for cost, (value, _) in found.items()} == {2: 5, 3: 7, 4: 9, 6: 13, 8: 14.5}
    assert found[6][1][0].tolist() == [1, 1, 0, 1, 1, 0] or found[6][1][0].tolist() == [1, 0, 1, 1, 1, 0]


def test_a_run_hands_over_a_gguf_file(tmp_path):
    run = nb.Run(
        nb.Settings(output_dir=str(tmp_path), save_model="gguf", pruning_level=0.4), torch.device("cpu"), torch.float32
    )
    model = llama()
    nb.add_gates(model)
    gates = torch.tensor(WITHOUT_HEADS["uneven readers"]).float()
    nb.set_gates(model, gates)
    small = nb.compact(model)
    run.metrics |= {
        "model": {"saved_in": "float32", "file_bytes": None},
        "heads": nb.describe_heads(gates),
        "neurons": None,
        "perplexity": {"dense": 2.0, "fine_tuned": 2.0},
        "parameters": {"dense": model.num_parameters(), "fine_tuned": small.num_parameters()},
        "blocks": {"train": 1, "validation": 1, "test": 1, "tested": 1},
        "settings": nb.dataclasses.asdict(run.settings),
    }
    run.folder.mkdir(parents=True, exist_ok=True)
    nb.save_models(run, small, model, tokenizer(), real()[None])
    (file,) = (run.folder / "model-gguf").glob("*.gguf")
    assert run.metrics["reopened_difference"]["gguf"] < 1e-2
    card = (run.folder / "model-gguf" / "README.md").read_text()
    assert f"llama-cli -m {file.name}" in card and "from_pretrained" not in card
    assert json.dumps(run.metrics["llama_cpp"])
    shutil.rmtree(run.folder)
