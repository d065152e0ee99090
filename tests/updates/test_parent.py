"""An update towards the dense model against least squares on the tokens; the pairs of inputs that it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM
from transformers.pytorch_utils import Conv1D

from esparse import option
from esparse.errors import Mistake
from esparse.linalg import inverse_times
from esparse.metrics.entropy import Entropy
from esparse.models import residual_stream
from esparse.models.activations import Activations
from esparse.models.blocks import BlockModel
from esparse.patterns import NM, Grouping
from esparse.pruning.method import Method
from esparse.pruning.observation import Observation, Observed
from esparse.pruning.prune import prune
from esparse.records.report import Stages
from esparse.recoveries import NoRecovery, Recovery
from esparse.recoveries.bias import Bias
from esparse.shuffles import NoShuffle
from esparse.stats import CrossGram, Gram, LayerStats, StreamGram
from esparse.updates import Chain, Layer, NoUpdate, Solution, Update
from esparse.updates.alps import Alps
from esparse.updates.parent import Parent
from esparse.updates.support import Support
from tests.models.families import FAMILIES, tiny
from tests.models.test_forward_check import families

CPU = torch.device("cpu")
SUPPORT = Support(damp=1e-6, iterations=300, tolerance=1e-8)
ENTROPY = Entropy(base="magnitude", gamma=0.5, bins=100, range="channel", limit=1.0)
ALPS = Alps(damp=0.01, penalty=0.1, iterations=100, gradient_iterations=10, tolerance=1e-4)


def towards(update: Update, *, trust: float, damp: float, **how: float) -> Parent:
    return Parent(update=update, trust=trust, damp=damp, **({"sequential": True, "residual": 0.25} | how))


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
    done = towards(trust=1.0, damp=1e-7, update=NoUpdate()).apply(layer, everything)
    expected_IO = torch.linalg.lstsq(x_TI.double(), y_TI.double() @ layer.dense_OI.double().T).solution
    torch.testing.assert_close(done.weight_OI.double(), expected_IO.T, rtol=1e-3, atol=1e-3)
    half = towards(trust=0.5, damp=1e-7, update=NoUpdate()).apply(layer, everything)
    torch.testing.assert_close(half.weight_OI, (done.weight_OI + layer.dense_OI) / 2, rtol=1e-4, atol=1e-4)


def test_what_the_stream_lacks_is_added_by_least_squares() -> None:
    layer, x_TI, y_TI = problem()
    stream_TO = torch.randn(len(x_TI), 6, generator=torch.Generator().manual_seed(5))  # dense without what is there
    stream = StreamGram(outputs=6, inputs=16, sequences=1, device=CPU)
    lack_TO = (y_TI - x_TI) @ layer.dense_OI.T + stream_TO
    for part in (slice(0, 70), slice(70, None)):
        stream.add_lack(x_TI[part], lack_TO[part])
    layer = replace(layer, stats=LayerStats("layer", dict(layer.stats) | {"stream": stream}, 200))
    everything = Solution(layer.dense_OI, torch.ones_like(layer.dense_OI, dtype=torch.bool))
    for trust, residual in ((1.0, 1.0), (0.5, 0.25), (0.0, 1.0)):
        done = towards(NoUpdate(), trust=trust, damp=1e-7, residual=residual).apply(layer, everything)
        mixed_TO = x_TI @ layer.dense_OI.T + trust * (y_TI - x_TI) @ layer.dense_OI.T + residual * stream_TO
        expected_IO = torch.linalg.lstsq(x_TI.double(), mixed_TO.double()).solution
        torch.testing.assert_close(done.weight_OI.double(), expected_IO.T, rtol=1e-3, atol=1e-3)


def test_on_a_mask_it_is_least_squares_on_the_kept_columns() -> None:
    layer, x_TI, y_TI = problem()
    start = start_of(layer)
    done = towards(trust=1.0, damp=1e-7, update=SUPPORT).apply(layer, start)
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
    nearer = towards(trust=1.0, damp=1e-4, update=SUPPORT).apply(layer, start_of(layer))
    assert (x_TI @ nearer.weight_OI.T - target_TO).norm() < (x_TI @ usual.weight_OI.T - target_TO).norm()


def test_without_trust_or_without_a_difference_nothing_changes() -> None:
    layer, x_TI, _ = problem()
    usual = ALPS.apply(layer, start_of(layer))
    none = towards(trust=0.0, damp=0.01, update=ALPS).apply(layer, start_of(layer))
    assert torch.equal(none.weight_OI, usual.weight_OI)
    same = CrossGram(inputs=16, sequences=1, device=CPU)
    same.add_pair(x_TI, x_TI)
    layer = Layer(
        layer.dense_OI, layer.grouping, LayerStats("layer", {"gram": layer.stats["gram"], "cross": same}, 200)
    )
    nearer = towards(trust=1.0, damp=0.01, update=SUPPORT).apply(layer, start_of(layer))
    expected = SUPPORT.apply(layer, start_of(layer))
    torch.testing.assert_close(nearer.weight_OI, expected.weight_OI, rtol=1e-3, atol=1e-3)


def test_an_expert_that_is_sent_other_tokens_keeps_the_usual_target() -> None:
    layer, _, _ = problem()
    layer.stats["cross"].tokens -= 1
    nearer = towards(trust=1.0, damp=0.01, update=ALPS).apply(layer, start_of(layer))
    assert torch.equal(nearer.weight_OI, ALPS.apply(layer, start_of(layer)).weight_OI)


def test_an_inverse_times_a_matrix() -> None:
    gram_II = torch.tensor([[2.0, 1.0], [1.0, 2.0]])  # its damping, a tenth of its mean, is 0.2; the inverse by hand
    expected = torch.tensor([[2.2, -1.0], [-1.0, 2.2]]) / (2.2**2 - 1)
    torch.testing.assert_close(inverse_times(torch.eye(2), gram_II, 0.1), expected)


TOKENS_SL = torch.randint(1, 96, (6, 24), generator=torch.Generator().manual_seed(1))


def inputs(model: torch.nn.Module, layers: list[str]) -> dict[str, Tensor]:
    """What each layer reads of all tokens."""
    found: dict[str, Tensor] = {}

    def noting(name: str) -> Callable[..., None]:
        return lambda _, args: found.update({name: args[0].flatten(0, -2).clone()})

    hooks = [model.get_submodule(name).register_forward_pre_hook(noting(name)) for name in layers]
    with torch.no_grad():
        model(TOKENS_SL)
    for hook in hooks:
        hook.remove()
    return found


Pair = tuple[Tensor, Tensor]


def observed(
    model: torch.nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    *,
    sequential: bool,
    batch_tokens: int = 48,
    recovery: Recovery | None = None,
) -> dict[str, Pair]:
    """Prunes the model; returns the Gram and cross Gram matrices that each layer's update got."""
    seen: dict[str, Pair] = {}
    original = Parent._towards

    def noted(self: Parent, layer: Layer) -> Layer:
        seen[layer.stats.name] = (layer.stats["gram"].gram_II.clone(), layer.stats["cross"].cross_II.clone())
        return original(self, layer)

    monkeypatch.setattr(Parent, "_towards", noted)
    update = Chain(first=NoUpdate(), second=SUPPORT)
    parent = towards(trust=0.5, damp=0.01, sequential=sequential, residual=0, update=update)
    method = Method(
        metric=ENTROPY, pattern=NM(2, 4), shuffle=NoShuffle(), update=parent, recovery=recovery or NoRecovery()
    )
    blocks = BlockModel(model, device=CPU, batch_tokens=batch_tokens)
    assert prune(blocks, TOKENS_SL, method, stages=Stages()).pattern_holds
    return seen


