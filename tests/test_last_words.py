"""The LAMBADA-like task that experiments/last_words.py makes of a text."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "last_words", Path(__file__).parent.parent / "experiments" / "last_words.py"
)
assert spec is not None and spec.loader is not None
last_words = importlib.util.module_from_spec(spec)
spec.loader.exec_module(last_words)

FILLER = "Words came and went through the long and quiet day until the evening fell ."  # 15 words


def test_a_passage_ends_with_a_word_that_stood_before_its_last_sentence() -> None:
    paragraph = f"The captain called . {FILLER} {FILLER} At last all of them looked for the captain . Then they left ."
    assert list(last_words.passages(paragraph)) == [
        f"The captain called . {FILLER} {FILLER} At last all of them looked for the captain"
    ]


@pytest.mark.parametrize(
    "end",
    [
        "At last all of them looked for a sailor .",  # a new word
        "The captain was called captain .",  # the last sentence alone gives it away
        "At last all of them looked for <unk> .",
        "All of it was said by the .",  # too short to be worth a question
    ],
)
def test_other_paragraphs_have_no_passage(end: str) -> None:
    assert list(last_words.passages(f"The captain called <unk> . {FILLER} {FILLER} {end}")) == []


def test_passages_are_neither_short_nor_long() -> None:
    assert list(last_words.passages("The captain called . All of them looked for the captain .")) == []
    assert list(last_words.passages(f"The captain called . {FILLER * 8} All looked for the captain .")) == []


def test_a_file_has_the_form_that_the_task_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paragraph = f"The captain called . {FILLER} {FILLER} All of them {{}} looked for the captain ."
    text = tmp_path / "text.txt"
    text.write_text("= Title =\n\n" + "\n".join(paragraph.format(word) for word in ("one", "two", "three", "four")))
    assert last_words.main([str(text), str(tmp_path / "data"), "--limit", "2"]) == 0
    assert "2 of 4 passages" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "data/lambada_openai/test.jsonl").read_text().splitlines()]
    assert [row["text"].split()[-4:] for row in rows] == [["looked", "for", "the", "captain"]] * 2
    assert ["one" in rows[0]["text"], "three" in rows[1]["text"]] == [True, True]


def test_a_text_without_passages_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("Nothing to ask .")
    with pytest.raises(SystemExit) as end:
        last_words.main([str(tmp_path / "text.txt"), str(tmp_path)])
    assert end.value.code == 2 and "no passage of 40 to 120 words" in capsys.readouterr().err
