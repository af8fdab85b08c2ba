"""What the labels of a store look like, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harken.units.store import Card, LabelStore

BLOCK = 1 << 22
"""Labels that are looked at together: some ten MB, whatever the size of the store."""
DOMINATED = 0.9
"""Share of all labels above which one unit leaves nothing to predict; half of it already deserves a look."""
LONGEST_RUN = 0.5
"""Seconds that a unit lasts on average above which it follows speakers or silences, not sounds: a phone lasts 0.05
to 0.2 s."""
SHORTEST_RUN = 0.05
"""Seconds: labels that are as far apart, as those of patches are, may well change every time."""
ENOUGH = 5
"""Labels a cluster from which on it can be said that clusters do not occur."""


@dataclass(frozen=True)
class UnitReport:
    """used: clusters that occur. perplexity: of the labels' distribution. mean_run: labels in a row that are equal.

    Of patches these are labels of one row of the grid, time after time.

    counts: `(K,)` occurrences. run_lengths: how many runs have 1, 2, ... labels (the last entry: that many or more).
    """

    used: int
    perplexity: float
    mean_run: float
    counts: list[int]
    run_lengths: list[int]
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_units(store: LabelStore, rows: NDArray[np.int64] | None = None) -> UnitReport:
    """Count a store's labels and judge them.

    rows: of the cuts that are counted; all when None.
    """
    counts = np.zeros(np.iinfo(store.card.dtype).max + 1, dtype=np.int64)
    histogram, runs = np.zeros(31, dtype=np.int64), 0
    for values, ends in _blocks(store, rows):
        counts += np.bincount(values, minlength=len(counts))
        changes = np.flatnonzero(values[1:] != values[:-1]) + 1
        borders = np.union1d(changes, ends[(ends > 0) & (ends < len(values))])
        lengths = np.diff(np.concatenate([[0], borders, [len(values)]]))
        histogram += np.bincount(np.minimum(lengths, 30), minlength=31)
        runs += len(lengths)
    total = int(counts.sum())
    counts = counts[: max(store.card.clusters, int(counts.nonzero()[0].max(initial=-1)) + 1)]
    probability = counts[counts > 0] / max(1, total)
    report = UnitReport(
        used=int((counts > 0).sum()),
        perplexity=float(np.exp(-(probability * np.log(probability)).sum())) if total else 0.0,
        mean_run=total / runs if runs else 0.0,
        counts=counts.tolist(),
        run_lengths=histogram[1:].tolist(),
    )
    report.problems.extend(_problems(report, store.card))
    report.warnings.extend(_warnings(report, store.card))
    return report


def _blocks(
    store: LabelStore, rows: NDArray[np.int64] | None
) -> Iterator[tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.int64]]]:
    """Yield the labels of several cuts, end to end, and where each cut's end; never an empty block."""
    if rows is None:
        rows = np.arange(store.card.cuts)
    ends = np.cumsum(store.index[rows + 1] - store.index[rows])
    first = 0
    while first < len(rows):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + BLOCK, side="right")))
        parts = [store.values[store.index[row] : store.index[row + 1]] for row in rows[first:last]]
        values = np.concatenate(parts)
        if len(values):
            yield _row_by_row(values, ends[first:last] - before, store.card.rows)
        first = last


def _row_by_row(
    values: NDArray[np.unsignedinteger[Any]], ends: NDArray[np.int64], rows: int
) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.int64]]:
    """Return labels of which `rows` are of one time, row after row, and where each cut ends in each of them."""
    times = len(values) // rows
    return values.reshape(times, rows).T.ravel(), (ends // rows + times * np.arange(rows)[:, None]).ravel()


def _problems(report: UnitReport, card: Card) -> Iterator[str]:
    counts = np.asarray(report.counts)
    most = int(counts.argmax())
    if len(counts) > card.clusters:
        yield f"labels must lie below K = {card.clusters}, found {len(counts) - 1}"
    if report.used <= 1:
        yield f"every label is {most if report.used else '-'}: the features or the clusterer are broken"
    elif counts.max() > DOMINATED * counts.sum():
        yield (
            f"unit {most} is {100 * counts.max() / counts.sum():.0f}% of all labels, and at most "
            f"{100 * DOMINATED:.0f}% leave something to predict: "
            "the audio is mostly silence, or the features are broken"
        )


def _warnings(report: UnitReport, card: Card) -> Iterator[str]:
    counts = np.asarray(report.counts)
    total = int(counts.sum())
    if report.used > 1 and 0.5 * total < counts.max() <= DOMINATED * total:
        yield f"unit {int(counts.argmax())} is {100 * counts.max() / total:.0f}% of all labels"
    if report.used < 0.9 * card.clusters and total >= ENOUGH * card.clusters:
        yield f"only {report.used} of {card.clusters} clusters occur"
    if report.perplexity < card.clusters / 5 and total >= ENOUGH * card.clusters:
        yield f"the perplexity of {card.clusters} clusters is {report.perplexity:.1f}: few units are most of the labels"
    if report.mean_run > LONGEST_RUN * card.rate:
        yield f"a unit lasts {report.mean_run / card.rate:.2f} s on average, longer than sounds of speech do"
    if 0 < report.mean_run < 1.1 and card.rate > 1 / SHORTEST_RUN:
        yield f"a unit lasts {report.mean_run:.2f} labels on average: units that change at every label are mostly noise"
