"""Trains several runs one after the other in one process (or one group of them), as `harken train` would each.

usage: worker_train.py CONFIG EXP STOP [CONFIG EXP STOP ...]; after step STOP the process signals itself to stop (0: never).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from harken.config.load import load
from harken.config.registry import build
from harken.config.schema import RunConfig
from harken.core import distributed
from harken.objectives.base import Objective
from harken.objectives.saved import build_objective, build_prepare
from harken.train.run import run_training


def train(path: str, folder: str, stop: int) -> None:
    config = load([path]).config
    spec = build("frontend", config.frontend).spec

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

    ending = run_training(config, Path(folder), make, lambda train: build_prepare(config, spec, train=train), spec)
    assert ending == ("stopped" if stop else "finished"), ending


if __name__ == "__main__":
    arguments = sys.argv[1:]
    for path, folder, stop in zip(arguments[::3], arguments[1::3], arguments[2::3], strict=True):
        train(path, folder, int(stop))
