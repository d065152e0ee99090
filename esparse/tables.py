"""`python -m esparse.tables`: a table of many records (esparse/reports/command.py)."""

from esparse.reports.command import main

if __name__ == "__main__":
    raise SystemExit(main())
