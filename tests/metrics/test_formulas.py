"""Metrics beside Wanda and E-Sparse, each against its formula in plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from esparse.metrics import Metric
from esparse.metrics.entropy import LEAST_SHARE, Entropy, EsparsePaper
from esparse.metrics.fisher import Fisher
from esparse.metrics.gradient import Gradient
from esparse.metrics.nowag import NoWag, normalised
from esparse.metrics.ria import Ria, relative_importance
from esparse.metrics.sparsegpt import SparseGpt
from esparse.metrics.wanda import Wanda
from esparse.stats import ColumnEntropy, ColumnNorm, Gram, LayerStats, WeightGradient

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(3, 8, generator=GENERATOR)
MEAN_SQUARE = torch.rand(3, 8, generator=GENERATOR).square()
X_TI = torch.randn(40, 8, generator=GENERATOR) * torch.linspace(0.2, 3, 8)


def stats(x_TI: torch.Tensor = X_TI, sequences: int = 4) -> LayerStats:
    size = {"inputs": 8, "sequences": sequences, "device": torch.device("cpu")}
    entropy = ColumnEntropy(bins=5, range="channel", limit=1.0, **size)
    statistics = {"norm": ColumnNorm(**size), "gram": Gram(**size), "entropy": entropy}
    for statistic in statistics.values():
        for pass_index in range(statistic.passes):
            statistic.add(x_TI, pass_index)
    return LayerStats("layer", statistics | {"gradient": WeightGradient(MEAN_SQUARE)}, 40)


def relative_importance_by_loops(weight: list[list[float]]) -> list[list[float]]:
    columns = [sum(abs(row[j]) for row in weight) for j in range(len(weight[0]))]
    return [[abs(w) / columns[j] + abs(w) / sum(map(abs, row)) for j, w in enumerate(row)] for row in weight]


def normalised_by_loops(weight: list[list[float]]) -> list[list[float]]:
    columns = [math.sqrt(sum(row[j] ** 2 for row in weight)) for j in range(len(weight[0]))]
    by_column = [[w / columns[j] for j, w in enumerate(row)] for row in weight]
    return [[w / math.sqrt(sum(v**2 for v in row)) for w in row] for row in by_column]


def test_ria() -> None:
    got = Ria(power=0.5).score(WEIGHT, stats())
    x = X_TI.double().tolist()
    for i, row in enumerate(relative_importance_by_loops(WEIGHT.double().tolist())):
        for j, share in enumerate(row):
            norm = math.sqrt(sum(token[j] ** 2 for token in x) / 4)  # 4 sequences
            assert got[i, j].item() == pytest.approx(share * math.sqrt(norm), rel=1e-5)


def test_ria_of_a_column_of_zeros_is_zero() -> None:
    weight = WEIGHT.clone()
    weight[:, 2] = 0
    weight[1] = 0
    importance = relative_importance(weight)
    assert torch.isfinite(importance).all()
    assert (importance[:, 2] == 0).all()
    assert (importance[1] == 0).all()


def test_nowag() -> None:
    got = NoWag().score(WEIGHT, stats())
    x = X_TI.double().tolist()
    for i, row in enumerate(normalised_by_loops(WEIGHT.double().tolist())):
        for j, w in enumerate(row):
            mean_square = sum(token[j] ** 2 for token in x) / 40
            assert got[i, j].item() == pytest.approx(w**2 * mean_square, rel=1e-5)


def test_nowag_of_a_column_of_zeros_is_zero() -> None:
    weight = WEIGHT.clone()
    weight[:, 2] = 0
    weight[1] = 0
    bar = normalised(weight)
    assert torch.isfinite(bar).all()
    assert torch.equal(bar == 0, weight == 0)


def test_sparsegpt_is_the_error_of_pruning_one_weight_with_the_others_repaired() -> None:
    """The surgeon's saliency: min over the other weights of d H d^T with d_j = w_j."""
    got = SparseGpt(damp=0.01).score(WEIGHT, stats())
    gram = X_TI.double().T @ X_TI.double()
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    for i, j in ((0, 0), (1, 3), (2, 7)):
        others = [k for k in range(8) if k != j]
        w = WEIGHT[i, j].double()
        best = torch.linalg.solve(hessian[others][:, others], -w * hessian[others, j])
        change = torch.zeros(8, dtype=torch.float64)
        change[j], change[others] = w, best
        assert got[i, j].item() == pytest.approx(float(change @ hessian @ change), rel=1e-4)


@pytest.mark.parametrize("source", ["model", "block"])
def test_gradient(source: str) -> None:
    metric = Gradient(source=source, alpha=3.0)
    assert metric.gradients() == source
    got = metric.score(WEIGHT, stats())
    x = X_TI.double().tolist()
    for i, row in enumerate(WEIGHT.double().tolist()):
        for j, w in enumerate(row):
            norm = math.sqrt(sum(token[j] ** 2 for token in x) / 4)  # 4 sequences
            gradient = math.sqrt(MEAN_SQUARE[i, j])
            assert got[i, j].item() == pytest.approx(abs(w) * (3 * gradient + norm), rel=1e-5)


