"""The loop: it knows steps, not objectives."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from harken.config.schema import RunConfig
from harken.core import distributed, progress
from harken.core.batch import Batch, Note
from harken.core.clock import duration
from harken.core.errors import HarkenError
from harken.data.loader import EvalLoader, Step, TrainLoader
from harken.data.streams.loader import StreamLoader
from harken.engine.base import Engine
from harken.optim.ema import WeightAverage
from harken.optim.groups import RateScale, set_rates
from harken.optim.schedules.base import Schedule
from harken.train.checkpoint import Checkpoints
from harken.train.graphs import GraphCounter
from harken.train.health import Trouble, look, probe_ranks
from harken.train.log import RunLog, say
from harken.train.metrics import Meter
from harken.train.nonfinite import name_skipped
from harken.train.passes import StepRunner
from harken.train.profile import Profile
from harken.train.rollback import due, roll_back, skipped
from harken.train.shrink import shrink
from harken.train.signals import StopRequest
from harken.train.speed import Speedometer
from harken.train.state import TrainState
from harken.train.validate import validate

UNREADABLE = ("replaced", "unreadable")
"""Kinds of notes that count against `data.max_bad_share`."""
MOST_SAID = 20
"""Notes of one step that are printed."""


@dataclass
class Run:
    """Everything a loop needs, built by `harken.train.run`."""

    config: RunConfig
    folder: Path
    engine: Engine
    loader: TrainLoader | StreamLoader
    valid: EvalLoader | None
    schedule: Schedule
    rate_scale: RateScale
    group_names: list[str]
    flops: Callable[[Batch], float]
    after_step: Callable[[int], None]
    checkpoints: Checkpoints
    log: RunLog
    speed: Speedometer
    profile: Profile
    graphs: GraphCounter
    average: WeightAverage | None = None
    state: TrainState = field(default_factory=TrainState)
    meter: Meter = field(default_factory=Meter)
    stop: StopRequest = field(default_factory=StopRequest)
    weights_lost: bool = False
    trouble: Trouble | None = None
    """An alarm that asks for a rollback, until it is made."""
    rate: float = 0.0
    """Learning rate of the last step, before `rate_scale`."""


def train(run: Run) -> str:
    """Take steps until the end, an early stop, or a signal; return which: `finished`, `early stop`, `stopped`."""
    config, state = run.config, run.state
    started, wall_before, first_step = time.perf_counter(), state.wall_seconds, state.step
    run.engine.model.train()
    steps = run.loader.steps(state.position)
    saved, save_due = state.step, False
    while state.step < config.train.steps:
        run.profile.begin(state.step + 1)
        waiting = time.perf_counter()
        progress.note("data", step=state.step + 1)
        step = next(steps)
        run.speed.waited += time.perf_counter() - waiting
        take_step(run, step)
        advance(run, step)
        run.profile.end(state.step)
        state.wall_seconds = wall_before + time.perf_counter() - started
        if due(config.train, state, weights_lost=run.weights_lost):
            _back(run, *skipped(state))
            first_step = min(first_step, state.step)
            continue
        if state.step % config.log.every_steps == 0 or state.step == config.train.steps:
            left = (time.perf_counter() - started) / (state.step - first_step) * (config.train.steps - state.step)
            begun = time.perf_counter()
            _log(run, left)
            run.speed.logged += time.perf_counter() - begun
        excluded = time.perf_counter()
        score, give_up = None, False
        if run.valid is not None and (
            state.step % config.train.valid_every_steps == 0 or state.step == config.train.steps
        ):
            score, give_up = _validate(run)
        if run.trouble is not None:
            _back(run, run.trouble.text, run.trouble.since)
            first_step = min(first_step, state.step)
            run.speed.excluded += time.perf_counter() - excluded
            continue
        run.stop.received |= run.checkpoints.failed  # the save below then tells every rank why
        stopping = run.stop.agreed()
        save_due |= state.step % config.checkpoint.every_steps == 0
        if (
            (save_due and not state.skipped_in_a_row)  # skipped steps must not push out what to roll back to
            or state.step == config.train.steps
            or stopping
            or give_up
            or score is not None
        ):
            progress.note("save")
            run.checkpoints.save(run.engine, state, run.average, score)
            saved, save_due = state.step, False
        if stopping or give_up or state.step == config.train.steps:
            run.checkpoints.wait()
        run.speed.excluded += time.perf_counter() - excluded
        if stopping:
            say(f"asked to stop: saved step {saved}; the same command continues from there")
            return "stopped"
        if give_up:
            say(
                f"no better `{config.checkpoint.metric}` in {config.train.patience} validations: "
                f"stopping at step {state.step}"
            )
            return "early stop"
    say(f"finished {state.step} steps, {state.seconds / 3600:.2f} h of audio, in {duration(state.wall_seconds)}")
    return "finished"


def rehearse(run: Run) -> None:
    """Validate on one batch before the first step: what is wrong there should show now, not hours later.

    Raises HarkenError when `checkpoint.metric` is none of the metrics.
    """
    if run.valid is None:
        return
    figures, notes = validate(run.engine, [(run.valid.first, True)])
    _name(run, notes, " in validation")
    metric = run.config.checkpoint.metric
    if metric not in figures:
        raise HarkenError(f"`checkpoint.metric` must be one of {', '.join(figures)}, got `{metric}`")


def _back(run: Run, trouble: str, newest: int) -> None:
    """Go back to a checkpoint of at most step `newest`."""
    roll_back(run.checkpoints, run.engine, run.average, run.state, trouble, newest)
    run.meter, run.weights_lost, run.trouble = Meter(), False, None


def _watch(run: Run, kind: str, figures: dict[str, float]) -> None:
    """Tell the alarms that ring, and do what `health.action` says; every rank calls it.

    Raises HarkenError, on every rank, where an alarm is to end the run.
    """
    for trouble in look(run.config.health, kind, figures, run.state):
        if run.config.health.action == "stop":
            raise HarkenError(
                f"{trouble.text}; `health.action: stop` ends the run: the same command goes on from its last "
                f"checkpoint, which may be from after step {trouble.since}"
            )
        if run.config.health.action == "roll_back":
            run.trouble = run.trouble or trouble
        else:
            say(f"WARNING {trouble.text}")


def take_step(run: Run, step: Step) -> bool:
    """Run this rank's batches of a step and the optimiser; the gradient is that of the mean over all targets."""
    config, state = run.config, run.state
    progress.note("forward", ids=(*step.batches, *step.idle)[0].ids)
    run.rate = run.schedule(state.step, state.seconds / 3600)
    set_rates(run.engine.optimizer, run.group_names, run.rate, run.rate_scale, state.step)
    loader = run.loader if isinstance(run.loader, TrainLoader) else None
    passes = StepRunner(run.engine, loader, config.seed).run(step, state.step)
    for done in passes.done:
        run.meter.add(done.metrics)
        run.speed.add(done.batch, run.flops(done.batch))
        run.log.samples(state.step + 1, done.batch)
    if passes.failures and loader is not None:
        shrink(loader, run.log, state, passes.failures)
    run.engine.reduce(passes.scale)
    progress.note("step")
    begun = time.perf_counter()
    applied = run.engine.step()
    if applied:
        state.skipped_in_a_row, state.rolled_back_to = 0, None
        if run.average is not None:
            run.average.update(run.engine.model)
        run.after_step(state.step + 1)
    run.speed.updated += time.perf_counter() - begun
    if not applied:
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        learned = [(done.batch, done.total) for done in passes.done]
        if not learned:  # every rank looks into a batch; this one's may be too long for its memory
            fitting = step.idle or ([loader.smallest()] if loader is not None else step.batches)
            learned = [(fitting[0], torch.zeros(()))]
        run.weights_lost = name_skipped(run.engine, config.seed, state.step, *zip(*learned, strict=True))
    run.meter.add({"skipped_share": (torch.tensor(float(not applied)), torch.ones(()))})
    return applied


