"""Trains models into which numbers that are not finite are put, and records how the runs end.

usage: worker_nonfinite.py PLAN.json, a list of {"processes": N, "jobs": [[CONFIG, EXP, POISON, WHERE], ...]}: the jobs
of an entry run one after the other in N new processes. POISON is `cut` (the first block's output is NaN where the batch
holds the cut WHERE), `audio` (the samples of the cut WHERE are NaN), `weight` (after step WHERE, once, a weight becomes
NaN), `steps` (from step WHERE on every loss is NaN), or nothing. Rank 0 writes how a run ended, or its error: EXP.json.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from worker_train import run_group

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


def poisoned(objective: Objective, poison: str, where: Any) -> Objective:
    """Return the objective, with the poison in it."""
    forward, after_step = objective.forward, objective.after_step
    batches: list[Batch] = []
    steps, given = [0], [False]

    def forward_of(batch: Batch) -> Loss:
        batches[:] = [batch]
        loss = forward(batch)
        bad = poison == "steps" and objective.training and steps[0] >= where - 1
        return replace(loss, total=loss.total * math.nan) if bad else loss

    def then(step: int) -> None:
        after_step(step)
        steps[0] = step
        if poison == "weight" and step == where and not given[0]:
            given[0] = True
            objective.backbone.encoder.blocks[1].down.weight.data[0, 0] = math.nan

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        return output * math.nan if where in batches[0].ids else output

    if poison == "cut":
        objective.backbone.encoder.blocks[0].register_forward_hook(spoil)
    objective.forward = forward_of  # type: ignore[method-assign]
    objective.after_step = then  # type: ignore[method-assign]
    return objective


class Spoiled:
    """A `Prepare` that lets the audio of a cut be NaN, past the reader's checks."""

    def __init__(self, prepare: Prepare, cut: str) -> None:
        self.prepare, self.cut = prepare, cut

    def __call__(self, batch: Batch, draws: Draws) -> Batch:
        batch = self.prepare(batch, draws)
        if self.cut in batch.ids:
            batch.inputs[batch.ids.index(self.cut)] = math.nan
        return batch


def train(path: str, folder: str, poison: str, where: Any) -> None:
    config = load([path]).config
    fresh, spec = preparers(config)

    def make(config: RunConfig) -> Objective:
        return poisoned(build_objective(config), poison, where)

    def prepare(is_train: bool) -> Prepare:
        own = fresh(is_train)
        return Spoiled(own, where) if poison == "audio" else own

    try:
        ending = run_training(config, Path(folder), make, prepare, spec)
    except HarkenError as error:
        ending = str(error)
    if distributed.is_main():
        Path(f"{folder}.json").write_text(json.dumps(ending))


if __name__ == "__main__":
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        run_group(entry["processes"], entry["jobs"], train)
