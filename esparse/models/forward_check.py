"""Checks on a few tokens that running a model block by block computes what its own forward computes.

The model's own forward runs once. At each block, esparse takes its own step from its own hidden states, and both
outputs are compared; so are the logits at the end. Only the current block is on the device, so a store reads every
weight once. The same forward shows which layers decide which experts run, and whether a token sees later tokens.

Shapes: B sequences, L tokens of a sequence, H hidden width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from esparse.linalg import all_finite
from esparse.models.blocks import BlockModel, Entered, HandsOn, OtherLeaf
from esparse.models.calls import Carried, Output, UnsupportedModel, leaf_of, tensors
from esparse.models.routers import Watch

log = logging.getLogger("esparse")

TOKENS = 32  # in each of two sequences: about a 10,000th of a usual calibration
NOISE = 0.05  # of the largest logit: a larger difference between two passes is not rounding
TRIES = 4  # each try knows more about the blocks' outputs


@dataclass(slots=True)
class _Seen:
    """What one forward pass of the model has shown."""

    order: list[int] = field(default_factory=list)
    outputs: dict[int, Output] = field(default_factory=dict)
    differs: int | None = None  # the first block whose output differs
    argument: str | None = None  # of that block, the first argument that differs
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    walked: tuple[Tensor, Carried] | None = None


@torch.no_grad()
def check(blocks: BlockModel, tokens_SL: Tensor) -> None:
    """Raises UnsupportedModel, with the first block that differs, unless both ways give the same logits.

    Raises it also if a token sees later tokens, because that is no causal language model. Checks a model only once.
    """
    if blocks.checked or not len(tokens_SL):
        return
    tokens_BL = _tokens(tokens_SL).to(blocks.device)
    seen = _Seen()
    entered: Entered | None = None
    failed: Exception | None = None
    with blocks.ends_resident():
        for _ in range(TRIES):
            entered, failed = None, None
            try:
                entered = blocks.enter(tokens_BL)
            except OtherLeaf as other:
                form = blocks.outputs[other.block]
                blocks.outputs = [replace(o, main=other.leaf) if o.same_form(form) else o for o in blocks.outputs]
                seen = _Seen()
                continue
            except Exception as error:  # the model fails on outputs of a wrong form
                failed = error
            seen = _forward(blocks, tokens_BL, entered)
            if not _learned(blocks, seen):
                break
        _check_order(blocks, seen)
        if entered is None:
            raise _said(blocks, failed)
        _check_logits(blocks, tokens_BL, seen)
        if blocks.store.whole:  # reading from files would take twice as long
            _check_side_by_side(blocks, tokens_BL, seen.logits)
    _check_causal(blocks, tokens_BL, seen.logits)
    left_out = sorted(set(range(len(blocks.blocks))) - set(seen.order))
    if left_out:
        names = ", ".join(map(blocks.name, left_out))
        log.warning("%s: stays dense, because the model does not run it for text alone", names)
    blocks.checked = True


def _tokens(tokens_SL: Tensor) -> Tensor:
    """Two sequences that differ only in their last quarter: differences before it show that a token sees later ones."""
    first_L = tokens_SL[0, :TOKENS]
    length = len(first_L)
    quarter = max(1, length // 4)
    other_L = tokens_SL[-1, :length] if len(tokens_SL) > 1 else first_L.flip(0)
    second_L = first_L.clone()
    second_L[length - quarter :] = other_L[length - quarter :]
    return torch.stack([first_L, second_L])


def _forward(blocks: BlockModel, tokens_BL: Tensor, entered: Entered | None) -> _Seen:
    """Runs the model's own forward, and esparse's step beside every block until the two differ."""
    seen = _Seen()
    if entered is not None:
        seen.walked = (entered.hidden, entered.carried)

    def run(index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _, hidden, others, named = blocks.hidden_apart(index, args, kwargs)
        call = None if entered is None or index in seen.order else entered.calls[index]
        seen.order.append(index)
        step = None
        with blocks.resident(index) as module:
            if seen.walked is not None and call is not None:
                if index == blocks.order[-1]:
                    call = replace(call, keeps=call.keeps | blocks.outputs[index].others(index))
                # As in a run: an observing pass, which must change nothing, then the step. The model's own forward
                # comes last, since it may write into its inputs.
                module.forward, wrapper = forward, module.forward
                try:
                    if seen.differs is None:
                        entering, passed, _ = blocks.passed(seen.walked[0], call, seen.walked[1])
                        seen.argument = _other_argument(
                            (entering, *passed.args), passed.kwargs, (hidden, *others), named
                        )
                    blocks.step(index, seen.walked[0], call, seen.walked[1])
                    step = blocks.step(index, seen.walked[0], call, seen.walked[1])
                finally:
                    module.forward = wrapper
            with blocks.experts_one_by_one(), Watch(module, blocks.name(index), blocks.routers):
                out = forward(*args, **kwargs)
        seen.outputs.setdefault(index, Output.of(out, hidden, blocks.name(index)))
        seen.walked = step
        if step is not None and seen.differs is None:
            plain = leaf_of(out, blocks.outputs[index].main, blocks.name(index))
            if gap(step[0], plain) > rounding(plain):
                seen.differs = index
        return out

    with blocks.wrapped(run):
        seen.logits = unmasked(blocks.model(input_ids=tokens_BL, use_cache=False).logits)
    return seen


def _learned(blocks: BlockModel, seen: _Seen) -> bool:
    """Stores what the pass showed about the blocks' order and outputs; returns whether it is new."""
    news = False
    for index, output in seen.outputs.items():
        if not output.same_form(blocks.outputs[index]):
            blocks.outputs[index], news = output, True
    if seen.order != blocks.order and seen.order == sorted(set(seen.order)):
        blocks.order, news = seen.order, True
    return news