def advance(run: Run, step: Step) -> None:
    """Count a step that was taken, and name what happened to its cuts; every rank calls it.

    Raises HarkenError when more than `data.max_bad_share` of the cuts could not be read.
    """
    state, batches = run.state, step.batches
    state.step += 1
    state.position = step.position
    for source, seconds in step.sources.items():
        state.seconds_by_source[source] = state.seconds_by_source.get(source, 0.0) + seconds
    rate = run.config.data.sample_rate
    notes = [note for batch in batches for note in batch.notes]
    rows, seconds, noted = distributed.sum_over_ranks(
        [float(sum(len(b.ids) for b in batches)), sum(b.real for b in batches) / rate, float(len(notes))]
    )
    state.seconds += seconds
    state.cuts_read += int(rows)
    if noted:
        _name(run, notes)
    bad = [cut for kind in UNREADABLE for cut in state.noted.get(kind, {})]
    allowed = run.config.data.max_bad_share
    if len(bad) > 10 and len(bad) > allowed * state.cuts_read:
        raise HarkenError(
            f"{len(bad)} of {state.cuts_read} cuts could not be read, more than `data.max_bad_share` {allowed}: "
            f"{', '.join(bad[:10])}, ...; {run.loader.remedy}"
        )
    run.log.advance()


