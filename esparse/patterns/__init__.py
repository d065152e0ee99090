"""Sparsity patterns: which weights may survive together. The only place that knows groups of m.

Polarity: a boolean mask is always called `keep`; True means the weight survives. In `n:m`, n weights survive.
Ties: of equal scores the one with the lowest index survives.
"""

from esparse.patterns.nm import NM, Pattern
from esparse.patterns.order import Grouping
from esparse.patterns.outliers import Outliers
from esparse.patterns.percent import Columns, Rows, Tiles, Unstructured
from esparse.patterns.text import from_str, parse

__all__ = ["NM", "Columns", "Grouping", "Outliers", "Pattern", "Rows", "Tiles", "Unstructured", "from_str", "parse"]
