"""Situations from public bug reports: files that hold what they do not say, chats, folders, families and tools."""

import shutil

import families
import pytest
import torch
import transformers
from conftest import CPU, SCRIPT, change_weights, edit, gated, make, run_python, saved, tiny_tokenizer
from families import SIZES, WIDE

import PruningAndFineTuningColab as nb

# --- what the file holds


def test_a_head_of_its_own_is_kept_whatever_the_configuration_says(tmp_path, tokens):
    folder = saved(tmp_path / "model", tie_word_embeddings=False)
    edit(folder / "config.json", tie_word_embeddings=True)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = nb.load_model(str(folder), CPU)[1]
    assert torch.equal(plain(tokens).logits, model(tokens).logits)
    assert model.lm_head.weight is not model.model.embed_tokens.weight and not model.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_the_format_is_that_of_the_file_and_weights_without_a_place_are_named(dtype, tmp_path, capsys):
    folder, more = saved(tmp_path / "model"), {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
    change_weights(folder, lambda found: {name: value.bfloat16() for name, value in (found | more).items()})
    edit(folder / "config.json", dtype=dtype)
    model = nb.load_model(str(folder), CPU)[1]
    assert model.came_in == torch.bfloat16 and model.dtype == torch.float32
    said = capsys.readouterr().out
    assert "1 weights have no place in a LlamaForCausalLM" in said and "q_proj.bias first" in said


def test_a_folder_of_the_hub_cache_is_opened_and_named_by_its_model(tmp_path):
    place = tmp_path / "models--Some--Model" / "snapshots"
    place.mkdir(parents=True)
    shutil.move(saved(tmp_path / "model"), place / "0123")
    assert nb.load_model(str(place.parent), CPU)[1].num_parameters() == make("llama").num_parameters()
    assert nb.bare_name(str(place / "0123")) == nb.bare_name(str(place.parent)) == "Some/Model"


# --- generation, ways of running


@pytest.mark.parametrize("words", [
    {"do_sample": True, "num_return_sequences": 3}, {"penalty_alpha": 0.6, "top_k": 4}, {"stop_strings": ["e"]},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, {"cache_implementation": "quantized"},
    {"return_dict_in_generate": True}, {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1},
])  # fmt: skip
def test_our_own_generation_is_greedy_and_the_makers_is_left_as_it_was(words):
    model, tokenizer = make("llama"), tiny_tokenizer()
    wanted = nb.sample(model, tokenizer, "a")
    before = model.generation_config = transformers.GenerationConfig(**words)
    assert nb.sample(model, tokenizer, "a") == wanted and nb.can_compact(model)
    assert model.generation_config is before


def test_a_script_without_a_file_and_without_a_console_saves_its_code(tmp_path):
    code = f"""import os, sys, torch, transformers
os.close(1)
sys.stdout = sys.__stdout__ = None
space = {{"__name__": "pasted"}}
exec(compile(open({str(SCRIPT)!r}).read(), "<stdin>", "exec"), space)
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{WIDE!r})).eval()
space["set_gates"](model, torch.tensor([[1., 0, 1, 1], [1, 1, 0, 0]]))
space["save_config"](space["compact"](model), space["Path"]({str(tmp_path)!r}), torch.float32)
"""
    run_python("-c", code, cwd=tmp_path)
    assert (tmp_path / "modeling_pruned.py").exists()


# --- families, and tools


def random_model(config, **words):
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**words)).eval()


def test_a_model_that_opens_as_another_one_keeps_its_gates():
    mamba = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_d_ssm=64, mamba_expand=2)
    model = random_model("FalconH1Config", **WIDE | mamba | {"mamba_chunk_size": 8})
    assert nb.why_not_compact(model).startswith("opened again, its logits differ by nan")


def test_a_model_whose_layers_cannot_be_refitted_is_refused_before_the_run():
    model = random_model("HrmTextConfig", **SIZES | {"head_dim": 8})
    with pytest.raises(nb.UserError, match="its layers do not run once for every text: take --no-repair"):
        nb.plan_closing(model, nb.Settings())
    nb.plan_closing(model, nb.Settings(repair=0))


def test_sizes_of_a_model_that_cannot_be_cut_are_those_that_it_keeps():
    model = families.make("DeepSeek V3")
    assert not nb.can_compact(model)
    gates = torch.ones(2, 4).index_fill(1, torch.tensor([1]), 0.0)
    assert nb.predict_cost(model, gates, 16) == nb.predict_cost(model, torch.ones(2, 4), 16)
    nb.plan_closing(model, nb.Settings(uniform="groups"))


def test_it_opens_where_home_is_read_only_and_other_tools_find_their_classes_and_a_clear_sentence(tmp_path, tokens):
    small = nb.compact(gated("llama"))
    nb.save_compact(small, tiny_tokenizer(), tmp_path)
    code = f"import PruningAndFineTuningColab as nb; print(nb.reopen(nb.Path({str(tmp_path)!r})).num_parameters())"
    place = {"HF_HOME": "/sys/hf", "HOME": "/sys/home", "XDG_CACHE_HOME": "/sys/xdg"}
    assert run_python("-c", code, cwd=tmp_path, **place).stdout.split()[-1:] == [str(small.num_parameters())]
    trust = {"trust_remote_code": True, "dtype": torch.float32}
    base = transformers.AutoModel.from_pretrained(tmp_path, **trust)
    assert torch.equal(small.lm_head(base(tokens).last_hidden_state), small(tokens).logits)
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, **trust)
    judge.config.pad_token_id = 0
    assert judge(tokens).logits.shape == (2, 3)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **trust)
    assert opened.config.model_type == "llama", "tools that know families by this name know it"
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    with pytest.raises(nb.UserError, match="is compact, its heads are cut out already.*take the model that it was"):
        nb.load_model(str(tmp_path), CPU)
