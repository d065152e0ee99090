"""A causal language model as embedding, decoder blocks and head, run one block at a time.

Every family's own code computes positions, masks and what else a block wants: the model's forward is run with its
blocks replaced by recorders, so that nothing is re-implemented and each block is later called with exactly the
arguments that the model would give it. One block is on the device at a time; where the other blocks are is the
store's business (models/store.py), and where the hidden states wait is the keeper's (models/offload.py).

Shapes: B sequences of a micro-batch, L tokens of a sequence, H hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from esparse.models.checkpoint import shapes
from esparse.models.offload import Keeper
from esparse.models.store import INSTEAD, MemoryStore, Store
from esparse.parallel.ranks import Ranks
from esparse.errors import Mistake

# Arguments that carry a key-value cache: replayed, they would leak one sample into the next.
CACHES = ("past_key_values", "past_key_value", "layer_past")


class _Captured(Exception):
    """Ends the model's own forward once every block has been asked for."""


@dataclass(slots=True)
class Call:
    """What the model passes to one block beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Call:
        return Call(_moved(self.args, device, dtype), _moved(self.kwargs, device, dtype))


class BlockModel:
    """A model cut into its decoder blocks.

    Raises ValueError where no list of decoder blocks can be found.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: torch.device,
        batch_tokens: int,
        store: Store | None = None,
        keeper: Keeper | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`store` keeps the weights (without one they are in the model), `keeper` what flows between blocks.

        `ranks`: the processes that share the sequences, each with a model of its own.
        """
        self.model = model
        self.ranks = ranks or Ranks()
        self.keeper = keeper or Keeper("host")
        self.store = store or MemoryStore()
        self.device = device
        self.batch_tokens = batch_tokens
        self.prefix, self.blocks = find_blocks(model)
        if not self.store.whole:
            self._check_separate()
        self._returns_tuple = self._probe()

    def micro_batches(self, tokens_SL: Tensor, most: int | None = None) -> list[Tensor]:
        """Cuts sequences into micro-batches of about `batch_tokens` tokens, one to `most` sequences each."""
        sequences = max(1, self.batch_tokens // tokens_SL.shape[1])
        parts = tokens_SL.split(sequences if most is None else min(sequences, most))
        return [part for part in parts if len(part)]  # there is none where a rank has no sequence

    @torch.no_grad()
    def embed(self, tokens_BL: Tensor) -> tuple[Tensor, list[Call]]:
        """The hidden states that enter the first block, and the call of every block; needs `ends_resident`."""
        calls: list[Call] = []
        entered: list[Tensor] = []

        def record(index: int, hidden_BLH: Tensor, call: Call) -> Tensor:
            if index == 0:
                entered.append(hidden_BLH)
            calls.append(call)
            if index == len(self.blocks) - 1:
                raise _Captured
            return hidden_BLH

        with self._replaced(record):
            self._run_until_captured(tokens_BL.to(self.device))
        return entered[0], calls

    def forward(self, index: int, hidden_BLH: Tensor, call: Call, dtype: torch.dtype | None = None) -> Tensor:
        """One block's forward on the device where the block is; the result is on that device too.

        What the block is given is cast to `dtype`, where the block itself was.
        """
        call = call.to(self.device, dtype)
        out = self.blocks[index](hidden_BLH.to(self.device, dtype), *call.args, **call.kwargs)
        # transformers 5 returns the tensor itself for most families: out[0] would be the first sequence.
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def logits(self, tokens_BL: Tensor, hidden_BLH: Tensor) -> Tensor:
        """The model's own final norm and head (B x L x V) on what the last block returned; needs `ends_resident`."""
        with self._replaced(lambda index, hidden, call: hidden_BLH.to(hidden.device)):
            return self.model(input_ids=tokens_BL.to(self.device), use_cache=False).logits

    @contextmanager
    def resident(self, index: int, *, changed: str | None = None) -> Iterator[nn.Module]:
        """While open, the block is on the device; what is done to its weights lasts only where `changed` is said.

        `changed` begins the name of the file that they are written to.
        """
        with self._lent(self._modules(index), None if changed is None else f"{changed}-{index:05}"):
            yield self.blocks[index]

    def adopt(self, index: int, file: Path) -> None:
        """The block's weights are from now on those that were written to this file, biases that it got included."""
        known = _parameters(self._modules(index))
        example = next(iter(known.values()))
        for name in shapes(file).keys() - known.keys():
            layer = self.model.get_submodule(name.removesuffix(".bias"))
            layer.bias = nn.Parameter(torch.empty(shapes(file)[name], dtype=example.dtype, device=example.device))
        self.store.adopt(_parameters(self._modules(index)), file)

    def _modules(self, index: int) -> dict[str, nn.Module]:
        name = f"{self.prefix}.{index}"
        return {f"{name}.{path}".rstrip("."): module for path, module in self.blocks[index].named_modules()}

    @contextmanager
    def ends_resident(self) -> Iterator[None]:
        """While open, all that is not a block (embeddings, final norm, head) is on the device."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        with self._lent({n: module for n, module in self.model.named_modules() if id(module) not in inside}, None):
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
    def _lent(self, modules: Mapping[str, nn.Module], changed: str | None) -> Iterator[None]:
        """While open, the modules' own parameters and buffers are on the device."""
        home = next(iter(_parameters(modules).values())).device
        buffers = [(m, name, b.device) for m in modules.values() for name, b in m.named_buffers(recurse=False)]

        def place_buffers(device: torch.device | None) -> None:
            for module, name, buffer_home in buffers:
                module._buffers[name] = module.get_buffer(name).to(device or buffer_home)

        done = False
        try:
            self.store.lend(_parameters(modules), self.device)
            place_buffers(self.device)
            yield
            done = True
        finally:
            # Asked for again: a correction may have given a layer a bias.
            self.store.take_back(_parameters(modules), home, changed=changed if done else None)
            place_buffers(None)

    @contextmanager
    def _replaced(self, stand_in: Callable[[int, Tensor, Call], Tensor]) -> Iterator[None]:
        """While open, the blocks do not compute: `stand_in(index, hidden, call)` says what each returns."""

        def replacement(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
                out = stand_in(index, hidden, _without_cache(args, kwargs))
                return (out,) if self._returns_tuple else out

            return forward

        try:
            for index, block in enumerate(self.blocks):
                block.forward = replacement(index)
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)

    @torch.no_grad()
    def _probe(self) -> bool:
        """Whether the blocks return a tuple (BLOOM, Falcon) or a tensor: found out by running the first one once."""
        returned: list[Any] = []

        def look(module: nn.Module, args: Any, out: Any) -> None:
            returned.append(out)
            raise _Captured

        hook = self.blocks[0].register_forward_hook(look)
        try:
            with self.ends_resident(), self.resident(0):
                self._run_until_captured(torch.zeros(1, 2, dtype=torch.long, device=self.device))
        finally:
            hook.remove()
        return isinstance(returned[0], tuple)

    def _run_until_captured(self, tokens_BL: Tensor) -> None:
        with contextlib.suppress(_Captured):
            self.model(input_ids=tokens_BL, use_cache=False)


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the list of the decoder blocks: the outermost list with one entry per hidden layer of the config."""
    expected = model.config.get_text_config().num_hidden_layers
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    fitting = [name for name, blocks in lists.items() if len(blocks) == expected]
    if not fitting:
        raise Mistake(
            f"no list of {expected} decoder blocks in {type(model).__name__} (lists found: "
            f"{', '.join(f'{name} of {len(blocks)}' for name, blocks in lists.items()) or 'none'}); "
            "esparse prunes decoder-only language models"
        )
    name = min(fitting, key=lambda name: name.count("."))
    return name, lists[name]


def _parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The modules' own parameters by name, each once."""
    named = {
        parameter: f"{path}.{name}".lstrip(".")
        for path, module in modules.items()
        for name, parameter in module.named_parameters(recurse=False)
    }
    return {name: parameter for parameter, name in named.items()}


def _without_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    from transformers.cache_utils import Cache

    args = tuple(None if isinstance(value, Cache) else value for value in args)
    kwargs = {k: None if k in CACHES or isinstance(v, Cache) else v for k, v in kwargs.items()}
    return Call(args, kwargs | ({"use_cache": False} if "use_cache" in kwargs else {}))


def _moved(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
    if isinstance(value, tuple | list):
        return type(value)(_moved(v, device, dtype) for v in value)
    if isinstance(value, dict):
        return {k: _moved(v, device, dtype) for k, v in value.items()}
    return value
