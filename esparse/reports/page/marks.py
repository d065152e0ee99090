"""How Vega-Lite draws the rows of a chart: one specification per kind of figure.

Every row brings `label` (whose entry of the legend it belongs to) and, from page.js, `color` and `shape`; the parameter
`focus` is the label that a reader points at.
"""

from __future__ import annotations

from typing import Any

Spec = dict[str, Any]

STYLE = ["method", "label", "color", "shape"]
DASHED = [4, 3]


def number(field: str, title: str, **more: Any) -> Spec:
    """A field with numbers on an axis that need not begin at zero."""
    more.setdefault("scale", {"zero": False, "nice": False})
    return {"field": field, "type": "quantitative", "title": title} | more


def named(field: str, **more: Any) -> Spec:
    """A field with names."""
    return {"field": field, "type": "nominal", "title": None} | more


def hover(*fields: tuple[str, str], digits: str = ".4~g") -> list[Spec]:
    """What is said at a mark: fields and their titles; a name has no digits."""
    return [
        {"field": field, "title": title} | ({} if field in NAMES else {"type": "quantitative", "format": digits})
        for field, title in fields
    ]


NAMES = {"method", "quantiser", "label", "pattern", "task", "roof", "layer", "place", "block", "runs", "tokens"}


def mark(kind: str, **more: Any) -> Spec:
    """A mark in the color of its row, pale while another label is in focus."""
    encoding: Spec = {
        "color": {"field": "color", "type": "nominal", "scale": None},
        "opacity": {"condition": {"test": "focus === null || datum.label === focus", "value": 1}, "value": 0.12},
    }
    if kind == "point":
        encoding["shape"] = {"field": "shape", "type": "nominal", "scale": None}
        more = {"filled": True, "opacity": 1, "size": 55} | more
    return {"mark": {"type": kind} | more, "encoding": encoding}


def layer(base: Spec, *, transform: list[Spec] | None = None, **channels: Any) -> Spec:
    """The mark with what it encodes, of rows that were transformed."""
    made = base | {"encoding": base["encoding"] | channels}
    return ({"transform": transform} if transform else {}) | made


def figure(layers: list[Spec], *, height: Any = 230) -> Spec:
    """All layers over the same rows, as wide as the page gives room."""
    return {
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "params": [{"name": "focus", "value": None}],
        "layer": layers,
    }


def mean_over_seeds(field: str, *groups: str) -> list[Spec]:
    """`field` as a mean over the runs of a method, `least` and `most` a standard deviation around it, and `runs`."""
    operations = [("mean", field, field), ("stdev", field, "spread"), ("count", None, "runs")]
    aggregate = [{"op": op, "as": name} | ({"field": of} if of else {}) for op, of, name in operations]
    return [
        {"filter": f"isValid(datum.{field})"},
        {"aggregate": aggregate, "groupby": [*STYLE, *groups]},
        {"calculate": f"datum.{field} - (datum.runs > 1 ? datum.spread : 0)", "as": "least"},
        {"calculate": f"datum.{field} + (datum.runs > 1 ? datum.spread : 0)", "as": "most"},
    ]


def listed() -> Spec:
    """Perplexities: a line per method, a mark per pattern, the dense model dashed; what is not finite is said."""
    axis = {"format": "~g", "tickCount": 6, "titleAnchor": "end"}  # on a phone the axis is shorter than its title
    x = number("ppl", "perplexity (lower is better)", scale="$scale", axis=axis)
    y = named("method", sort="$order")
    seeds = mean_over_seeds("ppl", "dense")
    tooltip = hover(
        ("method", "method"), ("label", "pattern"), ("ppl", "perplexity"), ("spread", "standard deviation"),
        ("runs", "runs"), ("dense", "dense"),
    )  # fmt: skip
    # A line for each dense perplexity: runs may have measured other parts of a text, and no model has their mean.
    dense = [{"filter": "isValid(datum.dense)"}, {"aggregate": [{"op": "count", "as": "runs"}], "groupby": ["dense"]}]
    return figure(
        [
            {
                "transform": dense,
                "mark": {"type": "rule", "strokeDash": DASHED, "strokeWidth": 1.2},
                "encoding": {"x": x | {"field": "dense"}, "tooltip": hover(("dense", "dense perplexity"))},
            },
            layer(mark("rule"), transform=seeds, y=y, x=x | {"field": "least"}, x2={"field": "most"}),
            layer(mark("point", size=70), transform=seeds, y=y, x=x, tooltip=tooltip),
            layer(
                mark("text", text="not finite", align="right", fontSize=11),
                transform=[{"filter": "!isValid(datum.ppl)"}],
                y=y,
                x={"value": {"expr": "width"}},
                tooltip=hover(("method", "method"), ("label", "pattern, not finite")),
            ),
        ],
        height={"step": 21},
    )


