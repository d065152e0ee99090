"""What trainings share: the learning rate, the way back, precision and gradients that come and go."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from esparse.models.training import improved, in_float32, masked, rate, requiring_grad


def test_the_rate_by_hand() -> None:
    assert [rate(step, 10, warm_up=0.2) for step in range(10)] == pytest.approx(
        [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    assert [rate(step, 4, warm_up=0.0) for step in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [rate(step, 2, warm_up=1.0) for step in range(2)] == [0.5, 1]
    halved = [rate(step, 10, warm_up=0.2, final=0.5) for step in (0, 1, 2, 6, 9)]
    assert halved == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5625])
    cosine = [rate(step, 8, warm_up=0.0, decay="cosine", final=0.2) for step in (0, 2, 8)]
    assert cosine == pytest.approx([1.0, 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2, 0.2])


@pytest.mark.parametrize(("to", "kept"), [(1.0, True), (2.0, True), (3.0, False), (math.nan, False)])
def test_a_training_is_kept_unless_it_raises_the_loss(to: float, kept: bool) -> None:
    parameter = nn.Parameter(torch.tensor([2.0]))

    def train() -> int:
        parameter.data.fill_(to)
        return 7

    got = improved("x", [parameter], lambda: parameter.item(), train)
    assert got == (2.0, to if kept else 2.0, 7)
    assert parameter.item() == (to if kept else 2.0)


def test_a_training_needs_a_loss_to_begin_with() -> None:
    with pytest.raises(ValueError, match="the training of the block cannot begin: its loss is NaN or Inf"):
        improved("the block", [], lambda: math.nan, lambda: 0)


def test_float64_that_nothing_changed_keeps_its_digits() -> None:
    layer = nn.Linear(2, 2).double()
    third = torch.full((2, 2), 1 / 3, dtype=torch.float64)
    layer.weight.data = third.clone()
    with in_float32(layer):
        assert layer.weight.dtype == torch.float32
        layer.weight.data[0, 0] = 0.1
    assert layer.weight.dtype == torch.float64
    assert layer.weight.tolist() == [[float(torch.tensor(0.1)), 1 / 3], [1 / 3, 1 / 3]]


def test_gradients_and_precision_come_and_go() -> None:
    layer = nn.Linear(2, 2).to(torch.bfloat16)
    layer.weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.bfloat16)
    layer.bias.requires_grad_(False)
    with in_float32(layer), requiring_grad(layer, [layer.weight]), masked({layer.weight: layer.weight.data != 0}):
        assert (layer.weight.dtype, layer.bias.requires_grad) == (torch.float32, False)
        layer(torch.ones(1, 2)).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.tolist() == [[1.0, 0.0], [0.0, 1.0]]
        layer.weight.data[0, 0] = -1e-45  # nothing in bfloat16
    assert layer.weight.dtype == torch.bfloat16
    assert (layer.weight.grad, layer.bias.requires_grad) == (None, False)
    assert not torch.signbit(layer.weight).any()
