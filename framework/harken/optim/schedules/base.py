"""What every schedule promises."""

from __future__ import annotations

from typing import Protocol


class Schedule(Protocol):
    """Maps the number of steps already taken to the learning rate of the next."""

    def __call__(self, step: int) -> float:
        """Return the learning rate of the step after `step` steps."""
        ...
