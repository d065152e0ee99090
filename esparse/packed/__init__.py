"""Weights without their zeros: the format on disk and in memory, the layer, and the way into transformers."""
