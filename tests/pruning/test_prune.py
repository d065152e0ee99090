"""The block loop: what it writes, what it reports, what it refuses."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import esparse
from esparse.allocations import Allocation, Measured
from esparse.metrics import Metric
from esparse.metrics.entropy import EsparsePaper
from esparse.metrics.magnitude import Magnitude
from esparse.metrics.wanda import Wanda
from esparse.models import host_memory
from esparse.models.block import Block
from esparse.models.blocks import BlockModel
from esparse.patterns import NM, Grouping, Pattern, Unstructured
from esparse.prepare import Prepare
from esparse.pruning.prune import Method, Pruned, prune
from esparse.records import audit
from esparse.records.report import Stages
from esparse.recoveries import Chain, NoRecovery, Recovery
from esparse.recoveries.dsnot import Dsnot
from esparse.shuffles import Layers, NoShuffle, Shuffle
from esparse.updates import Layer, NoUpdate, Solution, Update
from esparse.updates.obs import Obs
from tests.models.families import tiny

TOKENS_SL = torch.randint(1, 96, (6, 20), generator=torch.Generator().manual_seed(5))


class Reversed(Shuffle):
    """Every channel changes its place; made for these tests."""

    def order(self, scores_OI: torch.Tensor, pattern: Pattern, layers: Layers | None = None) -> torch.Tensor:
        inputs = scores_OI.shape[1]
        return torch.arange(inputs).view(-1, 2).flip(0).T.flatten()


def run(
    family: str = "llama",
    metric: Metric | None = None,
    pattern: Pattern | None = None,
    shuffle: Shuffle | None = None,
    batch_tokens: int = 40,
    model: torch.nn.Module | None = None,
    skip: tuple[str, ...] = (),
    update: Update | None = None,
    recovery: Recovery | None = None,
) -> tuple[torch.nn.Module, Pruned]:
    model = model or tiny(family)
    blocks = BlockModel(model, device=torch.device("cpu"), batch_tokens=batch_tokens)
    method = Method(
        metric=metric or Wanda(),
        pattern=pattern or NM(2, 4),
        shuffle=shuffle or NoShuffle(),
        update=update or NoUpdate(),
        recovery=recovery or NoRecovery(),
    )
    return model, prune(blocks, TOKENS_SL, method, skip=skip, stages=Stages())


@pytest.mark.parametrize("batch_tokens", [1, 60, 10**6])
def test_masks_do_not_depend_on_micro_batches(batch_tokens: int) -> None:
    _, expected = run(batch_tokens=40)
    _, got = run(batch_tokens=batch_tokens)
    assert all(torch.equal(got.keeps[name], keep) for name, keep in expected.keeps.items())


class Forwards:
    """Counts how often the first block runs."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.count = 0
        model.model.layers[0].register_forward_hook(self.add)

    def add(self, *_: object) -> None:
        self.count += 1


ENTROPY = EsparsePaper(base="magnitude", alpha=1.0, bins=20, norm="sequence", range="channel", limit=1.0)


def overwriting(model: torch.nn.Module) -> None:
    """Lets every block write over what it gave to its first layer."""
    for block in model.model.layers:
        block.self_attn.register_forward_hook(lambda module, args, kwargs, out: spoil(kwargs), with_kwargs=True)

    def spoil(kwargs: dict[str, torch.Tensor]) -> None:
        kwargs["hidden_states"].zero_()


