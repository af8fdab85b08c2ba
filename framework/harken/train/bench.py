"""The loader alone, the model alone: which of the two limits a run."""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from harken.config.schema import RunConfig
from harken.core import distributed
from harken.core.frames import FrameSpec
from harken.data.loader import Step
from harken.engine.deepspeed import start_processes
from harken.engine.precision import resolved
from harken.train.log import say
from harken.train.loop import Run, take_step
from harken.train.run import MakeObjective, MakePrepare, build_run

KEPT_STEPS = 8  # in memory, for the model to take in turn
ENOUGH = 1.2  # how much faster than the model the loader should be, so that neither a slow file nor a long cut stops it


@dataclass(frozen=True)
class DataBench:
    """Audio seconds a second over all ranks; real audio, without padding.

    loader: batches read, masked and collated and then thrown away. model: steps on batches that are in memory. workers:
    loader processes of each rank, 0 for the training process itself.
    """

    loader: float
    model: float
    workers: int
    steps: int

    def verdict(self) -> str:
        """Return in one sentence which of the two is the limit and what would move it."""
        ratio = self.loader / self.model
        if self.workers == 0:
            share = 100 * self.model / (self.model + self.loader)
            return (
                f"without workers a step waits for its own reading, {share:.0f} % of the time: "
                "`data.workers=1` reads while the model computes"
            )
        if ratio >= ENOUGH:
            return f"the model is the limit: {self.workers} worker(s) read {ratio:.1f} times as fast as it computes"
        needed = math.ceil(self.workers * ENOUGH / ratio)
        return (
            f"the loader is the limit: {self.workers} worker(s) read {ratio:.2f} times as fast as the model computes; "
            f"`data.workers={needed}` should do if there are cores for them"
        )


def bench_data(
    config: RunConfig, make: MakeObjective, prepare: MakePrepare, spec: FrameSpec, *, steps: int
) -> DataBench:
    """Measure `steps` steps of each, after two to warm up. Nothing is saved; every rank calls it."""
    start_processes(config.engine)
    config = replace(config, engine=resolved(config.engine), log=replace(config.log, tensorboard=False))
    with _shared_folder() as folder:
        run = build_run(config, folder, make, prepare, spec)
        say(f"reading {steps} steps")
        reader = run.loader.steps(run.state.position)
        kept = list(itertools.islice(reader, 2))  # starts the workers; what they have read ahead is used up below
        ahead = config.data.workers * config.data.prefetch_batches
        skipped = _count(itertools.islice(reader, _steps_of(ahead, kept)))
        begin, seconds = time.perf_counter(), 0.0
        for step in itertools.islice(reader, steps):
            seconds += _audio(step, config)
            kept = [*kept, step][-KEPT_STEPS:]
        loader = distributed.sum_over_ranks([seconds / (time.perf_counter() - begin)])[0]
        reader.close()
        say(f"{loader:.0f} audio seconds a second ({skipped} steps read ahead before); computing {steps} steps")
        run.engine.model.train()
        model = _model_speed(run, kept, steps, config)
        run.log.close()
    return DataBench(loader, model, config.data.workers, steps)


@contextmanager
def _shared_folder() -> Iterator[Path]:
    """Give all ranks rank 0's temporary folder."""
    with tempfile.TemporaryDirectory() as own:
        yield Path(distributed.broadcast_text(own))
        distributed.barrier()


def _steps_of(batches: int, seen: list[Step]) -> int:
    """Return in how many steps that many batches are used up."""
    a_step = max(1, sum(len(step.batches) for step in seen) // len(seen))
    return -(-batches // a_step)


def _count(steps: Iterator[Step]) -> int:
    return sum(1 for _ in steps)


def _model_speed(run: Run, kept: list[Step], steps: int, config: RunConfig) -> float:
    """Take steps on the kept batches in turn; return the audio seconds a second over all ranks."""
    for step in kept:
        take_step(run, step)
    _wait_for_device()
    begin, seconds = time.perf_counter(), 0.0
    for step in itertools.islice(itertools.cycle(kept), steps):
        take_step(run, step)
        run.state.step += 1
        seconds += _audio(step, config)
    _wait_for_device()
    return distributed.sum_over_ranks([seconds / (time.perf_counter() - begin)])[0]


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _audio(step: Step, config: RunConfig) -> float:
    return sum(batch.real for batch in step.batches) / config.data.sample_rate
