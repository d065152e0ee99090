"""The pages of docs/: what scripts write is current, and the site builds without a warning or a fetch."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass, fields
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from esparse.cli import registry
from tests.workshop import ROOT

DOCS = ROOT / "docs"
NEEDED = bool(os.environ.get("ESPARSE_NEEDS_DOCS"))  # then a missing mkdocs is a failure


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


settings = script("settings")


def test_the_readme_fits_on_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_page_of_settings_is_current() -> None:
    assert settings.page() == settings.PAGE.read_text(), "run: python docs/settings.py"


def test_every_setting_and_option_is_explained() -> None:
    text = settings.PAGE.read_text()
    for group, known in registry.CHOICES.items():
        for component in known.values():
            assert all(settings.meanings(component).values()), f"{component.__name__}: a field without a comment"
            for field in fields(component):
                (row,) = re.findall(rf"^\| `{group}\.{field.name}` \|(.*)\|$", text, flags=re.M)
                assert not re.search(r"(: *$|: *;|\| *$)", row), f"{group}.{field.name} lacks a text"
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert re.search(rf"^\| `{re.escape(path.stem)}` \| \S", text, flags=re.M), path


def test_every_part_of_a_method_has_its_formula_and_source() -> None:
    text = (DOCS / "methods.md").read_text()
    for group in ("prepare", "metric", "allocation", "shuffle", "update", "recovery", "quantise"):
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert re.search(rf"^\| [^|]*`{path.stem}`[^|]* \|.*\|.*\|$", text, flags=re.M), f"{group}={path.stem}"


def test_a_fields_text_is_its_comment_and_the_lines_above() -> None:
    assert settings.meanings(Commented) == {"bare": "", "one": "of one", "two": "of two. More of it, on two lines"}
    row = settings.Setting
    lines = settings.table([row("a", "x", "1", "of a|b"), row("b", "x", "2", "else"), row("b", "y", "3", "y")], "g.")
    assert lines[2:] == ["| `g.x` | `a` 1; `b` 2 | of `a`: of a\\|b; of `b`: else |", "| `g.y` | 3 | of `b`: y |"]


@dataclass
class Commented:
    bare: int
    one: int  # of one
    # More of it,
    # on two lines
    two: int  # of two


def test_every_extra_is_explained() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]) - {"dev"}
    assert set(re.findall(r"^\| `(\w+)` \|", (DOCS / "quickstart.md").read_text(), flags=re.M)) == extras


def test_the_picture_shows_what_was_measured() -> None:
    picture = script("picture")
    values, dense = picture.perplexities()
    shown = re.findall(r">([\d.]+)</text>", picture.PICTURE.read_text())
    assert {f"{value:.1f}" for value in values.values()} <= set(shown)
    assert f"dense {dense:.1f}" in picture.PICTURE.read_text()
    readme = " ".join((ROOT / "README.md").read_text().split())
    names = ("entropy, shuffle", "ALPS towards dense, shuffle", "the same, distilled", "SparseGPT")
    shuffled, alps, best, sparsegpt = (values[name] for name in names)
    assert f"SparseGPT alone has {sparsegpt:.1f}" in readme
    assert f"from {shuffled:.1f} to {alps:.1f}, and distillation to {best:.1f} (dense {dense:.1f}; " in readme
    results = (DOCS / "results.md").read_text()
    readme_rows = {"packed": "esparse's kernel", "cusparselt": "cuSPARSELt 0.8.0"}
    for kernel, by_tokens in picture.speedups().items():
        ends = [by_tokens[min(by_tokens)], by_tokens[max(by_tokens)]]
        assert {f"{value:.2f}" for value in ends} <= set(shown)
        (row,) = re.findall(rf"^\| 2:4, `{kernel}` \|(.*)\|$", results, flags=re.M)
        assert [float(x) for x in re.findall(r"[\d.]+", row)] == [round(value, 2) for value in by_tokens.values()]
        (row,) = re.findall(rf"^\| {readme_rows[kernel]} \|(.*)\|$", (ROOT / "README.md").read_text(), flags=re.M)
        measured = [float(x) for x in re.findall(r"\d\.\d+", re.sub(r"\(.*?\)", "", row))]  # without the goals
        assert measured == [round(value, 2) for value in by_tokens.values()]


def test_the_map_of_the_code_is_right() -> None:
    """Every folder of esparse/ stands on it, and every file that it names is there."""
    text = (DOCS / "architecture.md").read_text()
    (tree,) = re.findall(r"^## Layout\n\n```\n(.*?)^```", text, flags=re.M | re.S)
    shown = set(re.findall(r"[\w./]+(?=/)|\w+\.py", tree))
    folders = {path.parent.name for path in (ROOT / "esparse").glob("*/__init__.py")}
    assert folders <= shown
    there = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    assert not [name for name in shown if name.endswith(".py") and name not in there]


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    assert not [path.name for path in DOCS.glob("*.md") if f": {path.name}\n" not in menu]


class Fetched(HTMLParser):
    """What a page loads by itself; links that a reader may follow are not among it."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named: dict[str, Any] = dict(attrs)
        if tag in ("script", "img", "iframe", "source") or (tag == "link" and named.get("rel") != "canonical"):
            self.urls.append(named.get("src") or named.get("href") or "")


@pytest.mark.skipif(not NEEDED and importlib.util.find_spec("material") is None, reason="pip install -e '.[docs]'")
def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    no_way_out = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | no_way_out)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted((tmp_path / "site").glob("*.html"))
    assert {path.stem for path in DOCS.glob("*.md")} <= {path.stem for path in pages}
    for path in pages:
        page = Fetched()
        page.feed(path.read_text())
        assert page.urls
        assert not [url for url in page.urls if re.match(r"(https?:)?//", url)], path.name
        if path.name != "404.html":
            local = [url.partition("?")[0] for url in page.urls if url and not url.startswith("data:")]
            assert all((path.parent / url).exists() for url in local), path.name
        assert "\\(" not in path.read_text().replace("\\(\\", "") or path.stem not in ("methods",), path.name
    methods = (tmp_path / "site" / "methods.html").read_text()
    assert methods.count("<math") > 60
    assert "arithmatex" not in methods
