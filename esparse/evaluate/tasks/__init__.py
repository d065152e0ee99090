"""esparse's own tasks in the form in which lm-eval finds them: a folder for its `--include_path`."""

from pathlib import Path

FOLDER = Path(__file__).parent
