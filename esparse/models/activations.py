"""The values that flow through the blocks, for all sequences: hidden states, and what blocks pass on beside them.

Shapes: S sequences, B sequences of a micro-batch, L tokens of a sequence, H hidden width, V vocabulary.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from esparse.linalg import all_finite, finite
from esparse.models import damage
from esparse.models.blocks import BlockModel
from esparse.models.calls import Call, Carried, Returned, alike
from esparse.models.forward_check import check

LOGITS_AT_ONCE = 2**23  # values on a CPU: 32 MiB in float32
Ahead = list[tuple[Tensor, Carried]]  # a block's outputs, by micro-batch


def tokens_at_once(device: torch.device, sequences: int, vocabulary: int) -> int:
    """Of how many tokens of each sequence the logits are computed at once."""
    most = LOGITS_AT_ONCE if device.type == "cpu" else 8 * LOGITS_AT_ONCE
    return max(1, most // (sequences * vocabulary))


class Activations:
    """The hidden states of all sequences in front of some block; a `HiddenStateStore` holds them between blocks.

    `sequences_at_once`, if given, is the largest number of sequences in a micro-batch. Raises UnsupportedModel if
    the model's blocks, run one after the other, do not compute what the model computes.
    """

    def __init__(self, blocks: BlockModel, tokens_SL: Tensor, sequences_at_once: int | None = None) -> None:
        check(blocks, tokens_SL)
        self.blocks = blocks
        self.hidden: list[Tensor] = []
        self.shapes: list[torch.Size] = []  # sequences and tokens of each micro-batch; `hidden` may be streams of them
        self._carried: list[Carried] = []
        self._calls: list[list[Call | None]] = []
        # Arguments last sent to the device, by their address on the host: sending them again would have to wait
        # for all pending work of the device.
        self._sent: tuple[int, dict[int, Tensor]] = (-1, {})
        self._keep: Callable[[Tensor], Tensor] | None = None
        cpu, are_finite = torch.device("cpu"), []
        with blocks.ends_resident():
            for tokens_BL in blocks.micro_batches(tokens_SL, sequences_at_once):
                entered = blocks.enter(tokens_BL)
                if self._keep is None:
                    size = entered.hidden[0].nbytes * len(tokens_SL)
                    self._keep = blocks.hidden_store.choose(size * blocks.ranks.size)  # the ranks share one host
                self.hidden.append(self._keep(entered.hidden))
                self.shapes.append(tokens_BL.shape)
                calls = [None if call is None else call.to(cpu) for call in entered.calls]
                carried = entered.carried.mapped(lambda tensor: tensor.to(cpu))
                # Masks and positions are the same for all full micro-batches, so one copy is stored.
                if self._calls:
                    calls = [
                        call if call is None or first is None else call.like(first)
                        for first, call in zip(self._calls[0], calls, strict=True)
                    ]
                    carried = Carried({}, alike(carried.shared, self._carried[0].shared))
                self._calls.append(calls)
                self._carried.append(carried)
                are_finite.append(finite(entered.hidden))
        if are_finite and not bool(torch.stack(are_finite).all()):  # read at the end, as in `_outputs`
            raise damage.of_ends(blocks, "the hidden states in front of the first block hold NaN or Inf")
        self._first = list(self._carried)  # as the model passes it to the first block

    def observe(self, index: int) -> None:
        """Runs a block over all micro-batches so that hooks see its inputs; discards the outputs."""
        for batch in range(len(self.hidden)):
            self.run(index, batch)

    @torch.no_grad()
    def run(self, index: int, batch: int) -> Tensor:
        """A block's output for one micro-batch, on the device; the stream stays in front of the block."""
        return self.forward(index, batch)

    def forward(self, index: int, batch: int, dtype: torch.dtype | None = None) -> Tensor:
        """Like `run`, but differentiable, and for a block that was cast to `dtype`."""
        return self._step(index, batch, dtype)[0]

    def returned(self, index: int, batch: int, dtype: torch.dtype) -> list[Tensor]:
        """A block's output, computed as by `forward`, and the floating-point tensors that it passes on beside it."""
        out, carried = self._step(index, batch, dtype)
        tensors = [out]

        def collect(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                tensors.append(tensor)
            return tensor

        carried.mapped(collect)
        return tensors

    def advance(self, index: int) -> None:
        """Replaces the block's inputs by its outputs; raises as `advanced` does."""
        for batch, (hidden, carried) in enumerate(self._outputs(index)):
            self.hidden[batch], self._carried[batch] = hidden, carried

    def advanced(self, index: int) -> Ahead:
        """The block's outputs for all micro-batches, for `go_on`; the stream stays in front of the block.

        Raises Mistake if an output is NaN or Inf.
        """
        return list(self._outputs(index))

    def go_on(self, ahead: Ahead) -> None:
        """Moves the stream on to the outputs that `advanced` returned."""
        self.hidden, self._carried = [hidden for hidden, _ in ahead], [carried for _, carried in ahead]

    @torch.no_grad()
    def logits(self, batch: int, tokens_BL: Tensor) -> Tensor:
        """The model's logits (B x L x V), after the last block; needs `ends_resident`."""
        return self.blocks.logits(tokens_BL, self.hidden[batch], self._carried[batch])

    def logits_at(self, batch: int, tokens_BL: Tensor, positions_BT: Tensor) -> Tensor:
        """The model's logits at T positions of each sequence (B x T x V), computed for these alone if the head can.

        Needs `ends_resident`.
        """
        if not self.blocks.logits_by_token:
            return _at(self.logits(batch, tokens_BL), positions_BT)
        with torch.no_grad():
            return self.blocks.logits(tokens_BL.gather(1, positions_BT), _at(self.hidden[batch], positions_BT))

    def logits_in_parts(self, batch: int, tokens_BL: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Which tokens of L, and their logits (B x T x V), part by part: those of all at once may be large.

        A part has at least one token of each sequence.
        """
        hidden_BLH, (sequences, length) = self.hidden[batch], tokens_BL.shape
        head = self.blocks.model.get_input_embeddings().weight.shape[0]
        at_once = tokens_at_once(self.blocks.device, sequences, head) if self.blocks.logits_by_token else length
        if at_once >= length:
            yield slice(0, length), self.logits(batch, tokens_BL)
            return
        for start in range(0, length, at_once):
            part = slice(start, min(start + at_once, length))
            yield part, self.blocks.logits(tokens_BL[:, part], hidden_BLH[:, part])

    def _step(self, index: int, batch: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Carried]:
        call = self._calls[batch][index]
        if call is None:  # the model does not run this block
            return self.hidden[batch].to(self.blocks.device, dtype), self._carried[batch]
        if self._sent[0] != index:
            self._sent = (index, {})
        known = self._sent[1] if dtype is None else None
        return self.blocks.step(index, self.hidden[batch], call, self._carried[batch], dtype, known)

    @torch.no_grad()
    def _outputs(self, index: int) -> Iterator[tuple[Tensor, Carried]]:
        are_finite = []  # read at the end: otherwise host and GPU would synchronise after every micro-batch
        for batch in range(len(self.hidden)):
            out, carried = self._step(index, batch)
            if out.device.type == "cpu":
                self._check(index, all_finite(out))
            else:
                are_finite.append(finite(out))
            assert self._keep is not None
            yield self._keep(out), alike(carried.mapped(self._keep), self._carried[batch])
        self._check(index, not are_finite or bool(torch.stack(are_finite).all()))

    def _check(self, index: int, is_finite: bool) -> None:
        if not is_finite:
            raise damage.of_block(self.blocks, index)

    def saved(self) -> list[Tensor] | None:
        """The whole stream as tensors for `restore`; None if it has other values than tensors in known containers."""
        tensors = list(self.hidden)
        notes = []
        for first, carried in zip(self._first, self._carried, strict=True):
            places = [[place.block, place.leaf, len(tensors) + i] for i, place in enumerate(carried.values)]
            tensors += [value.contiguous().clone() for value in carried.values.values()]
            try:
                containers = [
                    None if _same(now, before) else _noted(now, tensors)
                    for now, before in zip(carried.shared, first.shared, strict=True)
                ]
            except TypeError:
                return None
            notes.append([places, containers])
        note = torch.frombuffer(bytearray(json.dumps(notes), "utf-8"), dtype=torch.uint8)
        return [note, *tensors]

    def restore(self, saved: Sequence[Tensor]) -> bool:
        """Replaces the stream by what `saved` returned; False, without changes, if the micro-batches differ."""
        if not saved or saved[0].dtype != torch.uint8:
            return False
        notes = json.loads(bytes(saved[0].tolist()))
        tensors = saved[1:]
        hidden = tensors[: len(notes)]
        if [len(h) for h in hidden] != [len(h) for h in self.hidden] or any(
            h.shape[1] != mine.shape[1] for h, mine in zip(hidden, self.hidden, strict=True)
        ):
            return False
        assert self._keep is not None
        keep = self._keep
        tensors = [keep(tensor.to(self.blocks.device)) for tensor in tensors]
        self.hidden = tensors[: len(notes)]
        self._carried = [
            Carried(
                {Returned(block, leaf): tensors[place] for block, leaf, place in places},
                [
                    first_one if note is None else _filled(first_one, _read(note, tensors))
                    for note, first_one in zip(containers, first.shared, strict=True)
                ],
            )
            for (places, containers), first in zip(notes, self._first, strict=True)
        ]
        return True

    def twin(self) -> Activations:
        """A copy of the stream that advances by itself."""
        twin = copy.copy(self)
        twin.hidden = list(self.hidden)
        twin._carried = list(self._carried)
        return twin


def _same(now: Any, before: Any) -> bool:
    """Whether a container still holds the same objects as before any block ran."""
    if isinstance(now, MutableMapping):
        return now.keys() == before.keys() and all(_same(now[key], before[key]) for key in now)
    if isinstance(now, list | tuple):
        return len(now) == len(before) and all(map(_same, now, before))
    if isinstance(now, Tensor) or not hasattr(now, "__dict__"):
        return now is before or (not isinstance(now, Tensor) and now == before)
    return vars(now).keys() == vars(before).keys() and all(_same(vars(now)[k], vars(before)[k]) for k in vars(now))


def _noted(value: Any, tensors: list[Tensor]) -> list[Any]:
    """A container as JSON, with its tensors appended to the list. Raises TypeError for other values."""
    if isinstance(value, Tensor):
        tensors.append(value.contiguous().clone())
        return ["tensor", len(tensors) - 1]
    if isinstance(value, MutableMapping):
        if not all(isinstance(key, str | int) for key in value):
            raise TypeError
        return ["dict", [[key, _noted(part, tensors)] for key, part in value.items()]]
    if isinstance(value, list | tuple):
        return [type(value).__name__, [_noted(part, tensors) for part in value]]
    if value is None or isinstance(value, str | int | float | bool):
        return ["value", value]
    raise TypeError


def _read(note: list[Any], tensors: Sequence[Tensor]) -> Any:
    kind, content = note
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _read(part, tensors) for key, part in content}
    if kind == "value":
        return content
    parts = [_read(part, tensors) for part in content]
    return parts if kind == "list" else tuple(parts)


def _filled(first: Any, content: Any) -> Any:
    """A container of the type of `first` with this content."""
    if isinstance(first, MutableMapping):
        new = copy.copy(first)
        new.clear()
        new.update(content)
        return new
    return content


def _at(x_BLN: Tensor, positions_BT: Tensor) -> Tensor:
    """The rows of each sequence at its T positions (B x T x N)."""
    return x_BLN.gather(1, positions_BT.to(x_BLN.device)[..., None].expand(-1, -1, x_BLN.shape[2]))
