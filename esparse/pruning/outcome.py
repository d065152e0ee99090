"""The results of pruning a model: what is collected block after block, and what is measured at the end.

Polarity: True in a keep mask means the weight is kept.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from esparse import patterns
from esparse.models.blocks import BlockModel
from esparse.models.matrices import Matrix
from esparse.patterns import Grouping
from esparse.pruning.journal import Entry, Journal
from esparse.quantise.grids import Grid
from esparse.records.audit import Masks
from esparse.records.report import LayerReport, RecoveryReport, as_dicts

log = logging.getLogger("esparse")

MOST = 0.95  # share of the blocks' weights: if less was pruned, a warning names the rest
FEW_ZEROS = 0.01  # share of zeros in the weights: a dense model has fewer


@dataclass(slots=True)
class Pruned:
    """The results of pruning apart from the weights: reports, keep masks (bool, outputs x inputs), channel orders.

    Masks and orders are keyed by the weight's name in the state dict, with experts of one parameter as a leading
    dimension. `channels` of a profile: I values each, keyed by their kind and the first layer that reads the channels.
    `grids`, of quantised weights: by what their codes become values (pruning/rounding.py).
    """

    layers: list[LayerReport] = field(default_factory=list)
    recoveries: list[RecoveryReport] = field(default_factory=list)
    keeps: Masks = field(default_factory=Masks)
    orders: dict[str, Tensor] = field(default_factory=dict)
    channels: dict[str, Tensor] = field(default_factory=dict)
    grids: dict[str, Tensor] = field(default_factory=dict)
    grid: Grid | None = None
    groupings: list[tuple[Matrix, Grouping]] = field(default_factory=list)
    pattern_holds: bool = True
    weights: int = 0
    kept: int = 0
    metadata_bits: float = 0.0
    block_weights: int = 0  # weights of all matrices in the blocks, pruned or not
    left_dense: dict[str, int] = field(default_factory=dict)  # number of weights by dense matrix, the largest first

    @property
    def share_of_blocks(self) -> float:
        """The share of the blocks' weights that was pruned."""
        return 1 - sum(self.left_dense.values()) / self.block_weights

    def take(self, other: Pruned) -> None:
        """Adds the results of another block, but no totals, which are counted at the end."""
        self.layers += other.layers
        self.recoveries += other.recoveries
        self.keeps.take(other.keeps)
        self.orders |= other.orders
        self.channels |= other.channels
        self.grids |= other.grids
        self.groupings += other.groupings

    def entry(self) -> Entry:
        """The journal's entry: all results that cannot be recomputed from the weights."""
        facts = {
            "layers": as_dicts(self.layers),
            "recoveries": as_dicts(self.recoveries),
            "matrices": [
                {"entry": m.entry, "transposed": m.transposed, "expert": m.expert, "rows": m.rows}
                | {"together": m.together, "ordered": g.order_I is not None}
                for m, g in self.groupings
            ],
        }
        return Entry(self.keeps, self.orders, facts, self.channels, self.grids)


def remembered(blocks: BlockModel, index: int, journal: Journal | None) -> Pruned:
    """The results of one block from an earlier attempt's journal."""
    assert journal is not None
    entry, module, name = journal.read(index), blocks.blocks[index], f"{blocks.prefix}.{index}"
    pruned = Pruned(keeps=entry.keeps, orders=entry.orders, channels=entry.channels, grids=entry.grids)
    pruned.layers = [LayerReport(**layer) for layer in entry.facts["layers"]]
    pruned.recoveries = [RecoveryReport(**part) for part in entry.facts["recoveries"]]
    for fact, layer in zip(entry.facts["matrices"], pruned.layers, strict=True):
        path, expert = fact["entry"].removeprefix(f"{name}."), fact["expert"]
        owner = module.get_submodule(path.rpartition(".")[0]) if expert is None else None
        stored = {"expert": expert, "layer": owner, "rows": fact["rows"], "together": fact["together"]}
        matrix = Matrix(fact["entry"], module.get_parameter(path), fact["transposed"], **stored)
        order_I = None
        if fact["ordered"]:
            order_I = entry.orders[matrix.entry] if expert is None else entry.orders[matrix.entry][expert]
        pruned.groupings.append((matrix, Grouping(patterns.from_str(layer.pattern), order_I)))
    return pruned


