"""Sparsity patterns: rules for which weights may be kept together. The only place that knows groups of m.

Polarity: a boolean mask is always called `keep`; True means the weight is kept. In `n:m`, n weights of m are kept.
Ties: of equal scores the lowest index is kept.
"""

from esparse.patterns.dense import Dense
from esparse.patterns.nm import NM, Pattern
from esparse.patterns.order import Grouping
from esparse.patterns.outliers import Outliers
from esparse.patterns.percent import Columns, Rows, Tiles, Unstructured
from esparse.patterns.text import from_str, parse

__all__ = [
    "NM",
    "Columns",
    "Dense",
    "Grouping",
    "Outliers",
    "Pattern",
    "Rows",
    "Tiles",
    "Unstructured",
    "from_str",
    "parse",
]
