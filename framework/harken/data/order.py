"""The order of a corpus: which cuts come in which segment of which epoch, from durations and a seed alone.

An epoch of a large corpus is planned in segments, so that the first batch of ten million cuts does not wait for the
plan of the last. A segment is a part of a seeded permutation that is computed where it is needed; it has enough steps
that what is lost at its end does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from harken.config.schema import BatchConfig
from harken.core.draws import Draws, key
from harken.core.permutation import Permutation
from harken.data.limits import Limits, LimitState
from harken.data.plan import Plan, make_plan
from harken.data.selection import Selection

SEGMENT_CUTS = 2**17
SEGMENT_STEPS = 100  # at least: a segment's last step may be filled poorly


@dataclass(frozen=True)
class Position:
    """Where a run is in its data: the next step to take. This is the whole state of sampling."""

    epoch: int = 0
    segment: int = 0
    step: int = 0


@dataclass(frozen=True)
class Pool:
    """The cuts of a segment.

    places: `(C,)` in the manifest. epochs: `(C,)` how often each was read before, which seeds its draws. seconds:
    `(C,)` what each costs.
    """

    places: NDArray[np.integer]
    epochs: NDArray[np.int32]
    seconds: NDArray[np.float32]


class Order(Protocol):
    """Deals a corpus out in segments."""

    def segments(self, epoch: int) -> int | None:
        """Return how many segments an epoch has; None when it never ends."""
        ...

    def pool(self, epoch: int, segment: int) -> Pool:
        """Return the cuts of a segment."""
        ...


@dataclass(frozen=True)
class EpochOrder:
    """Every cut of a selection once an epoch."""

    selection: Selection
    seed: int
    count: int

    @classmethod
    def of(cls, selection: Selection, batch: BatchConfig, seed: int) -> EpochOrder:
        """Divide a selection into segments of equal numbers of cuts."""
        return cls(selection, seed, segments_of(selection.seconds, batch))

    def segments(self, epoch: int) -> int:
        """Return how many segments an epoch has."""
        return self.count

    def pool(self, epoch: int, segment: int) -> Pool:
        """Return the cuts of a segment."""
        size = len(self.selection)
        first, last = size * segment // self.count, size * (segment + 1) // self.count
        rows: slice | NDArray[np.int64] = slice(first, last)
        if self.count > 1:
            rows = Permutation(size, key(self.seed, epoch, "segments"))[np.arange(first, last)]
        return Pool(
            self.selection.places[rows], np.full(last - first, epoch, dtype=np.int32), self.selection.seconds[rows]
        )


def segments_of(seconds: NDArray[np.float32], batch: BatchConfig) -> int:
    """Return how many segments cuts of these durations make."""
    cuts_a_step = batch.seconds_per_step / max(float(seconds.mean(dtype=np.float64)), 1e-6)
    return max(1, int(len(seconds) / max(SEGMENT_CUTS, SEGMENT_STEPS * cuts_a_step)))


class Planner:
    """The plans of an order, one segment at a time; the last few are kept, for readers run ahead of the loop.

    limits: of the rectangles; None: all may hold `batch.max_seconds`. characters: `(N,)` lengths of the texts of a
    whole manifest, which limits may depend on.
    """

    def __init__(
        self,
        order: Order,
        batch: BatchConfig,
        seed: int,
        limits: LimitState | None = None,
        characters: NDArray[np.int32] | None = None,
    ) -> None:
        self.order, self.batch, self.seed, self.characters = order, batch, seed, characters
        self.limits = limits or LimitState.begin(Limits.of_rows(batch.micro_batch_seconds, batch.limits))
        self.segment = lru_cache(maxsize=2)(self._segment)

    def limit(self, limits: LimitState) -> None:
        """Plan by other limits from now on."""
        self.limits = limits
        self.segment.cache_clear()

    def texts(self, places: NDArray[np.integer]) -> NDArray[np.int32] | None:
        """Return the lengths of the texts of cuts, where limits ask for them."""
        return self.characters[places] if self.characters is not None else None

    def _segment(self, epoch: int, segment: int) -> tuple[Pool, Plan]:
        pool = self.order.pool(epoch, segment)
        rng = Draws(self.seed, epoch).generator("plan", str(segment) if segment else "")
        limits = self.limits.of(epoch, segment)
        return pool, make_plan(pool.seconds, self.batch, rng, limits, self.texts(pool.places))

    def after(self, position: Position) -> Position:
        """Return where a run is after the step at a position."""
        _, plan = self.segment(position.epoch, position.segment)
        if position.step + 1 < plan.steps:
            return Position(position.epoch, position.segment, position.step + 1)
        segments = self.order.segments(position.epoch)
        if segments is None or position.segment + 1 < segments:
            return Position(position.epoch, position.segment + 1)
        return Position(position.epoch + 1)

    def steps(self, epoch: int) -> float:
        """Return the steps of an epoch: exact when it has one segment, else by its first; infinite without an end."""
        segments = self.order.segments(epoch)
        return float("inf") if segments is None else self.segment(epoch, 0)[1].steps * segments
