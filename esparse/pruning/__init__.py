"""Prunes a model block by block, and keeps a journal from which a stopped run continues."""
