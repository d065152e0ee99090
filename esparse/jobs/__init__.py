"""Runs as jobs: which process owns a run, the state of runs, and queries to a queue."""
