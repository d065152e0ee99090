"""Packed experts: each gets its zeros back when it is asked for, and no others do."""

from __future__ import annotations

import pytest
import torch

from esparse import patterns
from esparse.packed.experts import PackedExperts
from esparse.packed.matrix import pack, to_file
from tests.packed.test_matrix import pruned

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("asked", "ordered"),
    [
        (("2:4", None), False),
        (("2:4", None), True),
        (("3:5", None), False),
        (("3:5", None), True),
        (("8:16", "2:64"), False),  # in another order it is refused by the export
    ],
)
def test_an_expert_is_what_was_packed(
    asked: tuple[str, str | None], transposed: bool, ordered: bool, dtype: torch.dtype
) -> None:
    pattern = patterns.parse(*asked)
    experts, outputs, inputs = 3, 20, 36
    orders = [torch.randperm(inputs, generator=torch.Generator().manual_seed(e)) for e in range(experts)]
    stored = [pruned(pattern, outputs, inputs, dtype, seed=e) for e in range(experts)]
    shape = (experts, inputs, outputs) if transposed else (experts, outputs, inputs)
    packed = PackedExperts(shape, pattern, transposed=transposed, ordered=ordered, dtype=dtype, device=CPU)
    files = [to_file(pack(weight_OI, pattern)) for weight_OI in stored]
    tensors = {ending: torch.stack([file[ending] for file in files]) for ending in files[0]}
    packed.load_state_dict(tensors | ({"order": torch.stack(orders).int()} if ordered else {}))
    packed.settle()
    assert len(packed) == experts
    for expert in range(experts):
        expected_OI = torch.empty_like(stored[expert])
        expected_OI[:, orders[expert] if ordered else slice(None)] = stored[expert]
        for at in (expert, torch.tensor(expert)):
            assert torch.equal(packed[at], expected_OI.T if transposed else expected_OI)
    in_memory = sum(buffer.nbytes for buffer in packed.buffers())
    assert in_memory == sum(pack(weight_OI, pattern).nbytes for weight_OI in stored)


def test_a_damaged_index_is_refused() -> None:
    pattern = patterns.parse("2:4")
    packed = PackedExperts((1, 4, 8), pattern, transposed=False, ordered=False, dtype=torch.float32, device=CPU)
    tensors = to_file(pack(pruned(pattern, 4, 8, torch.float32), pattern))
    packed.load_state_dict({"values": tensors["values"][None], "index": torch.full_like(tensors["index"], 255)[None]})
    with pytest.raises(ValueError, match="damaged"):
        packed.settle()
