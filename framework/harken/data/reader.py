"""Reading ahead: batches of a stream of tasks, made by worker processes and given in order."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Sampler

from harken.config.schema import DataConfig
from harken.core.batch import Batch
from harken.core.errors import HarkenError
from harken.data.dataset import MicroBatches, Task


def read_ahead(dataset: MicroBatches, tasks: Sampler[Task] | list[Task], config: DataConfig) -> Iterator[Batch]:
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


def read_batch(dataset: MicroBatches, task: Task) -> Batch:
    """Return the batch of a task. HarkenErrors pass; any other error becomes a RuntimeError that names the cuts.

    Errors are pickled on their way out of a worker, and one whose class cannot be (it is defined in a function, say)
    would be lost, and the run would wait for its batch for ever.
    """
    try:
        return dataset[task]
    except HarkenError:
        raise
    except Exception as error:
        cuts = ", ".join(str(dataset.manifest.line(int(place))["id"]) for place in task.places)
        raise RuntimeError(f"preparing cuts {cuts} failed with {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class _Spoken(torch.utils.data.Dataset[Batch | HarkenError]):
    """Gives errors that are meant for the user as values: torch would wrap them in the worker's traceback."""

    dataset: MicroBatches

    def __getitem__(self, task: Task) -> Batch | HarkenError:
        try:
            return read_batch(self.dataset, task)
        except HarkenError as error:
            return error


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
