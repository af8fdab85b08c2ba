"""CTC best-path decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from harken.core.batch import real_mask


def greedy_search(log_probs: Tensor, lengths: Tensor, *, blank: int) -> list[list[int]]:
    """Take the best token of every frame, merge runs of the same token, drop blanks.

    log_probs is (B, T, V), log-probabilities or logits: only their order within a frame matters. lengths is (B,), the
    frames of each utterance; what lies behind them is not looked at. Returns B lists of token ids.

    Source: Graves et al. 2006, "Connectionist temporal classification", section 3.2 (best path decoding).
    """
    best = log_probs.argmax(dim=-1)
    starts_run = torch.ones_like(best, dtype=torch.bool)
    starts_run[:, 1:] = best[:, 1:] != best[:, :-1]
    inside = real_mask(lengths, best.shape[1], best.device)
    keep = starts_run & inside & (best != blank)
    # Two transfers for the whole batch, however many utterances it has.
    tokens = best[keep].tolist()
    counts = keep.sum(dim=1).tolist()
    sequences: list[list[int]] = []
    start = 0
    for number in counts:
        sequences.append(tokens[start : start + number])
        start += number
    return sequences
