"""A run's metrics.jsonl as curves against the audio that the run has seen."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Record = dict[str, Any]

EVENT = '{"kind": "memory"'  # what befell a run is no figure of it
# what a record says about itself, beside its figures
_ABOUT = {"kind", "step", "time", "epoch", "hours", "wall"}


@dataclass(frozen=True)
class Curve:
    """A figure over a run: `hours` of audio seen `(N,)` and its `values` `(N,)`."""

    hours: Floats
    values: Floats


@dataclass(frozen=True)
class Metrics:
    """Records of training and validation in the order of steps; `unreadable` lines were left out."""

    train: list[Record]
    valid: list[Record]
    unreadable: int = 0

    @property
    def kinds(self) -> dict[str, list[Record]]:
        """The records by their kind, as each says it: `train`, `valid`."""
        return {"train": self.train, "valid": self.valid}

    @property
    def first_time(self) -> float:
        """When the run first logged, in seconds since 1970; 0 when it never did."""
        return min((float(record.get("time", 0)) for record in [*self.train, *self.valid]), default=0.0)

    @property
    def last_time(self) -> float:
        """When the run last logged, in seconds since 1970; 0 when it never did."""
        return max((float(record.get("time", 0)) for record in [*self.train, *self.valid]), default=0.0)

    def names(self) -> list[str]:
        """Return the names of all figures, in the order in which records hold them."""
        return list(
            dict.fromkeys(
                name for record in [*self.train[-1:], *self.valid[-1:]] for name in record if name not in _ABOUT
            )
        )

    def curve(self, kind: str, name: str) -> Curve:
        """Return a figure's curve; `kind` is `train` or `valid`. It is empty when no record has the figure."""
        records = [record for record in self.kinds[kind] if name in record]
        steps = np.array([record["step"] for record in records], dtype=np.float64)
        return Curve(self.hours_at(steps), np.array([record[name] for record in records], dtype=np.float64))

    def hours_at(self, steps: Floats) -> Floats:
        """Return the hours of audio seen at steps; validation records say their step alone."""
        known_steps, known_hours = self._scale()
        return np.interp(steps, known_steps, known_hours)

    def steps_at(self, hours: Floats) -> Floats:
        """Return the steps at which so many hours were seen."""
        known_steps, known_hours = self._scale()
        return np.interp(hours, known_hours, known_steps)

    def _scale(self) -> tuple[Floats, Floats]:
        """Return points of the map between steps and hours, continued far to both sides at the run's mean rate."""
        steps = np.array([0.0, *(record["step"] for record in self.train)])
        hours = np.array([0.0, *(record["hours"] for record in self.train)])
        rate = hours[-1] / steps[-1] if len(steps) > 1 and hours[-1] > 0 else 1.0
        far = 1e3 * max(steps[-1], 1.0)
        return np.array([-far, *steps, steps[-1] + far]), np.array([-far * rate, *hours, hours[-1] + far * rate])

    def median(self, name: str) -> float:
        """Return the median of a training figure, NaN when there is none."""
        values = [float(record[name]) for record in self.train if name in record]
        return float(np.median(values)) if values else math.nan

    def best(self, name: str, *, higher: bool = False) -> tuple[float, int] | None:
        """Return the best validation value of a figure and its step, None when there is none."""
        found = [(float(record[name]), int(record["step"])) for record in self.valid if name in record]
        found = [pair for pair in found if math.isfinite(pair[0])]
        return (max if higher else min)(found, key=lambda pair: pair[0], default=None)


def read_metrics(path: Path) -> Metrics:
    """Read metrics.jsonl.

    A run that was stopped and continued from a checkpoint logs some steps twice: the later records hold, and those
    after the step from which it continued are dropped. A last line that is cut off is a run still writing.
    """
    kept: dict[str, list[Record]] = {"train": [], "valid": []}
    unreadable = 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None:
            unreadable += bool(line.strip()) and number < len(lines) and not line.startswith(EVENT)
            continue
        step, is_train = record["step"], record["kind"] == "train"
        _drop_from(kept["train"], step if is_train else step + 1)  # training logs a step before validation does
        _drop_from(kept["valid"], step)
        kept[record["kind"]].append(record)
    return Metrics(kept["train"], kept["valid"], unreadable)


def _drop_from(records: list[Record], step: int) -> None:
    while records and records[-1]["step"] >= step:
        records.pop()


def _record(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if (
        not isinstance(record, dict)
        or record.get("kind") not in {"train", "valid"}
        or not isinstance(record.get("step"), int)
    ):
        return None
    needed = ("hours",) if record["kind"] == "train" else ()
    figures = [value for name, value in record.items() if name != "kind"]
    if any(name not in record for name in needed) or not all(isinstance(value, int | float) for value in figures):
        return None
    return record


def smooth(values: Floats, width: int) -> Floats:
    """Return the running mean over `width` neighbours (fewer at the ends), passing over values that are not finite."""
    finite = np.isfinite(values)
    window = np.ones(width)
    sums = np.convolve(np.where(finite, values, 0.0), window, mode="same")
    counts = np.convolve(finite.astype(np.float64), window, mode="same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def thin(curve: Curve, most: int = 1500) -> Curve:
    """Return a curve of at most about `most` points: the lowest and the highest of each of equal groups."""
    size = len(curve.values)
    if size <= most:
        return curve
    kept: set[int] = set()
    for group in np.array_split(np.arange(size), most // 2):
        values = curve.values[group]
        if np.isfinite(values).any():
            kept |= {int(group[np.nanargmin(values)]), int(group[np.nanargmax(values)])}
    places = sorted(kept)
    return Curve(curve.hours[places], curve.values[places])
