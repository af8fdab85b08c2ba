"""What this process is doing now, and which files it and its loader's workers are reading: for the watchdog to look at.

Noting costs a few attribute writes, and a file that is being read a few hundred bytes in memory: there is no I/O in it.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_SLOTS, _SIZE = 256, 768
_HEAD = struct.Struct("qqd?H")  # process, its parent, when it began, whether it is done, bytes of the text
# anonymous and shared: workers are forked after this module is imported, so what they write here the parent can read
_TABLE = mmap.mmap(-1, _SLOTS * _SIZE)


@dataclass
class Progress:
    """Where the main thread is.

    count: of all that was noted. Ranks note the same things in the same order, so that the rank with the smallest
    count is the one that the others wait for. phase: what it does. step: from 1. ids: cuts of the batch it took last.
    steps_begun: in this process.
    """

    count: int = 0
    phase: str = "start"
    step: int = 0
    ids: tuple[str, ...] = ()
    steps_begun: int = 0


now = Progress()


def note(phase: str, *, step: int | None = None, ids: tuple[str, ...] | None = None) -> None:
    """Say that the main thread begins `phase`; what is not given stays. Every rank says the same in the same order."""
    if step is not None:
        now.step = step
        now.steps_begun += 1
    if ids is not None:
        now.ids = ids
    now.phase = phase
    now.count += 1


def restart() -> None:
    """Begin the notes of a run."""
    now.count, now.phase, now.step, now.ids, now.steps_begun = 0, "start", 0, (), 0


@dataclass(frozen=True)
class Reading:
    """A file that a process reads, or has read last when `done`; `seconds`: since it began."""

    process: int
    seconds: float
    done: bool
    what: str


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Note, while the block runs, that this process reads `what`."""
    process = os.getpid()
    place = process % _SLOTS * _SIZE
    text = what.encode(errors="replace")[: _SIZE - _HEAD.size]
    head = (process, os.getppid(), time.monotonic())
    _TABLE[place + _HEAD.size : place + _HEAD.size + len(text)] = text
    _HEAD.pack_into(_TABLE, place, *head, False, len(text))
    try:
        yield
    finally:
        _HEAD.pack_into(_TABLE, place, *head, True, len(text))


def readings() -> list[Reading]:
    """Return what this process and its children read or have read last, what has taken longest first."""
    own, moment, found = os.getpid(), time.monotonic(), []
    for place in range(0, _SLOTS * _SIZE, _SIZE):
        process, parent, began, done, size = _HEAD.unpack_from(_TABLE, place)
        if own in (process, parent):
            text = _TABLE[place + _HEAD.size : place + _HEAD.size + size].decode(errors="replace")
            found.append(Reading(process, moment - began, done, text))
    return sorted(found, key=lambda item: -item.seconds)
