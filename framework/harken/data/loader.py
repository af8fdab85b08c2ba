"""Loaders: this rank's micro-batches of each step, in the order of the plan, from any position."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from harken.config.schema import BatchConfig, DataConfig
from harken.core.batch import Batch
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.data.augment import Augmentation
from harken.data.dataset import MicroBatches, Prepare, Task
from harken.data.manifest import Manifest
from harken.data.plan import Selection, make_plan, select


@dataclass(frozen=True)
class Position:
    """Where a run is in its data: the next step to take. This is the whole state of sampling."""

    epoch: int = 0
    step: int = 0


class TaskStream(Sampler[Task]):
    """This rank's tasks from a position on, epoch after epoch without end."""

    def __init__(
        self, selection: Selection, batch: BatchConfig, seed: int, rank: int, world_size: int, start: Position
    ) -> None:
        if batch.micro_batches_per_step % world_size:
            raise HarkenError(
                f"`batch.seconds_per_step` / `batch.max_seconds` must be a multiple of the number of processes, "
                f"got {batch.micro_batches_per_step} micro-batches and {world_size} processes"
            )
        self.selection, self.batch, self.seed = selection, batch, seed
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[Task]:
        epoch, first = self.start.epoch, self.start.step
        while True:
            plan = make_plan(self.selection, self.batch, Draws(self.seed, epoch))
            for step in range(first, plan.steps):
                for slot in range(self.rank, plan.per_step, self.world_size):
                    yield Task(epoch, step, slot, plan[step * plan.per_step + slot])
            epoch, first = epoch + 1, 0


class TrainLoader:
    """Yields, for each step, the list of this rank's batches and the position after the step."""

    def __init__(
        self,
        config: DataConfig,
        batch: BatchConfig,
        prepare: Prepare,
        *,
        seed: int,
        hop: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        manifest = Manifest(config.train)
        self.config, self.batch, self.seed = config, batch, seed
        self.rank, self.world_size = rank, world_size
        slowest = min(config.speed, default=1.0)
        longest = config.max_seconds if not config.speed else min(config.max_seconds, batch.max_seconds * slowest)
        self.selection = select(np.asarray(manifest.seconds), config.min_seconds, longest, config.crop_seconds)
        if slowest < 1.0:  # a slowed cut is longer: fill batches by the longest it can become
            self.selection = Selection(
                self.selection.places, self.selection.seconds / np.float32(slowest), self.selection.dropped
            )
        self.dataset = MicroBatches(manifest, config, prepare, seed, hop, Augmentation.build(config))

    def steps_in(self, epoch: int) -> int:
        """Return the number of steps of an epoch."""
        return make_plan(self.selection, self.batch, Draws(self.seed, epoch)).steps

    def steps(self, start: Position) -> Iterator[tuple[list[Batch], Position]]:
        """Iterate without end from a position; reaching the first batch costs the same wherever the position is."""
        stream = TaskStream(self.selection, self.batch, self.seed, self.rank, self.world_size, start)
        batches = _read(self.dataset, stream, self.config)
        per_rank = self.batch.micro_batches_per_step // self.world_size
        epoch, step = start.epoch, start.step
        while True:
            total = self.steps_in(epoch)
            while step < total:
                micro_batches = [next(batches) for _ in range(per_rank)]
                step += 1
                yield micro_batches, Position(epoch, step) if step < total else Position(epoch + 1, 0)
            epoch, step = epoch + 1, 0


class EvalLoader:
    """Every cut of a manifest once, in batches by duration; ranks divide the batches."""

    def __init__(
        self, path: str, config: DataConfig, max_seconds: float, prepare: Prepare, *, rank: int = 0, world_size: int = 1
    ) -> None:
        manifest = Manifest(path)
        self.config, self.rank, self.world_size = config, rank, world_size
        longest = manifest.longest
        selection = select(np.asarray(manifest.seconds), 0.0, longest, None)
        batch = BatchConfig(max_seconds=max(max_seconds, longest), seconds_per_step=max(max_seconds, longest))
        self.plan = make_plan(selection, batch, Draws(0, 0), shuffle=False)
        self.dataset = MicroBatches(manifest, config, prepare, 0)

    def __len__(self) -> int:
        """Number of batches over all ranks."""
        return len(self.plan)

    def first(self) -> Batch:
        """Read this rank's first batch in this process: the same on every rank when there are fewer than ranks."""
        place = min(self.rank, len(self.plan) - 1)
        return self.dataset[Task(0, place, 0, self.plan[place])]

    def __iter__(self) -> Iterator[tuple[Batch, bool]]:
        """Yield (batch, counts): ranks get equally many; one that runs out repeats its last, which does not count."""
        rounds = -(-len(self.plan) // self.world_size)
        places = [turn * self.world_size + self.rank for turn in range(rounds)]
        tasks = [Task(0, place, 0, self.plan[min(place, len(self.plan) - 1)]) for place in places]
        batches = _read(self.dataset, tasks, self.config)
        return ((batch, place < len(self.plan)) for batch, place in zip(batches, places, strict=True))


@dataclass(frozen=True)
class _Spoken(torch.utils.data.Dataset[Batch | HarkenError]):
    """Gives errors that are meant for the user as values: torch would wrap them in the worker's traceback."""

    dataset: MicroBatches

    def __getitem__(self, task: Task) -> Batch | HarkenError:
        try:
            return self.dataset[task]
        except HarkenError as error:
            return error


def _read(dataset: MicroBatches, tasks: Sampler[Task] | list[Task], config: DataConfig) -> Iterator[Batch]:
    """Yield the batches of tasks in order, read by the workers.

    Raises HarkenError as it was raised in a worker.
    """
    atexit.register(_kill_workers)
    loader = DataLoader(
        _Spoken(dataset),
        batch_size=None,
        sampler=tasks,
        num_workers=config.workers,
        prefetch_factor=config.prefetch_batches if config.workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        collate_fn=None,
    )
    for batch in loader:
        if isinstance(batch, HarkenError):
            raise batch
        yield batch


def _start_worker(worker: int) -> None:
    """Workers leave the cores to the model, and leave signals to the main process, which saves and ends them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _kill_workers() -> None:
    """End workers for good when the main process exits: they ignore the SIGTERM that Python would wait for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would print a traceback for each
    for child in multiprocessing.active_children():
        child.kill()
