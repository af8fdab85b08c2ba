"""A small Transformer decoder that reads encoded frames and predicts each token from those before it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from harken.core.batch import real_mask
from harken.core.errors import HarkenError


class AttentionDecoder(nn.Module):
    """Pre-norm Transformer decoder over tokens with sinusoidal positions. The blank's class begins and ends sentences.

    Source: Vaswani et al. 2017, arXiv 1706.03762 sections 3.1 and 3.5; sizes and the use beside CTC or a transducer of
    icefall's `zipformer/attention_decoder.py`, whose width defaults to that of its encoder.
    """

    def __init__(
        self, frame_dim: int, classes: int, *, dim: int, layers: int, heads: int, ffn_dim: int, dropout: float
    ) -> None:
        super().__init__()
        if dim % heads or dim % 2:
            raise HarkenError(
                "`objective.attention_dim` must be even and divisible by `objective.attention_heads`, got "
                f"{dim} and {heads}"
            )
        self.dim = dim
        self.embedding = nn.Embedding(classes, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)  # multiplied by the root of dim on its way in
        self.frames = nn.Linear(frame_dim, dim)
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(dim, heads, ffn_dim, dropout, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, classes)

    def forward(self, tokens: Tensor, frames: Tensor, lengths: Tensor) -> Tensor:
        """Return scores `(B, S + 1, V)`, entry s of what follows the first s tokens; unnormalised.

        tokens: `(B, S)`; what stands behind a sentence's end does not reach what stands before it. frames: `(B, T, D)`,
        of which the first `lengths` `(B,)` are real.
        """
        inputs = functional.pad(tokens, (1, 0))
        count = inputs.shape[1]
        x = self.dropout(self.embedding(inputs) * math.sqrt(self.dim) + _positions(count, self.dim, frames))
        future = torch.ones(count, count, dtype=torch.bool, device=x.device).triu(1)
        padded = ~real_mask(lengths, frames.shape[1], x.device)
        memory = self.frames(frames)
        for block in self.blocks:
            x = block(x, memory, tgt_mask=future, memory_key_padding_mask=padded)
        scores: Tensor = self.output(self.norm(x))
        return scores


def _positions(count: int, dim: int, like: Tensor) -> Tensor:
    """Return `(count, dim)` sines and cosines. Source: Vaswani et al. 2017, section 3.5."""
    rates = torch.exp(torch.arange(0, dim, 2, device=like.device) * (-math.log(10000.0) / dim))
    angles = torch.arange(count, device=like.device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(like.dtype)


def attention_loss(scores: Tensor, tokens: Tensor, lengths: Tensor, weight: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy of sentences and their ends, with smoothed labels, summed over those of weight 1.

    scores: `(B, S + 1, V)`. tokens: `(B, S)`. lengths, weight: `(B,)`, tokens of each sentence and whether it counts.
    The smoothed share is spread over all V classes. Source: Szegedy et al. 2016, arXiv 1512.00567 section 7.
    """
    places = torch.arange(scores.shape[1], device=scores.device)
    targets = functional.pad(tokens, (0, 1)).masked_fill(places >= lengths[:, None], 0)
    counts = (places <= lengths[:, None]) & (weight[:, None] > 0)
    losses = functional.cross_entropy(
        scores.float().transpose(1, 2), targets, reduction="none", label_smoothing=smoothing
    )
    return (losses * counts).sum()
