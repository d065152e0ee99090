"""Prunes each block: score, shuffle, keep, update, recover. The only module that writes masks.

Shapes: O outputs, I inputs, S sequences, L tokens of a sequence. Polarity: True in `keep` means the weight is kept.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from esparse.allocations import Measured
from esparse.errors import Mistake
from esparse.linalg import all_finite
from esparse.metrics import Metric
from esparse.models.block import Block
from esparse.models.blocks import BlockModel
from esparse.models.damage import damaged
from esparse.models.folding import foldable_runs
from esparse.models.layer_names import with_layers
from esparse.models.matrices import BlockMatrices, InputGroup, Matrix
from esparse.parts import expressions
from esparse.patterns import Grouping, Pattern
from esparse.prepare import NoPreparation
from esparse.pruning import gradients, returned
from esparse.pruning.block_loop import BlockLoop
from esparse.pruning.journal import Entry, Journal
from esparse.pruning.method import Method
from esparse.pruning.observation import Observed
from esparse.pruning.outcome import Pruned, add_mask, count_dense, measure_density, remembered, warn_if_sparse_before
from esparse.pruning.rounding import check_widths, joint_grid, remember, rounded
from esparse.quantise.grids import Grid
from esparse.records.report import LayerReport, Stages
from esparse.recoveries import PrunedModel, Recovery
from esparse.shuffles import Layers, NoShuffle, Shuffle
from esparse.stats import ColumnEntropy, LayerStats, TokenSample
from esparse.updates import Layer, Solution, Update

log = logging.getLogger("esparse")

# Upper limit on the total weights of layers that are updated jointly: an update has float32 copies of all of them.
JOINED_WEIGHTS = 2**27
BINS = 100  # bins of a profile's entropies, if the metric has no entropy


def prune(
    blocks: BlockModel,
    tokens_SL: Tensor,
    method: Method,
    *,
    further: Sequence[Tensor] = (),
    skip: Sequence[str] = (),
    stages: Stages,
    on_layer: Callable[[int, LayerReport], None] = lambda index, layer: None,
    journal: Journal | None = None,
    profile: bool = False,
) -> Pruned:
    """Prunes the model in place, block after block; a block's inputs come from the pruned blocks before it.

    With several `blocks.ranks`, `tokens_SL` are the tokens of all ranks, and all ranks end with the same weights.
    `further`: other samples of the same text, for recoveries that ask for them (`further_samples`). `skip`: regular
    expressions of layer names that stay dense. `journal`: finished blocks are read from it and written
    to it. `profile`: keeps the channels' entropies, norms and mean scores. Raises Mistake, with the layer's name, for
    weights or activations that are NaN or Inf.
    """
    check_store(blocks, method)
    check_widths(blocks, method, skip)
    check_skip(blocks.by_name(), skip, method.recovery)
    skip = [*skip, *blocks.stay_dense]
    pruned, recovery = Pruned(grid=method.quantise if isinstance(method.quantise, Grid) else None), method.recovery
    if method.needs_dense_stream():
        _say_shared(blocks)
    loop = BlockLoop(blocks, tokens_SL, skip, stages)
    if method.metric.gradients() == "model":
        with stages("calibrate"):
            loop.of_model = gradients.of_model(blocks, tokens_SL, skip)
    allocated = _allocated(loop, method)
    parent = copy.deepcopy(blocks.model) if recovery.needs_parent() else None

    for index in range(journal.finished if journal else 0):
        pruned.take(remembered(blocks, index, journal))

    def prune_block(block: Block, groups: Iterable[Observed]) -> Entry:
        of_block, runs = Pruned(), None
        if method.shuffle.foldable:
            with stages("shuffle"):
                runs = blocks.ranks.from_first(lambda: foldable_runs(block))
        with stages("recover"):
            finish = returned.finish(recovery, recovery.begin(block))
        taken = {_place(matrix) for matrix, _ in pruned.groupings}
        for group in (left for group in groups if (left := _not_yet(group, taken)) is not None):
            for layer in _prune_group(group, method, allocated, of_block, runs, stages=stages, profile=profile):
                of_block.layers.append(layer)
                on_layer(block.index, layer)
        with stages("recover"):
            of_block.recoveries += returned.reports(recovery, finish(of_block.keeps))
        pruned.take(of_block)
        return of_block.entry()

    if method.allocation.measures():  # its pass over the blocks has prepared them already
        method = dataclasses.replace(method, prepare=NoPreparation())
    collects = method.collects()
    if profile:
        collects.setdefault("entropy", partial(ColumnEntropy, bins=BINS, range="channel", limit=0.0))
    loop(method, collects, prune_block, changes="pruned", journal=journal)
    if not pruned.layers:
        raise Mistake("no layer was pruned: model.skip leaves nothing, or the blocks hold no linear layers")
    with stages("recover"):
        model = PrunedModel(blocks, parent, tokens_SL, further, pruned.keeps, pruned.groupings, method.seed)
        pruned.recoveries += returned.reports(recovery, recovery.whole(model))
    measure_density(pruned, blocks)
    warn_if_sparse_before(pruned)
    count_dense(pruned, blocks)
    _say_others(blocks, skip)
    return pruned


def _not_yet(group: Observed, taken: set[tuple[int, int | None]]) -> Observed | None:
    """The group without matrices that blocks share and that were pruned already; adds the others to `taken`."""
    left = []
    for matrix in group.inputs.matrices:
        if _place(matrix) in taken:
            log.info("%s is a matrix that was pruned already under another name", matrix.name)
        else:
            left.append(matrix)
            taken.add(_place(matrix))
    return Observed(InputGroup(group.inputs.inputs, left), group.statistics, group.gradients) if left else None


def _place(matrix: Matrix) -> tuple[int, int | None]:
    return id(matrix.parameter), matrix.expert


def check_store(blocks: BlockModel, method: Method) -> None:
    """Raises Mistake if the method needs the whole model and the model is not in memory."""
    why = method.needs_whole_model()
    if why is not None and not blocks.store.whole:
        raise Mistake(f"{why}, which is read block by block here (model.store): use model.store=memory")


def check_skip(blocks: Mapping[str, nn.Module], skip: Sequence[str], recovery: Recovery) -> None:
    """Raises Mistake for a regular expression that is found in no name, and if all of them leave nothing to prune.

    `blocks`: by name. `skip`: of layers that stay dense; those of the recovery are checked as well. Names are those of
    weights and of the modules that hold some: the layers that an expression means would be pruned if it is found in
    none, or in that of an activation function alone.
    """
    expressions.check("model.skip", skip)
    names = {
        name
        for block, module in blocks.items()
        for path, _ in module.named_parameters(remove_duplicate=False)
        for name in with_layers(f"{block}.{path}", block.count(".") + 1)
    }
    first, block = next(iter(blocks.items()))
    such = ", ".join(matrix.entry.removesuffix(".weight") for matrix in BlockMatrices(block, first).layers()[:2])
    for setting, asked in {"model.skip": skip, "recovery.skip": recovery.skips()}.items():
        expressions.check_found(setting, asked, names, such)
    if skip and not any(BlockMatrices(module, name, skip).parameters() for name, module in blocks.items()):
        raise Mistake(f"no layer would be pruned: model.skip={list(skip)} leaves nothing")


def _say_shared(blocks: BlockModel) -> None:
    """Logs a warning about blocks that share weights with an earlier one: the dense stream meets these pruned."""
    earlier: set[int] = set()
    sharing = []
    for name, block in blocks.by_name().items():
        own = {id(parameter) for parameter in block.parameters() if parameter.ndim > 1}
        if own & earlier:
            sharing.append(name)
        earlier |= own
    if sharing and blocks.ranks.leads:
        log.warning(
            "blocks with weights of earlier ones (%d, the first: %s): what the dense model has there is computed with "
            "these weights pruned",
            len(sharing),
            sharing[0],
        )


def _say_others(blocks: BlockModel, skip: Sequence[str]) -> None:
    """Logs a warning about layers that are no matrices to prune by what they compute."""
    others: dict[str, str] = {}
    for name, block in blocks.by_name().items():
        others |= BlockMatrices(block, name, skip, blocks.routers).others
    if others and blocks.ranks.leads:
        log.warning(
            "%d layers stay dense, because they compute something else than a product with their weight: %s",
            len(others),
            ", ".join(f"{name} ({kind})" for name, kind in [*others.items()][:3]),
        )


def _allocated(loop: BlockLoop, method: Method) -> Mapping[str, Pattern]:
    """The patterns of layers with another pattern than the method's, by name."""
    allocation = method.allocation
    if not allocation.measures():
        return {}
    layers: list[Measured] = []
    grouping = Grouping(method.pattern)

    def measure(block: Block, groups: Iterable[Observed]) -> None:
        with loop.stages("score"):
            for group in groups:
                number = len({layer.group for layer in layers})
                for matrix in group.inputs.matrices:
                    weight_OI, stats = _finite(matrix), group.stats(matrix)
                    score_OI = _scores(method.metric, weight_OI, stats)
                    value = allocation.measure(Layer(weight_OI, grouping, stats), score_OI)
                    layers.append(Measured(matrix.name, block.index, number, weight_OI.numel(), value))

    # The part of the method that scores and allocation need: no update, no recovery, no shuffle.
    bare = Method(metric=method.metric, pattern=method.pattern, shuffle=NoShuffle(), prepare=method.prepare)
    # Prepared blocks that stay in memory need not be written.
    changes = None if isinstance(method.prepare, NoPreparation) or loop.blocks.store.whole else "prepared"
    loop(bare, bare.collects() | allocation.collects(), measure, changes=changes)
    return loop.blocks.ranks.from_first(lambda: allocation.plan(layers, method.pattern))


