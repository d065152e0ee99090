"""Checks what the parts of a method return: a part of a user's own may return anything.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from esparse.errors import Mistake
from esparse.linalg import all_finite
from esparse.metrics import Metric
from esparse.parts.plugins import class_name
from esparse.records.report import RecoveryReport
from esparse.recoveries import Finish, Recovery
from esparse.stats import LayerStats
from esparse.updates import Layer, Solution


@contextmanager
def at(part: object, layer: str, dense_OI: Tensor | None = None) -> Iterator[None]:
    """Notes on an error of a part which part it was, and at which layer. Raises Mistake if it changes `dense_OI`."""
    version = None if dense_OI is None else dense_OI._version
    try:
        yield
    except Mistake:
        raise
    except Exception as error:
        error.add_note(f"in {type(part).__name__} at {layer}")
        raise
    if dense_OI is not None and dense_OI._version != version:
        raise Mistake(f"{type(part).__name__} changes the dense weights of {layer} in place: change a copy of them")


def scores(metric: Metric, weight_OI: Tensor, stats: LayerStats) -> Tensor:
    """The metric's scores of a layer, in float32. Raises Mistake if they are none."""
    with at(metric, stats.name, weight_OI):
        score_OI = metric.score(weight_OI, stats)
    who = f"the scores that {type(metric).__name__} gives {stats.name}"
    _check(score_OI, who, weight_OI)
    score_OI = score_OI.detach().float()
    if not all_finite(score_OI):
        own = ":" in class_name(type(metric))
        raise Mistake(f"{who} hold NaN or Inf" + ("" if own else ": its input overflows, try model.dtype=float32"))
    return score_OI


def order(shuffle: object, order_I: Any, inputs: int, layer: str) -> Tensor | None:
    """The order that a shuffle gives a layer; None is the channels' own. Raises Mistake if it is none."""
    if order_I is None:
        return None
    who = f"the order that {type(shuffle).__name__} gives {layer}"
    if not isinstance(order_I, Tensor):
        raise Mistake(f"{who} must be a tensor or None, got {type(order_I).__name__}")
    integers = not (order_I.is_floating_point() or order_I.is_complex() or order_I.dtype == torch.bool)
    if not integers or order_I.shape != (inputs,):
        raise Mistake(f"{who} must be {inputs} integers, got {order_I.dtype} of shape {list(order_I.shape)}")
    if not torch.equal(order_I.long().sort().values, torch.arange(inputs, device=order_I.device)):
        raise Mistake(f"{who} must name each of its {inputs} channels once")
    return order_I.long()


def solution(part: object, given: Any, layer: Layer) -> Solution:
    """The solution that an update or a recovery gives a layer. Raises Mistake if it is none."""
    who = f"{type(part).__name__} gives {layer.stats.name}"
    if not isinstance(given, Solution):
        raise Mistake(f"what {who} must be a Solution, got {type(given).__name__}")
    _check(given.weight_OI, f"the weights that {who}", layer.dense_OI)
    _check(given.keep_OI, f"the mask that {who}", layer.dense_OI)
    if given.keep_OI.dtype != torch.bool:
        raise Mistake(f"the mask that {who} must be of bool (True: the weight is kept), got {given.keep_OI.dtype}")
    if given.bias_shift_O is not None:
        _check(given.bias_shift_O, f"the shift of the bias that {who}", layer.dense_OI[:, 0])
    for value in (given.weight_OI, given.bias_shift_O):
        if value is not None and not all_finite(value):
            raise Mistake(f"the weights that {who} hold NaN or Inf")
    return given


def statistics(part: object, asked: Any) -> Mapping[str, Any]:
    """The statistics that a part asks for. Raises Mistake if they are not by name, or cannot be built."""
    if not isinstance(asked, Mapping) or not all(callable(build) for build in asked.values()):
        raise Mistake(
            f"{type(part).__name__}.collects must return statistics by name, for instance "
            f'{{"norm": ColumnNorm}}, got {asked!r}'
        )
    return asked


def reports(recovery: Recovery, given: Any) -> list[RecoveryReport]:
    """What a recovery reports of its trainings. Raises Mistake if these are no reports."""
    if not isinstance(given, list) or not all(isinstance(one, RecoveryReport) for one in given):
        raise Mistake(f"{type(recovery).__name__} must return a list of RecoveryReport, or an empty one, got {given!r}")
    return given


def finish(recovery: Recovery, given: Any) -> Finish:
    """What a recovery does behind a block. Raises Mistake if it is no function."""
    if not callable(given):
        raise Mistake(f"{type(recovery).__name__}.begin must return a function of the block's masks, got {given!r}")
    return given


def _check(given: Any, who: str, like: Tensor) -> None:
    """Raises Mistake if `given` is no tensor of real numbers with the shape and device of `like`."""
    if not isinstance(given, Tensor):
        raise Mistake(f"{who} must be a tensor of shape {list(like.shape)}, got {type(given).__name__}")
    if given.shape != like.shape:
        raise Mistake(f"{who} must be of shape {list(like.shape)}, got {list(given.shape)}")
    if given.is_complex() or given.device != like.device:
        raise Mistake(f"{who} must be real numbers on {like.device}, got {given.dtype} on {given.device}")
