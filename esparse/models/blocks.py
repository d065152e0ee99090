"""A causal language model as embedding, decoder blocks and head, run one block at a time.

Every family's own code computes positions, masks and other arguments of its blocks: the model's forward runs with
recorders in place of the blocks, and each block is later called with exactly the arguments that the model passes
(models/calls.py). models/forward_check.py checks on a few tokens that this computes what the model computes. One block
is on the device at a time; models/store.py holds the others, and models/offload.py the hidden states.

Shapes: B sequences of a micro-batch, L tokens of a sequence, H hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import enum
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from esparse.errors import Mistake
from esparse.models.calls import Call, Carried, Output, Recorder, Returned, UnsupportedModel, leaf_of, moved
from esparse.models.checkpoint import shapes
from esparse.models.model_parts import candidates, expert_configs, own_parameters
from esparse.models.offload import HiddenStateStore
from esparse.models.store import INSTEAD, MemoryStore, Store
from esparse.parallel.ranks import Ranks
from esparse.parts import plugins

log = logging.getLogger("esparse")

StandIn = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]


class HandsOn(enum.IntEnum):
    """What the model reads after its last block."""

    HIDDEN = 0  # the hidden states that it returns
    REST = 1  # what else it returns
    ALL = 2  # what blocks before it returned, and the model read between blocks


class _Captured(Exception):
    """Ends the model's own forward once every block has been recorded."""


@dataclass(frozen=True, slots=True)
class Entered:
    """The first block's input, each block's call (None if it does not run), and what flows beside hidden states."""

    hidden: Tensor
    calls: list[Call | None]
    carried: Carried


