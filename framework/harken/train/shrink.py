"""What a run learns from a batch that did not fit: its bucket's limit is lowered, its cuts are named and counted."""

from __future__ import annotations

from collections.abc import Sequence

from harken.data.limits import LimitState
from harken.data.loader import TrainLoader
from harken.train.log import RunLog, say
from harken.train.passes import Failure
from harken.train.state import TrainState

HALVED, LEFT_OUT = "did not fit in memory, read in halves", "did not fit in memory alone, left out"


def shrink(loader: TrainLoader, log: RunLog, state: TrainState, failures: Sequence[Failure]) -> None:
    """Lower the limits for what comes after this step, and write down which cuts did not fit.

    Every rank calls it with the failures of all ranks in one order, so that all plan alike.
    """
    position, step = state.position, state.step + 1
    limits = loader.planner.limits
    for failure in failures:
        seconds = failure.seconds
        padded = seconds * len(failure.cuts)
        kind = LEFT_OUT if failure.alone else HALVED
        for cut in failure.cuts:
            state.noted.setdefault(kind, {}).setdefault(cut, failure.reason)
        cuts = ", ".join(failure.cuts[:20]) + (", ..." if len(failure.cuts) > 20 else "")
        told = f"WARNING step {step}: memory ran out for {len(failure.cuts)} x {seconds:.2f} s"
        if failure.alone:
            say(f"{told}: cut {cuts} is left out; lower `data.max_seconds` where it is one of many")
        else:
            now = limits.now.lowered(seconds, failure.characters, padded)
            limits = limits.lowered(now, position.epoch, position.segment)
            lower = now.at(seconds, failure.characters)
            say(f"{told}: run again in halves; such batches hold {lower:.1f} s from now on; cuts: {cuts}")
        log.write("memory", step, {"rows": float(len(failure.cuts)), "longest_seconds": seconds}, cuts=failure.cuts)
    if limits is not loader.planner.limits:
        state.limits = limits
        loader.limit(limits)


def limits_of(state: TrainState, whole: float | None) -> LimitState | None:
    """Return the limits that a run is continued with; None where it has none, or its `batch.max_seconds` has changed.

    whole: that number; None with `auto`, for which what was measured once holds.
    """
    saved = state.limits
    return saved if saved is not None and (whole is None or saved.now.whole == whole) else None
