"""The HTML page: what stands in it, that it needs nothing else, and what a browser makes of it."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import re
import shutil
import time
from base64 import b64decode
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from esparse.reports.command import html
from esparse.reports.figures.catalogue import PICTURES
from esparse.reports.page import marks, vega
from esparse.reports.page.html_page import page
from esparse.reports.page.pictures import as_data, drawn
from esparse.reports.reading import read_records
from esparse.reports.tabulate import means, table_of
from tests.reports.test_pictures import RUNS, beside, furnished
from tests.reports.test_tables import command, record, write

FLAGS = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
FLAGS += " disable-component-update disable-sync"
WITHOUT = find_spec(vega.NEEDED) is None
needs_vega = pytest.mark.skipif(
    WITHOUT and "ESPARSE_NEEDS_BROWSER" not in os.environ, reason=f"{vega.missing()}: a page has no figures"
)


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


def packed(text: str, name: str) -> str:
    """What page.js finds under that name."""
    (data,) = re.findall(rf'<script type="text/plain" id="{name}">([^<]*)</script>', text)
    return gzip.decompress(b64decode(data)).decode()


@cache
def whole_page() -> Path:
    """The page of all kinds of runs, in the folder in which they lie."""
    root = Path(mkdtemp())
    beside(root)
    code, out, err = command(root, "--out", root / "page.html")
    assert (code, out) == (0, f"{root / 'page.html'}: a page of 4 runs\n") and (WITHOUT or err == ""), err
    return root / "page.html"


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    text = html(RUNS, title="Runs in <x>")
    seen = Seen(text)
    assert not seen.links and not re.search(r"url\((?!#)|@import|fetch\(|<link|<img", text)
    assert len(set(seen.ids)) == len(seen.ids)
    assert "magnitude &amp; &lt;co&gt;" in text and "<co>" not in text and "Runs in &lt;x&gt;" in text
    assert {"main", "h1", "table", "thead", "tbody"} <= set(seen.tags)
    assert text == html(RUNS, title="Runs in <x>")


@needs_vega
def test_all_pictures_are_in_it() -> None:
    text = whole_page().read_text()
    shown = json.loads(packed(text, "pictures"))
    assert [picture["name"] for picture in shown] == list(PICTURES) and "Not drawn" not in text
    assert {f"picture-{name}" for name in PICTURES} <= set(Seen(text).ids)
    assert "vegaEmbed" in packed(text, "library")


@needs_vega
def test_pictures_without_data_are_named_with_what_they_need() -> None:
    text = html(RUNS[3:], title="x")
    assert "Zero-shot tasks (with tasks (zeroshot=builtin, ...)); Zeros and near zeros (with profile=true); " in text


def test_a_page_without_vega_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vega, "library", lambda: None)
    text = html(RUNS, title="x")
    assert "Without figures: a page with figures needs vl-convert-python, which is not installed: pip install" in text
    assert 'id="pictures"' not in text and "<section" not in text and json.loads(packed(text, "facts"))["runs"]


def test_what_all_runs_share_stands_above_the_table() -> None:
    text = page(table_of(RUNS), RUNS, title="x")
    assert "4 runs of esparse. All have model <b>tiny</b>" in text
    assert '<button type="button">model</button>' not in text and ">pattern</button>" in text
    assert "1 run of esparse." in page(table_of(RUNS[:1]), RUNS[:1], title="x")


def test_days_versions_and_commits_stand_above_the_table() -> None:
    runs = [record("a"), record("b")]
    for run, day, commit in zip(runs, ("2026-11-28", "2026-11-27"), ("1a2b", "3c4d+"), strict=True):
        run |= {"started": f"{day}T07:16:26+0000", "environment": {"esparse": "0.2.0", "commit": commit, "device": "H"}}
    text = html(runs, title="x")
    assert "Run 2026-11-27 to 2026-11-28; esparse 0.2.0; commit 1a2b, 3c4d+; device H." in text


@pytest.mark.slow
def test_what_stands_behind_a_row(tmp_path: Path) -> None:
    experts = [{"name": f"h.0.up[{i}]", "shape": [4, 8], "kept_score": 0.5 + i, "density": 0.5} for i in (0, 1)]
    own = {"layers": [{"name": "h.0.q", "shape": [8, 8], "relative_error": math.inf, "density": 0.5}, *experts]}
    own |= {"started": "2026-11-28T07:16:26+0000", "seconds_by_stage": {"load": 1.25, "bench": 0.0}}
    own |= {"environment": {"esparse": "0.2.0", "commit": "1a2b", "device": "H", "threads": 2}}
    write(tmp_path / "runs", record("a", alpha=0.5) | own, record("b", metric="entropy"))
    (tmp_path / "runs" / "a" / "run.log").touch()
    (tmp_path / "pages").mkdir()
    code, _, _ = command(tmp_path / "runs", "--out", tmp_path / "pages" / "p.html")
    assert code == 0
    facts = json.loads(packed((tmp_path / "pages" / "p.html").read_text(), "facts"))
    run, other = facts["runs"]["a"], facts["runs"]["b"]
    assert run["links"] == [
        ["record", "../runs/a/result.json"],
        ["log", "../runs/a/run.log"],
        ["folder", "../runs/a"],
    ]
    assert dict(run["facts"]) == {
        "started": "2026-11-28 07:16:26+0000",
        "took": "2.5 s: load 1.25",
        "commit": "1a2b",
        "versions": "esparse 0.2.0",
        "on": "H, 2 threads",
        "pattern holds": "yes",
    }
    assert run["settings"].items() >= {"metric": "wanda", "metric.alpha": "0.5", "model.devices": "a"}.items()
    assert other["settings"]["metric"] == "entropy" and "metric.alpha" not in other["settings"]
    assert facts["shared"].items() >= {"pattern": "2:4", "calibration.sequences": "8"}.items()
    assert run["measured"]["builtin ppl pruned"] == "15.00"
    shape = facts["shapes"][run["layers"]["of"]]
    assert shape == {"names": ["h.0.q", "h.0.up (2 experts, mean)"], "shapes": ["8 × 8", "4 × 8"]}
    assert {k: v for k, v in run["layers"].items() if k != "of"} == {
        "density": [0.5, 0.5],
        "relative_error": [None, None],  # JSON has no infinity
        "kept_score": [None, 1.0],
    }


def test_columns_are_explained() -> None:
    text = html(RUNS, title="x")
    assert "<dt>error</dt><dd>Mean over the layers of ‖X(W − W′)ᵀ‖ / ‖XWᵀ‖" in text
    assert "<dt>builtin ppl pruned</dt>" in text and "never between metrics" in text
    assert "device MiB" not in text  # no run has it


@pytest.mark.parametrize("across", ["--across", "--pairs"])
def test_kept_scores_of_two_metrics_are_not_compared(across: str, tmp_path: Path) -> None:
    write(tmp_path, *RUNS)
    code, _, err = command(tmp_path, across, "metric", "--value", "kept")
    assert code == 2 and "a kept score is a share of the metric's own score" in err


def test_rows_sorted_by_kept_stay_with_their_metric() -> None:
    runs = [record("a", metric="wanda"), record("b", metric="entropy"), record("c", metric="wanda")]
    for run, value in zip(runs, (0.9, 0.5, 0.1), strict=True):
        run["layers"] = [{"kept_score": value}]
    assert [row["id"] for row in table_of(runs, sort="kept").rows] == ["b", "c", "a"]


def test_rows_of_means_and_turned_tables_know_their_runs() -> None:
    runs = [record("a"), record("b", seed=1), record("c", pattern="4:8")]
    assert 'data-runs="a b"' in page(means(table_of(runs)), runs, title="x")
    assert 'data-runs="a b c"' in html(runs, title="x", across=["pattern"])


@pytest.mark.slow
def test_means_and_turned_tables_make_pages_too(tmp_path: Path) -> None:
    write(tmp_path / "runs", *RUNS)
    for extra in ([], ["--mean"], ["--across", "pattern"], ["--pairs", "metric"], ["--profile"]):
        code, out, err = command(tmp_path / "runs", "--out", tmp_path / "p.html", *extra)
        if extra == ["--pairs", "metric"]:  # no two runs differ in it alone
            assert code == 2
            continue
        assert code == 0 and out.startswith(f"{tmp_path / 'p.html'}: a page of ") and (WITHOUT or err == "")
        assert "<h1>Runs in runs</h1>" in (tmp_path / "p.html").read_text()
    code, _, err = command(tmp_path / "runs", "--out", tmp_path / "p.svg", "--plot", "errors")
    assert (code, err) == (0, "") and "<svg" in (tmp_path / "p.svg").read_text()


# ---- Charts, as rows that Vega draws.


def rows_of(runs: list[dict[str, Any]], name: str) -> dict[str, list[dict[str, Any]]]:
    group = drawn(runs)[name]
    return {chart.title: chart.rows for chart in group.charts}


def test_perplexities_as_rows_by_hand() -> None:
    (rows,) = rows_of(RUNS, "perplexity").values()
    shown = [(row["run"], row["method"], row["label"], row["ppl"], row["dense"]) for row in rows]
    assert shown == [  # of d4 none was measured; what is not finite is no number
        ("b2", "entropy", "2:4", 100, 10),
        ("c3", "magnitude & <co>", "4:8", None, 10),
        ("a1", "wanda", "16:32", 9.5, 10),
    ]


def test_blocks_as_rows_by_hand() -> None:
    (rows,) = rows_of(RUNS[:1], "errors").values()
    assert [(row["block"], row["value"]) for row in rows] == [(0, 0.1), (1, 0.2), (10, 1.1)]
    kept = rows_of([furnished("a", metric="wanda"), furnished("b", metric="ria")], "kept")
    assert list(kept) == ["tiny, 2:4, ria", "tiny, 2:4, wanda"]
    shuffled = furnished("c", metric="ria")
    shuffled["config"]["choices"]["shuffle"] = "gns"
    (rows,) = rows_of([furnished("b", metric="ria"), shuffled], "kept").values()
    assert {row["method"]: row["label"] for row in rows} == {"ria": "metric alone", "ria + gns": "gns"}


def test_latency_and_work_as_rows_by_hand() -> None:
    one = RUNS[0] | {"limits": {"copy_bytes_per_s": 1e9, "flop_per_s": {"": 1e9}}}
    times = [(row["label"], row["x"], row["y"]) for row in rows_of([one], "latency")["64 × 32"]]
    assert times[:4] == [("dense", 1, 2), ("packed", 1, 1), ("dense", 16, 32), ("packed", 16, 16)]
    work = rows_of([one], "roofline")[""]
    # One token through 64 x 32: 4096 FLOP on 2 (2048 + 96) bytes, in 2 ms; packed in 1 ms.
    for row, seconds in zip(work[:2], (2e-3, 1e-3), strict=True):
        assert (row["x"], row["y"]) == pytest.approx((4096 / 4288, 4096 / seconds / 1e12), rel=1e-3)
    assert [row["y"] for row in work if "roof" in row] == pytest.approx([4096 / 4288 / 1e3, 1e-3, 1e-3], rel=1e-3)


@needs_vega
@pytest.mark.parametrize("name", PICTURES)
def test_vega_takes_every_chart(name: str, tmp_path: Path) -> None:
    import vl_convert

    (picture,) = (p for p in as_data(drawn(beside(tmp_path))) if p["name"] == name)
    for chart in picture["charts"]:
        text = json.dumps(chart["spec"]).replace('"$order"', "[]").replace('"$scale"', '{"type": "log"}')
        text = text.replace('"$low"', "0").replace('"$high"', "1")
        assert "$" not in text
        svg = vl_convert.vegalite_to_svg(json.loads(text) | {"width": 300, "data": {"values": chart["rows"]}})
        assert "<svg" in svg and "mark-symbol" in svg


def many(root: Path, runs: int, blocks: int) -> Path:
    """Records as of a model with so many blocks of seven layers, with numbers that cannot be compressed."""
    draw = random.Random(0)
    names = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    for i in range(runs):
        metric, shuffle = ("entropy", "wanda", "magnitude", "ria")[i % 4], ("none", "gns", "lbs")[i // 4 % 3]
        one = record(
            f"{i:08x}", metric=metric, pattern=("2:4", "4:8")[i // 12 % 2], seed=i // 24, pruned=10 + 20 * draw.random()
        )
        one["config"]["choices"]["shuffle"] = shuffle
        one["layers"] = [
            {"name": f"model.layers.{block}.{name}", "shape": [4096, 4096], "density": 0.5}
            | {field: draw.random() for field in ("relative_error", "kept_score", "seconds")}
            for block in range(blocks)
            for name in names
        ]
        write(root, one)
    return root


@needs_vega
@pytest.mark.slow
def test_three_hundred_runs_are_a_page_below_five_megabytes(tmp_path: Path) -> None:
    text = html(read_records(many(tmp_path, 300, 32)), title="x")
    assert len(text.encode()) < 5e6 and len(json.loads(packed(text, "facts"))["runs"]) == 300


# ---- In a browser.


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


def wait(browser: Any) -> None:
    """Until all figures are drawn."""
    end = time.monotonic() + 60
    while browser.execute_script("return document.body.dataset.drawn") != "all":
        assert time.monotonic() < end, "the figures were not drawn"
        time.sleep(0.05)


def look(browser: Any, file: Path, *, width: int = 1280, scheme: str = "light") -> None:
    """Opens a page in a window of that width, or in the one and the other color scheme."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(file.as_uri())
    wait(browser)


