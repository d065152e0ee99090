"""Files beside a record for checking a run: keep masks, channel orders, calibration tokens.

masks.safetensors: one uint8 entry per pruned weight under its name in the model's state dict, bit-packed along the
columns (numpy.packbits: most significant bit first, 1 = kept), rows = outputs, columns = inputs, experts in front; the
metadata's `shapes` has the true shapes, as JSON. orders.safetensors (only with a shuffle): the channel (int32) at each
place when the pattern's groups are cut.
channels.safetensors (only with profile=true): `entropy/LAYER` (nats), `norm/LAYER` (root mean square) and `score/LAYER`
(mean of a column), float32, of each input channel in its own order; LAYER is the first of the layers that read it.
scales.safetensors (only of a quantised run): by what codes become values, columns in the order of orders.safetensors:
`scale/NAME` (outputs x groups of columns, float32), `zero/NAME` (uint8, the code of zero; only without symmetry),
`whole/NAME` (bit-packed as masks are, 1 = an outlier that stays in 16 bits; only with outliers).
calibration_tokens.safetensors: `tokens` (int32, sequences x length).
window_losses.safetensors: `dense/CORPUS` and `pruned/CORPUS`, the mean loss (nats, float64) of every window, so that
two runs can be compared window by window.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from esparse.records.report import write_whole


def pack(keep: Tensor) -> Tensor:
    """A boolean mask as bytes on the host, row by row, its last dimension shortened to ceil(columns / 8).

    A mask of weights that lie transposed (GPT-2's Conv1D) may lie so too, and its bytes would; files refuse that.
    """
    if keep.device.type == "cpu":
        return torch.from_numpy(np.packbits(keep.numpy(), axis=-1)).contiguous()
    return _packed(keep).cpu().contiguous()  # an eighth of what the mask would take on its way


def _packed(keep: Tensor) -> Tensor:
    eight = torch.nn.functional.pad(keep, (0, -keep.shape[-1] % 8)).unflatten(-1, (-1, 8))
    powers = torch.tensor([128 >> bit for bit in range(8)], dtype=torch.uint8, device=keep.device)
    return (eight * powers).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: list[int]) -> Tensor:
    """The boolean mask of this shape: the inverse of `pack`."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=shape[-1]).astype(bool)).view(shape)


class Masks(Mapping[str, Tensor]):
    """Keep masks by weight name, bit-packed, because a large model's boolean masks would fill the memory."""

    def __init__(self, keeps: Mapping[str, Tensor] | None = None) -> None:
        self.packed: dict[str, Tensor] = {}
        self.shapes: dict[str, list[int]] = {}
        for name, keep in (keeps or {}).items():
            self.put(name, keep)

    def put(self, name: str, keep: Tensor) -> None:
        self.packed[name], self.shapes[name] = pack(keep), list(keep.shape)

    def take(self, other: Masks) -> None:
        """Adds the masks of others, whose names are not among these."""
        self.packed |= other.packed
        self.shapes |= other.shapes

    def put_expert(self, name: str, keep_OI: Tensor, expert: int, experts: int) -> None:
        """Stores an expert's mask, one of several under one name."""
        packed = pack(keep_OI)
        self.shapes[name] = [experts, *keep_OI.shape]
        self.packed.setdefault(name, packed.new_zeros(experts, *packed.shape))[expert] = packed

    def __getitem__(self, name: str) -> Tensor:
        return unpack(self.packed[name], self.shapes[name])

    def of(self, name: str, expert: int | None) -> Tensor:
        """The mask O x I of a matrix; `expert`: its number, if several are stored under the name."""
        if expert is None:
            return self[name]
        return unpack(self.packed[name][expert], self.shapes[name][1:])

    def __iter__(self) -> Iterator[str]:
        return iter(self.packed)

    def __len__(self) -> int:
        return len(self.packed)


def write(
    folder: Path,
    keeps: Mapping[str, Tensor],
    orders: Mapping[str, Tensor],
    tokens_SL: Tensor,
    losses: Mapping[str, Mapping[str, Tensor]],
    channels: Mapping[str, Tensor] | None = None,
    grids: Mapping[str, Tensor] | None = None,
) -> int:
    """Writes the files; returns the bytes of the packed masks. `losses`: W values, by dense or pruned and by corpus."""
    masks = keeps if isinstance(keeps, Masks) else Masks(keeps)
    # One entry: several would come in any order, and equal masks would not be equal files.
    shapes = {"shapes": json.dumps(masks.shapes, sort_keys=True)}
    write_whole(folder / "masks.safetensors", lambda draft: save_file(masks.packed, draft, metadata=shapes))
    if orders:
        as_int32 = {name: order.to(torch.int32) for name, order in orders.items()}
        write_whole(folder / "orders.safetensors", lambda draft: save_file(as_int32, draft))
    if channels:
        write_whole(folder / "channels.safetensors", lambda draft: save_file(dict(channels), draft))
    if grids:
        write_whole(folder / "scales.safetensors", lambda draft: save_file(dict(grids), draft))
    by_window = {f"{which}/{corpus}": value for which, of in losses.items() for corpus, value in of.items()}
    write_whole(folder / "window_losses.safetensors", lambda draft: save_file(by_window, draft))
    tokens = {"tokens": tokens_SL.to(torch.int32).contiguous()}
    write_whole(folder / "calibration_tokens.safetensors", lambda draft: save_file(tokens, draft))
    return sum(mask.numel() for mask in masks.packed.values())


def read_masks(folder: Path) -> dict[str, Tensor]:
    """The keep masks of a finished run by weight name."""
    with safe_open(folder / "masks.safetensors", framework="pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
        return {name: unpack(file.get_tensor(name), shape) for name, shape in shapes.items()}
