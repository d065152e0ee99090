"""What mkdocs does to these pages: formulas become MathML, which browsers draw by themselves, and links find their end.

The pages are written to be read in the repository as well. There a link may lead to any file; on the site a file
outside of docs/ is named by its path instead, and the pictures among them are copied.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', flags=re.S)


def on_files(files: Any, config: Any) -> Any:
    """Pictures that pages show from elsewhere in the repository."""
    for page in files.documentation_pages():
        for picture, _, target, _ in LINK.findall(page.content_string):
            if picture:
                files.append(File.generated(config, copied(target), abs_src_path=str(ROOT / within(target))))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return LINK.sub(lambda found: shown(*found.groups()), markdown)


def shown(picture: str, words: str, target: str, place: str | None) -> str:
    if picture:
        return f"![{words}]({copied(target)})"
    path = within(target).rstrip("/")
    return f"`{path}`" if words.strip("/") in (path, posixpath.basename(path)) else f"{words} (`{path}`)"


def within(target: str) -> str:
    """The path in the repository."""
    return posixpath.normpath(posixpath.join("docs", target))


def copied(target: str) -> str:
    """The path on the site of a picture that lies outside of docs/."""
    return "assets/" + within(target).replace("/", "-")


def on_page_content(content: str, **_: Any) -> str:
    return FORMULA.sub(formula, content)


def formula(found: re.Match[str]) -> str:
    inline = found[1] == "span"
    drawn = convert(html.unescape(found[2]), display="inline" if inline else "block")
    drawn = drawn.replace("<mo>&#x0007C;</mo>", '<mo lspace="0.1em" rspace="0.1em">&#x0007C;</mo>')  # no infix: |w|
    return drawn if inline else f'<div class="formula">{drawn}</div>'
