"""One run in a folder at a time."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harken.core import distributed
from harken.core.errors import HarkenError
from harken.train.log import say

LOCK = ".lock"


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder in the main process; the kernel releases it when that process ends, however.

    Raises HarkenError on every rank when another run holds it, naming the process.
    """
    descriptor, holder = -1, ""
    if distributed.is_main():
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        holder = _take(descriptor, folder)
    try:
        holder = distributed.broadcast_text(holder)
        if holder:
            raise HarkenError(
                f"{folder} is being trained by {holder}: stop that run or wait for its end, or give another `--exp`"
            )
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _take(descriptor: int, folder: Path) -> str:
    """Take the lock and write who has it; return who else has it already."""
    try:
        # a record lock, not flock: the loader's workers would inherit that, and outlive a killed run by seconds
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return os.pread(descriptor, 1000, 0).decode().strip() or "another process"
    except OSError as error:
        say(f"WARNING {folder / LOCK} cannot be locked ({error.strerror}): see that no other run is in this folder")
        return ""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return ""
