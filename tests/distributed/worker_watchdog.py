"""Runs trainings in which a process stops, dies or hangs, and records how each rank ended.

usage: worker_watchdog.py PLAN.json, a list of {"name": NAME, "processes": N, "config": CONFIG, "exp": EXP, "trouble":
TROUBLE, "limit": SECONDS}: each is run by N forked processes, of which TROUBLE befalls the last one in its third step.
Beside the plan it writes NAME.rankN.err, what a rank wrote to stderr, and NAME.json, {"ended": {rank: [exit status,
seconds from the start]}, "halted": {rank: seconds}}, with null for a rank that was killed after SECONDS.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  imported before the processes are forked
import psutil
import torch._dynamo  # noqa: F401  so is this, which torch's optimisers import

from harken.config.load import load
from harken.config.schema import RunConfig
from harken.core import distributed
from harken.core.batch import Batch
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.core.loss import Loss
from harken.data.dataset import Prepare
from harken.objectives.base import Objective
from harken.objectives.saved import build_objective, preparers
from harken.train.run import run_training

STEP = 3
MICRO_BATCHES = 4  # of a step
SLOW_SECONDS = 5.0


class Troubled:
    """A `Prepare` that fails for the cuts of one step, in a way that the loader must survive."""

    def __init__(self, prepare: Prepare, trouble: str) -> None:
        self.prepare, self.trouble, self.batches = prepare, trouble, 0

    def __call__(self, batch: Batch, draws: Draws) -> Batch:
        self.batches += 1
        if self.batches > (STEP - 1) * MICRO_BATCHES:
            if self.trouble == "worker killed":
                os.kill(os.getpid(), signal.SIGKILL)

            class LocalError(Exception):
                """Cannot be pickled: nobody finds its class by name."""

            raise LocalError("no way home")
        return self.prepare(batch, draws)


def forward_with(trouble: str, objective: Objective) -> None:
    """Make the objective's forward pass meet the trouble in the step."""
    forward, steps = objective.forward, [0]
    after_step = objective.after_step

    def count(step: int) -> None:
        after_step(step)
        steps[0] = step

    def troubled(batch: Batch) -> Loss:
        if not objective.training and trouble == "slow validation":
            time.sleep(SLOW_SECONDS)
        if steps[0] == STEP - 1 and distributed.rank() == distributed.world_size() - 1:
            if trouble in ("stopped", "killed"):
                time.sleep(3.0)  # until a heartbeat has said where it is
                os.kill(os.getpid(), signal.SIGSTOP if trouble == "stopped" else signal.SIGKILL)
            if trouble == "hangs":
                threading.Event().wait()
        return forward(batch)

    objective.forward = troubled  # type: ignore[method-assign]
    objective.after_step = count  # type: ignore[method-assign]


def train(path: str, folder: str, trouble: str) -> int:
    """Train as `harken train` would; return its exit status."""
    config = load([path]).config
    fresh, spec = preparers(config)

    def make(config: RunConfig) -> Objective:
        objective = build_objective(config)
        forward_with(trouble, objective)
        return objective

    def prepare(is_train: bool) -> Any:
        own = fresh(is_train)
        return Troubled(own, trouble) if is_train and trouble in ("worker killed", "unpicklable") else own

    try:
        run_training(config, Path(folder), make, prepare, spec)
    except HarkenError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def start(entry: dict[str, Any], errors: Path, rank: int, port: int) -> int:
    """Fork a rank; return its process."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    world = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
    world |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), entry["processes"])
    if entry["processes"] > 1:
        os.environ.update({name: str(value) for name, value in world.items()}, MASTER_ADDR="127.0.0.1")
    sys.exit(train(entry["config"], entry["exp"], entry["trouble"]))


def run(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run an entry of the plan until all its processes have ended, but one that was stopped: that one never does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began, processes = time.monotonic(), entry["processes"]
    running = {start(entry, folder / f"{entry['name']}.rank{rank}.err", rank, port): rank for rank in range(processes)}
    ended: dict[int, tuple[int, float] | None] = {}
    halted: dict[int, float] = {}
    while set(running.values()) - halted.keys() and time.monotonic() - began < entry["limit"]:
        for child, rank in list(running.items()):
            if psutil.Process(child).status() == psutil.STATUS_STOPPED:
                halted.setdefault(rank, time.monotonic() - began)
            process, status = os.waitpid(child, os.WNOHANG)
            if process:
                ended[running.pop(child)] = (os.waitstatus_to_exitcode(status), time.monotonic() - began)
        time.sleep(0.1)
    for child, rank in running.items():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        ended[rank] = None
    return {"ended": ended, "halted": halted}


if __name__ == "__main__":
    plan = Path(sys.argv[1])
    for entry in json.loads(plan.read_text()):
        (plan.parent / f"{entry['name']}.json").write_text(json.dumps(run(entry, plan.parent)))
