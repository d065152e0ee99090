"""Sweeps in a queue: submitting runs, running them on nodes, and managing them from any terminal."""
