"""Quantisation in the block loop: what is stored lies on its grid, whatever the update, the order and the family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from esparse import option
from esparse.errors import Mistake
from esparse.metrics.wanda import Wanda
from esparse.models.blocks import BlockModel
from esparse.models.matrices import Matrix
from esparse.patterns import Grouping, parse
from esparse.pruning.method import Method
from esparse.pruning.prune import Pruned, prune
from esparse.pruning.rounding import scales_of
from esparse.quantise.grids import Grid
from esparse.records.report import Stages
from tests.models.families import tiny
from tests.workshop import furnished, launch, small_run

TOKENS_SL = torch.randint(1, 96, (6, 20), generator=torch.Generator().manual_seed(5))
UPDATES = ["none", "obs", "sparsegpt", "support", "alps", "joint"]


def run(
    model: torch.nn.Module,
    quantise: Grid | None,
    *,
    pattern: str = "2:4",
    outliers: str | None = None,
    update: str = "none",
    recovery: str = "none",
    shuffle: str = "esparse",
) -> Pruned:
    parts = {} if quantise is None else {"quantise": quantise}
    method = Method(
        metric=Wanda(),
        pattern=parse(pattern, outliers),
        shuffle=option("shuffle", shuffle),
        update=option("update", update),
        recovery=option("recovery", recovery),
        **parts,
    )
    method.check()
    blocks = BlockModel(model, device=torch.device("cpu"), batch_tokens=40)
    return prune(blocks, TOKENS_SL, method, stages=Stages())


def from_codes(grid: Grid, pruned: Pruned, matrix: Matrix, grouping: Grouping) -> torch.Tensor:
    """The matrix as its codes and scales give it, in the model's precision."""
    scales = scales_of(pruned.grids, matrix)
    assert scales is not None
    stored_OI = grouping.ordered(matrix.view()).float()
    columns = stored_OI.shape[1] // scales.scale_OG.shape[1]
    scale_OI = scales.scale_OG.repeat_interleave(columns, 1)
    zero_OI = None if scales.zero_OG is None else scales.zero_OG.repeat_interleave(columns, 1)
    values_OI = grid.values(grid.codes(stored_OI, scale_OI, zero_OI), scale_OI, zero_OI)
    if scales.whole_OI is not None:
        values_OI = torch.where(scales.whole_OI, stored_OI.half().float(), values_OI)
    return grouping.restored(values_OI.to(matrix.view().dtype))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("rounding", ["nearest", "sweep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_stored_value_lies_on_its_grid(update: str, rounding: str, dtype: torch.dtype) -> None:
    grid = option("quantise", "int4", group=16, rounding=rounding)
    pruned = run(tiny("llama").to(dtype), grid, update=update)
    assert pruned.pattern_holds
    for matrix, grouping in pruned.groupings:
        assert torch.equal(from_codes(grid, pruned, matrix, grouping), matrix.view()), matrix.name
        keep_OI = pruned.keeps[matrix.entry]
        assert grouping.holds(keep_OI) and not matrix.view()[~keep_OI].any()


@pytest.mark.parametrize(
    ("quantise", "changes"),
    [("int8", {}), ("int3", {"symmetric": False, "group": 16}), ("fp8", {"group": 8}), ("nf4", {"group": None})],
)
@pytest.mark.parametrize("pattern", ["dense", "2:4", "50%", "2:4+1:16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_every_grid_pattern_and_family(quantise: str, changes: dict[str, object], pattern: str, family: str) -> None:
    grid = option("quantise", quantise, **changes)
    base, _, outliers = pattern.partition("+")
    pruned = run(tiny(family), grid, pattern=base, outliers=outliers or None, update="sparsegpt")
    for matrix, grouping in pruned.groupings:
        assert torch.equal(from_codes(grid, pruned, matrix, grouping), matrix.view()), matrix.name
    assert any(name.startswith("whole/") for name in pruned.grids) == bool(outliers)


@pytest.mark.tries(2)
@pytest.mark.parametrize("update", UPDATES)
def test_the_sweep_is_ahead_of_rounding_each_value_by_itself(update: str) -> None:
    errors = {}
    for rounding in ("nearest", "sweep"):
        pruned = run(tiny("llama"), option("quantise", "int3", group=16, rounding=rounding), update=update)
        errors[rounding] = sum(layer.relative_error or 0.0 for layer in pruned.layers)
    assert errors["sweep"] < errors["nearest"]


def test_without_quantisation_nothing_is_remembered_and_a_fine_grid_changes_next_to_nothing() -> None:
    plain, fine = tiny("llama"), tiny("llama")
    assert not run(plain, None, update="alps").grids
    run(fine, option("quantise", "int8", rounding="nearest"), update="alps")
    first = [dict(model.model.layers[0].named_parameters()) for model in (plain, fine)]  # the others see its outputs
    for name, one in first[0].items():
        lost = (one - first[1][name]).abs().max()
        assert lost <= 0.005 * one.abs().max() and (lost > 0) == (one.ndim == 2), name


@pytest.mark.parametrize(("factor", "said"), [(1e-6, "small"), (1e7, "large"), (1.0, None)])
@pytest.mark.parametrize("rounding", ["nearest", "sweep"])
def test_scales_that_their_precision_cannot_hold_are_said(
    rounding: str, factor: float, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("llama")
    model.get_parameter("model.layers.0.self_attn.v_proj.weight").data *= factor
    run(model, option("quantise", "int4", group=8, scale="float16", rounding=rounding), update="sparsegpt")
    warned = [r.getMessage() for r in caplog.records if "scales" in r.getMessage()]
    assert len(warned) == (said is not None)
    for text in warned:
        assert text.startswith("model.layers.0.self_attn.v_proj: ") and f"too {said} for float16" in text
        assert text.endswith("use quantise.scale=bfloat16")


def test_a_recovery_of_layers_comes_before_the_rounding() -> None:
    grid = option("quantise", "int4", group=16)
    pruned = run(tiny("llama"), grid, update="sparsegpt", recovery="variance")
    for matrix, grouping in pruned.groupings:
        assert torch.equal(from_codes(grid, pruned, matrix, grouping), matrix.view()), matrix.name


def test_a_recovery_that_trains_would_leave_the_grid() -> None:
    with pytest.raises(Mistake, match="the recovery trains values that quantise has rounded"):
        run(tiny("llama"), option("quantise", "int8"), recovery="window")


def test_experts_of_a_width_that_the_group_does_not_divide() -> None:
    model = tiny("mixtral")
    with pytest.raises(Mistake, match=r"quantise.group=32 does not divide the 48 inputs of .*experts.down_proj\[0\]"):
        run(model, option("quantise", "int4", group=32))


@pytest.mark.slow
def test_a_run_leaves_its_scales_and_says_its_mistakes_before_any_work(tmp_path: Path) -> None:
    workshop = furnished(tmp_path, blocks=2)
    asked = [*small_run(workshop, tmp_path / "out"), "shuffle=none"]
    done = launch(*asked, "quantise=int4")
    assert done.returncode == 1 and "quantise.group=64 does not divide the 32 inputs" in done.stderr, done.stderr
    assert not list(tmp_path.glob("out/*/result.json"))
    done = launch(*asked, "outliers=64:256", "quantise=int4", "quantise.group=32")
    assert done.returncode == 2 and "take at most 32:256" in done.stderr, done.stderr
    done = launch(*asked, "quantise=int4", "quantise.group=32", "quantise.symmetric=false")
    (path,) = tmp_path.glob("out/*/result.json")
    memory = json.loads(path.read_text())["memory"]
    assert memory["bits"] == {"values": 2, "index": 0.75, "zero_points": 0.125} | {
        "scales": 0.5, "outliers": 0, "orders": 0, "padding": pytest.approx(0.05, abs=0.08)
    }  # fmt: skip
    scales = load_file(path.with_name("scales.safetensors"))
    assert scales["scale/model.layers.1.mlp.down_proj.weight"].shape == (32, 2)
    assert len(scales) == 2 * len(load_file(path.with_name("masks.safetensors")))
    assert memory["bits_per_weight"] == sum(memory["bits"].values())
    done = launch(*asked, "quantise=int9")
    assert done.returncode == 2 and "int9" in done.stderr