def _name(run: Run, notes: list[Note], where: str = "") -> None:
    """Count and name what happened to cuts, each once; every rank counts those of all, and stops at the same step."""
    said = 0
    for note in distributed.gather(notes):
        kind = note.kind + where
        if note.cut not in run.state.noted.setdefault(kind, {}):
            run.state.noted[kind][note.cut] = note.reason
            said += 1
            if said <= MOST_SAID:
                say(f"NOTE {kind}: {note.reason}")
    if said > MOST_SAID:  # a shard that breaks off loses hundreds of cuts at once
        say(f"NOTE and {said - MOST_SAID} more, each of them in `noted` of the next checkpoint's state.json")


def _log(run: Run, left: float) -> None:
    figures = run.meter.read()
    figures["gradient_norm"] = run.engine.grad_norm
    figures["learning_rate"] = run.rate
    figures.update(run.speed.read() | run.graphs.read())
    by_source = {f"hours/{name}": seconds / 3600 for name, seconds in run.state.seconds_by_source.items()}
    run.log.write(
        "train",
        run.state.step,
        {**figures, **by_source},
        epoch=run.state.position.epoch,
        hours=run.state.seconds / 3600,
        wall=run.state.wall_seconds,
    )
    _watch(run, "train", figures)
    if not figures.get("skipped_share"):
        figures.pop("skipped_share", None)  # the line tells of skipped steps when there are any
    run.log.line("train", run.state.step, figures, left)


def _validate(run: Run) -> tuple[float, bool]:
    """Validate (with the averaged weights where kept); return the score and whether patience has run out."""
    assert run.valid is not None
    if run.average is not None:
        with run.average.applied(run.engine.model):
            figures, notes = validate(run.engine, run.valid)
    else:
        figures, notes = validate(run.engine, run.valid)
    _name(run, notes, " in validation")
    figures |= probe_ranks(run.engine.model, run.valid.first)
    run.log.write("valid", run.state.step, figures)
    run.log.line("valid", run.state.step, figures)
    _watch(run, "valid", figures)
    metric, state, keep = run.config.checkpoint.metric, run.state, run.config.checkpoint
    score = figures[metric]
    if not math.isfinite(score):
        say(f"WARNING `{metric}` of the validation at step {state.step} is {score}: it is not counted as a best one")
    better = math.isfinite(score) and (
        state.best_score is None or (score > state.best_score if keep.higher_is_better else score < state.best_score)
    )
    state.best_score = score if better else state.best_score
    state.validations_without_best = 0 if better else state.validations_without_best + 1
    return score, out_of_patience(run)


def out_of_patience(run: Run) -> bool:
    """Whether the last `train.patience` validations were no better than the best: the run ends, or has ended."""
    return bool(run.config.train.patience and run.state.validations_without_best >= run.config.train.patience)
