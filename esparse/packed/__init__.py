"""Packed weights, stored without their zeros: formats on disk and in memory, layers, the plug-in for transformers."""
