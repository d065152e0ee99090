"""Of a long text only what is needed is read and tokenised; beginning tokens; tokens that a model cannot read."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from esparse.data import corpora, tokens
from esparse.data.calibration import Calibration
from esparse.data.windows import Perplexity
from esparse.models.load import BUILTIN
from tests.data.stand_ins import START, byte_tokenizer

WORDS = "".join(f"{i:05d} " for i in range(20_000))  # 120,000 characters


def calibration(**settings) -> Calibration:
    return Calibration(**{"corpus": "text", "sequences": 6, "length": 24, "seed": 0} | settings)


def evaluation(**settings) -> Perplexity:
    return Perplexity(**{"corpora": ["text"], "length": 24, "max_tokens": None} | settings)


@pytest.fixture
def long(tmp_path, monkeypatch):
    """A text that counts as long, as .txt and as rows."""
    monkeypatch.setattr(corpora, "LONG", 10_000)
    (tmp_path / "a.txt").write_text(WORDS)
    rows = [WORDS[i : i + 600] for i in range(0, len(WORDS), 600)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def tokenised(monkeypatch) -> list[int]:
    """The characters of each text that is tokenised."""
    found: list[int] = []
    original = tokens._ids
    monkeypatch.setattr(
        tokens, "_ids", lambda texts, *a, **k: found.extend(map(len, texts)) or original(texts, *a, **k)
    )
    return found


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_of_a_long_text_little_is_tokenised_and_the_seed_decides(name, long, tokenised):
    settings = {"path": str(long / name), "sequences": 50}
    tokens_SL = calibration(**settings).sample(byte_tokenizer(), 64)
    assert sum(tokenised) <= 50 * tokens.PER_TOKEN * (24 + tokens.SPARE_TOKENS)
    texts = byte_tokenizer().batch_decode(tokens_SL)
    places = [WORDS.find(text.replace("\n\n", "")) for text in texts]
    assert min(places) >= 0 and max(places) > 100_000 and min(places) < 20_000 and len(set(places)) > 45
    assert all(text[0].isspace() for text in texts)  # a sequence begins with a word
    assert torch.equal(tokens_SL, calibration(**settings).sample(byte_tokenizer(), 64))
    assert not torch.equal(tokens_SL, calibration(**settings, seed=1).sample(byte_tokenizer(), 64))


def test_a_text_that_is_not_long_is_sampled_by_tokens_as_ever(tmp_path):
    (tmp_path / "a.txt").write_text(WORDS)
    tokens_SL = calibration(path=str(tmp_path / "a.txt")).sample(byte_tokenizer(), 64)
    whole_T = torch.tensor(byte_tokenizer()(WORDS, verbose=False)["input_ids"])
    starts = torch.randint(len(whole_T) - 24 + 1, (6, 1), generator=torch.Generator().manual_seed(0))
    assert torch.equal(tokens_SL, whole_T[starts + torch.arange(24)])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("limit", [10_000, 10**9])
def test_windows_of_a_texts_beginning_are_those_of_the_whole_text(name, limit, long, tokenised, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setattr(corpora, "LONG", limit)
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
    joint = WORDS if name == "a.txt" else "\n\n".join(WORDS[i : i + 600] for i in range(0, len(WORDS), 600))
    whole_T = torch.tensor(tokenizer(joint, verbose=False)["input_ids"])
    windows_WL = evaluation(path=str(long / name), max_tokens=240).windows("text", tokenizer, 64)
    assert torch.equal(windows_WL, whole_T[:240].view(10, 24))
    assert sum(tokenised) < 10_000
    everything = evaluation(path=str(long / name)).windows("text", tokenizer, 64)
    assert torch.equal(everything.flatten(), whole_T[: everything.numel()]) and len(everything) == len(whole_T) // 24


def test_blank_stretches_of_a_long_text_are_read_on(long):
    (long / "b.txt").write_text(" " * 60_000 + "ab " * 20_000)

    class Words:  # blanks are no tokens
        bos_token_id = eos_token_id = None

        def __call__(self, texts, **_):
            return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    tokens_SL = calibration(path=str(long / "b.txt")).sample(Words(), 64)  # type: ignore[arg-type]
    assert tokens_SL.shape == (6, 24)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "short.txt"])
def test_a_beginning_token_stands_in_front_of_every_sequence_if_asked(name, long):
    (long / "short.txt").write_text(WORDS[:3000])
    path = str(long / name)
    for starts in (False, True):  # whether the tokenizer itself puts one in front of a text
        tokenizer = byte_tokenizer(starts=starts)
        for group in (calibration(path=path, bos=True), evaluation(path=path, bos=True, max_tokens=240)):
            found = (
                group.sample(tokenizer, 64) if isinstance(group, Calibration) else group.windows("text", tokenizer, 64)
            )
            assert found.shape[1] == 24 and (found[:, 0] == START).all() and (found[:, 1:] != START).all()
        windows_WL = evaluation(path=path, bos=True, max_tokens=240).windows("text", tokenizer, 64)
        assert len(windows_WL) == 10
        if name != "a.jsonl":  # which has blank lines between its rows
            assert byte_tokenizer().decode(windows_WL[:, 1:].flatten()) == WORDS[: 10 * 23]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gemma", True),
        ("gemma2", True),
        ("gemma3_text", True),
        ("recurrent_gemma", True),
        ("llama", False),
        ("", False),
    ],
)
def test_auto_is_what_the_family_expects(family, expected, long):
    for path in (str(long / "a.txt"), str(long / "a.jsonl")):
        found = calibration(path=path).sample(byte_tokenizer(), 64, family)
        assert bool((found[:, 0] == START).all()) == expected
        assert (calibration(path=path, bos=False).sample(byte_tokenizer(), 64, family) != START).all()
        windows_WL = evaluation(path=path, max_tokens=240).windows("text", byte_tokenizer(), 64, family)
        assert bool((windows_WL[:, 0] == START).all()) == expected


def test_settings_of_the_beginning_token_that_make_no_sense(long):
    for group in (calibration, evaluation):
        with pytest.raises(ValueError, match=r"\.bos must be auto, true or false, got 'yes'"):
            group(path=str(long / "a.txt"), bos="yes")
        with pytest.raises(ValueError, match=r"\.chat=true renders the chats of a file"):
            group(**({"corpus": "builtin"} if group is calibration else {"corpora": ["builtin"]}), chat=True)

    class Without:
        bos_token_id = None

    with pytest.raises(
        ValueError, match=r"calibration\.bos=true asks for a beginning token, and the tokenizer has none"
    ):
        calibration(path=str(long / "a.txt"), bos=True).sample(Without(), 64)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"calibration\.chat=true asks for the tokenizer's chat template, and it has"):
        calibration(path=str(long / "a.txt"), chat=True).sample(byte_tokenizer(), 64)


def test_tokens_that_a_model_cannot_read_are_refused_with_both_numbers():
    tokens.check_ids("the text", torch.tensor([[0, 1, 95]]), 96)
    with pytest.raises(ValueError, match=r"gives the text the token 96, and the model embeds 96 \(0 to 95\)"):
        tokens.check_ids("the text", torch.tensor([[0, 1, 96]]), 96)
    with pytest.raises(ValueError, match="gives the text the token 7 again and again"):
        tokens.check_ids("the text", torch.full((2, 16), 7), 96)
    tokens.check_ids("nothing", torch.zeros(0, 5, dtype=torch.long), 96)


def test_null_rows_of_a_calibration_text_are_told_once(tmp_path, caplog):
    rows = [{"text": f"row {i} of many "} for i in range(50)]
    rows[7]["text"] = None  # type: ignore[assignment]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.WARNING, "esparse"):
        calibration(path=str(tmp_path / "a.jsonl")).sample(byte_tokenizer(), 64)
    assert caplog.text.count("1 rows without text are skipped") == 1