def shown(browser: Any) -> list[str]:
    rows = browser.find_elements("css selector", "tr.run")
    return [row.get_attribute("data-runs") for row in rows if row.is_displayed()]


def head(browser: Any, column: str) -> Any:
    return browser.find_element("xpath", f"//th[button='{column}']")


def test_a_browser_sorts_the_table(browser: Any) -> None:
    look(browser, whole_page())

    def click(column: str) -> tuple[str | None, list[str]]:
        head(browser, column).find_element("tag name", "button").click()
        return head(browser, column).get_attribute("aria-sort"), shown(browser)

    assert shown(browser) == ["b2", "d4", "c3", "a1"]  # by pattern, as every table is
    assert click("builtin ppl pruned") == ("ascending", ["a1", "b2", "c3", "d4"])  # 9.5, 100, inf, nothing
    assert click("builtin ppl pruned") == ("descending", ["c3", "b2", "a1", "d4"])
    assert click("pattern") == ("ascending", ["b2", "d4", "c3", "a1"])  # 16:32 behind 4:8
    assert head(browser, "builtin ppl pruned").get_attribute("aria-sort") is None
    head(browser, "id").find_element("tag name", "button").send_keys("\ue007")  # the enter key
    assert shown(browser) == ["a1", "b2", "c3", "d4"]
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_a_browser_sorts_kept_scores_within_their_metric(browser: Any, tmp_path: Path) -> None:
    runs = [record("a", metric="wanda"), record("b", metric="entropy"), record("c", metric="wanda")]
    for run, value in zip(runs, (0.9, 0.5, 0.1), strict=True):
        run["layers"] = [{"kept_score": value}]
    (tmp_path / "p.html").write_text(html(runs, title="x"), encoding="utf-8")
    look(browser, tmp_path / "p.html")
    head(browser, "kept").find_element("tag name", "button").click()
    assert shown(browser) == ["b", "c", "a"]
    assert "not to be compared" in browser.find_element("css selector", "#hint").text


