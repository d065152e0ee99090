"""`python -m esparse.sweep`: a sweep in a queue (esparse/sweeps/commands.py)."""

from esparse.parts import extras


def main() -> int:
    """What the command does; the exit code."""
    from esparse.sweeps.commands import main

    return main()


if __name__ == "__main__":
    raise SystemExit(extras.explained(main, program="esparse.sweep"))
