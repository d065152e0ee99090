"""Parses patterns as users write them."""

from __future__ import annotations

import re

from esparse.errors import Mistake
from esparse.patterns.dense import Dense
from esparse.patterns.nm import NM, Pattern
from esparse.patterns.outliers import Outliers
from esparse.patterns.percent import Columns, Rows, Tiles, Unstructured

EXPLAINED = (
    "pattern must look like '2:4' (of every 4 consecutive weights of a row 2 survive), '50%' (half of every row is "
    "removed), '50%@columns' or '50%@rows' (half of the inputs or of the outputs), '50%@16x16' (of blocks of 16 "
    "outputs by 16 inputs, half of those side by side), or 'dense' (nothing is removed)"
)
OUTLIERS_EXPLAINED = "outliers must look like '16:256' (of every 256 consecutive weights of a row 16 survive anyway)"


def parse(text: object, outliers: object = None) -> Pattern:
    """Parses texts such as '2:4', '50%', '50%@16x16', or '8:16' with outliers '16:256'.

    Raises Mistake that says what was expected.
    """
    pattern = _parse(text)
    if outliers is None:
        return pattern
    if not isinstance(pattern, NM):
        raise Mistake(
            f"outliers survive beside an n:m pattern, and {text!r} is none: leave out outliers={outliers}, or ask for "
            "a pattern such as 8:16"
        )
    parsed = _nm("outliers", outliers, OUTLIERS_EXPLAINED)
    if parsed is None:
        raise Mistake(f"{OUTLIERS_EXPLAINED}, got {outliers!r}")
    if parsed.m % pattern.m:
        raise Mistake(
            f"outliers {parsed} are chosen from whole groups of the pattern {pattern}, but {parsed.m} is not a "
            f"multiple of {pattern.m}: take {parsed.n} of {pattern.m * max(2, round(parsed.m / pattern.m))}"
        )
    return Outliers(pattern, parsed)


def from_str(text: str) -> Pattern:
    """The pattern with this `str`."""
    return parse(*text.split("+"))


def _parse(text: object) -> Pattern:
    if pattern := _nm("pattern", text, EXPLAINED):
        return pattern
    if text == "dense":
        return Dense()
    if both := re.fullmatch(r"(\d+:\d+)\+(\d+:\d+)", str(text)):  # as tables name it
        raise Mistake(f"pattern {text!r} is two settings: pattern={both[1]} outliers={both[2]}")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%(?:@(columns|rows|(\d+)x(\d+)))?", str(text))
    if not match:
        raise Mistake(f"{EXPLAINED}, got {text!r}")
    removed, what, sides = float(match[1]), match[2], match.groups()[2:]
    if not 0 < removed < 100:
        raise Mistake(f"a pattern in per cent removes between 0% and 100%, got {text!r}")
    if what is None:
        return Unstructured(removed)
    if what in ("columns", "rows"):
        return Columns(removed) if what == "columns" else Rows(removed)
    height, width = map(int, sides)
    if not (height and width):
        raise Mistake(f"a pattern's blocks are at least 1x1 (outputs x inputs), got {text!r}")
    return Tiles(removed, height, width)


def _nm(name: str, text: object, explained: str) -> NM | None:
    """The n:m of a text; None for another text. Raises Mistake for a number, which YAML makes of an unquoted n:m."""
    if not isinstance(text, str) or re.fullmatch(r"\d+(\.\d+)?", text):
        raise Mistake(f"{explained}, got {text!r}: {_meant(name, text)}")
    match = re.fullmatch(r"(\d+):(\d+)", text, flags=re.ASCII)
    if not match:
        return None
    n, m = map(int, match.groups())
    if not 0 < n < m:
        raise Mistake(f"{name} n:m needs 0 < n < m, since n of m weights survive; got {text!r}")
    return NM(n, m)


def _meant(name: str, number: object) -> str:
    """A hint about a bare number: a percentage without its %, or YAML's reading of n:m as the number 60 n + m."""
    in_yaml = "in YAML write it in quotes, unquoted 2:4 is the number 124"
    value = float(str(number)) if isinstance(number, str | int | float) and not isinstance(number, bool) else 0.0
    if name != "pattern" or not 0 < value < 100:
        return in_yaml
    per_cent = f"did you mean {100 * value if value < 1 else value:g}%?"
    return f"{per_cent} Of n:m: {in_yaml}" if value > 60 else per_cent
