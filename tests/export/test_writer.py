"""What goes into a checkpoint's files, and what is there when writing one fails."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from esparse.errors import Mistake
from esparse.export.place import WORKSHOP_MARK, check_place, workshop_of
from esparse.export.writer import _tensors, cast
from esparse.models.blocks import BlockModel
from tests.export.test_export import CPU, dense, packed, pruned, written
from tests.models.families import tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_negative_zero_is_written(dtype: torch.dtype) -> None:
    value = torch.tensor([-0.0, -1e-42, -1.0])  # the second one becomes a zero in half precision
    written = cast(value, dtype, "w")
    assert written.dtype == dtype and written[2] == -1
    assert not (written.signbit() & (written == 0)).any()
    assert value.signbit().all()  # and the model is left as it is
    places = torch.arange(3)
    copied = cast(places, dtype, "w")
    assert copied.dtype == torch.int64 and copied.data_ptr() != places.data_ptr()


@pytest.mark.tries(2)
@pytest.mark.parametrize(
    ("make", "family", "name"),
    [
        (dense, "llama", "model.layers.1.mlp.up_proj.weight"),
        (packed, "llama", "model.layers.1.mlp.up_proj.weight"),
        (packed, "llama", "model.norm.weight"),
        (packed, "mixtral", "model.layers.1.mlp.experts.down_proj"),
    ],
)
def test_a_value_too_large_for_the_dtype_is_refused_with_its_tensor(
    make: Any, family: str, name: str, tmp_path: Path
) -> None:
    """It became Inf, and the checkpoint computed NaN."""
    blocks = BlockModel(tiny(family), device=CPU, batch_tokens=24)
    of = pruned(blocks)
    value = blocks.model.get_parameter(name).data
    value.view(-1)[value.view(-1).nonzero()[0]] = -65536.0
    words = f"{name} has a value of 65536, and the largest of float16 is 65504: export in bfloat16 or float32"
    with pytest.raises(Mistake, match=re.escape(words)):
        written(make(dtype="float16", order="original"), blocks, of, tmp_path)
    assert not list(tmp_path.iterdir())
    written(make(dtype="bfloat16", order="original"), blocks, of, tmp_path)


def test_what_is_infinite_before_it_is_cast_stays_so() -> None:
    assert torch.equal(
        cast(torch.tensor([-torch.inf, 65504.0]), torch.float16, "w"), torch.tensor([-torch.inf, 65504]).half()
    )
    with pytest.raises(Mistake, match=r"w has a value of 3\.4\d*e\+38, and the largest of bfloat16 is 3\.38953e\+38"):
        cast(torch.tensor([torch.finfo(torch.float32).max, torch.inf]), torch.bfloat16, "w")


def test_buffers_that_belong_to_a_checkpoint_are_in_it_and_tied_weights_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[1].register_buffer("kept", torch.ones(1))
    model[1].register_buffer("made anew", torch.ones(1), persistent=False)
    by_hand = {"0.weight", "0.bias", "1.weight", "1.bias", "1.kept"}  # nobody ties these again
    assert set(_tensors(model, lambda name: True)) == by_hand
    model.all_tied_weights_keys = {"1.weight": "0.weight"}  # type: ignore[assignment]  # transformers ties these
    assert set(_tensors(model, lambda name: True)) == by_hand - {"1.weight"}
    assert set(_tensors(model, lambda name: name.startswith("1."))) == {"1.bias", "1.kept"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_checkpoint_before_is_there_until_the_new_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)
    of = pruned(blocks)
    written(dense(), blocks, of, tmp_path)
    before, replace = contents(tmp_path), os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target).name == "export" and Path(source).name == "new":
            raise OSError("disk gone")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        written(packed(), blocks, of, tmp_path)
    assert contents(tmp_path) == before


def test_what_a_killed_export_left_is_removed_and_the_checkpoint_before_put_back(tmp_path: Path) -> None:
    """A process that is killed between the two moves leaves the checkpoint before in the workshop."""
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)
    of = pruned(blocks)
    written(dense(), blocks, of, tmp_path)
    before, workshop = contents(tmp_path), workshop_of(tmp_path / "export")
    workshop.mkdir()
    (workshop / WORKSHOP_MARK).touch()
    (workshop / "new").mkdir()
    (tmp_path / "export").rename(workshop / "old")
    of.groupings[0][0].parameter.data[0] = 1.0  # no longer 2:4: packing fails
    with pytest.raises(ValueError, match="do not hold 2:4"):
        written(packed(order="original"), blocks, of, tmp_path)
    assert contents(tmp_path) == before


def test_folders_of_similar_names_are_the_users(tmp_path: Path) -> None:
    """`mv export export.old` keeps a model; a folder in which esparse would write is left unless esparse made it."""
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)
    of = pruned(blocks)
    for name in ("export.old", "export.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    mine = contents(tmp_path)
    for _ in range(2):
        written(dense(), blocks, of, tmp_path)
    assert mine.items() <= contents(tmp_path).items()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "export.old", "export.part"]
    workshop = workshop_of(tmp_path / "export")
    workshop.mkdir()
    (workshop / WORKSHOP_MARK).touch()
    (workshop / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"\.export\.esparse-part, in which .* holds other files"):
        written(dense(), blocks, of, tmp_path)
    assert (workshop / "mine.txt").read_text() == "mine"


def test_an_export_through_a_link_leaves_the_link(tmp_path: Path) -> None:
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)
    of = pruned(blocks)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    for _ in range(2):
        facts = written(dense(path=str(tmp_path / "link")), blocks, of, tmp_path)
        assert facts["path"] == str(tmp_path / "link") and (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "model" / "esparse.json").is_file()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("/proc/x", "nothing can be written to /"),
        ("file/x", "file is no folder, so that nothing can be written there"),
        (".", "is the folder of this process"),
        ("..", "is there already"),
        ("disk", "disk is a mounted disk"),
        (f"{'x' * 250}", "nothing can be written to"),
    ],
)
def test_a_place_that_takes_no_export_is_found_before_any_work(
    place: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "esparse.json").write_text("{}")
    (tmp_path / "own" / "file").write_text("")
    monkeypatch.chdir(tmp_path / "own")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    before = contents(tmp_path)
    with pytest.raises(Mistake, match=re.escape(words)):
        check_place(Path(place))
    assert contents(tmp_path) == before and len(list(tmp_path.rglob("*"))) == 3


def test_looking_at_a_place_leaves_nothing_there(tmp_path: Path) -> None:
    check_place(tmp_path / "new" / "model")
    assert not list(tmp_path.iterdir())
