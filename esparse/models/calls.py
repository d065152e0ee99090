"""The arguments that a model passes to its blocks, as values that can be stored, moved, copied and saved.

A call is recorded while no block computes. Values that depend on earlier blocks are represented by places: a value that
a block returned (Returned), or a container that several blocks get (Shared) and may use to pass values on, such as
Gemma's dictionary of keys. The values themselves belong to a stream: each micro-batch of a stream has one `Carried`.
Operations that the model computes between two blocks are recorded, too (Between): RWKV halves the hidden states from
time to time.
"""

from __future__ import annotations

import copy
import enum
import types
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

from esparse.errors import Mistake

# Arguments that hold a key-value cache; if replayed, they would leak one sample into the next.
CACHES = ("past_key_values", "past_key_value", "layer_past", "cache", "cache_params")

_PLAIN = (
    *(Tensor, nn.Module, PretrainedConfig, enum.Enum, str, bytes, int, float, complex, type(None), slice, range),
    *(
        Cache,
        torch.dtype,
        torch.device,
        torch.Size,
        type,
        types.FunctionType,
        types.MethodType,
        types.BuiltinFunctionType,
    ),
)


class UnsupportedModel(Mistake):
    """Raised if esparse cannot run the model's blocks one after the other; the sentence says which block, and why."""


@dataclass(frozen=True, slots=True)
class Returned:
    """The place of a value that a block returns: one leaf of its output.

    A negative block number stands for a step that the model computes between two blocks (Between).
    """

    block: int
    leaf: int


@dataclass(frozen=True, slots=True)
class Shared:
    """The place of a container that several blocks get."""

    number: int


@dataclass(slots=True)
class Carried:
    """The values that flow from block to block beside the hidden states, for one micro-batch."""

    values: dict[Returned, Tensor] = field(default_factory=dict)
    shared: list[Any] = field(default_factory=list)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Carried:
        """A deep copy with changed tensors."""
        memo: dict[int, Any] = {}
        values = {place: change(value) for place, value in self.values.items()}
        return Carried(values, [mapped(container, change, memo) for container in self.shared])


