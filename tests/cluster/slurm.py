"""Start munge, slurmctld and several slurmd of one throw-away Slurm cluster in a folder; stop them by pid.

    python -m tests.cluster.slurm FOLDER     # start, print what to export, wait for Ctrl-C, stop

Nodes are simulated: one slurmd each, all on this host, with two cores and fake GPUs. No root is needed, nothing outside
the folder is touched. Needs Debian's slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "sinfo", "srun")
START_S, STOP_S = 30.0, 10.0

CONFIGURATION = """\
ClusterName=saih
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}/tmp/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
EnforcePartLimits=ALL
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=2
MinJobAge=86400
SlurmdParameters=config_overrides
MailProg=/bin/true
GresTypes=gpu
FirstJobId={first_job}
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} RealMemory=4000 \
Gres=gpu:sim:{gpus} State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=60 State=UP
"""

SITE = """\
description: the simulated cluster of tests/cluster
scheduler: slurm
launcher: {launcher}
device: cpu
nodes: {nodes}
gpus_per_node: {cpus}
threads_per_rank: 1
node_memory_gib: 4
environment:
  MASTER_ADDR: 127.0.0.1   # the names of simulated nodes do not resolve
"""


@dataclass
class Cluster:
    """A running cluster; every program it started is stopped by `stop`."""

    folder: Path
    nodes: int = 4
    cpus: int = 2
    gpus: int = 2
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        """Write the configuration, start everything, wait until all nodes are idle."""
        for name in ("state", *(f"{kind}/n{n}" for kind in ("spool", "tmp") for n in range(1, self.nodes + 1))):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._configure()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        munge = {"key-file": key, "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
        words = [f"--{name}={self.folder / value}" for name, value in munge.items()]
        self._daemon("munged", "--force", *words, f"--seed-file={self.folder / 'munged.seed'}")
        self._daemon("slurmctld", "-i", "-c")
        for node in range(1, self.nodes + 1):
            self.start_node(f"n{node}")
        self._wait_until_idle()

    def start_node(self, name: str) -> None:
        self._daemon("slurmd", "-N", name)

    def kill_node(self, name: str) -> None:
        """As a power failure would."""
        os.kill(int((self.folder / f"slurmd.{name}.pid").read_text()), signal.SIGKILL)

    def restart_controller(self) -> None:
        self._stop("slurmctld.pid")
        self._daemon("slurmctld")

    def stop(self) -> None:
        """Cancel what runs, then stop every daemon by its pid; munge last, for the others need it to say goodbye."""
        self.run("scancel", "--me")
        time.sleep(0.2)
        self._stop(*(path.name for path in self.folder.glob("slurmd.*.pid")), "slurmctld.pid")
        self._stop("munged.pid")

    def run(self, *words: str) -> str:
        """The output of a Slurm command."""
        answer = subprocess.run(words, env=os.environ | self.environment, capture_output=True, text=True, check=False)
        return answer.stdout + answer.stderr

    def site(self, launcher: str = "srun") -> str:
        """A site file for this cluster."""
        return SITE.format(launcher=launcher, nodes=self.nodes, cpus=self.cpus)

    def _configure(self) -> None:
        port = _free_ports(self.nodes + 1)
        for number in range(self.gpus):
            with contextlib.suppress(FileExistsError):
                (self.folder / f"gpu{number}").symlink_to("/dev/null")
        text = CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            user=pwd.getpwuid(os.getuid()).pw_name,
            folder=self.folder,
            port=port,
            first_job=port + 1000,  # jobs take their number as a port: not those of another cluster's, nor of daemons
            nodes=self.nodes,
            first=port + 1,
            last=port + self.nodes,
            cpus=self.cpus,
            gpus=self.gpus,
        )
        (self.folder / "slurm.conf").write_text(text)
        devices = f"{self.folder}/gpu[0-{self.gpus - 1}]"
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-{self.nodes}] Name=gpu Type=sim File={devices}\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _daemon(self, program: str, *words: str) -> None:
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([_find(program), *words], env=os.environ | self.environment, check=True, **quiet)  # type: ignore[call-overload]

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + START_S
        while self.run("sinfo", "--noheader", "--format=%D %t").strip() != f"{self.nodes} idle":
            if time.monotonic() > deadline:
                raise RuntimeError(f"the cluster did not come up; see the logs in {self.folder}: {self.run('sinfo')}")
            time.sleep(0.05)

    def _stop(self, *pid_files: str) -> None:
        """Ask all of them to end, then wait: a daemon that has ended has removed its pid file, or is a zombie."""
        pids = []
        for name in pid_files:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
                pids.append(int((self.folder / name).read_text()))
                os.kill(pids[-1], signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline and any(is_alive(pid) for pid in pids):
            time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def missing_programs() -> list[str]:
    """What is not installed here."""
    return [name for name in PROGRAMS if not _found(name)]


@contextlib.contextmanager
def cluster(folder: Path, nodes: int = 4) -> Iterator[Cluster]:
    """A cluster that runs inside the `with`."""
    folder.mkdir(parents=True, exist_ok=True)
    running = Cluster(folder, nodes)
    try:
        running.start()
        yield running
    finally:
        running.stop()


def _found(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")


def _find(program: str) -> str:
    path = _found(program)
    if path is None:
        raise RuntimeError(
            f"{program} is not installed; on Debian: apt-get install slurmctld slurmd slurm-client munge"
        )
    return path


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring ports nobody listens on; two processes seldom look at the same ones."""
    for first in range(20000 + os.getpid() * 37 % 30000, 60000, count):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError("no free ports")


def main() -> None:
    """Run a cluster until Ctrl-C or SIGTERM: its daemons would outlive this process."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else Path("cluster").absolute()
    with cluster(folder) as running:
        Path("sites").mkdir(exist_ok=True)
        for name, launcher in (("cluster", "srun"), ("cluster-mpi", "mpiexec")):
            Path(f"sites/{name}.yaml").write_text(running.site(launcher) + "time_budget: 2m\n")
        print(f"export SLURM_CONF={running.environment['SLURM_CONF']}")
        print("saih sweep cosmoflow --axis data=16,32 --axis nodes=1,2 --site cluster   # in another terminal")
        print("Ctrl-C stops the cluster", flush=True)
        signal.pause()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
