"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Keeps `decay * average + (1 - decay) * weight` of every parameter in float32.

    The decay is lowered to (1 + n) / (10 + n) in the first updates n, so that the start is forgotten. times: how many
    times the reference's step one has (`BatchConfig.times`); an update then counts for as many.
    """

    def __init__(self, model: nn.Module, decay: float, times: float = 1.0) -> None:
        self.decay, self.times = decay, times
        self.updates = 0
        self.average = {name: parameter.detach().clone().float() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights."""
        self.updates += 1
        counted = self.updates * self.times
        decay = min(self.decay, (1 + counted) / (10 + counted)) ** self.times
        averages = list(self.average.values())
        torch._foreach_lerp_(
            averages, [parameter.detach().float() for _, parameter in model.named_parameters()], 1 - decay
        )

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Put the average in the place of the weights for a while."""
        kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self._copy(model, self.average)
        try:
            yield
        finally:
            self._copy(model, kept)

    @staticmethod
    @torch.no_grad()
    def _copy(model: nn.Module, values: dict[str, Tensor]) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies of the averages on the CPU, and the update count."""
        copies = {name: value.to("cpu", copy=True) for name, value in self.average.items()}
        return {**copies, "#updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved average."""
        self.updates = int(state["#updates"])
        for name, value in self.average.items():
            value.copy_(state[name])
