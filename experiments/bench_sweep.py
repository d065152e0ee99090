"""What a queue costs: the same short runs in a plain loop (one process), and as a sweep on Slurm.

    python -m experiments.bench_sweep --runs 200 --runs-per-job 25

The runs are those of the tests: a LLaMA of two blocks, 32 wide. Claim: 200 short runs on Slurm end with 200 records and
a table of 200 rows; packed into jobs, a run costs little more than in a loop. Needs sbatch in reach; `python -m
tests.slurm.lab FOLDER` (as root) starts a Slurm of two nodes on this machine. Both ways share the machine's cores, so
compare them within one call only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.workshop import ROOT, furnished, small_run


def swept(name: str, runs: int, shop: Path, out: Path, *more: str) -> float:
    """Seconds of one sweep; stops where a record or a row of the table is missing."""
    seeds = ",".join(map(str, range(runs)))
    command = [sys.executable, str(ROOT / "launch.py"), "-m", *small_run(shop, out), f"seed={seeds}", *more]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    records = [json.loads(path.read_text()) for path in out.glob("*/result.json")]
    rows = sum(line[:8] in {record["id"] for record in records} for line in done.stdout.splitlines())
    inside = sum(record["seconds"] for record in records)
    print(
        f"{name}: exit code {done.returncode}, {len(records)} records, {rows} rows, {seconds:.0f} s in all, "
        f"{seconds / runs:.2f} s a run, of which the records say {inside / runs:.2f} s",
        flush=True,
    )
    if done.returncode or len(records) != runs or rows != runs:
        sys.exit(done.stderr[-3000:])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--runs-per-job", type=int, nargs="+", default=[25])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shop = furnished(Path(folder), blocks=2)
        loop = swept("plain loop", options.runs, shop, shop / "loop")
        for size in options.runs_per_job:
            queue = ["hydra/launcher=site", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1"]
            queue.append(f"hydra.launcher.runs_per_job={size}")
            seconds = swept(f"Slurm, {size} runs a job", options.runs, shop, shop / f"slurm-{size}", *queue)
            print(f"  {seconds / loop:.2f} times the loop, {(seconds - loop) / options.runs:+.2f} s a run", flush=True)


if __name__ == "__main__":
    main()
