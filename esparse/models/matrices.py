"""The weight matrices of a block, and which of them read the same tensor.

Both are found by looking and observing, never listed per family: a Linear (or GPT-2's Conv1D) is known by its type, an
expert's matrix by being used as one while its block runs. Two layers that receive the same tensor form one input
group: they share statistics and a channel order.

Shapes: O outputs, I inputs, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

# A router decides which expert a token sees: a few weights on which everything hangs, never pruned. The mixture
# routers of transformers 5 are no Linear and are passed over anyway; these are the names of those that are.
ROUTERS = {"gate", "router", "shared_expert_gate"}


@dataclass(eq=False, slots=True)
class Matrix:
    """One weight matrix: a Linear's, a Conv1D's (stored inputs x outputs) or one expert's slice of a 3-D parameter."""

    entry: str  # name in the model's state dict
    parameter: nn.Parameter
    transposed: bool
    expert: int | None = None
    layer: nn.Module | None = None  # the Linear or Conv1D; an expert has none

    @property
    def name(self) -> str:
        """The layer's name in reports: `...mlp.down_proj`, `...experts.down_proj[3]`."""
        name = self.entry.removesuffix(".weight")
        return name if self.expert is None else f"{name}[{self.expert}]"

    def view(self) -> Tensor:
        """The stored weights as outputs x inputs, sharing memory with the model."""
        return self.part_of(self.parameter.data)

    def part_of(self, stored: Tensor) -> Tensor:
        """This matrix's part of a tensor that is stored as its parameter is, as outputs x inputs."""
        stored = stored if self.expert is None else stored[self.expert]
        return stored.T if self.transposed else stored

    def add_to_bias(self, shift_O: Tensor) -> bool:
        """Adds to the layer's bias, which it gets where it had none; False for an expert, which has no place for it."""
        if self.layer is None:
            return False
        if self.layer.bias is None:
            self.layer.bias = nn.Parameter(torch.zeros_like(self.parameter.data[:, 0]))
        assert isinstance(self.layer.bias, nn.Parameter)
        self.layer.bias.data += shift_O.to(self.layer.bias.dtype)
        return True


@dataclass(eq=False, slots=True)
class InputGroup:
    """Matrices that read the same tensor; `inputs` is its width."""

    inputs: int
    matrices: list[Matrix] = field(default_factory=list)


Reader = Callable[[InputGroup, Tensor], None]
Member = tuple[str, bool, int | None, int]  # of a group: its matrix's entry, transposed, expert; the width of the input


