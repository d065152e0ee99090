"""The whole model, dense and packed by one path, on the CPU with the wall clock."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from esparse.bench import Subject
from esparse.bench.model import ModelBench, switched
from esparse.bench.timing import WallClock
from esparse.kernels import linear as packed
from esparse.models import context
from esparse.patterns import NM, Grouping
from tests.bench.test_gemm import CPU, NoAlgorithms
from tests.models.families import tiny


def bench(**settings: Any) -> ModelBench:
    usual: dict[str, Any] = {"prompt": 6, "batches": [1, 3], "warm_up": 1, "repeats": 2, "cache": "x"}
    return ModelBench(**usual | {"least_ms": 0.1, "graph_below_ms": 1.0} | settings)


def subject(family: str = "llama", *, shuffled: bool = True) -> Subject:
    """A model whose linear layers are pruned, each input group in an order of its own."""
    model, nm = tiny(family), NM(2, 4)
    keeps, orders = {}, {}
    seeded = torch.Generator().manual_seed(0)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "layers." in name:
            inputs = layer.in_features
            # q, k and v, and gate and up, read the same input
            group = (name.rpartition(".")[0], name.endswith(("o_proj", "out_proj", "down_proj", "fc2")), inputs)
            order_I = orders.setdefault(str(group), torch.randperm(inputs, generator=seeded)) if shuffled else None
            scores_OI = torch.rand(layer.weight.shape, generator=seeded)
            keep_OI = Grouping(nm, order_I).keep_top(scores_OI)
            layer.weight.data = torch.where(keep_OI, layer.weight.data, 0.0)
            keeps[f"{name}.weight"] = keep_OI
            if order_I is not None:
                orders[f"{name}.weight"] = order_I
    return Subject(model, [], keeps, orders, nm, CPU)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_prefill_and_decode_are_timed_and_right(family: str, shuffled: bool) -> None:
    of = subject(family, shuffled=shuffled)
    before = {name: weight.clone() for name, weight in of.model.state_dict().items()}
    measured = bench().measure(of, WallClock(), NoAlgorithms())
    got = [(row["phase"], row["sequences"], row["tokens"]) for row in measured.rows]
    assert got == [("prefill", 1, 6), ("decode", 1, 1), ("prefill", 3, 18), ("decode", 3, 3)]
    for row in measured.rows:
        assert row["relative_difference"] < 1e-5
        assert row["speedup"] == row["dense_ms"] / row["sparse_ms"]
        assert row["packed_layers"] == len(of.keeps)
        assert row["kernel"] == "plain"
        # an order for each input group: attention's input, its output, the MLP's input, its inner width
        assert row["gathers"] == (4 * of.model.config.num_hidden_layers if shuffled else 0)
    weights = sum(keep.numel() for keep in of.keeps.values())
    assert measured.limits["packed_bytes"] == weights // 2 * 4 + weights // 8
    assert all(torch.equal(weight, before[name]) for name, weight in of.model.state_dict().items())
    assert "forward" not in of.model.get_submodule(next(iter(of.keeps)).removesuffix(".weight")).__dict__


def test_packed_layers_that_are_wrong_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = packed.packed_linear
    monkeypatch.setattr(packed, "packed_linear", lambda *args, **kwargs: 1.5 * right(*args, **kwargs))
    with pytest.raises(ValueError, match="the packed layers do not compute what the dense ones do"):
        bench().measure(subject(), WallClock(), NoAlgorithms())


def test_the_switch_is_gone_where_something_fails() -> None:
    of = subject()
    with pytest.raises(KeyError), switched(of, NoAlgorithms(), [8]):
        raise KeyError
    assert all("forward" not in module.__dict__ for module in of.model.modules())


def test_a_closed_context_is_left_as_it_is() -> None:
    model = tiny("llama")
    tokens_BL = torch.randint(1, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole_BLV = context.prefill(model, tokens_BL)
        behind = context.read(model, tokens_BL[:, :-1])
        for _ in range(3):
            logits_B1V = context.step(model, tokens_BL[:, -1:], behind)
            torch.testing.assert_close(logits_B1V[:, 0], whole_BLV[:, -1], rtol=1e-4, atol=1e-5)


def test_weights_that_are_not_there_are_refused_before_pruning() -> None:
    with torch.device("meta"):
        layer = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"use model\.store=memory"):
        bench().ready(layer)
    bench().ready(tiny("llama"))


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"bench\.prompt and bench\.batches must be positive"):
        bench(batches=[])
