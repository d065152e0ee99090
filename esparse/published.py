"""`python -m esparse.published`: measured numbers beside published ones (esparse/reports/literature.py)."""

from esparse.parts import extras
from esparse.reports.literature import main

if __name__ == "__main__":
    raise SystemExit(extras.explained(main, program="esparse.published"))
