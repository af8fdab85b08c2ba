"""Indices as vectors of a one among zeros."""

from __future__ import annotations

import torch
from torch import Tensor


def one_hot(indices: Tensor, classes: int) -> Tensor:
    """Return `(..., classes)`, float32, of indices `(...)`, int64.

    As torch's, which is int64 and on CPUs looks at all indices first; here one that is out of range is an error of
    `scatter_`.
    """
    zeros = torch.zeros(*indices.shape, classes, device=indices.device)
    return zeros.scatter_(-1, indices[..., None], 1.0)
