"""The layer and the experts with codes compute what their decoded weight does, and hold no other copy of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esparse import option, patterns
from esparse.packed import layer as packed_layer
from esparse.packed import quantised, quantised_layer
from esparse.packed.experts import PackedExperts
from esparse.packed.quantised_layer import QuantisedLinear
from esparse.quantise import Scales
from esparse.quantise.grids import Grid
from tests.kernels.packed import DEVICE

CPU = torch.device("cpu")
GRIDS: list[tuple[str, dict[str, Any]]] = [
    ("int8", {}),
    ("int4", {"symmetric": False}),
    ("int3", {"scale": "bfloat16"}),
    ("fp8", {}),
    ("nf4", {}),
]
PATTERNS = [("2:4", None), ("8:16", None), ("2:4", "4:16"), ("dense", None)]


@pytest.fixture(autouse=True, params=["loops", "plain"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything with the compiled loops and without them, as where numba is not installed."""
    if request.param == "plain":
        monkeypatch.setattr(quantised_layer, "loops", lambda: None)
    else:
        pytest.importorskip("numba")
    return str(request.param)


def rounded(
    pattern: patterns.Pattern, outputs: int, inputs: int, grid: Grid, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Scales]:
    weight_OI = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    rounded_OI, scales = grid.nearest(weight_OI, pattern.keep_top(weight_OI.abs()), pattern)
    return rounded_OI.to(dtype) + 0.0, scales


def layer(
    asked: tuple[str, str | None], quantise: str, changes: dict[str, Any], dtype: torch.dtype, order_I: Tensor | None
) -> tuple[QuantisedLinear, Tensor]:
    """A settled layer of 36 inputs and 17 outputs, and its dense weight with columns in their own order."""
    pattern, grid = patterns.parse(*asked), option("quantise", quantise, group=12, **changes)
    weight_OI, scales = rounded(pattern, 17, 36, grid, dtype)
    how: dict[str, Any] = {"bias": True, "dtype": dtype, "device": CPU, "ordered": order_I is not None}
    of = QuantisedLinear(36, 17, pattern, grid, **how)
    tensors = quantised.to_file(weight_OI, pattern, grid, scales) | {"bias": torch.arange(17.0)}
    of.load_state_dict(tensors | ({} if order_I is None else {"order": order_I.int()}))
    of.settle()
    return of, weight_OI if order_I is None else torch.empty_like(weight_OI).index_copy_(1, order_I, weight_OI)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_weight_has_the_precision_in_which_it_computes(dtype: torch.dtype) -> None:
    # As in DeepSeek-V3.2's indexer: `self.weights_proj(x.to(self.weights_proj.weight.dtype))`.
    of, _ = layer(("2:4", None), "int4", {}, dtype, None)
    assert of.weight.dtype == dtype and of.weight.device == CPU
    assert of.half().weight.dtype == torch.float16


@pytest.mark.parametrize("tile_bytes", [4 * 36 * 5, 2**22])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("quantise", "changes"), GRIDS, ids=str)
@pytest.mark.parametrize("asked", PATTERNS, ids=str)
def test_it_is_the_linear_of_the_decoded_weight(
    asked: tuple[str, str | None],
    quantise: str,
    changes: dict[str, Any],
    ordered: bool,
    tile_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed_layer, "TILE_BYTES", tile_bytes)
    order_I = torch.randperm(36, generator=torch.Generator().manual_seed(2)) if ordered else None
    of, weight_OI = layer(asked, quantise, changes, torch.float32, order_I)
    assert torch.equal(of.dense(), weight_OI)
    for shape in ((36,), (1, 36), (0, 36), (2, 3, 36), (40, 36)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(3), requires_grad=True)
        expected = nn.functional.linear(x, weight_OI, of.bias)
        torch.testing.assert_close(of(x), expected, rtol=1e-5, atol=1e-5)
        asked_for = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
        (grad,) = torch.autograd.grad(of(x), x, asked_for)
        torch.testing.assert_close(grad, asked_for @ weight_OI, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 16, 100])
