"""The grids: integers, eight-bit floating point, and the quantiles of a normal distribution.

A value is scale * (code's level). Integers: round to nearest, as GPTQ's quantiser does (Frantar et al. 2022, arXiv
2210.17323). fp8: e4m3 of Micikevicius et al. 2022 (arXiv 2209.05433). nf4: the sixteen quantiles of QLoRA (Dettmers et
al. 2023, arXiv 2305.14314, appendix E).

Shapes: O outputs, I inputs, G groups of a row, C columns of a group.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from esparse.errors import Mistake
from esparse.parts import bounds
from esparse.quantise import Quantise, Scales

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from esparse.patterns import Pattern
    from esparse.stats import Factory

ROUNDINGS = ("nearest", "sweep")
PRECISIONS = ("float16", "bfloat16", "float32")
FP8_LARGEST = 448.0  # of e4m3
NF4_OFFSET = 0.9677083  # the probability at which QLoRA puts the outermost level


@dataclass(kw_only=True, slots=True)
class Grid(Quantise):
    """Base class of grids: groups, scales, and the rounding of kept values."""

    group: int | None  # consecutive columns of a row that share a scale; None: the whole row
    scale: str  # the precision of a scale: float16 | bfloat16 | float32
    rounding: str  # nearest: each value by itself | sweep: column by column, the rest of the row repairs the error
    outlier_bits: int | None  # of outliers (outliers=k:256): 16, or None: as all others
    damp: float  # of the sweep: added to the Gram matrix's diagonal, as a share of its mean
    block: int  # of the sweep: columns whose repair of all later columns is done in one product

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 1:
            raise Mistake(f"quantise.group must be positive, or null for whole rows, got {self.group}")
        if self.scale not in PRECISIONS:
            raise Mistake(f"quantise.scale must be one of {', '.join(PRECISIONS)}, got {self.scale!r}")
        if self.rounding not in ROUNDINGS:
            raise Mistake(f"quantise.rounding must be one of {', '.join(ROUNDINGS)}, got {self.rounding!r}")
        if self.outlier_bits not in (None, 16):
            raise Mistake(
                f"quantise.outlier_bits must be 16, or null for outliers in as many bits as the other values, "
                f"got {self.outlier_bits}"
            )
        bounds.check("quantise", self, positive=("damp", "block"))

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Bits of a code."""

    @property
    def zero_bits(self) -> int:
        """Bits of a group's zero point; 0 if all groups have the same one."""
        return 0

    @property
    @abstractmethod
    def zero_code(self) -> int:
        """The code of zero, if groups have no zero points of their own."""

    def levels(self) -> Tensor | None:
        """The level of each code, a value over its scale; None if that is the code minus the code of zero."""
        return None

    @abstractmethod
    def fit(self, values_GC: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point (uint8) of each group, over the last dimension; values that do not count must be 0."""

    @abstractmethod
    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The codes (uint8) of the nearest values."""

    @abstractmethod
    def values(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The values (float32) of these codes."""

    def rounded(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The nearest value on the grid."""
        return self.values(self.codes(weight, scale, zero), scale, zero)

    def collects(self) -> dict[str, Factory]:
        if self.rounding == "nearest":
            return {}
        from esparse.stats import Gram

        return {"gram": Gram}

    def check(self, pattern: Pattern) -> None:
        """Raises Mistake if outliers in 16 bits would take more bits than the other values."""
        if len(pattern.parts()) < 2 or self.outlier_bits is None:
            return
        base, outliers = pattern.parts()
        beside = self.code_bits * base.n / base.m
        if self.outlier_bits * outliers.n / outliers.m > beside:
            most = int(beside * outliers.m / self.outlier_bits)
            raise Mistake(
                f"outliers {outliers} in {self.outlier_bits} bits would take more than the {beside:g} bits per weight "
                f"of the values beside them: take at most {most}:{outliers.m}, or quantise.outlier_bits=null"
            )

    def ready(self, widths: Iterable[tuple[str, int]]) -> None:
        for name, inputs in widths:
            self.columns(inputs, name)

    def columns(self, inputs: int, name: str = "a layer") -> int:
        """The number of columns that share a scale. Raises Mistake if it does not divide `inputs`."""
        columns = self.group or inputs
        if inputs % columns:
            fits = max(size for size in range(1, columns) if inputs % size == 0)
            raise Mistake(
                f"quantise.group={columns} does not divide the {inputs} inputs of {name}: take {fits}, or null for "
                "one scale per row"
            )
        return columns

    def stored_scale(self, scale: Tensor) -> Tensor:
        """The scales as they will be read back, none of them 0."""
        import torch

        dtype = getattr(torch, self.scale)
        limits = torch.finfo(dtype)
        stored = scale.clamp(max=limits.max).to(dtype).float()
        # Of a group without a value any will do. Float32 computes with them, and may take its least numbers for 0.
        smallest = max(limits.smallest_normal * limits.eps, torch.finfo(torch.float32).smallest_normal)
        return torch.where(stored > 0, stored, torch.where(scale > 0, smallest, 1.0))

    def beyond(self, scale_OG: Tensor) -> tuple[int, int]:
        """How many stored scales are the largest of their precision, and how many among its very smallest, of few bits.

        Values of the former may be cut, and of the latter far from the nearest of a grid that has its own scale.
        """
        import torch

        limits = torch.finfo(getattr(torch, self.scale))
        return int((scale_OG >= limits.max).sum()), int((scale_OG < 64 * limits.smallest_normal * limits.eps).sum())

    def whole(self, weight_OI: Tensor, keep_OI: Tensor, pattern: Pattern) -> Tensor | None:
        """The kept weights that stay in 16 bits: those that a group keeps beyond its n, the largest first.

        The pattern's base can hold the rest of every group, so that both parts can be stored.
        """
        if len(pattern.parts()) < 2 or self.outlier_bits is None:
            return None
        base, _ = pattern.parts()
        smallest_OI = base.keep_top((-weight_OI.abs()).masked_fill(~keep_OI, -float("inf")))
        return keep_OI & ~smallest_OI

    def nearest(self, weight_OI: Tensor, keep_OI: Tensor, pattern: Pattern) -> tuple[Tensor, Scales]:
        """Every kept value rounded by itself, and the scales; columns in group order."""
        columns = self.columns(weight_OI.shape[1])
        whole_OI = self.whole(weight_OI, keep_OI, pattern)
        inside_OI = keep_OI if whole_OI is None else keep_OI & ~whole_OI
        groups_OGC = (weight_OI * inside_OI).unflatten(1, (-1, columns))
        scale_OG, zero_OG = self.fit(groups_OGC)
        zero_OG1 = None if zero_OG is None else zero_OG[..., None]
        rounded_OI = self.rounded(groups_OGC, scale_OG[..., None], zero_OG1).flatten(1) * inside_OI
        if whole_OI is not None:
            rounded_OI += half(weight_OI) * whole_OI
        return rounded_OI, Scales(scale_OG, zero_OG, whole_OI)


@dataclass(kw_only=True, slots=True)
class Integer(Grid):
    """Multiples of a scale, evenly spaced.

    Symmetric: from -(2^(b-1) - 1) to 2^(b-1) - 1, as code - 2^(b-1). Otherwise from the lowest to the highest of the
    kept values and 0, with a zero point of b bits, so that 0 itself always has a code.
    """

    bits: int  # of a value, 2 to 8
    symmetric: bool  # whether zero is in the middle: else each group has a zero point

    def __post_init__(self) -> None:
        Grid.__post_init__(self)
        if not 2 <= self.bits <= 8:
            raise Mistake(f"quantise.bits must lie between 2 and 8, got {self.bits}")

    @property
    def code_bits(self) -> int:
        return self.bits

    @property
    def zero_bits(self) -> int:
        return 0 if self.symmetric else self.bits

    @property
    def zero_code(self) -> int:
        return int(2 ** (self.bits - 1))

    def fit(self, values_GC: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        if self.symmetric:
            return self.stored_scale(values_GC.abs().amax(-1) / (2 ** (self.bits - 1) - 1)), None
        low_G, high_G = values_GC.amin(-1).clamp(max=0), values_GC.amax(-1).clamp(min=0)
        scale_G = self.stored_scale((high_G - low_G) / (2**self.bits - 1))
        return scale_G, (-low_G / scale_G).round().clamp(0, 2**self.bits - 1).to(torch.uint8)

    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        import torch

        middle, least = (self.zero_code, 1) if zero is None else (zero, 0)
        return ((weight / scale).round() + middle).clamp(least, 2**self.bits - 1).to(torch.uint8)

    def values(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return (codes.float() - (self.zero_code if zero is None else zero.float())) * scale


@dataclass(kw_only=True, slots=True)
class Float8(Grid):
    """e4m3, without infinities: four bits of exponent, three of mantissa, and 448 as the largest value."""

    @property
    def code_bits(self) -> int:
        return 8

    @property
    def zero_code(self) -> int:
        return 0

    def levels(self) -> Tensor:
        return float8_levels()

    def ready(self, widths: Iterable[tuple[str, int]]) -> None:
        import torch

        if not hasattr(torch, "float8_e4m3fn"):
            raise Mistake(f"quantise=fp8 needs torch.float8_e4m3fn, which PyTorch {torch.__version__} has not")
        Grid.ready(self, widths)

    def fit(self, values_GC: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.stored_scale(values_GC.abs().amax(-1) / FP8_LARGEST), None

    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        import torch

        # Beyond the largest value the conversion would give NaN.
        return (weight / scale).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)

    def values(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        import torch

        return codes.view(torch.float8_e4m3fn).float() * scale


@dataclass(kw_only=True, slots=True)
class NormalFloat(Grid):
    """Sixteen levels between -1 and 1 that values of a normal distribution fall on equally often; one of them is 0."""

    @property
    def code_bits(self) -> int:
        return 4

    @property
    def zero_code(self) -> int:
        return 7

    def levels(self) -> Tensor:
        return normal_levels()

    def fit(self, values_GC: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.stored_scale(values_GC.abs().amax(-1)), None

    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        import torch

        levels = normal_levels().to(weight.device)
        between = (levels[1:] + levels[:-1]) / 2
        return torch.bucketize((weight / scale).contiguous(), between).to(torch.uint8)

    def values(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return normal_levels().to(codes.device)[codes.long()] * scale


def settings(grid: Grid) -> dict[str, Any]:
    """The class and the settings of a grid, as config.json has them."""
    return {"class": type(grid).__name__} | asdict(grid)


def from_settings(content: Mapping[str, Any]) -> Grid:
    """The grid that `settings` was given. Raises Mistake for what it has not written."""
    classes: dict[str, type[Grid]] = {kind.__name__: kind for kind in (Integer, Float8, NormalFloat)}
    others = {name: value for name, value in content.items() if name != "class"}
    try:
        return classes[content["class"]](**others)
    except (KeyError, TypeError) as error:
        raise Mistake("config.json is damaged, or of a later esparse: its grid has other settings") from error


@lru_cache
def normal_levels() -> Tensor:
    """The levels of nf4 (float32, ascending): eight quantiles above zero, seven below, and zero."""
    import torch

    above_8 = torch.special.ndtri(torch.linspace(NF4_OFFSET, 0.5, 9, dtype=torch.float64)[:-1])
    below_7 = -torch.special.ndtri(torch.linspace(NF4_OFFSET, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([above_8, below_7, torch.zeros(1, dtype=torch.float64)]).sort().values
    return (levels / levels.max()).float()


@lru_cache
def float8_levels() -> Tensor:
    """The value of each code of e4m3 (float32)."""
    import torch

    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float() + 0.0  # no -0.0


def half(weight: Tensor) -> Tensor:
    """The values as 16 bits hold them."""
    import torch

    limit = torch.finfo(torch.float16).max
    return weight.clamp(-limit, limit).half().float()
