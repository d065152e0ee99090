"""Measuring quality; knows nothing of how a model was pruned."""
