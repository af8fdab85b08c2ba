"""Takes steps one of which has a gradient that is not finite, saves, and goes on in new processes.

usage: worker_engine.py PLAN.json, a list of {"processes": N, "jobs": [[CONFIG, EXP, OUT, STEPS, POISONED], ...]}: each
job takes steps up to STEPS from where EXP is; in step POISONED (0: none) the loss of the last rank is NaN. It saves
after the step before the last. Each rank writes OUT.rankN.json: of each step whether it was applied, the norm, and a
hash of the weights after it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

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


def digest(engine: DeepSpeedEngine) -> str:
    """Hash the weights that this rank has, under ZeRO 3 those that the main process gathers."""
    snapshot = engine.snapshot()
    weights = snapshot.weights if snapshot is not None else engine.model.state_dict()
    return hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()


def work(path: str, exp: str, out: str, steps: int, poisoned: int) -> None:
    config = load([path]).config
    start_processes(config.engine)
    poison = [False]

    def make(config: RunConfig) -> Objective:
        objective = build_objective(config)
        forward = objective.forward

        def perhaps_poisoned(batch: Batch) -> Loss:
            loss = forward(batch)
            return replace(loss, total=loss.total * math.nan) if poison[0] else loss

        objective.forward = perhaps_poisoned  # type: ignore[method-assign]
        return objective

    prepare, spec = preparers(config)
    Path(exp).mkdir(exist_ok=True)
    run = build_run(config, Path(exp), make, prepare, spec)
    rows = [{"step": run.state.step, "weights": digest(run.engine)}]
    for data in run.loader.steps(run.state.position):
        step = run.state.step + 1
        poison[0] = step == poisoned and distributed.rank() == distributed.world_size() - 1
        applied = take_step(run, data)
        advance(run, data)
        norm = run.engine.grad_norm
        rows.append({"step": step, "applied": applied, "finite": math.isfinite(norm), "weights": digest(run.engine)})
        if step == steps - 1:
            run.checkpoints.save(run.engine, run.state, run.average)
            run.checkpoints.wait()
        if step == steps:
            break
    run.log.close()
    Path(f"{out}.rank{distributed.rank()}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        run_group(entry["processes"], entry["jobs"], work)
