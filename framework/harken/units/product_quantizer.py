"""A product quantiser that is learned with the model: an entry of each of several codebooks, by Gumbel softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harken.core.draws import current_step
from harken.nn.one_hot import one_hot


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """A temperature that decays with the steps: `max(start * decay ** step, end)`.

    It is a function of the step that is being taken and of nothing else, so a run that continues has it exactly.
    Source: arXiv 2006.11477 section 4.2; fairseq `latent_temp`.
    """

    start: float
    end: float
    decay: float

    def now(self) -> float:
        """Return the temperature of the step that is being taken."""
        return float(max(self.start * self.decay ** float(current_step()), self.end))


@dataclass(frozen=True)
class Quantised:
    """What became of frames `(B, M, F)`.

    vectors: `(B, M, Q)`, the entries of all groups side by side. codes: `(B, M, G)`, which entries these are.
    best: `(B, M, G)`, the most probable entries; in evaluation these are the codes. probabilities: `(B, M, G, V)`,
    without noise and at temperature 1.
    """

    vectors: Tensor
    codes: Tensor
    best: Tensor
    probabilities: Tensor


class ProductQuantizer(nn.Module):
    """Maps a frame to one of V entries in each of G groups.

    In training the entry is drawn by a Gumbel softmax and the gradient goes through the softmax (straight through); in
    evaluation it is the most probable one. The noise is of torch's generator, which the loop seeds for each
    micro-batch.
    Source: arXiv 2006.11477 section 2 and equation 1; fairseq's `GumbelVectorQuantizer`, its initial values too.
    """

    def __init__(self, input_dim: int, *, groups: int, entries: int, dim: int, temperature: Temperature) -> None:
        super().__init__()
        self.groups, self.entries, self.temperature = groups, entries, temperature
        self.logits = nn.Linear(input_dim, groups * entries)
        nn.init.normal_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)
        self.codebook = nn.Parameter(torch.rand(groups, entries, dim // groups))

    def forward(self, frames: Tensor) -> Quantised:
        """Quantise frames `(B, M, F)`."""
        logits = self.logits(frames).unflatten(-1, (self.groups, self.entries)).float()
        best = logits.argmax(-1)
        if self.training:
            noise = -torch.empty_like(logits).exponential_().log()
            soft = ((logits + noise) / self.temperature.now()).softmax(-1)
            codes = soft.argmax(-1)
            chosen = one_hot(codes, self.entries) - soft.detach() + soft
        else:
            codes = best
            chosen = one_hot(codes, self.entries)
        vectors = torch.einsum("bmgv,gvd->bmgd", chosen, self.codebook).flatten(-2)
        return Quantised(vectors, codes, best, logits.softmax(-1))

    def flops(self, frames: float) -> float:
        """Return the operations of a forward pass over `frames`, a multiply-add counted as two."""
        return 2.0 * frames * (self.logits.weight.numel() + self.codebook.numel())


def perplexity(probabilities: Tensor) -> Tensor:
    """Return the perplexity of distributions `(..., G, V)`, summed over the groups: `(...)`, in G..G V.

    Source: fairseq's `prob_perplexity` and `code_perplexity`, with its 1e-7.
    """
    return (-(probabilities * (probabilities + 1e-7).log()).sum(-1)).exp().sum(-1)
