"""Pruning's parts on a GPU beside what they do on a CPU; what the kernels compute is tested in tests/kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from esparse.linalg import finite, inverse_factor, multiplies_into_float32
from esparse.metrics.entropy import EsparsePaper
from esparse.models.blocks import BlockModel
from esparse.models.offload import HiddenStateStore
from esparse.models.store import MemoryStore
from esparse.patterns import NM
from esparse.pruning.method import Method
from esparse.pruning.prune import prune
from esparse.records import audit
from esparse.records.report import Stages
from esparse.shuffles.lbs import Esparse
from esparse.shuffles.lsa import kept_score
from esparse.shuffles.score_swaps import swap_in_blocks
from esparse.stats import ColumnEntropy, ColumnNorm, Gram
from esparse.updates.obs import Obs, sweep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
HALF = [torch.bfloat16, torch.float16]


def activations(tokens: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Channels of different sizes, and a few values that are much greater than the others."""
    seeded = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(tokens, inputs, generator=seeded) * (0.7 * torch.randn(inputs, generator=seeded)).exp()
    x_TI[::97] *= 8
    return x_TI.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("inputs", [96, 2500])  # one panel, two
def test_gram(inputs: int, dtype: torch.dtype) -> None:
    parts = [activations(3000, inputs, dtype, seed) for seed in range(2)]
    gram = Gram(inputs=inputs, sequences=1, device=GPU)
    for x_TI in parts:
        assert multiplies_into_float32(x_TI.cuda()) == (dtype in HALF)
        gram.add(x_TI.cuda(), 0)
    exact_II = sum(x_TI.double().T @ x_TI.double() for x_TI in parts)
    assert gram.gram_II.dtype == torch.float32
    off = (gram.gram_II.cpu().double() - exact_II).norm() / exact_II.norm()
    # Matrix units cut off what their float32 sums cannot hold, where other sums are rounded.
    assert off < (2e-5 if dtype in HALF else 2e-6)
    assert torch.equal(gram.gram_II, gram.gram_II.T)


