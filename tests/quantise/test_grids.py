"""The grids against loops over single values, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esparse import option
from esparse.errors import Mistake
from esparse.patterns import NM, Dense, parse
from esparse.quantise.grids import Grid, normal_levels

NAMES = ["int8", "int4", "int3", "fp8", "nf4"]
# QLoRA's paper prints them (arXiv 2305.14314, appendix E), to seven digits.
PRINTED = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
PRINTED += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]


def grid(name: str, **changes: object) -> Grid:
    return option("quantise", name, **changes)


def weights(outputs: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and a 2:4 keep mask."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    return weight_OI, NM(2, 4).keep_top(torch.rand(outputs, inputs, generator=generator))


def levels(of: Grid, scale: float, zero: int | None) -> list[float]:
    """Every value that the grid has at this scale, by its definition."""
    if hasattr(of, "bits"):
        middle = 2 ** (of.bits - 1) if zero is None else zero
        codes = range(1 if zero is None else 0, 2**of.bits)
        return [scale * (code - middle) for code in codes]
    if of.code_bits == 8:  # e4m3: sign, four bits of exponent (bias 7), three of mantissa; 127 is NaN
        magnitudes = [
            (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
            for exponent in range(16)
            for mantissa in range(8)
            if (exponent, mantissa) != (15, 7)
        ]
        return [sign * scale * size for sign in (1, -1) for size in magnitudes]
    return [scale * level for level in PRINTED]


@pytest.mark.parametrize(
    ("name", "symmetric"), [*((name, True) for name in NAMES), ("int8", False), ("int4", False), ("int3", False)]
)
@pytest.mark.parametrize("group", [None, 8])
def test_every_kept_value_is_the_nearest_of_its_groups_levels(name: str, symmetric: bool, group: int | None) -> None:
    of = grid(name, group=group, **({} if symmetric else {"symmetric": False}))
    weight_OI, keep_OI = weights(5, 32)
    rounded_OI, scales = of.nearest(weight_OI, keep_OI, NM(2, 4))
    assert (rounded_OI[~keep_OI] == 0).all()
    columns = group or 32
    for row in range(5):
        for column in range(32):
            if not keep_OI[row, column]:
                continue
            g = column // columns
            zero = None if scales.zero_OG is None else int(scales.zero_OG[row, g])
            known = levels(of, float(scales.scale_OG[row, g]), zero)
            value, found = float(weight_OI[row, column]), float(rounded_OI[row, column])
            least = min(abs(level - value) for level in known)
            assert min(abs(level - found) for level in known) < 1e-6 * (1 + abs(found))
            assert abs(found - value) <= least + 1e-6 * (1 + abs(value))


@pytest.mark.parametrize("name", NAMES)
def test_a_scale_is_that_of_kept_values_alone(name: str) -> None:
    weight_OI, keep_OI = weights(4, 64)
    of = grid(name, group=16)
    _, scales = of.nearest(weight_OI, keep_OI, NM(2, 4))
    _, others = of.nearest(torch.where(keep_OI, weight_OI, 1000.0), keep_OI, NM(2, 4))
    assert torch.equal(scales.scale_OG, others.scale_OG)
    peak = {"int8": 127, "int4": 7, "int3": 3, "fp8": 448, "nf4": 1}[name]
    for row in range(4):
        for g in range(4):
            kept = weight_OI[row, 16 * g : 16 * g + 16][keep_OI[row, 16 * g : 16 * g + 16]]
            assert float(scales.scale_OG[row, g]) == float((kept.abs().max() / peak).half())


@given(
    name=st.sampled_from(NAMES),
    scale=st.sampled_from(["float16", "bfloat16", "float32"]),
    size=st.floats(1e-7, 1e6),
    seed=st.integers(0, 99),
)
def test_values_get_codes_that_give_the_same_values_again(name: str, scale: str, size: float, seed: int) -> None:
    of = grid(name, scale=scale, group=8)
    weight_OI, keep_OI = weights(3, 16, seed)
    rounded_OI, scales = of.nearest(size * weight_OI, keep_OI, NM(2, 4))
    assert torch.isfinite(rounded_OI).all() and (scales.scale_OG > 0).all()
    assert torch.equal(scales.scale_OG, scales.scale_OG.to(getattr(torch, scale)).float())
    per_OI = scales.scale_OG.repeat_interleave(8, 1)
    codes_OI = of.codes(rounded_OI, per_OI, None)
    assert codes_OI.dtype == torch.uint8 and int(codes_OI.max()) < 2**of.code_bits
    assert torch.equal(of.values(codes_OI, per_OI, None) * keep_OI, rounded_OI)


def test_int4_by_hand() -> None:
    of = grid("int4", group=4, scale="float32")
    weight_OI = torch.tensor([[0.7, 0.26, 9.0, -0.7, 1.4, 0.0, -0.31, 0.0]])
    keep_OI = torch.tensor([[True, True, False, True, True, False, True, False]])
    rounded_OI, scales = of.nearest(weight_OI, keep_OI, Dense())
    torch.testing.assert_close(scales.scale_OG, torch.tensor([[0.1, 0.2]]))
    torch.testing.assert_close(rounded_OI, torch.tensor([[0.7, 0.3, 0, -0.7, 1.4, 0, -0.4, 0]]))


def test_zero_points_by_hand() -> None:
    of = grid("int3", group=None, scale="float32", symmetric=False)
    weight_OI = torch.tensor([[-1.0, 6.0, 2.4, 0.0]])
    rounded_OI, scales = of.nearest(weight_OI, torch.ones(1, 4, dtype=torch.bool), Dense())
    assert (scales.scale_OG.tolist(), scales.zero_OG.tolist()) == ([[1.0]], [[1]])
    assert rounded_OI.tolist() == [[-1.0, 6.0, 2.0, 0.0]]
    above_OI = torch.tensor([[4.0, 6.0, 5.2, 7.0]])  # no value near 0: it still has a code
    rounded_OI, scales = of.nearest(above_OI, torch.ones(1, 4, dtype=torch.bool), Dense())
    assert (rounded_OI.tolist(), scales.zero_OG.tolist()) == ([[4.0, 6.0, 5.0, 7.0]], [[0]])


def test_the_levels_of_nf4_are_those_that_its_paper_prints() -> None:
    assert normal_levels().tolist() == pytest.approx(PRINTED, abs=2e-7)
    assert float(normal_levels()[7]) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_a_group_of_zeros_stays_zero(name: str) -> None:
    rounded_OI, scales = grid(name, group=4).nearest(torch.zeros(2, 8), torch.ones(2, 8, dtype=torch.bool), Dense())
    assert (rounded_OI == 0).all() and torch.isfinite(scales.scale_OG).all()


def test_outliers_stay_in_16_bits_and_leave_what_the_base_can_hold() -> None:
    pattern = parse("2:4", "2:16")
    weight_OI = weights(6, 32)[0]
    keep_OI = pattern.keep_top(weight_OI.abs())
    rounded_OI, scales = grid("int4", group=16).nearest(weight_OI, keep_OI, pattern)
    whole_OI = scales.whole_OI
    assert whole_OI is not None and int(whole_OI.sum()) == 6 * 2 * 2
    assert NM(2, 4).holds(keep_OI & ~whole_OI) and NM(2, 16).holds(whole_OI)
    assert torch.equal(rounded_OI[whole_OI], weight_OI[whole_OI].half().float())
    # Of each group the largest stand apart, so that the scale is that of smaller values.
    for row in range(6):
        for start in range(0, 32, 4):
            group = slice(start, start + 4)
            apart, inside = whole_OI[row, group], (keep_OI & ~whole_OI)[row, group]
            if apart.any():
                size = weight_OI[row, group].abs()
                assert size[apart].min() >= size[inside].max()
    assert grid("int4", group=16, outlier_bits=None).nearest(weight_OI, keep_OI, pattern)[1].whole_OI is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group": 0}, "quantise.group must be positive"),
        ({"scale": "int8"}, "quantise.scale must be one of"),
        ({"rounding": "up"}, "quantise.rounding must be one of"),
        ({"outlier_bits": 8}, "quantise.outlier_bits must be 16"),
        ({"bits": 9}, "quantise.bits must lie between 2 and 8"),
        ({"damp": 0.0}, "quantise.damp must be positive"),
        ({"block": 0}, "quantise.block must be positive"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, object], words: str) -> None:
    with pytest.raises(Mistake, match=words):
        grid("int4", **changes)


def test_a_width_that_a_group_does_not_divide() -> None:
    with pytest.raises(Mistake, match=r"quantise.group=64 does not divide the 160 inputs of mlp.up: take 40"):
        grid("int4").ready([("mlp.up", 160)])
    grid("int4", group=None).ready([("mlp.up", 160)])


def test_outliers_beyond_their_share() -> None:
    grid("int4").check(parse("8:16", "32:256"))  # 2 bits each
    with pytest.raises(Mistake, match=r"outliers 48:256 in 16 bits would take more than the 2 bits .* 32:256"):
        grid("int4").check(parse("8:16", "48:256"))
    grid("int4", outlier_bits=None).check(parse("8:16", "48:256"))
    grid("int8").check(parse("8:16", "48:256"))


def test_fp8_needs_a_torch_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "float8_e4m3fn")
    with pytest.raises(Mistake, match=r"quantise=fp8 needs torch.float8_e4m3fn"):
        grid("fp8").ready([])


def test_a_finer_grid_is_nearer() -> None:
    weight_OI, keep_OI = weights(64, 64)
    lost = {
        name: float((grid(name, group=32).nearest(weight_OI, keep_OI, NM(2, 4))[0] - weight_OI * keep_OI).norm())
        for name in NAMES
    }
    assert lost["int8"] < lost["fp8"] < lost["nf4"] < lost["int4"] < lost["int3"]
    assert not math.isclose(lost["int8"], 0.0)
