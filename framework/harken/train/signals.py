"""SIGTERM, SIGINT and SIGUSR1 ask for a save at the next step boundary; USR1 is what a job of `harken launch` sends."""

from __future__ import annotations

import signal
from types import FrameType

from harken.core import distributed


class StopRequest:
    """Remembers a signal; `agreed` tells every rank whether any of them got one."""

    def __init__(self) -> None:
        self.received = False
        for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(kind, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; a collective, so every rank calls it at the same step."""
        return distributed.any_rank(self.received)
