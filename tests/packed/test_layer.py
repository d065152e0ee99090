"""The packed layer computes what the masked dense layer does, tile by tile."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esparse import patterns
from esparse.kernels.gemv import matvec
from esparse.packed import layer
from esparse.packed.layer import PackedLinear
from esparse.packed.matrix import pack, to_file
from tests.packed.test_matrix import pruned


@pytest.fixture(autouse=True, params=["loops", "plain"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything with the compiled loops and without them, as where numba is not installed."""
    if request.param == "plain":
        monkeypatch.setattr(layer, "loops", lambda dtype: None)
    else:
        pytest.importorskip("numba")


@pytest.mark.parametrize("asked", [("2:4", None), ("8:16", None), ("2:4", "4:16")], ids=str)
@pytest.mark.parametrize("tile_bytes", [1, 4 * 36 * 5, 2**22])
def test_it_is_the_masked_linear(
    asked: tuple[str, str | None], tile_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer, "TILE_BYTES", tile_bytes)
    pattern = patterns.parse(*asked)
    dense = nn.Linear(36, 17)
    dense.weight.data = pruned(pattern, 17, 36, torch.float32)
    packed = PackedLinear(36, 17, pattern, bias=True, dtype=torch.float32, device=torch.device("cpu"))
    packed.load_state_dict({**to_file(pack(dense.weight.data, pattern)), "bias": dense.bias.data})
    packed.settle()
    x = torch.randn(2, 3, 36, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(packed(x), dense(x))
        torch.testing.assert_close(packed(x[0, 0]), dense(x[0, 0]))
    assert set(packed.state_dict()) - {"salient_values", "salient_places"} == {"values", "bits", "bias"}


@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_under_autocast_it_returns_a_linears_dtype_for_any_tokens(given: torch.dtype, tokens: int) -> None:
    """The gradient is taken outside, as one does: it multiplied bfloat16 with float32."""
    pattern = patterns.parse("2:4")
    dense = nn.Linear(36, 17)
    dense.weight.data = pruned(pattern, 17, 36, torch.float32)
    packed = PackedLinear(36, 17, pattern, bias=True, dtype=torch.float32, device=torch.device("cpu"))
    packed.load_state_dict({**to_file(pack(dense.weight.data, pattern)), "bias": dense.bias.data})
    packed.settle()
    x = torch.randn(2, tokens, 36, generator=torch.Generator().manual_seed(3)).to(given).requires_grad_()
    found = []
    for of in (dense, packed):
        with torch.autocast("cpu", torch.bfloat16):
            y = of(x)
        (gradient,) = torch.autograd.grad(y.float().sum(), x)
        found.append((y, gradient))
    (y, gradient), (y_packed, gradient_packed) = found
    assert (y_packed.dtype, gradient_packed.dtype) == (y.dtype, gradient.dtype) == (torch.bfloat16, given)
    for one, other in ((y_packed, y), (gradient_packed, gradient)):
        assert (one - other).norm() / other.norm() < 1e-2


@pytest.mark.parametrize("autocast", [False, True])
def test_torch_compile_leaves_the_product_alone(autocast: bool) -> None:
    """It looked into numba's dispatcher, and died."""
    pattern = patterns.parse("2:4")
    packed = PackedLinear(36, 17, pattern, bias=True, dtype=torch.float32, device=torch.device("cpu"))
    weight_OI = pruned(pattern, 17, 36, torch.float32)
    packed.load_state_dict({**to_file(pack(weight_OI, pattern)), "bias": torch.arange(17.0)})
    packed.settle()
    around = nn.Sequential(nn.ReLU(), packed, nn.ReLU())
    torch._dynamo.reset()
    compiled = torch.compile(around, backend="eager")
    for tokens in (1, 3, 100):
        x = torch.randn(tokens, 36, generator=torch.Generator().manual_seed(3))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(compiled(x), around(x))


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("asked", ["2:4", "8:16", "1:4"])
def test_the_kernels_read_the_same_form(asked: str, tokens: int) -> None:
    pattern = patterns.parse(asked)
    packed = PackedLinear(36, 17, pattern, bias=True, dtype=torch.float32, device=torch.device("cpu"))
    weight_OI = pruned(pattern, 17, 36, torch.float32)  # 36 columns: the last group of 8:16 is shorter
    packed.load_state_dict({**to_file(pack(weight_OI, pattern)), "bias": torch.arange(17.0)})
    packed.settle()
    x_TI = torch.randn(tokens, 36, generator=torch.Generator().manual_seed(3))
    assert packed.for_kernels
    torch.testing.assert_close(packed.by_kernels(x_TI, packed.bias), packed(x_TI))
    y_TO = matvec(packed.values, packed.bits, x_TI[:16], n=pattern.n, m=pattern.m) + packed.bias
    torch.testing.assert_close(y_TO, packed(x_TI[:16]), rtol=1e-5, atol=1e-5)


def test_where_groups_do_not_stand_side_by_side_no_kernel_is_asked() -> None:
    how = {"bias": False, "dtype": torch.float32, "device": torch.device("cpu")}
    assert not PackedLinear(32, 8, patterns.parse("2:4"), ordered=True, **how).for_kernels
    assert not PackedLinear(32, 8, patterns.parse("2:4", "4:16"), **how).for_kernels


def test_the_whole_weight_is_never_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "TILE_BYTES", 4 * 64 * 8)
    monkeypatch.setattr(layer, "LOOP_TOKENS", {})
    pattern = patterns.parse("2:4")
    packed = PackedLinear(64, 100, pattern, bias=False, dtype=torch.float32, device=torch.device("cpu"))
    packed.load_state_dict(to_file(pack(pruned(pattern, 100, 64, torch.float32), pattern)))
    packed.settle()
    there: list[int] = []
    with_zeros = layer.with_zeros
    monkeypatch.setattr(
        layer, "with_zeros", lambda of, rows: there.append(rows.stop - rows.start) or with_zeros(of, rows)
    )
    x_TI = torch.randn(1, 64, requires_grad=True)
    packed(x_TI).sum().backward()
    assert sum(there) == 2 * 100 and max(there) == 8  # forward and backward


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("asked", [("2:4", None), ("2:4", "4:16")], ids=str)
def test_gradients(asked: tuple[str, str | None], tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "TILE_BYTES", 4 * 36 * 5)
    pattern = patterns.parse(*asked)
    packed = PackedLinear(36, 17, pattern, bias=True, dtype=torch.float32, device=torch.device("cpu"))
    weight_OI = pruned(pattern, 17, 36, torch.float32)
    packed.load_state_dict({**to_file(pack(weight_OI, pattern)), "bias": torch.arange(17.0)})
    packed.settle()
    x_TI = torch.randn(tokens, 36, generator=torch.Generator().manual_seed(3), requires_grad=True)
    asked_TO = torch.randn(tokens, 17, generator=torch.Generator().manual_seed(4))
    grad_TI, grad_O = torch.autograd.grad(packed(x_TI), (x_TI, packed.bias), asked_TO)
    torch.testing.assert_close(grad_TI, asked_TO @ weight_OI, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_O, asked_TO.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_what_it_returns_is_a_linears(tokens: int) -> None:
    """Contiguous, and to be changed in place: Falcon adds to it, DeepSeek makes complex numbers of it."""
    packed = PackedLinear(36, 16, patterns.parse("2:4"), bias=True, dtype=torch.float32, device=torch.device("cpu"))
    weight_OI = pruned(patterns.parse("2:4"), 16, 36, torch.float32)
    packed.load_state_dict({**to_file(pack(weight_OI, patterns.parse("2:4"))), "bias": torch.zeros(16)})
    packed.settle()
    y = packed(torch.randn(1, tokens, 36, requires_grad=True))
    assert y.is_contiguous()
    torch.view_as_complex(y.unflatten(-1, (-1, 2)))
    y += 1
    y.sum().backward()
