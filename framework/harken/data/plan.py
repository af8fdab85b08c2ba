"""The plan: a pool of cuts becomes steps of micro-batches, a pure function of (durations, batching, draws).

A micro-batch is one or a few rectangles ("parts"), each of cuts of nearly one length. One rectangle cannot be full:
with 87.5 s and cuts of 15 s five fit and an eighth stays empty. The next rectangle fills that with shorter cuts. The
parts of a micro-batch go through the model one after another, so the largest decides the memory.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harken.config.schema import BatchConfig
from harken.core.errors import HarkenError

SLACK = 0.02  # of a micro-batch may stay empty before it gets another part: passes cost, too
MOST_FILLERS = 64  # rows of a second part that are tried


@dataclass(frozen=True)
class Plan:
    """Micro-batches grouped into steps.

    order: `(C,)` places in the pool, part after part. parts: `(P + 1,)` where each part begins in `order`.
    bounds: `(M + 1,)` where each micro-batch begins in `parts`. per_step: micro-batches of a step over all ranks; M is
    a multiple of it.
    """

    order: NDArray[np.int64]
    parts: NDArray[np.int64]
    bounds: NDArray[np.int64]
    per_step: int

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def steps(self) -> int:
        """Optimiser steps of the plan."""
        return len(self) // self.per_step

    def part(self, number: int) -> NDArray[np.int64]:
        """Return the places in the pool of a part, numbered through the plan."""
        return self.order[self.parts[number] : self.parts[number + 1]]

    def parts_of(self, step: int) -> range:
        """Return the numbers of the parts of a step."""
        return range(int(self.bounds[step * self.per_step]), int(self.bounds[(step + 1) * self.per_step]))

    def __getitem__(self, micro_batch: int) -> list[NDArray[np.int64]]:
        """Return the places in the pool of each part of a micro-batch."""
        return [self.part(number) for number in range(self.bounds[micro_batch], self.bounds[micro_batch + 1])]

    def padded_seconds(self, seconds: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return `(P,)`: longest times count of each part, by the pool's `seconds`."""
        longest = np.maximum.reduceat(seconds[self.order].astype(np.float64), self.parts[:-1])
        padded: NDArray[np.float64] = longest * np.diff(self.parts)
        return padded


def make_plan(seconds: NDArray[np.float32], batch: BatchConfig, rng: np.random.Generator | None) -> Plan:
    """Plan a pool of cuts that cost `seconds` `(C,)`, each exactly once.

    rng: decides which cuts of nearly one length share a part, and the order of steps; None takes them by duration, the
    shortest first. The micro-batches of a step have cuts of similar lengths, so ranks wait for none. What a whole step
    lacks at the end is made by splitting micro-batches, never by dropping or repeating a cut.
    Raises HarkenError when there are fewer cuts than micro-batches of a step.
    """
    by_length = _by_length(seconds, batch, rng)
    shelf = Shelf(seconds[by_length], batch.max_seconds)
    micro_batches = []
    while (part := shelf.take_longest()) is not None:
        micro_batches.append([part.rows])
        room = 1.0 - part.share
        while len(micro_batches[-1]) < batch.parts and room > SLACK:
            filler = shelf.take_filling(room)
            if filler is None:
                break
            micro_batches[-1].append(filler.rows)
            room -= filler.share
    per_step = batch.micro_batches_per_step
    micro_batches = _whole_steps(micro_batches[::-1], per_step)
    steps = [micro_batches[start : start + per_step] for start in range(0, len(micro_batches), per_step)]
    if rng is not None:
        steps = [steps[place] for place in rng.permutation(len(steps))]
    return _packed([micro_batch for step in steps for micro_batch in step], by_length, per_step)


def rectangles(seconds: NDArray[np.float32], max_seconds: float) -> list[NDArray[np.int64]]:
    """Return every cut of a corpus once, by duration, in batches of one rectangle of padded audio each.

    A cut that is longer than `max_seconds` is alone. For what is read whole and in no particular order: validation,
    decoding, features, labels.
    """
    limit = max(max_seconds, float(seconds.max()))
    plan = make_plan(seconds, BatchConfig(max_seconds=limit, seconds_per_step=limit, parts=1), None)
    return [plan.part(number) for number in range(len(plan))]


def _by_length(seconds: NDArray[np.float32], batch: BatchConfig, rng: np.random.Generator | None) -> NDArray[np.int64]:
    """Return the cuts by duration, with noise: a cut moves by up to half of `batch.mixing` times a part's rows."""
    order = np.argsort(seconds, kind="stable")
    if rng is None:
        return order
    ordered = seconds[order].astype(np.float64)
    window = batch.mixing * np.maximum(1.0, batch.max_seconds / ordered)
    keys = np.arange(len(order)) + (rng.random(len(order)) - 0.5) * window
    return order[np.argsort(keys, kind="stable")]


