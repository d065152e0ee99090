"""OWL's outlier ratios and densities against loops, and what becomes of them in a model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esparse.allocations import Measured
from esparse.allocations.owl import Owl, Scores, offsets, outlier_ratio
from esparse.patterns import NM, Unstructured, parse
from esparse.shuffles.gns import Gns
from tests.allocations.layers import block_of, layer, linears, pruned, uneven
from tests.models.families import tiny

OWL = Owl(threshold=5.0, spread=0.2, per="block")


def scores(weight_OI: torch.Tensor, x_TI: torch.Tensor, name: str = "some") -> Scores:
    # The metric's scores are none of OWL's business.
    measured = OWL.measure(layer(weight_OI, x_TI, NM(2, 4), name=name), torch.zeros_like(weight_OI))
    assert measured is not None
    return measured


def wanda_by_loops(weight_OI: torch.Tensor, x_TI: torch.Tensor, sequences: int = 2) -> list[float]:
    found = []
    for row in weight_OI.tolist():
        for channel, weight in enumerate(row):
            norm = math.sqrt(sum(x[channel] ** 2 for x in x_TI.tolist()) / sequences)
            found.append(abs(weight) * norm)
    return found


@settings(max_examples=25)
@given(seed=st.integers(0, 2**16), threshold=st.floats(0.3, 6.0), other=st.integers(1, 20))
def test_the_ratio_counts_scores_far_above_the_mean_of_all_layers(seed: int, threshold: float, other: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers, all_scores = [], []
    for outputs, inputs in ((6, 8), (other, 5)):  # two layers of one block that read different tensors
        weight_OI, x_TI = (torch.randn(n, inputs, generator=generator) for n in (outputs, 7))
        weight_OI = weight_OI**3 * (1 + 3 * (inputs == 5))
        layers.append(scores(weight_OI, x_TI))
        all_scores += wanda_by_loops(weight_OI, x_TI)
    bound = threshold * sum(all_scores) / len(all_scores)
    expected = sum(score > bound for score in all_scores)
    # Only those may be counted wrongly that lie in the bound's class, which is at most 1/256 of it wide.
    near = sum(abs(score / bound - 1) < 1.01 / 256 for score in all_scores)
    got = outlier_ratio(layers, threshold) * len(all_scores)
    assert abs(got - expected) <= near + 1e-9


def test_the_ratio_is_precise_where_scores_are_many() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI, x_TI = torch.randn(400, 500, generator=generator), torch.randn(9, 500, generator=generator)
    wanda_OI = weight_OI.abs() * (x_TI.square().sum(0) / 2).sqrt()
    for threshold in (1.0, 3.0, 4.0):
        expected = float((wanda_OI > threshold * wanda_OI.mean()).float().mean())
        assert outlier_ratio([scores(weight_OI, x_TI)], threshold) == pytest.approx(expected, rel=0.02)


def test_scores_beside_the_bound_count_as_evenly_spread() -> None:
    weight_OI = torch.cat([torch.linspace(1.0, 1.0039, 1000), torch.tensor([0.5, 2.0, 3.0])])[:, None]
    found = scores(weight_OI, torch.ones(2, 1))  # a norm of 1; the class from 1 to 1 + 1/256 holds the 1000
    for bound in (1.0, 1.001, 1.003):
        assert found.above(bound) == pytest.approx(int((weight_OI > bound).sum()), abs=2)
    assert found.above(2.5) == 1.0
    assert found.above(1.5) == 2.0


def test_the_ratio_by_hand() -> None:
    x_TI = torch.tensor([[1.0, 2.0], [1.0, 2.0]])  # norms 1 and 2 over two sequences
    small = scores(torch.tensor([[1.0, 0.5], [-1.0, -0.5]]), x_TI)
    large = scores(torch.tensor([[-9.0, 0.5]]), x_TI)
    # Scores 1, 1, 1, 1 and 9, 1: a mean of 14 / 6 over both.
    assert outlier_ratio([small, large], 2.0) == 1 / 6
    assert outlier_ratio([small, large], 4.0) == 0.0
    assert outlier_ratio([small], 0.9) == 1.0
    assert outlier_ratio([small], 2.0) == 0.0
    assert outlier_ratio([scores(torch.zeros(2, 2), x_TI)], 5.0) == 0.0


def sparsities_by_loops(ratios: list[float], weights: list[int], spread: float, density: float) -> list[float]:
    """S_l from D_l: 1 - D_l stretched to the range 2 * spread, then moved to the mean 1 - density."""
    stretched = []
    for ratio in ratios:
        stretched.append((max(ratios) - ratio) / (max(ratios) - min(ratios)) * 2 * spread)
    mean = 0.0
    for value, count in zip(stretched, weights, strict=True):
        mean += value * count / sum(weights)
    return [value - mean + 1 - density for value in stretched]


@given(
    layers=st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 50)), min_size=2, max_size=8),
    spread=st.floats(0.01, 0.4),
)
def test_densities_wished_for(layers: list[tuple[int, int]], spread: float) -> None:
    ratios, weights = [ratio / 1000 for ratio, _ in layers], [count for _, count in layers]
    got = offsets(ratios, weights, spread)
    assert sum(offset * count for offset, count in zip(got, weights, strict=True)) == pytest.approx(0, abs=1e-9)
    if len(set(ratios)) == 1:
        assert got == [0.0] * len(got)
        return
    assert max(got) - min(got) == pytest.approx(2 * spread)
    expected = sparsities_by_loops(ratios, weights, spread, 0.5)
    assert [1 - (0.5 + offset) for offset in got] == pytest.approx(expected)


def test_densities_by_hand() -> None:
    assert offsets([0.01, 0.03, 0.02], [1, 1, 1], 0.08) == pytest.approx([-0.08, 0.08, 0.0])
    # Skewed: one block far above the others lies farther than spread from the mean, as in the authors' code.
    assert offsets([0.01, 0.01, 0.01, 0.05], [1, 1, 1, 1], 0.08) == pytest.approx([-0.04, -0.04, -0.04, 0.12])
    assert offsets([0.01, 0.03], [3, 1], 0.08) == pytest.approx([-0.04, 0.12])
    assert offsets([], [], 0.08) == []


def measured(ratios: list[float], inputs: int = 32) -> list[Measured]:
    """Blocks of two layers each, with that share of scores at 100 where all others are 1."""
    found = []
    for block, ratio in enumerate(ratios):
        for part in ("attention", "mlp"):
            weight_OI = torch.ones(10, inputs)
            weight_OI.view(-1)[: round(ratio * weight_OI.numel())] = 100.0
            name = f"{block}.{part}"
            value = scores(weight_OI, torch.ones(2, inputs), name)
            found.append(Measured(name, block, len(found), weight_OI.numel(), value))
    return found


def test_n_nearest_to_the_wishes() -> None:
    owl = Owl(threshold=5.0, spread=0.1, per="block")
    plan = owl.plan(measured([0.05, 0.03, 0.01]), NM(8, 16))  # wishes of 9.6, 8 and 6.4
    assert plan == {f"0.{part}": NM(10, 16) for part in ("attention", "mlp")} | {
        f"2.{part}": NM(6, 16) for part in ("attention", "mlp")
    }
    assert owl.plan(measured([0.02, 0.02]), NM(8, 16)) == {}


def test_percentages_are_those_wished_for() -> None:
    owl = Owl(threshold=5.0, spread=0.08, per="block")
    plan = owl.plan(measured([0.05, 0.04, 0.01], inputs=4000), Unstructured(60.0))
    expected = sparsities_by_loops([0.05, 0.04, 0.01], [1, 1, 1], 0.08, 0.4)
    for block, sparsity in enumerate(expected):
        for part in ("attention", "mlp"):
            got = plan[f"{block}.{part}"]
            assert isinstance(got, Unstructured)
            assert abs(got.removed_percent - 100 * sparsity) <= 0.1


def test_groups_may_differ_within_a_block() -> None:
    layers = measured([0.05, 0.01])
    ordinary = scores(torch.ones(10, 32), torch.ones(2, 32), "0.mlp")
    layers[1] = Measured("0.mlp", 0, 1, 320, ordinary)
    of_groups = Owl(threshold=5.0, spread=0.1, per="group").plan(layers, NM(8, 16))
    assert of_groups["0.attention"] != of_groups.get("0.mlp", NM(8, 16))
    of_blocks = Owl(threshold=5.0, spread=0.1, per="block").plan(layers, NM(8, 16))
    assert of_blocks["0.attention"] == of_blocks["0.mlp"] != NM(8, 16)


@pytest.mark.parametrize(
    ("pattern", "outliers"), [("8:16", None), ("60%", None), ("4:8", "2:16")], ids=["n:m", "per cent", "outliers"]
)
def test_every_layer_of_a_pruned_model_has_its_blocks_pattern(pattern: str, outliers: str | None) -> None:
    _, result = pruned(OWL, parse(pattern, outliers), shuffle=Gns(deal="straight"))
    assert result.pattern_holds
    by_block: dict[int, set[str]] = {}
    for report in result.layers:
        own, keep_OI = parse(*report.pattern.split("+")), result.keeps[f"{report.name}.weight"]
        by_block.setdefault(block_of(report), set()).add(report.pattern)
        order_I = result.orders.get(f"{report.name}.weight", torch.arange(report.shape[1])).long()
        assert own.holds(keep_OI[:, order_I])
        if outliers is None:
            assert report.density == pytest.approx(float(own.keep_top(torch.rand(report.shape)).float().mean()))
        else:
            assert report.pattern.endswith("+2:16")
    assert all(len(patterns) == 1 for patterns in by_block.values())
    assert len({patterns.pop() for patterns in by_block.values()}) > 1


@pytest.mark.parametrize(("pattern", "step"), [("8:16", 1 / 16), ("60%", 1 / 32)])
def test_densities_of_a_pruned_model_are_those_wished_for(pattern: str, step: float) -> None:
    _, result = pruned(OWL, parse(pattern))
    scores_of: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for name, (weight_OI, x_TI) in linears(uneven()).items():
        scores_of[int(name.split(".")[2])] += (weight_OI.abs() * x_TI.norm(dim=0)).flatten().tolist()
    ratios = []
    for found in scores_of.values():
        bound = OWL.threshold * sum(found) / len(found)
        ratios.append(sum(score > bound for score in found) / len(found))
    uniform = sum(int(parse(pattern).keep_top(torch.rand(report.shape)).sum()) for report in result.layers)
    density = uniform / result.weights
    wishes = [1 - s for s in sparsities_by_loops(ratios, [1, 1, 1], OWL.spread, density)]
    assert len({round(wish / step) for wish in wishes}) == 3
    for report in result.layers:
        assert abs(report.density - wishes[block_of(report)]) < step
    assert uniform - 0.005 * result.weights < result.kept <= uniform


def test_the_mean_density_is_met_exactly_where_steps_fit() -> None:
    _, result = pruned(OWL, NM(8, 16))
    assert result.kept * 2 == result.weights


def test_an_expert_without_tokens_keeps_the_pattern_asked_for() -> None:
    _, result = pruned(OWL, NM(8, 16), model=uneven_experts(), skip=[r"layers\.2\."])
    silent = [report for report in result.layers if report.relative_error is None]
    assert silent
    assert {report.pattern for report in silent} == {"8:16"}
    assert {report.pattern for report in result.layers if block_of(report) == 0} != {"8:16"}


def uneven_experts() -> torch.nn.Module:
    """A mixture whose first block has outliers in its attention, and two experts there that no token reaches."""
    model = tiny("mixtral")
    with torch.no_grad():
        router = model.model.layers[0].mlp.gate
        router.weight[:] = 0.0
        router.weight[0] = 1e-3
    for parameter in model.model.layers[0].self_attn.parameters():
        parameter.data[torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) < 0.05] *= 8
    return model


def test_layers_that_stay_dense_do_not_count() -> None:
    _, result = pruned(OWL, NM(8, 16), model=uneven(), skip=[r"layers\.2\."])
    assert {block_of(report) for report in result.layers} == {0, 1}
    assert result.kept * 2 == result.weights
    assert {report.pattern for report in result.layers if block_of(report) == 0} != {"8:16"}
