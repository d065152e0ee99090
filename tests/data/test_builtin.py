"""The built-in corpus: its split follows from the names of its documents alone."""

from __future__ import annotations

from hashlib import sha256

import pytest

from esparse.data import builtin


@pytest.mark.parametrize(
    (
        "name",
        "first_bytes",
        "held_out",
    ),  # the first 8 bytes by `printf '%s' NAME | sha256sum`; held out: divisible by 10
    [
        ("module argparse", 0xC6D4BC37FBB5CADB, False),
        ("module ast", 0x7C2249EF0F656C4C, True),
        ("module zipfile", 0x120621305C620B36, True),
        ("module heapq", 0x522225F7664D18BD, False),
    ],
)
def test_the_split_follows_from_the_name(name, first_bytes, held_out):
    assert builtin._digest(name)[:8] == first_bytes.to_bytes(8, "big")
    assert first_bytes % 10 == 0 if held_out else first_bytes % 10 != 0
    assert builtin._is_held_out(name) == held_out


def test_the_splits_share_nothing_and_together_are_everything(monkeypatch):
    named = [(f"module m{i}", f"text {i}\n") for i in range(200)]
    monkeypatch.setattr(builtin, "_all_documents", lambda: iter(named))
    train, held_out = builtin.documents("train"), builtin.documents("held-out")
    assert set(train).isdisjoint(held_out)
    assert sorted(train + held_out) == sorted(text for _, text in named)
    assert 10 <= len(held_out) <= 30  # one in ten


def test_the_order_is_that_of_the_hash_whatever_order_the_files_come_in(monkeypatch):
    named = [(f"module m{i}", f"text {i}\n") for i in range(50)]
    monkeypatch.setattr(builtin, "_all_documents", lambda: iter(named))
    there = builtin.documents("train")
    monkeypatch.setattr(builtin, "_all_documents", lambda: iter(named[::-1]))
    assert builtin.documents("train") == there
    digests = [sha256(f"module m{text.split()[1]}".encode()).hexdigest() for text in there]
    assert digests == sorted(digests)


def test_the_real_text_is_there():
    held_out = builtin.documents("held-out")
    assert len(held_out) > 10 and all(text.strip() for text in held_out)


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match="splits train and held-out, got 'test'"):
        builtin.documents("test")
    monkeypatch.setattr(builtin, "_all_documents", lambda: iter([]))
    with pytest.raises(FileNotFoundError, match=r"calibration=text calibration.path=FILE"):
        builtin.documents("train")
