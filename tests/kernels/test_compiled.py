"""The compiled loops against the dense matrix, in double precision, with vectors and bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from esparse import patterns
from esparse.packed import layer
from esparse.packed.layer import outliers
from esparse.packed.matrix import PackedMatrix, pack, to_file
from tests.packed.test_matrix import DTYPES, pruned

pytest.importorskip("numba")

from esparse.kernels import compiled

PATTERNS = [("2:4", None), ("4:8", None), ("8:16", None), ("1:4", None), ("3:5", None), ("5:7", None), ("32:64", None)]
PATTERNS += [("2:4", "4:16"), ("8:16", "16:256"), ("2:4", "30:1024")]


@pytest.fixture(autouse=True, params=[True, False], ids=["vectors", "bits"])
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways everywhere: LLVM makes something of the first one on every CPU."""
    monkeypatch.setattr(compiled, "vectors_for", lambda dtype: request.param)


def packed(asked: tuple[str, str | None], outputs: int, inputs: int, dtype: torch.dtype) -> PackedMatrix:
    if not compiled.takes(dtype):
        pytest.skip(f"numba may not use what this CPU has for {dtype}")
    pattern = patterns.parse(*asked)
    return pack(pruned(pattern, outputs, inputs, dtype), pattern)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("asked", PATTERNS, ids=str)
@pytest.mark.parametrize("inputs", [2048 + 36, 33, 5])  # pieces of a row, a piece of words, a piece of a word
def test_products(asked: tuple[str, str | None], inputs: int, dtype: torch.dtype) -> None:
    of = packed(asked, 7, inputs, dtype)
    for tokens in (1, 2, 64):
        x_TI = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
        y_TO = compiled.product(of.values_OK, of.bits_OB, x_TI, outliers(of))
        expected_TO = x_TI.double() @ of.dense().double().T
        assert y_TO.dtype == torch.float32 and y_TO.shape == (tokens, 7)
        assert (y_TO - expected_TO).norm() <= 1e-6 * expected_TO.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("asked", PATTERNS, ids=str)
@pytest.mark.parametrize("inputs", [2048 + 36, 33, 5])
def test_rows_with_their_zeros(asked: tuple[str, str | None], inputs: int, dtype: torch.dtype) -> None:
    of = packed(asked, 7, inputs, dtype)
    for rows in (slice(0, 7), slice(2, 5)):
        weight_OI = compiled.dense(of.values_OK, of.bits_OB, outliers(of), inputs, rows)
        assert weight_OI.dtype == dtype
        assert torch.equal(weight_OI, of.dense(rows.start, rows.stop))


def test_rows_of_unlike_groups() -> None:
    """Columns that got back their own order: a word of 32 has any number of survivors."""
    of = packed(("2:4", None), 9, 100, torch.bfloat16)
    of = of.restored(torch.randperm(100, generator=torch.Generator().manual_seed(4)))
    assert torch.equal(compiled.dense(of.values_OK, of.bits_OB, None, 100, slice(0, 9)), of.dense())
    x_TI = torch.randn(3, 100, generator=torch.Generator().manual_seed(1)).bfloat16()
    y_TO = compiled.product(of.values_OK, of.bits_OB, x_TI)
    torch.testing.assert_close(y_TO.double(), x_TI.double() @ of.dense().double().T, rtol=1e-5, atol=1e-5)


def test_several_threads_share_the_rows(monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]) -> None:
    monkeypatch.setattr(compiled, "ALONE", 0)
    threads(3)
    of = packed(("4:8", None), 7, 64, torch.float32)
    x_TI = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    y_TO = compiled.product(of.values_OK, of.bits_OB, x_TI)
    torch.testing.assert_close(y_TO, x_TI @ of.dense().T, rtol=1e-5, atol=1e-5)
    assert torch.equal(compiled.dense(of.values_OK, of.bits_OB, None, 64, slice(0, 7)), of.dense())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_odd_values_are_what_they_were(dtype: torch.dtype) -> None:
    if not compiled.takes(dtype):
        pytest.skip(f"numba may not use what this CPU has for {dtype}")
    info = torch.finfo(dtype)
    values = [info.smallest_normal / 4, info.max, -info.tiny, -info.max, info.eps, -info.smallest_normal / 2]
    row = torch.tensor([[value for pair in zip(values, [0.0] * 6, strict=True) for value in pair]]).to(dtype)
    of = pack(row, patterns.parse("2:4"))
    found = compiled.product(of.values_OK, of.bits_OB, torch.eye(12).to(dtype))
    assert torch.equal(found[:, 0], row[0].float())
    assert torch.equal(compiled.dense(of.values_OK, of.bits_OB, None, 12, slice(0, 1)), row)


def test_a_layer_takes_them_for_a_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = patterns.parse("2:4")
    of = layer.PackedLinear(40, 11, pattern, bias=False, dtype=torch.float32, device=torch.device("cpu"))
    of.load_state_dict(to_file(pack(pruned(pattern, 11, 40, torch.float32), pattern)))
    of.settle()
    called: list[int] = []
    product = compiled.product
    monkeypatch.setattr(compiled, "product", lambda *args: called.append(len(args[2])) or product(*args))
    for tokens in (1, 16, 17):
        of(torch.ones(tokens, 40))
    of.bfloat16()
    for tokens in (64, 65):
        of(torch.ones(tokens, 40).bfloat16())
    assert called == [1, 16, 64]


def test_numba_may_use_less_than_the_cpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NUMBA_CPU_NAME=generic says: LLVM would end the process at a conversion that it may not use."""
    for features, half in (("", False), ("+avx2,-f16c", False), ("+avx2,+f16c", True)):
        monkeypatch.setattr(compiled.config, "CPU_FEATURES", features)
        monkeypatch.setattr(compiled.binding, "get_process_triple", lambda: "x86_64-linux")
        compiled.takes.cache_clear()
        assert compiled.takes(torch.float16) == half
        assert compiled.takes(torch.bfloat16)
    monkeypatch.undo()
    compiled.takes.cache_clear()
