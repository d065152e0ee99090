"""`python -m esparse.tables`: a table of many records (esparse/reports/command.py)."""

from esparse.parts import extras
from esparse.reports.command import main

if __name__ == "__main__":
    raise SystemExit(extras.explained(main, program="esparse.tables"))