def add_mask(pruned: Pruned, matrix: Matrix, keep_OI: Tensor, grouping: Grouping) -> None:
    pruned.groupings.append((matrix, grouping))
    if matrix.expert is None:
        pruned.keeps.put(matrix.entry, keep_OI)
        if grouping.order_I is not None:
            pruned.orders[matrix.entry] = grouping.order_I.cpu()
        return
    experts = matrix.experts
    pruned.keeps.put_expert(matrix.entry, keep_OI, matrix.expert, experts)
    if (order_I := grouping.order_I) is not None:
        stack = pruned.orders.setdefault(matrix.entry, order_I.new_zeros(experts, *order_I.shape, device="cpu"))
        stack[matrix.expert] = order_I.cpu()


def measure_density(pruned: Pruned, blocks: BlockModel) -> None:
    """Measures, at the very end and on the stored weights, the density and whether the pattern holds.

    The layers' densities and filled zeros are those from before a training, which this corrects.
    """
    layers = {layer.name: layer for layer in pruned.layers}
    for index in range(len(blocks.blocks)):
        inside = [pair for pair in pruned.groupings if pair[0].entry.startswith(f"{blocks.prefix}.{index}.")]
        with blocks.resident(index, read_only=True):
            for matrix, grouping in inside:
                kept_OI = matrix.view() != 0
                nonzero = int(kept_OI.sum())
                _correct(layers[matrix.name], nonzero, pruned.keeps, matrix)
                pruned.pattern_holds &= grouping.holds(kept_OI.to(_device(grouping.order_I)))
                pruned.weights += kept_OI.numel()
                pruned.kept += nonzero
                pruned.metadata_bits += grouping.pattern.metadata_bits(*kept_OI.shape)


def _correct(layer: LayerReport, nonzero: int, keeps: Masks, matrix: Matrix) -> None:
    size = math.prod(layer.shape)
    layer.density = nonzero / size
    if zeros := round(layer.zeros_before * size):
        still = int(keeps.of(matrix.entry, matrix.expert).sum()) - nonzero  # zeros inside the mask, now as before
        layer.zeros_filled = max(0, layer.zeros_in_mask - still) / zeros


def warn_if_sparse_before(pruned: Pruned) -> None:
    """Warns if the model had zeros before pruning, so that the run is not a pruning of a dense model."""
    sizes = [math.prod(layer.shape) for layer in pruned.layers]
    zeros = sum(layer.zeros_before * size for layer, size in zip(pruned.layers, sizes, strict=True))
    if zeros > FEW_ZEROS * sum(sizes):
        filled = sum(
            layer.zeros_filled * layer.zeros_before * size for layer, size in zip(pruned.layers, sizes, strict=True)
        )
        log.warning(
            "the model was sparse already: %.1f %% of the weights in the pruned layers were zero before; %.1f %% of "
            "these are not zero now",
            100 * zeros / sum(sizes),
            100 * filled / zeros,
        )


def count_dense(pruned: Pruned, blocks: BlockModel) -> None:
    """Records which parameters of the blocks were not pruned, and warns if they are many."""
    done = {id(matrix.parameter) for matrix, _ in pruned.groupings}  # a parameter that blocks share has several names
    known: set[int] = set()
    left: dict[str, int] = {}
    for index, block in enumerate(blocks.blocks):
        for path, parameter in block.named_parameters():
            entry = f"{blocks.name(index)}.{path}"
            if parameter.ndim < 2 or id(parameter) in known:
                continue
            known.add(id(parameter))
            pruned.block_weights += parameter.numel()
            if id(parameter) not in done:
                left[entry] = parameter.numel()
    pruned.left_dense = dict(sorted(left.items(), key=lambda item: -item[1]))
    share = pruned.share_of_blocks
    if share < MOST:
        largest = ", ".join(f"{name} ({size:,})" for name, size in list(pruned.left_dense.items())[:3])
        log.warning(
            "only %.1f %% of the blocks' %s weights were pruned; %d parameters stay dense, the largest of them: %s",
            100 * share,
            f"{pruned.block_weights:,}",
            len(left),
            largest,
        )
    else:
        log.info("%.1f %% of the blocks' weights were pruned", 100 * share)


def _device(order_I: Tensor | None) -> torch.device | None:
    return None if order_I is None else order_I.device
