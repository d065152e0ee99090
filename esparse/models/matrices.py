"""Finds the weight matrices of a block, and which of them read the same tensor.

There is no table per family: a Linear (or GPT-2's Conv1D) is known by its type, an expert's matrix by its products
while the block runs, however the experts are stored. Two layers that receive the same tensor form one input group: they
share statistics and a channel order. Routers (models/routers.py) do not count as matrices.

Shapes: O outputs, I inputs, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from esparse.models import routers
from esparse.models.layer_names import found_in
from esparse.models.multiplying import multiplies

_NO_PRODUCTS = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # their weights are in no matrix product
_EXPERTS = re.compile(r"expert")


@dataclass(eq=False, slots=True)
class Matrix:
    """One weight matrix: a Linear's, a Conv1D's (stored inputs x outputs) or one expert's part of a parameter.

    A parameter stacks its experts: along a first dimension or, if it has 2 dimensions, as runs of rows.
    """

    entry: str  # name in the model's state dict
    parameter: nn.Parameter
    transposed: bool
    expert: int | None = None
    layer: nn.Module | None = None  # the Linear or Conv1D; an expert has none
    rows: int = 0  # of each expert, if the parameter has 2 dimensions
    together: bool = False  # whether one operation multiplies all experts

    @property
    def name(self) -> str:
        """The layer's name in reports: `...mlp.down_proj`, `...experts.down_proj[3]`."""
        name = self.entry.removesuffix(".weight")
        return name if self.expert is None else f"{name}[{self.expert}]"

    def view(self) -> Tensor:
        """The weights as outputs x inputs; shares memory with the model."""
        return self.part_of(self.parameter.data)

    def part_of(self, stored: Tensor) -> Tensor:
        """This matrix's part of a tensor that is laid out like its parameter, as outputs x inputs."""
        stored = stored if self.expert is None else self.stack_of(stored)[self.expert]
        return stored.T if self.transposed else stored

    def stack_of(self, stored: Tensor) -> Tensor:
        """A tensor that is laid out like the parameter, viewed with the experts as the first of three dimensions."""
        return stored.unflatten(0, (-1, self.rows)) if self.rows else stored

    @property
    def experts(self) -> int:
        """The number of experts in the parameter."""
        return len(self.parameter) // (self.rows or 1)

    def add_to_bias(self, shift_O: Tensor) -> bool:
        """Adds to the layer's bias, creating it if needed; returns False for an expert, which cannot have a bias."""
        if self.layer is None:
            return False
        if self.layer.bias is None:
            self.layer.bias = nn.Parameter(torch.zeros_like(self.parameter.data[:, 0]))
        assert isinstance(self.layer.bias, nn.Parameter)
        self.layer.bias.data += shift_O.to(self.layer.bias.dtype)
        return True


@dataclass(eq=False, slots=True)
class InputGroup:
    """Matrices that read the same tensor; `inputs` is the tensor's width."""

    inputs: int
    matrices: list[Matrix] = field(default_factory=list)


Reader = Callable[[InputGroup, Tensor], None]
# Of a group: its matrix's entry, transposed, expert; the width of the input; the matrix's rows, together.
Member = tuple[str, bool, int | None, int, int, bool]


class _Regrouped(Exception):
    """Ends a pass over the block that showed other groups than assumed."""


