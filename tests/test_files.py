"""What is on disk is what is read, whatever it is called and whatever else is in it."""

import codecs
import gzip
import json

import pandas
import pytest
import torch
from conftest import make, tiny_tokenizer

import PruningAndFineTuningColab as nb


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content) if path.suffix.lower() == ".gz" else content)
    return str(path)


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def whole_text(path, **more):
    """What load_text makes of a file, folder or pattern for training."""
    settings = nb.Settings(model="demo", train_file=str(path), block_length=2, **more)
    return "".join(nb.load_text(settings)[split] for split in nb.SPLITS)


ROWS = lines({"text": "one"}, {"text": "two"})


@pytest.mark.parametrize("name", ["rows[1].jsonl", "a*b.jsonl", "data [v2]/rows.jsonl", "[[]].jsonl", "ä ö.JSONL"])
def test_a_file_that_is_called_so_comes_before_any_pattern(name, tmp_path):
    write(tmp_path / "rows1.jsonl", lines({"text": "another file"}))
    write(tmp_path / "axb.jsonl", lines({"text": "another file"}))
    text = "some words and some more of them"
    assert whole_text(write(tmp_path / name, lines({"text": text}))) == text


@pytest.mark.parametrize(
    "name, content",
    [
        *((name, "one\n\ntwo") for name in ("a.txt", "a.TXT", "a.md", "a.txt.gz")),
        *((name, ROWS) for name in ("a.jsonl", "a.jsonl.gz")),
        ("a.txt", codecs.BOM_UTF8 + b"one\n\ntwo"),
        ("a.jsonl", codecs.BOM_UTF8 + ROWS.encode()),
        ("a.jsonl", '{"text": "one"}\r\n\r\n{"text": "two"}'),
        ("a.jsonl", '{"text": "one", "id": 1}\n{"id": 2}\n{"text": null}\n{"text": "two"}'),
        ("a.json", '[{"text": "one"}, {"text": "two"}]'),
        ("a.json", '["one", "two"]'),
        ("a.csv", 'id,text\n1,one\n2,"two"\n'),
        ("a.CSV.GZ", "text\none\ntwo\n"),
    ],
)
def test_files_of_all_kinds(name, content, tmp_path):
    assert nb.read_file(write(tmp_path / name, content)) == "one\n\ntwo"


@pytest.mark.parametrize("word", ["NA", "null", "007", "1e5", "2024-01-01", "True", "  x ", '"', "ä\u2028b"])
def test_words_that_look_like_something_else_stay_words(word, tmp_path):
    rows = [word, "and more", word]
    table = pandas.DataFrame({"text": rows})
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", lines(*({"text": row} for row in rows)))
    write(tmp_path / "a.json", json.dumps([{"text": row} for row in rows]))
    for kind in ("csv", "parquet", "jsonl", "json"):
        assert nb.read_file(tmp_path / f"a.{kind}") == "\n\n".join(rows), kind


def test_only_the_text_column_can_fail_a_table(tmp_path):
    rows = [{"text": f"row {number}", "meta": number} for number in range(7000)]
    rows[5999] |= {"extra": [1, {"deep": None}], "meta": "a word"}
    text = nb.read_file(write(tmp_path / "late.jsonl", lines(*rows)))
    assert text.split("\n\n") == [row["text"] for row in rows]
    table = pandas.DataFrame({"text": ["one", None, "two"], "embedding": [[0.5] * 4] * 3, "meta": [{"a": 1}] * 3})
    table.to_parquet(tmp_path / "a.parquet")
    assert nb.read_file(tmp_path / "a.parquet") == "one\n\ntwo"