@pytest.mark.slow
def test_a_browser_finds_rows(browser: Any) -> None:
    look(browser, whole_page())
    find = browser.find_element("css selector", "input[type=search]")

    def found() -> tuple[list[str], str]:
        return shown(browser), browser.find_element("tag name", "output").text

    find.send_keys("2:4")
    assert found() == (["b2", "d4"], "2 of 4 rows")
    find.send_keys(" ENTROPY")
    assert found() == (["b2"], "1 of 4 rows")
    find.clear()
    find.send_keys(" ")
    assert found() == (["b2", "d4", "c3", "a1"], "")


@pytest.mark.slow
@needs_vega
def test_figures_follow_the_filter(browser: Any) -> None:
    look(browser, whole_page())

    def titles(name: str) -> list[str]:
        return [f.text for f in browser.find_elements("css selector", f"#picture-{name} figcaption")]

    assert titles("errors") == ["tiny, 2:4", "tiny, 4:8", "tiny, 16:32"]
    browser.find_element("css selector", "input[type=search]").send_keys("16:32")
    time.sleep(0.3)
    wait(browser)
    assert titles("errors") == ["tiny, 16:32"] and titles("channels") == []
    legend = browser.find_elements("css selector", "#picture-errors .legend button")
    assert [entry.text for entry in legend] == ["wanda"]
    said = browser.find_element("css selector", "#picture-channels .said").text
    assert said == "No run that is shown has something for it."


