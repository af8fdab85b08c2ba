"""Targets from a quantiser that nothing learns: a random projection and the nearest of random codes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from harken.core.draws import key


class RandomProjection(nn.Module):
    """Frozen projections and codebooks, drawn from a seed alone and saved with the model as buffers.

    dim: width of an input. code_dim: of a code. codes: of each codebook. The projections start as Xavier's uniform ones
    and the codes as normal vectors, of which only the direction matters.
    Source: BEST-RQ, arXiv 2202.01855 section 3.1; several codebooks: USM, arXiv 2303.01037.
    """

    projections: Tensor
    codes: Tensor

    def __init__(self, dim: int, code_dim: int, codes: int, codebooks: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(key(seed, "random projection") & (2**63 - 1))
        limit = math.sqrt(6 / (dim + code_dim))
        uniform = torch.rand(codebooks, dim, code_dim, generator=generator)
        self.register_buffer("projections", (2 * uniform - 1) * limit)
        normal = torch.randn(codebooks, codes, code_dim, generator=generator)
        self.register_buffer("codes", functional.normalize(normal, dim=-1))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return for `(N, dim)` the nearest code of each codebook, int64 `(N, codebooks)`.

        Between vectors of norm 1 the nearest one has the largest product, and the norm of a projection changes nothing.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            pairs = zip(self.projections, self.codes, strict=True)
            return torch.stack([(x @ projection @ codes.T).argmax(-1) for projection, codes in pairs], 1)


def codebook_use(codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the share of the codes that occur in `(N, codebooks)` and the perplexity of their distribution.

    size: of a codebook. Both are scalars, means over the codebooks; of few frames both are low.
    """
    counts = torch.zeros(codes.shape[1], size, device=codes.device)
    counts.scatter_add_(1, codes.T, torch.ones_like(codes.T, dtype=counts.dtype))
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    entropy = -torch.xlogy(shares, shares).sum(1)
    return (counts > 0).float().mean(), entropy.exp().mean()
