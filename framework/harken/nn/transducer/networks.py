"""The networks of a transducer beside its encoder: a predictor of what follows, and the joiner.

Source: the stateless predictor of Ghodsi et al. 2020, "RNN-transducer with stateless prediction network", with the
convolution over the embeddings and the initial scales of icefall's pruned transducers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from harken.core.errors import HarkenError
from harken.nn.convolution import convolve_over_time

NO_TOKEN = -1
_GROUP = 4  # channels of a group of the predictor's convolution (icefall)


def quiet_linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear layer that starts with a quarter of the usual weights (icefall's `ScaledLinear`)."""
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.mul_(0.25)
        layer.bias.uniform_(-0.025, 0.025)
    return layer


class Predictor(nn.Module):
    """Embeds the last `context` tokens and mixes them by a convolution in groups of four channels.

    Before the first token stands the blank, before that nothing (zeros).
    """

    def __init__(self, classes: int, dim: int, context: int, blank: int) -> None:
        super().__init__()
        if dim % _GROUP:
            raise HarkenError(f"`objective.predictor_dim` must be divisible by {_GROUP}, got {dim}")
        self.dim, self.context, self.blank = dim, context, blank
        self.embedding = nn.Embedding(classes, dim)
        groups = dim // _GROUP
        self.convolution = nn.Conv1d(dim, dim, context, groups=groups, bias=False) if context > 1 else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `(B, S)` to predictions `(B, S + 1, D)`: entry s has seen the tokens before s."""
        embedded = self.embedding(functional.pad(tokens, (1, 0), value=self.blank))
        return self._mix(functional.pad(embedded, (0, 0, self.context - 1, 0)))

    def start(self, size: int) -> Tensor:
        """Return the contexts `(size, context)` of empty hypotheses."""
        contexts = torch.full((size, self.context), NO_TOKEN, device=self.embedding.weight.device)
        contexts[:, -1] = self.blank
        return contexts

    def step(self, contexts: Tensor) -> Tensor:
        """Map contexts `(N, context)`, `NO_TOKEN` where there is none, to predictions `(N, D)`."""
        embedded = self.embedding(contexts.clamp(min=0)) * (contexts != NO_TOKEN)[..., None]
        return self._mix(embedded)[:, 0]

    def _mix(self, embedded: Tensor) -> Tensor:
        if self.convolution is None:
            return embedded
        mixed = convolve_over_time(embedded, self.convolution.weight, None, padding=0, groups=self.convolution.groups)
        return functional.relu(mixed)


class Joiner(nn.Module):
    """Scores what comes next from a frame and a prediction, both brought to `dim` channels first.

    Projecting before joining makes a row of work for each frame and each prediction, instead of for each pair.
    """

    def __init__(self, frame_dim: int, prediction_dim: int, dim: int, classes: int) -> None:
        super().__init__()
        self.frames = quiet_linear(frame_dim, dim)
        self.predictions = quiet_linear(prediction_dim, dim)
        self.output = nn.Linear(dim, classes)

    def forward(self, frames: Tensor, predictions: Tensor) -> Tensor:
        """Map projected frames and predictions `(..., J)`, which are added, to unnormalised scores `(..., V)`."""
        scores: Tensor = self.output(torch.tanh(frames + predictions))
        return scores

    def joined(self, frames: Tensor, predictions: Tensor, positions: Tensor) -> Tensor:
        """Return scores `(B, T, R, V)` of projected frames `(B, T, J)` with predictions `(B, S + 1, J)` at positions.

        positions: `(B, T, R)`. The rows are looked up as an embedding's are, whose backward pass adds up in one order.
        """
        size, rows, dim = predictions.shape
        first = rows * torch.arange(size, device=positions.device)[:, None, None]
        chosen = functional.embedding(positions + first, predictions.reshape(size * rows, dim))
        return self.forward(frames[:, :, None], chosen)
