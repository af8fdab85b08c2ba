"""What asks for a save at the next step boundary: SIGTERM, SIGINT, SIGUSR1 (of `harken launch`), a lost launcher.

torchrun passes SIGTERM on to its processes. `deepspeed` dies of it and leaves them behind, and so does every
launcher that is killed: processes whose launcher is gone would train on with nobody to stop them, on GPUs that the next
start needs. So they save and end, too.
"""

from __future__ import annotations

import itertools
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from harken.core import distributed

LAUNCHERS = (
    *("torchrun", "torch.distributed.run"),
    *("deepspeed", "ds", "deepspeed.pt", "deepspeed.launcher.runner", "deepspeed.launcher.launch"),
)
"""Scripts and modules that start processes and watch over them."""


class StopRequest:
    """Remembers a signal; `agreed` tells every rank whether any of them got one, or lost its launcher."""

    def __init__(self) -> None:
        self.received = False
        self._launched = _LAUNCHED
        for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(kind, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; a collective, so every rank calls it at the same step."""
        return distributed.any_rank(self.received or self.deserted())

    def deserted(self) -> bool:
        """Whether a launcher of this process has ended: its child has another parent then, a zombie's too."""
        try:
            return any(child.ppid() != parent.pid for child, parent in itertools.pairwise(self._launched))
        except psutil.NoSuchProcess:
            return True


def launchers() -> list[psutil.Process]:
    """Return the launchers that started this process, the nearest first: `deepspeed` is two; without one none."""
    found = []
    with suppress(psutil.Error):  # what may not be looked at is not watched
        for process in psutil.Process().parents():
            if _program(process.cmdline()) not in LAUNCHERS:
                break
            found.append(process)
    return found


def _program(command: list[str]) -> str:
    """Return the name of the script, or the module, that a command has Python run; of other programs nothing."""
    if not command or not Path(command[0]).name.startswith("python"):
        return ""
    words = iter(command[1:])
    for word in words:
        if word in ("-W", "-X"):  # they have a value
            next(words, "")
        elif word == "-m":
            return next(words, "")
        elif not word.startswith("-"):
            return Path(word).name
    return ""


# Looked up where this is imported: building a run takes minutes, in which a launcher may die.
_LAUNCHED = [psutil.Process(), *launchers()]
