"""A second copy for many tokens, with a stand-in for cuSPARSELt, which only GPUs have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from esparse import option, patterns
from esparse.kernels import linear as kernels
from esparse.packed import prefill
from esparse.packed.layer import PackedLinear
from esparse.packed.matrix import pack, to_file
from esparse.packed.prefill import second_copy_bytes, use_sparse_cores
from esparse.packed.quantised_layer import QuantisedLinear
from tests.packed.test_matrix import pruned

CPU = torch.device("cpu")


class Library:
    """What is asked of cuSPARSELt, done with the dense matrix; a blob has the values in front, where it `shares`."""

    def __init__(self, *, shares: bool) -> None:
        self.shares, self.compressed, self.products = shares, 0, 0
        self._dense: dict[int, Tensor] = {}

    def compress(self, dense_RI: Tensor) -> Tensor:
        self.compressed += 1
        values_RK = dense_RI[dense_RI != 0].view(len(dense_RI), -1)
        places = values_RK.new_zeros(len(dense_RI), values_RK.shape[1] // 8)  # two bits for each of 16
        front = values_RK if self.shares else values_RK.flip(1)
        blob = torch.cat([front.reshape(-1), places.reshape(-1)]).view(len(dense_RI), -1)
        self._dense[blob.data_ptr()] = dense_RI
        return blob

    def sparse_mm(self, blob: Tensor, x_TI: Tensor, bias_R: Tensor | None, *_: object) -> Tensor:
        self.products += 1
        return nn.functional.linear(x_TI, self._dense[blob.data_ptr()], bias_R)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Library]:
    def install(*, shares: bool = True) -> Library:
        stand_in = Library(shares=shares)
        monkeypatch.setattr(kernels, "compress", stand_in.compress)
        monkeypatch.setattr(kernels, "sparse_mm", stand_in.sparse_mm)
        monkeypatch.setattr(prefill, "_why_not_on", lambda device: None)
        return stand_in

    return install


def layer(asked: tuple[str, str | None] = ("2:4", None), shape: tuple[int, int] = (32, 64)) -> PackedLinear:
    pattern = patterns.parse(*asked)
    packed = PackedLinear(shape[1], shape[0], pattern, bias=True, dtype=torch.bfloat16, device=CPU)
    weight_OI = pruned(pattern, *shape, torch.bfloat16)
    bias_O = torch.arange(shape[0]).bfloat16()
    packed.load_state_dict({**to_file(pack(weight_OI, pattern)), "bias": bias_O})
    packed.settle()
    return packed


def product(packed: PackedLinear, tokens: int) -> tuple[Tensor, Tensor]:
    """What the layer's kernels return, and what they should."""
    x_TI = torch.randn(tokens, packed.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        expected_TO = x_TI.double() @ packed.packed().dense().double().T + packed.bias
        return packed.by_kernels(x_TI, packed.bias).double(), expected_TO


@pytest.mark.parametrize("shares", [True, False])
def test_many_tokens_take_the_second_copy_and_few_do_not(shares: bool, library: Callable[..., Library]) -> None:
    cores, model = library(shares=shares), nn.Sequential(layer(), layer(("4:8", None)))
    packed = model[0]
    product(packed, 65)
    assert cores.compressed == 0 and second_copy_bytes(model) == 0  # it is off until it is asked for
    left = use_sparse_cores(model)
    assert set(left) == {"1"} and "2:4 only, not 4:8" in left["1"]
    product(packed, 64)
    assert cores.compressed == 0  # it is made when it is needed
    for tokens in (65, 80, 1):
        y_TO, expected_TO = product(packed, tokens)
        torch.testing.assert_close(y_TO, expected_TO, rtol=2e-2, atol=2e-2)
    assert (cores.compressed, cores.products) == (1, 2)
    dense_bytes = 32 * 64 * 2
    assert second_copy_bytes(model) == (dense_bytes // 16 if shares else dense_bytes * 9 // 16)


def test_switched_off_the_copy_is_gone_and_the_values_stay(library: Callable[..., Library]) -> None:
    cores, packed = library(), layer()
    before_OI = packed.packed().dense()
    use_sparse_cores(packed)
    product(packed, 70)
    assert packed.values.untyped_storage().nbytes() > packed.values.nbytes  # they stand in the copy
    use_sparse_cores(packed, on=False)
    assert packed.values.untyped_storage().nbytes() == packed.values.nbytes
    assert second_copy_bytes(packed) == 0 and torch.equal(packed.packed().dense(), before_OI)
    product(packed, 70)
    assert cores.products == 1


def test_a_layer_that_is_moved_makes_its_copy_anew(library: Callable[..., Library]) -> None:
    cores, packed = library(), layer()
    use_sparse_cores(packed)
    product(packed, 70)
    packed.half()
    assert second_copy_bytes(packed) == 0 and packed.values.dtype == torch.float16
    packed.bfloat16()
    y_TO, expected_TO = product(packed, 70)
    torch.testing.assert_close(y_TO, expected_TO, rtol=2e-2, atol=2e-2)
    assert cores.compressed == 2


def test_where_no_layer_can_the_reason_is_given() -> None:
    with pytest.raises(ValueError, match="it is on cpu: move the model to a GPU first"):
        use_sparse_cores(nn.Sequential(layer()))
    with pytest.raises(ValueError, match="2:4 only, not 4:8"):
        use_sparse_cores(layer(("4:8", None)))
    with pytest.raises(ValueError, match="without outliers"):
        use_sparse_cores(layer(("2:4", "4:16")))
    with pytest.raises(ValueError, match="multiples of 16, got 24 x 64"):
        use_sparse_cores(layer(shape=(24, 64)))
    with pytest.raises(ValueError, match="no packed layer"):
        use_sparse_cores(nn.Linear(4, 4))


def test_codes_are_no_matter_of_sparse_cores(library: Callable[..., Library]) -> None:
    library()
    grid = option("quantise", "int8", group=None)
    coded = QuantisedLinear(64, 32, patterns.parse("2:4"), grid, bias=False, dtype=torch.bfloat16, device=CPU)
    assert "codes of 8 bits" in use_sparse_cores(nn.ModuleList([layer(), coded]))["1"]
