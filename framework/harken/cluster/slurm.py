"""Slurm's own commands, asked in one place."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass

from harken.core.errors import HarkenError

SECONDS = 60
"""How long a command of Slurm may take to answer."""


def ask_slurm(*command: str) -> str:
    """Run a command of Slurm and return what it printed.

    Raises HarkenError when it is not there, fails, or does not answer in time.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except FileNotFoundError as error:
        raise HarkenError(
            f"`{command[0]}` must be on the PATH, found none: run this on a machine of the cluster from which jobs "
            "are submitted; `--dry-run` prints the job without Slurm"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise HarkenError(
            f"`{command[0]}` has not answered for {SECONDS} s: is Slurm's controller up (`scontrol ping`)?"
        ) from error
    if done.returncode != 0:
        raise HarkenError(f"`{shlex.join(command)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


@dataclass(frozen=True)
class Queued:
    """A job that waits or runs. state, reason: in Slurm's words. nodes: their names. used, limit: of its time."""

    state: str
    reason: str
    nodes: str
    used: str
    limit: str


def queue() -> dict[str, Queued]:
    """Return the user's jobs that wait or run, by id; the tasks of arrays as `ID_TASK`.

    Raises HarkenError where Slurm does not answer.
    """
    rows = ask_slurm("squeue", "--me", "--array", "--noheader", "--format=%i|%T|%r|%N|%M|%l").splitlines()
    cells = [row.strip().split("|") for row in rows if row.count("|") == 5]
    return {job: Queued(*rest) for job, *rest in cells}


def node_names(nodes: str) -> list[str]:
    """Return the names that Slurm's short form, such as `gpu[01-04]`, stands for."""
    return ask_slurm("scontrol", "show", "hostnames", nodes).split()


def node_address(node: str) -> str:
    """Return where Slurm itself reaches a node: its name need be known to Slurm alone."""
    found = re.search(r"NodeAddr=(\S+)", ask_slurm("scontrol", "show", "node", node, "--oneliner"))
    return found[1] if found else node
