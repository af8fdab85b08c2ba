"""The plan as a Lhotse CutSampler, usable wherever one is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from lhotse import CutSet
from lhotse.dataset.sampling.base import CutSampler

from harken.config.schema import BatchConfig
from harken.core.draws import Draws
from harken.data.manifest import Manifest
from harken.data.plan import Plan, make_plan, select


class PlannedSampler(CutSampler):  # type: ignore[misc]
    """Yields this rank's micro-batches of an epoch as CutSets; its state is (epoch, position)."""

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
        self.manifest, self.batch = manifest, batch
        self.selection = select(np.asarray(manifest.seconds), shortest, longest, None)
        self._plan: tuple[int, Plan] | None = None
        self._position = 0
        self._just_restored_state: bool = False

    @property
    def plan(self) -> Plan:
        """The plan of the current epoch."""
        if self._plan is None or self._plan[0] != self.epoch:
            self._plan = (self.epoch, make_plan(self.selection, self.batch, Draws(self.seed, self.epoch)))
        return self._plan[1]

    def __iter__(self) -> Iterator[CutSet]:
        if self._just_restored_state:
            self._just_restored_state = False
        else:
            self._position = 0
        return self

    def __next__(self) -> CutSet:
        place = self._position + self.rank
        if place >= len(self.plan):
            raise StopIteration
        self._position += self.world_size
        return CutSet.from_cuts(self.manifest[int(item)] for item in self.plan[place])

    def state_dict(self) -> dict[str, Any]:
        """Return (epoch, position): world size and rank are no part of it."""
        return {"epoch": self.epoch, "position": self._position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state, on any number of ranks that divides the position."""
        self.epoch = state_dict["epoch"]
        self._position = state_dict["position"]
        self._just_restored_state = True

    @property
    def remaining_duration(self) -> float:
        """Seconds left in the epoch over all ranks."""
        plan = self.plan
        rest = plan.order[plan.bounds[min(self._position, len(plan))] :]
        return float(np.asarray(self.manifest.seconds)[rest].sum())

    @property
    def remaining_cuts(self) -> int:
        """Cuts left in the epoch over all ranks."""
        return len(self.plan.order) - int(self.plan.bounds[min(self._position, len(self.plan))])

    @property
    def num_cuts(self) -> int:
        """Cuts of an epoch."""
        return len(self.selection.places)
