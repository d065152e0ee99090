"""DSnoT: exchanges kept and pruned weights until each output's mean is near its dense value.

Dynamic Sparse No Training (Zhang et al. 2023, arXiv 2310.08915). A weight contributes c_ij = W_ij s_j to its output;
s_j is the sum of channel j over the tokens of a sequence, averaged over sequences (the unit of the authors' code, on
which the threshold depends). Row i has lost e_i, the sum of c_ij over pruned j (dense minus pruned). Each step regrows
the pruned weight with the largest sign(e) c_ij / Var(x_j)^power among those with sign(e) c_ij > 0, and prunes, in the
same group, the kept weight with the lowest |W_ij| ||x_j|| among those with sign(e) c_ij < 0: both move e towards 0.

Differences from the authors' code, on points that the paper leaves open: a weight comes back only if its group has such
a partner (the code's n:m branch prunes a weight of any sign); every step must lower |e| (the code stops if e changes
its sign); a weight may move more than once. The code skips LLaMA's MLP by default: here that is recovery.skip=[mlp].
Shapes: O outputs, I inputs, R rows that may still gain, G groups, M weights of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.errors import Mistake
from esparse.parts import bounds, expressions
from esparse.patterns import Unstructured
from esparse.recoveries import Recovery
from esparse.updates import Solution

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.patterns import Pattern
    from esparse.stats import Factory
    from esparse.updates import Layer

VALUES_AT_ONCE = 2**24  # of a layer; limits the memory of float64 copies
LEAST_VARIANCE = 1e-30  # replaces 0, so that of constant channels those with the largest contribution come back first


@dataclass(kw_only=True, slots=True)
class Dsnot(Recovery):
    """Moves the mask within the pattern; all kept weights get their dense values.

    Changes of weights by an update or an earlier recovery are lost.
    """

    cycles: int  # exchanges per row, at most
    threshold: float  # rows whose mean error, summed over the tokens of a sequence, is below it are left alone
    power: float  # of the input's variance, by which the weight that comes back is chosen
    # The authors skip LLaMA's `mlp`
    skip: list[str]  # regular expressions: a layer stays as it is if one is found in its name, or a module's around it

    def __post_init__(self) -> None:
        bounds.check("recovery", self, positive=("cycles",), not_negative=("threshold", "power"))
        expressions.check("recovery.skip", self.skip)

    def skips(self) -> list[str]:
        return self.skip

    def check(self, pattern: Pattern) -> None:
        if pattern.swap_width is None and not isinstance(pattern, Unstructured):
            raise Mistake(
                "recovery=dsnot exchanges weights within a group or a row: it needs a pattern such as 2:4 or 50%, not "
                f"{pattern}"
            )

    def collects(self) -> dict[str, Factory]:
        from esparse.stats import ColumnMoments, ColumnNorm

        return {"moments": ColumnMoments, "norm": ColumnNorm}

    def layer(self, layer: Layer, pruned: Solution) -> Solution:
        import torch

        from esparse.models.layer_names import found_in

        grouping, stats = layer.grouping, layer.stats
        self.check(grouping.pattern)
        if found_in(self.skip, stats.name, 1) or found_in(self.skip, f"{stats.name}.weight", 1):
            return pruned
        moments, norm_I = stats["moments"], stats["norm"].norm_I("sequence")
        sum_I = moments.mean_I().double() * (moments.tokens / moments.sequences)
        spread_I = moments.variance_I().double().clamp_(min=LEAST_VARIANCE) ** self.power
        outputs, inputs = layer.dense_OI.shape
        width = grouping.pattern.swap_width or inputs
        keeps = []
        for rows in torch.arange(outputs).split(max(1, VALUES_AT_ONCE // inputs)):
            weight_OI = layer.dense_OI[rows]
            keep_OI = exchange(
                grouping.ordered(pruned.keep_OI[rows]),
                grouping.ordered(weight_OI * sum_I),
                grouping.ordered(weight_OI * (sum_I / spread_I)),
                grouping.ordered(weight_OI.abs() * norm_I),
                m=width,
                cycles=self.cycles,
                threshold=self.threshold,
            )
            keeps.append(grouping.restored(keep_OI))
        return Solution.without_update(layer.dense_OI, torch.cat(keeps))


def exchange(
    keep_OI: Tensor, gives_OI: Tensor, rank_OI: Tensor, score_OI: Tensor, *, m: int, cycles: int, threshold: float
) -> Tensor:
    """The keep mask after the steps, with columns in group order; the last group may be shorter.

    `gives`: each weight's contribution to its row's mean output; `rank` (signed): order of coming back; `score`: order
    of being pruned.
    """
    import torch

    from esparse.patterns.nm import filled

    inputs = keep_OI.shape[1]
    # The padding of the last group contributes nothing, so it is never chosen.
    keep_OI, gives_OI, rank_OI, score_OI = (filled(x_OI, m) for x_OI in (keep_OI.clone(), gives_OI, rank_OI, score_OI))
    error_O = gives_OI.masked_fill(keep_OI, 0.0).sum(1)
    rows_R = torch.arange(len(keep_OI), device=keep_OI.device)
    for _ in range(cycles):
        rows_R = rows_R[error_O[rows_R].abs() >= threshold]
        come_R, go_R, some_R = _choice(
            error_O[rows_R].sign(), keep_OI[rows_R], gives_OI[rows_R], rank_OI[rows_R], score_OI[rows_R], m
        )
        after_R = error_O[rows_R] - gives_OI[rows_R, come_R] + gives_OI[rows_R, go_R]
        gains_R = some_R & (after_R.abs() < error_O[rows_R].abs())
        if not gains_R.any():
            break
        rows_R = rows_R[gains_R]
        error_O[rows_R] = after_R[gains_R]
        keep_OI[rows_R, come_R[gains_R]] = True
        keep_OI[rows_R, go_R[gains_R]] = False
    return keep_OI[:, :inputs].contiguous()


def _choice(
    sign_R: Tensor, keep_RI: Tensor, gives_RI: Tensor, rank_RI: Tensor, score_RI: Tensor, m: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the column that comes back, the column that is pruned for it, and whether both exist."""
    toward_RI = gives_RI * sign_R[:, None]
    goes_RGM = (keep_RI & (toward_RI < 0)).unflatten(1, (-1, m))
    comes_RI = ~keep_RI & (toward_RI > 0) & goes_RGM.any(2).repeat_interleave(m, 1)
    come_R = (rank_RI * sign_R[:, None]).masked_fill(~comes_RI, -float("inf")).argmax(1)  # the first of ties
    group_R = (come_R // m)[:, None, None].expand(-1, 1, m)
    score_RM = score_RI.unflatten(1, (-1, m)).gather(1, group_R).squeeze(1)
    go_RM = goes_RGM.gather(1, group_R).squeeze(1)
    go_R = come_R // m * m + score_RM.masked_fill(~go_RM, float("inf")).argmin(1)
    return come_R, go_R, comes_RI.any(1)
