"""Runs one run on several processes (ranks) and on several CPU cores."""
