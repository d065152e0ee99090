"""The names under which launch.py and the configuration ask for what lies in this folder's other files."""

from esparse.cli.attempt import carry_out
from esparse.cli.main import exit_code, mistakes
from esparse.cli.sweep_check import Sweep

__all__ = ["Sweep", "carry_out", "exit_code", "mistakes"]
