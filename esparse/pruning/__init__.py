"""Pruning a model block by block: what is done to a block, and what a run goes on from."""
