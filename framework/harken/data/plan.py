"""The plan of an epoch: a list of micro-batches that is a pure function of (durations, batching, seed, epoch).

Every rank computes the same plan; the position in it is the whole state of sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harken.config.schema import BatchConfig
from harken.core.draws import Draws
from harken.core.errors import HarkenError


@dataclass(frozen=True)
class Plan:
    """Micro-batches of an epoch, grouped into steps.

    order: places in the manifest, micro-batch after micro-batch. bounds: `(M + 1,)`, where each micro-batch begins.
    per_step: micro-batches of a step over all ranks; M is a multiple of it, so every step is whole on every rank.
    """

    order: NDArray[np.int64]
    bounds: NDArray[np.int64]
    per_step: int

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def steps(self) -> int:
        """Optimiser steps of the epoch."""
        return len(self) // self.per_step

    def __getitem__(self, micro_batch: int) -> NDArray[np.int64]:
        """Return the manifest places of a micro-batch."""
        return self.order[self.bounds[micro_batch] : self.bounds[micro_batch + 1]]


@dataclass(frozen=True)
class Selection:
    """The cuts of a manifest that are trained on: `places`, their padded cost in seconds; what was left out and why."""

    places: NDArray[np.int64]
    seconds: NDArray[np.float32]
    dropped: dict[str, tuple[int, float]]

    def describe(self) -> str:
        """Return one line: kept and dropped cuts and hours, and why."""
        kept = f"kept {len(self.places)} cuts, {float(self.seconds.sum()) / 3600:.2f} h"
        lost = [f"dropped {count} ({hours:.2f} h) {reason}" for reason, (count, hours) in self.dropped.items() if count]
        return "; ".join([kept, *lost])


def select(seconds: NDArray[np.float32], shortest: float, longest: float, crop: float | None) -> Selection:
    """Choose cuts by duration; longer ones than `crop` cost `crop`.

    Raises HarkenError when nothing is left.
    """
    short = seconds < shortest
    long = np.zeros_like(short) if crop else seconds > longest
    keep = ~short & ~long
    dropped = {
        f"shorter than {shortest:g} s": (int(short.sum()), float(seconds[short].sum()) / 3600),
        f"longer than {longest:g} s": (int(long.sum()), float(seconds[long].sum()) / 3600),
    }
    if not keep.any():
        raise HarkenError(
            f"none of {len(seconds)} cuts lies between `data.min_seconds` {shortest} and `data.max_seconds` {longest}"
        )
    cost = np.asarray(seconds[keep])
    return Selection(np.flatnonzero(keep), np.minimum(cost, crop) if crop else cost, dropped)


def make_plan(selection: Selection, batch: BatchConfig, draws: Draws, *, shuffle: bool = True) -> Plan:
    """Plan an epoch: duration buckets, shuffled within, filled to `max_seconds` of padded audio, steps shuffled.

    All micro-batches of a step come from one bucket where the bucket has enough, so ranks wait for none. The last
    steps' missing micro-batches are made by splitting the largest, never by dropping or repeating a cut.
    """
    rng = draws.generator("plan")
    count = len(selection.places)
    jitter = rng.random(count) if shuffle else np.zeros(count)
    # sorted by duration with a little noise: neighbours differ between epochs, padding hardly does
    rank_noise = (jitter - 0.5) * count / max(1, batch.buckets)
    by_length = np.argsort(_ranks(selection.seconds) + rank_noise, kind="stable")
    pieces = _fill(by_length, selection.seconds, batch.max_seconds)
    per_step = batch.micro_batches_per_step
    pieces = _whole_steps(pieces, per_step)
    steps = [pieces[start : start + per_step] for start in range(0, len(pieces), per_step)]
    if shuffle:
        steps = [steps[place] for place in rng.permutation(len(steps))]
    flat = [piece for step in steps for piece in step]
    bounds = np.cumsum([0, *map(len, flat)])
    return Plan(selection.places[np.concatenate(flat)], bounds, per_step)


def _ranks(seconds: NDArray[np.float32]) -> NDArray[np.float64]:
    ranks = np.empty(len(seconds))
    ranks[np.argsort(seconds, kind="stable")] = np.arange(len(seconds))
    return ranks


def _fill(order: NDArray[np.int64], seconds: NDArray[np.float32], limit: float) -> list[NDArray[np.int64]]:
    """Cut an order into micro-batches whose padded audio (longest x count) stays within the limit."""
    pieces, start, longest = [], 0, 0.0
    costs = seconds[order]
    for place, cost in enumerate(costs.tolist()):
        if place > start and max(longest, cost) * (place - start + 1) > limit:
            pieces.append(order[start:place])
            start, longest = place, 0.0
        longest = max(longest, cost)
    pieces.append(order[start:])
    return pieces


def _whole_steps(pieces: list[NDArray[np.int64]], per_step: int) -> list[NDArray[np.int64]]:
    """Split the largest micro-batches until their number is a multiple of `per_step`."""
    pieces = list(pieces)
    for _ in range(-len(pieces) % per_step):
        largest = max(range(len(pieces)), key=lambda place: len(pieces[place]))
        piece = pieces[largest]
        if len(piece) < 2:
            raise HarkenError(
                f"{sum(map(len, pieces))} cuts cannot fill steps of {per_step} micro-batches: "
                "lower `batch.seconds_per_step` or raise `batch.max_seconds`"
            )
        pieces[largest : largest + 1] = [piece[: len(piece) // 2], piece[len(piece) // 2 :]]
    return pieces
