"""The name and the version of esparse's format, as config.json has them. Standard library only."""

FORMAT_NAME = "esparse"
VERSION = 1
