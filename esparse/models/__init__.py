"""Loads models and runs them block by block. This package does not know what sparsity is."""
