"""Multiple-choice questions from the built-in corpus: which of four texts continues a given text?

The three wrong texts are continuations from other documents, the nearest in length, so that length is no hint. The
questions depend only on the order of the held-out documents, so each version of the corpus has one set of questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import TypedDict

from esparse.data import builtin

QUESTIONS = 500
CONTEXT, ENDING = 160, 60  # least characters: whole lines are taken until there are enough
LONGEST = 3  # most characters, as a multiple of the least: a line may be long
WRONG = 3  # wrong endings per question


class Question(TypedDict):
    """A text, four endings, and the index of the right one."""

    context: str
    endings: list[str]
    label: int


def questions() -> list[Question]:
    """At most QUESTIONS questions, from as many documents as possible, in the order of the held-out documents."""
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
    """(document number, context, ending): the first passage of each document, then the second of each, and so on."""
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
