"""Pruned parameters trained under fixed masks: the weights themselves or LoRA, and regularisers on their groups.

Shapes: O outputs, I inputs, G groups, M places of a group, R rank, * an expert dimension, if there are experts.
Polarity: True in `keep` means the weight is kept. "As stored" means in the parameter's layout: I x O for a Conv1D.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from esparse.models.matrices import Matrix
from esparse.patterns import Grouping
from esparse.patterns.nm import filled


@dataclass(frozen=True, slots=True, eq=False)
class MaskedParameter:
    """One pruned parameter, its mask as stored, and the grouping of its matrix, or of each expert's matrix."""

    entry: str  # name in the model's state dict
    parameter: nn.Parameter
    keep: Tensor
    transposed: bool
    groupings: Sequence[Grouping]
    rows: int = 0  # of each expert, if the parameter holds its experts in 2 dimensions

    def outputs_first(self, stored: Tensor) -> Tensor:
        """Converts a tensor as stored to * x O x I."""
        stored = stored.unflatten(0, (-1, self.rows)) if self.rows else stored
        return stored.mT if self.transposed else stored

    def as_stored(self, outputs_first: Tensor) -> Tensor:
        """Converts * x O x I to as stored."""
        stored = outputs_first.mT if self.transposed else outputs_first
        return stored.flatten(0, 1) if self.rows else stored

    def matrices(self, stored: Tensor) -> Iterator[tuple[Tensor, Grouping]]:
        """Each matrix (O x I) of a tensor as stored, with its grouping."""
        # unbind, because the gradient of each slice stored[expert] would be as large as all experts together.
        matrices = self.outputs_first(stored)
        return zip(matrices.unbind() if matrices.ndim == 3 else [matrices], self.groupings, strict=True)

    def settle(self) -> None:
        """Sets pruned weights to +0.0, and kept weights that are zero, too (rounding may have made them -0.0)."""
        self.parameter.data.masked_fill_(~self.keep | (self.parameter.data == 0), 0.0)


def masked_parameters(
    keeps: Mapping[str, Tensor], groupings: Sequence[tuple[Matrix, Grouping]], device: torch.device
) -> list[MaskedParameter]:
    """The pruned parameters with their masks (by name; outputs x inputs); masks and orders go to the device."""
    matrices: dict[str, list[tuple[Matrix, Grouping]]] = {}
    for matrix, grouping in groupings:
        matrices.setdefault(matrix.entry, []).append((matrix, grouping))
    masked = []
    for entry, members in matrices.items():
        members.sort(key=lambda member: member[0].expert or 0)
        matrix, keep = members[0][0], keeps[entry].to(device)
        cuts = [Grouping(g.pattern, None if g.order_I is None else g.order_I.to(device)) for _, g in members]
        one = MaskedParameter(entry, matrix.parameter, keep, matrix.transposed, cuts, matrix.rows)
        masked.append(replace(one, keep=one.as_stored(keep).contiguous()))
    return masked


class Whole:
    """Trains the kept weights themselves, and the other `parameters`."""

    def __init__(self, masked: Sequence[MaskedParameter], parameters: Sequence[nn.Parameter]) -> None:
        self.leaves: list[Tensor] = list(parameters)
        self.kept = {of.parameter: of.keep for of in masked}  # for training.masked
        self._held = masked

    def weights(self) -> dict[str, Tensor]:
        """The weights with which the model computes, by name, as stored."""
        return {of.entry: of.parameter for of in self._held}

    def merge(self) -> None:
        """Does nothing: the parameters already hold the trained values."""


class Lora:
    """W' = W + keep * (B A) * alpha / rank for every matrix; A (* x R x I) begins random, B (* x O x R) at zero.

    A is uniform between -1 and 1 over the root of its inputs. A and B are float32; W' is rounded to the dtype of W, as
    it will be in the end. The model's own parameters do not change before `merge`.
    """

    def __init__(self, masked: Sequence[MaskedParameter], rank: int, alpha: float, generator: torch.Generator) -> None:
        self.leaves: list[Tensor] = []
        self.kept: dict[nn.Parameter, Tensor] = {}
        self._scale = alpha / rank
        self._adapted = []
        for of in masked:
            *experts, outputs, inputs = of.outputs_first(of.parameter.data).shape
            down = (2 * torch.rand(*experts, rank, inputs, generator=generator, dtype=torch.float32) - 1) / math.sqrt(
                inputs
            )
            down = down.to(of.parameter.device).requires_grad_()
            up = torch.zeros(
                *experts, outputs, rank, device=of.parameter.device, requires_grad=True, dtype=torch.float32
            )
            self.leaves += [down, up]
            self._adapted.append((of, down, up))

    def weights(self) -> dict[str, Tensor]:
        """The weights with which the model computes, by name, as stored; computed at every call."""
        return {of.entry: self._added(of, down, up) for of, down, up in self._adapted}

    @torch.no_grad()
    def merge(self) -> None:
        """Writes the trained weights into the model's parameters."""
        for of, down, up in self._adapted:
            of.parameter.copy_(self._added(of, down, up))

    def _added(self, of: MaskedParameter, down: Tensor, up: Tensor) -> Tensor:
        addition = of.as_stored(up @ down) * self._scale
        # where saves the mask itself for the gradient, masked_fill(~keep) a second one
        return (of.parameter + torch.where(of.keep, addition, 0.0)).to(of.parameter.dtype)


def lasso(masked: Sequence[MaskedParameter], weights: Mapping[str, Tensor]) -> Tensor:
    """The sum over all groups g of all rows of ||w_g||_2; a group is a group of M places of the pattern."""
    total = torch.zeros((), device=masked[0].parameter.device, dtype=torch.float32)
    for of in masked:
        for weight_OI, grouping in of.matrices(weights[of.entry]):
            m = grouping.pattern.swap_width
            assert m is not None
            groups_OGM = filled(grouping.ordered(weight_OI), m).unflatten(-1, (-1, m))
            norms_OG = torch.linalg.vector_norm(groups_OGM, dim=-1, dtype=torch.float32)  # its gradient at 0 is 0
            total = total + norms_OG.sum()
    return total


def dropped(masked: Sequence[MaskedParameter], probability: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Factors for the weights, by name: 0 for the inputs of a dropped group, else 1 / (1 - probability).

    Each matrix draws once per group, for all its rows; the factors broadcast to the weight as stored.
    """
    factors = {}
    for of in masked:
        drawn = []
        *experts, outputs, inputs = of.outputs_first(of.parameter.data).shape
        for grouping in of.groupings:
            m = grouping.pattern.swap_width
            assert m is not None
            alive_G = torch.rand(-(-inputs // m), generator=generator, dtype=torch.float32) >= probability
            places_I = alive_G.repeat_interleave(m)[:inputs].to(of.parameter.device) / (1 - probability)
            drawn.append(grouping.restored(places_I[None]))
        factor = torch.stack(drawn) if experts else drawn[0]
        factors[of.entry] = of.as_stored(factor.expand(-1, outputs, -1) if of.rows else factor)
    return factors
