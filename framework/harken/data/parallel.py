"""The same work on many files: several processes, results in order, progress, a clear end when a process dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from harken.core.errors import HarkenError
from harken.core.pieces import Piece, Pieces

T = TypeVar("T")
R = TypeVar("R")

WORTH_PROCESSES = 32
"""Items from which on several processes are started unasked: it takes seconds until they have imported Lhotse."""


def in_parallel(work: Callable[[T], R], items: Sequence[T], *, jobs: int | None, what: str) -> Iterator[R]:
    """Yield `work(item)` for each item, in order, from `jobs` processes, with progress on stderr.

    jobs: processes; None takes a process for each core, or this one where there is little to do.
    `work` is a function of a module, so that a new process finds it.
    Raises HarkenError when a process dies.
    """
    if jobs is None:
        jobs = default_jobs() if len(items) >= WORTH_PROCESSES else 1
    jobs = max(1, min(jobs, len(items)))
    results = map(work, items) if jobs == 1 else _from_processes(work, items, jobs, what)
    yield from with_progress(results, len(items), what)


def _from_processes(work: Callable[[T], R], items: Sequence[T], jobs: int, what: str) -> Iterator[R]:
    size = max(1, min(64, len(items) // (16 * jobs)))
    starts = iter(range(0, len(items), size))
    # a server without threads forks the workers: safe beside torch, and Lhotse is imported once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lhotse"])
    waiting: deque[tuple[int, Future[list[R]]]] = deque()
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin) as pool:
        try:
            for start in starts:
                waiting.append((start, pool.submit(_run, work, items[start : start + size])))
                if len(waiting) >= 4 * jobs:  # do not hold a million results
                    yield from waiting.popleft()[1].result()
            while waiting:
                yield from waiting.popleft()[1].result()
        except BrokenProcessPool as error:
            raise HarkenError(
                f"a process reading {what} ended at once (out of memory, or a decoder crashed) while up to "
                f"{4 * jobs * size} items were read; try again with fewer jobs: --jobs 1"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


CHUNK = 256
"""`Division.chunk` where nothing else is said."""


@dataclass(frozen=True)
class Division:
    """How work is divided: into which folder, what its results depend on, and which piece is to be done, if one.

    chunk: items whose results are kept together: a piece that is started again repeats fewer than these.
    keep: whether work without a piece keeps results too, so that it goes on where it was killed.
    """

    folder: Path
    plan: Mapping[str, Any]
    piece: Piece | None
    chunk: int = CHUNK
    keep: bool = False


def in_pieces(
    work: Callable[[T], R],
    items: Sequence[T],
    *,
    jobs: int | None,
    what: str,
    division: Division,
    pack: Callable[[R], Any],
    unpack: Callable[[Any], R],
) -> Iterator[R]:
    """Yield `work(item)` for each item, in order, as `in_parallel`, with what pieces have done before.

    pack, unpack: a result to plain JSON and back. With a piece to be done, do it and yield nothing. Where nothing was
    done in pieces and nothing is to be kept, no folder is made.
    """
    if division.piece is None and not division.keep and not division.folder.is_dir():
        yield from in_parallel(work, items, jobs=jobs, what=what)
        return
    size = division.chunk
    pieces = Pieces(division.folder, division.plan, -(-len(items) // size))

    def do(chunk: int) -> list[Any]:
        part = items[chunk * size : (chunk + 1) * size]
        return [pack(result) for result in in_parallel(work, part, jobs=jobs, what=what)]

    if division.piece is not None:
        done = pieces.work(division.piece, do)
        print(f"piece {division.piece}: {done} chunks of up to {size} items done now, kept in {division.folder}")
        return
    for results in pieces.results(do):
        yield from map(unpack, results)


def _run(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    return [work(item) for item in items]


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    end_with_parent()


def end_with_parent() -> None:
    """From now on, end this process when its parent is gone, killed ones too: nobody else would."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def with_progress(results: Iterable[R], total: int, what: str) -> Iterator[R]:
    """Show a bar on a terminal, a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(results, total=total, desc=what, unit="", dynamic_ncols=True, leave=False)
        return
    began = last = time.monotonic()
    for count, result in enumerate(results, start=1):
        yield result
        now = time.monotonic()
        if now - last >= 10:
            last = now
            print(
                f"{what}: {count} of {total}, {count / (now - began):.0f} a second",
                file=sys.stderr,
                flush=True,
            )


def default_jobs() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
