"""Layers and whole models for the tests of allocations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from esparse.allocations import Allocation
from esparse.allocations.budget import Unit
from esparse.metrics.wanda import Wanda
from esparse.models.blocks import BlockModel
from esparse.patterns import Grouping, Pattern
from esparse.pruning.prune import Method, Pruned, prune
from esparse.records.report import LayerReport, Stages
from esparse.shuffles import NoShuffle, Shuffle
from esparse.stats import ColumnNorm, Gram, LayerStats
from esparse.updates import Layer
from tests.models.families import tiny

CPU = torch.device("cpu")
TOKENS_SL = torch.randint(1, 96, (6, 20), generator=torch.Generator().manual_seed(5))


def layer(
    weight_OI: torch.Tensor, x_TI: torch.Tensor, pattern: Pattern, *, name: str = "some", sequences: int = 2
) -> Layer:
    """A layer that read these tokens, in two parts."""
    statistics = {kind: build(inputs=x_TI.shape[1], sequences=sequences, device=CPU) for kind, build in KINDS.items()}
    for statistic in statistics.values():
        for part_TI in x_TI.tensor_split(2):
            statistic.add(part_TI, 0)
    return Layer(weight_OI, Grouping(pattern), LayerStats(name, statistics, len(x_TI)))


KINDS = {"norm": ColumnNorm, "gram": Gram}


def pruned(
    allocation: Allocation,
    pattern: Pattern,
    *,
    model: torch.nn.Module | None = None,
    shuffle: Shuffle | None = None,
    skip: Sequence[str] = (),
) -> tuple[torch.nn.Module, Pruned]:
    """A tiny LLaMA, or the model given, after it was pruned by Wanda."""
    model = model or uneven()
    method = Method(metric=Wanda(), pattern=pattern, shuffle=shuffle or NoShuffle(), allocation=allocation)
    blocks = BlockModel(model, device=CPU, batch_tokens=120)
    return model, prune(blocks, TOKENS_SL, method, skip=skip, stages=Stages())


def uneven() -> torch.nn.Module:
    """A tiny LLaMA with outliers among the weights of its first block, half as many in its last, and none between."""
    model = tiny("llama")
    generator = torch.Generator().manual_seed(7)
    for index, share in ((0, 0.04), (2, 0.02)):
        for parameter in model.model.layers[index].parameters():
            if parameter.ndim == 2:
                parameter.data[torch.rand(parameter.shape, generator=generator) < share] *= 12
    return model


def linears(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weights (O x I) and inputs (T x I) of every linear layer of the blocks while the dense model reads the tokens."""
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:

            def remember(_: torch.nn.Module, args: tuple[torch.Tensor], name: str = name) -> None:
                inputs[name] = args[0].flatten(0, 1)

            module.register_forward_pre_hook(remember)
    with torch.no_grad():
        model(TOKENS_SL, use_cache=False)
    return {name: (model.get_submodule(name).weight.detach(), x_TI) for name, x_TI in inputs.items()}


def block_of(report: LayerReport) -> int:
    return int(report.name.split(".")[2])


def chosen(units: Sequence[Unit], plan: dict[str, Pattern]) -> list[int]:
    """The place of each unit's pattern; all layers of a unit must have the same."""
    places = []
    for unit in units:
        got = {plan.get(name, unit.patterns[unit.asked]) for name in unit.names}
        assert len(got) == 1
        places.append(unit.patterns.index(got.pop()))
    return places