def along_depth(title: str, *, shared: bool = True) -> Spec:
    """A line per method over the blocks; `shared`: all charts of the picture show the same range."""
    ends: Spec = {"domainMin": "$low", "domainMax": "$high"} if shared else {}
    x = number("block", "block", axis={"tickMinStep": 1, "format": "d", "grid": False})
    y = number("value", title, scale={"zero": False, "nice": not shared} | ends)
    seeds = mean_over_seeds("value", "block")
    tooltip = hover(("method", "method"), ("block", "block"), ("value", title), ("runs", "runs"))
    return figure(
        [
            layer(mark("line", strokeWidth=1.5), transform=seeds, x=x, y=y, detail={"field": "method"}),
            layer(mark("point"), transform=seeds, x=x, y=y, tooltip=tooltip),
        ]
    )


def scores() -> Spec:
    """Tasks: the pruned model's score with its standard error, the dense one's as a line through all methods."""
    x = number("pruned", "score of a task (higher is better)", scale={"zero": False, "nice": True})
    y, beside = named("task"), {"yOffset": {"field": "method"}}
    seeds = mean_over_seeds("pruned", "task")
    seeds[1]["aggregate"].append({"op": "mean", "field": "stderr", "as": "stderr"})
    seeds[2:] = [
        {"calculate": f"datum.pruned {s} datum.stderr", "as": end} for s, end in (("-", "least"), ("+", "most"))
    ]
    tooltip = hover(
        ("task", "task"), ("method", "method"), ("pruned", "score"), ("stderr", "standard error"), ("runs", "runs")
    )
    dense = [{"aggregate": [{"op": "mean", "field": "dense", "as": "dense"}], "groupby": ["task", "method"]}]
    return figure(
        [
            {
                "transform": dense,
                "mark": {"type": "tick", "thickness": 1.5, "bandSize": 13},
                "encoding": {
                    "x": x | {"field": "dense"},
                    "y": y,
                    "tooltip": hover(("task", "task"), ("dense", "dense model")),
                }
                | beside,
            },
            layer(mark("rule"), transform=seeds, y=y, x=x | {"field": "least"}, x2={"field": "most"}, **beside),
            layer(mark("point"), transform=seeds, y=y, x=x, tooltip=tooltip, **beside),
        ],
        height={"step": 13, "for": "offset"},
    )


def shares() -> Spec:
    """Zeros dashed, near zeros as lines in the band from their least to their most."""
    x = number("block", "block", axis={"tickMinStep": 1, "format": "d", "grid": False})
    y = number("value", "share of values", scale={"domain": [0, 1]})
    tooltip = hover(("method", "values"), ("block", "block"), ("value", "mean"), ("least", "least"), ("most", "most"))
    dash = {"condition": {"test": "datum.zero", "value": DASHED}, "value": [1, 0]}
    near = [{"filter": "!datum.zero"}]
    return figure(
        [
            layer(mark("area", fillOpacity=0.15), transform=near, x=x, y=y | {"field": "least"}, y2={"field": "most"}),
            layer(mark("line", strokeWidth=1.5), x=x, y=y, strokeDash=dash, detail={"field": "method"}),
            layer(mark("point", size=35), x=x, y=y, tooltip=tooltip),
        ]
    )