@pytest.mark.slow
@needs_vega
def test_a_mark_says_its_values(browser: Any) -> None:
    from selenium.webdriver import ActionChains

    look(browser, whole_page())
    (mark, *_) = browser.find_elements("css selector", "#picture-errors .mark-symbol path")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", mark)
    ActionChains(browser).move_to_element(mark).perform()
    time.sleep(0.3)
    said = browser.find_element("css selector", "#vg-tooltip-element").text
    assert re.sub(r"\s+", " ", said) == "method entropy block 0 mean relative error 0.1 runs 1"


@pytest.mark.slow
def test_a_row_folds_out(browser: Any) -> None:
    look(browser, whole_page())
    browser.find_element("css selector", "tr[data-runs=c3] button.fold").click()
    inside = browser.find_element("css selector", "tr.details")
    assert "Settings in which runs of this page differ" in inside.text
    links = {a.text: a.get_attribute("href") for a in inside.find_elements("tag name", "a")}
    assert links["record"] == (whole_page().parent / "c3" / "result.json").as_uri()
    layers = browser.find_elements("css selector", ".inside tbody tr")
    assert len(layers) == 6 and layers[0].text.split()[:2] == ["model.layers.0.self_attn.q_proj", "0.1"]
    head(browser, "pattern").find_element("tag name", "button").click()  # it goes along with its row
    head(browser, "pattern").find_element("tag name", "button").click()
    rows = browser.find_elements("css selector", "#table > table > tbody > tr")
    places = [row.get_attribute("data-runs") for row in rows]
    assert places == ["a1", "c3", None, "b2", "d4"]
    browser.find_element("css selector", "tr[data-runs=c3] button.fold").click()
    assert not browser.find_elements("css selector", "tr.details")


