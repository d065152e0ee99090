"""The library that draws the figures of a page: Vega, Vega-Lite and vega-embed, as vl-convert-python brings them.

Measured on 2026-11-28 with vl-convert-python 1.9: 898 KB of JavaScript, 305 KB compressed; plotly.js of plotly 7.1 has
4.8 MB, 1.4 MB compressed.
"""

from __future__ import annotations

import functools
from typing import Any

from esparse.parts import extras

NEEDED = "vl_convert"


@functools.cache
def library() -> str | None:
    """Its JavaScript, which makes `vegaEmbed` a name of the page; None if the package is not installed."""
    try:
        import vl_convert
    except ImportError:
        return None
    bundle: Any = vl_convert.javascript_bundle  # its stub asks for an argument that may be left out
    source: str = bundle()
    return source


def missing() -> str:
    """What to say where there is none."""
    return extras.sentence(NEEDED, "a page with figures") or ""
