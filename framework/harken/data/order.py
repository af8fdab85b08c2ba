"""The order of a corpus: which cuts come in which segment of which epoch, from durations and a seed alone.

An epoch of a large corpus is planned in segments, so that the first batch of ten million cuts does not wait for the
plan of the last. A segment is a part of a seeded permutation that is computed where it is needed; it has enough steps
that what is lost at its end does not matter.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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
KEPT_SEGMENTS = 3  # of the readers, of the loop behind them, and the next


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
    `(C,)` what each costs. sources: `(C,)` which source of a mixture each is of, None without a mixture.
    """

    places: NDArray[np.integer]
    epochs: NDArray[np.int32]
    seconds: NDArray[np.float32]
    sources: NDArray[np.int16] | None = None


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
    """The plans of an order, one segment at a time.

    The last few are kept, for readers run ahead of the loop; the next is made in a thread from the middle of a segment
    on, so that the loop does not wait for it.

    limits: of the rectangles; None: all may hold `batch.max_seconds`. characters: `(N,)` lengths of the texts of a
    whole manifest, which limits may depend on.
    """

    def __init__(
        self,
        order: Order,
        batch: BatchConfig,
        seed: int,
        limits: LimitState | None = None,
        characters: NDArray[np.integer] | None = None,
    ) -> None:
        self.order, self.batch, self.seed, self.characters = order, batch, seed, characters
        self.limits = limits or LimitState.begin(Limits.of_rows(batch.micro_batch_seconds, batch.limits))
        self._plans: dict[tuple[int, int], Future[tuple[Pool, Plan]]] = {}
        self._thread: ThreadPoolExecutor | None = None

    def limit(self, limits: LimitState) -> None:
        """Plan by other limits from now on."""
        self.limits = limits
        self._plans.clear()

    def texts(self, places: NDArray[np.integer]) -> NDArray[np.integer] | None:
        """Return the lengths of the texts of cuts, where limits ask for them."""
        return self.characters[places] if self.characters is not None else None

    def segment(self, epoch: int, segment: int) -> tuple[Pool, Plan]:
        """Return the cuts of a segment and their plan."""
        future = self._plans.get((epoch, segment))
        if future is None:
            future = Future()
            future.set_result(self._plan(epoch, segment))
            self._keep((epoch, segment), future)
        return future.result()

    def _plan(self, epoch: int, segment: int) -> tuple[Pool, Plan]:
        pool = self.order.pool(epoch, segment)
        rng = Draws(self.seed, epoch).generator("plan", str(segment) if segment else "")
        limits = self.limits.of(epoch, segment)
        return pool, make_plan(pool.seconds, self.batch, rng, limits, self.texts(pool.places))

    def _keep(self, place: tuple[int, int], future: Future[tuple[Pool, Plan]]) -> None:
        self._plans[place] = future
        while len(self._plans) > KEPT_SEGMENTS:
            del self._plans[next(iter(self._plans))]

    def _prepare(self, epoch: int, segment: int) -> None:
        if (epoch, segment) in self._plans:
            return
        self._thread = self._thread or ThreadPoolExecutor(1, "plan")
        try:
            self._keep((epoch, segment), self._thread.submit(self._plan, epoch, segment))
        except RuntimeError:  # no memory for a thread's stack: the plan is made when it is needed
            self._thread = None

    def after(self, position: Position) -> Position:
        """Return where a run is after the step at a position."""
        _, plan = self.segment(position.epoch, position.segment)
        segments = self.order.segments(position.epoch)
        following = Position(position.epoch, position.segment + 1)
        if segments is not None and following.segment >= segments:
            following = Position(position.epoch + 1)
        if position.step == plan.steps // 2:
            self._prepare(following.epoch, following.segment)
        if position.step + 1 < plan.steps:
            return Position(position.epoch, position.segment, position.step + 1)
        return following

    def steps(self, epoch: int) -> float:
        """Return the steps of an epoch: exact when it has one segment, else by its first; infinite without an end."""
        segments = self.order.segments(epoch)
        return float("inf") if segments is None else self.segment(epoch, 0)[1].steps * segments
