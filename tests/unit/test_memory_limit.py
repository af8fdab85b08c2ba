"""A CPU's memory: the limit is one on what is used, not on what is reserved; what is set free is kept without one."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

RESERVES = """
import mmap, sys
import numpy as np
from harken.engine.memory import free, refuse_above, renew_limit

MB = 2**20
used = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS"))) * 1024
refuse_above((used + 200 * MB) / 2**30)
reserved = mmap.mmap(-1, 120 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
try:
    np.ones(150 * MB, np.uint8)
    print("reserved memory is not counted")
except MemoryError:
    print("refused while 120 MB are reserved")
{renew}()
np.ones(150 * MB, np.uint8)
print("there is room")
try:
    np.ones(300 * MB, np.uint8)
    print("no limit")
except MemoryError:
    print("refused above the limit")
"""


def lines_of(program: str) -> list[str]:
    """Return what a program prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
@pytest.mark.parametrize("renew", ["renew_limit", "free"])
def test_what_is_reserved_and_not_used_takes_no_room(renew: str) -> None:
    expected = ["refused while 120 MB are reserved", "there is room", "refused above the limit"]
    assert lines_of(RESERVES.format(renew=renew)) == expected


KEEPS = """
import resource
import torch
from harken.engine.memory import at_most, keep_what_is_free

def pages():
    torch.ones(26 * 2**20)  # more than the next, which needs room for its alignment
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25 * 2**20)  # 100 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print("returned", pages())
keep_what_is_free()
print("kept", pages())
with at_most(100.0):
    print("returned", pages())
print("kept", pages())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc's memory")
def test_memory_that_is_set_free_is_used_again_without_asking_the_system() -> None:
    words = [line.split() for line in lines_of(KEEPS)]
    assert [word for word, _ in words] == ["returned", "kept", "returned", "kept"]
    whole = 100 * 2**20 // resource.getpagesize()
    for word, pages in words:
        assert int(pages) < whole / 10 if word == "kept" else int(pages) > whole / 2