def test_in_half_precision_the_error_is_that_of_rounding(dtype: torch.dtype, tokens: int) -> None:
    of, weight_OI = layer(("2:4", None), "int4", {}, torch.float32, None)
    x_TI = torch.randn(tokens, 36, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected_TO = nn.functional.linear(x_TI.double(), weight_OI.double(), of.bias.double())
    y_TO = of.to(dtype)(x_TI)
    assert y_TO.dtype == dtype
    assert (y_TO.double() - expected_TO).norm() <= 4 * torch.finfo(dtype).eps * expected_TO.norm()
    of.float()  # scales are bytes: no change of precision rounds them
    assert torch.equal(of.dense(), weight_OI)


@pytest.mark.parametrize(("quantise", "changes"), GRIDS, ids=str)
@pytest.mark.parametrize("asked", PATTERNS, ids=str)
def test_codes_are_all_that_is_in_memory(
    asked: tuple[str, str | None], quantise: str, changes: dict[str, Any], ways: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, _ = layer(asked, quantise, changes, torch.float32, None)
    held = {name: value for name, value in of.state_dict().items() if name != "bias"}
    assert sum(value.nbytes for value in held.values()) == of.quantised().nbytes
    assert {name for name, value in held.items() if value.is_floating_point()} <= {"salient_values"}
    there: list[int] = []
    with_zeros = quantised_layer.with_zeros
    monkeypatch.setattr(packed_layer, "TILE_BYTES", 4 * 36 * 5)
    monkeypatch.setattr(
        quantised_layer,
        "with_zeros",
        lambda of, rows, dtype: there.append(rows.stop - rows.start) or with_zeros(of, rows, dtype),
    )
    of(torch.ones(3, 36))
    assert there == ([5, 5, 5, 2] if ways == "plain" else [])  # the loops make no rows dense
    of(torch.ones(17, 36))
    assert max(there) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("quantise", "changes"), GRIDS, ids=str)
@pytest.mark.parametrize("asked", PATTERNS, ids=str)
def test_an_expert_is_what_was_packed(
    asked: tuple[str, str | None],
    quantise: str,
    changes: dict[str, Any],
    transposed: bool,
    ordered: bool,
    dtype: torch.dtype,
) -> None:
    pattern, grid = patterns.parse(*asked), option("quantise", quantise, group=12, **changes)
    stored = [rounded(pattern, 20, 36, grid, dtype, seed) for seed in range(3)]
    orders = [torch.randperm(36, generator=torch.Generator().manual_seed(e)) for e in range(3)]
    files = [quantised.to_file(weight_OI, pattern, grid, scales) for weight_OI, scales in stored]
    tensors = {ending: torch.stack([file[ending] for file in files]) for ending in files[0]}
    shape = (3, 36, 20) if transposed else (3, 20, 36)
    packed = PackedExperts(shape, pattern, transposed=transposed, ordered=ordered, dtype=dtype, device=CPU, grid=grid)
    packed.load_state_dict(tensors | ({"order": torch.stack(orders).int()} if ordered else {}))
    packed.settle()
    for expert, (weight_OI, _) in enumerate(stored):
        expected_OI = torch.empty_like(weight_OI)
        expected_OI[:, orders[expert] if ordered else slice(None)] = weight_OI
        assert torch.equal(packed[expert], expected_OI.T if transposed else expected_OI)
    assert packed.to(torch.float16)[0].dtype == torch.float16


def test_a_damaged_scale_of_an_expert_is_refused() -> None:
    pattern, grid = patterns.parse("2:4"), option("quantise", "int4", group=4)
    weight_OI, scales = rounded(pattern, 4, 8, grid, torch.float32)
    packed = PackedExperts(
        (1, 4, 8), pattern, transposed=False, ordered=False, dtype=torch.float32, device=CPU, grid=grid
    )
    tensors = {name: value[None] for name, value in quantised.to_file(weight_OI, pattern, grid, scales).items()}
    packed.load_state_dict(tensors | {"scales": torch.full_like(tensors["scales"], 255)})
    with pytest.raises(ValueError, match="a scale is not a positive number"):
        packed.settle()


@pytest.mark.parametrize(("quantise", "changes"), GRIDS, ids=str)
@pytest.mark.parametrize("asked", [*PATTERNS, ("8:16", "16:256")], ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
def test_kernels_of_a_gpu_give_what_others_give(
    asked: tuple[str, str | None], quantise: str, changes: dict[str, Any], tokens: int
) -> None:
    pytest.importorskip("triton")
    of, weight_OI = layer(asked, quantise, changes, torch.float32, None)
    x_TI = torch.randn(tokens, 36, generator=torch.Generator().manual_seed(2))
    expected_TO = x_TI @ weight_OI.T + of.bias
    of, x_TI = of.to(DEVICE), x_TI.to(DEVICE)
    y_TO = of.of_few(x_TI, of.bias)
    assert y_TO is not None
    torch.testing.assert_close(y_TO.cpu(), expected_TO, rtol=1e-5, atol=1e-5)
    assert of.of_few(torch.ones(17, 36, device=DEVICE), of.bias) is None
