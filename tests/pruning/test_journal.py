"""What the journal makes of files that a crash of the machine, or somebody, took or damaged."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from esparse.pruning.journal import Dense, Entry, Journal
from esparse.records.audit import Masks
from esparse.records.report import Stages, write_json


def journal_of(folder: Path, blocks: int, order: list[int] | None = None) -> Journal:
    journal = Journal.open(folder, {"id": "x"}, snapshot_seconds=0)
    keeps = Masks({"a": torch.ones(1, 8, dtype=torch.bool)})
    orders = {} if order is None else {"a": torch.tensor(order)}
    for block in range(blocks):
        save_file({"a": torch.ones(1, 8)}, journal.weights(block))
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


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut short": _cut,
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "text": lambda file: file.write_text("<html>504 Gateway Timeout</html>"),
    "another's": lambda file: save_file({"weight": torch.ones(3)}, file),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["done-00001", "pruned-00001"])
def test_a_run_goes_on_in_front_of_a_damaged_block(
    file: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal_of(tmp_path / "blocks", 3)
    DAMAGE[damage](tmp_path / "blocks" / f"{file}.safetensors")
    assert Journal.open(tmp_path / "blocks", {"id": "x"}, snapshot_seconds=0).finished == 1
    (said,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert f"{file}.safetensors" in said and said.endswith(": block 2 is pruned anew, and all behind it")


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_hidden_states_and_measurements_are_made_anew(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = journal_of(tmp_path / "blocks", 3)
    journal.write_dense(Dense("x", {"a": torch.ones(1)}, {}))
    for file in ("hidden", "dense"):
        DAMAGE[damage](tmp_path / "blocks" / f"{file}.safetensors")
    assert (journal.snapshot_before(), journal.dense()) == (0, None)
    hidden, dense = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert "hidden.safetensors" in hidden and "dense.safetensors" in dense and "measured anew" in dense


def test_the_name_of_a_file_is_on_disk_before_the_next_file_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    write_json(tmp_path / "a.json", {})
    assert synced == [str(tmp_path / "a.json.part"), str(tmp_path)]