def _prune_group(
    group: Observed,
    method: Method,
    allocated: Mapping[str, Pattern],
    pruned: Pruned,
    runs: Mapping[str, Tensor] | None,
    *,
    stages: Stages,
    profile: bool,
) -> list[LayerReport]:
    """Prunes the matrices of one input group, which share statistics and a channel order."""
    start = time.perf_counter()
    matrices = group.inputs.matrices
    with stages("score"):
        weights = [_finite(matrix) for matrix in matrices]
        stats = [group.stats(matrix) for matrix in matrices]
        scores = [_scores(method.metric, w, s) for w, s in zip(weights, stats, strict=True)]
    if profile and stats[0].tokens:
        pruned.channels |= _channels(stats[0], scores)
    pattern = allocated.get(matrices[0].name, method.pattern)
    with stages("shuffle"):
        grouping = Grouping(pattern, _order_I(group.inputs, method.shuffle, pattern, runs, weights, scores, stats[0]))
    sample = group.statistics["sample"]
    assert isinstance(sample, TokenSample)
    x_SI = sample.x_SI()
    with stages("score"):
        solutions = [
            Solution.without_update(weight_OI, grouping.keep_top(score_OI))
            for weight_OI, score_OI in zip(weights, scores, strict=True)
        ]
    layers = [Layer(weight_OI, grouping, stat) for weight_OI, stat in zip(weights, stats, strict=True)]
    if stats[0].tokens:
        with stages("update"):
            solutions = _updated(method.update, layers, solutions, joint_grid(method))
    shared = (time.perf_counter() - start) / sum(weight_OI.numel() for weight_OI in weights)
    reports = []
    for matrix, layer, solution, score_OI in zip(matrices, layers, solutions, scores, strict=True):
        start = time.perf_counter()
        weight_OI = layer.dense_OI
        if layer.stats.tokens:
            with stages("recover"):
                solution = _recovered(method.recovery, layer, solution)
        with stages("quantise") if method.quantises() else nullcontext():
            solution = rounded(method, layer, solution, matrix.name)
        _write(matrix, solution)
        add_mask(pruned, matrix, solution.keep_OI, grouping)
        remember(pruned.grids, matrix, solution.scales)
        report = _report(matrix, weight_OI, solution, score_OI, x_SI)
        report.pattern = str(pattern)
        report.seconds = shared * weight_OI.numel() + time.perf_counter() - start
        reports.append(report)
    return reports


