"""Keep masks of a tiny LLaMA against a reference written from the formulas in plain loops, first and last block.

The reference runs the whole model with hooks, block after block, and prunes with Python lists: it shares no code with
esparse.
"""

from __future__ import annotations

import math

import pytest
import torch

from esparse.metrics import Metric
from esparse.metrics.entropy import Entropy, EsparsePaper
from esparse.metrics.magnitude import Magnitude
from esparse.metrics.random import Random
from esparse.metrics.wanda import Wanda
from esparse.models.blocks import BlockModel
from esparse.patterns import NM
from esparse.pruning.prune import Method, Pruned, prune
from esparse.records.report import Stages
from esparse.shuffles import NoShuffle
from esparse.updates import NoUpdate
from tests.models.families import tiny

TOKENS_SL = torch.randint(1, 96, (6, 20), generator=torch.Generator().manual_seed(5))


def reference_scores(kind: str, weight: list[list[float]], x_SLI: torch.Tensor) -> list[list[float]]:
    """|w| * ||x|| or |w| * (entropy + ||x||) with alpha 1, 100 bins over each channel's range, Wanda's norm."""
    sequences = x_SLI.double().tolist()
    channel_scores = []
    for channel in range(len(weight[0])):
        per_sequence = [sum(token[channel] ** 2 for token in sequence) for sequence in sequences]
        norm = math.sqrt(sum(per_sequence) / len(per_sequence))
        values = [token[channel] for sequence in sequences for token in sequence]
        low, high = min(values), max(values)
        counts = [0] * 100
        for value in values:
            counts[min(int((value - low) / (high - low) * 100), 99)] += 1
        entropy = -sum(c / len(values) * math.log(c / len(values)) for c in counts if c)
        channel_scores.append({"wanda": norm, "esparse_paper": entropy + norm, "magnitude": 1.0}[kind])
    return [[abs(w) * channel_scores[i] for i, w in enumerate(row)] for row in weight]


def reference_keep(scores: list[list[float]], n: int, m: int) -> torch.Tensor:
    keep = []
    for row in scores:
        kept: set[int] = set()
        for start in range(0, len(row), m):
            ranked = sorted(range(start, start + m), key=lambda i: (-row[i], i))
            kept |= set(ranked[:n])
        keep.append([i in kept for i in range(len(row))])
    return torch.tensor(keep)


def reference_masks(kind: str, n: int, m: int) -> dict[str, torch.Tensor]:
    """Prunes block after block; the hooks of a block see the activations of already pruned earlier blocks."""
    model = tiny("llama")
    masks = {}
    for index, block in enumerate(model.model.layers):
        inputs: dict[str, torch.Tensor] = {}
        linears = {name: m for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        hooks = [
            linear.register_forward_pre_hook(lambda _, args, name=name, to=inputs: to.__setitem__(name, args[0]))
            for name, linear in linears.items()
        ]
        with torch.no_grad():
            model(TOKENS_SL, use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, linear in linears.items():
            keep = reference_keep(reference_scores(kind, linear.weight.double().tolist(), inputs[name]), n, m)
            masks[f"model.layers.{index}.{name}.weight"] = keep
            linear.weight.data[~keep] = 0.0
    return masks


def pruned_by(metric: Metric, pattern: NM) -> Pruned:
    blocks = BlockModel(tiny("llama"), device=torch.device("cpu"), batch_tokens=40)
    method = Method(metric=metric, pattern=pattern, shuffle=NoShuffle(), update=NoUpdate())
    return prune(blocks, TOKENS_SL, method, stages=Stages())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4)])
@pytest.mark.parametrize(
    ("kind", "metric"),
    [
        ("magnitude", Magnitude()),
        ("wanda", Wanda()),
        (
            "esparse_paper",
            EsparsePaper(base="magnitude", alpha=1.0, bins=100, norm="sequence", range="channel", limit=8.0),
        ),
    ],
)
def test_keep_masks_equal_the_loops(kind: str, metric: Metric, n: int, m: int) -> None:
    expected = reference_masks(kind, n, m)
    got = pruned_by(metric, NM(n, m)).keeps
    assert set(got) == set(expected)
    for name, keep in expected.items():
        assert torch.equal(got[name], keep), f"{name}: {(got[name] != keep).sum()} weights differ"


def test_random_scores_depend_on_seed_and_layer_alone() -> None:
    first, again, other = (pruned_by(Random(seed=seed), NM(2, 4)).keeps for seed in (1, 1, 2))
    names = list(first)
    assert all(torch.equal(first[name], again[name]) for name in names)
    assert not any(torch.equal(first[name], other[name]) for name in names)
    query = first["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(query, first["model.layers.1.self_attn.q_proj.weight"])


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"base": "wanda"}, "metric.base must be one of magnitude, ria, nowag, got 'wanda'"),
        ({"norm": "l2"}, "metric.norm must be one of sequence, rms, total"),
        ({"range": "tensor"}, "metric.range must be one of channel, layer, fixed"),
        ({"bins": 1}, "metric.bins must be at least 2"),
        ({"limit": 0.0}, "metric.limit must be positive"),
    ],
)
def test_entropy_refuses_settings_that_make_no_sense(settings: dict, part: str) -> None:
    usual = {"base": "magnitude", "alpha": 1.0, "bins": 100, "norm": "sequence", "range": "channel", "limit": 8.0}
    with pytest.raises(ValueError, match=part):
        EsparsePaper(**(usual | settings))
    if "norm" not in settings:
        with pytest.raises(ValueError, match=part):
            Entropy(gamma=0.5, **{k: v for k, v in (usual | settings).items() if k not in ("alpha", "norm")})
