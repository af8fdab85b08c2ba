"""What training needs of an objective."""

from __future__ import annotations

from typing import Protocol

from harken.config.schema import RunConfig
from harken.core.batch import Batch


class Trainable(Protocol):
    """What this package needs of an objective, which it never imports."""

    def flops(self, batch: Batch) -> float:
        """Operations of a training step."""
        ...

    def compile_blocks(self) -> None:
        """Have torch compile what is repeated."""
        ...

    def rate_scale(self, parameter: str, step: int) -> float:
        """Factor on a parameter's learning rate."""
        ...

    def begin_passes(self) -> None:
        """Forget what earlier passes left to be counted."""
        ...

    def after_step(self, step: int) -> None:
        """Update what the optimiser does not."""
        ...

    def fingerprint(self, config: RunConfig) -> dict[str, str]:
        """Return what the targets are made of."""
        ...