class BlockMatrices:
    """The prunable matrices of one block; the input groups fill up while the block runs under `observed`."""

    def __init__(self, block: nn.Module, prefix: str, skip: Sequence[str] = ()) -> None:
        self.block = block
        self._left_alone = [re.compile(pattern) for pattern in skip]
        self._layers: dict[nn.Module, Matrix] = {}
        self._stacks: dict[int, tuple[str, nn.Parameter]] = {}  # 3-D parameters by identity
        self._group_of: dict[str, InputGroup] = {}
        self.groups: list[InputGroup] = []
        for path, module in block.named_modules():
            name = f"{prefix}.{path}"
            if isinstance(module, nn.Linear | Conv1D) and not self._skipped(name):
                weight = module.get_parameter("weight")
                self._layers[module] = Matrix(f"{name}.weight", weight, isinstance(module, Conv1D), layer=module)
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and not self._skipped(f"{name}.{own}"):
                    self._stacks[id(parameter)] = (f"{name}.{own}", parameter)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that hold the matrices, by their names in the state dict."""
        of_layers = {matrix.entry: matrix.parameter for matrix in self._layers.values()}
        return of_layers | dict(self._stacks.values())

    def layers(self) -> list[Matrix]:
        """The matrices that are layers of their own; experts, which are known by their use, are not among them."""
        return list(self._layers.values())

    def _skipped(self, name: str) -> bool:
        return name.rpartition(".")[2] in ROUTERS or any(p.search(name) for p in self._left_alone)

    @contextmanager
    def observed(self, read: Reader) -> Iterator[None]:
        """While open, `read(group, x_TI)` gets the input of every group once per forward pass of the block.

        Which layers share a tensor is settled in the first pass of each layer: what they received is held until that
        pass ends, so that no address is reused.
        """
        held: dict[tuple[int, int, int], tuple[Tensor, InputGroup]] = {}

        def feed(matrix: Matrix, x: Tensor) -> None:
            group = self._group_of.get(matrix.name)
            x_TI = x.flatten(0, -2)
            if group is None:
                key = (x.data_ptr(), x.numel(), x.shape[-1])
                if key not in held or x.numel() == 0:
                    held[key] = (x, InputGroup(inputs=x.shape[-1]))
                    self.groups.append(held[key][1])
                group = held[key][1]
                group.matrices.append(matrix)
                self._group_of[matrix.name] = group
            if group.matrices[0].name == matrix.name:
                read(group, x_TI)

        def before_layer(layer: nn.Module, args: tuple[Any, ...]) -> None:
            feed(self._layers[layer], args[0])

        def after_block(*_: Any) -> None:
            held.clear()

        hooks = [layer.register_forward_pre_hook(before_layer) for layer in self._layers]
        hooks.append(self.block.register_forward_hook(after_block))
        try:
            if self._stacks:
                with _StackReads(self._stacks, feed):
                    yield
            else:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def members(self) -> list[list[Member]]:
        """The groups that were observed, as what can be told to another process."""
        return [[(m.entry, m.transposed, m.expert, group.inputs) for m in group.matrices] for group in self.groups]

    def unite(self, of_ranks: Sequence[list[list[Member]]]) -> list[list[InputGroup]]:
        """Replaces the groups by those that the ranks saw between them, in the same order wherever this is called.

        An expert may have had tokens on some of the ranks only. Returns, for every group, those that it replaces here.
        """
        united: list[dict[Member, None]] = []
        for member_list in (members for of_rank in of_ranks for members in of_rank):
            known = [group for group in united if any(member in group for member in member_list)]
            united = [group for group in united if group not in known[1:]]
            if not known:
                known = [{}]
                united += known
            for members in (*known[1:], member_list):
                known[0].update(dict.fromkeys(members))
        own = {matrix.name: (matrix, group) for group in self.groups for matrix in group.matrices}
        replaced = []
        self.groups = []
        for together in united:
            matrices = [self._matrix(*member[:3]) for member in together]
            group = InputGroup(next(iter(together))[3], [own.get(m.name, (m,))[0] for m in matrices])
            self.groups.append(group)
            self._group_of |= {matrix.name: group for matrix in matrices}
            replaced.append(list(dict.fromkeys(own[m.name][1] for m in matrices if m.name in own)))
        return replaced

    def _matrix(self, entry: str, transposed: bool, expert: int | None) -> Matrix:
        if expert is None:
            return next(matrix for matrix in self._layers.values() if matrix.entry == entry)
        parameter = next(parameter for name, parameter in self._stacks.values() if name == entry)
        return Matrix(entry, parameter, transposed, expert)

    def complete(self) -> list[str]:
        """Adds the experts that no token reached, each a group of its own; returns the names of layers never used.

        An unseen expert is stored as its siblings are.
        """
        for entry, parameter in self._stacks.values():
            seen = [m for group in self.groups for m in group.matrices if m.entry == entry]
            if not seen:
                continue
            for expert in sorted(set(range(parameter.shape[0])) - {m.expert for m in seen}):
                matrix = Matrix(entry, parameter, seen[0].transposed, expert)
                self.groups.append(InputGroup(matrix.view().shape[1], [matrix]))
        used = {matrix.name for group in self.groups for matrix in group.matrices}
        return [matrix.name for matrix in self._layers.values() if matrix.name not in used]


class _StackReads(TorchFunctionMode):
    """Notices when a slice of a 3-D parameter multiplies something: that is an expert at work.

    transformers keeps all experts of a layer in one parameter, so there is no module to hook. The eager experts
    implementation (models/load.py asks for it) multiplies one expert after the other.
    """

    def __init__(self, stacks: dict[int, tuple[str, nn.Parameter]], feed: Callable[[Matrix, Tensor], None]) -> None:
        super().__init__()
        self._feed = feed
        self._slices = {
            parameter.data_ptr() + e * parameter.stride(0) * parameter.element_size(): (entry, parameter, e)
            for entry, parameter in stacks.values()
            for e in range(parameter.shape[0])
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (linear, torch.matmul, Tensor.matmul, Tensor.__matmul__) and len(args) > 1:
            found = self._slices.get(args[1].data_ptr()) if args[1].ndim == 2 else None
            if found is not None:
                entry, parameter, expert = found
                # linear() takes outputs x inputs, a product on the right takes inputs x outputs.
                self._feed(Matrix(entry, parameter, func is not linear, expert), args[0])
        return func(*args, **(kwargs or {}))