@pytest.mark.parametrize("bounds", ["channel", "layer", "fixed"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_entropy_and_norm(dtype: torch.dtype, bounds: str) -> None:
    parts = [activations(tokens, 1000, dtype, tokens) for tokens in (5000, 700)]

    def of(device: torch.device) -> tuple[ColumnEntropy, ColumnNorm]:
        size = {"inputs": 1000, "sequences": 1, "device": device}
        entropy, norm = ColumnEntropy(bins=100, range=bounds, limit=4.0, **size), ColumnNorm(**size)
        for pass_index in range(entropy.passes):
            entropy.add_all([x_TI.to(device) for x_TI in parts], pass_index)
        norm.add_all([x_TI.to(device) for x_TI in parts], 0)
        return entropy, norm

    (entropy, norm), (on_cpu, norm_on_cpu) = of(GPU), of(CPU)
    assert torch.equal(entropy.low_I.cpu(), on_cpu.low_I) and torch.equal(entropy.high_I.cpu(), on_cpu.high_I)
    assert torch.equal(entropy.counts_IK.cpu(), on_cpu.counts_IK)
    torch.testing.assert_close(entropy.entropy_I().cpu(), on_cpu.entropy_I())
    torch.testing.assert_close(norm.norm_I("sequence").cpu(), norm_on_cpu.norm_I("sequence"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(8, 16)], ids=str)
def test_sweep(pattern: NM, own: bool) -> None:
    inputs = 700
    gram = Gram(inputs=inputs, sequences=1, device=CPU)
    gram.add(activations(2000, inputs, torch.float32), 0)
    dense_OI = torch.randn(500, inputs, generator=torch.Generator().manual_seed(1))
    fixed_OI = None if own else pattern.keep_top(dense_OI.abs())
    upper_II = inverse_factor(gram.gram_II, 0.01)
    expected_OI, keep_OI = sweep(dense_OI, upper_II, pattern, fixed_OI, block=128)
    fixed = None if fixed_OI is None else fixed_OI.cuda()
    got_OI, got_keep_OI = sweep(dense_OI.cuda(), upper_II.cuda(), pattern, fixed, block=128)
    assert pattern.holds(got_keep_OI)
    same_O = (got_keep_OI.cpu() == keep_OI).all(1)
    # A choice that hangs on the last digit changes its row from there on.
    assert same_O.float().mean() > (0.9 if own else 0.999)
    torch.testing.assert_close(got_OI.cpu()[same_O], expected_OI[same_O], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(8, 16)], ids=str)
def test_swap_in_blocks(pattern: NM) -> None:
    """Rows of integers, so that all sums are exact, and with them every choice."""
    scores_OI = (activations(600, 600, torch.float32).abs() * 100).floor().clamp_(max=2**13)
    own_I = torch.arange(600)
    expected_I = swap_in_blocks(scores_OI, own_I, n=pattern.n, m=pattern.m, block=256)
    order_I = swap_in_blocks(scores_OI.cuda(), own_I.cuda(), n=pattern.n, m=pattern.m, block=256)
    assert torch.equal(order_I.cpu(), expected_I)


def test_swap_in_blocks_of_any_scores() -> None:
    scores_OI = activations(3000, 1024, torch.float32).abs()
    own_I, pattern = torch.arange(1024), NM(2, 4)
    on_cpu_I = swap_in_blocks(scores_OI, own_I, n=2, m=4, block=256)
    order_I = swap_in_blocks(scores_OI.cuda(), own_I.cuda(), n=2, m=4, block=256).cpu()
    assert torch.equal(order_I.sort().values, own_I)
    expected = kept_score(scores_OI, on_cpu_I, pattern)
    assert kept_score(scores_OI, order_I, pattern) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_finite(dtype: torch.dtype) -> None:
    x = torch.full((1000, 1000), torch.finfo(dtype).max, dtype=dtype, device=GPU)
    assert finite(x)
    for bad in (float("nan"), float("inf")):
        x[3, 4] = bad
        assert not finite(x)


@pytest.mark.parametrize("columns", [1, 8, 83])
def test_masks_are_packed_on_the_device(columns: int) -> None:
    keep_OI = torch.rand(5, columns) > 0.5
    assert torch.equal(audit.pack(keep_OI.cuda()), audit.pack(keep_OI))


def test_weights_come_back_to_where_they_were() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    store, place = MemoryStore(), parameter.data_ptr()
    for read_only, expected in ((True, 1.0), (False, 2.0)):
        store.lend({"w": parameter}, GPU)
        assert parameter.is_cuda
        parameter.data *= 2
        store.take_back({"w": parameter}, CPU, changed=None, read_only=read_only)
        assert parameter.data_ptr() == place and (parameter == expected).all()
    store.lend({"w": parameter}, GPU)
    parameter.data = parameter.data[:2]  # another shape has another place
    store.take_back({"w": parameter}, CPU, changed=None)
    assert parameter.shape == (2, 4) and parameter.device == CPU


@pytest.mark.parametrize("place", ["host", "device"])
def test_a_model_is_pruned_as_on_a_cpu(place: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    metric = EsparsePaper(base="magnitude", alpha=1.0, bins=100, norm="sequence", range="channel", limit=8.0)
    shuffle = Esparse(objective="score", deal="straight", block=64)
    method = Method(metric=metric, pattern=NM(2, 4), shuffle=shuffle, update=Obs(mask="start", damp=0.01, block=128))
    config = LlamaConfig(
        vocab_size=97, hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=2
    )
    tokens_SL = torch.randint(97, (6, 40), generator=torch.Generator().manual_seed(0))
    kept, totals = [], []
    for device in (CPU, GPU):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        blocks = BlockModel(model, device=device, batch_tokens=80, hidden_store=HiddenStateStore(place))
        pruned = prune(blocks, tokens_SL, method, stages=Stages())
        assert pruned.pattern_holds and pruned.kept * 2 == pruned.weights
        assert all(parameter.device == CPU for parameter in model.parameters())
        kept.append([layer.kept_score for layer in pruned.layers])
        totals.append([layer.relative_error for layer in pruned.layers])
    torch.testing.assert_close(torch.tensor(kept[1]), torch.tensor(kept[0]), rtol=2e-3, atol=0)
    torch.testing.assert_close(torch.tensor(totals[1]), torch.tensor(totals[0]), rtol=3e-2, atol=0)
