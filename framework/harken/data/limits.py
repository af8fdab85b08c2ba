"""How much padded audio a rectangle may hold: a step function of its longest cut, and of its longest text.

Memory is not proportional to padded seconds: attention grows with the square of the duration, and what CTC or a
transducer keeps grows with the tokens too. So long cuts, and cuts with long texts, may have smaller limits than others.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harken.core.errors import HarkenError

EDGES = tuple(round(2 ** (power / 2), 3) for power in range(-2, 24))
"""Upper ends in seconds of buckets where nothing else says: 0.5, 0.707, 1, ... 2896."""
LOWERED = 0.8
"""What does not fit lowers its bucket's limit to this share of its size."""


@dataclass(frozen=True)
class Limits:
    """Padded seconds that a rectangle may hold, by the bucket of its longest cut and of its longest text.

    whole: padded seconds of a micro-batch, over all its parts. seconds: `(D,)` ascending upper ends of the buckets of
    duration. characters: `(U,)` those of text. padded: `(D, U)` limits, `whole` where not given. Without ends
    an axis has one bucket; what is above the last end is in the last bucket. A cut alone is never above a limit.
    """

    whole: float
    seconds: tuple[float, ...] = ()
    characters: tuple[float, ...] = ()
    padded: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        shape = (max(1, len(self.seconds)), max(1, len(self.characters)))
        if not self.padded:
            object.__setattr__(self, "padded", ((self.whole,) * shape[1],) * shape[0])
        if len(self.padded) != shape[0] or any(len(row) != shape[1] for row in self.padded):
            raise HarkenError(f"limits of {shape[0]} x {shape[1]} buckets need as many numbers, got {self.padded}")

    @classmethod
    def of_rows(cls, whole: float, rows: Sequence[Sequence[float]]) -> Limits:
        """Read `[seconds, padded]` or `[seconds, characters, padded]` rows, as `batch.limits` has them.

        Raises HarkenError when they are no table: each bucket of duration with each of text, once.
        """
        if not rows:
            return cls(whole)
        cells = {(row[0], row[1] if len(row) == 3 else 0.0): row[-1] for row in rows if len(row) in (2, 3)}
        seconds, characters = sorted({cell[0] for cell in cells}), sorted({cell[1] for cell in cells})
        widths = {len(row) for row in rows}
        if len(widths) != 1 or len(cells) != len(rows) or len(cells) != len(seconds) * len(characters):
            raise HarkenError(
                "`batch.limits` must be a list of [seconds, padded seconds], or of [seconds, characters, padded "
                f"seconds] with every pair of buckets once, got {[list(row) for row in rows]}"
            )
        padded = tuple(tuple(cells[one, other] for other in characters) for one in seconds)
        return cls(whole, tuple(seconds), tuple(characters) if widths == {3} else (), padded)

    @property
    def rows(self) -> list[list[float]]:
        """What `of_rows` reads."""
        ends = [(one, other) for one in self.seconds or (0.0,) for other in self.characters or (0.0,)]
        values = [value for row in self.padded for value in row]
        return [
            [one, other, value] if self.characters else [one, value]
            for (one, other), value in zip(ends, values, strict=True)
        ]

    @property
    def least(self) -> float:
        """The smallest limit of all."""
        return min(self.whole, *(value for row in self.padded for value in row))

    def bucket(self, seconds: float, characters: float = 0.0) -> tuple[int, int]:
        """Return the buckets of a duration and of a length of text."""
        return _place(self.seconds, seconds), _place(self.characters, characters)

    def at(self, seconds: float, characters: float = 0.0) -> float:
        """Return the padded seconds of a rectangle with this longest cut and longest text."""
        row, column = self.bucket(seconds, characters)
        return min(self.whole, self.padded[row][column])

    def places(
        self, seconds: NDArray[np.float32], characters: NDArray[np.integer] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return `(C,)`, `(C,)`: the buckets of many cuts, all as without text where there is none."""
        texts = np.zeros(len(seconds), dtype=np.int32) if characters is None else characters
        return _places(self.seconds, seconds), _places(self.characters, texts)

    def lowered(self, seconds: float, characters: float, padded: float) -> Limits:
        """Return the limits after a rectangle of `padded` seconds did not fit: its bucket holds less from now on."""
        if not self.seconds:
            return replace(self, seconds=EDGES, padded=self.padded * len(EDGES)).lowered(seconds, characters, padded)
        row, column = self.bucket(seconds, characters)
        values = [list(one) for one in self.padded]
        values[row][column] = LOWERED * min(padded, self.at(seconds, characters))
        return replace(self, padded=tuple(map(tuple, values)))


def _place(ends: Sequence[float], value: float) -> int:
    return min(bisect_left(ends, value), max(0, len(ends) - 1))


def _places(ends: Sequence[float], values: NDArray[Any]) -> NDArray[np.int64]:
    return np.minimum(np.searchsorted(np.asarray(ends, dtype=np.float64), values), max(0, len(ends) - 1))


@dataclass(frozen=True)
class LimitState:
    """The limits in force, and those that the segment under way was planned with.

    A plan is made for a whole segment. What is lowered within it divides the rectangles that are still to come (see
    `harken.data.loader`), and plans the next segments; so a run that is continued makes the same plans.

    segment: (epoch, segment) that was planned with `planned`; all others are planned with `now`.
    """

    now: Limits
    planned: Limits
    segment: tuple[int, int] = (0, 0)

    @classmethod
    def begin(cls, limits: Limits) -> LimitState:
        """Return the state of a new run."""
        return cls(limits, limits)

    def of(self, epoch: int, segment: int) -> Limits:
        """Return what a segment is planned with."""
        return self.planned if (epoch, segment) == self.segment else self.now

    def lowered(self, limits: Limits, epoch: int, segment: int) -> LimitState:
        """Return the state after the limits were lowered in a segment."""
        return LimitState(limits, self.of(epoch, segment), (epoch, segment))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LimitState:
        """Read what `dataclasses.asdict` gave, from JSON too."""
        now, planned = (_limits(data[name]) for name in ("now", "planned"))
        epoch, segment = data["segment"]
        return cls(now, planned, (epoch, segment))


def _limits(data: dict[str, Any]) -> Limits:
    padded = tuple(tuple(row) for row in data["padded"])
    return Limits(data["whole"], tuple(data["seconds"]), tuple(data["characters"]), padded)