class BlockMatrices:
    """The prunable matrices of one block; running the block under `observed` finds their input groups."""

    def __init__(
        self, block: nn.Module, prefix: str, skip: Sequence[str] = (), routers_seen: Collection[str] = ()
    ) -> None:
        """`skip`: regular expressions of weights or modules that stay dense. `routers_seen`: known routers by name."""
        self.block = block
        self._prefix = prefix
        self._layers: dict[nn.Module, Matrix] = {}
        self._stacks: dict[int, tuple[str, nn.Parameter]] = {}  # parameters that may hold experts, by identity
        self._flat: set[str] = set()  # of these, the ones with 2 dimensions: only their use shows whether they do
        self._group_of: dict[str, InputGroup] = {}
        self._apart: dict[str, int] = {}  # matrices that share a group only with those of the same number
        self.groups: list[InputGroup] = []
        self.others: dict[str, str] = {}  # layers that do not multiply by their weight, and their classes
        of_block = prefix.count(".") + 1  # parts of the block's name
        for path, module in block.named_modules():
            name = f"{prefix}.{path}".rstrip(".")
            if name in routers_seen:
                continue
            if isinstance(module, nn.Linear | Conv1D):
                if found_in(skip, f"{name}.weight", of_block):
                    continue
                weight = module.get_parameter("weight")
                outputs, inputs = weight.shape[::-1] if isinstance(module, Conv1D) else weight.shape
                if routers.named(block, path, outputs, inputs):
                    continue
                if not multiplies(module):
                    self.others[name] = type(module).__name__
                else:
                    self._layers[module] = Matrix(f"{name}.weight", weight, isinstance(module, Conv1D), layer=module)
                continue
            if isinstance(module, _NO_PRODUCTS):
                continue
            for own, parameter in module.named_parameters(recurse=False):
                entry = f"{name}.{own}"
                if parameter.ndim not in (2, 3) or found_in(skip, entry, of_block):
                    continue
                if "router" not in f"{path}.{own}" and not own.endswith("bias"):
                    self._stacks[id(parameter)] = (entry, parameter)
                    if parameter.ndim == 2:
                        self._flat.add(entry)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters with the matrices, by their names in the state dict.

        Parameters of 2 dimensions that belong to no layer count if they lie among experts, or were seen to hold
        experts.
        """
        used = {matrix.entry for group in self.groups for matrix in group.matrices}
        stacks = {
            entry: parameter
            for entry, parameter in self._stacks.values()
            if entry not in self._flat or entry in used or _EXPERTS.search(entry)
        }
        return {matrix.entry: matrix.parameter for matrix in self._layers.values()} | stacks

    def layers(self) -> list[Matrix]:
        """The matrices that are layers; experts inside parameters are not among them."""
        return list(self._layers.values())

    def watch(self, begin: Callable[[], Reader], run: Callable[[], None]) -> None:
        """Finds the groups: calls `run`, which runs the block, with the reader that `begin` returns.

        Layers with one first input form one group. If one of them then reads another tensor than the others, they are
        put into groups of their own, and both are called again.
        """
        while True:
            with suppress(_Regrouped), self.observed(begin(), regroup=True):
                run()
                return

    @contextmanager
    def observed(self, read: Reader, *, regroup: bool = False) -> Iterator[None]:
        """While open, calls `read(group, x_TI)` with the input of every group, once per forward pass of the block.

        The first pass of each layer decides which layers share a tensor; it keeps all inputs alive until it ends, so
        that no address is used twice.
        """
        held: dict[tuple[int, ...], tuple[Tensor, InputGroup]] = {}
        reads: dict[str, list[tuple[int, ...]]] = {}  # the inputs of each matrix in this pass

        def feed(matrix: Matrix, x: Tensor, seen: Tensor | None = None) -> None:
            """`seen`: the rows of x that are tokens; default: all."""
            group = self._group_of.get(matrix.name)
            x_TI = _rows(x if seen is None else seen)
            key: tuple[int, ...] = (x.data_ptr(), x.numel(), x.shape[-1], version(x))
            reads.setdefault(matrix.name, []).append(key)
            if group is None:
                key += (self._apart.get(matrix.name, 0),)
                if key not in held or x.numel() == 0:
                    held[key] = (x, InputGroup(inputs=x.shape[-1]))
                    self.groups.append(held[key][1])
                group = held[key][1]
                group.matrices.append(matrix)
                self._group_of[matrix.name] = group
            if group.matrices[0].name == matrix.name:
                # A block may run in inference mode; tensors that are made while it is read must stay changeable.
                with torch.inference_mode(False), torch.no_grad():
                    read(group, x_TI)

        def before_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            feed(self._layers[layer], input_of(args, kwargs))

        def after_block(*_: Any) -> None:
            held.clear()
            if regroup and self._parted(reads):
                raise _Regrouped
            reads.clear()

        hooks = [layer.register_forward_pre_hook(before_layer, with_kwargs=True) for layer in self._layers]
        hooks.append(self.block.register_forward_hook(after_block))
        try:
            if self._stacks:
                with _StackReads(self._stacks.values(), feed):
                    yield
            else:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _parted(self, reads: Mapping[str, Sequence[tuple[int, ...]]]) -> bool:
        """Forgets all groups if matrices of one group read different tensors, and notes which go together."""
        found = False
        for group in self.groups:
            alike: dict[tuple[tuple[int, ...], ...], list[str]] = {}
            for matrix in group.matrices:
                alike.setdefault(tuple(reads.get(matrix.name, ())), []).append(matrix.name)
            for names in list(alike.values())[1:]:
                self._apart |= dict.fromkeys(names, 1 + max(self._apart.values(), default=0))
                found = True
        if found:
            self.groups, self._group_of = [], {}
        return found

    def members(self) -> list[list[Member]]:
        """The observed groups in a form that can be sent to another process."""
        return [
            [(m.entry, m.transposed, m.expert, group.inputs, m.rows, m.together) for m in group.matrices]
            for group in self.groups
        ]

    def unite(self, of_ranks: Sequence[list[list[Member]]]) -> list[list[InputGroup]]:
        """Replaces the groups by the union of all ranks' groups, in the same order on every rank.

        (An expert may get tokens on some ranks only.) Returns for every group the groups that it replaces on this rank.
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
            matrices = [self._matrix(*member[:3], *member[4:]) for member in together]
            group = InputGroup(next(iter(together))[3], [own.get(m.name, (m,))[0] for m in matrices])
            self.groups.append(group)
            self._group_of |= {matrix.name: group for matrix in matrices}
            replaced.append(list(dict.fromkeys(own[m.name][1] for m in matrices if m.name in own)))
        return replaced

    def _matrix(
        self, entry: str, transposed: bool, expert: int | None, rows: int = 0, together: bool = False
    ) -> Matrix:
        if expert is None:
            return next(matrix for matrix in self._layers.values() if matrix.entry == entry)
        parameter = next(parameter for name, parameter in self._stacks.values() if name == entry)
        return Matrix(entry, parameter, transposed, expert, rows=rows, together=together)

    def complete(self) -> list[str]:
        """Adds each expert that no token reached as a group of its own; returns the names of unused layers.

        Such an expert has its siblings' layout. If experts are modules in a list, siblings are the layers whose names
        differ only in the number.
        """
        for entry, _ in self._stacks.values():
            seen = [m for group in self.groups for m in group.matrices if m.entry == entry]
            if not seen:
                continue
            first = seen[0]
            for expert in sorted(set(range(first.experts)) - {m.expert for m in seen}):
                matrix = replace(first, expert=expert)
                self.groups.append(InputGroup(matrix.view().shape[1], [matrix]))
        used = {matrix.name for group in self.groups for matrix in group.matrices}
        siblings = {_numbered(name) for name in used}
        left = []
        for matrix in self._layers.values():
            if matrix.name in used:
                continue
            inside = matrix.name.removeprefix(self._prefix)
            if _EXPERTS.search(inside) and _NUMBER.search(inside) and _numbered(matrix.name) in siblings:
                self.groups.append(InputGroup(matrix.view().shape[1], [matrix]))
            else:
                left.append(matrix.name)
        return left


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a layer reads: its one argument."""
    return args[0] if args else next(iter(kwargs.values()))


def version(x: Tensor) -> int:
    """How often the tensor was written to; tensors made in inference mode do not know."""
    return 0 if x.is_inference() else x._version


def _rows(x: Tensor) -> Tensor:
    return x[None] if x.ndim == 1 else x.flatten(0, -2)


_NUMBER = re.compile(r"\.\d+(?=\.)")


def _numbered(name: str) -> str:
    """A layer's name without indices of lists."""
    return _NUMBER.sub(".*", name)


