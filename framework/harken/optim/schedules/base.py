"""What every schedule promises."""

from __future__ import annotations

from typing import Protocol


class Schedule(Protocol):
    """Maps what has been done, steps and hours of audio, to the learning rate of the next step."""

    def __call__(self, step: int, hours: float) -> float:
        """Return the learning rate of the step after `step` steps, in which all ranks saw `hours` of audio.

        It depends on nothing else, so that a run that is continued has the rates of one that is not.
        """
        ...
