"""Finds which module produces each tensor inside a block and which layers read it, without a table per family.

Observing a forward pass shows which layers read a norm's output. Whether a matrix makes a tensor is tested: its rows
are multiplied by powers of two, which is exact in any dtype, and the tensor must follow channel by channel. That no
other module reads the tensor is verified on the block's output.

Shapes: T tokens, I channels of a tensor, R rows of its producer, V rows of them that make it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from esparse.models.block import Block
from esparse.models.matrices import BlockMatrices, InputGroup, Matrix, Reader
from esparse.models.producers import Edge, Producer, row_maps, row_sets

SAMPLE = 1024  # tokens for testing a producer, spread over a micro-batch


class _Seen(Exception):
    """Ends a block's forward pass after the wanted tensor was seen."""


class BlockGraph:
    """The dataflow graph of one block; `watch` comes first. Skipped layers are in it as readers."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.matrices = BlockMatrices(block.module, block.name)
        self._norms: dict[str, nn.Module] = {}
        self._routers: dict[str, nn.Module] = {}
        for path, module in block.module.named_modules():
            name = f"{block.name}.{path}".rstrip(".")
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            if weight is not None and weight.ndim == 1:
                self._norms[name] = module
            elif weight is not None and weight.ndim == 2 and f"{name}.weight" not in self.matrices.parameters():
                self._routers[name] = module
        own = {id(parameter) for parameter in block.module.parameters()}
        self._elsewhere = [
            parameter
            for name, parameter in block.activations.blocks.model.named_parameters(remove_duplicate=False)
            if id(parameter) in own and not name.startswith(f"{block.name}.")
        ]
        self._source: dict[InputGroup, str | None] = {}  # the norm whose output a group reads
        self._router_source: dict[str, str | None] = {}
        self._busiest: dict[InputGroup, tuple[int, int]] = {}  # its most tokens in a micro-batch, and minus which
        self._unused: list[nn.Parameter] = []
        # What the block returns for the first micro-batch, in float32: its output, then what it passes on beside it.
        self._returned: list[Tensor] = [torch.empty(0)]

    def watch(self, read: Reader) -> None:
        """Runs the block over all micro-batches and observes it; `read(group, x_TI)` gets the input of every group."""
        made: dict[str, Tensor] = {}  # of the present micro-batch
        batch = 0

        def begin() -> Reader:
            self._source.clear()
            self._busiest.clear()
            return observe

        def observe(group: InputGroup, x_TI: Tensor) -> None:
            if len(x_TI):
                if group not in self._source:
                    self._source[group] = _source(x_TI, made)
                self._busiest[group] = max(self._busiest.get(group, (0, 0)), (len(x_TI), -batch))
            read(group, x_TI)

        def run() -> None:
            nonlocal batch
            for batch in range(len(self.block.activations.hidden)):
                made.clear()
                with self._norms_and_routers(made):
                    self.block.activations.run(self.block.index, batch)

        self.matrices.watch(begin, run)
        self._returned = self._wide()
        self._settle()

    def edges(self) -> tuple[list[list[Edge]], list[InputGroup]]:
        """The edges, those nearer the block's end first, and the groups without a known producer.

        All readers of one norm's output form one edge. The edges of one parameter's experts are in one list.
        """
        edges: list[list[Edge]] = []
        unmatched: list[InputGroup] = []
        seen: set[InputGroup] = set()
        for group in self.matrices.groups:
            if group in seen:
                continue
            together = self._together(group)
            seen |= set(together)
            asked = max(together, key=lambda g: self._busiest.get(g, (0, 0)))
            producer = self.producer(asked) if asked in self._busiest else None
            if producer is None:
                unmatched += together
            elif producer.matrix is None:
                names = [name for name, norm in self._router_source.items() if norm == producer.name]
                routers = [self._routers[name].get_parameter("weight").data for name in names]
                edges.append([Edge(producer, together, routers)])
            else:
                experts = [(g, g.matrices[0].expert) for g in together]
                edges.append([Edge(producer if e is None else producer.of_expert(e), [g], []) for g, e in experts])
        return edges[::-1], unmatched

    def producer(self, group: InputGroup) -> Producer | None:
        """The producer of the tensor that a group reads; None if none was found that could absorb a change."""
        norm = self._source[group]
        before_TI = self.tensor(norm, group)
        if norm is not None:
            if any(group.inputs in parameter.shape for parameter in self._unused):
                return None  # layers that did not run may read it, too
            candidates = (Producer.of_norm(norm, self._norms[norm], offset) for offset in (0.0, 1.0))
            return next((producer for producer in candidates if self.makes(producer, group, before_TI)), None)
        for matrix in self.earlier(group):
            for rows_V in row_sets(matrix.view().shape[0], group.inputs, heads=matrix.expert is None):
                maps = [Producer.of_matrix(matrix, row_of_I) for row_of_I in row_maps(rows_V, group.inputs)]
                # First test whether these rows make the tensor at all; if not, no row map can fit.
                if self.makes(maps[0], group, before_TI, alike=True):
                    found = next((producer for producer in maps if self.makes(producer, group, before_TI)), None)
                    if found is not None:
                        return found
        return None

    @torch.no_grad()
    def makes(self, producer: Producer, group: InputGroup, before_TI: Tensor, *, alike: bool = False) -> bool:
        """Whether the group's input follows if the producer's rows are multiplied by 2, 4 or 8 (`alike`: all by 2).

        `before_TI`: what `tensor` returned. Restores the weights bit by bit.
        """
        generator = torch.Generator().manual_seed(0)
        factor_R = (2.0 ** torch.randint(1, 4, (len(producer.parts[0][0]),), generator=generator)).float()
        factor_I = torch.full((group.inputs,), 2.0, dtype=torch.float32) if alike else factor_R[producer.row_of_I]
        saved = [(stored, stored.clone()) for stored, _ in producer.parts]
        try:
            producer.scale(factor_I)
            after_TI = self.tensor(None if producer.matrix else producer.name, group)
        finally:
            for stored, value in saved:
                stored.copy_(value)
        expected_TI = before_TI * factor_I.to(before_TI.device)
        return self.follows(after_TI, expected_TI, group.matrices[0].parameter.dtype)

    @torch.no_grad()
    def changed(self, edges: Sequence[Edge], change: Callable[[Edge], None]) -> bool:
        """Applies a change that must not alter the block's output for the first micro-batch.

        Returns False if it does, and restores all weights bit by bit; also, without a try, for weights that another
        block has too, whose output it would alter.
        """
        if any(self._is_elsewhere(stored) for edge in edges for stored in edge.stored()):
            return False
        saved = [(stored, stored.clone()) for edge in edges for stored in edge.stored()]
        for edge in edges:
            change(edge)
        if self.same():
            return True
        for stored, value in saved:
            stored.copy_(value)
        return False

    def _is_elsewhere(self, stored: Tensor) -> bool:
        """Whether a weight, or the parameter that it is a part of, belongs to something outside the block as well."""
        return any(p.data_ptr() <= stored.data_ptr() < p.data_ptr() + p.nbytes for p in self._elsewhere)

    def same(self) -> bool:
        """Whether the block returns for the first micro-batch what `watch` saw, and passes on the same to later blocks.

        Both are computed in float32. Their difference is compared with what the block adds to each token, and not with
        the hidden state: some of its channels are so large that a wrong block would pass as rounding.
        """
        returned, *passed_on = self._wide()
        # Keys and values that later blocks read too; hidden states among them change by rounding, as the output does.
        for now, then in zip(passed_on, self._returned[1:], strict=True):
            if float((now - then).norm()) > _ALIKE[self._dtype().itemsize < 4] * float(then.norm()):
                return False
        before, after = self._returned[0].flatten(0, -2), returned.flatten(0, -2)
        wrong_T, size_T, dtype = (after - before).norm(dim=-1), before.norm(dim=-1), self._dtype()
        entered = self.block.activations.hidden[0]
        added_T = size_T
        if entered.shape == self._returned[0].shape:
            added_T = (before - entered.to(before.device, torch.float32).flatten(0, -2)).norm(dim=-1)
        right_T = wrong_T <= _ALIKE[dtype.itemsize < 4] * added_T + 8 * torch.finfo(torch.float32).eps * size_T
        # Rounded weights may route some tokens to other experts, which is not an error of the change.
        routed = dtype.itemsize < 4 and bool(self._routers)
        return bool(right_T.float().mean() >= (0.98 if routed else 1.0))

    @torch.no_grad()
    def _wide(self) -> list[Tensor]:
        """What the block returns and passes on for the first micro-batch, in float32, with the present weights."""
        module, activations = self.block.module, self.block.activations
        # `in_float32` would move the weights, and producers and edges share their memory.
        saved = [(parameter, parameter.data) for parameter in module.parameters()]
        buffers = [(owner, name, value) for owner in module.modules() for name, value in owner._buffers.items()]
        try:
            module.float()
            return [tensor.float() for tensor in activations.returned(self.block.index, 0, torch.float32)]
        finally:
            for parameter, value in saved:
                parameter.data = value
            for owner, name, buffer in buffers:
                owner._buffers[name] = buffer

    def _dtype(self) -> torch.dtype:
        return self.matrices.groups[0].matrices[0].parameter.dtype

    def follows(self, after_TI: Tensor, expected_TI: Tensor, dtype: torch.dtype) -> bool:
        """Whether a tensor equals the expected one, channel by channel, up to the rounding of this dtype."""
        wrong_I = (after_TI - expected_TI).norm(dim=0)
        return bool((wrong_I <= _tolerance(dtype) * expected_TI.norm(dim=0)).all())

    def source(self, group: InputGroup) -> str | None:
        """The norm whose output a group reads; None if it reads another tensor."""
        return self._source[group]

    def norm_before(self, group: InputGroup) -> tuple[str, nn.Module] | None:
        """The norm whose output this group alone reads, as far as is known; None if there is none."""
        norm = self._source[group]
        if norm is None or norm in self._router_source.values():
            return None
        if [g for g in self.matrices.groups if self._source[g] == norm] != [group]:
            return None
        if any(group.inputs in parameter.shape for parameter in self._unused):
            return None  # layers that did not run may read it, too
        return norm, self._norms[norm]

    def _settle(self) -> None:
        """Adds modules without tokens: an expert reads what its siblings read; a layer's source stays unknown."""
        self.matrices.complete()
        of_entry = {group.matrices[0].entry: norm for group, norm in self._source.items()}
        for group in self.matrices.groups:
            self._source.setdefault(group, of_entry.get(group.matrices[0].entry))
        used = {matrix.entry for group in self.matrices.groups for matrix in group.matrices}
        self._unused = [p for entry, p in self.matrices.parameters().items() if entry not in used]

    def _together(self, group: InputGroup) -> list[InputGroup]:
        """The groups that share this group's producer: readers of one norm, or the experts of one parameter."""
        norm, first = self._source[group], group.matrices[0]
        if norm is not None:
            return [g for g in self.matrices.groups if self._source[g] == norm]
        if first.expert is None:
            return [group]
        return [g for g in self.matrices.groups if g.matrices[0].entry == first.entry]

    def earlier(self, group: InputGroup) -> Iterator[Matrix]:
        """The matrices used before the group, the last one first; for an expert, only its own matrices."""
        groups = self.matrices.groups
        for before in reversed(groups[: groups.index(group)]):
            yield from (m for m in reversed(before.matrices) if m.expert == group.matrices[0].expert)

    def tensor(self, norm: str | None, group: InputGroup) -> Tensor:
        """The group's input for some tokens, in float32; for a group behind a norm, the norm's whole output.

        (Routers select tokens for experts, and would select other tokens while a norm is changed for a test.)
        """
        seen: list[Tensor] = []

        def take(x_TI: Tensor) -> None:
            seen.append(x_TI[:: -(-len(x_TI) // SAMPLE)].float().clone())
            raise _Seen

        def read(of: InputGroup, x_TI: Tensor) -> None:
            if of is group:
                take(x_TI)

        with suppress(_Seen), ExitStack() as hooks:
            if norm is not None:
                hook = self._norms[norm].register_forward_hook(lambda module, args, out: take(out.flatten(0, -2)))
                hooks.callback(hook.remove)
            else:
                hooks.enter_context(self.matrices.observed(read))
            self.block.activations.run(self.block.index, -self._busiest[group][1])
        return seen[0]

    @contextmanager
    def _norms_and_routers(self, made: dict[str, Tensor]) -> Iterator[None]:
        """While open, collects the norms' outputs in `made`, and stores which of them each router reads."""

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, out: Any) -> None:
                # A norm over another width than its output's, such as one per head, makes no tensor that layers read.
                if isinstance(out, Tensor) and out.ndim > 1 and out.shape[-1] == len(module.get_parameter("weight")):
                    made[name] = out

            return hook

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                width = module.get_parameter("weight").shape[1]
                for value in (*args, *kwargs.values()):
                    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[-1] == width:
                        self._router_source[name] = _source(value.flatten(0, -2), made)

            return hook

        with ExitStack() as hooks:
            for name, norm in self._norms.items():
                hooks.callback(norm.register_forward_hook(keep(name)).remove)
            for name, router in self._routers.items():
                hooks.callback(router.register_forward_pre_hook(note(name), with_kwargs=True).remove)
            yield


def _source(x_TI: Tensor, made: dict[str, Tensor]) -> str | None:
    """The norm with this output: the same memory, or rows taken from it for an expert. All outputs must still exist."""
    for name, y in made.items():
        if y.data_ptr() == x_TI.data_ptr() and y.numel() == x_TI.numel() and y.shape[-1] == x_TI.shape[-1]:
            return name
    for name, y in made.items():
        if y.shape[-1] == x_TI.shape[-1]:
            rows = (x_TI[at] for at in (0, len(x_TI) // 2, -1))
            if all((y == row_I).all(-1).any() for row_I in rows):
                return name
    return None


_ALIKE = (1e-3, 5e-2)  # share of what a block adds to a token that rounding may change: float32, half precision


def _tolerance(dtype: torch.dtype) -> float:
    """The relative error that rounding of rewritten weights may cause."""
    return 2e-2 if dtype.itemsize < 4 else 1e-4
