"""Each kind of text file, and one clear sentence for each way that one can be wrong."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from esparse.data import text_files
from esparse.data.text_files import Rows, texts_of
from esparse.errors import Mistake


def test_a_txt_file_is_one_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffGrüße\r\n\r\nzwei".encode())
    assert texts_of(file, "text") == ["Grüße\n\nzwei"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.JSON.gz"])
def test_json_lines_give_a_text_a_row(tmp_path, name):
    rows = b'{"text": "one\\n", "n": 1}\n\n{"n": 2, "text": ""}\n{"text": "\xc3\xa9"}'
    (tmp_path / name).write_bytes(gzip.compress(rows) if name.endswith(".gz") else rows)
    assert texts_of(tmp_path / name, "text") == ["one\n", "", "é"]
    assert texts_of(tmp_path / name, "text", first=2) == ["one\n", ""]


def test_parquet_gives_a_text_a_row(tmp_path):
    table = pyarrow.table({"n": [1, 2, 3], "sentence": ["a", "b", "c"]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert texts_of(tmp_path / "a.parquet", "sentence") == ["a", "b", "c"]
    assert texts_of(tmp_path / "a.parquet", "sentence", first=1) == ["a"]


WRONG = {
    r"is not UTF-8 text \(line 1, byte 3: 0xfc\): convert it": ("a.txt", b"gr\xfc\xdfe"),
    r"not UTF-8 text \(line 9002, byte 13: 0xfc\)": ("b.jsonl", b'{"text": ""}\n' * 9001 + b'{"text": "gr\xfc\xdfe"}'),
    "b.jsonl.gz is not UTF-8 text: convert it": ("b.jsonl.gz", gzip.compress(b'{"text": "gr\xfc\xdfe"}')),
    "ends in one of .txt, .jsonl, .*parquet, got a.docx: convert": ("a.docx", b""),
    "line 2: expected a column 'text', found 'body', 'n'; set calibration.column=": (
        "c.jsonl",
        b'{"text": "x"}\n{"body": "x", "n": 1}',
    ),
    "line 2: expected one JSON object a line, but Expecting": ("d.jsonl", b'{"text": "x"}\n{"text": '),
    "line 1: expected one JSON object a line, got a str: write {.text.: ...}": ("e.json", b'"x"'),
    "row 2: expected a JSON array of rows, but Expecting": ("k.json", b'[{"text": "x"}, {"text": '),
    "row 2: expected an object or a text, got a int": ("l.json", b'[{"text": "x"}, 7]'),
    "row 1: expected a column 'text', found 'body'": ("m.json", b'[{"body": "x"}]'),
    "expected one JSON array, or one JSON object a line, and found more": ("n.jsonl", b'["a"]\n["b"]'),
    "row 1: expected text in column 'text', got a value of type NoneType": ("f.jsonl", b'{"text": null}'),
    "row 1: the text holds half a surrogate pair": ("g.jsonl", b'{"text": "\\ud800"}'),
    "can not be read as parquet": ("h.parquet", b"not parquet at all"),
    "i.json.gz is not packed by gzip, as its name says: if it is text, call it i.json": ("i.json.gz", b"not gzip"),
    "j.json.gz can not be unpacked": ("j.json.gz", gzip.compress(b'{"text": "abc"}' * 99)[:-20]),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_a_wrong_file_is_told_apart(tmp_path, sentence):
    name, content = WRONG[sentence]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as raised:
        texts_of(tmp_path / name, "text")
    assert "\n" not in str(raised.value)


def test_a_parquet_file_names_the_columns_it_has(tmp_path):
    parquet.write_table(pyarrow.table({"sentence": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="expected a column 'text', found 'sentence', 'n'"):
        texts_of(tmp_path / "a.parquet", "text")
    with pytest.raises(ValueError, match="expected text in column 'n', got a value of type int"):
        texts_of(tmp_path / "a.parquet", "n")


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a text file at /.*nowhere\.txt, found nothing"):
        texts_of(tmp_path / "nowhere.txt", "text")
    with pytest.raises(ValueError, match="found a folder"):
        texts_of(tmp_path, "text")


DEEP = "[" * 100_000 + "]" * 100_000  # more than Python's reader takes
LONG = "9" * 6000


@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize(
    ("more", "said"), [(DEEP, "lists or objects are nested too deeply"), (LONG, "a number is too long")]
)
def test_json_that_python_does_not_read_is_named_with_its_place(tmp_path, more, said, as_array):
    lines = ['{"text": "one"}', f'{{"text": "two", "more": {more}}}']
    file = tmp_path / "a.jsonl"
    file.write_text(f"[{','.join(lines)}]" if as_array else "\n".join(lines))
    with pytest.raises(Mistake) as raised:
        texts_of(file, "text")
    assert str(raised.value).startswith(f"{file}, {'row' if as_array else 'line'} 2: {said} to be read (")


def test_a_list_of_texts_is_no_chat(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": ["one", "two"]}))
    with pytest.raises(ValueError, match="got a value of type list: a row is one text, so join its parts"):
        texts_of(tmp_path / "a.jsonl", "text")


@pytest.mark.parametrize(
    ("name", "said"), [("a.jsonl", "unpack it, or name it a.jsonl.gz"), ("a.json", "a.json.gz"), ("a.txt", "unpack it")]
)
def test_gzip_under_another_name_is_told(tmp_path, name, said):
    (tmp_path / name).write_bytes(gzip.compress(b'{"text": "one"}' * 99))
    with pytest.raises(Mistake) as raised:
        texts_of(tmp_path / name, "text")
    assert "is packed by gzip" in str(raised.value) and str(raised.value).endswith(said)


@pytest.mark.parametrize(
    ("begin", "said"),
    [
        (b"\x28\xb5\x2f\xfd", "is packed by zstandard: unpack it (zstd -d)"),
        (b"\xfd7zXZ\x00", "is packed by xz: unpack it (xz -d)"),
        (b"BZh9", "is packed by bzip2: unpack it (bzip2 -d)"),
        (b"PK\x03\x04", "is a zip archive: unpack it"),
        (b"PAR1", "is a parquet file: let its name end in .parquet"),
        (b"%PDF-1.4", "is a PDF: give its text (pdftotext)"),
        (b"\xff\xfe", "is UTF-16 text: convert it (iconv -f UTF-16 -t UTF-8)"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_what_is_no_text_is_called_what_it_is(tmp_path, name, begin, said):
    (tmp_path / name).write_bytes(begin + b"\xff\xfe\xfd" * 9)
    with pytest.raises(Mistake) as raised:
        texts_of(tmp_path / name, "text")
    assert str(raised.value) == f"{tmp_path / name} {said}"


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be", "utf-32-be"])
def test_wide_characters_without_a_mark_are_no_text_of_nul_characters(tmp_path, codec):
    (tmp_path / "a.txt").write_bytes("A text of one word after the other.".encode(codec))  # which is UTF-8, too
    with pytest.raises(Mistake, match="holds NUL characters: it is UTF-16 text, which has to be converted"):
        texts_of(tmp_path / "a.txt", "text")
    (tmp_path / "a.txt").write_text("A text of one word\0 after the other. " * 9)  # a scratch of a crawl
    assert texts_of(tmp_path / "a.txt", "text")


ROWS = [{"text": "one"}, {"text": None}, {"text": "two\n"}, {"text": "  "}, {"text": ""}, {"text": "three"}]


def written(folder, kind):
    file = folder / f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.table({"text": [row["text"] for row in ROWS]}), file)
    elif kind == "jsonl.gz":
        file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        file.write_text(json.dumps([row["text"] for row in ROWS] if kind == "texts.json" else ROWS, indent=1))
    return file


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "json", "array.jsonl", "texts.json"])
def test_rows_without_text_are_skipped_with_a_count(tmp_path, kind, caplog):
    rows = Rows(written(tmp_path, kind), "text")
    for _ in range(2):  # the log tells it once
        assert "".join(rows.pieces()) == "one\n\ntwo\n\n\nthree"
    assert caplog.text.count("3 rows without text are skipped") == 1


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_an_array_is_read_whatever_ends_at_the_end_of_a_piece(tmp_path, size, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE", size)
    texts = ["a, ]", 'b"[{', "\\", "\u00e9", "d" * 9]
    (tmp_path / "a.json").write_text(json.dumps([{"n": [1, {"x": None}], "text": text} for text in texts], indent=2))
    assert "".join(Rows(tmp_path / "a.json", "text").pieces()) == "\n\n".join(texts)
    (tmp_path / "b.txt").write_text("\ufeff".join(["", "Gr\u00fc\u00dfe\n\n"]) * 1 + "zwei", encoding="utf-8")
    assert "".join(Rows(tmp_path / "b.txt", "text").pieces()) == "Gr\u00fc\u00dfe\n\nzwei"


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]


@pytest.mark.parametrize(("column", "chat"), [("messages", CHAT), ("conversations", SHARED), ("text", CHAT)])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "json"])
def test_chats_are_rendered_if_that_is_asked_for(tmp_path, kind, column, chat):
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.table({column: [chat, None, chat]}), file)
    else:
        rows = [{column: chat}, {column: []}, {column: chat}]
        file.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))

    def render(messages):
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    assert "".join(Rows(file, "text", render=render).pieces()) == "<user>Hi<assistant>Ho\n\n<user>Hi<assistant>Ho"
    with pytest.raises(ValueError, match=r"evaluate\.chat=true to render chats"):
        list(Rows(file, "text", "evaluate").pieces())


def test_a_chat_may_be_json_in_a_text_and_its_content_parts_of_text(tmp_path):
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, CHAT[1]]
    rows = [{"messages": json.dumps(CHAT)}, {"messages": parts}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Rows(
        tmp_path / "a.jsonl", "text", render=lambda chat: "".join(f"<{m['role']}>{m['content']}" for m in chat)
    )
    assert "".join(found.pieces()) == "<user>Hi<assistant>Ho\n\n<user>Hi<assistant>Ho"


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        ("Hi there.", "row 1: expected messages with role and content, got a value of type str"),
        (["Hi", "Ho"], "expected messages with role and content, got a str"),
        ([{"content": "Hi"}], "expected messages with role and content, got one with 'content'"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "has a part of type image, and only text is"),
    ],
)
def test_a_row_that_is_no_chat_of_text_is_refused(tmp_path, chat, said):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}))
    with pytest.raises(Mistake, match=re.escape(said)):
        list(Rows(tmp_path / "a.jsonl", "messages", render=str).pieces())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": null}\n{"Text": "x"}', "line 2: expected a column 'text', found 'Text'"),
        ("a.jsonl", b'{"text": ["x"]}', "row 1: expected text in column 'text', got a value of type list"),
        ("a.txt", "words".encode("utf-16"), "is UTF-16 text"),
        ("a.json.gz", b'{"text": "x"}', "is not packed by gzip"),
        ("a.parquet", b"PAR1", "can not be read as parquet"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}', ""),  # which takes reading all of it
    ],
)
def test_the_first_row_shows_most_mistakes(tmp_path, name, content, said, caplog):
    (tmp_path / name).write_bytes(content)
    rows = Rows(tmp_path / name, "text")
    with pytest.raises(Mistake, match=re.escape(said)) if said else contextlib.nullcontext():
        rows.check()
    assert not caplog.messages  # skipped rows are counted once all are read


def test_a_text_has_no_chats(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(Mistake, match=r"evaluate\.chat=true renders the rows of \.jsonl, .* and a\.txt has no rows"):
        Rows(tmp_path / "a.txt", "text", "evaluate", render=str)


def test_a_template_that_fails_names_the_row(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}))

    def render(messages):
        raise RuntimeError("roles must alternate")

    with pytest.raises(ValueError, match=r"row 1: the tokenizer's chat template does not take this chat \(roles must"):
        list(Rows(tmp_path / "a.jsonl", "text", render=render).pieces())


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("here")
    assert texts_of(Path("~/a.txt"), "text") == ["here"]


def test_an_empty_file_and_a_column_of_a_file_without_columns_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="found an empty file: name another one"):
        Rows(tmp_path / "empty.jsonl", "text")
    (tmp_path / "plain.txt").write_text("words")
    Rows(tmp_path / "plain.txt", "text")
    with pytest.raises(ValueError, match=r"evaluate\.column=body names a column of .*, and plain\.txt has none"):
        Rows(tmp_path / "plain.txt", "body", "evaluate")
