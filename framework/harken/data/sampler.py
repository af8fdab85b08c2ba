"""The plan as a Lhotse CutSampler, usable wherever one is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from lhotse import CutSet
from lhotse.dataset.sampling.base import CutSampler

from harken.config.schema import BatchConfig
from harken.data.manifest import Manifest
from harken.data.order import EpochOrder, Planner
from harken.data.selection import select


class PlannedSampler(CutSampler):  # type: ignore[misc]
    """Yields this rank's batches of an epoch as CutSets; its state is a position.

    A batch is one rectangle: what Lhotse's datasets collate. Every rank gets equally many: steps are whole.
    """

    def __init__(
        self,
        manifest: Manifest,
        batch: BatchConfig,
        *,
        seed: int = 0,
        shortest: float = 0.0,
        longest: float = float("inf"),
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(shuffle=True, drop_last=False, world_size=world_size, rank=rank, seed=seed)
        self.manifest = manifest
        self.selection = select(np.asarray(manifest.seconds), shortest, longest, None)
        batch = replace(batch, parts=1)
        self.planner = Planner(EpochOrder.of(self.selection, batch, seed), batch, seed)
        self._segment = self._batch = 0
        self._just_restored_state: bool = False

    def __iter__(self) -> Iterator[CutSet]:
        if self._just_restored_state:
            self._just_restored_state = False
        else:
            self._segment = self._batch = 0
        return self

    def __next__(self) -> CutSet:
        pool, plan = self.planner.segment(self.epoch, self._segment)
        if self._batch >= len(plan):
            if self._segment + 1 == self.planner.order.segments(self.epoch):
                raise StopIteration
            self._segment, self._batch = self._segment + 1, 0
            return self.__next__()
        number = self._batch + self.rank
        self._batch += self.world_size
        return CutSet.from_cuts(self.manifest[int(pool.places[row])] for row in plan.part(number))

    def state_dict(self) -> dict[str, Any]:
        """Return (epoch, segment, batch in it): world size and rank are no part of it."""
        return {"epoch": self.epoch, "segment": self._segment, "batch": self._batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state, on any number of ranks that divides its batch and those of a step."""
        self.epoch = state_dict["epoch"]
        self._segment, self._batch = state_dict["segment"], state_dict["batch"]
        self._just_restored_state = True

    def _left(self) -> tuple[int, float]:
        """Cuts and seconds that are left of the epoch over all ranks."""
        order = self.planner.order
        pool, plan = self.planner.segment(self.epoch, self._segment)
        rest = plan.order[plan.parts[min(self._batch, len(plan))] :]
        cuts, seconds = len(rest), float(pool.seconds[rest].sum(dtype=np.float64))
        for segment in range(self._segment + 1, order.segments(self.epoch) or 0):
            later = order.pool(self.epoch, segment)
            cuts += len(later.places)
            seconds += float(later.seconds.sum(dtype=np.float64))
        return cuts, seconds

    @property
    def remaining_duration(self) -> float:
        """Seconds left in the epoch over all ranks."""
        return self._left()[1]

    @property
    def remaining_cuts(self) -> int:
        """Cuts left in the epoch over all ranks."""
        return self._left()[0]

    @property
    def num_cuts(self) -> int:
        """Cuts of an epoch."""
        return len(self.selection)