# A layer of each input of a block.
LAYERS = {
    "llama": ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"],
    "opt": ["self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"],
    "gpt-neox": ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    # Four streams of hidden states, one in front of the other
    "gemma3n": ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"],
    "ctrl": ["multi_head_attention.Wq", "multi_head_attention.dense", "ffn.0", "ffn.2"],
}


@pytest.mark.parametrize("recovery", [None, Bias()], ids=["alone", "bias"])
@pytest.mark.parametrize("batch_tokens", [24, 96])
@pytest.mark.parametrize("family", LAYERS)
def test_a_layer_is_observed_when_all_before_it_are_pruned(
    family: str, batch_tokens: int, recovery: Recovery | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then what it was shown is what it reads in the pruned model in the end, beside what it reads in the dense one.

    The dense one is without the biases that LLaMA's layers get from a recovery.
    """
    model = families.build(family) if family == "ctrl" else tiny(family)
    prefix = BlockModel(model, device=CPU, batch_tokens=24).prefix
    layers = [f"{prefix}.{block}.{name}" for block in (0, 1) for name in LAYERS[family]]
    y = inputs(model, layers)
    seen = observed(model, monkeypatch, sequential=True, batch_tokens=batch_tokens, recovery=recovery)
    x = inputs(model, layers)
    for name in layers:
        gram_II, cross_II = seen[name]
        torch.testing.assert_close(gram_II, x[name].T @ x[name], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(cross_II, x[name].T @ y[name], rtol=1e-4, atol=1e-3)
        assert name in layers[:3] or float((gram_II - cross_II).abs().max()) > 1e-2


def test_without_that_only_a_blocks_first_layers_are_observed_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    layers = [f"model.layers.{block}.{name}" for block in (0, 1) for name in LAYERS["llama"]]
    y = inputs(model, layers)
    seen = observed(model, monkeypatch, sequential=False)
    x = inputs(model, layers)
    for name in layers:
        gram_II, cross_II = seen[name]
        same = torch.allclose(gram_II, x[name].T @ x[name], rtol=1e-4, atol=1e-3)
        assert same == name.endswith("q_proj")
        if same:
            torch.testing.assert_close(cross_II, x[name].T @ y[name], rtol=1e-4, atol=1e-3)
    # The first block's inputs come from no pruned block, and its layers were dense when they were observed.
    for name in layers[:4]:
        torch.testing.assert_close(seen[name][1], seen[name][0], rtol=1e-5, atol=1e-4)


# Layers that add to the residual stream, the module that reads the stream behind them ("": the block returns it).
ADDED = {
    "llama": {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": ""},
    "gpt2": {"attn.c_proj": "ln_2", "mlp.c_proj": ""},
    "gpt-neox": {"attention.dense": "", "mlp.dense_4h_to_h": ""},
    "granite": {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": ""},
}


def granite() -> torch.nn.Module:
    """A model that multiplies what its layers add to the stream."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = GraniteConfig(vocab_size=96, num_hidden_layers=3, residual_multiplier=0.3, **sizes)
    return GraniteForCausalLM(config).eval()


def streams(model: torch.nn.Module, prefix: str, family: str) -> dict[str, Tensor]:
    """The residual stream behind each layer that adds to it, of all tokens."""
    found: dict[str, Tensor] = {}
    hooks = []
    for block in (0, 1):
        for layer, reader in ADDED[family].items():
            name = f"{prefix}.{block}.{layer}"
            module = model.get_submodule(f"{prefix}.{block}.{reader}".rstrip("."))

            def read(_: torch.nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                found[name] = args[0].flatten(0, -2).clone()

            def returned(_: torch.nn.Module, __: object, out: object, name: str = name) -> None:
                found[name] = (out[0] if isinstance(out, tuple) else out).flatten(0, -2).clone()

            hooks.append(module.register_forward_pre_hook(read) if reader else module.register_forward_hook(returned))
    with torch.no_grad():
        model(TOKENS_SL)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("batch_tokens", [24, 96])
@pytest.mark.parametrize("family", ADDED)
def test_what_the_stream_behind_a_layer_lacks(family: str, batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the layer is dense and all before it are pruned, seen in the dense and in the finished model."""
    model = granite() if family == "granite" else tiny(family)
    prefix = BlockModel(model, device=CPU, batch_tokens=24).prefix
    layers = [f"{prefix}.{block}.{layer}" for block in (0, 1) for layer in ADDED[family]]
    scale = getattr(model.config, "residual_multiplier", 1.0)
    assert family != "granite" or scale != 1.0

    def weight(name: str) -> Tensor:
        stored = model.get_submodule(name).weight.detach().clone()
        return stored.T if family == "gpt2" else stored

    dense = {name: weight(name) for name in layers}
    wanted = streams(model, prefix, family)
    lost: dict[str, Tensor] = {}
    original = Parent._towards

    def noted(self: Parent, layer: Layer) -> Layer:
        if "stream" in layer.stats:
            lost[layer.stats.name] = layer.stats["stream"].lacks_OI.clone()
        return original(self, layer)

    monkeypatch.setattr(Parent, "_towards", noted)
    parent = towards(trust=0.5, damp=0.01, update=SUPPORT)
    method = Method(metric=ENTROPY, pattern=NM(2, 4), shuffle=NoShuffle(), update=parent)
    assert prune(
        BlockModel(model, device=CPU, batch_tokens=batch_tokens), TOKENS_SL, method, stages=Stages()
    ).pattern_holds
    there, x = streams(model, prefix, family), inputs(model, layers)
    assert set(lost) >= set(layers)
    for name in layers:
        dense_again = there[name] + scale * x[name] @ (dense[name] - weight(name)).T
        if family == "gpt-neox" and "attention" in name:  # the MLP beside it was dense then, and is not in the end
            continue
        expected = (wanted[name] - dense_again).T @ x[name] / scale
        torch.testing.assert_close(lost[name], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


class Twice(torch.nn.Module):
    """Adds one layer's output twice, and another's once."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, hidden_BLH: Tensor) -> Tensor:
        return hidden_BLH + self.twice(hidden_BLH) + self.twice(hidden_BLH + 1) + self.once(hidden_BLH)


def test_a_layer_that_is_called_twice_has_no_stream_behind_it() -> None:
    torch.manual_seed(0)
    block, hidden_BLH = Twice().requires_grad_(False), torch.randn(2, 5, 8)
    found = residual_stream.find(block, dict(block.named_children()), hidden_BLH, lambda: block(hidden_BLH))
    assert found == {"once": residual_stream.Behind(None, pytest.approx(1.0, abs=1e-5))}


@pytest.mark.parametrize("family", FAMILIES)
def test_only_output_projections_add_to_the_stream(family: str) -> None:
    blocks = BlockModel(tiny(family), device=CPU, batch_tokens=96)
    activations = Activations(blocks, TOKENS_SL)
    kinds = (torch.nn.Linear, Conv1D)
    layers = {name: layer for name, layer in blocks.blocks[0].named_modules() if isinstance(layer, kinds)}
    found = residual_stream.find(blocks.blocks[0], layers, activations.hidden[0], lambda: activations.run(0, 0))
    last = {name.rpartition(".")[2] for name in found}
    assert last <= {"o_proj", "out_proj", "down_proj", "fc2", "dense", "dense_4h_to_h", "c_proj"}
    assert bool(found) == (family not in ("gemma2", "gemma3"))


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2"])
def test_a_layer_whose_output_is_normalised_before_it_is_added_has_its_own_outputs_target(family: str) -> None:
    blocks = BlockModel(tiny(family), device=CPU, batch_tokens=96)
    block = blocks.blocks[0]
    activations = Activations(blocks, TOKENS_SL)
    layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, torch.nn.Linear)}
    hidden = activations.hidden[0]
    assert residual_stream.find(block, layers, hidden, lambda: activations.run(0, 0)) == {}


def test_the_stream_is_never_the_output_itself_nor_what_attention_makes_of_it() -> None:
    """Of a LLaMA whose values are as wide as its stream, two layers add to it."""
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=96)
    activations = Activations(blocks, TOKENS_SL)
    block = blocks.blocks[0]
    width = blocks.model.config.hidden_size
    block.self_attn.o_proj = torch.nn.Sequential(block.self_attn.o_proj, torch.nn.Identity())
    layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert sum(layer.out_features == width for layer in layers.values()) >= 3
    found = residual_stream.find(block, layers, activations.hidden[0], lambda: activations.run(0, 0))
    assert found == {
        "self_attn.o_proj.0": residual_stream.Behind("post_attention_layernorm", pytest.approx(1.0, abs=1e-5)),
        "mlp.down_proj": residual_stream.Behind(None, pytest.approx(1.0, abs=1e-5)),
    }


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "deepseek-v3"])
def test_experts_are_observed_again_together(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass for all experts' first matrices and one for their second, not one for each expert."""
    turns: list[int] = []
    original = Observation.again

    def noted(self: Observation, groups: list[Observed]) -> None:
        turns.append(len(groups))
        original(self, groups)

    monkeypatch.setattr(Observation, "again", noted)
    observed(tiny(family), monkeypatch, sequential=True)
    assert 2 * 3 <= len(turns) <= 8 * 3  # of three blocks; with four experts there would be ten and more for each
    assert max(turns) >= 3


@pytest.mark.parametrize("sequential", [False, True])
def test_an_expert_is_no_pair_even_if_it_is_sent_all_tokens(sequential: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All four experts of this model are chosen for every token: in the order of their rank, another in each stream."""
    tokens: dict[str, tuple[int, int]] = {}
    original = Parent._towards

    def noted(self: Parent, layer: Layer) -> Layer:
        tokens[layer.stats.name] = (layer.stats["gram"].tokens, layer.stats["cross"].tokens)
        return original(self, layer)

    monkeypatch.setattr(Parent, "_towards", noted)
    update = towards(trust=0.5, damp=0.01, sequential=sequential, residual=0, update=SUPPORT)
    method = Method(metric=ENTROPY, pattern=NM(2, 4), shuffle=NoShuffle(), update=update)
    prune(BlockModel(tiny("gpt-oss"), device=CPU, batch_tokens=48), TOKENS_SL, method, stages=Stages())
    for name, (seen, paired) in tokens.items():
        assert seen == TOKENS_SL.numel()
        assert paired == (0 if "experts" in name else seen), name


def test_the_dense_block_comes_back_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that stay dense have their weights in the end, and pruned ones keep what was written."""
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    observed(model, monkeypatch, sequential=True)
    for name, value in model.state_dict().items():
        if "proj" in name:
            assert float((value == 0).float().mean()) == 0.5, name
        else:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("trust", "damp", "words"),
    [(1.5, 0.1, "trust must be between 0 and 1, got 1.5"), (0.5, 0.0, "damp must be positive")],
)
def test_settings_that_make_no_sense(trust: float, damp: float, words: str) -> None:
    with pytest.raises(Mistake, match=words):
        towards(trust=trust, damp=damp, update=NoUpdate())


def test_the_stream_needs_a_second_look() -> None:
    with pytest.raises(Mistake, match=r"update\.residual needs update\.sequential.*use update\.sequential=true or"):
        towards(trust=0.5, damp=0.01, sequential=False, update=NoUpdate())


def test_an_update_that_cannot_round_is_rounded_towards_the_dense_model() -> None:
    """No row is further from what the dense model returns than if each of its values were rounded by itself."""
    for seed in range(5):
        layer, x_TI, y_TI = problem(seed)
        grid = option("quantise", "int4", group=None, damp=1e-6)
        update = towards(ALPS, trust=1.0, damp=1e-6)
        pruned = update.apply(layer, start_of(layer))
        nearest_OI, _ = grid.nearest(pruned.weight_OI, pruned.keep_OI, NM(2, 4))
        done = update.apply_rounding(layer, start_of(layer), grid)
        assert done.scales is not None
        wanted_TO = y_TI @ layer.dense_OI.T
        error_O, of_nearest_O = ((x_TI @ w_OI.T - wanted_TO).norm(dim=0) for w_OI in (done.weight_OI, nearest_OI))
        assert (error_O <= of_nearest_O * 1.0001).all()
