"""What is on disk is what is read, whatever it is called and whatever else is in it."""

import codecs
import gzip
import json

import datasets
import pandas
import pytest
from conftest import CPU, edit, make, new_run, saved, tiny_tokenizer

import PruningAndFineTuningColab as nb

BROKEN = b"neither gzip nor text"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content) if path.suffix.lower() == ".gz" and content != BROKEN else content)
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


@pytest.mark.parametrize("name, content", [
    *((name, "one\n\ntwo") for name in ("a.txt", "a.TXT", "a.md", "a.txt.gz")),
    *((name, ROWS) for name in ("a.jsonl", "a.jsonl.gz")),
    ("a.txt", codecs.BOM_UTF8 + b"one\n\ntwo"),
    ("a.jsonl", codecs.BOM_UTF8 + ROWS.encode()),
    ("a.jsonl", '{"text": "one"}\r\n\r\n{"text": "two"}'),
    ("a.jsonl", '{"text": "one", "id": 1}\n{"id": 2}\n{"text": null}\n{"text": "two"}'),
    ("a.json", '[{"text": "one"}, {"text": "two"}]'),
    ("a.json", '["one", "two"]'),
    *(("a.csv", f'id{sign}text\n1{sign}one\n2{sign}"two"\n') for sign in ",;\t|"),
    ("a.CSV.GZ", "text\none\ntwo\n"),
])  # fmt: skip
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


@pytest.mark.parametrize("rows, column", [
    ([{"id": "1", "content": "one"}], "content"),
    ([{"n": 1, "story": "one"}], "story"),
    ([{"content": "one"}] * 60 + [{"text": "two"}], "content"),
])  # fmt: skip
def test_another_column_is_taken_where_it_alone_is_filled_and_said(rows, column, tmp_path, capsys):
    read = nb.read_file(write(tmp_path / "a.jsonl", lines(*rows)))
    assert read == "\n\n".join(row[column] for row in rows if column in row)
    assert f"the text is that of the column '{column}'" in capsys.readouterr().out


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", ROWS + '{"text": "thr', "cannot be used .*: correct or convert it"),
    ("a.json", "{", "cannot be used"),
    ("a.jsonl", "", r"has the columns \(none\), but one named 'text' is needed"),
    ("a.jsonl", lines({"a": "x", "b": "y"}), "has the columns a, b, but one named 'text' is needed"),
    ("a.jsonl", lines({"text": "one"}, {"text": ["two"]}), "column 'text', but row 2 holds no text in it"),
    ("a.jsonl", lines({"text": 5}), "column 'text', but row 1 holds no text in it"),
    ("a.csv", 'text\n"one', "cannot be used .line 2: unexpected end of data"),
    ("a.txt.gz", BROKEN, "cannot be used .Not a gzipped file"),
    ("a.parquet", b"PAR1 or not", "cannot be used"),
    ("a.txt", b"abc\xff\xfe", "cannot be used .*can't decode byte 0xff in position 3.*convert it"),
    ("a.txt", b"abc\x00def", "cannot be used .it has a NUL at character 3"),
    ("a.csv", "id,text\n1,one\n2,two, and more\n", "row 3 has 3 columns, but the first one 2"),
])  # fmt: skip
def test_what_cannot_be_read_is_said_in_one_sentence(name, content, message, tmp_path):
    path = write(tmp_path / name, content)
    with pytest.raises(nb.UserError, match=message) as error:
        nb.read_file(path)
    assert "\n" not in str(error.value) and path in str(error.value)


def test_a_folder_and_a_pattern_are_several_files(tmp_path):
    for name, text in {"b/2.txt": "two", "b/1.md": "one", "b/x/3.jsonl": lines({"text": "three " * 20})}.items():
        write(tmp_path / name, text)
    write(tmp_path / "b/picture.png", "no text")
    write(tmp_path / "b/.ipynb_checkpoints/2-checkpoint.txt", "two")
    write(tmp_path / "b/._2.txt", b"\0\5\x16\7")
    new_run(tmp_path / "b/results").save()
    assert whole_text(tmp_path / "b") == "one\n\ntwo\n\n" + "three " * 20, "what a person would call the text"
    settings = nb.Settings(train_file=str(tmp_path / "b"), test_file=str(tmp_path / "b/*.txt"), block_length=2)
    parts = nb.load_text(settings)
    assert parts["train"] + parts["validation"] == "one\n\ntwo\n\n" + "three " * 20 and parts["test"] == "two"
    for nothing in ("nothing*", "missing.txt", "b/picture.png"):
        with pytest.raises(nb.UserError, match="train_file is .*, but must be an existing file .*, a folder with some"):
            whole_text(tmp_path / nothing)


