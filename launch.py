"""The command `esparse` in a checkout that is not installed: `python launch.py [-m] [group=option] [key=value] ...`."""

import sys

from esparse.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