def _order_I(
    inputs: InputGroup,
    shuffle: Shuffle,
    pattern: Pattern,
    runs: Mapping[str, Tensor] | None,
    weights: list[Tensor],
    scores: list[Tensor],
    stats: LayerStats,
) -> Tensor | None:
    """The channel order of an input group; None: the channels' own. `runs`: of foldable orders, by the first layer."""
    order_I, first = None, inputs.matrices[0]
    with returned.at(shuffle, first.name):
        if runs is not None:
            if (runs_BRD := runs.get(first.entry)) is not None:
                order_I = shuffle.folded_order(_joined(scores), pattern, runs_BRD)
        elif not isinstance(shuffle, NoShuffle):
            together = None
            if "gram" in shuffle.collects() and stats.tokens:
                together = Layers(_joined(weights), stats["gram"].gram_II)
            order_I = shuffle.order(_joined(scores), pattern, together)
    return returned.order(shuffle, order_I, inputs.inputs, first.name)


def _channels(stats: LayerStats, scores: list[Tensor]) -> dict[str, Tensor]:
    """Per input channel: entropy (nats), RMS and mean score (what a shuffle balances).

    The scores are those of all matrices that read the tensor; the entropy is the metric's, if it has one.
    """
    values = {
        "entropy": stats["entropy"].entropy_I(),
        "norm": stats["norm"].norm_I("rms"),
        "score": sum(s.sum(0, dtype=torch.float64) for s in scores) / sum(map(len, scores)),
    }
    return {f"{what}/{stats.name}": value_I.float().cpu() for what, value_I in values.items()}