def test_another_column_is_taken_and_said(tmp_path, capsys):
    for row, column in (({"id": "1", "content": "one"}, "content"), ({"n": 1, "story": "one"}, "story")):
        assert nb.read_file(write(tmp_path / "a.jsonl", lines(row))) == "one"
        assert f"the text is that of the column '{column}'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", ROWS + '{"text": "thr', "cannot be had .*: correct or convert it"),
        ("a.json", "{", "cannot be had"),
        ("a.jsonl", "", r"has the columns \(none\), but one named 'text' is needed"),
        ("a.jsonl", lines({"a": "x", "b": "y"}), "has the columns a, b, but one named 'text' is needed"),
        ("a.jsonl", lines({"text": "one"}, {"text": ["two"]}), "column 'text', but row 2 holds no text in it"),
        ("a.jsonl", lines({"text": 5}), "column 'text', but row 1 holds no text in it"),
        ("a.csv", 'text\n"one', "cannot be had .line 2: unexpected end of data"),
        ("a.txt.gz", None, "cannot be had .Not a gzipped file"),
        ("a.parquet", b"PAR1 or not", "cannot be had"),
        ("a.txt", b"abc\xff\xfe", "cannot be had .*can't decode byte 0xff in position 3.*convert it"),
        ("a.txt", b"abc\x00def", "cannot be had .it has a NUL at character 3"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(name, content, message, tmp_path):
    path = tmp_path / name
    write(path, content or "")
    if content is None:
        path.write_bytes(b"no gzip")
    with pytest.raises(nb.UserError, match=message) as error:
        nb.read_file(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_folder_and_a_pattern_are_several_files(tmp_path):
    for name, text in {"b/2.txt": "two", "b/1.md": "one", "b/x/3.jsonl": lines({"text": "three " * 20})}.items():
        write(tmp_path / name, text)
    write(tmp_path / "b/picture.png", "no text")
    assert whole_text(tmp_path / "b") == "one\n\ntwo\n\n" + "three " * 20
    settings = nb.Settings(train_file=str(tmp_path / "b"), test_file=str(tmp_path / "b/*.txt"), block_length=2)
    parts = nb.load_text(settings)
    assert parts["train"] + parts["validation"] == "one\n\ntwo\n\n" + "three " * 20 and parts["test"] == "two"
    for nothing in ("nothing*", "missing.txt", "b/picture.png"):
        with pytest.raises(nb.UserError, match="train_file is .*, but must be an existing file .*, a folder with some"):
            whole_text(tmp_path / nothing)


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize("column, turns", [("messages", CHAT), ("conversations", SHARED)])
def test_chats_are_written_out_by_the_chat_template(column, turns, tmp_path):
    tokenizer = tiny_tokenizer()
    path = write(tmp_path / "a.jsonl", lines({column: turns, "id": "x"}, {column: turns}))
    with pytest.raises(nb.UserError, match="holds chats, but the model has no chat template"):
        nb.read_file(path, lambda: tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    pandas.read_json(path, lines=True).to_parquet(tmp_path / "a.parquet")
    for file in (path, tmp_path / "a.parquet"):
        assert nb.read_file(file, lambda: tokenizer) == "<user>a<assistant>b\n\n<user>a<assistant>b"
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(nb.UserError, match="a chat of .* cannot be had .roles must alternate"):
        nb.read_file(path, lambda: tokenizer)


def test_a_part_is_cut_near_its_place_also_where_lines_are_long():
    text = "word " * 2000 + "\n"
    head, tail = nb.cut_tail(text, 0.1)
    assert head + tail == text and len(tail) / len(text) == pytest.approx(0.1, abs=0.011) and head.endswith(" ")
    assert [len(part) for part in nb.cut_tail("x" * 1000, 0.1)] == [900, 100]


def test_an_empty_text_is_found_before_anything_is_made_of_it(tmp_path):
    settings = nb.Settings(model="demo", train_file=write(tmp_path / "empty.txt", ""))
    with pytest.raises(nb.UserError, match="train text has 0 bytes, but one block of 512 tokens is needed"):
        nb.load_text(settings)


# --- model folders that are something else


def test_folders_that_hold_something_else_are_named(tmp_path):
    write(tmp_path / "lora/adapter_config.json", json.dumps({"base_model_name_or_path": "org/base"}))
    make("gpt2").save_pretrained(tmp_path / "trainer/checkpoint-100")
    make("gpt2").save_pretrained(tmp_path / "bare")
    for name, message in {
        "lora": "model .* cannot be had",
        "trainer": "model .* cannot be had",
        "bare": "the tokenizer of model .* cannot be had .*copy the tokenizer's files into the folder",
    }.items():
        with pytest.raises(nb.UserError, match=message) as error:
            nb.load_model(str(tmp_path / name), torch.device("cpu"))
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_that_is_not_here_is_not_needed(key, tmp_path):
    make("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write(tmp_path / "config.json", json.dumps(config | {key: "flash_attention_2"}))
    _, model = nb.load_model(str(tmp_path), torch.device("cpu"))
    assert model.config._attn_implementation == "sdpa"


def test_a_tokenizer_that_refuses_other_options_writes_a_sample():
    words = tiny_tokenizer()

    class Strict:
        eos_token_id, decode = 1, words.decode

        def __call__(self, text, return_tensors):
            return {"input_ids": words(text, return_tensors=return_tensors)["input_ids"]}

    assert nb.sample(make("gpt2"), Strict(), "a a", new_tokens=3).startswith("a a")


def test_a_revision_goes_with_the_name_but_a_folder_is_a_folder(tmp_path, monkeypatch):
    assert nb.place_of("org/model@v1.0")[0] == "org/model" and nb.place_of("org/model@v1.0")[1]["revision"] == "v1.0"
    assert nb.place_of("org/model")[0] == "org/model" and nb.place_of("org/model")[1]["revision"] == "main"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@b").mkdir()
    assert nb.place_of("a@b")[0] == "a@b" and nb.place_of("a@b")[1]["revision"] == "main"
    assert nb.place_of("x/y@z.gguf") == ("x", {"gguf_file": "y@z.gguf"})


def test_the_results_folder_has_the_whole_name_of_the_model(tmp_path):
    for name, wanted in (("a/Llama-3.2-1B", "Llama-3.2-1B"), ("/x/Smol.Q4_1.gguf", "Smol.Q4_1"), ("../b c", "b-c")):
        run = nb.Run(nb.Settings(model=name, output_dir=str(tmp_path)), torch.device("cpu"), torch.float32)
        assert run.folder.parent == tmp_path and run.folder.name.split("_", 2)[2].rpartition("_")[0] == wanted