def test_gradient_by_hand() -> None:
    # One output, two inputs of norms 3 and 4 over one sequence, gradients 2 and 1, alpha 10.
    norm = ColumnNorm(inputs=2, sequences=1, device=torch.device("cpu"))
    norm.add(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), 0)
    of_layer = LayerStats("layer", {"norm": norm, "gradient": WeightGradient(torch.tensor([[4.0, 1.0]]))}, 2)
    got = Gradient(source="model", alpha=10.0).score(torch.tensor([[-2.0, 5.0]]), of_layer)
    assert got.tolist() == [[46.0, 70.0]]  # 2 (20 + 3), 5 (10 + 4)


@pytest.mark.parametrize("source", ["model", "block"])
def test_fisher(source: str) -> None:
    metric = Fisher(source=source)
    assert metric.gradients() == source
    got = metric.score(WEIGHT, stats())
    for i, row in enumerate(WEIGHT.double().tolist()):
        for j, w in enumerate(row):
            assert got[i, j].item() == pytest.approx(w**2 * MEAN_SQUARE[i, j].item(), rel=1e-5)


def entropies_by_loops() -> list[float]:
    """Of each channel, from five bins over its own range."""
    entropies = []
    for j in range(8):
        values = [token[j] for token in X_TI.double().tolist()]
        low, high = min(values), max(values)
        counts = [0] * 5
        for value in values:
            counts[min(int((value - low) / (high - low) * 5), 4)] += 1
        entropies.append(-sum(c / 40 * math.log(c / 40) for c in counts if c))
    return entropies


@pytest.mark.parametrize(("base", "loops"), [("ria", relative_importance_by_loops), ("nowag", normalised_by_loops)])
def test_entropy_with_another_measure_of_the_weight(
    base: str, loops: Callable[[list[list[float]]], list[list[float]]]
) -> None:
    got = EsparsePaper(base=base, alpha=0.7, bins=5, norm="rms", range="channel", limit=1.0).score(WEIGHT, stats())
    entropies = entropies_by_loops()
    x = X_TI.double().tolist()
    for i, row in enumerate(loops(WEIGHT.double().tolist())):
        for j, w in enumerate(row):
            rms = math.sqrt(sum(token[j] ** 2 for token in x) / 40)
            assert got[i, j].item() == pytest.approx(abs(w) * (entropies[j] + 0.7 * rms), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.5, -1.0])
def test_the_entropy_multiplies_the_norm(gamma: float) -> None:
    got = Entropy(base="magnitude", gamma=gamma, bins=5, range="channel", limit=1.0).score(WEIGHT, stats())
    entropies = entropies_by_loops()
    mean = sum(entropies) / len(entropies)
    x = X_TI.double().tolist()
    for i, row in enumerate(WEIGHT.double().tolist()):
        for j, w in enumerate(row):
            norm = math.sqrt(sum(token[j] ** 2 for token in x) / 4)  # 4 sequences
            assert got[i, j].item() == pytest.approx(abs(w) * norm * (entropies[j] / mean) ** gamma, rel=1e-5)


def test_the_entropy_s_share_has_no_unit() -> None:
    """Sequences of any length and inputs of any size leave the order of the scores; a power of 0 leaves Wanda's."""
    metric = Entropy(base="magnitude", gamma=0.5, bins=5, range="channel", limit=1.0)
    usual = metric.score(WEIGHT, stats())
    for other in (stats(sequences=1), stats(sequences=40), stats(X_TI * 64)):
        scores = metric.score(WEIGHT, other)
        torch.testing.assert_close(scores / scores[0, 0], usual / usual[0, 0])
    without = Entropy(base="magnitude", gamma=0.0, bins=5, range="channel", limit=1.0)
    torch.testing.assert_close(without.score(WEIGHT, stats()), Wanda().score(WEIGHT, stats()))


@pytest.mark.parametrize("gamma", [0.5, -0.5])
def test_a_channel_that_never_changes_has_a_score(gamma: float) -> None:
    x_TI = X_TI.clone()
    x_TI[:, 3] = 2.0
    scores = Entropy(base="magnitude", gamma=gamma, bins=5, range="channel", limit=1.0).score(WEIGHT, stats(x_TI))
    assert torch.isfinite(scores).all()
    norm = math.sqrt(40 * 4 / 4)
    torch.testing.assert_close(scores[:, 3], WEIGHT[:, 3].abs() * norm * LEAST_SHARE**gamma)
    x_TI[:] = 2.0  # no channel of the layer has any entropy
    scores = Entropy(base="magnitude", gamma=gamma, bins=5, range="channel", limit=1.0).score(WEIGHT, stats(x_TI))
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: Gradient(source="loss", alpha=1.0), "metric.source must be one of model, block, got 'loss'"),
        (lambda: Fisher(source="none"), "metric.source must be one of model, block, got 'none'"),
        (lambda: Gradient(source="block", alpha=-1.0), "metric.alpha must be at least 0 and finite, got -1"),
    ],
)
def test_settings_that_make_no_sense(make: Callable[[], Metric], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        make()