def times() -> Spec:
    """Milliseconds against tokens, both axes logarithmic."""
    x = number("x", "tokens", scale={"type": "log", "base": 2}, axis={"format": "~g", "grid": False})
    y = number("y", "ms (lower is better)", scale={"type": "log"}, axis={"format": "~g", "tickCount": 5})
    means = mean_over_seeds("y", "x")
    tooltip = hover(("method", "kernel"), ("x", "tokens"), ("y", "ms"), ("runs", "measurements"))
    return figure(
        [
            layer(mark("line", strokeWidth=1.5), transform=means, x=x, y=y, detail={"field": "method"}),
            layer(mark("point"), transform=means, x=x, y=y, tooltip=tooltip),
        ]
    )


def by_bits() -> Spec:
    """Perplexity against bits per weight, which are on a logarithmic axis, and the Pareto front of what is shown."""
    x = number("x", "bits per weight", scale={"type": "log", "base": 2}, axis={"format": "~g", "tickCount": 5})
    y = number("y", "perplexity (lower is better)", axis={"format": "~g", "tickCount": 6})
    seeds = mean_over_seeds("y", "x", "quantiser")
    tooltip = hover(
        ("method", "method"), ("quantiser", "values"), ("x", "bits per weight"), ("y", "perplexity"),
        ("spread", "standard deviation"), ("runs", "runs"),
    )  # fmt: skip
    along = {"sort": [{"field": "x"}, {"field": "y"}]}
    front = {
        "transform": [
            *seeds,
            along | {"window": [{"op": "min", "field": "y", "as": "best"}], "frame": [None, 0]},
            along | {"window": [{"op": "lag", "field": "best", "as": "before"}]},
            {"filter": "!isValid(datum.before) || datum.y < datum.before"},
        ],
        "mark": {"type": "line", "strokeDash": DASHED, "strokeWidth": 1.2, "color": "#888"},
        "encoding": {"x": x, "y": y, "tooltip": {"value": "Pareto front"}},
    }
    return figure(
        [
            front,
            layer(mark("line", strokeWidth=1.5), transform=seeds, x=x, y=y, detail={"field": "method"}),
            layer(mark("rule"), transform=seeds, x=x, y=y | {"field": "least"}, y2={"field": "most"}),
            layer(mark("point"), transform=seeds, x=x, y=y, tooltip=tooltip),
        ],
        height=320,
    )


def work(*, roofs: bool) -> Spec:
    """Work per second against work per byte, both logarithmic, and the limits of devices, where known, as lines."""
    x = number("x", "FLOP of the dense product per byte", scale={"type": "log"}, axis={"format": "~g", "tickCount": 5})
    y = number("y", "TFLOP/s of the dense product", scale={"type": "log"}, axis={"format": "~g", "tickCount": 5})
    tooltip = hover(
        ("method", "kernel"), ("layer", "layer"), ("tokens", "tokens"), ("x", "FLOP per byte"), ("y", "TFLOP/s")
    )
    roof = layer(mark("line", strokeWidth=1.2), transform=[{"filter": "isValid(datum.roof)"}], x=x, y=y)
    roof["encoding"] |= {"detail": {"field": "roof"}, "tooltip": hover(("roof", "line"))}
    roof["encoding"]["opacity"] = {"value": 0.6}
    points = layer(mark("point"), transform=[{"filter": "!isValid(datum.roof)"}], x=x, y=y, tooltip=tooltip)
    return figure([roof, points] if roofs else [points])


def channels(what: str, low: float, high: float, *, far: bool, many: int) -> Spec:
    """Each of `many` channels at its place, and the mean of every group as a line over its channels."""
    scale: Spec = {"type": "log", "nice": False} if far else {"zero": False, "nice": True}
    x = number("place", "place of the channel", axis={"format": "d", "grid": False})
    y = number("value", what, scale=scale | {"domain": [low, high]})
    tooltip = hover(("channel", "channel"), ("place", "place"), ("value", what))
    groups = hover(("place", "first place of the group"), ("mean", "mean of the group"))
    return figure(
        [
            layer(
                mark("point", size=max(6, min(30, 4000 / many))),
                transform=[{"filter": "isValid(datum.value)"}],
                x=x,
                y=y,
                tooltip=tooltip,
            ),
            layer(
                mark("rule", strokeWidth=2),
                transform=[{"filter": "isValid(datum.mean)"}],
                x=x | {"field": "begin"},
                x2={"field": "end"},
                y=y | {"field": "mean"},
                tooltip=groups,
            ),
        ],
        height=150,
    )
