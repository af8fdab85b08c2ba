"""Multi-head self-attention on torch's fused kernels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from harken.core.errors import HarkenError


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

        x: `(B, T, D)`. attend: `(B, 1, 1, T)` bool, True where a key may be attended to; None when nothing is padded,
        which lets torch choose its flash kernel.
        """
        batch, time, dim = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=attend, dropout_p=dropout)
        result: Tensor = self.out(y.transpose(1, 2).reshape(batch, time, dim))
        return result