@pytest.mark.parametrize("case", ["room", "no room", "half the room", "overwritten"])
def test_the_second_look_takes_another_forward_pass_only_where_it_must(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masks are the same in any case. Three micro-batches are embedded, observed, perhaps again, and advanced."""
    monkeypatch.setattr(
        host_memory, "free_host_bytes", lambda: {"no room": 0, "half the room": 4 * 30_000}.get(case, 2**30)
    )
    model = tiny("llama")
    if case == "overwritten":
        overwriting(model)
    forwards = Forwards(model)
    _, got = run(metric=ENTROPY, model=model)
    # The first shows what a block returns, ten belong to models/forward_check.py.
    # With half the room the inputs of the first micro-batch are kept, and two are observed again.
    again = {"room": 0, "half the room": 2}.get(case, 3)
    assert forwards.count == 1 + 10 + 3 * 3 + again
    monkeypatch.setattr(host_memory, "free_host_bytes", lambda: 0)
    reference = tiny("llama")
    if case == "overwritten":
        overwriting(reference)
    _, expected = run(metric=ENTROPY, model=reference)
    assert all(torch.equal(got.keeps[name], keep) for name, keep in expected.keeps.items())


def test_relative_error_and_kept_score_by_their_formulas() -> None:
    dense = tiny("llama")
    inputs = {}
    attention = dense.model.layers[0].self_attn
    attention.q_proj.register_forward_pre_hook(lambda _, args: inputs.update(x=args[0].flatten(0, 1)))
    with torch.no_grad():
        dense(TOKENS_SL, use_cache=False)
    model, pruned = run()
    w, w_new = (m.model.layers[0].self_attn.q_proj.weight.detach().double() for m in (dense, model))
    x = inputs["x"].double()
    report = pruned.layers[0]
    assert report.name == "model.layers.0.self_attn.q_proj"
    assert report.error_tokens == TOKENS_SL.numel()  # few enough that the sample is all of them
    assert report.relative_error == pytest.approx(float((x @ (w - w_new).T).norm() / (x @ w.T).norm()), rel=1e-5)
    scores = w.abs() * x.norm(dim=0)
    keep = pruned.keeps["model.layers.0.self_attn.q_proj.weight"]
    assert report.kept_score == pytest.approx(float(scores[keep].sum() / scores.sum()), rel=1e-5)
    assert report.density == 0.5


@pytest.mark.parametrize("mask", ["start", "own"])
def test_layers_that_read_one_tensor_are_swept_together(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, swept = [], []
    for most in (2**27, 0):
        monkeypatch.setattr("esparse.pruning.prune.JOINED_WEIGHTS", most)
        swept.append(Swept(mask=mask, damp=0.01, block=8))
        found.append(run(update=swept[-1], shuffle=Reversed()))
    (joined, of_joined), (single, of_single) = found
    for name, keep_OI in of_single.keeps.items():
        assert torch.equal(of_joined.keeps[name], keep_OI), name
    for name, weight in single.state_dict().items():
        torch.testing.assert_close(joined.state_dict()[name], weight)
    blocks = len(single.model.layers)
    assert [len(each.rows) for each in swept] == [4 * blocks, 7 * blocks]
    assert sum(swept[0].rows) == sum(swept[1].rows)


@dataclass(kw_only=True, slots=True)
class Swept(Obs):
    """Remembers how many rows came at a time."""

    rows: list[int] = field(default_factory=list)

    def apply(self, layer: Layer, start: Solution) -> Solution:
        self.rows.append(len(start.weight_OI))
        return Obs.apply(self, layer, start)


def test_a_shuffle_changes_the_groups_and_not_the_columns() -> None:
    model, pruned = run(shuffle=Reversed())
    assert pruned.pattern_holds
    name = "model.layers.1.mlp.down_proj.weight"
    kept = model.state_dict()[name] != 0
    order = pruned.orders[name].long()
    assert torch.equal(kept, pruned.keeps[name])
    assert NM(2, 4).holds(kept[:, order])
    assert not NM(2, 4).holds(kept)
    shared = {tuple(pruned.orders[f"model.layers.0.self_attn.{p}_proj.weight"].tolist()) for p in "qkv"}
    assert len(shared) == 1


@given(seed=st.integers(0, 2**16), n=st.integers(1, 3))
def test_keep_in_order_is_the_mask_of_the_reordered_matrix_put_back(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores, order = torch.rand(3, 12, generator=generator), torch.randperm(12, generator=generator)
    keep = Grouping(NM(n, 4), order).keep_top(scores)
    for group in order.view(-1, 4).tolist():
        for row in range(3):
            kept = [channel for channel in group if keep[row, channel]]
            dropped = [channel for channel in group if not keep[row, channel]]
            assert len(kept) == n
            assert scores[row, kept].min() >= scores[row, dropped].max()


class Careless(Update):
    """Leaves -0.0 and worse where weights were pruned; made for these tests."""

    def apply(self, layer: Layer, start: Solution) -> Solution:
        return Solution(layer.dense_OI.abs() * torch.where(start.keep_OI, 1.0, -1e-30), start.keep_OI)


def test_pruned_weights_are_plus_zero_whatever_the_update_returns() -> None:
    model = tiny("llama")
    blocks = BlockModel(model, device=torch.device("cpu"), batch_tokens=40)
    method = Method(metric=Magnitude(), pattern=NM(2, 4), shuffle=NoShuffle(), update=Careless())
    pruned = prune(blocks, TOKENS_SL, method, stages=Stages())
    for name, keep in pruned.keeps.items():
        weight = model.state_dict()[name]
        assert torch.equal(weight != 0, keep)
        assert not torch.signbit(weight[~keep]).any()


@pytest.mark.parametrize(("pattern", "density"), [(NM(1, 4), 0.25), (NM(8, 16), 0.5), (Unstructured(75), 0.25)])
def test_density_is_measured(pattern: Pattern, density: float) -> None:
    _, pruned = run(pattern=pattern)
    assert pruned.kept / pruned.weights == density
    assert pruned.pattern_holds


def test_a_width_that_m_does_not_divide_ends_in_a_shorter_group() -> None:
    model, pruned = run(pattern=NM(2, 5))  # widths 32 and 48: tails of 2 and 3
    kept = model.state_dict()["model.layers.0.mlp.down_proj.weight"] != 0
    assert (kept[:, :45].unflatten(-1, (9, 5)).sum(-1) == 2).all()
    assert (kept[:, 45:].sum(-1) == 2).all()  # ceil(3 * 2 / 5)
    assert pruned.pattern_holds


def test_skipped_layers_stay_dense() -> None:
    model, pruned = run(skip=(r"layers\.1\.", "o_proj"))
    assert not any("layers.1." in name or "o_proj" in name for name in pruned.keeps)
    assert len(pruned.keeps) == 2 * 6
    assert (model.state_dict()["model.layers.1.mlp.up_proj.weight"] != 0).all()


@pytest.mark.parametrize(
    ("expression", "part"),
    [("mlp$", ".mlp."), (r"layers\.1$", "layers.1."), (r"o_proj\.weight$", "o_proj"), ("^model.layers.0", "layers.0.")],
)
def test_a_module_that_is_skipped_stays_dense_with_all_that_is_in_it(expression: str, part: str) -> None:
    """Also by a weight's whole name: what `check_skip` takes for a name skips something."""
    model, pruned = run(skip=(expression,))
    matrices = {name for name, _ in model.named_parameters() if name.endswith("proj.weight")}
    assert set(pruned.keeps) == {name for name in matrices if part not in name} != matrices


def test_skipping_everything_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"no layer would be pruned: model.skip=\[''\] leaves nothing"):
        run(skip=("",))


