"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd, all on loopback, in a test's folder.

It is skipped, with the reason, where Debian's slurmctld, slurmd, slurm-client and munge are not installed.
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
NODES = ("n1", "n2")

CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdTimeout=10
KillWait=10
MinJobAge=600
SchedulerParameters=sched_interval=2,bf_interval=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=4
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
CLUSTER = """
train: {time: "10:00", cpus_per_process: 1}
stage: {time: "10:00", cpus_per_process: 1}
signal_seconds: 20
"""


def free_ports(count: int) -> list[int]:
    taken = [socket.socket() for _ in range(count)]
    for each in taken:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in taken]
    for each in taken:
        each.close()
    return ports


@dataclass
class Slurm:
    """The running cluster. environment: of a shell from which jobs are submitted. cluster: the user's file."""

    folder: Path
    environment: dict[str, str]
    cluster: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=out, start_new_session=True
            )

    def start_node(self, name: str) -> None:
        self.start(name, "slurmd", "-D", "-N", name)

    def ask(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False, cwd=self.folder
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def harken(self, *arguments: str | Path, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "harken.apps.main", *map(str, arguments)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def state(self, job: str) -> str:
        """Slurm's word for a job, also after its end."""
        words = dict(
            word.partition("=")[::2] for word in self.ask("scontrol", "show", "job", job, "--oneliner").split()
        )
        return words["JobState"]

    def wait(self, job: str, *states: str, seconds: float = 300) -> str:
        """Wait until a job is in one of some states."""
        return wait_for(lambda: found if (found := self.state(job)) in states else "", seconds, lambda: self.state(job))

    def stop(self) -> None:
        with suppress(AssertionError, subprocess.TimeoutExpired):
            self.ask("scancel", "--user", getpass.getuser())
            wait_for(lambda: not self.ask("squeue", "--noheader"), 30)
        for process in reversed(self.daemons.values()):
            process.terminate()
        for process in self.daemons.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(look: Callable[[], Any], seconds: float = 120, tell: Callable[[], object] = lambda: "") -> Any:
    until = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < until, f"it did not happen within {seconds} s: {tell()}"
        time.sleep(0.5)
    return found


@pytest.fixture(scope="session")
def wait() -> Callable[..., Any]:
    """`wait_for`, for tests in other files."""
    return wait_for


def write_config(corpus, path: Path, steps: int) -> Path:
    settings = corpus.settings("hubert", "filterbank")
    settings["train"].update(steps=steps, valid_every_steps=1000)
    settings["checkpoint"].update(every_steps=2, keep_last=3)
    settings["encoder"].update(dropout=0.0, layer_drop=0.0)
    OmegaConf.save(OmegaConf.create(settings), path)
    return path


def samples(exp: Path) -> dict[tuple[int, int], Any]:
    found = {}
    for path in exp.glob("samples.rank*.jsonl"):
        for line in path.read_text().splitlines():
            with suppress(json.JSONDecodeError):  # cut off by the kill; the step is taken again
                row = json.loads(line)
                place = (row["step"], row["micro_batch"])
                assert found.setdefault(place, row) == row, "a step that was taken twice had the same samples"
    return found


def last_step(exp: Path) -> int:
    return max((step for step, _ in samples(exp)), default=0)


@pytest.fixture(scope="session")
def runs() -> SimpleNamespace:
    """The three functions above, for tests in other files."""
    return SimpleNamespace(write_config=write_config, samples=samples, last_step=last_step)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(
            f"Slurm is not installed, no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge"
        )
    folder = tmp_path_factory.mktemp("slurm")
    controller, first, second = free_ports(3)
    host = socket.gethostname().partition(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(
        CONF.format(folder=folder, host=host, user=getpass.getuser(), controller=controller, first=first, second=second)
    )
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    shutil.copytree(ROOT / "slurm", folder / "cluster")
    (folder / "cluster/cluster.yaml").write_text(CLUSTER)
    environment = {
        **os.environ,
        "PATH": path,
        "SLURM_CONF": str(conf),
        "PYTHONPATH": str(ROOT / "framework"),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    running = Slurm(folder, environment, folder / "cluster/cluster.yaml")
    try:
        munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "seed", "log")]
        running.start("munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge)
        wait_for((folder / "munge.socket").exists, 20)
        running.start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            running.start_node(node)
        wait_for(lambda: up(running), 60, lambda: (folder / "slurmctld.log").read_text()[-2000:])
        yield running
    finally:
        running.stop()


def up(slurm: Slurm) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%T %D"], env=slurm.environment, capture_output=True, text=True, check=False
    )
    return done.stdout.split() == ["idle", "2"]
