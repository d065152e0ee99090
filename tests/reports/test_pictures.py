"""Pictures of many runs, by what is drawn in them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from esparse.reports.figures import curves, plots
from esparse.reports.figures.catalogue import PICTURES, draw, plot
from esparse.reports.reading import read_records
from esparse.reports.tabulate import means, table_of
from tests.reports.test_channels import DEALT_I, SCALES, VALUES_I
from tests.reports.test_tables import record, write


def furnished(run: str, **settings: Any) -> dict[str, Any]:
    """A record with something for every picture."""
    one = record(run, **settings)
    one["layers"] = [
        {"name": f"model.layers.{block}.{layer}", "relative_error": 0.1 * (block + 1), "kept_score": 0.9 - 0.1 * block}
        | {"pattern": one["sparsity"]["pattern"]}
        for block in (0, 1, 10)
        for layer in ("self_attn.q_proj", "mlp.down_proj")
    ]
    one["memory"] |= {"metadata_bits": 0.75, "bits_per_weight": 3.0, "bits": {"values": 2.0}}
    one["zeroshot"] = {t: {"dense": 0.5, "pruned": 0.375, "stderr": 0.05, "n": 100} for t in ("piqa", "arc_easy")}
    one["latency"] = [
        {"layer": "q", "tokens": t, "n": 64, "k": 32, "dense_ms": 2.0 * t, "sparse_ms": 1.0 * t, "kernel": "packed"}
        for t in (1, 16, 256)
    ] + [{"layer": "q", "tokens": 1, "n": 64, "k": 32, "dense_ms": 2.0, "sparse_ms": None, "kernel": "missing"}]
    kinds = [("weight", "mlp.up_proj", None), ("activation", "mlp.up_proj", None), ("attention", "", 0)]
    thresholds = [0.0, 0.001, 0.01, 0.1]
    shares = {f"{which} {t:g}": t for which in ("dense", "pruned") for t in thresholds}
    one["profile"] = {"thresholds": thresholds, "sequences": 4, "length": 8} | {
        "rows": [
            {"kind": kind, "name": f"model.layers.{block}.{name}".strip("."), "head": head, "values": 64} | shares
            for kind, name, head in kinds
            for block in (0, 1)
        ]
    }
    return one


def beside(root: Path) -> list[dict[str, Any]]:
    """The records as they are read again, with the channels of two of their inputs."""
    write(root, *RUNS)
    names = [layer["name"] for layer in RUNS[1]["layers"]]
    values = {f"{kind}/{name}": VALUES_I for name in names for kind in SCALES}
    save_file(values, root / "b2" / "channels.safetensors")
    save_file({f"{name}.weight": DEALT_I for name in names}, root / "b2" / "orders.safetensors")
    return read_records(root)


RUNS = [
    furnished("a1", metric="wanda", pattern="16:32", pruned=9.5),
    furnished("b2", metric="entropy", pattern="2:4", pruned=100.0, alpha=1.0),
    furnished("c3", metric="magnitude & <co>", pattern="4:8", pruned=math.inf),
    record("d4", metric="random", pattern="2:4", pruned=None),
]


def lines(figure: Any) -> dict[str, list[tuple[float, float]]]:
    return {
        line.get_label(): [(round(float(x), 9), round(float(y), 9)) for x, y in zip(*line.get_data(), strict=True)]
        for ax in figure.axes
        for line in ax.lines
    }


def test_layers_stand_at_their_depth() -> None:
    assert lines(draw("errors", RUNS[:1]))["wanda"] == [(0, 0.1), (1, 0.2), (10, 1.1)]
    assert lines(draw("kept", RUNS[:1]))["wanda"] == [(0, 0.9), (1, 0.8), (10, -0.1)]
    seeds = [furnished("a1", metric="wanda"), furnished("b2", metric="wanda", seed=1)]
    seeds[1]["layers"][0]["relative_error"] = 0.5  # one of four values in block 0
    assert lines(draw("errors", seeds))["wanda"][0] == pytest.approx((0, 0.2))


def test_a_method_has_its_color_in_every_panel() -> None:
    runs = [furnished("a", metric="wanda"), furnished("b", metric="ria", pattern="4:8"), furnished("c", pattern="4:8")]
    for name in ("errors", "kept", "tasks"):
        colors: dict[str, set[Any]] = {}
        for ax in draw(name, runs).axes:
            shown = dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
            for label in shown.keys() - {"dense"}:
                line = shown[label][0] if name == "tasks" else shown[label]
                colors.setdefault(label, set()).add(line.get_color())
        assert set(colors) == {"wanda", "ria"} and all(len(seen) == 1 for seen in colors.values())
        assert colors["wanda"] != colors["ria"]


def test_latency_and_work_by_hand() -> None:
    found = lines(draw("latency", RUNS[:1]))
    assert found == {"dense": [(1, 2), (16, 32), (256, 512)], "packed": [(1, 1), (16, 16), (256, 256)]}
    # One token through 64 x 32: 4096 FLOP on 2 (2048 + 96) bytes, in 2 ms; packed in 1 ms.
    for name, seconds in (("dense", 2e-3), ("packed", 1e-3)):
        assert lines(draw("roofline", RUNS[:1]))[name][0] == pytest.approx(
            (4096 / 4288, 4096 / seconds / 1e12), abs=1e-8
        )


def test_what_differs_has_a_panel_or_a_name_of_its_own() -> None:
    row = RUNS[0]["latency"][0]
    several = [row | {"dtype": d, "pattern": p} for d in ("bfloat16", "int8") for p in ("2:4", "8:16")]
    figure = draw("latency", [RUNS[0] | {"latency": several}])
    assert [ax.get_title() for ax in figure.axes] == ["64 × 32, bfloat16", "64 × 32, int8"]
    assert {line.get_label() for line in figure.axes[1].lines} == {"dense", "packed 2:4", "packed 8:16"}


def many() -> list[dict[str, Any]]:
    """Twelve methods at two patterns; the twelfth is not finite at 4:8."""
    runs = []
    for i in range(12):
        for pattern in ("2:4", "4:8"):
            lost = i == 11 and pattern == "4:8"
            one = furnished(f"{i}{pattern}", metric=f"m{i}", pattern=pattern, pruned=math.inf if lost else 30.0 - i)
            one["layers"] = [{"name": "h.0.x", "relative_error": 0.1 * (i + 1), "kept_score": 0.01 * (i + 1)}]
            one["zeroshot"]["piqa"]["pruned"] = 0.01 * i
            runs.append(one)
    return runs


def test_of_many_methods_each_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "LINES", 5)
    (ax,) = draw("perplexity", many()).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["m11", "m10", "m9", "m8", "m7"]  # 19, 20, ...
    assert ax.get_title() == "tiny on builtin, the 5 lowest of 12 methods"
    assert ax.get_xlabel() == "perplexity (lower is better)\nnot finite: m11 4:8"
    drawn = {
        (label, tuple(c.lines[0].get_xdata()), tuple(c.lines[0].get_ydata()))
        for c in ax.containers
        for label in [c.get_label()]
    }
    expected = {(pattern, (19.0 + i,), (i,)) for i in range(5) for pattern in ("2:4", "4:8")}
    assert drawn == expected - {("4:8", (19.0,), (0,))}


@pytest.mark.parametrize(
    ("name", "which", "shown"),
    [("errors", "lowest", range(10)), ("tasks", "highest", range(2, 12))],
)
def test_of_many_methods_the_best_are_shown(name: str, which: str, shown: range) -> None:
    figure = draw(name, many())
    labels = {label for ax in figure.axes for label in ax.get_legend_handles_labels()[1]} - {"dense"}
    assert labels == {f"m{i}" for i in shown}
    assert figure.get_suptitle() == f"the 10 {which} of 12 methods"
    assert draw(name, RUNS[:1]).get_suptitle() == ""


def test_kept_scores_are_never_beside_those_of_another_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled = furnished("s", metric="wanda")
    shuffled["config"]["choices"]["shuffle"] = "gns"
    runs = [furnished("w", metric="wanda"), shuffled, furnished("h", metric="entropy", alpha=0.5)]
    figure = draw("kept", [*runs, furnished("o", metric="entropy", alpha=1.0)])
    shown = {ax.get_title(): {line.get_label() for line in ax.lines} for ax in figure.axes}
    assert shown == {
        "tiny, 2:4, entropy, alpha=0.5": {"entropy, alpha=0.5"},
        "tiny, 2:4, entropy, alpha=1": {"entropy, alpha=1"},
        "tiny, 2:4, wanda": {"wanda", "wanda + gns"},
    }
    monkeypatch.setattr(curves, "PANELS", 2)
    monkeypatch.setattr(curves, "SIDE_BY_SIDE", 1)
    figure = draw("kept", runs)
    assert [ax.get_title() for ax in figure.axes] == ["tiny, 2:4, entropy", "tiny, 2:4, wanda"]
    assert figure.get_suptitle() == "in each at most the 1 highest"
    assert draw("kept", many()).get_suptitle() == "the first 2 of 24 panels"


def test_a_long_legend_stands_below_and_whole() -> None:
    several = [RUNS[0]["latency"][0] | {"kernel": f"kernel {i}"} for i in range(30)]
    figure = draw("latency", [RUNS[0] | {"latency": several}])
    (made,) = figure.legends
    figure.draw_without_rendering()
    box = made.get_window_extent()
    assert len(made.get_texts()) == 31 and box.y0 >= 0 and box.x0 >= 0
    assert box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
    usual = draw("latency", RUNS[:1])
    usual.draw_without_rendering()
    assert figure.axes[0].bbox.height > 0.9 * usual.axes[0].bbox.height  # the panel has not lost its room to it


def test_the_roof_by_hand() -> None:
    rows = [row | {"dtype": "int8"} for row in RUNS[0]["latency"]]
    limits = {"copy_bytes_per_s": 1e9, "flop_per_s": {"int8": 5e9, "float16": 1e9}}
    figure = draw("roofline", [RUNS[0] | {"latency": rows, "limits": limits, "environment": {"device": "H"}}])
    assert [ax.get_title() for ax in figure.axes] == ["int8"]
    (x, y) = zip(*lines(figure)["limit of H"], strict=True)
    # One byte a value in, four out: one token through 64 x 32, then the knee, then 256 tokens.
    assert x == pytest.approx([4096 / (2048 + 32 + 4 * 64), 5, 4096 * 256 / (2048 + 256 * (32 + 4 * 64))])
    assert y == pytest.approx([1e9 * x[0] / 1e12, 0.005, 0.005])
    assert "limit of H" not in lines(draw("roofline", RUNS[:1]))


def test_a_picture_without_data_is_none_or_an_error(tmp_path: Path) -> None:
    bare = record("a1") | {"quality": {}, "layers": []}
    assert all(draw(name, [bare]) is None for name in PICTURES)
    with pytest.raises(ValueError, match="no run has what a plot of latency shows: it needs runs with bench=gemm"):
        plot([bare], tmp_path / "a.png", name="latency")


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_drawn(name: str, tmp_path: Path) -> None:
    runs = beside(tmp_path)
    plot(runs, tmp_path / "a.png", name=name)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_perplexity_against_bits_by_family_and_the_front_is_what_nobody_is_ahead_of() -> None:
    def run(name: str, pattern: str, quantise: str, bits: float, pruned: float, seed: int = 0) -> dict[str, Any]:
        one = record(name, pattern=pattern, pruned=pruned, seed=seed)
        one["config"]["choices"]["quantise"] = quantise
        one["sparsity"]["density"] = 1.0 if pattern == "dense" else 0.5
        one["memory"] |= {"metadata_bits": 0.0 if pattern == "dense" else 0.75, "bits_per_weight": bits}
        return one if quantise == "none" else one | {"memory": one["memory"] | {"bits": {"values": bits}}}

    runs = [
        run("a", "dense", "none", 32.0, 10.0),  # in float32: 16 bits all the same
        run("b", "dense", "int4", 4.25, 11.0),
        run("c", "2:4", "none", 16.75, 20.0),
        run("d", "2:4", "int4", 3.0, 22.0, seed=0),
        run("e", "2:4", "int4", 3.0, 24.0, seed=1),
        run("f", "dense", "int3", 3.25, 21.0),
        run("g", "8:16", "int8", 5.0, 12.0),
    ]
    found = lines(draw("bits", runs))
    assert found["Pareto front"] == [(3.0, 23.0), (3.25, 21.0), (4.25, 11.0), (16.0, 10.0)]
    (dense,) = [points for label, points in found.items() if label.startswith("dense")]
    assert dense == [(3.25, 21.0), (4.25, 11.0), (16.0, 10.0)]
    (pruned,) = [points for label, points in found.items() if label.startswith("2:4")]
    assert pruned == [(3.0, 23.0), (8.75, 20.0)]
    table = means(table_of(runs))
    assert "bits" in table.columns and "bits" not in table_of([runs[0]]).columns
