"""What the journal makes of files that a crash of the machine, or somebody, took or damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from esparse.pruning.journal import Entry, Journal
from esparse.records.audit import Masks
from esparse.records.report import Stages, write_json


def journal_of(folder: Path, blocks: int, order: list[int] | None = None) -> Journal:
    journal = Journal.open(folder, {"id": "x"}, snapshot_seconds=0)
    keeps = Masks({"a": torch.ones(1, 8, dtype=torch.bool)})
    orders = {} if order is None else {"a": torch.tensor(order)}
    for block in range(blocks):
        journal.weights(block).write_bytes(b"x")
        journal.write(block, Entry(keeps, orders, {}), Stages())
        journal.snapshot(block + 1, {"pruned": [torch.full((1,), float(block + 1))]})
    return Journal.open(folder, {"id": "x"}, snapshot_seconds=0)


def test_hidden_states_of_a_block_further_on_are_not_taken_for_an_earlier_ones(tmp_path: Path) -> None:
    journal = journal_of(tmp_path / "blocks", 4)
    assert (journal.finished, journal.snapshot_before()) == (4, 4)
    for lost in ("done-00003.safetensors", "done-00002.safetensors"):
        (tmp_path / "blocks" / lost).unlink()
    journal = Journal.open(tmp_path / "blocks", {"id": "x"}, snapshot_seconds=0)
    assert (journal.finished, journal.snapshot_before()) == (2, 0)


def test_an_order_of_the_journal_that_is_none_is_damage(tmp_path: Path) -> None:
    assert journal_of(tmp_path / "fine", 1, [1, 0, 2]).read(0).orders["a"].tolist() == [1, 0, 2]
    with pytest.raises(ValueError, match=r"done-00000\.safetensors, a: the order of its 3 channels .* rerun=true"):
        journal_of(tmp_path / "blocks", 1, [1, 1, 2])


@pytest.mark.parametrize("damage", [b"", b"[1]", b"\xff\xfe", b'{"run": 1}'])
def test_a_damaged_journal_begins_anew(damage: bytes, tmp_path: Path) -> None:
    assert journal_of(tmp_path / "blocks", 2).finished == 2
    (tmp_path / "blocks" / "journal.json").write_bytes(damage)
    assert Journal.open(tmp_path / "blocks", {"id": "x"}, snapshot_seconds=0).finished == 0


def test_the_name_of_a_file_is_on_disk_before_the_next_file_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    write_json(tmp_path / "a.json", {})
    assert synced == [str(tmp_path / "a.json.part"), str(tmp_path)]