@dataclass(frozen=True)
class Part:
    """rows: places on the shelf. share: of what a micro-batch may hold, padding included."""

    rows: list[int]
    share: float


class Shelf:
    """Cuts by duration, of which parts are taken until none is left.

    seconds: nearly ascending. Taken ones are passed over through links to the next shorter one that is left
    (union-find with path halving), so that a part costs about its rows.
    """

    def __init__(self, seconds: NDArray[np.float32], limit: float) -> None:
        self.seconds: list[float] = seconds.astype(np.float64).tolist()
        self.sorted: list[float] = np.sort(seconds.astype(np.float64)).tolist()
        self.limit = limit
        self._links = list(range(len(self.seconds) + 1))  # 0 is the end of the shelf; i + 1 stands for cut i

    def _left(self, link: int) -> int:
        links = self._links
        while links[link] != link:
            links[link] = links[links[link]]
            link = links[link]
        return link

    def _take(self, rows: list[int]) -> list[int]:
        for row in rows:
            self._links[row + 1] = row
        return rows

    def take_longest(self) -> Part | None:
        """Take as many of the longest cuts as fit; None when the shelf is empty."""
        rows: list[int] = []
        longest, link = 0.0, self._left(len(self.seconds))
        while link:
            widest = max(longest, self.seconds[link - 1])
            if rows and widest * (len(rows) + 1) > self.limit:
                break
            longest = widest
            rows.append(link - 1)
            link = self._left(link - 1)
        return Part(self._take(rows[::-1]), longest * len(rows) / self.limit) if rows else None

    def take_filling(self, room: float) -> Part | None:
        """Take rows that fill a share of a micro-batch best: as few as fill it, for long cuts are hard to place."""
        best, best_gain = None, 0.0
        for count in range(1, MOST_FILLERS + 1):
            found = self._rows_up_to(room * self.limit / count, count)
            if found is None:
                break
            total = sum(self.seconds[row] for row in found)
            padded = count * max(self.seconds[row] for row in found)
            gain = total - 2 * (padded - total)  # padding is worse than an empty place
            if gain > best_gain:
                best, best_gain = Part(found, padded / self.limit), gain
            if best_gain > (room - SLACK / 4) * self.limit:
                break
        if best is not None:
            self._take(best.rows)
        return best

    def _rows_up_to(self, longest: float, count: int) -> list[int] | None:
        """Return `count` rows of at most `longest` seconds, near it; None where there are fewer."""
        rows: list[int] = []
        link = self._left(bisect_right(self.sorted, longest))
        while link and len(rows) < count:
            if self.seconds[link - 1] <= longest:
                rows.append(link - 1)
            link = self._left(link - 1)
        return rows if len(rows) == count else None


def _whole_steps(micro_batches: list[list[list[int]]], per_step: int) -> list[list[list[int]]]:
    """Split the largest micro-batches until their number is a multiple of `per_step`."""
    while (lacking := -len(micro_batches) % per_step) > 0:
        sizes = np.array([sum(map(len, micro_batch)) for micro_batch in micro_batches])
        largest = set(np.argsort(-sizes, kind="stable")[:lacking].tolist())
        if sizes.max() < 2:
            raise HarkenError(
                f"{sizes.sum()} cuts cannot fill steps of {per_step} micro-batches: "
                "lower `batch.seconds_per_step` or raise `batch.max_seconds`"
            )
        micro_batches = [
            half
            for place, whole in enumerate(micro_batches)
            for half in (_halves(whole) if place in largest and sizes[place] > 1 else [whole])
        ]
    return micro_batches


def _halves(micro_batch: list[list[int]]) -> list[list[list[int]]]:
    first, *further = micro_batch
    if further:
        return [[first], further]
    return [[first[: len(first) // 2]], [first[len(first) // 2 :]]]


def _packed(micro_batches: list[list[list[int]]], by_length: NDArray[np.int64], per_step: int) -> Plan:
    parts = [part for micro_batch in micro_batches for part in micro_batch]
    rows = np.fromiter((row for part in parts for row in part), dtype=np.int64, count=len(by_length))
    return Plan(
        order=by_length[rows],
        parts=np.cumsum([0, *map(len, parts)]),
        bounds=np.cumsum([0, *map(len, micro_batches)]),
        per_step=per_step,
    )
