"""A verb as many processes over the nodes of a Slurm job: srun starts one torchrun a node, that a process a GPU."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harken.cluster.slurm import node_address, node_names
from harken.core.errors import HarkenError

# torchrun itself would end at USR1, on which its processes save. What is ignored here stays ignored in what it starts.
ON_A_NODE = 'trap "" USR1; python="$1"; shift; exec "$python" -m torch.distributed.run --node-rank "$SLURM_NODEID" "$@"'


@dataclass(frozen=True)
class Allocation:
    """What a job has. nodes: their names, first the one that runs the batch script. address: of that one.

    port: for the processes to find each other, of this job alone. gpus: of a node. cpus: of a node, 0 when not told.
    """

    nodes: list[str]
    address: str
    port: int
    gpus: int
    cpus: int


def allocation(environment: Mapping[str, str]) -> Allocation:
    """Read what Slurm says about the job that this process is in.

    Raises HarkenError outside of one.
    """
    if "SLURM_JOB_NODELIST" not in environment:
        raise HarkenError(
            "`harken parallel` must run in a job of Slurm, found no SLURM_JOB_NODELIST: submit it with `harken launch`"
        )
    nodes = node_names(environment["SLURM_JOB_NODELIST"])
    return Allocation(
        nodes,
        node_address(nodes[0]),
        # below the range from which systems take ports of outgoing connections
        20000 + int(environment["SLURM_JOB_ID"]) % 10000,
        int(environment.get("SLURM_GPUS_ON_NODE", "0")),
        int(environment.get("SLURM_CPUS_PER_TASK", "0")),
    )


def srun(job: Allocation) -> list[str]:
    """Return the command that starts one task on each node of a job."""
    count = str(len(job.nodes))
    command = ["srun", "--nodes", count, "--ntasks", count, "--ntasks-per-node", "1"]
    # since 22.05 srun does not take this from sbatch, and a task would get one CPU
    if job.cpus:
        command += ["--cpus-per-task", str(job.cpus)]
    # when a node fails the others have a minute to write their stacks
    return [*command, "--wait", "60"]


def parallel_command(job: Allocation, processes: int, verb: Sequence[str]) -> list[str]:
    """Return the command that runs a verb on all nodes; `processes` a node where there are no GPUs."""
    each = job.gpus or processes
    harken = ["-m", "harken.apps.main", *verb]
    if len(job.nodes) * each == 1:
        return [sys.executable, *harken]
    torchrun = ["--nnodes", str(len(job.nodes)), "--nproc-per-node", str(each)]
    torchrun += ["--master-addr", job.address, "--master-port", str(job.port)]
    return [*srun(job), "bash", "-c", ON_A_NODE, "node", sys.executable, *torchrun, *harken]
