"""What goes into a checkpoint's files, and what is there when writing one fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from esparse.export.writer import _tensors, cast
from esparse.models.blocks import BlockModel
from tests.export.test_export import CPU, dense, packed, pruned, written
from tests.models.families import tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_negative_zero_is_written(dtype: torch.dtype) -> None:
    value = torch.tensor([-0.0, -1e-42, -1.0])  # the second one becomes a zero in half precision
    written = cast(value, dtype)
    assert written.dtype == dtype and written[2] == -1
    assert not (written.signbit() & (written == 0)).any()
    assert value.signbit().all()  # and the model is left as it is
    places = torch.arange(3)
    assert cast(places, dtype).dtype == torch.int64 and cast(places, dtype).data_ptr() != places.data_ptr()


def test_buffers_that_belong_to_a_checkpoint_are_in_it_and_tied_weights_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[1].register_buffer("kept", torch.ones(1))
    model[1].register_buffer("made anew", torch.ones(1), persistent=False)
    assert set(_tensors(model, lambda name: True)) == {"0.weight", "0.bias", "1.bias", "1.kept"}
    assert set(_tensors(model, lambda name: name.startswith("1."))) == {"1.bias", "1.kept"}


def test_the_checkpoint_before_is_there_until_the_new_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)
    of = pruned(blocks)
    written(dense(), blocks, of, tmp_path)
    before = {file.name: file.read_bytes() for file in (tmp_path / "export").iterdir()}
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(source).name == "export.part":
            raise OSError("disk gone")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        written(packed(), blocks, of, tmp_path)
    left = next(path for path in (tmp_path / "export", tmp_path / "export.old") if path.exists())
    assert {file.name: file.read_bytes() for file in left.iterdir()} == before
