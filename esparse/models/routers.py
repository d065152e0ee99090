"""Finds routers: layers that decide which experts run, or how streams are mixed.

Routers are tiny and critical, so they are never pruned. Most are seen at work: a layer's output is followed through
operations that keep its size and are no products, until experts are chosen (top-k, sort, argmax) or weighed (softmax)
by it. Layers that turn a router's decision into coefficients count as routers, too. A layer's name helps if the choice
cannot be seen, as in a custom kernel or in NumPy. Gates that only scale hidden states are layers like others.
"""

from __future__ import annotations

import re
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

_CHOICES = {
    *(torch.topk, Tensor.topk, torch.sort, Tensor.sort, torch.argsort, Tensor.argsort, torch.argmax, Tensor.argmax),
    *(torch.softmax, Tensor.softmax, nn.functional.softmax, nn.functional.gumbel_softmax),
    *(torch.multinomial, Tensor.multinomial, torch.kthvalue, Tensor.kthvalue),
}
# A product mixes values: attention's scores of L tokens are as many as its queries if these have L channels.
_PRODUCTS = {
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm),
    *(torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm, torch.einsum, torch.tensordot),
    *(nn.functional.linear, nn.functional.scaled_dot_product_attention),
}
_GATE = re.compile(r"gate|gating|wg")
# Names of modules; a gate beside such a module is a router.
_EXPERTS = re.compile(r"experts?")


def named(block: nn.Module, path: str, outputs: int, inputs: int) -> bool:
    """Whether a layer is a router by its path inside the block and its shape."""
    parts = path.split(".")
    if any("router" in part for part in parts):
        return True
    if outputs == 1:  # it scales a whole expert, or a whole layer
        return "gate" in parts[-1]
    if outputs > inputs // 2:
        return False  # it scales every channel
    for place, part in enumerate(parts):
        if _GATE.fullmatch(part):
            beside = block.get_submodule(".".join(parts[:place]))
            if any(_EXPERTS.search(name) for name in (*parts[:place], *dict(beside.named_children()))):
                return True
    return False


class Watch(TorchFunctionMode):
    """While open, adds the names of a block's layers that are seen to route to `found`; `name` is the block's name."""

    def __init__(self, block: nn.Module, name: str, found: set[str]) -> None:
        super().__init__()
        self._block = block
        self._found = found
        self._names = {m: f"{name}.{path}" for path, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        self._made: dict[int, tuple[Tensor, str]] = {}  # by id: a tensor, kept alive, and the layer that made it
        self._decisions: dict[int, Tensor] = {}  # tensors computed from routers' outputs
        self._hooks: list[Any] = []

    def __enter__(self) -> Watch:
        for layer, name in self._names.items():
            self._hooks.append(layer.register_forward_hook(partial(self._left, name)))
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        super().__exit__(kind, error, at)
        for hook in self._hooks:
            hook.remove()
        self._made.clear()
        self._decisions.clear()

    def _left(self, name: str, layer: nn.Module, args: Any, out: Tensor) -> None:
        if args and isinstance(args[0], Tensor) and id(args[0]) in self._decisions:
            self._found.add(name)
        self._made[id(out)] = (out, name)
        if name in self._found or any("router" in part for part in name.split(".")):
            self._decisions[id(out)] = out

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        first = args[0] if args else (kwargs or {}).get("input")
        sources = [value for value in (first, *args[1:2]) if isinstance(value, Tensor)]
        if func in _CHOICES and isinstance(first, Tensor) and id(first) in self._made:
            self._found.add(self._made[id(first)][1])
        if isinstance(out, Tensor) and func not in _PRODUCTS:
            for source in sources:
                if id(source) in self._made and out.numel() == source.numel() and out is not source:
                    self._made.setdefault(id(out), (out, self._made[id(source)][1]))
                if id(source) in self._decisions and out.numel() == source.numel():
                    self._decisions[id(out)] = out
        return out
