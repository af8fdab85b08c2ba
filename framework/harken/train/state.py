"""Where a run is: everything but weights that continuing it needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from harken.data.limits import LimitState


@dataclass
class TrainState:
    """Counters of a run.

    step: optimiser steps taken (skipped ones too). position: in the data; plain data until the loader that made it has
    restored it. seconds: audio seen over all ranks. wall_seconds: time spent training. skipped_steps: those whose
    gradient was not finite; skipped_in_a_row: up to now. rollbacks: to a checkpoint; rolled_back_to: its step, until a
    step is taken. cuts_read: over all ranks and epochs. noted: {kind: {cut id: reason}} of cuts that were replaced or
    left out. best_score: the best finite validation score so far. validations_without_best: since then. fingerprint:
    what the targets are made of. seconds_by_source: audio of each source of a mixture. limits: of batches.
    bad_records: of the log in a row, by kind and alarm: the step of the first, and how many. good_records: the step of
    the last one before.
    There is no random state in it: every draw is a function of the seed and the position.
    """

    step: int = 0
    position: Any = field(default_factory=dict)
    seconds: float = 0.0
    wall_seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    rolled_back_to: int | None = None
    cuts_read: int = 0
    noted: dict[str, dict[str, str]] = field(default_factory=dict)
    limits: LimitState | None = None
    best_score: float | None = None
    validations_without_best: int = 0
    fingerprint: dict[str, str] = field(default_factory=dict)
    seconds_by_source: dict[str, float] = field(default_factory=dict)
    bad_records: dict[str, list[int]] = field(default_factory=dict)
    good_records: dict[str, int] = field(default_factory=dict)

    def sound_until(self) -> int | None:
        """Return the last step before which no alarm counts bad records; None where none does."""
        return min(map(self.last_good, self.bad_records), default=None)

    def last_good(self, key: str) -> int:
        """Return the step of the last record before those that an alarm counts, by its key in `bad_records`."""
        return self.good_records.get(key, self.bad_records[key][0] - 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainState:
        """Read what `to_dict` gave."""
        limits = data.get("limits")
        return cls(**{**data, "limits": LimitState.from_dict(limits) if limits else None})
