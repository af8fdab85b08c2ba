"""A codebook of unit vectors that follows what falls to each code: the tokenizer that BEATs' iterations teach."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from harken.core import distributed
from harken.core.draws import key
from harken.encoders.stack import initialise
from harken.units.kmeans import KMeansConfig, fit

START_VECTORS = 16
"""Vectors a code that the k-means of the start looks at, at most."""
START_PASSES = 10
"""Of that k-means; as many as in the released code."""


@dataclass(frozen=True)
class Coded:
    """What became of tokens `(N, D)`.

    vectors: `(N, code_dim)`, the codes' vectors; their gradient goes to the encoded tokens as it is (straight through).
    errors: `(N,)`, mean square over channels between an encoded token and its code, whose gradient goes to the token.
    codes: `(N,)` int64.
    """

    vectors: Tensor
    errors: Tensor
    codes: Tensor


class EmaCodebook(nn.Module):
    """Projects tokens, gives them norm 1, and finds the nearest of as many unit vectors as there are codes.

    No gradient reaches the codes. After a step each becomes `normal(decay * code + (1 - decay) * normal(mean))` of the
    encoded tokens that fell to it in this step, over all ranks and micro-batches; one to which none fell stays. They
    start at random, from a seed, and the first step that is taken puts them at the centres of its tokens by k-means.
    Source: arXiv 2212.09058 section 3.2.2 and equation 3; `NormEMAVectorQuantizer` of the released `quantizer.py`,
    which starts and moves within a forward pass.
    """

    codes: Tensor
    started: Tensor

    def __init__(self, dim: int, code_dim: int, codes: int, decay: float, seed: int) -> None:
        super().__init__()
        self.decay, self.seed = decay, seed
        self.project = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, code_dim))
        self.project.apply(initialise)
        generator = torch.Generator().manual_seed(key(seed, "codebook") & (2**63 - 1))
        normal = torch.randn(codes, code_dim, generator=generator)
        self.register_buffer("codes", functional.normalize(normal, dim=-1))
        self.register_buffer("started", torch.tensor(False))
        self._sums: Tensor | None = None  # since the last update: `(K, code_dim + 1)`, the counts last
        self._vectors: list[Tensor] | None = []  # the same, while the start has not been made

    def encode(self, tokens: Tensor) -> Tensor:
        """Return the unit vectors `(..., code_dim)` of tokens `(..., D)`, float32."""
        return functional.normalize(self.project(tokens).float(), dim=-1)

    def forward(self, tokens: Tensor, *, remember: bool) -> Coded:
        """Quantise real tokens `(N, D)`; `update` moves the codes by those that are to be remembered."""
        encoded = self.encode(tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            # between vectors of norm 1 the nearest one has the largest product
            codes = (encoded.detach() @ self.codes.T).argmax(-1)
            chosen = self.codes[codes]
            if remember:
                self._remember(encoded.detach(), codes)
            return Coded(encoded + (chosen - encoded).detach(), (encoded - chosen).square().mean(-1), codes)

    def _remember(self, encoded: Tensor, codes: Tensor) -> None:
        ones = torch.ones_like(encoded[:, :1])
        sums = encoded.new_zeros(len(self.codes), encoded.shape[1] + 1)
        sums.index_add_(0, codes, torch.cat([encoded, ones], 1))
        self._sums = sums if self._sums is None else self._sums + sums
        if self._vectors is not None:
            self._vectors.append(encoded)

    def forget(self) -> None:
        """Remember nothing of what was seen since the last update."""
        self._sums = None
        self._vectors = None if self._vectors is None else []

    @torch.no_grad()
    def update(self) -> None:
        """Move the codes by what this step remembered. Every rank calls it, after a step that was applied."""
        if bool(self.started):
            self._vectors = None
            sums = self.codes.new_zeros(len(self.codes), self.codes.shape[1] + 1) if self._sums is None else self._sums
            self._move(distributed.sum_tensor(sums))
        elif self._vectors is None:  # the run went back to before its start: the next step makes it
            self._vectors = []
        else:
            self._start(self._vectors)
        self._sums = None

    def _move(self, sums: Tensor) -> None:
        means = functional.normalize(sums[:, :-1], dim=-1)  # of sums and of means it is the same
        moved = functional.normalize(torch.lerp(means, self.codes, self.decay), dim=-1)
        self.codes.copy_(torch.where(sums[:, -1:] > 0, moved, self.codes))

    def _start(self, waiting: list[Tensor]) -> None:
        """Put the codes at the centres of the step's tokens, or on these where they are fewer than the codes."""
        found = distributed.gather([torch.cat(waiting).cpu()] if waiting else [])
        if not found:
            return
        vectors = torch.cat(found)
        # in an order and of a number that do not depend on which rank had which
        vectors = vectors[vectors[:, 0].argsort()]
        vectors = vectors[:: max(1, len(vectors) // (START_VECTORS * len(self.codes)))]
        centres = torch.zeros(self.codes.shape)
        if distributed.is_main():
            centres = self.codes.cpu().clone()
            if len(vectors) < len(centres):
                centres[: len(vectors)] = vectors
            else:
                settings = KMeansConfig(
                    clusters=len(centres),
                    seed=self.seed,
                    epochs=0,
                    lloyd_passes=START_PASSES,
                    start_frames=len(vectors),
                )
                fitted, _ = fit(vectors.numpy(), settings, lambda _: None)
                centres = functional.normalize(torch.from_numpy(fitted), dim=-1)
        self.codes.copy_(distributed.sum_tensor(centres.to(self.codes.device)))
        self.started.fill_(True)
        self._vectors = None
