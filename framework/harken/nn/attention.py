"""Multi-head self-attention on torch's fused kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from harken.core.errors import HarkenError
from harken.nn.dropout import dropped

# frames below which the plain product beats torch's fused CPU kernel in bf16, whose backward pass is slow: docs/LOG.md
_SHORT = 256


def _kernel(q: Tensor) -> AbstractContextManager[None]:
    if q.device.type == "cpu" and q.dtype is torch.bfloat16 and q.shape[-2] < _SHORT:
        kernel: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
        return kernel
    return nullcontext()


def attend_with_dropout(q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None, dropout: float) -> Tensor:
    """Return `(B, H, T, D / H)`, what queries find among keys with dropout of the weights.

    For CPUs, where torch has no fused kernel for it and draws slowly. attend: as in `SelfAttention.forward`.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if attend is not None:
        lowest = torch.finfo(scores.dtype).min  # not -inf: where nothing may be attended to, softmax gives no NaN
        scores = scores + attend if attend.is_floating_point() else scores.masked_fill(~attend, lowest)
    return dropped(scores.softmax(-1).to(v.dtype), dropout) @ v


class SelfAttention(nn.Module):
    """Scaled dot-product self-attention; one product makes queries, keys and values.

    Source: Vaswani et al. 2017, equation 1.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise HarkenError(f"`encoder.dim` must be divisible by `encoder.heads`, got {dim} and {heads}")
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attend: Tensor | None = None) -> Tensor:
        """Attend within each sequence.

        x: `(B, T, D)`. attend: `(B, 1, 1, T)` bool, True where a key may be attended to, or floats `(B, H, T, T)` that
        are added to the scores; None when nothing is padded, which lets torch choose its flash kernel.
        """
        q, k, v = self.project(x)
        return self.combine(q, k, v, attend)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values `(B, H, T, D / H)` of `x` `(B, T, D)`."""
        batch, time, dim = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        return q, k, v

    def combine(self, q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None) -> Tensor:
        """Return what queries find among keys, `(B, T, D)`; `attend` as in `forward`."""
        dropout = self.dropout if self.training else 0.0
        if attend is not None and attend.is_floating_point():
            attend = attend.to(q.dtype)  # the kernels take what is added in the type of what it is added to
        if dropout and q.device.type == "cpu" and not torch.compiler.is_compiling():
            y = attend_with_dropout(q, k, v, attend, dropout)
        else:
            with _kernel(q):
                y = functional.scaled_dot_product_attention(q, k, v, attn_mask=attend, dropout_p=dropout)
        result: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return result
