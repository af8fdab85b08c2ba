"""What the training loop asks of an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from harken.core.batch import Batch
from harken.core.loss import Loss
from harken.engine.state import Snapshot


class Engine(Protocol):
    """Runs a model on this process's device and keeps its optimiser in step with the other ranks.

    model: the bare module. optimizer: its `param_groups` carry the learning rates. grad_norm: of the last step.
    bad_gradients: the parameters whose gradient was not finite in a step that was skipped last, the first that the
    backward pass reached first; none where the engine keeps no whole gradients.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    grad_norm: float
    bad_gradients: list[str]

    def __call__(self, batch: Batch) -> Loss:
        """Run the objective on a batch."""
        ...

    def backward(self, total: Tensor, *, last: bool) -> None:
        """Add the gradient of `total`; with `last`, reduce the step's gradient over the ranks.

        Gradients are summed over ranks and micro-batches, never averaged.
        """
        ...

    def step(self) -> bool:
        """Clip and take an optimiser step; return False when the gradient was not finite and nothing changed."""
        ...

    def snapshot(self) -> Snapshot | None:
        """Return copies of what exact continuation needs on the main process, None elsewhere; every rank calls it."""
        ...

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint's folder; every rank calls it."""
        ...