@dataclass(slots=True)
class Between:
    """One operation that the model computes between two blocks, on outputs of blocks."""

    number: int  # negative, as the block of the places of its results
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_place: bool  # whether its result is its first argument, changed

    def run(self, carried: Carried) -> dict[Returned, Tensor]:
        """Computes the operation; returns its results by their places."""
        args, kwargs = filled((self.args, self.kwargs), carried)
        if self.in_place:
            args = (args[0].clone(), *args[1:])  # does not change the stream
        out = self.function(*args, **kwargs)
        leaves = pytree.tree_leaves(args[0] if self.in_place else out)
        return {Returned(self.number, i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}


@dataclass(slots=True)
class Call:
    """The arguments of one block, apart from the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str | None = None  # keyword of the hidden states; None: they are the first positional argument
    before: list[Between] = field(default_factory=list)  # steps that the model computes before the block
    hidden: Returned | None = None  # the hidden states, if they are not what the block before returned
    keeps: frozenset[Returned] = frozenset()  # values that are still needed after this block

    def to(
        self, device: torch.device, dtype: torch.dtype | None = None, known: dict[int, Tensor] | None = None
    ) -> Call:
        """A copy with its tensors on the device, floating-point tensors cast to `dtype`.

        `known`: tensors sent there before, by the id of their original; newly sent tensors are added.
        """

        def sent(tensor: Tensor) -> Tensor:
            if known is None:
                return moved(tensor, device, dtype)
            if id(tensor) not in known:
                known[id(tensor)] = moved(tensor, device, dtype)
            return known[id(tensor)]

        return self._with(lambda parts: mapped(parts, sent, {}))

    def filled(self, carried: Carried) -> Call:
        """The call with its places replaced by their values."""
        args, kwargs = filled((self.args, self.kwargs), carried)
        return replace(self, args=args, kwargs=kwargs)

    def like(self, first: Call) -> Call:
        """This call, but sharing the tensors of `first` if all values are equal."""
        return self._with(lambda parts: alike(parts, first._parts()))

    def _parts(self) -> list[Any]:
        return [self.args, self.kwargs, *([one.args, one.kwargs] for one in self.before)]

    def _with(self, change: Callable[[list[Any]], list[Any]]) -> Call:
        args, kwargs, *of_before = change(self._parts())
        before = [
            replace(one, args=args, kwargs=kwargs) for one, (args, kwargs) in zip(self.before, of_before, strict=True)
        ]
        return replace(self, args=args, kwargs=kwargs, before=before)


@dataclass(slots=True)
class Output:
    """The form of a block's output: a tensor, tuple, list ..., with the hidden states as one leaf."""

    spec: pytree.TreeSpec
    leaves: list[Any]  # tensors show shape and dtype of the small example they were seen in
    main: int
    twins: frozenset[int] = frozenset()  # the leaves that have the hidden states' shape

    @classmethod
    def of(cls, out: Any, hidden: Tensor, block: str) -> Output:
        """The form of an output; raises UnsupportedModel if it holds no hidden states."""
        leaves, spec = pytree.tree_flatten(out)
        tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        fitting = [place for place in tensors if leaves[place].shape == hidden.shape]
        if not tensors:
            raise UnsupportedModel(
                f"{block} returns a {type(out).__name__} without hidden states: esparse passes on tensors, and "
                "tuples, lists and dictionaries of tensors"
            )
        kinds = [torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cls(spec, kinds, (fitting or tensors)[0], frozenset(fitting))

    def same_form(self, other: Output) -> bool:
        kinds, others = ([isinstance(leaf, Tensor) for leaf in one.leaves] for one in (self, other))
        return self.spec == other.spec and kinds == others

    def others(self, block: int) -> frozenset[Returned]:
        """The places of the tensors that a block returns apart from the hidden states."""
        tensors = [place for place, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        return frozenset(Returned(block, place) for place in tensors if place != self.main)

    def stand_ins(self, hidden: Tensor) -> dict[int, Tensor]:
        """Zeros for all tensor leaves; leaves that had the hidden states' shape get the shape of `hidden`."""
        return {
            place: torch.zeros_like(hidden if place in self.twins else leaf, device=hidden.device)
            for place, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor)
        }

    def with_values(self, values: dict[int, Tensor]) -> Any:
        """An output of this form with these leaves, by place."""
        return pytree.tree_unflatten([values.get(i, leaf) for i, leaf in enumerate(self.leaves)], self.spec)


def leaf_of(out: Any, place: int, block: str) -> Tensor:
    """One leaf of a block's output; raises UnsupportedModel if it is no tensor."""
    leaves = pytree.tree_leaves(out)
    if place >= len(leaves) or not isinstance(leaves[place], Tensor):
        raise UnsupportedModel(f"{block} returned another number of values than at its first run")
    return leaves[place]


class Recorder(TorchFunctionMode):
    """While open, follows what the model computes from stand-ins of the blocks' outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, Tensor, str | None, tuple[Any, ...], dict[str, Any]]] = []
        self.places: dict[int, Returned] = {}  # by identity
        self._kept: list[Any] = []  # keeps objects alive, so that no id is used twice
        self._between: list[tuple[int, Between]] = []  # number of calls before it, and the step

    def made(self, values: dict[int, Tensor], maker: int) -> None:
        """Registers tensors, by leaf, as stand-ins for the output of a block or a step."""
        self._kept += values.values()
        self.places |= {id(value): Returned(maker, leaf) for leaf, value in values.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = self.calls and any(id(tensor) in self.places for tensor in tensors((args, kwargs)))
        if not known:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        in_place |= name in ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__")
        noted_args, noted_kwargs = self._noted((args, kwargs))
        out = func(*args, **kwargs)
        number = -1 - len(self._between)
        leaves = pytree.tree_leaves(args[0] if in_place else out)
        values = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        if values:
            self._between.append((len(self.calls), Between(number, func, noted_args, noted_kwargs, in_place)))
            self.made(values, number)
        return out

    def _noted(self, value: Any, memo: dict[int, Any] | None = None) -> Any:
        # A weight of the model is copied: it may be on the meta device when the step is computed.
        def note(tensor: Tensor) -> Any:
            constant = tensor.detach().clone() if isinstance(tensor, nn.Parameter) else tensor
            return self.places.get(id(tensor), constant)

        return mapped(value, note, {} if memo is None else memo)

    def templates(self) -> tuple[dict[int, Call], list[Any]]:
        """The calls by block, with places for values of earlier blocks, and the shared containers."""
        seen_in: dict[int, set[int]] = {}
        found: dict[int, Any] = {}
        for block, _, _, args, kwargs in self.calls:
            for container in _containers((args, list(kwargs.values()))):
                seen_in.setdefault(id(container), set()).add(block)
                found[id(container)] = container
        shared = [container for key, container in found.items() if len(seen_in[key]) > 1]
        # A container inside a shared one is part of that one.
        inside = {id(c) for outer in shared for c in _containers([outer]) if c is not outer}
        shared = [container for container in shared if id(container) not in inside]
        memo: dict[int, Any] = {id(container): Shared(number) for number, container in enumerate(shared)}
        recorded: dict[int, Call] = {}
        for block, hidden, name, args, kwargs in self.calls:
            of_call = dict(memo)
            args = tuple(None if isinstance(value, Cache) else self._noted(value, of_call) for value in args)
            kwargs = {
                key: None if key in CACHES or isinstance(value, Cache) else self._noted(value, of_call)
                for key, value in kwargs.items()
            }
            kwargs |= {"use_cache": False} if "use_cache" in kwargs else {}
            place = self.places.get(id(hidden))
            recorded[block] = Call(args, kwargs, name, hidden=place if place and place.block < 0 else None)
        self._link(recorded)
        return recorded, shared

    def _link(self, recorded: dict[int, Call]) -> None:
        """Gives each call the steps before it and the values to keep after it, going backwards from the last call."""
        read: set[Returned] = set()  # by later calls
        for place in range(len(self.calls) - 1, -1, -1):
            call = recorded[self.calls[place][0]]
            call.keeps = frozenset(read)
            read |= places_in((call.args, call.kwargs)) | ({call.hidden} if call.hidden else set())
            for behind, between in reversed(self._between):
                if behind == place and any(read_place.block == between.number for read_place in read):
                    call.before.insert(0, between)
                    read |= places_in((between.args, between.kwargs))

    def read_between(self) -> frozenset[Returned]:
        """The outputs of blocks that the model reads between blocks."""
        places = set().union(*(places_in((between.args, between.kwargs)) for _, between in self._between))
        return frozenset(place for place in places if place.block >= 0)


def filled(value: Any, carried: Carried) -> Any:
    """A copy of nested containers with their places replaced by their values."""

    def of(place: Any) -> Any:
        return carried.values[place] if isinstance(place, Returned) else carried.shared[place.number]

    return mapped(value, of, {}, of=Returned | Shared)


def places_in(value: Any) -> set[Returned]:
    found: set[Returned] = set()
    mapped(value, lambda place: found.add(place) or place, {}, of=Returned)  # type: ignore[func-returns-value]
    return found


def mapped(value: Any, change: Callable[[Any], Any], memo: dict[int, Any], of: Any = Tensor) -> Any:
    """A copy of nested containers with every instance of `of` changed; other objects are shared.

    `memo`: by id, copies made before, or replacements of objects.
    """
    if isinstance(value, of):
        return change(value)
    if id(value) in memo:
        return memo[id(value)]
    if not _is_container(value):
        return value
    if isinstance(value, tuple):
        parts = [mapped(part, change, memo, of) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, list):
        memo[id(value)] = new_list = type(value)()
        new_list.extend(mapped(part, change, memo, of) for part in value)
        return new_list
    if isinstance(value, MutableMapping):
        memo[id(value)] = new = copy.copy(value)
        for key, part in list(value.items()):
            new[key] = mapped(part, change, memo, of)
        return new
    memo[id(value)] = new = copy.copy(value)
    vars(new).update({name: mapped(part, change, memo, of) for name, part in vars(value).items()})
    return new


def alike(value: Any, first: Any) -> Any:
    """`value`, but with the tensors of `first` if both hold equal values in the same structure."""
    others = iter(tensors(first))

    def choose(tensor: Tensor) -> Tensor:
        other = next(others, None)
        if other is None or other.shape != tensor.shape or other.dtype != tensor.dtype:
            return tensor
        return other if torch.equal(other, tensor) else tensor

    return mapped(value, choose, {})


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested containers; visits each container once."""
    found: list[Tensor] = []
    mapped(value, lambda tensor: found.append(tensor) or tensor, {})  # type: ignore[func-returns-value]
    return found


def _is_container(value: Any) -> bool:
    """Whether a value may hold tensors or be written to: collections, and objects with attributes."""
    if isinstance(value, _PLAIN):
        return False
    return isinstance(value, tuple | list | MutableMapping) or (hasattr(value, "__dict__") and not callable(value))


def _containers(values: Iterable[Any]) -> list[Any]:
    """All containers in the values, at any depth."""
    found: dict[int, Any] = {}

    def visit(value: Any) -> None:
        if id(value) in found or not _is_container(value):
            return
        if isinstance(value, tuple):
            parts: Iterable[Any] = value
        else:
            found[id(value)] = value
            if isinstance(value, list):
                parts = value
            else:
                parts = value.values() if isinstance(value, MutableMapping) else vars(value).values()
        for part in list(parts):
            visit(part)

    for value in values:
        visit(value)
    return list(found.values())
