"""Rows that make channels: which there may be, and what a scale does to them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esparse.models.matrices import InputGroup, Matrix
from esparse.models.producers import Edge, Producer, row_maps, row_sets


def matrix_of(layer: nn.Linear) -> Matrix:
    return Matrix("layer.weight", layer.weight, False, layer=layer)


@pytest.mark.parametrize(
    ("outputs", "inputs", "expected"),
    [
        (4, 4, [0, 1, 2, 3]),  # fc1 -> fc2
        (2, 4, [0, 1]),  # v with one head for two query heads
        (8, 4, [4, 5, 6, 7]),  # [gate; up]
        (8, 4, [0, 1, 2, 3]),  # [up; gate]
        (8, 4, [1, 3, 5, 7]),  # gate and up in turns
        (12, 4, [8, 9, 10, 11]),  # [q; k; v]
        (12, 4, [4, 5, 10, 11]),  # two heads of two, each [q; k; v]
        (8, 4, [6, 7]),  # [q; k; v], two query heads of two share one head of k and v
        (16, 8, [6, 7, 14, 15]),  # two groups of [q; q; k; v], heads of two
    ],
)
def test_every_usual_layout_is_among_the_row_sets(outputs: int, inputs: int, expected: list[int]) -> None:
    assert expected in [rows.tolist() for rows in row_sets(outputs, inputs, heads=True)]


def test_rows_that_cannot_make_the_channels_are_not_offered() -> None:
    assert list(row_sets(3, 4, heads=True)) == []
    for rows_V in row_sets(24, 8, heads=True):
        assert 8 % len(rows_V) == 0
        assert len(set(rows_V.tolist())) == len(rows_V)


def test_an_expert_has_no_heads() -> None:
    assert [rows.tolist() for rows in row_sets(8, 4, heads=False)] == [
        [4, 5, 6, 7],
        [0, 1, 2, 3],
        [1, 3, 5, 7],
        [0, 2, 4, 6],
    ]


def test_row_maps_deal_heads_out() -> None:
    rows = torch.tensor([5, 6, 7, 8])
    assert [m.tolist() for m in row_maps(rows, 4)] == [[5, 6, 7, 8]]
    assert [m.tolist() for m in row_maps(rows, 8)] == [
        [5, 6, 7, 8, 5, 6, 7, 8],  # one head of four for two query heads
        [5, 6, 5, 6, 7, 8, 7, 8],  # two heads of two, each for two query heads
        [5, 5, 6, 6, 7, 7, 8, 8],
    ]


def test_channels_that_share_a_row_get_its_greatest_value() -> None:
    producer = Producer.of_matrix(matrix_of(nn.Linear(3, 4)), torch.tensor([1, 3, 1, 3]))
    assert producer.tied(torch.tensor([1.0, 2.0, 5.0, 0.5])).tolist() == [5.0, 2.0, 5.0, 2.0]


def test_a_scale_reaches_the_rows_and_their_bias_and_no_other() -> None:
    layer = nn.Linear(3, 4)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    Producer.of_matrix(matrix_of(layer), torch.tensor([3, 1, 3])).scale(torch.tensor([2.0, 0.25, 2.0]))
    for row, factor in enumerate([1.0, 0.25, 1.0, 2.0]):
        assert torch.equal(layer.weight[row], weight[row] * factor)
        assert torch.equal(layer.bias[row], bias[row] * factor)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_is_scaled_as_it_multiplies(offset: float) -> None:
    norm = nn.LayerNorm(3)
    norm.weight.data, norm.bias.data = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])
    Producer.of_norm("norm", norm, offset).scale(torch.tensor([2.0, 4.0, 0.5]))
    expected = [(w + offset) * f - offset for w, f in ((0.5, 2.0), (-1.0, 4.0), (2.0, 0.5))]
    assert norm.weight.tolist() == expected
    assert norm.bias.tolist() == [2.0, 8.0, 1.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_link_that_is_moved_computes_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    first, second, router = nn.Linear(6, 4), nn.Linear(8, 5), nn.Linear(8, 2)
    for layer in (first, second, router):
        layer.to(dtype)
    row_of_I = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
    x = torch.randn(20, 6, dtype=dtype)

    def outputs() -> list[torch.Tensor]:
        made = first(x).relu()[:, row_of_I]
        return [second(made), router(made)]

    before = outputs()
    group = InputGroup(8, [Matrix("second.weight", second.weight, False, layer=second)])
    # Powers of two: exact in every precision.
    scale_I = torch.tensor([0.5, 4.0, 2.0, 8.0])[row_of_I]
    Edge(Producer.of_matrix(matrix_of(first), row_of_I), [group], [router.weight.data]).move(scale_I)
    assert first.weight.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(), strict=True))
