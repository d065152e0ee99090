"""The built-in corpus: what its file holds, that no document is in front of others, and how it was made."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import zlib
from collections import Counter
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoTokenizer

from esparse.data import builtin
from esparse.models.load import ASSETS
from tests.data.test_calibration import calibration
from tests.data.test_windows import perplexity

ROOT = Path(__file__).parents[2]
MADE_OF = "3.11.7"
# Of the file's lines, without what compresses them: whoever changes the corpus makes all numbers measured on it another
# corpus's, and says so in experiments/LOG.md.
DIGEST = "f8b4e4164a2f10aeb941338d488c58b0eadbb47438ef63f29c8fc37b57a2175b"
EVALUATED = 65536  # tokens, by conf/evaluate/builtin.yaml
BLOCKED = "import sys; sys.modules['sysconfig'] = sys.modules['pydoc_data'] = sys.modules['pydoc_data.topics'] = None\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ASSETS / "tiny")


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import make_corpus

    return make_corpus


def lines() -> bytes:
    return zlib.decompress(builtin.FILE.read_bytes(), wbits=31)


def shares(passages: list[builtin.Passage], tokenizer: Any, most: int | None = None) -> dict[str, float]:
    """The share of each document in the first `most` tokens, one of which begins each passage."""
    counts: Counter[str] = Counter()
    for passage in passages:
        left = len(lines()) if most is None else most - counts.total()
        counts[passage.document] += min(left, 1 + len(tokenizer(passage.text)["input_ids"]))
    return {name: count / counts.total() for name, count in counts.items() if count}


def test_the_file_is_the_one_on_which_the_numbers_were_measured() -> None:
    assert sha256(lines()).hexdigest() == DIGEST
    assert builtin.FILE.stat().st_size < 1_000_000


def test_no_document_is_in_both_splits_and_the_name_says_in_which(experiments: ModuleType) -> None:
    documents = {split: {p.document for p in builtin.passages(split)} for split in builtin.SPLITS}
    assert all(documents.values()) and not documents["train"] & documents["held-out"]
    for split, names in documents.items():
        assert {experiments.split_of(name) for name in names} == {split}


def test_no_text_comes_twice_and_every_text_is_whole_lines() -> None:
    texts = [*builtin.texts("train"), *builtin.texts("held-out")]
    assert len(set(texts)) == len(texts)
    assert all(text.strip() and text.endswith("\n") for text in texts)


@pytest.mark.parametrize(
    "most", [EVALUATED, pytest.param(2 * EVALUATED, marks=pytest.mark.slow), pytest.param(None, marks=pytest.mark.slow)]
)
def test_no_document_is_over_two_per_cent_of_the_evaluation(most: int | None, tokenizer: Any) -> None:
    found = shares(builtin.passages("held-out"), tokenizer, most)
    assert len(found) >= 100 and max(found.values()) <= 0.02


@pytest.mark.slow
def test_no_document_is_over_one_per_cent_of_the_calibration(tokenizer: Any) -> None:
    assert max(shares(builtin.passages("train"), tokenizer).values()) <= 0.01


def test_the_text_is_long_enough(tokenizer: Any) -> None:
    windows_WL = perplexity(corpora=["builtin"], length=256, max_tokens=EVALUATED).windows("builtin", tokenizer, 256)
    assert windows_WL.numel() == EVALUATED


@pytest.mark.slow
def test_calibration_sees_many_documents(tokenizer: Any) -> None:
    tokens_SL = calibration(corpus="builtin", sequences=128, length=256).sample(tokenizer, longest=256)
    beginnings = {text[:60] for text in builtin.texts("train")}
    text = tokenizer.decode(tokens_SL.flatten())
    assert len({beginning for beginning in beginnings if beginning in text}) > 5
    long_SL = calibration(corpus="builtin", sequences=128, length=2048).sample(tokenizer, longest=2048)
    assert long_SL.shape == (128, 2048) and len({tuple(row.tolist()) for row in long_SL}) == 128


def test_more_than_the_corpus_holds_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"tokens to calibrate on, fewer than the 1000 x 2048 .*calibration=text"):
        calibration(corpus="builtin", sequences=1000, length=2048).sample(tokenizer, longest=2048)


def test_nothing_of_the_running_python_is_read(tmp_path: Path) -> None:
    """In a process that has neither the topics nor a place of the standard library to ask for."""
    code = "from esparse.data import builtin, choices; print(len(builtin.texts('held-out')), len(choices.questions()))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BLOCKED + code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(builtin.texts("held-out"))), "500"]


def test_an_unknown_split() -> None:
    with pytest.raises(ValueError, match="splits train and held-out, got 'test'"):
        builtin.texts("test")


@pytest.mark.parametrize(
    ("name", "first_bytes", "split"),  # the first 8 bytes by `printf '%s' NAME | sha256sum`; held out: divisible by 10
    [
        ("module argparse", 0xC6D4BC37FBB5CADB, "train"),
        ("module ast", 0x7C2249EF0F656C4C, "held-out"),
        ("module zipfile", 0x120621305C620B36, "held-out"),
        ("module heapq", 0x522225F7664D18BD, "train"),
    ],
)
def test_the_split_follows_from_the_name(experiments: ModuleType, name: str, first_bytes: int, split: str) -> None:
    assert experiments.digest(name)[:8] == first_bytes.to_bytes(8, "big")
    assert (first_bytes % 10 == 0) == (split == "held-out")
    assert experiments.split_of(name) == split


def test_documents_come_in_the_order_of_the_hash(experiments: ModuleType) -> None:
    named = [(f"module m{i}", f"text {i}\n") for i in range(50)]
    there = experiments.in_order(iter(named))
    assert experiments.in_order(iter(named[::-1])) == there and sorted(there) == sorted(named)
    digests = [sha256(name.encode()).hexdigest() for name, _ in there]
    assert digests == sorted(digests)


def test_passages_are_whole_lines_and_long_enough(experiments: ModuleType) -> None:
    class Letters:
        def __call__(self, lines: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[0] * len(line) for line in lines]}

    def line(letters: int) -> str:
        return "x" * (letters - 1) + "\n"

    text = line(150) + line(100) + line(60) + line(400) + line(120) + line(99)
    first = line(150) + line(100)
    # 60 behind it are too few for a passage, 400 are too many, and 120 + 99 fit
    assert experiments.cut(text, 300, Letters()) == [first, line(120) + line(99)]


@pytest.mark.slow
@pytest.mark.skipif(platform.python_version() != MADE_OF, reason=f"the corpus is Python {MADE_OF}'s")
def test_the_script_makes_the_file_of_this_library(experiments: ModuleType) -> None:
    made = "".join(json.dumps(passage, ensure_ascii=False) + "\n" for passage in experiments.chosen())
    assert sha256(made.encode()).hexdigest() == DIGEST
