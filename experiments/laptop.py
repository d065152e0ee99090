"""Runs the laptop version of every experiment and writes what came out into README.md beside this file.

    python experiments/laptop.py                    # all; those that ran before are read from their records
    python experiments/laptop.py ladder structure   # some; the others' tables stay as they are

An experiment's laptop version stands in its own file, below "# On a laptop:": the runs, then the table.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE / "README.md"
BEGIN, END = "<!-- laptop -->", "<!-- /laptop -->"


def commands(experiment: Path) -> list[list[str]]:
    """The words of the commands below "# On a laptop:", or none."""
    _, _, behind = experiment.read_text(encoding="utf-8").partition("\n# On a laptop:\n")
    lines = re.match(r"(?:#   .*\n)*", behind)
    text = lines.group().replace("#   ", "") if lines else ""
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]


def carried_out(experiment: Path, output_root: Path) -> str:
    """Runs an experiment and returns its part of the page; RuntimeError where it failed."""
    run, table = commands(experiment)
    folder = output_root / experiment.stem
    begun = time.monotonic()
    _done([*run, f"output_root={folder}"])
    seconds = time.monotonic() - begun
    rows = _done([folder if word.startswith("outputs/") else word for word in table])
    records = [json.loads(path.read_text()) for path in folder.glob("*/result.json")]
    last = max(record["started"] for record in records)[:10]
    said = f"{len(records)} runs, the last one of {last}"
    print(f"{experiment.stem}: {said}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return f"### {experiment.stem}\n\n{said}. `{shlex.join(run)}`\n\n{rows}"


def _done(words: list[object]) -> str:
    called = [sys.executable, *map(str, words[1:])]
    done = subprocess.run(called, cwd=HERE.parent, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(map(str, words))} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def parts(page: str) -> dict[str, str]:
    """The page's parts by experiment."""
    inside = page.partition(BEGIN)[2].partition(END)[0]
    return {part.split("\n", 1)[0].strip(): f"### {part}".strip() for part in inside.split("### ")[1:]}


def filled(page: str, new: dict[str, str]) -> str:
    """The page with these parts new."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    every = parts(page) | {name: part.strip() for name, part in new.items()}
    return f"{before}{BEGIN}\n\n" + "\n\n".join(every[name] for name in sorted(every)) + f"\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path for path in HERE.glob("*.yaml") if commands(path))
    parser.add_argument("names", nargs="*", choices=[[], *(path.stem for path in known)], metavar="NAME")
    parser.add_argument("--output-root", type=Path, default=HERE.parent / "outputs" / "laptop")
    options = parser.parse_args()
    for path in known:
        if not options.names or path.stem in options.names:
            new = {path.stem: carried_out(path, options.output_root.resolve())}
            PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), new), encoding="utf-8")


if __name__ == "__main__":
    main()
