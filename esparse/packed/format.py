"""Name and version of esparse's packed format in config.json. Standard library only."""

FORMAT_NAME = "esparse"
VERSION = 1
