"""`python -m esparse.sweep`: a sweep in a queue (esparse/sweeps/commands.py)."""

from esparse.sweeps.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
