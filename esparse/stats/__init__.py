"""Streaming statistics of one layer's input: metrics name the statistics they need, the block loop feeds them.

A statistic does not depend on how the tokens are cut into micro-batches, apart from rounding: sums of a channel are
kept in float64 (float32 within a tile), the Gram matrix in float32, counts as integers, and a statistic that needs the
value range first passes over the tokens twice. If several ranks each see a share of the tokens, `unite` combines their
statistics: counts and extremes equal those of one process exactly, sums up to rounding.
"""

from esparse.stats.channel_entropy import ColumnEntropy
from esparse.stats.channel_sums import ColumnMax, ColumnMoments, ColumnNorm
from esparse.stats.gram_matrix import CrossGram, Gram, StreamGram
from esparse.stats.statistic import Factory, LayerStats, Statistic, WeightGradient
from esparse.stats.token_sample import TokenSample

__all__ = [
    "ColumnEntropy",
    "ColumnMax",
    "ColumnMoments",
    "ColumnNorm",
    "CrossGram",
    "Factory",
    "Gram",
    "LayerStats",
    "Statistic",
    "StreamGram",
    "TokenSample",
    "WeightGradient",
]
