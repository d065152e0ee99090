"""The built-in questions: what they promise, and that they are always the same."""

from __future__ import annotations

from collections import Counter

from esparse.data import builtin
from esparse.data.choices import CONTEXT, ENDING, LONGEST, QUESTIONS, WRONG, questions

ASKED = questions()


def test_the_right_ending_follows_the_context_and_the_wrong_ones_come_from_elsewhere() -> None:
    passages = builtin.passages("held-out")
    documents: dict[str, str] = {}
    for passage in passages:
        documents[passage.document] = documents.get(passage.document, "") + passage.text
    for question in ASKED:
        endings, label = question["endings"], question["label"]
        own = [documents[p.document] for p in passages if question["context"] + endings[label] in p.text]
        assert own
        assert len(set(endings)) == WRONG + 1
        for wrong in endings[:label] + endings[label + 1 :]:
            assert not any(wrong in text for text in own)
            assert any(wrong in text for text in documents.values())
            assert not any(question["context"] + wrong in text for text in documents.values())


def test_lengths_tell_nothing_and_places_are_even() -> None:
    assert len(ASKED) == QUESTIONS
    shortest = sum(len(q["endings"][q["label"]]) == min(map(len, q["endings"])) for q in ASKED)
    longest = sum(len(q["endings"][q["label"]]) == max(map(len, q["endings"])) for q in ASKED)
    for question in ASKED:
        assert CONTEXT <= len(question["context"]) < LONGEST * CONTEXT
        assert all(ENDING <= len(ending) < LONGEST * ENDING for ending in question["endings"])
    assert abs(shortest - longest) < QUESTIONS // 5
    places = Counter(question["label"] for question in ASKED)
    assert all(abs(places[place] - QUESTIONS / 4) < 4 * (QUESTIONS * 3 / 16) ** 0.5 for place in range(4))


def test_they_are_the_same_every_time() -> None:
    assert questions() == ASKED
