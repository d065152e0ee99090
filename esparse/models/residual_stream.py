"""Which layers add to a block's residual stream, and what can be read of the stream behind them.

There is no table per family: a layer's output is moved, and the first tensor that moves with it, by the same times a
number, is the stream. It is what a later module reads, or what the block returns. Layers whose outputs are normalised,
gated or mixed over tokens before they are added have none.

Shapes: B sequences, L tokens of a sequence, T = B L tokens, H hidden width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 256  # tokens that are compared
ALIKE = 0.02  # of the move: what may differ


@dataclass(frozen=True, slots=True)
class Behind:
    """The residual stream behind a layer."""

    reader: str | None  # the module that reads it, by its path inside the block; None: the block returns it
    scale: float  # the layer's output is added this many times


def find(
    block: nn.Module, layers: Mapping[str, nn.Module], hidden_BLH: Tensor, run: Callable[[], Tensor]
) -> dict[str, Behind]:
    """The stream behind each of these layers that adds to it, by their names.

    `run` passes `hidden_BLH` through the block and returns its output.
    """
    hidden_TH = hidden_BLH.flatten(0, 1)
    outputs: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def noting(name: str) -> Callable[..., None]:
        def note(_: nn.Module, __: Any, out: Any) -> None:
            calls[name] += 1
            if isinstance(out, Tensor) and is_one(out, hidden_TH):
                outputs[name] = out.reshape(hidden_TH.shape)[:ROWS].float()

        return note

    hooks = [layer.register_forward_hook(noting(name)) for name, layer in layers.items()]
    before = _tensors(block, hidden_TH, run)
    for hook in hooks:
        hook.remove()
    move_TH = hidden_TH.roll(1, 0)  # each token its own, as large as the stream is

    def moved(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out + move_TH.to(out).view(out.shape)

    found = {}
    for name, out_TH in outputs.items():
        if calls[name] > 1:
            continue
        hook = layers[name].register_forward_hook(moved)
        after = _tensors(block, hidden_TH, run)
        hook.remove()
        for reader, is_TH in before.items():
            # What the tensors were rounded to is no difference.
            rounding_T = torch.finfo(hidden_TH.dtype).eps * is_TH.norm(dim=1)
            if reader not in after or _times(is_TH, out_TH, rounding_T):  # the output itself, before it is added
                continue
            scale = _times(after[reader] - is_TH, move_TH[:ROWS].float(), rounding_T)
            if scale:
                found[name] = Behind(reader, scale)
                break
    return found


@contextmanager
def reading(block: nn.Module, readers: Collection[str], read: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, `read` gets what each of these modules of the block reads."""

    def before(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if x is not None:
                read(name, x)

        return note

    hooks = [block.get_submodule(name).register_forward_pre_hook(before(name), with_kwargs=True) for name in readers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(block: nn.Module, hidden_TH: Tensor, run: Callable[[], Tensor]) -> dict[str | None, Tensor]:
    """Some tokens of every tensor of the stream's size that a module reads or the block returns, in this order."""
    seen: dict[str | None, Tensor] = {}

    def note(name: str | None, x: Tensor) -> None:
        if name not in seen and is_one(x, hidden_TH):
            seen[name] = x.reshape(hidden_TH.shape)[:ROWS].float().clone()

    with reading(block, {name for name, _ in block.named_modules() if name}, note):
        out = run()
    note(None, out)
    return seen


def is_one(x: Tensor, hidden: Tensor) -> bool:
    """Whether a tensor has the stream's size."""
    return x.shape[-1:] == hidden.shape[-1:] and x.numel() == hidden.numel()


def _times(x_TH: Tensor, of_TH: Tensor, rounding_T: Tensor) -> float:
    """The number that `of_TH` is multiplied by to get `x_TH`; 0 if there is none for most tokens."""
    scale = (x_TH * of_TH).sum() / of_TH.square().sum()
    apart_T = (x_TH - scale * of_TH).norm(dim=1) - ALIKE * (scale * of_TH).norm(dim=1) - rounding_T
    return float(scale) if bool(apart_T.median() <= 0) else 0.0
