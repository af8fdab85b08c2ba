"""`harken parallel`: a verb as one process a GPU over the nodes of a Slurm job."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

HELP = "Run a verb, inside a Slurm job, as many processes: srun starts torchrun on each node, that a process each GPU."
EXAMPLE = "harken parallel --preflight exp/base -- train hubert_base --exp exp/base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--processes", type=int, default=1, help="of each node where it has no GPUs (default: 1)")
    parser.add_argument("--preflight", type=Path, help="check several nodes first, with this folder that all must see")
    parser.add_argument("--cluster", type=Path, help="your cluster's file, for what the check expects")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after `--`: a verb of harken and its arguments")


def run(args: argparse.Namespace) -> int:
    """Check the nodes, then take the place of this process; status of the check when a node fails it."""
    from harken.cluster.preflight import preflight_command
    from harken.cluster.settings import ClusterConfig, load_cluster
    from harken.cluster.spread import allocation, parallel_command
    from harken.core.errors import HarkenError

    verb = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not verb:
        raise HarkenError("a verb must follow after `--`, found none")
    job = allocation(os.environ)
    command = parallel_command(job, args.processes, verb)
    if args.preflight is not None and len(job.nodes) > 1:
        cluster = load_cluster(args.cluster) if args.cluster is not None else ClusterConfig()
        checked = subprocess.run(preflight_command(job, args.preflight.resolve(), cluster.preflight), check=False)
        if checked.returncode != 0:
            return checked.returncode
    return _become(command)


def _become(command: list[str]) -> NoReturn:
    sys.stdout.flush()
    os.execvp(command[0], command)  # noqa: S606  srun is to get the signals itself
