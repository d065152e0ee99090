"""One Slurm for all tests of this folder; without one they are skipped, or fail where ESPARSE_SLURM=required."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.lab import Lab, missing

# A job has one CPU, a run beside it all: sums, and with them masks, depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lacking = missing()
    why = f"{', '.join(lacking)} not found" if lacking else "Slurm's daemons need root here" if os.getuid() else ""
    if why:
        assert os.environ.get("ESPARSE_SLURM") != "required", why
        pytest.skip(f"no Slurm to test against: {why}")
    lab = Lab(tmp_path_factory.mktemp("slurm"), cpus=1)
    try:
        lab.start()
        yield lab
    finally:
        lab.stop()
