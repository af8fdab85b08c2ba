"""How many directions representations fill."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def effective_rank(x: Tensor) -> float:
    """Return how many directions the rows of `(N, D)` fill, from 1 to min(N, D): exp of the singular values' entropy.

    Rows are taken from their mean, which the paper does not: a direction that all frames share tells none apart, and
    would hide a collapse or look like one. Rows that are equal up to rounding have rank 1; it is NaN where one is not
    finite.
    Source: RankMe, arXiv 2210.02885 equation 1.
    """
    x = x.detach().double()
    if not bool(torch.isfinite(x).all()):  # no decomposition is defined, and LAPACK ends with an error
        return math.nan
    centred = x - x.mean(0)
    if float(centred.norm()) <= 1e-5 * float(x.norm()):  # float32 keeps seven digits: what is left is rounding
        return 1.0
    short = centred.T @ centred if x.shape[0] > x.shape[1] else centred @ centred.T
    singular = torch.linalg.eigvalsh(short).clamp(min=0).sqrt()
    shares = singular / singular.sum()
    return float((-torch.xlogy(shares, shares).sum()).exp())
