"""What units tell about symbols that are aligned with them: purities and mutual information.

Source: HuBERT, arXiv 2106.07447 section IV-E, where the symbols are phones; fairseq's `measure_teacher_quality.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harken.core.errors import HarkenError
from harken.data.alignments import Alignment, items_of, places_in
from harken.units.store import TOLERANCE, LabelStore

OUTSIDE = ""
"""The symbol of frames outside of all items, and what silences are called in alignments of phones."""
WAITING = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Purity:
    """Figures over the frames of all cuts that have an alignment.

    symbols, units: how many occur. purity: accuracy of calling each frame by the most frequent symbol of its unit
    (HuBERT's phone purity). cluster_purity: the other way round. pnmi: mutual information of both over the symbols'
    entropy, from 0 to 1. largest_symbol: share of the most frequent symbol, the purity of a single unit. outside:
    share of frames in no item, which count as a symbol. cuts: of the alignment that count; left_out: that do not.
    """

    purity: float
    cluster_purity: float
    pnmi: float
    largest_symbol: float
    outside: float
    symbols: int
    units: int
    frames: int
    cuts: int
    left_out: int

    def describe(self) -> str:
        """Return the figures in a line."""
        return (
            f"purity {self.purity:.4f} (a single unit: {self.largest_symbol:.4f}), cluster purity "
            f"{self.cluster_purity:.4f}, PNMI {self.pnmi:.4f}; {self.symbols} symbols, {self.units} units, "
            f"{self.frames} frames of {self.cuts} cuts, {100 * self.outside:.1f}% in no symbol"
            + (f", {self.left_out} cuts left out" if self.left_out else "")
        )

    def plain(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return asdict(self)


@dataclass
class Joint:
    """Counts of the pairs of symbol and unit; memory grows with the pairs that occur."""

    names: dict[str, int] = field(default_factory=lambda: {OUTSIDE: 0})
    pairs: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    cuts: int = 0
    _waiting: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, line: Mapping[str, Any], tier: str, units: NDArray[np.integer], times: NDArray[np.float64]) -> bool:
        """Count the units `(T,)` of a cut against the symbols at `times` `(T,)` in seconds; False where it has none."""
        items = items_of(line, tier)
        if not items:
            return False
        classes = np.array([*(self.names.setdefault(name, len(self.names)) for name, _, _ in items), 0])
        self._waiting.append(classes[places_in(items, times)] << 16 | units)  # a unit has two bytes
        self.cuts += 1
        if sum(map(len, self._waiting)) > WAITING:
            self._merge()
        return True

    def _merge(self) -> None:
        new, counts = np.unique(np.concatenate([*self._waiting, self.pairs[:0]]), return_counts=True)
        pairs = np.union1d(self.pairs, new)
        total = np.zeros(len(pairs), dtype=np.int64)
        total[np.searchsorted(pairs, self.pairs)] += self.counts
        total[np.searchsorted(pairs, new)] += counts
        self.pairs, self.counts, self._waiting = pairs, total, []

    def measure(self, left_out: int = 0) -> Purity:
        """Return the figures.

        Raises HarkenError where fewer than two symbols occur: of one, units can tell nothing.
        """
        self._merge()
        symbols, rows = np.unique(self.pairs >> 16, return_inverse=True)
        units, columns = np.unique(self.pairs & 0xFFFF, return_inverse=True)
        if len(symbols) < 2:
            raise HarkenError(
                f"purities need frames of two symbols or more, got {int(self.counts.sum())} frames of {len(symbols)}"
            )
        shares = self.counts / self.counts.sum()
        of_symbols, of_units = np.bincount(rows, shares), np.bincount(columns, shares)
        best_symbol, best_unit = np.zeros(len(units)), np.zeros(len(symbols))
        np.maximum.at(best_symbol, columns, shares)
        np.maximum.at(best_unit, rows, shares)
        information = float((shares * np.log(shares / (of_symbols[rows] * of_units[columns]))).sum())
        return Purity(
            purity=float(best_symbol.sum()),
            cluster_purity=float(best_unit.sum()),
            pnmi=max(0.0, information) / float(-(of_symbols * np.log(of_symbols)).sum()),
            largest_symbol=float(of_symbols.max()),
            outside=float(of_symbols[symbols == 0].sum()),
            symbols=len(symbols),
            units=len(units),
            frames=int(self.counts.sum()),
            cuts=self.cuts,
            left_out=left_out,
        )


def store_purity(store: LabelStore, alignment: Alignment) -> Purity:
    """Return the figures of the labels of a store, each at the time of its middle, whatever their rate.

    Cuts without labels of their own or without the tier are left out. Raises HarkenError when none has both, and for
    labels of other audio.
    """
    manifest, card = alignment.manifest, store.card
    rows = store.rows(np.asarray(manifest.hashes))
    if (rows < 0).all():
        raise HarkenError(
            f"label store {store.folder} has no labels for any of the {len(rows)} cuts of {manifest.path}, the first "
            f"`{manifest.line(0)['id']}`: the alignment is of other cuts"
        )
    joint, seconds = Joint(), np.asarray(manifest.seconds)
    for place in np.flatnonzero(rows >= 0).tolist():
        line = manifest.line(place)
        if line["id"] in store.without_own:
            continue
        units = store[str(line["id"])]
        expected = int(card.labels_of(seconds[place : place + 1])[0])
        if abs(len(units) - expected) > TOLERANCE * card.rows:
            raise HarkenError(
                f"cut `{line['id']}` has {len(units)} labels in {store.folder}, and its {seconds[place]:.2f} s in "
                f"{manifest.path} give {expected}: the alignment is of other audio"
            )
        times = np.arange(len(units)) // card.rows  # labels of one time stand side by side
        joint.add(line, alignment.tier, units, (card.center + card.hop * times) / card.sample_rate)
    if not joint.cuts:
        raise alignment.without(len(rows))
    return joint.measure(left_out=len(rows) - joint.cuts)
