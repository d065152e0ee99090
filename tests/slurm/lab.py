"""A real Slurm on this one machine, as root, without systemd: munged, slurmctld, and a slurmd for each virtual node.

By hand: `python -m tests.slurm.lab FOLDER`; it prints the SLURM_CONF to export, and ends with Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
AccountingStorageType=accounting_storage/none
AccountingStoragePass={folder}/munge.socket
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0,preempt_reorder_count=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=1
MinJobAge=3600
SlurmctldTimeout=60
SlurmdTimeout=10
FirstJobId={first_job}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
"""


def missing() -> list[str]:
    """What has to be installed first: Debian's slurmctld, slurmd, slurm-client and munge."""
    with _sbin():
        return [name for name in NEEDED if shutil.which(name) is None]


@contextlib.contextmanager
def _sbin() -> Iterator[None]:
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{path}:/usr/sbin:/sbin"
    try:
        yield
    finally:
        os.environ["PATH"] = path


@dataclass
class Lab:
    """A cluster in a folder; `conf` is its SLURM_CONF."""

    folder: Path
    nodes: int = 2
    cpus: int = 4  # of each node, on paper

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    def start(self) -> None:
        """Raises RuntimeError, with the ends of its logs, where the nodes do not come up."""
        for name in ("state", "spool", "munge"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        host, port = socket.gethostname().partition(".")[0], _free_ports(self.nodes + 1)
        # Another first id each time: nothing of an earlier lab is taken for this one's.
        first = random.SystemRandom().randrange(1000, 60000)
        lines = [CONF.format(host=host, port=port, folder=self.folder, first_job=first)]
        for i in range(1, self.nodes + 1):
            where = f"NodeAddr=127.0.0.1 NodeHostname={host} Port={port + i}"
            lines.append(f"NodeName=n{i} {where} CPUs={self.cpus} RealMemory=4000 State=UNKNOWN\n")
        partition = f"Nodes=n[1-{self.nodes}] MaxTime=INFINITE DefaultTime=60 State=UP"
        lines.append(f"PartitionName=debug {partition} Default=YES PriorityTier=1 GraceTime=0\n")
        lines.append(f"PartitionName=urgent {partition} PriorityTier=10 PreemptMode=OFF\n")
        self.conf.write_text("".join(lines))
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        munge = [f"--key-file={key}", f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munged.pid"]
        munge += [f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munge/seed"]
        self._daemon("munged", "--force", *munge)
        self._daemon("slurmctld", "-i")
        for i in range(1, self.nodes + 1):
            self.start_node(f"n{i}")
        self.wait_for_nodes(self.nodes)

    def start_node(self, name: str) -> None:
        (self.folder / "spool" / name).mkdir(exist_ok=True)
        self._daemon("slurmd", "-N", name)

    def stop_node(self, name: str) -> None:
        """As by a power cut to its daemon: it says goodbye to nobody, and what runs there goes on."""
        _end(self.folder / f"slurmd.{name}.pid", signal.SIGKILL)

    def wait_for_nodes(self, count: int) -> None:
        deadline = time.monotonic() + 60
        said = ""
        while time.monotonic() < deadline:
            done = subprocess.run(
                ["sinfo", "-hN", "-p", "debug", "-o", "%t"], capture_output=True, text=True, env=self.env()
            )
            said = done.stdout + done.stderr
            if sum(state in ("idle", "mix", "alloc") for state in said.split()) >= count:
                return
            time.sleep(0.1)
        logs = "".join(f"\n{log.name}: {log.read_text()[-2000:]}" for log in self.folder.glob("*.log"))
        raise RuntimeError(f"not all of {self.nodes} Slurm nodes came up: {said.split()}{logs}")

    def env(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.conf), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}

    def stop(self) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            subprocess.run(["scancel", "--user=root", "--signal=KILL"], env=self.env(), timeout=10, capture_output=True)
            subprocess.run(["scancel", "--user=root"], env=self.env(), timeout=10, capture_output=True)
        for pid in (*self.folder.glob("slurmd.*.pid"), self.folder / "slurmctld.pid", self.folder / "munged.pid"):
            _end(pid, signal.SIGTERM)

    def _daemon(self, *command: str) -> None:
        with (self.folder / "start.log").open("a") as log:
            done = subprocess.run(command, env=self.env(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=30)
        if done.returncode:
            raise RuntimeError(f"{command[0]} does not start: {(self.folder / 'start.log').read_text()[-2000:]}")


def _free_ports(count: int) -> int:
    """The first of as many free ports in a row."""
    while True:
        first = random.SystemRandom().randrange(20000, 30000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def _end(pid_file: Path, how: signal.Signals) -> None:
    with contextlib.suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        os.kill(pid, how)
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    lab = Lab(Path(sys.argv[1]).absolute(), cpus=1)
    try:
        lab.start()
        print(f"export SLURM_CONF={lab.conf}", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        lab.stop()
