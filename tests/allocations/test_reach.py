"""Which patterns a layer may get, and which settings are refused because they could change nothing."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esparse import patterns
from esparse.allocations import Allocation
from esparse.allocations.error import LayerError
from esparse.allocations.owl import Owl
from esparse.allocations.reach import others
from esparse.patterns import NM, Outliers, Unstructured


def owl(spread: float) -> Owl:
    return Owl(threshold=5.0, spread=spread, per="block")


def error(spread: float, points: float = 2.5) -> LayerError:
    return LayerError(spread=spread, weigh="weights", points=points)


def test_other_n_within_reach() -> None:
    assert others(NM(8, 16), 0.16) == [NM(n, 16) for n in (6, 7, 8, 9, 10)]
    assert others(NM(8, 16), 0.125) == [NM(n, 16) for n in (6, 7, 8, 9, 10)]  # 2/16 exactly is within
    assert others(NM(2, 4), 0.9) == [NM(1, 4), NM(2, 4), NM(3, 4)]  # no layer is left whole or emptied
    assert others(NM(30, 50), 0.58)[0] == NM(1, 50)  # in floats 0.58 * 50 is 28.999999999999996


def test_outliers_stay_while_the_base_changes() -> None:
    outliers = Outliers(NM(2, 4), NM(16, 256))
    assert [str(pattern) for pattern in others(outliers, 0.25)] == ["1:4+16:256", "2:4+16:256", "3:4+16:256"]


def test_other_percentages_within_reach() -> None:
    assert [str(p) for p in others(Unstructured(60.0), 0.003)] == [
        "60.3%",
        "60.2%",
        "60.1%",
        "60%",
        "59.9%",
        "59.8%",
        "59.7%",
    ]
    assert [p.removed_percent for p in others(Unstructured(66.67), 0.06, 2.5)] == [71.67, 69.17, 66.67, 64.17, 61.67]
    assert [p.removed_percent for p in others(Unstructured(98.0), 0.03, 1.0)] == [99, 98, 97, 96, 95]


@given(m=st.integers(3, 32), data=st.data(), reach=st.floats(0.001, 0.999))
def test_the_pattern_asked_for_is_among_them_and_they_ascend(m: int, data: st.DataObject, reach: float) -> None:
    n = data.draw(st.integers(1, m - 1))
    found = [pattern.n for pattern in others(NM(n, m), reach)]
    assert found == [k for k in range(1, m) if abs(k / m - n / m) <= reach + 1e-9]
    percent = data.draw(st.floats(0.5, 99.5))
    removed = [pattern.removed_percent for pattern in others(Unstructured(percent), reach)]
    assert percent in removed
    assert removed == sorted(set(removed), reverse=True)
    assert all(0 < p < 100 and abs(p - percent) <= 100 * reach + 1e-4 for p in removed)


@pytest.mark.parametrize(
    ("allocation", "pattern", "said"),
    [
        (
            owl(0.08),
            "2:4",
            "allocation=owl with spread=0.08 cannot change 2:4, whose steps are 0.25: use 8:16 (steps of 0.0625) or "
            "allocation.spread=0.25",
        ),
        (error(0.2), "2:4", "allocation=error with spread=0.2 cannot change 2:4, whose steps are 0.25: use 4:8 (steps"),
        (owl(0.0001), "60%", "cannot change 60%, whose steps are 0.001: use allocation.spread=0.001"),
        (error(0.02), "60%", "allocation=error with spread=0.02 cannot change 60%, whose steps are 0.025: use"),
        (owl(0.5), "1:4", "allocation=owl cannot change 1:4: what one layer gains another must lose"),
        (error(0.5), "7:8", "n cannot be 0 or 8; use 14:16"),
        (owl(0.08), "50%@columns", "50%@columns has neither: use a pattern such as 8:16 or 60%, or allocation=uniform"),
        (error(0.25), "50%@16x16", "allocation=error chooses n of n:m"),
    ],
)
def test_settings_that_could_change_nothing_are_refused(allocation: Allocation, pattern: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        allocation.check(patterns.parse(pattern))


@pytest.mark.parametrize(
    ("allocation", "pattern", "outliers"),
    [
        (owl(0.08), "8:16", None),
        (owl(0.08), "4:8", None),  # wishes up to 0.16 apart, steps of 0.125
        (owl(0.25), "2:4", "16:256"),
        (owl(0.08), "60%", None),
        (error(0.25), "2:4", None),
        (error(0.0625), "8:16", "16:256"),
        (error(0.25), "50%", None),
    ],
)
def test_settings_that_can_are_not(allocation: Allocation, pattern: str, outliers: str | None) -> None:
    asked = patterns.parse(pattern, outliers)
    allocation.check(asked)
    assert len(others(asked, allocation.spread)) > 1 or isinstance(allocation, Owl)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"per": "layer"}, "allocation.per must be one of block, group, got 'layer'"),
        ({"threshold": 0.0}, "allocation.threshold must be positive and finite"),
        ({"threshold": float("nan")}, "allocation.threshold must be positive and finite"),
        ({"spread": 0.0}, "allocation.spread must lie between 0 and 1, got 0.0"),
    ],
)
def test_settings_of_owl(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Owl(**({"threshold": 5.0, "spread": 0.08, "per": "block"} | settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"spread": 1.0}, "allocation.spread must lie between 0 and 1, got 1.0"),
        ({"weigh": "size"}, "allocation.weigh must be one of weights, layers, got 'size'"),
        ({"points": 0.0}, "allocation.points must lie between 0 and 100, got 0.0"),
    ],
)
def test_settings_of_error(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LayerError(**({"spread": 0.25, "weigh": "weights", "points": 2.5} | settings))
