"""Multiple-choice questions from the built-in corpus: which of four texts continues a given text?

The three wrong texts are continuations from other documents, the nearest in length, so that length is no hint. The
questions depend on the held-out passages alone, and are always the same.
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
    """At most QUESTIONS questions, from as many documents as possible, in the order of the held-out passages."""
    cuts = _cuts()
    asked: list[Question] = []
    for index, (document, context, ending) in enumerate(cuts):
        others = [cut for cut in cuts if cut[0] != document]
        nearest = sorted(others, key=lambda cut: (abs(len(cut[2]) - len(ending)), _draw("near", index, cut[2])))
        wrong = list(dict.fromkeys(other for *_, other in nearest if other != ending))[:WRONG]
        if len(wrong) < WRONG:
            continue
        endings = sorted([ending, *wrong], key=lambda text: _draw("place", index, text))
        asked.append({"context": context, "endings": endings, "label": endings.index(ending)})
    return asked


def _cuts() -> list[tuple[str, str, str]]:
    """(document, context, ending): the first of every passage, then the second of every passage, and so on."""
    held_out = builtin.passages("held-out")
    of_passage = [(passage.document, list(_cut(passage.text))) for passage in held_out]
    rounds = max((len(cuts) for _, cuts in of_passage), default=0)
    found = [(document, *cuts[r]) for r in range(rounds) for document, cuts in of_passage if r < len(cuts)]
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
