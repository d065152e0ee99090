"""Masks on disk are the masks, however they lay in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esparse.records import audit


@pytest.mark.parametrize("columns", [16, 21])
@pytest.mark.parametrize("transposed", [False, True])
def test_masks_are_read_as_they_were_written(transposed: bool, columns: int, tmp_path: Path) -> None:
    keep_OI = torch.rand(6, columns, generator=torch.Generator().manual_seed(0)) > 0.5
    stored = keep_OI.T.contiguous().T if transposed else keep_OI  # as those of GPT-2's Conv1D
    tokens_SL = torch.zeros(1, 4, dtype=torch.int64)
    size = audit.write(tmp_path, {"layer": stored}, {}, tokens_SL, {"dense": {"text": torch.zeros(1)}})
    assert size == 6 * -(-columns // 8)
    assert torch.equal(audit.read_masks(tmp_path)["layer"], keep_OI)
