"""Reading ahead: batches of a stream of tasks, made by worker processes and given in order."""

from __future__ import annotations

import atexit
import multiprocessing
import resource
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from harken.config.schema import DataConfig
from harken.core.batch import Batch
from harken.core.errors import HarkenError
from harken.data.dataset import MicroBatches, Task, preparing

T = TypeVar("T")


def read_ahead(dataset: MicroBatches, tasks: Sampler[Task] | list[Task], config: DataConfig) -> Iterator[Batch]:
    """Yield the batches of tasks in order, read by the workers.

    Raises HarkenError as it was raised in a worker.
    """
    return _ahead(_Spoken(dataset), tasks, config)


def stream_ahead(dataset: IterableDataset[T], config: DataConfig) -> Iterator[T]:
    """Yield what each worker's own iteration of a dataset gives, the workers taking turns.

    Raises HarkenError as it was raised in a worker.
    """
    return _ahead(_SpokenStream(dataset), None, config)


def _ahead(
    dataset: Dataset[T | HarkenError], tasks: Sampler[Task] | list[Task] | None, config: DataConfig
) -> Iterator[T]:
    atexit.register(_kill_workers)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=tasks,
        num_workers=config.workers,
        prefetch_factor=config.prefetch_batches if config.workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        collate_fn=None,
    )
    for item in loader:
        if isinstance(item, HarkenError):
            raise item
        yield item


def read_batch(dataset: MicroBatches, task: Task) -> Batch:
    """Return the batch of a task; see `preparing` for its errors."""
    with preparing(lambda: (str(dataset.manifest.line(int(place))["id"]) for place in task.places)):
        return dataset[task]


@dataclass(frozen=True)
class _Spoken(Dataset[Batch | HarkenError]):
    """Gives errors that are meant for the user as values: torch would wrap them in the worker's traceback."""

    dataset: MicroBatches

    def __getitem__(self, task: Task) -> Batch | HarkenError:
        try:
            return read_batch(self.dataset, task)
        except HarkenError as error:
            return error


@dataclass(frozen=True)
class _SpokenStream(IterableDataset[T | HarkenError]):
    """The same for a dataset that is iterated over."""

    dataset: IterableDataset[T]

    def __iter__(self) -> Iterator[T | HarkenError]:
        try:
            yield from self.dataset
        except HarkenError as error:
            yield error


def _start_worker(worker: int) -> None:
    """Workers leave the cores to the model, and leave signals to the main process, which saves and ends them.

    A limit of `batch.memory_gib` is the model's: a reader that met it would call good audio unreadable.
    """
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _kill_workers() -> None:
    """End workers for good when the main process exits: they ignore the SIGTERM that Python would wait for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would print a traceback for each
    for child in multiprocessing.active_children():
        child.kill()
