"""Reading ahead: batches of a stream of tasks, made by worker processes and given in order."""

from __future__ import annotations

import atexit
import multiprocessing
import resource
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Semaphore
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from harken.config.schema import DataConfig
from harken.core.batch import Batch
from harken.core.errors import HarkenError
from harken.data.dataset import MicroBatches, Task, preparing

T = TypeVar("T")
SECONDS_TO_BEGIN = 60.0
STARTS = 3


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
    begun = multiprocessing.Semaphore(0)
    loader: DataLoader[T | HarkenError] = DataLoader(
        dataset,
        batch_size=None,
        sampler=tasks,
        num_workers=config.workers,
        prefetch_factor=config.prefetch_batches if config.workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(_start_worker, begun),
        collate_fn=None,
    )
    for item in _with_workers(loader, begun):
        if isinstance(item, HarkenError):
            raise item
        yield item


def _with_workers(loader: DataLoader[T | HarkenError], begun: Semaphore) -> Iterator[T | HarkenError]:
    """Return the loader's iterator once each of its workers has raised `begun`; start them anew when one does not.

    A process with threads must not fork, and this one has those of the collectives. In CPython 3.11 the child waits for
    ever in `PyOS_AfterFork_Child` when another thread was about to enter Python: it re-initialises the interpreter's
    lock after it has taken it. Workers that are spawned instead would each hold a copy of the corpus's durations.
    Raises HarkenError when workers do not begin three times in a row.
    """
    for _ in range(STARTS):
        others = set(multiprocessing.active_children())
        items = iter(loader)
        if all(begun.acquire(timeout=SECONDS_TO_BEGIN) for _ in range(loader.num_workers)):
            return items
        del items
        for child in set(multiprocessing.active_children()) - others:
            child.kill()
            child.join()
        while begun.acquire(block=False):
            pass
        print(f"WARNING a loader's worker has not begun in {SECONDS_TO_BEGIN:g} s: starting them anew", flush=True)
    raise HarkenError(
        f"the workers of a loader must begin within {SECONDS_TO_BEGIN:g} s, and {STARTS} times one did not: look at "
        "the machine's load and memory, or set `data.workers=0`"
    )


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


def _start_worker(begun: Semaphore, worker: int) -> None:
    """Workers leave the cores to the model, and leave signals to the main process, which saves and ends them.

    A limit of `batch.memory_gib` is the model's: a reader that met it would call good audio unreadable.
    """
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    begun.release()


def _kill_workers() -> None:
    """End workers for good when the main process exits: they ignore the SIGTERM that Python would wait for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would print a traceback for each
    for child in multiprocessing.active_children():
        child.kill()
