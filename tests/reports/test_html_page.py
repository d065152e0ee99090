"""The HTML page: what stands in it, that it needs nothing else, and that a browser sorts its table."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from safetensors.numpy import save_file

from esparse.reports.command import html
from esparse.reports.figures import plots
from esparse.reports.figures.catalogue import PICTURES, draw, plot, svg
from esparse.reports.html_page import page
from esparse.reports.reading import read_records
from esparse.reports.tabulate import table_of
from tests.reports.test_channels import DEALT_I, SCALES, VALUES_I
from tests.reports.test_tables import command, record, write

FLAGS = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
FLAGS += " disable-component-update disable-sync"


def furnished(run: str, **settings: Any) -> dict[str, Any]:
    """A record with something for every picture."""
    one = record(run, **settings)
    one["layers"] = [
        {"name": f"model.layers.{block}.{layer}", "relative_error": 0.1 * (block + 1), "kept_score": 0.9 - 0.1 * block}
        | {"pattern": one["sparsity"]["pattern"]}
        for block in (0, 1, 10)
        for layer in ("self_attn.q_proj", "mlp.down_proj")
    ]
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
    [("errors", "lowest", range(10)), ("kept", "highest", range(2, 12)), ("tasks", "highest", range(2, 12))],
)
def test_of_many_methods_the_best_are_shown(name: str, which: str, shown: range) -> None:
    figure = draw(name, many())
    labels = {label for ax in figure.axes for label in ax.get_legend_handles_labels()[1]} - {"dense"}
    assert labels == {f"m{i}" for i in shown}
    assert figure.get_suptitle() == f"the 10 {which} of 12 methods"
    assert draw(name, RUNS[:1]).get_suptitle() == ""


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
    element = svg(name, draw(name, runs))
    assert element.startswith("<svg role=") and element == svg(name, draw(name, runs))


class Seen(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href"):
                self.links.append(str(value))


@cache
def whole_page() -> str:
    with TemporaryDirectory() as root:
        return html(beside(Path(root)), title="Runs in <x>")


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    text = whole_page()
    seen = Seen(text)
    assert seen.tags.count("svg") == len(PICTURES) and "Not drawn" not in text
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in seen.links)
    assert not re.search(r"url\((?!#)|@import|fetch\(|<link|<img", text)
    assert len(set(seen.ids)) == len(seen.ids)
    assert "magnitude &amp; &lt;co&gt;" in text and "<co>" not in text and "Runs in &lt;x&gt;" in text
    assert {"main", "h1", "table", "thead", "tbody"} <= set(seen.tags)


def test_pictures_without_data_are_named_with_what_they_need() -> None:
    text = html(RUNS[3:], title="x")
    assert "Zero-shot tasks (with tasks (zeroshot=builtin, ...)); Zeros and near zeros (with profile=true); " in text


def test_what_all_runs_share_stands_above_the_table() -> None:
    text = page(table_of(RUNS), RUNS, title="x")
    assert "4 runs of esparse. All have model <b>tiny</b>" in text
    assert '<button type="button">model</button>' not in text and ">pattern</button>" in text
    assert "1 run of esparse." in page(table_of(RUNS[:1]), RUNS[:1], title="x")


def test_means_and_turned_tables_make_pages_too(tmp_path: Path) -> None:
    write(tmp_path / "runs", *RUNS)
    for extra in ([], ["--mean"], ["--across", "pattern"]):
        code, out, err = command(tmp_path / "runs", "--out", tmp_path / "p.html", *extra)
        assert (code, out, err) == (0, "", "")
        assert "<h1>Runs in runs</h1>" in (tmp_path / "p.html").read_text()
    code, _, err = command(tmp_path / "runs", "--out", tmp_path / "p.svg", "--plot", "errors")
    assert (code, err) == (0, "") and "<svg" in (tmp_path / "p.svg").read_text()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if None in paths.values():
        missing = ", ".join(name for name, path in paths.items() if path is None)
        if "ESPARSE_NEEDS_BROWSER" in os.environ:
            pytest.fail(f"{missing} is not installed")
        pytest.skip(f"{missing} is not installed: nothing to open the page in")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = paths["chromium"]
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths["chromedriver"]))
    yield driver
    driver.quit()


def test_a_browser_sorts_the_table(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(whole_page(), encoding="utf-8")
    browser.get((tmp_path / "page.html").as_uri())

    def shown() -> list[str]:
        return [cell.text for cell in browser.find_elements("css selector", "tbody td:first-child")]

    def head(column: str) -> Any:
        return browser.find_element("xpath", f"//th[button='{column}']")

    def click(column: str) -> tuple[str | None, list[str]]:
        head(column).find_element("tag name", "button").click()
        return head(column).get_attribute("aria-sort"), shown()

    assert shown() == ["b2", "d4", "c3", "a1"]  # by pattern, as every table is
    assert click("builtin ppl pruned") == ("ascending", ["a1", "b2", "c3", "d4"])  # 9.5, 100, inf, nothing
    assert click("builtin ppl pruned") == ("descending", ["c3", "b2", "a1", "d4"])
    assert click("pattern") == ("ascending", ["b2", "d4", "c3", "a1"])  # 16:32 behind 4:8
    assert head("builtin ppl pruned").get_attribute("aria-sort") is None
    head("id").find_element("tag name", "button").send_keys("\ue007")  # the enter key
    assert shown() == ["a1", "b2", "c3", "d4"]
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_browser_finds_rows(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(whole_page(), encoding="utf-8")
    browser.get((tmp_path / "page.html").as_uri())
    find = browser.find_element("css selector", "input[type=search]")

    def shown() -> tuple[list[str], str]:
        rows = [row for row in browser.find_elements("css selector", "tbody tr") if row.is_displayed()]
        return [row.text.split()[0] for row in rows], browser.find_element("tag name", "output").text

    find.send_keys("2:4")
    assert shown() == (["b2", "d4"], "2 of 4 rows")
    find.send_keys(" ENTROPY")
    assert shown() == (["b2"], "1 of 4 rows")
    find.clear()
    find.send_keys(" ")
    assert shown() == (["b2", "d4", "c3", "a1"], "")


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_the_window(browser: Any, tmp_path: Path, width: int) -> None:
    (tmp_path / "page.html").write_text(whole_page(), encoding="utf-8")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.get((tmp_path / "page.html").as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    pictures = browser.find_elements("css selector", "figure svg")
    assert len(pictures) == len(PICTURES) and all(picture.size["height"] > 100 for picture in pictures)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(browser: Any, tmp_path: Path, scheme: str) -> None:
    (tmp_path / "page.html").write_text(whole_page(), encoding="utf-8")
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get((tmp_path / "page.html").as_uri())

    def light(what: str) -> float:
        script = "return getComputedStyle(document.body)[arguments[0]]"
        return sum(int(part) for part in re.findall(r"\d+", browser.execute_script(script, what))[:3]) / (3 * 255)

    ink, paper = light("color"), light("backgroundColor")
    assert abs(ink - paper) > 0.7 and (paper > ink) == (scheme == "light")
