"""Bounds of a part's numbers: what lies outside is one sentence before any work, NaN and infinity included."""

from __future__ import annotations

import math
from typing import Any

from esparse.errors import Mistake


def check(
    group: str,
    part: Any,
    *,
    positive: tuple[str, ...] = (),
    not_negative: tuple[str, ...] = (),
    shares: tuple[str, ...] = (),
    finite: tuple[str, ...] = (),
) -> None:
    """Raises Mistake for a setting of the part that breaks its bound; None, a number that may be missing, breaks none.

    `shares` lie between 0 and 1, both included. Whatever the bound, a number is finite.
    """
    for names, holds, bound in (
        (positive, lambda value: value > 0, "positive and finite"),
        (not_negative, lambda value: value >= 0, "at least 0 and finite"),
        (shares, lambda value: 0 <= value <= 1, "between 0 and 1"),
        (finite, lambda value: True, "a finite number"),
    ):
        for name in names:
            value = getattr(part, name)
            if value is not None and not (math.isfinite(value) and holds(value)):
                words = bound if isinstance(value, float) else bound.removesuffix(" and finite")
                raise Mistake(f"{group}.{name} must be {words}, got {value:g}")
