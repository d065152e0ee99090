"""Metrics beside Wanda and E-Sparse, each against its formula in plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from esparse.metrics.nowag import NoWag
from esparse.metrics.ria import Ria, relative_importance
from esparse.metrics.sparsegpt import SparseGpt
from esparse.stats import ColumnNorm, Gram, LayerStats

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(3, 8, generator=GENERATOR)
X_TI = torch.randn(40, 8, generator=GENERATOR) * torch.linspace(0.2, 3, 8)


def stats() -> LayerStats:
    size = {"inputs": 8, "sequences": 4, "device": torch.device("cpu")}
    statistics = {"norm": ColumnNorm(**size), "gram": Gram(**size)}
    for statistic in statistics.values():
        statistic.add(X_TI, 0)
    return LayerStats("layer", statistics, 40)


def test_ria() -> None:
    got = Ria(power=0.5).score(WEIGHT, stats())
    weight, x = WEIGHT.double().tolist(), X_TI.double().tolist()
    for i, row in enumerate(weight):
        for j, w in enumerate(row):
            norm = math.sqrt(sum(token[j] ** 2 for token in x) / 4)  # 4 sequences
            column = sum(abs(other[j]) for other in weight)
            share = abs(w) / column + abs(w) / sum(map(abs, row))
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
    weight, x = WEIGHT.double().tolist(), X_TI.double().tolist()
    columns = [math.sqrt(sum(row[j] ** 2 for row in weight)) for j in range(8)]
    by_column = [[w / columns[j] for j, w in enumerate(row)] for row in weight]
    for i, row in enumerate(by_column):
        norm = math.sqrt(sum(w**2 for w in row))
        for j, w in enumerate(row):
            mean_square = sum(token[j] ** 2 for token in x) / 40
            assert got[i, j].item() == pytest.approx((w / norm) ** 2 * mean_square, rel=1e-5)


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
