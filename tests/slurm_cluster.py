"""A private SLURM on this machine, for tests: its daemons, of two nodes, in one folder and on loopback ports."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

NODES = ("node1", "node2")
DAEMONS = {"munged": "munged", "slurmctld": "slurmctld", **dict.fromkeys(NODES, "slurmd")}
"""Names of the pid files, and the programs; in the order in which they start."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
UNFINISHED = "PENDING,RUNNING,COMPLETING,CONFIGURING,SUSPENDED"

CONFIG = """\
ClusterName=pdtrim
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is how long a requeued job waits: 120 s by default, and 5 is the least that SLURM takes
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
JobRequeue=1
KillWait={kill_wait}
MinJobAge=600
ReturnToService=2
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
# more cores than there are: tests look at order, not at speed
NodeName=DEFAULT CPUs=4 RealMemory=1000 State=UNKNOWN
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2}
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
"""


def missing_programs() -> list[str]:
    """Programs of the Debian packages slurm-wlm and munge that are not on this machine."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 300) -> None:
    """Ask again and again until `condition` holds.

    Raises:
        TimeoutError: it never did.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen within {seconds:.0f} seconds")
        time.sleep(0.1)


class SlurmCluster:
    """A running cluster of two nodes, and what the tests ask of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        """What a shell needs to use it."""

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a shell that uses it."""
        here = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return {**here, **self.variables}

    def call(self, *command: str | Path, check: bool = True) -> str:
        """Standard output of one of SLURM's programs."""
        done = subprocess.run(
            [str(part) for part in command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{command} failed: {done.stderr}")
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """SLURM's name for a job's state."""
        return self.call("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")

    def restarts(self, job: str) -> int:
        """How often a job was started again."""
        return int(self.call("scontrol", "show", "job", job).split("Restarts=")[1].split()[0])

    def wait_for(self, job: str, *states: str, seconds: float = 120) -> str:
        """Wait for one of the states of a job; returns which."""
        wait_until(lambda: self.state(job) in states, f"job {job} in {' or '.join(states)}", seconds)
        return self.state(job)

    def start_again(self, job: str, restarts: int) -> None:
        """Once a job is back in the queue for its n-th restart, let it start at once."""
        wait_until(lambda: self.restarts(job) == restarts and self.state(job) == "PENDING", f"restart {restarts}")
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now")


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """Start a cluster in an empty folder; its jobs and daemons are gone afterwards.

    munged wants a folder that only its user may write to, below folders that everybody may enter.
    """
    folder.chmod(0o755)
    for name in ("state", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    cluster = SlurmCluster(folder)
    try:
        _start(cluster)
        yield cluster
    finally:
        _stop(cluster)


def _start(cluster: SlurmCluster) -> None:
    folder, host = cluster.folder, socket.gethostname().split(".")[0]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    port, port1, port2 = _free_ports(3)
    settings = CONFIG.format(folder=folder, host=host, user=user, port=port, port1=port1, port2=port2, kill_wait=20)
    (folder / "slurm.conf").write_text(settings)
    slurm = ["-c", "-f", f"{folder}/slurm.conf"]
    arguments = {
        "munged": [
            f"--key-file={folder}/munge.key", f"--socket={folder}/munge.sock", f"--seed-file={folder}/munge.seed",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
        ],
        "slurmctld": slurm,
        **{node: [*slurm, "-N", node] for node in NODES},
    }  # fmt: skip
    for name, program in DAEMONS.items():
        with (folder / f"{name}.out").open("w") as out:
            done = subprocess.run(
                [program, *arguments[name]], env=cluster.environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=out,
                stderr=out, timeout=30, check=False,
            )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{name} does not start: {(folder / f'{name}.out').read_text()}")
    wait_until(lambda: cluster.call("sinfo", "-h", "-o", "%T %D", check=False) == "idle 2", "idle nodes", 30)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below the range that the system hands out and outside Lightning's 15000-24999."""
    free: list[int] = []
    for port in range(26000 + os.getpid() % 1000, 32000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                free.append(port)
        if len(free) == count:
            return free
    raise RuntimeError("no free port below 32000")


def _stop(cluster: SlurmCluster) -> None:
    """Jobs first, since their processes outlive slurmd; then the daemons that this cluster's pid files name."""
    if _pid(cluster.folder, "slurmctld") is not None:
        jobs = cluster.call("squeue", "-h", "-o", "%A", check=False).split()
        if jobs:
            cluster.call("scancel", *sorted(set(jobs)), check=False)
            wait_until(
                lambda: not cluster.call("squeue", "-h", "-t", UNFINISHED, check=False), "the end of all jobs", 60
            )
    for name in reversed(DAEMONS):
        pid = _pid(cluster.folder, name)
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda name=name: _pid(cluster.folder, name) is None, f"the end of {name}", 20)  # type: ignore[misc]


def _pid(folder: Path, name: str) -> int | None:
    """Process id of one of the daemons; None if it is gone, or if another process has its number now."""
    try:
        pid = int((folder / f"{name}.pid").read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None
    return pid if DAEMONS[name] in command and str(folder) in command else None
