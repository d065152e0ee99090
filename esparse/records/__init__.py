"""The record of a finished run, and the files beside it."""
