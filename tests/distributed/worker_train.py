"""Trains several runs as `harken train` would, each group of runs in fresh processes.

usage: worker_train.py PLAN.json, a list of {"processes": N, "jobs": [[CONFIG, EXP, STOP], ...]}: the jobs of an entry
run one after the other in N new processes; after step STOP one rank signals itself to stop (0: it does not). The
processes are forked from this one, which has only imported things, so that importing is paid for once.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  imported before the processes are forked
import torch
import torch._dynamo  # so is this, which torch's optimisers import

from harken.config.load import load
from harken.config.schema import RunConfig
from harken.core import distributed
from harken.objectives.base import Objective
from harken.objectives.saved import build_objective, preparers
from harken.train.run import run_training


def train(path: str, folder: str, stop: int) -> None:
    config = load([path]).config
    prepare, spec = preparers(config)

    def make(config: RunConfig) -> Objective:
        objective = build_objective(config)
        after_step = objective.after_step

        def then_signal(step: int) -> None:
            after_step(step)
            # one rank hears of it and all must agree
            if step == stop and distributed.rank() == distributed.world_size() - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        objective.after_step = then_signal  # type: ignore[method-assign]
        return objective

    ending = run_training(config, Path(folder), make, prepare, spec)
    assert ending == ("stopped" if stop else "finished"), ending


def run_group(processes: int, jobs: list[Sequence[Any]], work: Callable[..., None] = train) -> None:
    """Run jobs, `work(*job)` each, in forked processes with the variables torchrun sets; raise when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            world = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": processes,
                "LOCAL_WORLD_SIZE": processes,
                "MASTER_PORT": port,
            }
            if processes > 1:
                os.environ.update({name: str(value) for name, value in world.items()}, MASTER_ADDR="127.0.0.1")
            for job in jobs:
                work(*job)
            if torch.distributed.is_initialized():  # its threads may end the process by abort() while Python ends
                torch.distributed.destroy_process_group()
            sys.exit(0)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    assert not any(statuses), f"processes ended with {statuses}"


if __name__ == "__main__":
    pid = os.getpid()
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        run_group(entry["processes"], entry["jobs"])
        assert os.getpid() == pid
