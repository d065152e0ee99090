"""Chooses the built-in corpus out of a standard library: passages of its documentation topics and of its sources.

    python experiments/make_corpus.py --out FILE        # with Python 3.11.7, whose texts esparse has

What is chosen depends on the library's texts and on the built-in model's tokenizer alone. A passage is whole lines of
one document. Documents keep the split of standard_library.py, by which the built-in model was trained: no document of
`held-out` was seen in training. The model has seen no tests; they are here because the modules that are held out are
too few for an evaluation in which no document has more than 2 per cent.

Left out: documents with a copyright notice of their own, which a passage would tear off; what a build or an
installation generates; tables of encodings; test data; what is shorter than 1,000 characters.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from standard_library import NOT_OF_THE_LIBRARY, SPLITS, digest, every_document, in_order, split_of
from transformers import AutoTokenizer

from esparse.data.builtin import FILE
from esparse.models.load import ASSETS

PYTHON = "3.11.7"  # the version of the built-in corpus
TESTS = {"test", "tests", "idle_test"}
SKIPPED = NOT_OF_THE_LIBRARY | {"encodings", "data"}
GENERATED = re.compile(r"module (_sysconfigdata|config-|sitecustomize|usercustomize)")
NOTICE = re.compile(r"copyright\s*(\(c\)|©|\d)", re.IGNORECASE)
SHORTEST = 1000  # characters of a document
LEAST = 100  # tokens of a passage: the rest of a document may be a line


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How much of each document a split takes.

    `tokens`: most of a passage, by the built-in tokenizer. `passages`: most of a document. `tests`: test modules for
    each other document. `rounds`: a document has a passage in every round, a test in one of so many.
    """

    tokens: int
    passages: int
    tests: float
    rounds: int


# Held out: the first 65,536 tokens are of the first two rounds, in which no document has more than 2 x 500. Train:
# passages as long as the sequences on which models are calibrated.
SHARES = {
    "train": Share(tokens=2048, passages=1, tests=0.5, rounds=1),
    "held-out": Share(tokens=500, passages=5, tests=1.7, rounds=2),
}


def chosen() -> Iterator[dict[str, str]]:
    """The corpus, passage by passage: `split`, `document`, `text`."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    named = [(name, text) for name, text in in_order(every_document(SKIPPED)) if is_fit(name, text)]
    for split in SPLITS:
        mine = [(name, text) for name, text in named if split_of(name) == split]
        yield from of_split(split, mine, SHARES[split], tokenizer)


def is_fit(name: str, text: str) -> bool:
    return len(text) >= SHORTEST and not (GENERATED.match(name) or NOTICE.search(text) or "\ufffd" in text)


def is_test(name: str) -> bool:
    return not TESTS.isdisjoint(name.removeprefix("module ").split("."))


def of_split(split: str, named: list[tuple[str, str]], share: Share, tokenizer: Any) -> Iterator[dict[str, str]]:
    """Round by round: a passage of every document, then a second one; a round is in the order of a hash."""
    others = [document for document in named if not is_test(document[0])]
    tests = [document for document in named if is_test(document[0])][: round(share.tests * len(others))]
    found = []
    for name, text in others + tests:
        passages = sorted(cut(text, share.tokens, tokenizer), key=lambda passage: digest(f"{name} {passage}"))
        for index, passage in enumerate(passages[: share.passages]):
            turn = index * share.rounds + digest(name)[8] % share.rounds if is_test(name) else index
            found.append((turn, digest(f"{index} {name}"), {"split": split, "document": name, "text": passage}))
    return (passage for *_, passage in sorted(found, key=lambda one: one[:2]))


def cut(text: str, most: int, tokenizer: Any) -> list[str]:
    """Passages of whole lines, each of at most `most` tokens and at least LEAST; a line with more stands by itself."""
    lines = text.splitlines(keepends=True)
    passages, size = [""], 0
    sizes = []
    for line, ids in zip(lines, tokenizer(lines, add_special_tokens=False)["input_ids"], strict=True):
        if size + len(ids) > most and passages[-1]:
            sizes.append(size)
            passages.append("")
            size = 0
        passages[-1] += line
        size += len(ids)
    sizes.append(size)
    return [passage for passage, tokens in zip(passages, sizes, strict=True) if LEAST <= tokens <= most]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE)
    asked = parser.parse_args()
    if platform.python_version() != PYTHON:
        sys.exit(f"make_corpus: the built-in corpus is Python {PYTHON}'s, and this is {platform.python_version()}")
    lines = "".join(json.dumps(passage, ensure_ascii=False) + "\n" for passage in chosen())
    asked.out.write_bytes(gzip.compress(lines.encode(), 9, mtime=0))
    print(f"{asked.out}: {lines.count(chr(10))} passages, {asked.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
