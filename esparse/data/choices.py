"""Questions of multiple choice made from the built-in corpus: which of four texts goes on where another one stops?

The three wrong texts are continuations, too, but of other documents; they are the nearest in length, so that length
tells nothing. All is decided by the order of the held-out documents, hence a Python version has one set of questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import TypedDict

from esparse.data import builtin

QUESTIONS = 500
CONTEXT, ENDING = 160, 60  # characters, at least: whole lines follow one another until there are as many
LONGEST = 3  # times as many characters at most: a line may be long
WRONG = 3  # endings beside the right one


class Question(TypedDict):
    """A text, four ways to go on, and which of them is its own."""

    context: str
    endings: list[str]
    label: int


def questions() -> list[Question]:
    """At most QUESTIONS of them, from as many documents as there are, in the order of the held-out documents."""
    passages = _passages()
    asked: list[Question] = []
    for index, (document, context, ending) in enumerate(passages):
        others = [p for p in passages if p[0] != document]
        nearest = sorted(others, key=lambda p: (abs(len(p[2]) - len(ending)), _draw("near", index, p[2])))
        wrong = list(dict.fromkeys(p[2] for p in nearest if p[2] != ending))[:WRONG]
        if len(wrong) < WRONG:
            continue
        endings = sorted([ending, *wrong], key=lambda text: _draw("place", index, text))
        asked.append({"context": context, "endings": endings, "label": endings.index(ending)})
    return asked


def _passages() -> list[tuple[int, str, str]]:
    """Contexts with their endings and the numbers of their documents: the first of each document, the second, ..."""
    of_document = [list(_cut(text)) for text in builtin.documents("held-out")]
    rounds = max(map(len, of_document), default=0)
    found = [(d, *cuts[r]) for r in range(rounds) for d, cuts in enumerate(of_document) if r < len(cuts)]
    return found[:QUESTIONS]


def _cut(text: str) -> Sequence[tuple[str, str]]:
    cuts, lines = [], text.splitlines(keepends=True)
    while lines:
        context, lines = _take(lines, CONTEXT)
        ending, lines = _take(lines, ENDING)
        if CONTEXT <= len(context) < LONGEST * CONTEXT and ENDING <= len(ending) < LONGEST * ENDING:
            cuts.append((context, ending))
    return cuts


def _take(lines: list[str], characters: int) -> tuple[str, list[str]]:
    taken = 0
    while taken < len(lines) and sum(map(len, lines[:taken])) < characters:
        taken += 1
    return "".join(lines[:taken]), lines[taken:]


def _draw(purpose: str, index: int, text: str) -> bytes:
    return sha256(f"{purpose} {index} {text}".encode()).digest()
