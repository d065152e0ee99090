"""Prunes a language model and measures it: `esparse [-m] [group=option] [key=value] ...`.

    esparse                                                the built-in model at 2:4, by default
    esparse -m metric=entropy,wanda pattern=2:4,4:8        a sweep
    esparse --help                                         every group and setting
    esparse --version                                      the version alone

`python -m esparse` and, in a checkout, `python launch.py` are the same command.
Exit code: 0 all runs finished (now or before), 1 a run failed, 2 a mistake on the command line, 130 Ctrl-C,
143 SIGTERM, 129 SIGHUP.
"""

import sys

from esparse import __version__
from esparse.parts import extras


def main() -> int:
    """The console command `esparse`."""
    if sys.argv[1:] == ["--version"]:
        print(f"esparse {__version__}")
        return 0
    return extras.explained(_launched, program="the command line")


def _launched() -> int:
    from esparse.cli.launch import main

    return main()


if __name__ == "__main__":
    sys.argv[0] = "esparse"  # the program's name in the usage line
    sys.exit(main())
