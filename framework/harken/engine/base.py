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

    @property
    def local_passes(self) -> bool:
        """Whether no pass but the step's last sends anything, so that a rank may run its passes again.

        The others wait meanwhile, and all is well as long as it has not `sent` anything.
        """
        ...

    @property
    def sent(self) -> bool:
        """Whether a part of this step's gradient is on its way: then all ranks repeat a step that one cannot finish."""
        ...

    def backward(self, total: Tensor, *, last: bool) -> None:
        """Add the gradient of `total`; `last` says that it is the step's last pass, whose gradient may be sent.

        Gradients are summed over ranks and micro-batches, never averaged.
        """
        ...

    def begin_reduce(self) -> None:
        """Send what the passes have not sent; every rank calls it after them, before it asks the others anything."""
        ...

    def reduce(self, scale: float = 1.0) -> None:
        """Reduce the step's gradient over the ranks, times `scale`; every rank calls it after its passes."""
        ...

    def abandon(self) -> None:
        """Forget the gradients of this step's passes, those that failed halfway included.

        A rank that has sent a part of them still calls `begin_reduce`, as the others wait for the rest.
        """
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

    def snapshot(self) -> Snapshot | None:
        """Return copies of what exact continuation needs on the main process, None elsewhere; every rank calls it."""
        ...

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint's folder; every rank calls it."""
        ...
