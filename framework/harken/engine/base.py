"""What the training loop asks of an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from harken.core.batch import Batch
from harken.core.loss import Loss


class Engine(Protocol):
    """Runs a model on this process's device and keeps its optimiser in step with the other ranks.

    model: the bare module. optimizer: its `param_groups` carry the learning rates. grad_norm: of the last step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    grad_norm: float

    def __call__(self, batch: Batch) -> Loss:
        """Run the objective on a batch."""
        ...

    @property
    def local_passes(self) -> bool:
        """Whether ranks send nothing before `reduce`, so that one may run its passes again while the others wait."""
        ...

    def backward(self, total: Tensor, *, last: bool) -> None:
        """Add the gradient of `total`; `last` says that it is the step's last pass.

        Gradients are summed over ranks and micro-batches, never averaged.
        """
        ...

    def reduce(self, scale: float = 1.0) -> None:
        """Reduce the step's gradient over the ranks, times `scale`; every rank calls it after its passes."""
        ...

    def abandon(self) -> None:
        """Forget the gradients of this step's passes, those that failed halfway included."""
        ...

    def recover(self, batch: Batch, *, last: bool) -> None:
        """Send what this rank has not sent yet in a pass that failed halfway, so that the others do not wait.

        batch: a small one, which is run for it. The gradient of the step is worthless: every rank must `abandon` it.
        Raises HarkenError where a pass cannot be taken up.
        """
        ...

    def step(self) -> bool:
        """Clip and take an optimiser step; return False when the gradient was not finite and nothing changed."""
        ...

    def save(self, folder: Path) -> None:
        """Write what exact continuation needs; every rank calls it."""
        ...

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; every rank calls it."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Return all weights on the CPU (whole on rank 0; every rank calls it)."""
        ...
