"""Trains with memory that runs out: an objective that says so, on one rank of several.

usage: worker_memory.py PLAN.json, a list of {"processes": N, "jobs": [[CONFIG, EXP, OUT, FAULTS], ...]}. FAULTS is
{"forward": STEP, "backward": STEP, "last": STEP, "cut": STEP, "none": STEP, "steps": N}: in those steps memory runs out
once on the last rank (in the forward pass, or when the backward pass of the first or of the last batch is almost
through), or whenever one of its cuts is learned from, or any of them, while the first rank's losses are not finite;
{"padded": SECONDS} measures the batch size with a last rank that holds no more than that. Each rank writes
OUT.rankN.json, rank 0 OUT.pt.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from worker_train import run_group

from harken.config.load import load
from harken.config.schema import RunConfig
from harken.core import distributed
from harken.core.batch import Batch
from harken.core.loss import Loss
from harken.engine.deepspeed import DeepSpeedEngine, start_processes
from harken.objectives.base import Objective
from harken.objectives.saved import build_objective, preparers
from harken.train.loop import advance, take_step
from harken.train.run import build_run


class Faults:
    """Where memory runs out on this rank: `place` once, in a batch of several cuts; `cuts` wherever they are; `padded`.

    factor: of the loss.
    """

    def __init__(self) -> None:
        self.place = ""
        self.cuts: set[str] = set()
        self.factor = 1.0
        self.padded = float("inf")
        self.left = 0  # passes of this step

    def strike(self, where: str) -> None:
        if self.place == where:
            self.place = ""
            raise torch.OutOfMemoryError(f"injected in the {where} pass")

    def objective(self, config: RunConfig) -> Objective:
        objective = build_objective(config)
        forward = objective.forward

        def faulty(batch: Batch) -> Loss:
            self.left -= 1
            if len(batch.ids) > 1:
                self.strike("forward")
            learning = torch.is_grad_enabled()  # the search for the first wrong number is not hindered
            if (learning and not self.cuts.isdisjoint(batch.ids)) or batch.padded > self.padded * 16000:
                raise torch.OutOfMemoryError("injected for a cut, or for a size")
            loss = forward(batch)
            return replace(loss, total=loss.total * self.factor)

        first = next(parameter for name, parameter in objective.named_parameters() if "frontend" in name)
        first.register_hook(lambda grad: self.strike("backward" if self.left else "last"))
        objective.forward = faulty  # type: ignore[method-assign]
        return objective


def digest(engine: DeepSpeedEngine) -> str:
    snapshot = engine.snapshot()
    weights = snapshot.weights if snapshot is not None else engine.model.state_dict()
    return hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()


def work(path: str, exp: str, out: str, faults: dict[str, Any]) -> None:
    config = load([path]).config
    start_processes(config.engine)
    last = distributed.rank() == distributed.world_size() - 1
    injected = Faults()
    injected.padded = faults.get("padded", injected.padded) if last else injected.padded
    prepare, spec = preparers(config)
    Path(exp).mkdir(exist_ok=True)
    run = build_run(config, Path(exp), injected.objective, prepare, spec)
    injected.padded = float("inf")
    rows: list[dict[str, Any]] = [{"weights": digest(run.engine), "limits": run.loader.planner.limits.now.rows}]
    gradients = []
    for data in run.loader.steps(run.state.position):
        step = run.state.step + 1
        if step > faults["steps"]:
            break
        injected.place = next(
            (name for name in ("forward", "backward", "last") if last and faults.get(name) == step), ""
        )
        injected.left = len(data.batches) + len(data.idle)
        (name,) = distributed.gather([data.batches[0].ids[0]] if last else [])
        injected.cuts = {name} if faults.get("cut") == step else set()
        injected.factor = 1.0
        if faults.get("none") == step:
            injected.cuts = {cut for batch in data.batches for cut in batch.ids} if last else set()
            injected.factor = math.nan if distributed.is_main() else 1.0
        noting(run.engine, gradients)
        spoiled = breaking_off(run.engine)
        applied = take_step(run, data)
        advance(run, data)
        limits = run.loader.planner.limits.now
        rows.append({"applied": applied, "weights": digest(run.engine), "norm": run.engine.grad_norm, "cut": name})
        rows[-1]["spoiled"] = sum(spoiled)
        rows[-1].update(
            limits=limits.rows, least=limits.least, noted=run.state.noted, ids=[b.ids for b in data.batches]
        )
    run.checkpoints.save(run.engine, run.state, run.average)
    run.log.close()
    Path(f"{out}.rank{distributed.rank()}.json").write_text(json.dumps(rows))
    if distributed.is_main():
        torch.save(gradients, f"{out}.pt")


def noting(engine: DeepSpeedEngine, gradients: list[torch.Tensor]) -> None:
    """Make the engine note the gradient that its next step is given."""
    take_step = type(engine).step

    def step() -> bool:
        found = [safe_get_full_grad(parameter) for parameter in engine.model.parameters()]
        gradients.append(torch.cat([one.double().flatten() for one in found if one is not None]))
        return take_step(engine)

    engine.step = step  # type: ignore[method-assign]


def breaking_off(engine: DeepSpeedEngine) -> list[bool]:
    """Note of every time that this rank gives a step's gradient up before the others know whether parts were sent."""
    found: list[bool] = []

    def abandon() -> None:
        buckets = engine._buckets
        found.append(buckets is not None and 0 < buckets.sent < buckets.number)
        type(engine).abandon(engine)

    engine.abandon = abandon  # type: ignore[method-assign]
    return found


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        run_group(entry["processes"], entry["jobs"], work)
