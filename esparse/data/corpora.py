"""Corpora by name, for calibration and evaluation, with the literature's text, split and separators.

They follow SparseGPT's and Wanda's loaders (arXiv 2301.00774, 2306.11695), whose choices affect the numbers:
WikiText-2's test rows are joined by blank lines and tokenised once; of C4, at most 256 windows of the first 1,100
validation documents are used; Penn Treebank's sentences are joined by spaces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from esparse.data import builtin
from esparse.data.hub import HubFile
from esparse.data.text_files import ENDINGS, LongText, Rows, texts_of
from esparse.errors import Mistake

Purpose = Literal["calibration", "evaluation"]
GROUP = {"calibration": "calibration", "evaluation": "evaluate"}  # the group on the command line for each purpose
LONG = 2**23  # characters; of a longer text file only parts are read into memory and tokenised


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Text for one purpose, before any tokenizer.

    The texts form one stream of tokens, or, if they stand `apart`, each sequence is cut out of a single text. A `long`
    text has no `texts`: parts of it are read from its file.
    """

    name: str
    texts: Sequence[str]
    long: LongText | None = None
    apart: bool = False
    most_windows: int | None = None  # evaluation uses at most this many windows


@dataclass(frozen=True, slots=True, kw_only=True)
class HubText:
    """How the literature reads one split of a data set on the hub."""

    source: HubFile
    column: str
    joint: str | None  # separator between the rows; None: the rows stand apart
    first: int | None = None  # number of rows to read; None: all
    most_windows: int | None = None


HUB: dict[str, dict[Purpose, HubText]] = {
    "wikitext2": {
        "calibration": HubText(
            source=HubFile("Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet"),
            column="text",
            joint=" ",
        ),
        "evaluation": HubText(
            source=HubFile("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
            column="text",
            joint="\n\n",
        ),
    },
    "c4": {
        "calibration": HubText(
            source=HubFile("allenai/c4", "en/c4-train.00000-of-01024.json.gz"),
            column="text",
            joint=None,
        ),
        "evaluation": HubText(
            source=HubFile("allenai/c4", "en/c4-validation.00000-of-00008.json.gz"),
            column="text",
            joint=" ",
            first=1100,
            most_windows=256,
        ),
    },
    # The data set is a loading script, which `datasets` no longer runs; this branch is the hub's copy of its rows.
    "ptb": {
        "calibration": HubText(
            source=HubFile("ptb-text-only/ptb_text_only", "penn_treebank/train/0000.parquet", "refs/convert/parquet"),
            column="sentence",
            joint=" ",
        ),
        "evaluation": HubText(
            source=HubFile("ptb-text-only/ptb_text_only", "penn_treebank/test/0000.parquet", "refs/convert/parquet"),
            column="sentence",
            joint=" ",
        ),
    },
}
NAMES = ("builtin", *HUB, "text")


def check(names: Sequence[str], purpose: Purpose, path: str | None) -> None:
    """Raise ValueError for an unknown corpus, for `text` without a path and for a path that no corpus reads."""
    group = GROUP[purpose]
    for name in names:
        if name not in NAMES:
            raise Mistake(f"expected a corpus out of {', '.join(NAMES)}, got {name!r}")
    if "text" in names and not path:
        raise Mistake(f"the corpus 'text' needs a file: {group}.path=FILE ({', '.join(ENDINGS)})")
    if path and "text" not in names:
        asked = ", ".join(names) or "none"
        raise Mistake(f"{group}.path={path} is read by {group}=text only, but the corpus asked is {asked}")


def check_settings(group: str, *, bos: object, chat: bool, path: str | None) -> None:
    """Raises Mistake for a wrong `bos`, and for `chat` without a file."""
    if not (bos == "auto" or isinstance(bos, bool)):
        raise Mistake(f"{group}.bos must be auto, true or false, got {bos!r}")
    if chat and path is None:
        raise Mistake(f"{group}.chat=true renders the chats of a file: {group}=text {group}.path=FILE")


def read(
    name: str,
    purpose: Purpose,
    *,
    path: str | None = None,
    column: str = "text",
    render: Callable[[list[dict[str, Any]]], str] | None = None,
) -> Corpus:
    """Reads one corpus for one purpose; `path`, `column` and `render` matter only to the corpus `text`.

    `render`: turns a chat into text, if chats are wanted. Raises ConnectionError if a data set cannot be fetched, and
    FileNotFoundError or ValueError as `texts_of` does.
    """
    check([name], purpose, path)
    if path is not None:
        return _from_file(Rows(Path(path), column, GROUP[purpose], render))
    if name == "builtin":
        split = {"calibration": "train", "evaluation": "held-out"}[purpose]
        return Corpus(name=name, texts=builtin.texts(split))
    group = GROUP[purpose]
    return _from_hub(name, HUB[name][purpose], instead=f"a local file: {group}=text {group}.path=FILE")


def _from_file(rows: Rows) -> Corpus:
    held: list[str] = []
    size = 0
    for piece in rows.pieces():
        held.append(piece)
        size += len(piece)
        if size > LONG:
            return Corpus(name=rows.path.name, texts=[], long=LongText(rows))
    return Corpus(name=rows.path.name, texts=["".join(held)])


def _from_hub(name: str, asked: HubText, *, instead: str) -> Corpus:
    path = asked.source.local(instead)
    if asked.joint is None:
        return Corpus(name=name, texts=_OnDisk(path, asked.column), apart=True)
    text = asked.joint.join(texts_of(path, asked.column, first=asked.first))
    return Corpus(name=name, texts=[text], most_windows=asked.most_windows)


class _OnDisk(Sequence[str]):
    """The texts of a large file of JSON lines, kept on disk (as Arrow, in the cache of `datasets`) and read by row."""

    def __init__(self, path: Path, column: str) -> None:
        from datasets import load_dataset

        # Uses the Arrow column: access through the data set takes 200 us per row, and a search may visit all rows.
        self._column = load_dataset("json", data_files=str(path), split="train").data.column(column)

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: Any) -> Any:
        return self._column[row].as_py()
