"""The plan: a pool of cuts becomes steps of micro-batches, a pure function of (durations, batching, draws).

A micro-batch is one or a few rectangles ("parts"), each of cuts of nearly one length. One rectangle cannot be full:
with 87.5 s and cuts of 15 s five fit and an eighth stays empty. The next rectangle fills that with shorter cuts. The
parts of a micro-batch go through the model one after another, so the largest decides the memory: each part keeps the
limit of its bucket (`harken.data.limits`), and a micro-batch whose limits are small has more parts.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harken.config.schema import BatchConfig
from harken.core.errors import HarkenError
from harken.data.limits import Limits

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


def make_plan(
    seconds: NDArray[np.float32],
    batch: BatchConfig,
    rng: np.random.Generator | None,
    limits: Limits | None = None,
    characters: NDArray[np.integer] | None = None,
) -> Plan:
    """Plan a pool of cuts that cost `seconds` `(C,)`, each exactly once.

    rng: decides which cuts of nearly one length share a part, and the order of steps; None takes them by duration, the
    shortest first. limits: of a part and of a micro-batch; without, both are `batch.max_seconds`. characters: `(C,)`
    lengths of the texts, for limits that depend on them. The micro-batches of a step have cuts of similar lengths, so
    ranks wait for none. What a whole step lacks at the end is made by splitting micro-batches, never by dropping or
    repeating a cut.
    Raises HarkenError when there are fewer cuts than micro-batches of a step.
    """
    limits = limits or Limits(batch.micro_batch_seconds)
    by_length = _by_length(seconds, batch, limits, rng)
    shelf = Shelf(seconds[by_length], limits, None if characters is None else characters[by_length])
    micro_batches = []
    while parts := _micro_batch(shelf, batch.parts - 1):
        micro_batches.append([part.rows for part in parts])
    per_step = max(1, round(batch.seconds_per_step / limits.whole))
    micro_batches = _whole_steps(micro_batches[::-1], per_step)
    steps = [micro_batches[start : start + per_step] for start in range(0, len(micro_batches), per_step)]
    if rng is not None:
        steps = [steps[place] for place in rng.permutation(len(steps))]
    return _packed([micro_batch for step in steps for micro_batch in step], by_length, per_step)


def _micro_batch(shelf: Shelf, fillers: int) -> list[Part]:
    """Take the longest cuts, in as many parts as their limits ask for, and up to `fillers` parts that fill the rest."""
    parts: list[Part] = []
    room = whole = shelf.limits.whole
    while room >= shelf.longest_limit() and (part := shelf.take_longest(room)) is not None:
        parts.append(part)
        room -= part.padded
    for _ in range(fillers if parts else 0):
        filler = shelf.take_filling(room) if room > SLACK * whole else None
        if filler is None:
            break
        parts.append(filler)
        room -= filler.padded
    return parts


def rectangles(seconds: NDArray[np.float32], max_seconds: float) -> list[NDArray[np.int64]]:
    """Return every cut of a corpus once, by duration, in batches of one rectangle of padded audio each.

    A cut that is longer than `max_seconds` is alone. For what is read whole and in no particular order: validation,
    decoding, features, labels.
    """
    limit = max(max_seconds, float(seconds.max()))
    plan = make_plan(seconds, BatchConfig(max_seconds=limit, seconds_per_step=limit, parts=1), None)
    return [plan.part(number) for number in range(len(plan))]


def _by_length(
    seconds: NDArray[np.float32], batch: BatchConfig, limits: Limits, rng: np.random.Generator | None
) -> NDArray[np.int64]:
    """Return the cuts by duration, with noise: a cut moves by up to half of `batch.mixing` times a part's rows."""
    order = np.argsort(seconds, kind="stable")
    if rng is None:
        return order
    ordered = seconds[order].astype(np.float64)
    most = np.minimum(limits.whole, [max(row) for row in limits.padded])[limits.places(seconds[order], None)[0]]
    window = batch.mixing * np.maximum(1.0, most / ordered)
    keys = np.arange(len(order)) + (rng.random(len(order)) - 0.5) * window
    return order[np.argsort(keys, kind="stable")]


@dataclass(frozen=True)
class Part:
    """rows: places on the shelf. padded: seconds, padding included."""

    rows: list[int]
    padded: float


class Shelf:
    """Cuts by duration, of which parts are taken until none is left.

    seconds: nearly ascending. Taken ones are passed over through links to the next shorter one that is left
    (union-find with path halving), so that a part costs about its rows.
    """

    def __init__(
        self, seconds: NDArray[np.float32], limits: Limits, characters: NDArray[np.integer] | None = None
    ) -> None:
        self.seconds: list[float] = seconds.astype(np.float64).tolist()
        self.sorted: list[float] = np.sort(seconds.astype(np.float64)).tolist()
        self.limits = limits
        self._table = [[min(limits.whole, value) for value in row] for row in limits.padded]
        durations, texts = limits.places(seconds, characters)
        self._durations: list[int] = durations.tolist()
        self._texts: list[int] = texts.tolist()
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

    def longest_limit(self) -> float:
        """Return what a part that begins with the longest cut may hold; 0 when the shelf is empty."""
        link = self._left(len(self.seconds))
        return self._table[self._durations[link - 1]][self._texts[link - 1]] if link else 0.0

    def take_longest(self, room: float) -> Part | None:
        """Take as many of the longest cuts as fit; None when not one does, or the shelf is empty.

        A whole micro-batch has room for any cut.
        """
        rows: list[int] = []
        longest, duration, text, link = 0.0, 0, 0, self._left(len(self.seconds))
        while link:
            row = link - 1
            widest = max(longest, self.seconds[row])
            duration, text = max(duration, self._durations[row]), max(text, self._texts[row])
            most = min(room, self._table[duration][text]) if rows else room
            if widest * (len(rows) + 1) > most and (rows or room < self.limits.whole):
                break
            longest = widest
            rows.append(row)
            link = self._left(row)
        return Part(self._take(rows[::-1]), longest * len(rows)) if rows else None

    def take_filling(self, room: float) -> Part | None:
        """Take rows that fill `room` seconds best: as few as fill it, for long cuts are hard to place."""
        best, best_gain = None, 0.0
        for count in range(1, MOST_FILLERS + 1):
            found = self._rows_up_to(room / count, count)
            if found is None:
                break
            total = sum(self.seconds[row] for row in found)
            padded = count * max(self.seconds[row] for row in found)
            gain = total - 2 * (padded - total)  # padding is worse than an empty place
            if gain > best_gain and (count == 1 or padded <= self._limit_of(found)):
                best, best_gain = Part(found, padded), gain
            if best_gain > room - SLACK / 4 * self.limits.whole:
                break
        if best is not None:
            self._take(best.rows)
        return best

    def _limit_of(self, rows: list[int]) -> float:
        return self._table[max(self._durations[row] for row in rows)][max(self._texts[row] for row in rows)]

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
