"""Perplexity windows: consecutive, complete, as many as the literature takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esparse.data import builtin, tokens
from esparse.data.windows import Perplexity
from tests.data.stand_ins import END, START, byte_tokenizer, put

WIKITEXT = Path(__file__).parents[3] / "shared" / "data" / "wikitext-2" / "test.txt"


def perplexity(**settings) -> Perplexity:
    return Perplexity(**{"corpora": ["text"], "length": 4, "max_tokens": None} | settings)


@pytest.fixture
def file(tmp_path) -> str:
    (tmp_path / "mine.txt").write_text("abcdefghijklmn")
    return str(tmp_path / "mine.txt")


def test_windows_are_consecutive_and_drop_the_tail(file):
    windows_WL = perplexity(path=file).windows("text", byte_tokenizer(), longest=64)
    assert windows_WL.dtype == torch.int64
    assert byte_tokenizer().batch_decode(windows_WL) == ["abcd", "efgh", "ijkl"]


def test_the_start_token_stands_in_the_first_window_only(file):
    windows_WL = perplexity(path=file).windows("text", byte_tokenizer(starts=True), longest=64)
    assert windows_WL[0, 0] == START and (windows_WL == START).sum() == 1
    assert byte_tokenizer().decode(windows_WL.flatten()[1:]) == "abcdefghijk"


def test_max_tokens_and_length(file):
    assert perplexity(path=file, max_tokens=9).windows("text", byte_tokenizer(), longest=64).shape == (2, 4)
    assert perplexity(path=file, length=None).windows("text", byte_tokenizer(), longest=5).shape == (2, 5)
    with pytest.raises(ValueError, match=r"evaluate.length=4 is longer than the 3 tokens"):
        perplexity(path=file).windows("text", byte_tokenizer(), longest=3)
    with pytest.raises(ValueError, match=r"corpus mine\.txt has 14 tokens, too few for one window of 15: use a longer"):
        perplexity(path=file, length=15).windows("text", byte_tokenizer(), longest=64)
    with pytest.raises(ValueError, match=r"has 9 tokens \(evaluate.max_tokens=9\), too few for one window of 10"):
        perplexity(path=file, length=None, max_tokens=9).windows("text", byte_tokenizer(), longest=10)


def test_the_windows_are_the_callers_own(file):
    perplexity(path=file).windows("text", byte_tokenizer(), longest=64).zero_()
    assert byte_tokenizer().decode(perplexity(path=file).windows("text", byte_tokenizer(), 64)[0]) == "abcd"


def test_wikitext2_tokens_are_those_of_the_literature(cache):
    rows = ["", " = T = \n", "", " Words of it .\n"] * 5
    put(cache, "wikitext2", "evaluation", rows)
    tokenizer = byte_tokenizer(starts=True)
    expected = tokenizer("\n\n".join(rows), return_tensors="pt", verbose=False).input_ids
    windows_WL = perplexity(corpora=["wikitext2"], length=8).windows("wikitext2", tokenizer, longest=64)
    assert len(windows_WL) == expected.numel() // 8
    for i, window in enumerate(windows_WL):
        assert torch.equal(window, expected[0, i * 8 : (i + 1) * 8])


def test_c4_stops_after_256_windows(cache):
    put(cache, "c4", "evaluation", ["abc"] * 1101)
    windows_WL = perplexity(corpora=["c4"]).windows("c4", byte_tokenizer(), longest=64)
    assert windows_WL.shape == (256, 4)
    assert perplexity(corpora=["c4"], length=64).windows("c4", byte_tokenizer(), longest=64).shape == (4399 // 64, 64)


def test_built_in_windows_start_with_the_end_of_text_token_and_tokenise_no_more_than_needed(monkeypatch):
    monkeypatch.setattr(builtin, "texts", lambda split: {"held-out": [f"doc {i:03d}" for i in range(100)]}[split])
    seen = []
    original = tokens._ids
    monkeypatch.setattr(tokens, "_ids", lambda texts, *a, **k: seen.extend(texts) or original(texts, *a, **k))
    settings = perplexity(corpora=["builtin"], length=8, max_tokens=40)
    windows_WL = settings.windows("builtin", byte_tokenizer(), longest=64)
    assert (windows_WL[:, 0] == END).all() and len(seen) < 40
    assert byte_tokenizer().batch_decode(windows_WL[:, 1:]) == [f"doc {i:03d}" for i in range(5)]
    everything = perplexity(corpora=["builtin"], length=8).windows("builtin", byte_tokenizer(), longest=64)
    assert len(everything) == 100 and torch.equal(everything[:5], windows_WL)


def test_the_records_name_of_a_text_is_its_file(file, monkeypatch):
    monkeypatch.setattr(builtin, "texts", lambda split: ["abcd", "efgh"])
    settings = perplexity(corpora=["builtin", "text"], path=file)
    assert [settings.name(corpus) for corpus in settings.corpora] == ["builtin", "mine.txt"]
    assert settings.windows("builtin", byte_tokenizer(), longest=64).shape[1] == 4  # its path is the text's alone


def test_settings_that_make_no_sense():
    with pytest.raises(ValueError, match=r"evaluate.length must be at least 2"):
        perplexity(corpora=["builtin"], length=1)
    with pytest.raises(ValueError, match=r"evaluate.max_tokens=3 leaves no window of 4 tokens"):
        perplexity(corpora=["builtin"], max_tokens=3)


@pytest.mark.slow
@pytest.mark.skipif(not WIKITEXT.exists(), reason="WikiText-2 is not on this machine")
def test_the_real_wikitext2():
    windows_WL = perplexity(path=str(WIKITEXT), length=2048).windows("text", byte_tokenizer(), longest=2048)
    text = WIKITEXT.read_text(encoding="utf-8")
    assert len(windows_WL) == len(text.encode()) // 2048
    assert byte_tokenizer().decode(windows_WL[0][:200]) == text.encode()[:200].decode()