@pytest.mark.slow
def test_what_differs_between_ticked_runs(browser: Any, tmp_path: Path) -> None:
    runs = [record("a", pruned=9.5), record("b", pruned=11.0, pattern="4:8"), record("c", metric="entropy")]
    for run, value in zip(runs, (0.9, 0.5, 0.1), strict=True):
        run["layers"] = [{"kept_score": value}]
    (tmp_path / "p.html").write_text(html(runs, title="x"), encoding="utf-8")
    look(browser, tmp_path / "p.html")
    place = browser.find_element("css selector", "#differences")

    def ticked(run: str) -> list[str]:
        browser.find_element("css selector", f"tr[data-runs={run}] input").click()
        return [row.text for row in place.find_elements("css selector", "tbody tr")]

    assert ticked("a") == [] and place.text == "Tick another run to see what differs between the two."
    rows = ticked("b")
    assert {"setting pattern 2:4 4:8", "measured builtin ppl pruned 9.50 11.00", "measured kept 0.9000 0.5000"} < set(
        rows
    )
    ticked("b")
    rows = ticked("c")  # of another metric, and behind `a` in the table
    assert "setting metric entropy wanda" in rows or "setting metric wanda entropy" in rows
    assert not any(" kept " in row for row in rows) and "Kept scores are left out" in place.text


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_the_window(browser: Any, width: int) -> None:
    look(browser, whole_page(), width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    column = head(browser, "builtin ppl pruned")
    assert column.location["x"] + column.size["width"] <= width
    pictures = browser.find_elements("css selector", "figure svg.marks")
    assert WITHOUT or len(pictures) >= len(PICTURES)
    assert all(picture.size["height"] > 60 and picture.size["width"] <= width for picture in pictures)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(browser: Any, scheme: str) -> None:
    look(browser, whole_page(), scheme=scheme)

    def light(color: str) -> float:
        return sum(int(part) for part in re.findall(r"\d+", color)[:3]) / (3 * 255)

    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    ink, paper = (light(browser.execute_script(style, "body", what)) for what in ("color", "backgroundColor"))
    assert abs(ink - paper) > 0.7 and (paper > ink) == (scheme == "light")
    if not WITHOUT:  # the numbers of an axis
        label = light(browser.execute_script(style, "figure .role-axis-label text", "fill"))
        assert abs(label - paper) > 0.7
        other = {"light": "dark", "dark": "light"}[scheme]  # a reader changes it while the page is open
        features = [{"name": "prefers-color-scheme", "value": other}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        time.sleep(0.3)
        wait(browser)
        assert abs(light(browser.execute_script(style, "figure .role-axis-label text", "fill")) - label) > 0.5


@needs_vega
def test_the_front_of_perplexity_by_bits_is_what_no_run_is_ahead_of() -> None:
    """Drawn by Vega, as a browser does: the dashed line has these corners, of means over seeds."""
    import vl_convert

    points = [("a", 4.0, 11.0), ("a", 2.0, 22.0), ("a", 2.0, 24.0)]
    points += [("b", 3.0, 25.0), ("b", 4.0, 12.0), ("b", 16.0, 10.0)]
    rows = [
        {"run": f"{i}", "method": name, "label": name, "style": [0, 0], "quantiser": f"{x}", "x": x, "y": y}
        for i, (name, x, y) in enumerate(points)
    ]
    spec = marks.by_bits() | {"width": 300, "data": {"values": rows}}
    spec["layer"] = [layer for layer in spec["layer"] if "strokeDash" in layer["mark"]]  # the front alone
    (front,) = re.findall(r'aria-roledescription="line mark"[^>]* d="([^"]*)"', vl_convert.vegalite_to_svg(spec))
    corners = [tuple(map(float, corner.split(","))) for corner in re.split("[ML]", front)[1:]]
    assert len(corners) == 3
    (left, first), (middle, second), (right, third) = corners
    assert (middle - left) / (right - left) == pytest.approx(1 / 3, rel=1e-4)  # 2, 4 and 16 bits on a logarithmic axis
    assert (first - second) / (first - third) == pytest.approx((23 - 11) / (23 - 10), rel=1e-4)


@needs_vega
def test_each_dense_perplexity_has_a_line_of_its_own() -> None:
    """Runs on other parts of a text have other dense perplexities, and no model has the mean of these."""
    import vl_convert

    rows = [
        {"run": f"{x}", "method": "a", "label": "2:4", "style": [0, 0], "ppl": 40, "dense": x} for x in (10, 10, 20)
    ]
    spec = marks.listed() | {"width": 300, "data": {"values": rows}}
    text = json.dumps(spec).replace('"$order"', "[]").replace('"$scale"', '{"type": "linear"}')
    svg = vl_convert.vegalite_to_svg(json.loads(text))
    assert sorted(re.findall(r"; dense perplexity: (\d+)", svg)) == ["10", "20"]
