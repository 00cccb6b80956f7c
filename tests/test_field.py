"""Situations from public bug reports: files that hold what they do not say, odd tables, folders and families."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from conftest import make, tiny_tokenizer
from families import SIZES, WIDE
from safetensors.torch import load_file, save_file

import PruningAndFineTuningColab as nb

CPU, SCRIPT = torch.device("cpu"), Path(nb.__file__)
LINES = [f"Line {i}: the gate of the city, built in {1000 + i}, stood by the river; so it was." for i in range(60)]


def saved(place, family="llama", **changes):
    make(family, **changes).save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    return place / "model"


def edit(file, **words):
    file.write_text(json.dumps(json.loads(file.read_text()) | words))


def weights(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


# --- what the file holds


def test_a_head_of_its_own_is_kept_whatever_the_configuration_says(tmp_path, tokens):
    folder = saved(tmp_path, tie_word_embeddings=False)
    edit(folder / "config.json", tie_word_embeddings=True)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = nb.load_model(str(folder), CPU)[1]
    assert torch.equal(plain(tokens).logits, model(tokens).logits)
    assert model.lm_head.weight is not model.model.embed_tokens.weight and not model.config.tie_word_embeddings


@pytest.mark.parametrize("said", [None, "float32"])
def test_the_format_is_that_of_the_file(said, tmp_path):
    folder = saved(tmp_path, "gpt2")
    weights(folder, lambda found: {name: value.bfloat16() for name, value in found.items()})
    edit(folder / "config.json", dtype=said)
    model = nb.load_model(str(folder), CPU)[1]
    assert model.came_in == torch.bfloat16 and model.dtype == torch.float32


def test_weights_without_a_place_are_named(tmp_path, capsys):
    folder = saved(tmp_path)
    weights(folder, lambda found: found | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})
    nb.load_model(str(folder), CPU)
    said = capsys.readouterr().out
    assert "1 weights have no place in a LlamaForCausalLM" in said and "q_proj.bias first" in said


def prefixed(folder):
    weights(folder, lambda found: {f"_orig_mod.{name}": value for name, value in found.items()})


def cut_short(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])


def without_a_shard(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("model-*"))[1].unlink()


def of_the_future(folder):
    edit(folder / "tokenizer.json", pre_tokenizer={"type": "Future"})


@pytest.mark.parametrize("change, remedy", [
    (prefixed, "it has _orig_mod.lm_head.weight instead: save it under the model's own names"),
    (cut_short, "a file is cut short or broken: download or copy it again"),
    (without_a_shard, "a file is missing: download or copy all of them"),
    (of_the_future, "it was made by a newer version: pip install -U transformers tokenizers"),
])  # fmt: skip
def test_the_remedy_fits(change, remedy, tmp_path):
    folder = saved(tmp_path)
    change(folder)
    with pytest.raises(nb.UserError) as error:
        nb.load_model(str(folder), CPU)
    assert remedy in str(error.value)


def test_a_folder_of_the_hub_cache_is_opened_and_named_by_its_model(tmp_path):
    place = tmp_path / "models--Some--Model" / "snapshots"
    place.mkdir(parents=True)
    shutil.move(saved(tmp_path), place / "0123")
    assert nb.load_model(str(place.parent), CPU)[1].num_parameters() == make("llama").num_parameters()
    assert nb.bare_name(str(place / "0123")) == nb.bare_name(str(place.parent)) == "Some/Model"


# --- text


def text_of(path, model="demo"):
    return nb.load_text(nb.Settings(model=str(model), train_file=str(path), block_length=16))


def test_tables_are_read_by_the_delimiter_that_they_have(tmp_path):
    for delimiter in ",;\t|":
        rows = [f'{number}{delimiter}"{line}"' for number, line in enumerate(LINES)]
        (tmp_path / "a.csv").write_text("\n".join([f"id{delimiter}text", *rows]))
        assert nb.read_file(tmp_path / "a.csv") == "\n\n".join(LINES)
    (tmp_path / "a.csv").write_text("id,text\n1,one\n2,two, and more\n")
    with pytest.raises(nb.UserError, match="row 3 has 3 columns, but the first one 2"):
        nb.read_file(tmp_path / "a.csv")


def test_the_column_that_is_filled_is_taken(tmp_path):
    rows = [{"content": line} for line in LINES] + [{"text": LINES[0]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert nb.read_file(tmp_path / "a.jsonl") == "\n\n".join(LINES)


def test_only_what_a_person_would_call_the_text_belongs_to_a_folder(tmp_path):
    book = tmp_path / "data" / "book.txt"
    (book.parent / ".ipynb_checkpoints").mkdir(parents=True)
    book.write_text("\n".join(LINES))
    shutil.copy(book, book.parent / ".ipynb_checkpoints/book-checkpoint.txt")
    (book.parent / "._book.txt").write_bytes(b"\0\5\x16\7")
    nb.Record(nb.Settings(output_dir=str(book.parent / "results")), CPU, torch.float32)
    assert "".join(text_of(book.parent).values()) == book.read_text()


def test_splits_of_a_folder_and_of_a_saved_dataset_are_kept_apart(tmp_path):
    for place in ("named", "saved", "one"):
        (tmp_path / place).mkdir()
    for split, name in (("train", "my-train.txt"), ("validation", "valid.txt"), ("test", "test_1.txt")):
        (tmp_path / "named" / name).write_text(f"{split} " * 40)
    data = {split: datasets.Dataset.from_dict({"text": [f"{split} " * 40]}) for split in nb.SPLITS}
    datasets.DatasetDict(data).save_to_disk(str(tmp_path / "saved"))
    data["train"].save_to_disk(str(tmp_path / "one"))
    for place in ("named", "saved"):
        assert {split: set(text.split()) for split, text in text_of(tmp_path / place).items()} == {
            split: {split} for split in nb.SPLITS}  # fmt: skip
    assert "".join(text_of(tmp_path / "one").values()) == "train " * 40
    (tmp_path / "named" / "book.txt").write_text("book " * 40)
    assert "book" in text_of(tmp_path / "named")["test"] + text_of(tmp_path / "named")["train"]


TEMPLATE = (
    "{% if tools %}TOOLS {{ tools }}\n{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} {{ c.function.arguments }}{% endfor %}{% endfor %}"
)
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome", "hot": true}'}}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_chats_reach_the_template_whole_and_as_json(kind, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tools = json.dumps([{"type": "function", "function": {"name": "get_weather"}}])
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "hot?"}]
    turns = [{"role": "user", "content": parts if kind == "jsonl" else "How hot?"},
             {"role": "assistant", "content": None, "tool_calls": [CALL]}]  # fmt: skip
    rows = [{"messages": turns, "tools": tools}, {"messages": [], "tools": tools}]
    file = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        nb.pandas.DataFrame(rows).to_parquet(file)
    text = nb.read_file(file, lambda: tokenizer)
    assert text == (
        'TOOLS [{"type": "function", "function": {"name": "get_weather"}}]\n<user>How hot?'
        '<assistant>CALL get_weather {"city": "Rome", "hot": true}'
    )


# --- generation, values, ways of running


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


def test_more_arrives_as_it_was_written_and_run_takes_its_own_options(monkeypatch, capsys):
    monkeypatch.setattr(nb, "in_notebook", lambda: True)
    more = r'--model demo --train-file "C:\my data\a.txt" --prompt "it # is"'
    settings = nb.start_settings(more)
    assert settings.train_file == r"C:\my data\a.txt" and settings.prompt == "it # is"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--model", "demo", "--strategy", "fisher"])
    assert nb.start_settings("").strategy == "fisher"


def test_a_script_without_a_file_and_without_a_console_saves_its_code(tmp_path):
    code = (
        "import transformers, torch; torch.manual_seed(0)\n"
        f"m = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{WIDE!r})).eval()\n"
        "set_gates(m, torch.tensor([[1., 0, 1, 1], [1, 1, 0, 0]]))\n"
        f"save_config(compact(m), Path({str(tmp_path)!r}), torch.float32)\n"
    )
    space = 'space = {"__name__": "pasted"}; exec(compile(open(sys.argv[1]).read(), "<stdin>", "exec"), space)'
    words = [sys.executable, "-c", f"import sys; {space}; exec({code!r}, space)", SCRIPT]
    done = subprocess.run(["bash", "-c", '"$@" >&-', "run", *words], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "modeling_pruned.py").exists(), done.stderr[-2000:]


def test_the_smallest_of_several_longest_texts_counts():
    model = make("llama")
    model.config.max_seq_len = 20
    text = dict.fromkeys(nb.SPLITS, "a " * 60)
    with pytest.raises(nb.UserError, match="block_length is 30, but the model reads at most 20 tokens"):
        nb.pack_all(text, tiny_tokenizer(), model, nb.Settings(block_length=30))


def test_a_home_that_cannot_be_written_to_is_none_of_our_business(tmp_path, tokens):
    model = make("llama")
    nb.set_gates(model, torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 0]]))
    small = nb.compact(model)
    nb.save_compact(small, tiny_tokenizer(), tmp_path)
    code = f"import PruningAndFineTuningColab as nb; print(nb.reopen(nb.Path({str(tmp_path)!r})).num_parameters())"
    place = {"HF_HOME": "/sys/hf", "HOME": "/sys/home", "XDG_CACHE_HOME": "/sys/xdg", "PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | place)
    assert done.stdout.split()[-1:] == [str(small.num_parameters())], done.stderr[-2000:]


# --- families, and tools


def random_model(config, **words):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**words)).eval()
    nb.add_gates(model)
    return model


def test_a_model_that_opens_as_another_one_keeps_its_gates():
    mamba = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_d_ssm=64, mamba_expand=2)
    model = random_model("FalconH1Config", **WIDE | mamba | {"mamba_chunk_size": 8})
    assert nb.why_not_compact(model).startswith("opened again, its logits differ by nan")


def test_a_model_whose_layers_cannot_be_refitted_is_refused_before_the_run():
    looped = {name: value for name, value in WIDE.items() if name != "num_key_value_heads"}
    model = random_model("HrmTextConfig", **looped | {"head_dim": 8})
    with pytest.raises(nb.UserError, match="its layers do not run once for every text: take --no-repair"):
        nb.plan_closing(model, nb.Settings())
    nb.plan_closing(model, nb.Settings(repair=0))


def test_sizes_of_a_model_that_cannot_be_cut_are_those_that_it_keeps(tokens):
    config = {**SIZES, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
              "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
              "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}  # fmt: skip
    model = random_model("DeepseekV3Config", **config)
    assert not nb.can_compact(model)
    gates = torch.ones(2, 4).index_fill(1, torch.tensor([1]), 0.0)
    assert nb.predict_cost(model, gates, 16) == nb.predict_cost(model, torch.ones(2, 4), 16)
    nb.plan_closing(model, nb.Settings(uniform="groups"))


def test_other_tools_find_their_classes_and_a_clear_sentence(tmp_path, tokens):
    model = make("llama")
    nb.set_gates(model, torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 0]]))
    small = nb.compact(model)
    nb.save_compact(small, tiny_tokenizer(), tmp_path)
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
    with pytest.raises(nb.UserError, match="is compact, its heads are cut out already"):
        nb.load_model(str(tmp_path), CPU)