class _StackReads(TorchDispatchMode):
    """Sees products with a part of a parameter: each is the product of an expert.

    A family that stores all experts of a layer in one parameter has no module per expert to hook. Whatever function
    it calls, the products arrive here as a few operations on two operands, one of which lies in the parameter's
    memory: expert by expert (mm, mv), or all at once (bmm, grouped_mm).
    """

    def __init__(self, stacks: Iterable[tuple[str, nn.Parameter]], feed: Callable[..., None]) -> None:
        super().__init__()
        self._feed = feed
        self._stacks = [(p.data_ptr(), p.data_ptr() + p.nbytes, entry, p) for entry, p in stacks]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        operation = func.overloadpacket
        if operation in (aten.mm, aten.addmm, aten.linear, aten.mv, aten.addmv):
            left, right = args[1:3] if operation in (aten.addmm, aten.addmv) else args[:2]
            if operation is aten.linear:
                self._product(left.flatten(0, -2), right.T)
            elif right.ndim == 1:
                self._product(right[None], left.T)
            elif not self._product(left, right):
                self._product(right.T, left.T)
        elif operation in (aten.bmm, aten.baddbmm):
            left, right = args[1:3] if operation is aten.baddbmm else args[:2]
            if self._at(right) is None and self._at(left) is not None:
                left, right = right.mT, left.mT
            if self._at(right) is not None:
                for x_TI, weight_IO in zip(left, right, strict=True):
                    # Every expert gets a row for every token, zeros for tokens of other experts.
                    self._product(x_TI, weight_IO, x_TI[x_TI.any(-1)])
        elif operation is getattr(aten, "_grouped_mm", None) and args[1].ndim == 3 and args[0].ndim == 2:
            x_TI, weight_EIO = args[:2]
            ends = (args[2] if len(args) > 2 else kwargs["offs"]).tolist()
            for weight_IO, begin, end in zip(weight_EIO, [0, *ends[:-1]], ends, strict=True):
                if end > begin:
                    self._product(x_TI[begin:end], weight_IO)
        return func(*args, **(kwargs or {}))

    def _at(self, weight: Tensor) -> tuple[int, str, nn.Parameter] | None:
        """The parameter whose memory contains this tensor's start, and the offset in elements."""
        place = weight.data_ptr()
        for begin, end, entry, parameter in self._stacks:
            if begin <= place < end:
                return (place - begin) // parameter.element_size(), entry, parameter
        return None

    def _product(self, x_TI: Tensor, weight_IO: Tensor, seen_TI: Tensor | None = None) -> bool:
        """Feeds the expert that the weight belongs to; returns whether it belongs to one."""
        found = self._at(weight_IO)
        if found is None or weight_IO.ndim != 2:
            return False
        offset, entry, parameter = found
        inputs, outputs = weight_IO.shape
        across, along = parameter.stride()[-2:]
        # The right factor of a product has inputs as rows; a Linear stores its weight the other way round.
        if weight_IO.stride() == (across, along):
            transposed, height, width = True, inputs, outputs
        elif weight_IO.stride() == (along, across):
            transposed, height, width = False, outputs, inputs
        else:
            return False
        if parameter.ndim == 3:
            rows, (high, wide) = 0, parameter.shape[1:]
            # Parts of an expert (gate, up) read the same input; the first part counts for the whole.
            whole = (height == high) if transposed else (width == wide)
            expert, rest = divmod(offset, parameter.stride(0))
        else:
            rows = height
            whole = width == parameter.shape[1] and len(parameter) % rows == 0
            whole &= rows < len(parameter) or (bool(_EXPERTS.search(entry)) and outputs > 1)
            expert, rest = divmod(offset, rows * parameter.stride(0))
        if not whole or rest:
            return False
        matrix = Matrix(entry, parameter, transposed, expert, rows=rows, together=seen_TI is not None)
        self._feed(matrix, x_TI, seen_TI)
        return True
