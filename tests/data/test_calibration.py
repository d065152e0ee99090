"""Calibration sequences: decided by corpus, seed and tokenizer; from the text and from nothing else."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esparse.data import builtin, lengths, tokens
from esparse.data.calibration import Calibration
from tests.data.stand_ins import END, START, byte_tokenizer, put

TEXT = "".join(f"{i:04d} " for i in range(400))  # 2,000 bytes, no 9 of them in a row twice


def calibration(**settings) -> Calibration:
    return Calibration(**{"corpus": "text", "sequences": 5, "length": 12, "seed": 0} | settings)


@pytest.fixture
def file(tmp_path) -> str:
    (tmp_path / "a.txt").write_text(TEXT)
    return str(tmp_path / "a.txt")


def test_windows_come_from_anywhere_in_the_stream(file):
    tokens_SL = calibration(path=file, sequences=300).sample(byte_tokenizer(), longest=64)
    assert tokens_SL.shape == (300, 12) and tokens_SL.dtype == torch.int64
    places = [TEXT.find(window) for window in byte_tokenizer().batch_decode(tokens_SL)]
    assert min(places) >= 0
    assert min(places) < 100 and max(places) > 1880 and len(set(places)) > 200


@pytest.mark.parametrize(("sequences", "said"), [(166, False), (167, True)])
def test_a_text_shorter_than_what_is_asked_for_is_told(file, sequences, said, caplog):
    calibration(path=file, sequences=sequences).sample(byte_tokenizer(), longest=64)
    expected = f"a.txt has 2,000 tokens, and {sequences} sequences of 12 are asked for: they overlap"
    assert (expected in caplog.text) == said == bool(caplog.text)


def test_the_seed_decides_and_the_global_one_does_not(file):
    def sample(seed: int, global_seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        return calibration(path=file, seed=seed).sample(byte_tokenizer(), longest=64)

    assert torch.equal(sample(3, 0), sample(3, 1))
    assert not torch.equal(sample(3, 0), sample(4, 0))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    calibration(path=file).sample(byte_tokenizer(), longest=64)
    assert torch.equal(torch.rand(3), expected)


def test_further_samples_are_of_the_same_text_and_no_other_seed_s(file):
    asked = calibration(path=file, seed=3, sequences=5)
    samples = [one.sample(byte_tokenizer(), longest=64) for one in (asked, *asked.further(2), asked.further(1)[0])]
    assert {tuple(tokens_SL.shape) for tokens_SL in samples} == {(5, 12)}
    assert torch.equal(samples[1], samples[3])
    assert len({tuple(tokens_SL.flatten().tolist()) for tokens_SL in samples}) == 3
    assert len({one.seed for seed in range(100) for one in calibration(path=file, seed=seed).further(9)}) == 900
    assert asked.seed == 3


@given(total=st.integers(1, 30), length=st.integers(1, 30), count=st.integers(1, 6), seed=st.integers(0, 99))
def test_random_windows_are_windows_of_the_stream(total, length, count, seed):
    if length > total:
        return
    generator = torch.Generator().manual_seed(seed)
    windows_SL = tokens.random_windows(torch.arange(total), count=count, length=length, generator=generator)
    assert windows_SL.shape == (count, length) and windows_SL.min() >= 0 and windows_SL.max() < total
    assert (windows_SL.diff(dim=1) == 1).all()


def test_a_text_of_exactly_one_sequence_gives_that_sequence(tmp_path):
    (tmp_path / "a.txt").write_text("abcdef")
    tokens_SL = calibration(path=str(tmp_path / "a.txt"), length=6, sequences=2).sample(byte_tokenizer(), longest=6)
    assert byte_tokenizer().batch_decode(tokens_SL) == ["abcdef", "abcdef"]


def test_length_by_default_is_2048_or_what_the_model_takes(file):
    (length,) = {calibration(path=file, length=None).sample(byte_tokenizer(), longest=64).shape[1]}
    assert length == 64
    assert lengths.sequence_length(None, 131072, "calibration.length") == 2048
    with pytest.raises(ValueError, match=r"calibration.length=65 is longer than the 64 tokens that the model takes"):
        calibration(path=file, length=65).sample(byte_tokenizer(), longest=64)


def test_built_in_documents_follow_the_end_of_text_token(monkeypatch):
    monkeypatch.setattr(builtin, "texts", lambda split: ["ab\n", "c\n"])
    settings = calibration(corpus="builtin", length=7, sequences=1)
    marked = settings.sample(byte_tokenizer(starts=True), longest=64)
    text = byte_tokenizer().convert_ids_to_tokens(marked[0].tolist())
    orders = ["</s> a b Ċ </s> c Ċ", "</s> c Ċ </s> a b Ċ"]
    assert " ".join(text) in orders and END in marked[0]
    plain = settings.sample(byte_tokenizer(ends=False), longest=64)
    assert byte_tokenizer().decode(plain[0]) in ["ab\n\n\nc\n", "c\n\n\nab\n"]


def test_a_small_sample_of_many_documents_tokenises_only_some_of_them_and_others_for_another_seed(monkeypatch):
    monkeypatch.setattr(builtin, "texts", lambda split: [f"{i:04d} words" for i in range(2000)])
    seen: list[str] = []
    original = tokens._ids
    monkeypatch.setattr(tokens, "_ids", lambda texts, *a, **k: seen.extend(texts) or original(texts, *a, **k))
    for seed in (0, 1, 1):
        calibration(corpus="builtin", seed=seed).sample(byte_tokenizer(), longest=64)
    enough = 16 * 5 * 12  # 11 tokens a document
    assert 2 * enough <= 11 * len(seen) <= 2 * (enough + 16 * 11)  # two seeds, the second one kept
    assert set(seen[: len(seen) // 2]) != set(seen[len(seen) // 2 :])


def test_c4_crops_come_from_distinct_long_documents_only(cache):
    long = {i: f"{i:02d}" * 10 for i in range(0, 40, 4)}  # 20 bytes
    put(cache, "c4", "calibration", [long.get(i, f"{i:02d}" * 6) for i in range(40)])  # the others 12 bytes
    crops = calibration(corpus="c4", sequences=10).sample(byte_tokenizer(), longest=64)
    texts = byte_tokenizer().batch_decode(crops)
    assert all(sum(text in document for document in long.values()) == 1 for text in texts)
    assert {next(i for i, document in long.items() if text in document) for text in texts} == set(long)
    starts = {long[i].find(text) for text in texts for i in long if text in long[i]}
    assert starts == {0, 1}  # two digits repeat: a crop starts at an even place or at an odd one
    again = calibration(corpus="c4", sequences=10).sample(byte_tokenizer(), longest=64)
    other = calibration(corpus="c4", sequences=10, seed=1).sample(byte_tokenizer(), longest=64)
    assert torch.equal(crops, again) and not torch.equal(crops, other)


def test_c4_crops_leave_the_start_token_behind_or_begin_with_it(cache):
    put(cache, "c4", "calibration", ["abcdefghijklmnop"] * 40)
    crops = calibration(corpus="c4", sequences=40).sample(byte_tokenizer(starts=True), longest=64)
    assert START in crops[:, 0] and START not in crops[:, 1:] and (crops[:, 0] != START).any()


def test_too_few_long_documents(cache):
    # The last has 12 tokens too: </s> is one of them.
    put(cache, "c4", "calibration", ["x" * 13, "y" * 12, "z" * 40, "</s>" + "u" * 11])
    said = "5 sequences of 12 tokens were asked of the corpus c4, but only 2 of its 4 documents are longer"
    with pytest.raises(ValueError, match=said):
        calibration(corpus="c4").sample(byte_tokenizer(), longest=64)


def test_too_short_a_text(tmp_path):
    (tmp_path / "a.txt").write_text("abcdef")
    with pytest.raises(ValueError, match=r"corpus a\.txt has 6 tokens, too few for one sequence of 12: use a longer"):
        calibration(path=str(tmp_path / "a.txt")).sample(byte_tokenizer(), longest=64)


def test_no_warning_of_a_long_text(file, caplog):
    tokenizer = byte_tokenizer()
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "transformers"):
        logging.getLogger("transformers").addHandler(caplog.handler)
        try:
            calibration(path=file).sample(tokenizer, longest=64)
            assert not caplog.records
            tokenizer(TEXT)  # what the warning would look like
        finally:
            logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "longer than the specified maximum" in caplog.text


def test_a_text_is_tokenised_once_and_a_changed_one_again(tmp_path, monkeypatch):
    texts = []
    original = tokens._ids
    monkeypatch.setattr(tokens, "_ids", lambda *a, **k: texts.append(a[0][0]) or original(*a, **k))
    path = tmp_path / "a.txt"
    for content in ("first " * 9, "first " * 9, "second " * 9):
        path.write_text(content)
        sample = calibration(path=str(path)).sample(byte_tokenizer(), longest=64)
        assert byte_tokenizer().decode(sample[0]) in content
    whole = [text for text in texts if len(text) > 1]  # a letter shows whether the tokeniser adds a beginning
    assert whole == ["first " * 9, "second " * 9]
    texts.clear()
    calibration(path=str(path)).sample(byte_tokenizer(starts=True), longest=64)
    assert "second " * 9 in texts


def test_settings_that_make_no_sense():
    for wrong, said in {
        "sequences": "sequences must be at least 1, got 0",
        "length": "length must be at least 1",
    }.items():
        with pytest.raises(ValueError, match=said):
            calibration(corpus="builtin", **{wrong: 0})
    with pytest.raises(ValueError, match="expected a corpus out of"):
        calibration(corpus="bookcorpus")
