"""What a label store looks like, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from harken.units.store import LabelStore


@dataclass(frozen=True)
class UnitReport:
    """used: clusters that occur. perplexity: of the labels' distribution. mean_run: labels in a row that are equal.

    counts: `(K,)` occurrences. run_lengths: how many runs have 1, 2, ... labels (the last entry: that many or more).
    """

    used: int
    perplexity: float
    mean_run: float
    counts: list[int]
    run_lengths: list[int]
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_units(store: LabelStore) -> UnitReport:
    """Count a store's labels and judge them."""
    values = np.asarray(store.values)
    counts = np.bincount(values, minlength=store.card.clusters)
    problems, warnings = [], []
    if len(counts) > store.card.clusters:
        problems.append(f"labels must lie below K = {store.card.clusters}, found {len(counts) - 1}")
    probability = counts[counts > 0] / max(1, len(values))
    perplexity = float(np.exp(-(probability * np.log(probability)).sum())) if len(values) else 0.0
    used = int((counts > 0).sum())
    boundaries = np.flatnonzero(np.diff(values.astype(np.int64))) + 1
    boundaries = np.union1d(boundaries, store.index[1:-1])
    runs = np.diff(np.concatenate([[0], boundaries, [len(values)]]))
    if used <= 1:
        problems.append(
            f"every label is {int(values[0]) if len(values) else '-'}: the features or the clusterer are broken"
        )
    elif counts.max() > 0.5 * len(values):
        warnings.append(f"unit {int(counts.argmax())} is {100 * counts.max() / len(values):.0f}% of all labels")
    if used < 0.9 * store.card.clusters:
        warnings.append(f"only {used} of {store.card.clusters} clusters occur")
    histogram = np.bincount(np.minimum(runs, 30), minlength=31)[1:]
    return UnitReport(
        used,
        perplexity,
        float(runs.mean()) if len(runs) else 0.0,
        counts.tolist(),
        histogram.tolist(),
        problems,
        warnings,
    )
