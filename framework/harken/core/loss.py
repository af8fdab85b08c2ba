"""What an objective returns: a summed loss and the sums its metrics are made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

Metrics = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss summed over targets, never averaged.

    total: scalar; the loop scales it by the number of targets of the whole step over all ranks and micro-batches,
        so that the gradient does not depend on how the step was divided.
    metrics: `{name: (sum, weight)}` detached scalars on the device; their mean is read at log steps only.
        The name `loss` is the objective's main loss in nats for each target.
    """

    total: Tensor
    metrics: Metrics = field(default_factory=dict)
