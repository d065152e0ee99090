"""The block loop: observe, score, shuffle, keep, update, advance. The one place that writes weights.

Shapes: O outputs, I inputs, S sequences, L tokens of a sequence. Polarity: True in `keep` means the weight survives.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esparse.metrics import Metric
from esparse.models.blocks import Activations, BlockModel
from esparse.models.matrices import BlockMatrices, InputGroup, Matrix
from esparse.patterns import Grouping, Pattern
from esparse.report import LayerReport, Stages
from esparse.shuffles import Shuffle
from esparse.stats import ColumnNorm, Factory, LayerStats, Statistic, TokenSample
from esparse.updates import Layer, Solution, Update

log = logging.getLogger("esparse")

ERROR_TOKENS = 2048  # tokens on which a layer's relative error is measured


@dataclass(kw_only=True, slots=True)
class Method:
    """Everything that decides which weights survive and what becomes of them."""

    metric: Metric
    pattern: Pattern
    shuffle: Shuffle
    update: Update

    def collects(self) -> dict[str, Factory]:
        asked: dict[str, Factory] = {"norm": ColumnNorm, "sample": partial(TokenSample, most=ERROR_TOKENS)}
        return asked | self.metric.collects() | self.update.collects()


@dataclass(slots=True)
class Pruned:
    """What pruning leaves beside the model: reports, keep masks (bool, outputs x inputs) and channel orders.

    Masks and orders are keyed by the weight's name in the state dict; experts of one parameter are stacked in front.
    """

    layers: list[LayerReport] = field(default_factory=list)
    keeps: dict[str, Tensor] = field(default_factory=dict)
    orders: dict[str, Tensor] = field(default_factory=dict)
    pattern_holds: bool = True
    weights: int = 0
    survivors: int = 0


def prune(
    blocks: BlockModel,
    tokens_SL: Tensor,
    method: Method,
    *,
    skip: Sequence[str] = (),
    stages: Stages,
    on_layer: Callable[[int, LayerReport], None] = lambda index, layer: None,
) -> Pruned:
    """Prunes the model in place, block after block; later blocks see what the pruned ones before them return.

    `skip` holds regular expressions of layer names that stay dense. Raises ValueError for weights or activations that
    are not finite, naming the layer.
    """
    pruned = Pruned()
    with stages("calibrate"):
        activations = Activations(blocks, tokens_SL)
    for index in range(len(blocks.blocks)):
        with blocks.resident(index):
            with stages("calibrate"):
                observed = _observe(activations, index, method.collects(), skip=skip, sequences=len(tokens_SL))
            for group, statistics in observed:
                for layer in _prune_group(group, statistics, method, pruned, stages=stages):
                    pruned.layers.append(layer)
                    on_layer(index, layer)
            if index + 1 < len(blocks.blocks):
                with stages("calibrate"):
                    activations.advance(index)
    if not pruned.layers:
        raise ValueError("no layer was pruned: model.skip leaves nothing, or the blocks hold no linear layers")
    return pruned


def _observe(
    activations: Activations, index: int, collects: dict[str, Factory], *, skip: Sequence[str], sequences: int
) -> list[tuple[InputGroup, dict[str, Statistic]]]:
    """The input groups of one block, each with what its tokens summed up to."""
    blocks = activations.blocks
    matrices = BlockMatrices(blocks.blocks[index], f"{blocks.prefix}.{index}", skip)
    statistics: dict[int, dict[str, Statistic]] = {}

    def statistics_of(group: InputGroup) -> dict[str, Statistic]:
        if id(group) not in statistics:
            size: dict[str, Any] = {"inputs": group.inputs, "sequences": sequences, "device": blocks.device}
            statistics[id(group)] = {name: build(**size) for name, build in collects.items()}
        return statistics[id(group)]

    look, looks = 0, 1
    while look < looks:

        def read(group: InputGroup, x_TI: Tensor, look: int = look) -> None:
            for statistic in statistics_of(group).values():
                statistic.add(x_TI, look)

        with matrices.observed(read):
            activations.observe(index)
        looks = max([s.looks for of_group in statistics.values() for s in of_group.values()], default=1)
        look += 1
    for name in matrices.complete():
        log.warning("%s took no part in the forward pass and stays dense", name)
    return [(group, statistics_of(group)) for group in matrices.groups]


def _prune_group(
    group: InputGroup, statistics: dict[str, Statistic], method: Method, pruned: Pruned, *, stages: Stages
) -> list[LayerReport]:
    """Prunes the matrices that read one tensor: they share its statistics and one channel order."""
    start = time.perf_counter()
    tokens = statistics["norm"].tokens
    with stages("score"):
        weights = [_finite(matrix) for matrix in group.matrices]
        stats = [LayerStats(matrix.name, statistics, tokens) for matrix in group.matrices]
        scores = [_scores(method.metric, w, s) for w, s in zip(weights, stats, strict=True)]
    with stages("shuffle"):
        grouping = Grouping(method.pattern, method.shuffle.order(torch.cat(scores), method.pattern))
    shared = (time.perf_counter() - start) / len(group.matrices)
    reports = []
    for matrix, weight_OI, stat, score_OI in zip(group.matrices, weights, stats, scores, strict=True):
        start = time.perf_counter()
        with stages("score"):
            solution = Solution.without_update(weight_OI, grouping.keep_top(score_OI))
        if stat.tokens:
            with stages("update"):
                solution = method.update.apply(Layer(weight_OI, grouping, stat), solution)
        # Not weight * keep: a product leaves -0.0, on which packing kernels were seen to fail.
        matrix.view().copy_(solution.weight_OI.masked_fill(~solution.keep_OI, 0.0))
        _remember(pruned, matrix, solution.keep_OI, grouping)
        report = _report(matrix, weight_OI, solution.keep_OI, score_OI, statistics["sample"])
        report.seconds = shared + time.perf_counter() - start
        reports.append(report)
    return reports


def _finite(matrix: Matrix) -> Tensor:
    weight_OI = matrix.view().float()
    if not torch.isfinite(weight_OI).all():
        bad = int((~torch.isfinite(weight_OI)).sum())
        raise ValueError(f"{matrix.name} holds {bad} weights that are NaN or Inf: the checkpoint is damaged")
    return weight_OI.clone() if weight_OI.data_ptr() == matrix.view().data_ptr() else weight_OI


def _scores(metric: Metric, weight_OI: Tensor, stats: LayerStats) -> Tensor:
    if stats.tokens == 0:
        log.warning("%s saw no calibration token: scored by magnitude", stats.name)
        return weight_OI.abs()
    scores_OI = metric.score(weight_OI, stats).float()
    if not torch.isfinite(scores_OI).all():
        raise ValueError(f"the scores of {stats.name} hold NaN or Inf: its input overflows, try model.dtype=float32")
    return scores_OI


def _remember(pruned: Pruned, matrix: Matrix, keep_OI: Tensor, grouping: Grouping) -> None:
    """Stores mask and order, and measures on the stored weights whether the pattern holds."""
    survives_OI = matrix.view() != 0
    pruned.pattern_holds &= grouping.holds(survives_OI)
    pruned.weights += survives_OI.numel()
    pruned.survivors += int(survives_OI.sum())
    for store, value in ((pruned.keeps, keep_OI), (pruned.orders, grouping.order_I)):
        if value is None:
            continue
        if matrix.expert is None:
            store[matrix.entry] = value.cpu()
        else:
            experts = len(matrix.parameter)
            stack = store.setdefault(matrix.entry, value.new_zeros(experts, *value.shape, device="cpu"))
            stack[matrix.expert] = value.cpu()


def _report(
    matrix: Matrix, before_OI: Tensor, keep_OI: Tensor, score_OI: Tensor, sample: TokenSample | Statistic
) -> LayerReport:
    assert isinstance(sample, TokenSample)
    after_OI = matrix.view().float()
    x_SI = sample.x_SI()
    norm = float((x_SI @ before_OI.T).norm())
    error = float((x_SI @ (before_OI - after_OI).T).norm())
    total = float(score_OI.sum(dtype=torch.float64))
    return LayerReport(
        name=matrix.name,
        shape=list(before_OI.shape),
        density=float((after_OI != 0).float().mean()),
        kept_score=float(score_OI[keep_OI].sum(dtype=torch.float64)) / total if total else 1.0,
        relative_error=(error / norm if norm else 0.0) if len(x_SI) else None,
        error_tokens=len(x_SI),
        seconds=0.0,
    )
