"""Which cuts of a manifest are trained on, and what was left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harken.core.errors import HarkenError


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
    # places in 4 bytes where they fit: of a hundred million cuts that is 400 MB less
    found = np.flatnonzero(keep)
    places: NDArray[np.integer] = found.astype(np.int32) if len(seconds) < 2**31 else found
    cost = seconds if len(places) == len(seconds) else seconds[keep]
    return Selection(places, np.minimum(cost, np.float32(crop)) if crop else cost, dropped)
