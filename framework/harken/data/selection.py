"""Which cuts of a manifest are trained on, and what was left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harken.core.errors import HarkenError

PIECE = 1 << 20


@dataclass(frozen=True)
class Selection:
    """The cuts of a manifest that are trained on.

    places: `(C,)` where they are in the manifest. seconds: `(C,)` what each costs in padded audio.
    dropped: cuts and hours left out, by reason.
    """

    places: NDArray[np.integer]
    seconds: NDArray[np.float32]
    dropped: dict[str, tuple[int, float]]

    def __len__(self) -> int:
        return len(self.places)

    def describe(self) -> str:
        """Return one line: kept and dropped cuts and hours, and why."""
        kept = f"kept {len(self)} cuts, {float(self.seconds.sum(dtype=np.float64)) / 3600:.2f} h"
        lost = [f"dropped {count} ({hours:.2f} h) {reason}" for reason, (count, hours) in self.dropped.items() if count]
        return "; ".join([kept, *lost])


def select(seconds: NDArray[np.float32], shortest: float, longest: float, crop: float | None) -> Selection:
    """Choose cuts by duration; longer ones than `crop` cost `crop`.

    Raises HarkenError when nothing is left.
    """
    keep = seconds >= shortest
    dropped = {f"shorter than {shortest:g} s": _lost(seconds, ~keep)}
    long = np.zeros_like(keep) if crop else seconds > longest
    dropped[f"longer than {longest:g} s"] = _lost(seconds, long)
    keep &= ~long
    count = int(np.count_nonzero(keep))
    if not count:
        raise HarkenError(
            f"none of {len(seconds)} cuts lies between `data.min_seconds` {shortest} and `data.max_seconds` {longest}"
        )
    cost = seconds if count == len(seconds) else seconds[keep]
    return Selection(_places(keep, count), np.minimum(cost, np.float32(crop)) if crop else cost, dropped)


def _lost(seconds: NDArray[np.float32], out: NDArray[np.bool_]) -> tuple[int, float]:
    return int(np.count_nonzero(out)), float(seconds[out].sum(dtype=np.float64)) / 3600


def _places(keep: NDArray[np.bool_], count: int) -> NDArray[np.integer]:
    """Return where `keep` is True, in 4 bytes where they suffice; piece by piece, as numpy's own result has 8."""
    places: NDArray[np.integer] = np.empty(count, dtype=np.int32 if len(keep) < 2**31 else np.int64)
    filled = 0
    for start in range(0, len(keep), PIECE):
        found = np.flatnonzero(keep[start : start + PIECE])
        places[filled : filled + len(found)] = found + start
        filled += len(found)
    return places
