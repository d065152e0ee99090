"""By which names a run is tracked, by hand."""

from __future__ import annotations

import pytest

from esparse.records.report import LayerReport
from esparse.run.tracked_values import BlockHistory, block_of, by_kind, kind_of, outcome, parts, series


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.3.self_attn.q_proj", 3, "self_attn.q_proj"),
        ("h.0.attn.c_attn", 0, "attn.c_attn"),
        ("model.layers.11.block_sparse_moe.experts.5.w1", 11, "block_sparse_moe.experts.w1"),
        ("model.layers.2.mlp.experts.gate_up_proj[7]", 2, "mlp.experts.gate_up_proj"),
        ("lm_head", None, "lm_head"),
    ],
)
def test_the_kind_of_a_layer(name: str, block: int | None, kind: str) -> None:
    assert (block_of(name), kind_of(name)) == (block, kind)


def report(name: str, kept: float, error: float | None) -> LayerReport:
    return LayerReport(name, [2, 4], 0.5, kept, error, 8, 0.1)


def test_each_block_is_logged_once_with_means_of_its_kinds() -> None:
    logged: list[dict[str, object]] = []
    history = BlockHistory(logged.append)
    history.close()  # nothing yet
    for block in (4, 5):
        history.add(block, report(f"h.{block}.q", 0.5, 0.25))
        for expert, error in ((0, 0.5), (1, None)):
            history.add(block, report(f"h.{block}.e.{expert}.w", 0.5 + expert, error))
    assert len(logged) == 1  # the other may go on
    history.close()
    history.close()
    values = {"error/q": 0.25, "kept_score/q": 0.5, "error/e.w": 0.5, "kept_score/e.w": 1.0}
    assert logged == [{"block": 4} | values, {"block": 5} | values]
    assert by_kind([]) == {}


LAYERS = [
    {"name": "h.0.q", "relative_error": 0.1, "kept_score": 0.8},
    {"name": "h.1.q", "relative_error": 0.3, "kept_score": 0.6},
    {"name": "h.1.k", "relative_error": None, "kept_score": 0.7},
]


def test_what_runs_are_compared_by() -> None:
    quality = {"c4": {"dense": 8.0, "pruned": 10.0, "tokens": 5}, "ptb": {"dense": None, "pruned": 20.0}}
    assert outcome({"quality": quality, "layers": LAYERS}) == pytest.approx(
        {
            "perplexity/c4/dense": 8.0,
            "perplexity/c4/pruned": 10.0,
            "perplexity/c4/ratio": 1.25,
            "perplexity/ptb/pruned": 20.0,
            "mean_error": 0.2,
            "mean_kept_score": 0.7,
        }
    )
    assert outcome({}) == {}
    scalars, tables = parts(
        {"id": "a", "config": {"x": 1}, "quality": quality, "layers": LAYERS, "memory": {"mib": 2.5}}
    )
    assert scalars == {"id": "a", "perplexity/c4/tokens": 5, "memory/mib": 2.5}
    assert [(row["block"], row["kind"]) for row in tables["layers"]] == [(0, "q"), (1, "q"), (1, "k")]


def test_lines_of_a_chart() -> None:
    assert series(LAYERS, "relative_error") == ([[0, 1]], [[0.1, 0.3]], ["q"])
    assert series(LAYERS, "kept_score") == ([[0, 1], [1]], [[0.8, 0.6], [0.7]], ["q", "k"])
