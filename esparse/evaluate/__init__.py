"""Measures quality. This package does not know how a model was pruned."""
