"""The order of a mixture: endless segments, each with every source's share of the seconds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harken.core.draws import key
from harken.core.errors import HarkenError
from harken.core.permutation import Permutation
from harken.data.order import Pool


@dataclass(frozen=True)
class Source:
    """A source of a mixture.

    places: `(C,)` of its cuts in the joined manifest. seconds: `(C,)` what each costs. share: of the mixture's seconds
    as long as no source is used up. max_repeats: passes over it.
    """

    name: str
    places: NDArray[np.integer]
    seconds: NDArray[np.float32]
    share: float
    max_repeats: float

    @property
    def mean(self) -> float:
        """Mean seconds of a cut."""
        return float(self.seconds.mean(dtype=np.float64))

    @property
    def total(self) -> float:
        """Seconds of one pass."""
        return float(self.seconds.sum(dtype=np.float64))


@dataclass(frozen=True)
class _Phase:
    """From `start` seconds of the mixture on, sources have these shares; `read` is what each has given before."""

    start: float
    shares: NDArray[np.float64]
    read: NDArray[np.float64]


class MixtureOrder:
    """Deals out every source in its share.

    Each source is an endless sequence of its own: pass after pass, each a permutation seeded by (seed, source, pass).
    A segment takes the next cuts of every sequence. So another source, or another share, changes how fast a sequence is
    read and never its order; and where a segment begins in it is a formula, not a history.
    """

    def __init__(self, sources: list[Source], seed: int, segment_seconds: float) -> None:
        self.sources, self.seed, self.segment_seconds = sources, seed, segment_seconds
        self.phases = list(_phases(sources))
        last = self.phases[-1]
        self.seconds = float("inf") if last.shares.any() else last.start

    def segments(self, epoch: int) -> int | None:
        """None: a mixture has no epochs."""
        return None

    def pool(self, epoch: int, segment: int) -> Pool:
        """Return the cuts of a segment.

        Raises HarkenError when every source has been read `max_repeats` times.
        """
        first, last = self._read_by(segment), self._read_by(segment + 1)
        pools = [self._pool(number, int(first[number]), int(last[number])) for number in range(len(self.sources))]
        if not sum(len(pool.places) for pool in pools):
            raise HarkenError(
                f"the mixture ends after {self.seconds / 3600:.1f} h: every source has been read `max_repeats` times; "
                "raise it, or lower `train.steps`"
            )
        return Pool(
            np.concatenate([pool.places for pool in pools]),
            np.concatenate([pool.epochs for pool in pools]),
            np.concatenate([pool.seconds for pool in pools]),
            np.concatenate([pool.sources for pool in pools]),
        )

    def _read_by(self, segment: int) -> NDArray[np.int64]:
        """Return how many cuts of each source all segments before this one have."""
        now = segment * self.segment_seconds
        phase = next(phase for phase in reversed(self.phases) if phase.start <= now)
        seconds = phase.read + phase.shares * (now - phase.start)
        means = np.array([source.mean for source in self.sources])
        cuts: NDArray[np.int64] = np.floor(seconds / means + 1e-6).astype(np.int64)
        return cuts

    def _pool(self, number: int, first: int, last: int) -> Pool:
        source = self.sources[number]
        size = len(source.places)
        drawn = np.arange(first, last)
        passes = drawn // size
        rows = drawn % size
        for turn in np.unique(passes):
            own = passes == turn
            rows[own] = Permutation(size, key(self.seed, source.name, int(turn), "mixture"))[rows[own]]
        sources = np.full(len(rows), number, dtype=np.int16)
        return Pool(source.places[rows], passes.astype(np.int32), source.seconds[rows], sources)

    def describe(self) -> list[str]:
        """Return a line for each source: hours, share, and hours of the mixture to one pass over it."""
        lines = []
        for source in self.sources:
            once = source.total / source.share / 3600
            lines.append(
                f"  {source.name}: {len(source.places)} cuts, {source.total / 3600:.2f} h, "
                f"{100 * source.share:.2f} % of the mixture: read once every {once:.2f} h"
                + (f", at most {source.max_repeats:g} times" if np.isfinite(source.max_repeats) else "")
            )
        return lines


def _phases(sources: list[Source]) -> list[_Phase]:
    """Return what happens as sources reach their `max_repeats` one after another: the others share what it leaves."""
    shares = np.array([source.share for source in sources])
    left = np.array([source.max_repeats * source.total for source in sources])
    read, now = np.zeros(len(sources)), 0.0
    phases = [_Phase(now, shares / shares.sum(), read)]
    while np.isfinite(left[shares > 0]).any():
        rates = shares / shares.sum()
        lasts = np.full(len(sources), np.inf)
        lasts[shares > 0] = left[shares > 0] / rates[shares > 0]
        step = float(lasts.min())
        read = read + rates * step
        left, now = left - rates * step, now + step
        shares = np.where(lasts <= step * (1 + 1e-12), 0.0, shares)
        rates = shares / shares.sum() if shares.any() else shares
        phases.append(_Phase(now, rates, read))
    return phases
