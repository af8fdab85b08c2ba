"""The memory of this process's device: when it ran out, how much a step took, and a limit that is real on a CPU too."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from harken.core import distributed

GIB = 2**30
# what torch, oneDNN and CUDA's libraries say instead of raising OutOfMemoryError
_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "alloc_failed",
    "could not create a memory",  # oneDNN, which gives no reasons
    "could not create a primitive",
    "could not execute a primitive",
)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT = 2**28  # bytes: larger blocks are few, and pieces in their place would leave none for the next of their size
_RETURNED = 2**17  # bytes: glibc's own first value of both thresholds


@dataclass
class _Memory:
    """How this process treats a CPU's memory. limit_gib: what `refuse_above` was given."""

    limit_gib: float | None = None
    keeps: bool = False


_memory = _Memory()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def free() -> None:
    """Give back what a failed pass held."""
    gc.collect()  # its exception and graph may refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif _memory.limit_gib is not None:
        _trim()
        renew_limit()


def device_gib() -> float:
    """Return the memory of this process's GPU in GiB, or its share of what is free to the machine's CPUs."""
    device = distributed.device()
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(distributed.world_size())))
    return _kib("/proc/meminfo", "MemAvailable") / 2**20 / max(1, local) + _kib("/proc/self/status", "VmRSS") / 2**20


def refuse_above(gib: float) -> None:
    """Refuse this process more memory than `gib` in all: on a CPU the allocator then fails, as a GPU's does.

    What it has mapped from files does not count.
    """
    device = distributed.device()
    if device.type == "cuda":
        share = min(1.0, gib * GIB / torch.cuda.get_device_properties(device).total_memory)
        torch.cuda.set_per_process_memory_fraction(share, device)
        return
    _return_what_is_free()
    _memory.limit_gib = gib
    renew_limit()


def renew_limit() -> None:
    """Leave out of the limit on a CPU what was reserved since and is not used; without a limit, do nothing.

    The kernel refuses by what is reserved. oneDNN compiles kernels for each new shape, reserves about a megabyte for
    each and uses a tenth of it: after some hundreds of shapes the limit would leave no room for a batch.
    """
    if _memory.limit_gib is None:
        return
    room = _memory.limit_gib * GIB - 1024 * _kib("/proc/self/status", "VmRSS")
    soft = int(1024 * _kib("/proc/self/status", "VmData") + max(0.0, room))
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _trim() -> None:
    """Have glibc give back what is free in its heap; source: malloc_trim(3)."""
    _call("malloc_trim", 0)


def keep_what_is_free() -> None:
    """Have the C library keep memory of up to 256 MiB that is set free, as far as it is glibc.

    Else each step takes all of its activations and gradients from the system anew, which clears every page of them.
    Under a limit that `refuse_above` sets, nothing is kept: in pieces, it would leave no room for a batch.
    Source: mallopt(3), M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
    """
    _memory.keeps = True
    if _memory.limit_gib is None:
        _set_thresholds(trim=-1, mmap=_KEPT)


def _return_what_is_free() -> None:
    """Have the C library give memory of more than 128 KiB back when it is set free, as far as it is glibc."""
    _set_thresholds(trim=_RETURNED, mmap=_RETURNED)
    _trim()


def _set_thresholds(*, trim: int, mmap: int) -> None:
    _call("mallopt", _TRIM_THRESHOLD, trim)
    _call("mallopt", _MMAP_THRESHOLD, mmap)


def _call(name: str, *numbers: int) -> None:
    """Call a function of the C library, where it has it."""
    library = ctypes.CDLL(None)
    if hasattr(library, name):
        getattr(library, name)(*numbers)


@contextmanager
def at_most(gib: float) -> Iterator[None]:
    """Refuse more than `gib` for a while."""
    before, most_before = resource.getrlimit(resource.RLIMIT_DATA), _memory.limit_gib
    refuse_above(gib)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
        _memory.limit_gib = most_before
        if _memory.keeps:
            keep_what_is_free()
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(1.0, distributed.device())


def begin_peak() -> None:
    """Measure the peak anew from here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # a kernel that cannot: the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """Return the largest memory since `begin_peak` in GiB: of the GPU's allocator, or of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return _kib("/proc/self/status", "VmHWM") / 2**20


def _kib(path: str, name: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0