def _check_order(blocks: BlockModel, seen: _Seen) -> None:
    if not seen.order:
        raise UnsupportedModel(f"the model runs none of {blocks.prefix} for text alone")
    for index in seen.order:
        if (times := seen.order.count(index)) > 1:
            raise UnsupportedModel(
                f"{blocks.name(index)} runs {times} times in one forward pass of {type(blocks.model).__name__}: it "
                "gets other inputs each time (a looped model), and esparse can prune a block for one of them only"
            )
    if seen.order != blocks.order:
        raise UnsupportedModel(
            f"the blocks of {type(blocks.model).__name__} do not run in the order of their list, but as "
            f"{', '.join(map(str, seen.order))}"
        )


def _check_logits(blocks: BlockModel, tokens_BL: Tensor, seen: _Seen) -> None:
    """Raises UnsupportedModel if the blocks, run one by one, give other logits than the model."""
    plain = seen.logits
    if not all_finite(plain):
        return  # the run itself will name the damaged weights or activations
    assert seen.walked is not None
    hidden, rest = seen.walked
    apart = float("inf")
    for hands_on in HandsOn:  # the least that is enough, because it is stored for every sequence
        blocks.hands_on = hands_on
        kept = Carried() if hands_on == HandsOn.HIDDEN else rest
        if hands_on == HandsOn.ALL:
            again = _forward(blocks, tokens_BL, blocks.enter(tokens_BL)).walked
            if again is None or again[1].values.keys() == rest.values.keys():
                break
            hidden, kept = again
        apart = min(apart, gap(unmasked(blocks.logits(tokens_BL, hidden, kept)), plain))
        if apart <= rounding(plain):
            blocks.logits_by_token = not kept.values and _by_token(blocks, tokens_BL, hidden, plain)
            return
    blocks.hands_on = HandsOn.HIDDEN
    # Kernels that add in no fixed order (atomics in mixtures of experts on a GPU) give slightly other logits each time.
    noise = _noise(blocks, tokens_BL, plain)
    if apart <= 4 * noise:
        return
    if seen.differs is None:
        first = "every block returns what it should, so the model reads something else of them behind the last one"
    else:
        first = f"the first block that differs is {blocks.name(seen.differs)}, which "
        first += (
            f"is given another {seen.argument} than was recorded while no block computed"
            if seen.argument
            else "reads or writes something that is not among its arguments"
        )
    raise UnsupportedModel(
        f"the blocks of {type(blocks.model).__name__}, run one after the other, give other logits than the model "
        f"(they differ by {apart / float(plain.abs().max()):.2g} of the largest): {first}; esparse would prune and "
        "measure another network"
    )


