"""Makes a LAMBADA-like task out of any text: which word ends this passage?

    python experiments/last_words.py wikitext-2/test.txt last_words
    python launch.py zeroshot=esparse zeroshot.tasks=[lambada_openai] zeroshot.data=last_words

LAMBADA (arXiv 1606.06031) takes passages of novels whose last word people guess from the passage and not from its last
sentence alone. Nobody asks people here: a passage counts if its last word stands in it before its last sentence and is
new in that one, so that a reader who remembers the passage can know it. The file has LAMBADA's form, which lm-eval's
task `lambada_openai` reads; its scores are comparable with each other and not with LAMBADA's.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FILE = "lambada_openai/test.jsonl"  # what zeroshot.data reads for the task
MOST = 120  # words of a passage
LEAST = 40
LETTERS = 4  # of a last word at least: shorter ones are mostly "the", "it", "was", which any model knows
SENTENCE = re.compile(r"(?<=[a-z\]\)\"'] [.!?]) |(?<=[a-z][.!?]) ")  # WikiText has a space in front of its full stop


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a text file, one paragraph per line")
    parser.add_argument("folder", type=Path, help=f"the folder for zeroshot.data: {FILE} is written into it")
    parser.add_argument("--limit", type=int, default=None, help="passages at most, evenly drawn from the whole text")
    asked = parser.parse_args(arguments)
    try:
        lines = asked.text.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        parser.error(f"{asked.text} cannot be read as text: {cause}")
    found = [passage for line in lines for passage in passages(line)]
    if not found:
        parser.error(f"{asked.text} has no passage of {LEAST} to {MOST} words whose last word stands in it twice")
    kept = found if asked.limit is None else evenly(found, asked.limit)
    to = asked.folder / FILE
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in kept), encoding="utf-8")
    print(f"{len(kept)} of {len(found)} passages in {to}")
    return 0


def passages(paragraph: str) -> Iterator[str]:
    """The first passage of a paragraph, if it has one: whole sentences from its beginning, without the last stop."""
    sentences, before = SENTENCE.split(paragraph.strip()), ""
    for sentence in sentences:
        passage = f"{before} {sentence}".strip()
        length = len(passage.split())
        if length > MOST:
            return
        words = sentence.rstrip(" .!?").split(" ")
        last = words[-1]
        if length >= LEAST and _can_be_asked(last, words[:-1], before):
            yield passage.rstrip(" .!?")
            return
        before = passage


def _can_be_asked(last: str, words: list[str], before: str) -> bool:
    return last.isalpha() and len(last) >= LETTERS and last not in words and last in before.split()


def evenly(items: list[str], count: int) -> list[str]:
    """`count` of the items, equally far apart."""
    return items if count >= len(items) else [items[i * len(items) // count] for i in range(count)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
