"""The built-in corpus: passages of CPython's documentation and sources that come with esparse, so that a run needs no
download.

They were chosen once, from Python 3.11.7, by experiments/make_corpus.py, and are the same for every Python and on every
machine. No document is in both splits, and the built-in model was trained on none that is held out. A text is a passage
of one document; texts come in a fixed order, in which every document has its turn before one comes again.
"""

from __future__ import annotations

import functools
import gzip
import json
from dataclasses import dataclass

from esparse.errors import Mistake
from esparse.records.sources import CORPUS as FILE

SPLITS = ("train", "held-out")


@dataclass(frozen=True, slots=True)
class Passage:
    """Some consecutive lines of one document, which is named `topic NAME` or `module NAME`."""

    split: str
    document: str
    text: str


def texts(split: str) -> list[str]:
    """The texts of one split, `train` or `held-out`. Raises Mistake for another one."""
    return [passage.text for passage in passages(split)]


def passages(split: str) -> list[Passage]:
    """The passages of one split, `train` or `held-out`. Raises Mistake for another one."""
    if split not in SPLITS:
        raise Mistake(f"the built-in corpus has the splits {' and '.join(SPLITS)}, got {split!r}")
    return [passage for passage in _all_passages() if passage.split == split]


@functools.cache  # because every run of a sweep reads both splits
def _all_passages() -> tuple[Passage, ...]:
    with gzip.open(FILE, "rt", encoding="utf-8", newline="\n") as lines:
        return tuple(Passage(**json.loads(line)) for line in lines)
