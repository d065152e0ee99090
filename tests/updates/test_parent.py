"""An update towards the dense model against least squares on the tokens; the pairs of inputs that it needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from esparse.errors import Mistake
from esparse.linalg import inverse_times
from esparse.metrics.wanda import Wanda
from esparse.models.blocks import BlockModel
from esparse.patterns import NM, Grouping
from esparse.pruning.method import Method
from esparse.pruning.prune import prune
from esparse.records.report import Stages
from esparse.shuffles import NoShuffle
from esparse.stats import CrossGram, Gram, LayerStats
from esparse.updates import Chain, Layer, NoUpdate, Solution
from esparse.updates.alps import Alps
from esparse.updates.parent import Parent
from esparse.updates.support import Support
from tests.models.families import tiny

CPU = torch.device("cpu")
SUPPORT = Support(damp=1e-6, iterations=300, tolerance=1e-8)
ALPS = Alps(damp=0.01, penalty=0.1, iterations=100, gradient_iterations=10, tolerance=1e-4)


def problem(seed: int = 0, tokens: int = 200) -> tuple[Layer, Tensor, Tensor]:
    """A layer, its input X, and the input Y that it has in the dense model."""
    generator = torch.Generator().manual_seed(seed)
    y_TI = torch.randn(tokens, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    x_TI = 0.9 * y_TI + 0.5 * torch.randn(tokens, 16, generator=generator)
    gram, cross = (kind(inputs=16, sequences=1, device=CPU) for kind in (Gram, CrossGram))
    gram.add(x_TI, 0)
    for part in (slice(0, 70), slice(70, None)):
        cross.add(x_TI[part], 0)
        cross.add_pair(x_TI[part], y_TI[part])
    dense_OI = torch.randn(6, 16, generator=generator)
    stats = LayerStats("layer", {"gram": gram, "cross": cross}, tokens)
    return Layer(dense_OI, Grouping(NM(2, 4)), stats), x_TI, y_TI


def start_of(layer: Layer) -> Solution:
    return Solution.without_update(layer.dense_OI, layer.grouping.keep_top(layer.dense_OI.abs()))


def test_without_a_mask_the_weights_are_least_squares_from_one_input_to_the_others_output() -> None:
    layer, x_TI, y_TI = problem()
    everything = Solution(layer.dense_OI, torch.ones_like(layer.dense_OI, dtype=torch.bool))
    done = Parent(trust=1.0, damp=1e-7, update=NoUpdate()).apply(layer, everything)
    expected_IO = torch.linalg.lstsq(x_TI.double(), y_TI.double() @ layer.dense_OI.double().T).solution
    torch.testing.assert_close(done.weight_OI.double(), expected_IO.T, rtol=1e-3, atol=1e-3)
    half = Parent(trust=0.5, damp=1e-7, update=NoUpdate()).apply(layer, everything)
    torch.testing.assert_close(half.weight_OI, (done.weight_OI + layer.dense_OI) / 2, rtol=1e-4, atol=1e-4)


def test_on_a_mask_it_is_least_squares_on_the_kept_columns() -> None:
    layer, x_TI, y_TI = problem()
    start = start_of(layer)
    done = Parent(trust=1.0, damp=1e-7, update=SUPPORT).apply(layer, start)
    for row, keep_I in enumerate(start.keep_OI):
        target_T = y_TI.double() @ layer.dense_OI[row].double()
        expected = torch.linalg.lstsq(x_TI[:, keep_I].double(), target_T[:, None]).solution[:, 0]
        torch.testing.assert_close(done.weight_OI[row, keep_I].double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(done.keep_OI, start.keep_OI) and (done.weight_OI[~done.keep_OI] == 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_output_comes_nearer_to_the_dense_models(seed: int) -> None:
    layer, x_TI, y_TI = problem(seed)
    target_TO = y_TI @ layer.dense_OI.T
    usual = SUPPORT.apply(layer, start_of(layer))
    towards = Parent(trust=1.0, damp=1e-4, update=SUPPORT).apply(layer, start_of(layer))
    assert (x_TI @ towards.weight_OI.T - target_TO).norm() < (x_TI @ usual.weight_OI.T - target_TO).norm()


def test_without_trust_or_without_a_difference_nothing_changes() -> None:
    layer, x_TI, _ = problem()
    usual = ALPS.apply(layer, start_of(layer))
    none = Parent(trust=0.0, damp=0.01, update=ALPS).apply(layer, start_of(layer))
    assert torch.equal(none.weight_OI, usual.weight_OI)
    same = CrossGram(inputs=16, sequences=1, device=CPU)
    same.add_pair(x_TI, x_TI)
    layer = Layer(
        layer.dense_OI, layer.grouping, LayerStats("layer", {"gram": layer.stats["gram"], "cross": same}, 200)
    )
    towards = Parent(trust=1.0, damp=0.01, update=SUPPORT).apply(layer, start_of(layer))
    expected = SUPPORT.apply(layer, start_of(layer))
    torch.testing.assert_close(towards.weight_OI, expected.weight_OI, rtol=1e-3, atol=1e-3)


def test_an_expert_that_is_sent_other_tokens_keeps_the_usual_target() -> None:
    layer, _, _ = problem()
    layer.stats["cross"].tokens -= 1
    towards = Parent(trust=1.0, damp=0.01, update=ALPS).apply(layer, start_of(layer))
    assert torch.equal(towards.weight_OI, ALPS.apply(layer, start_of(layer)).weight_OI)


def test_an_inverse_times_a_matrix() -> None:
    gram_II = torch.tensor([[2.0, 1.0], [1.0, 2.0]])  # its damping, a tenth of its mean, is 0.2; the inverse by hand
    expected = torch.tensor([[2.2, -1.0], [-1.0, 2.2]]) / (2.2**2 - 1)
    torch.testing.assert_close(inverse_times(torch.eye(2), gram_II, 0.1), expected)


@pytest.mark.parametrize("batch_tokens", [24, 96])
def test_both_inputs_of_a_layer_are_those_of_the_same_tokens(
    batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens_SL = torch.randint(1, 96, (6, 24), generator=torch.Generator().manual_seed(1))
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    original = Parent._towards

    def noted(self: Parent, layer: Layer) -> Layer:
        seen[layer.stats.name] = (layer.stats["gram"].gram_II.clone(), layer.stats["cross"].cross_II.clone())
        return original(self, layer)

    monkeypatch.setattr(Parent, "_towards", noted)

    def inputs(model: torch.nn.Module) -> Tensor:
        """What the queries of the second block read, which does not depend on that block's own weights."""
        found: list[Tensor] = []
        hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(
            lambda _, args: found.append(args[0].flatten(0, -2))
        )
        with torch.no_grad():
            model(tokens_SL)
        hook.remove()
        return found[0]

    model = tiny("llama")
    y_TI = inputs(model)
    parent = Parent(trust=0.5, damp=0.01, update=Chain(first=NoUpdate(), second=SUPPORT))
    method = Method(metric=Wanda(), pattern=NM(2, 4), shuffle=NoShuffle(), update=parent)
    blocks = BlockModel(model, device=CPU, batch_tokens=batch_tokens)
    assert prune(blocks, tokens_SL, method, stages=Stages()).pattern_holds
    x_TI = inputs(model)
    gram_II, cross_II = seen["model.layers.1.self_attn.q_proj"]
    torch.testing.assert_close(gram_II, x_TI.T @ x_TI, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cross_II, x_TI.T @ y_TI, rtol=1e-4, atol=1e-4)
    first_gram, first_cross = seen["model.layers.0.self_attn.q_proj"]  # nothing is pruned before it
    torch.testing.assert_close(first_cross, first_gram, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("trust", "damp", "words"),
    [(1.5, 0.1, "trust must be between 0 and 1, got 1.5"), (0.5, 0.0, "damp must be positive")],
)
def test_settings_that_make_no_sense(trust: float, damp: float, words: str) -> None:
    with pytest.raises(Mistake, match=words):
        Parent(trust=trust, damp=damp, update=NoUpdate())
