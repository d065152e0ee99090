"""Hidden states that wait on the host, on the device or on the disk are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esparse.evaluate.perplexity import window_losses
from esparse.metrics.wanda import Wanda
from esparse.models import host_memory, offload
from esparse.models.blocks import BlockModel
from esparse.models.offload import HiddenStateStore
from esparse.patterns import NM
from esparse.pruning.method import Method
from esparse.pruning.prune import prune
from esparse.records.report import Stages
from esparse.shuffles import NoShuffle
from tests.models.families import tiny
from tests.recoveries.test_window import window

TOKENS_SL = torch.randint(1, 96, (4, 12), generator=torch.Generator().manual_seed(5))


def results(hidden_store: HiddenStateStore, folder: Path) -> list[torch.Tensor]:
    blocks = BlockModel(tiny("llama"), device=torch.device("cpu"), batch_tokens=24, hidden_store=hidden_store)
    method = Method(metric=Wanda(), pattern=NM(2, 4), shuffle=NoShuffle(), recovery=window())
    before = window_losses(blocks, TOKENS_SL)
    prune(blocks, TOKENS_SL, method, stages=Stages())
    assert not list(folder.iterdir()), "a file was left"
    return [before, window_losses(blocks, TOKENS_SL), *blocks.model.state_dict().values()]


@pytest.mark.parametrize("place", ["device", "disk", "auto"])
def test_the_place_changes_nothing(place: str, tmp_path: Path) -> None:
    got, expected = results(HiddenStateStore(place, tmp_path), tmp_path), results(HiddenStateStore("host"), tmp_path)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_what_lies_on_the_disk_is_a_file_without_a_name(tmp_path: Path) -> None:
    values = torch.randn(2, 3, dtype=torch.bfloat16)
    kept = HiddenStateStore("disk", tmp_path).choose(1)(values)
    assert torch.equal(kept, values)
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert not list(tmp_path.iterdir())
    del kept
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_large_states_have_memory_of_their_own(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object, **__: object) -> None:
        raise OSError("Cannot allocate memory")

    values = torch.arange(3 * offload.APART).view(3, -1).T.to(dtype)
    keep = HiddenStateStore("host").choose(1)
    kept = keep(values)
    assert torch.equal(kept, values) and kept.dtype == dtype and kept.data_ptr() != values.data_ptr()
    small = values[:2]
    assert keep(small).data_ptr() == small.data_ptr()
    monkeypatch.setattr(offload.mmap, "mmap", none_left)
    assert keep(values).data_ptr() == values.data_ptr()


@pytest.mark.parametrize(("free", "on_disk"), [(41, False), (39, True)])
def test_auto_goes_to_the_disk_where_memory_is_short(
    free: int, on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "free_host_bytes", lambda: free)
    kept = HiddenStateStore("auto", tmp_path).choose(10)(torch.randn(2, 3))
    assert (str(tmp_path) in Path("/proc/self/maps").read_text()) is on_disk, kept


def test_no_room_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("esparse.models.offload._reserve", full)
    with pytest.raises(OSError, match=r"no room for activations of 4 bytes in .*No space left"):
        HiddenStateStore("disk", tmp_path).choose(1)(torch.zeros(1))
