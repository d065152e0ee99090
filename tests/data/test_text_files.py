"""Each kind of text file, and one clear sentence for each way that one can be wrong."""

from __future__ import annotations

import gzip

import pyarrow
import pytest
from pyarrow import parquet

from esparse.data.text_files import texts_of


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
    "not UTF-8 text": ("a.txt", b"gr\xfc\xdfe"),
    "not UTF-8": ("b.jsonl", b'{"text": "gr\xfc\xdfe"}'),
    "ends in one of .txt, .jsonl, .*parquet, got a.docx: convert": ("a.docx", b""),
    "line 2: expected a column 'text', found 'body', 'n'; set column=": (
        "c.jsonl",
        b'{"text": "x"}\n{"body": "x", "n": 1}',
    ),
    "line 2: expected one JSON object a line, but Expecting": ("d.jsonl", b'{"text": "x"}\n{"text": '),
    "line 1: expected one JSON object a line, got a list": ("e.json", b'[{"text": "x"}]'),
    "row 1: expected text in column 'text', got a value of type NoneType": ("f.jsonl", b'{"text": null}'),
    "row 1: the text holds half a surrogate pair": ("g.jsonl", b'{"text": "\\ud800"}'),
    "can not be read as parquet": ("h.parquet", b"not parquet at all"),
    "i.json.gz can not be unpacked": ("i.json.gz", b"not gzip"),
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