def test_layers_that_a_recovery_should_leave_alone_must_be_there() -> None:
    dsnot = Dsnot(cycles=1, threshold=0.1, power=1.0, skip=["mpl"])
    for recovery in (dsnot, Chain(first=NoRecovery(), second=dsnot)):
        with pytest.raises(ValueError, match=r"recovery.skip: 'mpl' is found in no name"):
            run(recovery=recovery)


def test_an_expression_that_means_no_weights_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="'act_fn' is found in no name inside the model's blocks"):
        run(skip=("act_fn",))


@pytest.fixture
def warnings_of_esparse(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("esparse")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_an_expert_without_tokens_is_scored_by_magnitude(warnings_of_esparse: pytest.LogCaptureFixture) -> None:
    model = tiny("mixtral")
    router = model.model.layers[0].mlp.gate
    with torch.no_grad():  # two experts win everywhere, so two see nothing
        router.weight[:] = 0.0
        router.weight[0] = 1e-3
    dense = {k: v.clone() for k, v in model.state_dict().items()}
    model, pruned = run(model=model)
    assert pruned.pattern_holds
    silent = [layer for layer in pruned.layers if layer.relative_error is None]
    assert silent
    assert all(layer.name.startswith("model.layers.0.mlp.experts.") for layer in silent)
    for layer in silent:
        assert f"{layer.name} saw no calibration token" in warnings_of_esparse.text
        entry, expert = layer.name.removesuffix("]").split("[")
        expected = NM(2, 4).keep_top(dense[entry][int(expert)].abs())
        assert torch.equal(pruned.keeps[entry][int(expert)], expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_weights_name_their_layer(bad: float) -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = bad
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj holds 1 weights that are NaN or Inf"):
        run(model=model, metric=Magnitude())


def test_activations_that_overflow_name_their_block() -> None:
    model = tiny("llama")
    model.model.layers[0].post_attention_layernorm.weight.data *= 1e30  # gate times up overflows float32
    with pytest.raises(ValueError, match=r"output of model\.layers\.0 holds NaN or Inf"):
        run(model=model, metric=Magnitude())


def test_audit_files_tell_what_was_done(tmp_path: Path) -> None:
    _, pruned = run("mixtral", shuffle=Reversed(), pattern=NM(2, 4))
    size = audit.write(tmp_path, pruned.keeps, pruned.orders, TOKENS_SL, {"dense": {"x": torch.ones(2)}, "pruned": {}})
    masks = audit.read_masks(tmp_path)
    assert all(torch.equal(masks[name], keep) for name, keep in pruned.keeps.items())
    name = "model.layers.0.mlp.experts.down_proj"
    assert masks[name].shape == (4, 32, 48)
    with safe_open(tmp_path / "masks.safetensors", framework="np") as file:
        packed = file.get_tensor(name)
        assert np.array_equal(np.unpackbits(packed, axis=-1)[..., :48].astype(bool), pruned.keeps[name].numpy())
        assert size == sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    with safe_open(tmp_path / "calibration_tokens.safetensors", framework="pt") as file:
        tokens = file.get_tensor("tokens")
    assert tokens.dtype == torch.int32
    assert torch.equal(tokens.long(), TOKENS_SL)
    with safe_open(tmp_path / "orders.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor(name).long(), pruned.orders[name])


@given(rows=st.integers(1, 5), columns=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_packed_masks_come_back(rows: int, columns: int, seed: int) -> None:
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert torch.equal(audit.unpack(audit.pack(keep), [rows, columns]), keep)
    assert torch.equal(audit._packed(keep), audit.pack(keep))  # as a GPU does it


class Counting(Prepare):
    """Counts the blocks that it is shown; made for these tests."""

    def __init__(self) -> None:
        self.blocks: list[int] = []

    def block(self, block: Block) -> None:
        self.blocks.append(block.index)


class Lightest(Allocation):
    """Gives the layers of the first block one weight of four; made for these tests."""

    def measures(self) -> bool:
        return True

    def measure(self, layer: Layer, score_OI: torch.Tensor) -> float:
        return float(layer.stats["norm"].norm_I("total").square().sum())

    def plan(self, layers: Sequence[Measured], pattern: Pattern) -> dict[str, Pattern]:
        self.seen = list(layers)
        return {layer.name: NM(1, 4) for layer in layers if layer.block == 0}


def test_an_allocation_measures_the_dense_model_and_blocks_are_prepared_once() -> None:
    prepare, allocation = Counting(), Lightest()
    model = tiny("llama")
    blocks = BlockModel(model, device=torch.device("cpu"), batch_tokens=40)
    method = Method(metric=Wanda(), pattern=NM(2, 4), shuffle=Reversed(), prepare=prepare, allocation=allocation)
    pruned = prune(blocks, TOKENS_SL, method, stages=Stages())
    assert prepare.blocks == [0, 1, 2]
    assert {layer.pattern for layer in pruned.layers if "layers.0." in layer.name} == {"1:4"}
    assert {layer.density for layer in pruned.layers if "layers.0." in layer.name} == {0.25}
    assert {layer.density for layer in pruned.layers if "layers.0." not in layer.name} == {0.5}
    assert pruned.pattern_holds
    groups = [layer.group for layer in allocation.seen]
    assert groups == [0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 5, 6, 6, 7, 8, 8, 8, 9, 10, 10, 11]  # q k v, o, gate up, down
    # What the last block was shown is what it gets in the dense model.
    inputs = {}
    dense = tiny("llama")
    dense.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.update(x=args[0]))
    with torch.no_grad():
        dense(TOKENS_SL, use_cache=False)
    assert allocation.seen[-1].value == pytest.approx(float(inputs["x"].square().sum()), rel=1e-4)


def test_the_metadata_bits_follow_the_pattern() -> None:
    _, pruned = run(pattern=NM(2, 4))
    assert pruned.metadata_bits == 0.75 * pruned.weights


class Vanishing(Update):
    """Survivors so small and negative that float16 rounds them to zero; made for these tests."""

    def apply(self, layer: Layer, start: Solution) -> Solution:
        return Solution(torch.where(start.keep_OI, -1e-12, 0.0), start.keep_OI)


def test_a_tiny_negative_survivor_does_not_become_minus_zero() -> None:
    model = tiny("llama").half()
    blocks = BlockModel(model, device=torch.device("cpu"), batch_tokens=40)
    method = Method(metric=Magnitude(), pattern=NM(2, 4), shuffle=NoShuffle(), update=Vanishing())
    pruned = prune(blocks, TOKENS_SL, method, stages=Stages())
    assert pruned.kept == 0
    for name in pruned.keeps:
        assert not torch.signbit(model.state_dict()[name]).any()


@pytest.mark.parametrize(
    ("update", "fills"), [(None, False), (Obs(mask="start", damp=0.01, block=128), True)], ids=["none", "obs"]
)
def test_zeros_that_were_there_are_counted_and_said(
    update: Update | None, fills: bool, warnings_of_esparse: pytest.LogCaptureFixture
) -> None:
    """A model of 70 % zeros: an update gives values to some of them, if they are kept."""
    model, _ = run(pattern=Unstructured(70))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    warnings_of_esparse.clear()
    _, pruned = run(model=model, metric=Wanda(), update=update)
    zeros = filled = weights = 0
    for layer in pruned.layers:
        was_zero_OI = before[f"{layer.name}.weight"] == 0
        is_zero_OI = model.state_dict()[f"{layer.name}.weight"] == 0
        assert layer.zeros_before == pytest.approx(float(was_zero_OI.float().mean()))
        assert layer.zeros_filled == pytest.approx(float((~is_zero_OI[was_zero_OI]).float().mean()))
        zeros, weights = zeros + int(was_zero_OI.sum()), weights + was_zero_OI.numel()
        filled += int((was_zero_OI & ~is_zero_OI).sum())
    assert (filled > 0) == fills
    (said,) = {r.getMessage() for r in warnings_of_esparse.records if "sparse already" in r.getMessage()}
    assert f"{100 * zeros / weights:.1f} % of the weights" in said
    assert f"{100 * filled / zeros:.1f} % of these are not zero now" in said


def test_a_dense_model_is_not_called_sparse(warnings_of_esparse: pytest.LogCaptureFixture) -> None:
    _, pruned = run()
    assert all(layer.zeros_before == layer.zeros_filled == 0 for layer in pruned.layers)
    assert not [r for r in warnings_of_esparse.records if "sparse already" in r.getMessage()]


@pytest.mark.parametrize("recovery", ["none", "distill"])
def test_zeros_that_a_training_fills_are_counted(recovery: str) -> None:
    model, generator = tiny("llama"), torch.Generator().manual_seed(0)
    zeros = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".layers." in name:
            zeros[name] = torch.rand(parameter.shape, generator=generator) < 0.6
            parameter.data[zeros[name]] = 0
    tokens_SL = torch.randint(1, 96, (4, 16), generator=generator)
    report = esparse.prune(model, None, "2:4", metric="wanda", calibration=tokens_SL, recovery=recovery)
    weights = dict(model.named_parameters())
    filled = {name: int((weights[name][zero] != 0).sum()) for name, zero in zeros.items()}
    assert (sum(filled.values()) > 0) == (recovery == "distill")
    for layer in report.layers:
        name = f"{layer.name}.weight"
        assert layer.zeros_filled == pytest.approx(filled[name] / int(zeros[name].sum()), abs=1e-9)
        assert layer.density == int(weights[name].count_nonzero()) / weights[name].numel()
