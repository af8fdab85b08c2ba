"""Back to a checkpoint when training has gone wrong, and on with other data."""

from __future__ import annotations

import time
from pathlib import Path

from safetensors.torch import load_file

from harken.config.saved import AVERAGE, WEIGHTS, checkpoint_step, damaged
from harken.config.schema import TrainConfig
from harken.core import distributed, progress
from harken.core.errors import HarkenError
from harken.engine.base import Engine
from harken.optim.ema import WeightAverage
from harken.train.checkpoint import Checkpoints
from harken.train.log import say
from harken.train.nonfinite import all_finite
from harken.train.state import TrainState

ADVICE = "lower `schedule.peak`, or look at the cuts and modules that the warnings above name"


def due(config: TrainConfig, state: TrainState, *, weights_lost: bool) -> bool:
    """Whether to roll back after a step: too many were skipped in a row, or no step can be taken any more.

    Raises HarkenError, on every rank, when weights are lost and rolling back is switched off.
    """
    if weights_lost and not config.max_skipped_steps:
        raise HarkenError(
            f"weights are not finite after step {state.step}, so no step can be taken any more, and "
            f"`train.max_skipped_steps: 0` never rolls back: {ADVICE}; with it set, the run goes back to a checkpoint"
        )
    return weights_lost or 0 < config.max_skipped_steps <= state.skipped_in_a_row


def skipped(state: TrainState) -> tuple[str, int]:
    """Return what to tell of the steps that were skipped up to now, and the step before the first of them."""
    count = state.skipped_in_a_row
    return f"{count} steps in a row up to step {state.step} could not be taken", state.step - count


def roll_back(
    checkpoints: Checkpoints,
    engine: Engine,
    average: WeightAverage | None,
    state: TrainState,
    trouble: str,
    newest: int,
) -> None:
    """Load the newest checkpoint of at most step `newest`, and keep the place in the data; every rank calls it.

    newest: the last step before the trouble. trouble: what to tell of it.
    The steps since that checkpoint are taken again, at their learning rates (but for Eden's part that falls with the
    hours of audio, which go on), with the samples that come next: those seen since the checkpoint are not seen again
    before the next epoch. `state` is changed in place.
    Raises HarkenError, on every rank, after `train.max_rollbacks`, or when no checkpoint is left to go back to.
    """
    progress.note("roll back")
    limit, failed = checkpoints.config.train.max_rollbacks, state.step
    if state.rollbacks >= limit:
        raise HarkenError(
            f"{trouble}, after {state.rollbacks} rollbacks (`train.max_rollbacks`): {ADVICE}, "
            "then the same command goes on; nothing was saved since"
        )
    checkpoints.wait()  # the newest may still be on its way to the disk
    name = distributed.broadcast_text(_find(checkpoints, state, newest) if distributed.is_main() else "")
    if not name:
        raise HarkenError(
            f"{trouble}, and {checkpoints.root} holds no whole, finite checkpoint from before to go back to: "
            f"{ADVICE}; a smaller `checkpoint.every_steps` has one sooner"
        )
    saved = checkpoints.state(checkpoints.root / name)
    checkpoints.load(checkpoints.root / name, engine, average)
    state.step, state.rolled_back_to = saved.step, saved.step
    state.best_score, state.validations_without_best = saved.best_score, saved.validations_without_best
    state.skipped_in_a_row, state.bad_records = 0, {}
    state.good_records = {key: min(step, saved.step) for key, step in state.good_records.items()}
    state.rollbacks += 1
    if distributed.is_main():
        _set_aside(checkpoints, saved.step)
    distributed.barrier()
    say(
        f"WARNING {trouble}: rolled back to {checkpoints.root / name} ({state.rollbacks} of at most {limit} times); "
        f"steps {saved.step + 1} to {failed} are taken again, with the samples that come next"
    )


def _find(checkpoints: Checkpoints, state: TrainState, newest: int) -> str:
    """Return the newest checkpoint of at most step `newest` to go back to.

    One that led here without a single step is not tried again.
    """
    if state.rolled_back_to is not None:
        newest = min(newest, state.rolled_back_to - 1)
    names = (name for name in reversed(checkpoints.names()) if checkpoint_step(name) <= newest)
    return checkpoints.first_whole(names, lambda folder: damaged(folder) or _not_finite(folder))


def _not_finite(folder: Path) -> str | None:
    for name in (WEIGHTS, AVERAGE):
        if (folder / name).is_file() and not all(all_finite(value) for value in load_file(folder / name).values()):
            return f"{name} holds numbers that are not finite"
    return None


def _set_aside(checkpoints: Checkpoints, step: int) -> None:
    """Rename the checkpoints after `step`: they are the newest by name, and continuing must not begin with them."""
    for name in checkpoints.names():
        if checkpoint_step(name) > step:
            (checkpoints.root / name).replace(checkpoints.root / f"rolled-back-{name}-{time.time_ns()}")