def test_splits_of_a_folder_and_of_a_saved_dataset_are_kept_apart(tmp_path):
    texts = {split: f"{split} " * 40 for split in nb.SPLITS}
    for split, name in (("train", "my-train.txt"), ("validation", "valid.txt"), ("test", "test_1.txt")):
        write(tmp_path / "named" / name, texts[split])
    data = {split: datasets.Dataset.from_dict({"text": [text]}) for split, text in texts.items()}
    datasets.DatasetDict(data).save_to_disk(str(tmp_path / "saved"))
    data["train"].save_to_disk(str(tmp_path / "one"))
    for place in ("named", "saved"):
        parts = nb.load_text(nb.Settings(model="demo", train_file=str(tmp_path / place), block_length=16))
        assert {split: set(text.split()) for split, text in parts.items()} == {split: {split} for split in nb.SPLITS}
    assert whole_text(tmp_path / "one") == texts["train"]
    write(tmp_path / "named/book.txt", "book " * 40)
    assert "book" in whole_text(tmp_path / "named")


TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "{% endfor %}"
)
TOOLS = json.dumps([{"type": "function", "function": {"name": "weather"}}])
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome", "hot": true}'}}
TURNS = [{"role": "user", "content": "How hot?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
PARTS = [{"type": "text", "text": "How "}, {"type": "text", "text": "hot?"}]
CHATS = [  # rows, and what the template makes of them
    ([{"messages": [{"role": "user", "content": "a"}], "id": "x"}] * 2, "<user>a\n\n<user>a"),
    ([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}], "<user>a<assistant>b"),
    ([{"messages": [{"role": "user", "content": PARTS}]}], "<user>How hot?"),
    ([{"messages": TURNS, "tools": TOOLS}, {"messages": [], "tools": TOOLS}],
     f'TOOLS {TOOLS}\n<user>How hot?<assistant>CALL weather {{"city": "Rome", "hot": true}}'),
]  # fmt: skip


@pytest.mark.parametrize("rows, written", CHATS)
def test_chats_are_written_out_by_the_chat_template(rows, written, tmp_path):
    tokenizer, table = tiny_tokenizer(), tmp_path / "a.parquet"
    path = write(tmp_path / "a.jsonl", lines(*rows))
    pandas.DataFrame(rows).to_parquet(table)
    with pytest.raises(nb.UserError, match="holds chats, but the model has no chat template"):
        nb.read_file(path, lambda: tokenizer)
    tokenizer.chat_template = TEMPLATE
    assert nb.read_file(path, lambda: tokenizer) == nb.read_file(table, lambda: tokenizer) == written
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(nb.UserError, match="a chat of .* cannot be used .roles must alternate"):
        nb.read_file(path, lambda: tokenizer)


def test_an_empty_text_is_found_before_anything_is_made_of_it(tmp_path):
    with pytest.raises(nb.UserError, match="train text has 0 bytes, but one block of 2 tokens is needed"):
        whole_text(write(tmp_path / "empty.txt", ""))


# --- models


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_that_is_not_here_is_not_needed(key, tmp_path):
    edit(saved(tmp_path) / "config.json", **{key: "flash_attention_2"})
    assert nb.load_model(str(tmp_path), CPU)[1].config._attn_implementation == "sdpa"


def test_a_tokenizer_that_refuses_other_options_writes_a_sample():
    words = tiny_tokenizer()

    class Strict:
        eos_token_id, decode = 1, words.decode

        def __call__(self, text, return_tensors):
            return {"input_ids": words(text, return_tensors=return_tensors)["input_ids"]}

    assert nb.sample(make("gpt2"), Strict(), "a a", new_tokens=3).startswith("a a")


def test_a_revision_goes_with_the_name_but_a_folder_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@b").mkdir()
    for name, model, revision in (("org/m@v1.0", "org/m", "v1.0"), ("org/m", "org/m", "main"), ("a@b", "a@b", "main")):
        place, words = nb.place_of(name)
        assert (place, words["revision"]) == (model, revision)
    assert nb.place_of("x/y@z.gguf") == ("x", {"gguf_file": "y@z.gguf"})


def test_the_results_folder_has_the_whole_name_of_the_model(tmp_path):
    for name, wanted in (("a/Llama-3.2-1B", "Llama-3.2-1B"), ("/x/Smol.Q4_1.gguf", "Smol.Q4_1"), ("../b c", "b-c")):
        folder = new_run(tmp_path, model=name).folder
        assert folder.parent == tmp_path and folder.name.split("_", 2)[2].rpartition("_")[0] == wanted