def _by_token(blocks: BlockModel, tokens_BL: Tensor, hidden_BLH: Tensor, plain: Tensor) -> bool:
    """Whether the head gives the logits of some tokens if it is given their hidden states alone."""
    half = slice(tokens_BL.shape[1] // 2, None)
    try:
        logits = unmasked(blocks.logits(tokens_BL[:, half], hidden_BLH[:, half]))
    except Exception:  # a model that cuts its hidden states apart by their place, as ProphetNet's streams
        return False
    return gap(logits, plain[:, half]) <= rounding(plain)


def _noise(blocks: BlockModel, tokens_BL: Tensor, plain: Tensor) -> float:
    """The largest difference of the model's own logits between two passes; raises UnsupportedModel if it is large."""
    noise = gap(_forward(blocks, tokens_BL, None).logits, plain)
    if noise > NOISE * float(plain.abs().max()):
        raise UnsupportedModel(
            f"{type(blocks.model).__name__} gives other logits each time for the same tokens (they differ by "
            f"{noise / float(plain.abs().max()):.2g} of the largest): is it in training mode, or does it use random "
            "numbers?"
        )
    return noise


def _check_side_by_side(blocks: BlockModel, tokens_BL: Tensor, plain: Tensor) -> None:
    """Raises UnsupportedModel if a block stores something in itself, or in the model, that a later block reads.

    As in a run, each block gets both micro-batches before the next block does; stored values are the second one's then.
    """
    if not all_finite(plain):
        return
    flows = []
    for ids_BL in (tokens_BL, tokens_BL.flip(0, 1)):
        entered = blocks.enter(ids_BL)
        flows.append((entered.hidden, entered.carried, entered.calls))
    for index in blocks.order:
        with blocks.resident(index):
            for place, (hidden, carried, calls) in enumerate(flows):
                call = calls[index]
                assert call is not None
                flows[place] = (*blocks.step(index, hidden, call, carried), calls)
    hidden, carried, _ = flows[0]
    apart = gap(unmasked(blocks.logits(tokens_BL, hidden, carried)), plain)
    if apart > rounding(plain) and apart > 4 * _noise(blocks, tokens_BL, plain):
        raise UnsupportedModel(
            f"the blocks of {type(blocks.model).__name__} leave something in themselves or in the model that later "
            "blocks read: run on one micro-batch after the other, they give other logits than the model (they "
            f"differ by {apart / float(plain.abs().max()):.2g} of the largest)"
        )


def _check_causal(blocks: BlockModel, tokens_BL: Tensor, logits_BLV: Tensor) -> None:
    """Raises UnsupportedModel if later tokens change the logits of earlier ones."""
    same_L = (tokens_BL[0] == tokens_BL[1]).long().cumprod(0).bool()
    if not all_finite(logits_BLV) or logits_BLV.shape[1] != len(same_L) or not same_L.any():
        return
    first, second = logits_BLV[0, same_L].float(), logits_BLV[1, same_L].float()
    # Equal rows differ at most by the order of sums, far less than by a later token. The root mean square is compared,
    # because rounding of single logits has little weight in it.
    if (first - second).square().mean().sqrt() > max(1e-4, 2 * _eps(logits_BLV)) * first.square().mean().sqrt():
        raise UnsupportedModel(
            f"{type(blocks.model).__name__} sees the tokens behind the one it predicts: it is an encoder, no causal "
            "language model (a BERT becomes one by is_decoder=true in its config.json), and its perplexity means "
            "nothing"
        )


def _other_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], of_model: tuple[Any, ...], named: dict[str, Any]
) -> str | None:
    """The first argument whose tensors differ from those that the model passes."""
    pairs = [(f"argument {place}", *pair) for place, pair in enumerate(zip(args, of_model, strict=False))]
    pairs += [(name, kwargs.get(name), value) for name, value in named.items()]
    for name, mine, models in pairs:
        for one, other in zip(tensors(mine), tensors(models), strict=False):
            if gap(one, other) > rounding(other):
                return name
    return None


def unmasked(logits: Tensor) -> Tensor:
    """The logits with 0 for tokens that the model forbids: beside -Inf or -1e38, every difference would be rounding."""
    return logits.masked_fill(logits <= torch.finfo(logits.dtype).min / 2, 0.0)


def gap(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors; infinite if their shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    wide = torch.promote_types(one.dtype, torch.float32)  # complex for some rotary embeddings
    return float((one.to(wide) - other.to(one.device, wide)).abs().max()) if one.numel() else 0.0


def rounding(plain: Tensor) -> float:
    """The largest difference that the order of sums may make."""
    # Both ways call the same kernels on tensors of the same shapes, so they nearly always agree bit by bit. Memory
    # addresses may differ, and a matrix product's order of sums can depend on them: that changes less than two steps
    # of the largest value in the model's dtype. Real errors are far larger.
    return 2 * _eps(plain) * float(plain.abs().max()) if plain.numel() and _eps(plain) else 0.0


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps if tensor.is_floating_point() or tensor.is_complex() else 0.0


def _said(blocks: BlockModel, failed: Exception | None) -> Exception:
    if failed is None or isinstance(failed, UnsupportedModel):
        return failed or UnsupportedModel(
            f"what the blocks of {type(blocks.model).__name__} return changes from pass to pass"
        )
    reason = str(failed).strip().partition("\n")[0]
    return UnsupportedModel(
        f"{type(blocks.model).__name__} does not run while its blocks only hand on what they are given, so they cannot "
        f"be run one by one ({type(failed).__name__}: {reason})"
    )
