"""Texts aligned in time, in the lines of a manifest: Lhotse's `AlignmentItem`s, by the name of their tier.

Lhotse counts the times of items from the beginning of the recording, here they count from that of the cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harken.core.draws import key
from harken.core.errors import HarkenError
from harken.data.manifest import Manifest

Item = tuple[str, float, float]
"""A symbol, its start and its end in seconds of the cut."""

TOKENS, WORDS = "token", "word"
"""The tiers that `harken align` writes."""
BORDER = 1e-6
"""Seconds before its start from which a time is in an item: the middles of labels of twice the rate lie on the borders
between items, and rounding must not decide where they belong."""


def placed_supervisions(line: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], float]]:
    """Yield the supervisions of a cut as plain data, and the seconds that bring times of theirs to those of the cut."""
    for part in line.get("supervisions") or ():
        yield part, -float(line.get("start", 0.0))
    for track in line.get("tracks") or ():
        cut = track.get("cut", {})
        for part in cut.get("supervisions") or ():
            yield part, float(track.get("offset", 0.0)) - float(cut.get("start", 0.0))


def items_of(line: Mapping[str, Any], tier: str) -> list[Item]:
    """Return the items of a cut's tier by their start; none where it has no such tier."""
    found = []
    for part, shift in placed_supervisions(line):
        for item in (part.get("alignment") or {}).get(tier) or ():
            symbol, start, duration = list(item.values() if isinstance(item, dict) else item)[:3]
            found.append((str(symbol), float(start) + shift, float(start) + shift + float(duration)))
    return sorted(found, key=lambda item: item[1])


def add_items(part: dict[str, Any], shift: float, tier: str, items: Sequence[Item]) -> None:
    """Give a supervision a tier; shift: as of `placed_supervisions`."""
    part["alignment"] = {
        **(part.get("alignment") or {}),
        tier: [[symbol, round(start - shift, 8), round(end - start, 8), None] for symbol, start, end in items],
    }


def places_in(items: Sequence[Item], times: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return which item, of those by their start, each of the times lies in, -1 outside of all; a start is inside."""
    starts = np.array([start for _, start, _ in items]) - BORDER
    ends = np.array([end for _, _, end in items] + [-np.inf]) - BORDER  # the last one is that of place -1
    places = np.searchsorted(starts, times, side="right") - 1
    return np.where(times < ends[places], places, -1)


class Alignment:
    """A tier of a manifest, found by the ids of its cuts."""

    def __init__(self, path: str | Path, tier: str) -> None:
        self.manifest, self.tier = Manifest.filled(path), tier

    @cached_property
    def _sorted(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        hashes = np.asarray(self.manifest.hashes)
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order

    def place(self, cut: str) -> int | None:
        """Return where in the manifest a cut is, None where there is none of this id."""
        hashes, order = self._sorted
        hashed = np.uint64(key(cut))
        place = int(np.searchsorted(hashes, hashed))
        while place < len(hashes) and hashes[place] == hashed:
            if self.manifest.line(int(order[place]))["id"] == cut:
                return int(order[place])
            place += 1
        return None

    def without(self, cuts: int) -> HarkenError:
        """Return the error that none of so many cuts that were looked at has the tier."""
        tiers = sorted(
            {
                tier
                for place in range(min(len(self.manifest), 1000))
                for part, _ in placed_supervisions(self.manifest.line(place))
                for tier in part.get("alignment") or ()
            }
        )
        return HarkenError(
            f"none of {cuts} cuts of {self.manifest.path} has an alignment `{self.tier}`, and at least one is needed; "
            f"found {', '.join(f'`{tier}`' for tier in tiers) or 'none of any name'}: `harken align` makes `{TOKENS}` "
            f"and `{WORDS}`"
        )
