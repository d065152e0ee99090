"""The other patterns that a layer may get in place of the method's."""

from __future__ import annotations

import dataclasses

from esparse.errors import Mistake
from esparse.patterns import NM, Outliers, Pattern, Unstructured

POINTS = 0.1  # step between percentages that a layer may get
ROUNDING = 1e-9  # largest rounding error of a sum of decimal fractions


def others(pattern: Pattern, reach: float, points: float = POINTS) -> list[Pattern]:
    """The patterns with a density within `reach` of this pattern's, from the sparsest to the densest, including itself.

    For n:m, with or without outliers, other n from 1 to m - 1; for per cent, steps of `points` between 0 and 100.
    Raises TypeError for other kinds of patterns.
    """
    if isinstance(pattern, Outliers):
        return [dataclasses.replace(pattern, base=base) for base in _other_n(pattern.base, reach)]
    if isinstance(pattern, NM):
        return list(_other_n(pattern, reach))
    if not isinstance(pattern, Unstructured):
        raise TypeError(f"{pattern} has no denser and sparser patterns beside it")
    most = int(100 * reach / points + ROUNDING)
    removed = [round(pattern.removed_percent - step * points, 6) for step in range(-most, most + 1) if step]
    here = [percent for percent in (*removed, pattern.removed_percent) if 0 < percent < 100]
    return [Unstructured(percent) for percent in sorted(here, reverse=True)]


def _other_n(pattern: NM, reach: float) -> list[NM]:
    most = int(reach * pattern.m + ROUNDING)
    return [NM(n, pattern.m) for n in range(max(1, pattern.n - most), min(pattern.m - 1, pattern.n + most) + 1)]


def refuse_what_cannot_change(option: str, pattern: Pattern, spread: float, *, reach: float, points: float) -> None:
    """Raises Mistake if no layer could get another pattern within this reach."""
    base = pattern.base if isinstance(pattern, Outliers) else pattern
    if isinstance(base, Unstructured):
        if reach < points / 100 - ROUNDING:
            raise Mistake(
                f"allocation={option} with spread={spread:g} cannot change {pattern}, whose steps are {points / 100:g}:"
                f" use allocation.spread={points / 100:g} or more"
            )
        return
    if not isinstance(base, NM):
        raise Mistake(
            f"allocation={option} chooses n of n:m, or the percentage removed from each row, and {pattern} has "
            "neither: use a pattern such as 8:16 or 60%, or allocation=uniform"
        )
    if reach < 1 / base.m - ROUNDING:
        finer = base
        while spread < 1 / finer.m:
            finer = NM(2 * finer.n, 2 * finer.m)
        raise Mistake(
            f"allocation={option} with spread={spread:g} cannot change {pattern}, whose steps are {1 / base.m:g}: use "
            f"{finer} (steps of {1 / finer.m:g}) or allocation.spread={1 / base.m:g}"
        )
    if base.n in (1, base.m - 1):
        raise Mistake(
            f"allocation={option} cannot change {pattern}: what one layer gains another must lose, and n cannot be 0 "
            f"or {base.m}; use {2 * base.n}:{2 * base.m}, or allocation=uniform"
        )