class BlockModel:
    """A model cut into its decoder blocks.

    Raises UnsupportedModel if there is no list of decoder blocks, or none that runs for text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: torch.device,
        batch_tokens: int,
        store: Store | None = None,
        hidden_store: HiddenStateStore | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`store` holds the weights (default: they are in the model), `hidden_store` the hidden states between blocks.

        `ranks`: the processes that share the sequences, each with a model of its own.
        """
        self.model = model
        self.ranks = ranks or Ranks()
        self.hidden_store = hidden_store or HiddenStateStore("host")
        self.store = store or MemoryStore()
        self.device = device
        self.batch_tokens = batch_tokens
        self.stay_dense = plugins.quirks(model)
        self.hands_on = HandsOn.HIDDEN
        self.checked = False  # whether models/forward_check.py has passed
        self.logits_by_token = False  # whether a token's logits depend on its own hidden states alone, as far as known
        self.routers: set[str] = set()  # layers that decide which experts run, as far as seen
        self._experts = expert_configs(model)
        self.prefix, self.blocks, first = self._found(candidates(model))
        if not self.store.whole:
            self._check_separate()
        self.outputs = [first] * len(self.blocks)  # form of each block's output; at first assumed like the first's
        self.order = list(range(len(self.blocks)))  # the blocks that run, in their order

    def micro_batches(self, tokens_SL: Tensor, most: int | None = None) -> list[Tensor]:
        """Cuts sequences into micro-batches of about `batch_tokens` tokens, one to `most` sequences each."""
        sequences = max(1, self.batch_tokens // tokens_SL.shape[1])
        parts = tokens_SL.split(sequences if most is None else min(sequences, most))
        return [part for part in parts if len(part)]  # none for a rank without sequences

    @torch.no_grad()
    def enter(self, tokens_BL: Tensor) -> Entered:
        """Records what the model passes to its blocks; needs `ends_resident`.

        Raises UnsupportedModel if the model runs a block twice, or changes hidden states in ways that cannot be
        followed.
        """
        entered: list[Tensor] = []
        returned: list[Tensor] = []  # one for all blocks: their own would be as many hidden states at once
        recorder = Recorder()

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            before = recorder.calls[-1][0] if recorder.calls else None
            if before is not None and index <= before:
                raise UnsupportedModel(f"{self.name(index)} runs behind {self.name(before)}: {_ORDER}")
            name, hidden, args, kwargs = self.hidden_apart(index, args, kwargs)
            if before is not None:
                place = recorder.places.get(id(hidden))
                if place is None:
                    raise UnsupportedModel(
                        f"the hidden states that {self.name(index)} is given do not come from {self.name(before)}, or "
                        "not in a way that could be followed"
                    )
                if place.block >= 0 and place.block != before:
                    raise UnsupportedModel(
                        f"{self.name(index)} is given what {self.name(place.block)} returned: {_ORDER}"
                    )
                if place.block == before and place.leaf != self.outputs[before].main:
                    raise OtherLeaf(before, place.leaf)  # the hidden states are another leaf than assumed
            entered.append(hidden)
            recorder.calls.append((index, hidden, name, args, kwargs))
            if index == self.order[-1]:
                raise _Captured
            form = self.outputs[index]
            with torch._C.DisableTorchFunction():
                if not returned or (returned[0].shape, returned[0].dtype) != (hidden.shape, hidden.dtype):
                    returned[:] = [hidden.clone()]
                values = form.stand_ins(hidden) | {form.main: returned[0].detach()}
            recorder.made(values, index)
            return form.with_values(values)

        with self._replaced(record), recorder:
            self._run_until_captured(tokens_BL.to(self.device))
        recorded, shared = recorder.templates()
        last = recorder.calls[-1][0]
        if self.hands_on >= HandsOn.REST:
            recorded[last].keeps |= self.outputs[last].others(last)
        if self.hands_on >= HandsOn.ALL:
            for call in recorded.values():
                call.keeps |= recorder.read_between()
        return Entered(entered[0], [recorded.get(i) for i in range(len(self.blocks))], Carried({}, shared))

    def embed(self, tokens_BL: Tensor) -> tuple[Tensor, list[Call | None]]:
        """The hidden states that enter the first block, and the call of every block; needs `ends_resident`."""
        entered = self.enter(tokens_BL)
        return entered.hidden, entered.calls

    def step(
        self,
        index: int,
        hidden_BLH: Tensor,
        call: Call,
        carried: Carried,
        dtype: torch.dtype | None = None,
        known: dict[int, Tensor] | None = None,
    ) -> tuple[Tensor, Carried]:
        """Runs one block on its device; returns its hidden states, and what flows on beside them.

        Casts the inputs to `dtype` (for a block that was cast). Does not change `carried`. `known`: tensors that are on
        the device already (Call.to).
        """
        hidden, passed, own = self.passed(hidden_BLH, call, carried, dtype, known)
        with self.experts_one_by_one():
            if call.name is None:
                out = self.blocks[index](hidden, *passed.args, **passed.kwargs)
            else:
                out = self.blocks[index](*passed.args, **{call.name: hidden}, **passed.kwargs)
        given = {p: leaf_of(out, p.leaf, self.name(index)) for p in call.keeps if p.block == index}
        values = {place: value for place, value in (own.values | given).items() if place in call.keeps}
        return leaf_of(out, self.outputs[index].main, self.name(index)), Carried(values, own.shared)

    def passed(
        self,
        hidden_BLH: Tensor,
        call: Call,
        carried: Carried,
        dtype: torch.dtype | None = None,
        known: dict[int, Tensor] | None = None,
    ) -> tuple[Tensor, Call, Carried]:
        """A block's inputs: hidden states, the call with its places filled, and a copy of what flows beside them."""
        own = carried.mapped(lambda tensor: moved(tensor, self.device, dtype))
        call = call.to(self.device, dtype, known)
        for between in call.before:
            own.values |= between.run(own)
        hidden = hidden_BLH.to(self.device, dtype) if call.hidden is None else own.values[call.hidden]
        return hidden, call.filled(own), own

    def forward(self, index: int, hidden_BLH: Tensor, call: Call, dtype: torch.dtype | None = None) -> Tensor:
        """One block's hidden states; only for blocks that read nothing else from earlier blocks."""
        return self.step(index, hidden_BLH, call, Carried(), dtype)[0]

    @torch.no_grad()
    def logits(self, tokens_BL: Tensor, hidden_BLH: Tensor, carried: Carried | None = None) -> Tensor:
        """The logits (B x L x V) of the last block's output by the model's own norm and head; needs `ends_resident`."""
        values = {} if carried is None else carried.values

        def last(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            rest = self.outputs[index].stand_ins(hidden_BLH.to(self.device))
            rest |= {p.leaf: value.to(self.device) for p, value in values.items() if p.block == index}
            main = self.outputs[index].main
            if index == self.order[-1] or all(p != Returned(index, main) for p in values):
                rest[main] = hidden_BLH.to(self.device)
            return self.outputs[index].with_values(rest)

        with self._replaced(last):
            return self.model(input_ids=tokens_BL.to(self.device), use_cache=False).logits

    @contextmanager
    def experts_one_by_one(self) -> Iterator[None]:
        """While open, transformers computes expert by expert, so that each can be observed."""
        before = [config._experts_implementation_internal for config in self._experts]
        try:
            for config in self._experts:
                config._experts_implementation_internal = "eager"
            yield
        finally:
            for config, implementation in zip(self._experts, before, strict=True):
                config._experts_implementation_internal = implementation

    @contextmanager
    def wrapped(self, run: Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
        """While open, `run(index, forward, args, kwargs)` is called instead of each block's forward."""
        forwards = [block.forward for block in self.blocks]
        with self._replaced(lambda index, args, kwargs: run(index, forwards[index], args, kwargs)):
            yield

    def name(self, index: int) -> str:
        return f"{self.prefix}.{index}"

    def by_name(self) -> dict[str, nn.Module]:
        return {self.name(index): block for index, block in enumerate(self.blocks)}

    def hidden_apart(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str | None, Tensor, tuple[Any, ...], dict[str, Any]]:
        """Splits a block's arguments: the name of the hidden states, the hidden states, the other arguments.

        The name is None for the first positional argument. Raises UnsupportedModel if there are no hidden states.
        """
        name = None
        if args:
            hidden, args = args[0], args[1:]
        else:
            _, *names = inspect.signature(type(self.blocks[index]).forward).parameters
            name = "hidden_states" if "hidden_states" in kwargs else next(iter(names), "")
            hidden, kwargs = kwargs.get(name), {key: value for key, value in kwargs.items() if key != name}
        if not isinstance(hidden, Tensor):
            raise UnsupportedModel(
                f"{self.name(index)} gets a {type(hidden).__name__} as its first argument; the hidden states were "
                "expected, as a tensor"
            )
        return name, hidden, args, kwargs

    @contextmanager
    def resident(self, index: int, *, changed: str | None = None, read_only: bool = False) -> Iterator[nn.Module]:
        """While open, the block is on the device; changes of its weights are stored only if `changed` is given.

        `changed`: first part of the name of the file with the changed weights. `read_only`: the caller changes nothing.
        """
        with self._lent(self._modules(index), None if changed is None else f"{changed}-{index:05}", read_only):
            yield self.blocks[index]

    def adopt(self, index: int, file: Path) -> None:
        """From now on takes the block's weights, and biases that it got, from this file."""
        known = own_parameters(self._modules(index))
        example = next(iter(known.values()))
        for name in shapes(file).keys() - known.keys():
            layer = self.model.get_submodule(name.removesuffix(".bias"))
            layer.bias = nn.Parameter(torch.empty(shapes(file)[name], dtype=example.dtype, device=example.device))
        self.store.adopt(own_parameters(self._modules(index)), file)

    def _modules(self, index: int) -> dict[str, nn.Module]:
        name = f"{self.prefix}.{index}"
        return {f"{name}.{path}".rstrip("."): module for path, module in self.blocks[index].named_modules()}

    @contextmanager
    def ends_resident(self) -> Iterator[None]:
        """While open, everything but the blocks (embeddings, final norm, head) is on the device."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        with self._lent({n: m for n, m in self.model.named_modules() if id(m) not in inside}, None, read_only=True):
            yield

    def _check_separate(self) -> None:
        blocks = [{id(parameter) for parameter in block.parameters()} for block in self.blocks]
        seen = {id(parameter) for parameter in self.model.parameters()}.difference(*blocks)
        for name, own in self.model.named_parameters(remove_duplicate=False):
            if id(own) not in seen and not name.startswith(f"{self.prefix}."):
                raise Mistake(f"{name} is also a block's weight; {INSTEAD}")
        for index, of_block in enumerate(blocks):
            if seen & of_block:
                raise Mistake(f"{self.prefix}.{index} shares weights with a block before it; {INSTEAD}")
            seen |= of_block

    @contextmanager
    def _lent(self, modules: Mapping[str, nn.Module], changed: str | None, read_only: bool = False) -> Iterator[None]:
        """While open, the modules' own parameters and buffers are on the device."""
        home = next(iter(own_parameters(modules).values())).device
        buffers = [(m, name, b.device) for m in modules.values() for name, b in m.named_buffers(recurse=False)]

        def place_buffers(device: torch.device | None) -> None:
            for module, name, buffer_home in buffers:
                module._buffers[name] = module.get_buffer(name).to(device or buffer_home)

        done = False
        try:
            self.store.lend(own_parameters(modules), self.device)
            place_buffers(self.device)
            yield
            done = True
        finally:
            # Listed again, because a bias correction may have added biases.
            self.store.take_back(own_parameters(modules), home, changed=changed if done else None, read_only=read_only)
            place_buffers(None)

    @contextmanager
    def _replaced(self, stand_in: StandIn) -> Iterator[None]:
        """While open, `stand_in(index, args, kwargs)` computes what each block returns."""

        def replacement(index: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: stand_in(index, args, kwargs)

        own = [block.__dict__.get("forward") for block in self.blocks]  # set by wrappers such as accelerate
        try:
            for index, block in enumerate(self.blocks):
                block.forward = replacement(index)
            yield
        finally:
            for block, forward in zip(self.blocks, own, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward

    @torch.no_grad()
    def _found(self, candidates: Mapping[str, nn.ModuleList]) -> tuple[str, nn.ModuleList, Output]:
        """The first list whose first block runs for text, and the form of that block's output; runs the model once."""
        versions = {name: parameter._version for name, parameter in self.model.named_parameters()}
        for prefix, blocks in candidates.items():
            self.prefix, self.blocks = prefix, blocks
            if len(set(blocks)) < len(blocks):
                raise UnsupportedModel(
                    f"some of {prefix} are one and the same block, which runs several times: it gets other inputs each "
                    "time, and esparse can prune a block for one of them only"
                )
            returned: list[Output] = []

            def observe(index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
                _, hidden, *_ = self.hidden_apart(index, args, kwargs)
                with self.experts_one_by_one():
                    returned.append(Output.of(forward(*args, **kwargs), hidden, self.name(index)))  # noqa: B023
                raise _Captured

            with self.ends_resident(), self.resident(0), self.wrapped(observe):
                self._run_until_captured(torch.zeros(1, 2, dtype=torch.long, device=self.device))
            if self.store.whole:  # a store's weights change whenever they are loaded
                self._check_untouched(versions)
            if returned:
                return prefix, blocks, returned[0]
        raise UnsupportedModel(
            f"{type(self.model).__name__} runs none of its lists of blocks for text alone ({', '.join(candidates)})"
        )

    def _check_untouched(self, versions: Mapping[str, int]) -> None:
        """Raises UnsupportedModel if weights were written to since these versions, or in an earlier forward pass."""
        changed = [name for name, parameter in self.model.named_parameters() if parameter._version != versions[name]]
        every = getattr(self.model.config, "rescale_every", 0)
        if not changed and 0 < every < len(self.blocks):  # RWKV's blocks behind so many; a pass does it only once
            changed = [name for name, part in self.model.named_modules() if getattr(part, "layers_are_rescaled", False)]
        if changed:
            way = "; set rescale_every to 0 in its config.json" if every else ""
            raise UnsupportedModel(
                f"{type(self.model).__name__} rewrites its weights when it runs ({changed[0]}, ...), so what is "
                f"exported would not be what was measured{way}"
            )

    def _run_until_captured(self, tokens_BL: Tensor) -> None:
        with contextlib.suppress(_Captured):
            self.model(input_ids=tokens_BL, use_cache=False)


_ORDER = "esparse runs every block once, in the order of their list"


class OtherLeaf(Exception):
    """Raised if the next block's hidden states are another leaf of a block's output than assumed."""

    def __init__(self, block: int, leaf: int) -> None:
        super().__init__(block, leaf)
        self.block, self.leaf = block, leaf
