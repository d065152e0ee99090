"""Producers: the matrix rows or norm weights that make a tensor's channels, and can absorb a change of them.

A producer knows which of its rows makes which channel. A per-channel scale, or an order, can be folded into those rows.

Shapes: I channels of the tensor, O rows of a weight, R rows of a producer, V rows of them that make the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from esparse.models.matrices import InputGroup, Matrix


@dataclass(frozen=True, slots=True, eq=False)
class Producer:
    """The rows of a matrix, or the weights of a norm, that make the channels of a tensor."""

    name: str
    parts: list[tuple[Tensor, float]]  # weight and bias, sharing the model's memory, and what a norm adds to its weight
    row_of_I: Tensor  # the row that makes each channel; with grouped-query attention a row makes several channels
    matrix: Matrix | None = None  # None: a norm

    @classmethod
    def of_norm(cls, name: str, module: nn.Module, offset: float) -> Producer:
        """The producer of a norm that multiplies by its weight plus `offset`."""
        weight_I = module.get_parameter("weight").data
        return cls(name, [(weight_I, offset), *_bias(module)], torch.arange(len(weight_I)))

    @classmethod
    def of_matrix(cls, matrix: Matrix, row_of_I: Tensor) -> Producer:
        return cls(matrix.name, [(matrix.view(), 0.0), *_bias(matrix.layer)], row_of_I, matrix)

    def of_expert(self, expert: int) -> Producer:
        """The same rows of another expert in the same parameter."""
        assert self.matrix is not None
        sibling = replace(self.matrix, expert=expert)
        return Producer.of_matrix(sibling, self.row_of_I)

    def tied(self, value_I: Tensor) -> Tensor:
        """Replaces the values (not negative) of all channels that one row makes by their maximum."""
        row_of_I = self.row_of_I.to(value_I.device)
        value_R = value_I.new_zeros(len(self.parts[0][0])).scatter_reduce(0, row_of_I, value_I, "amax")
        return value_R[row_of_I]

    def scale(self, factor_I: Tensor) -> None:
        """Multiplies every channel by its factor; channels of one row must have the same factor."""
        for stored, offset in self.parts:
            factor_R = torch.ones(len(stored), device=stored.device, dtype=torch.float32)
            factor_R[self.row_of_I.to(stored.device)] = factor_I.to(factor_R)
            wide = stored.to(torch.promote_types(stored.dtype, torch.float32)) + offset
            stored.copy_(wide * factor_R.view(-1, *[1] * (stored.ndim - 1)) - offset)


@dataclass(frozen=True, slots=True, eq=False)
class Edge:
    """A tensor inside a block: its producer, and all its readers."""

    producer: Producer
    groups: list[InputGroup]
    routers: list[Tensor]  # weights (outputs x I) of routers, which read the tensor and are never pruned

    def stored(self) -> list[Tensor]:
        """All weights that make or read the tensor; they share memory with the model."""
        read = [matrix.view() for group in self.groups for matrix in group.matrices]
        return [*(stored for stored, _ in self.producer.parts), *read, *self.routers]

    def move(self, scale_I: Tensor) -> None:
        """Divides the tensor by the scale and multiplies its readers, so that the block computes the same."""
        self.producer.scale(1 / scale_I)
        for group in self.groups:
            for matrix in group.matrices:
                matrix.view().copy_(matrix.view() * scale_I)
        for weight_OI in self.routers:
            weight_OI.copy_(weight_OI * scale_I)


def row_sets(outputs: int, inputs: int, *, heads: bool) -> Iterator[Tensor]:
    """Sets of V rows of a matrix that may make a tensor of `inputs` channels, the likeliest first.

    All rows; or, if the matrix may be several fused ones, the last rows of every chunk, for any number of equal chunks:
    [gate; up], gate and up in turns, [q; k; v], or q, k and v head by head; of two halves also the first half. V
    divides I (V < I with grouped-query attention). Without `heads` (in an expert) there are no q, k and v.
    """
    rows = torch.arange(outputs)
    if outputs <= inputs:
        if inputs % outputs == 0:
            yield rows
        return
    # (O - I) / 2 is the size of v in [q; k; v], also where k and v have fewer heads than q.
    for size in dict.fromkeys((inputs, (outputs - inputs) // 2) if heads else (inputs,)):
        if size == 0 or inputs % size:
            continue
        between = _divisors(math.gcd(size, outputs)) if heads else []
        for chunks in dict.fromkeys((1, size, *between)):
            if outputs % chunks == 0:
                chunk = rows.view(chunks, -1)
                yield chunk[:, -(size // chunks) :].flatten()
                if outputs == 2 * size == 2 * inputs:
                    yield chunk[:, : size // chunks].flatten()


def row_maps(rows_V: Tensor, inputs: int) -> Iterator[Tensor]:
    """All maps from channels to rows in which consecutive heads share the rows of one head."""
    sharing = inputs // len(rows_V)
    for heads in _divisors(len(rows_V)) if sharing > 1 else [1]:
        yield rows_V.view(heads, -1).repeat_interleave(sharing, dim=0).flatten()


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _bias(module: nn.Module | None) -> list[tuple[Tensor, float]]:
    bias = getattr(module, "bias", None)
    return [(bias.data, 0.0)] if isinstance(bias, nn.Parameter) else []