def _updated(update: Update, layers: Sequence[Layer], starts: Sequence[Solution], grid: Grid | None) -> list[Solution]:
    """The layers of a group after the update; updated as one if possible, which saves 2/3 of the steps of q, k, v.

    With a grid, an update that can rounds on its way.
    """

    def apply(layer: Layer, start: Solution) -> Solution:
        with returned.at(update, layer.stats.name, layer.dense_OI):
            after = update.apply(layer, start) if grid is None else update.apply_rounding(layer, start, grid)
        return after if after is start else returned.solution(update, after, layer)

    grouping, sizes = layers[0].grouping, [len(layer.dense_OI) for layer in layers]
    if (
        len(layers) == 1
        or not update.by_rows(grouping.pattern)
        or sum(layer.dense_OI.numel() for layer in layers) > JOINED_WEIGHTS
    ):
        return [apply(layer, start) for layer, start in zip(layers, starts, strict=True)]
    joined = Layer(_joined([layer.dense_OI for layer in layers]), grouping, layers[0].stats)
    start = Solution(_joined([start.weight_OI for start in starts]), _joined([start.keep_OI for start in starts]))
    after, ends = apply(joined, start), [0, *accumulate(sizes)]
    return [after.rows(slice(*part)) for part in pairwise(ends)]


def _recovered(recovery: Recovery, layer: Layer, before: Solution) -> Solution:
    with returned.at(recovery, layer.stats.name, layer.dense_OI):
        after = recovery.layer(layer, before)
    return after if after is before else returned.solution(recovery, after, layer)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # cat would copy even a single part


def _write(matrix: Matrix, solution: Solution) -> None:
    # Products, and rounding of tiny negative weights to half precision, leave -0.0, on which packing kernels have
    # failed; -0.0 + 0.0 is 0.0. Filling under a mask would take seven times as long.
    matrix.view().copy_(solution.weight_OI * solution.keep_OI).add_(0.0)
    if solution.bias_shift_O is not None and not matrix.add_to_bias(solution.bias_shift_O):
        log.warning("%s: experts have no bias, so the bias correction is skipped", matrix.name)


def _finite(matrix: Matrix) -> Tensor:
    weight_OI = matrix.view().float()
    if not all_finite(weight_OI):
        raise Mistake(damaged(matrix.name, matrix.view()))
    return weight_OI.clone() if weight_OI.data_ptr() == matrix.view().data_ptr() else weight_OI


def _scores(metric: Metric, weight_OI: Tensor, stats: LayerStats) -> Tensor:
    if stats.tokens == 0:
        log.warning("%s saw no calibration token: scored by magnitude", stats.name)
        return weight_OI.abs()
    return returned.scores(metric, weight_OI, stats)


def _report(matrix: Matrix, before_OI: Tensor, solution: Solution, score_OI: Tensor, x_SI: Tensor) -> LayerReport:
    after_OI = matrix.view().float()
    norm = float((x_SI @ before_OI.T).norm())
    lost_SO = x_SI @ (before_OI - after_OI).T
    error = float((lost_SO if solution.bias_shift_O is None else lost_SO - solution.bias_shift_O).norm())
    total = _total(score_OI)
    zero_OI = before_OI == 0
    zeros = int(zero_OI.sum())
    return LayerReport(
        name=matrix.name,
        shape=list(before_OI.shape),
        density=int(after_OI.count_nonzero()) / after_OI.numel(),
        kept_score=_total(score_OI * solution.keep_OI) / total if total else 1.0,
        relative_error=(error / norm if norm else 0.0) if len(x_SI) else None,
        error_tokens=len(x_SI),
        seconds=0.0,
        zeros_before=zeros / before_OI.numel(),
        zeros_filled=int((after_OI[zero_OI] != 0).sum()) / zeros if zeros else 0.0,
        zeros_in_mask=int((zero_OI & solution.keep_OI).sum()),
    )


def _total(score_OI: Tensor) -> float:
    # Sums rows in float32, because summing everything in float64 takes many times as long.
    return float(score_OI.sum(1).sum(dtype=torch.float64))
