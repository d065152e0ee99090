"""Patterns as people write them."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from esparse.patterns import NM, Columns, Outliers, Pattern, Rows, Tiles, Unstructured, parse

TEXTS = {
    "2:4": NM(2, 4),
    "16:32": NM(16, 32),
    "50%": Unstructured(50),
    "62.5%": Unstructured(62.5),
    "50%@columns": Columns(50),
    "33.3333333%@rows": Rows(33.3333333),
    "50%@16x16": Tiles(50, 16, 16),
    "0.5%@1x128": Tiles(0.5, 1, 128),
}


@pytest.mark.parametrize(("text", "pattern"), TEXTS.items())
def test_parse(text: str, pattern: Pattern) -> None:
    assert parse(text) == pattern
    assert str(pattern) == text
    assert OverridesParser.create().parse_override(f"pattern={text}").value() == text  # needs no quotes


@given(
    removed=st.floats(0, 100, exclude_min=True, exclude_max=True),
    sides=st.tuples(st.integers(1, 999), st.integers(1, 999)),
)
def test_per_cents_keep_all_their_digits(removed: float, sides: tuple[int, int]) -> None:
    for pattern in (Unstructured(removed), Columns(removed), Rows(removed), Tiles(removed, *sides)):
        assert parse(str(pattern)) == pattern


def test_parse_outliers() -> None:
    assert parse("8:16", "16:256") == Outliers(NM(8, 16), NM(16, 256))
    assert parse("8:16", None) == NM(8, 16)
    assert parse("2:4", "1:4") == Outliers(NM(2, 4), NM(1, 4))
    assert str(parse("8:16", "16:256")) == "8:16+16:256"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("124", "unquoted 2:4 is the number 124"),
        (None, "unquoted 2:4 is the number 124"),
        ("50", "got '50': did you mean 50%?"),
        (50, "got 50: did you mean 50%?"),
        ("0.5", "did you mean 50%?"),
        ("64", "did you mean 64%? Of n:m: in YAML write it in quotes"),
        (124, "unquoted 2:4 is the number 124"),
        (None, "pattern must look like '2:4'"),
        ("4:4", "0 < n < m"),
        ("5:4", "0 < n < m"),
        ("0:4", "0 < n < m"),
        ("100%", "between 0% and 100%"),
        ("0%@rows", "between 0% and 100%"),
        ("120%@4x4", "between 0% and 100%"),
        ("50%@0x4", "at least 1x1"),
        ("50%@4x0", "at least 1x1"),
        ("50%@16", "'50%@16x16'"),
        ("50%@column", "'50%@columns'"),
        ("50@rows", "'50%@rows'"),
        ("2:4@rows", "'50%@rows'"),
        ("2of4", "pattern must look like '2:4'"),
        ("2:\uff14", "pattern must look like '2:4'"),
        ("2:4:8", "pattern must look like '2:4'"),
        ("8:16+16:256", "is two settings: pattern=8:16 outliers=16:256"),
        ("2:4\n", "pattern must look like '2:4'"),
    ],
)
def test_an_unreadable_pattern_says_what_was_expected(text: object, part: str) -> None:
    with pytest.raises(ValueError, match="pattern") as error:
        parse(text)
    assert part in str(error.value)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("text", "outliers", "part"),
    [
        ("50%", "16:256", "beside an n:m pattern, and '50%' is none"),
        ("50%@rows", "16:256", "leave out outliers=16:256"),
        ("8:16", "16", "outliers must look like '16:256'.*got '16': in YAML write it in quotes"),
        ("8:16", 152, "outliers must look like '16:256'.*got 152"),
        ("8:16", "none", "outliers must look like '16:256'.*got 'none'"),
        ("8:16", "6%", "outliers must look like '16:256'.*got '6%'"),
        ("8:16", "256:256", "outliers n:m needs 0 < n < m.*got '256:256'"),
        ("8:16", "16:250", "250 is not a multiple of 16: take 16 of 256"),
        ("8:16", "1:8", "8 is not a multiple of 16: take 1 of 32"),
        ("2of4", "16:256", "pattern must look like '2:4'"),
    ],
)
def test_outliers_that_make_no_sense_say_so(text: str, outliers: object, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        parse(text, outliers)
