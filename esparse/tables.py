"""`python -m esparse.tables`: a table of many records (esparse/reports/formats.py)."""

from esparse.parts import extras
from esparse.reports.formats import main

if __name__ == "__main__":
    raise SystemExit(extras.explained(main, program="esparse.tables"))
