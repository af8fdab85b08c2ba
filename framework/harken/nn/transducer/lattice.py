"""The sum over all alignments of a transducer, and the occupation probabilities of its arcs.

A node (s, t) of an utterance's lattice says that s tokens are written and t frames are read. Two arcs leave it: `emit`
writes token s and leads to (s + 1, t), `blank` reads frame t and leads to (s, t + 1). Paths lead from (0, 0) to (S, T),
and the last arc of each is a blank. The nodes with s + t = d depend on those with s + t = d - 1 alone, so a step of the
recursion takes a whole diagonal of all utterances.

Source: Graves 2012, "Sequence transduction with recurrent neural networks" (arXiv 1211.3711), section 2.4. The backward
pass over shares of a node's probability, instead of differences of large logarithms, is that of k2's
`mutual_information`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harken.core.errors import HarkenError

INFINITY = float("inf")


@dataclass(frozen=True, kw_only=True)
class Arcs:
    """Log-probabilities of the arcs of a padded batch, and where each utterance ends.

    emit: `(B, S, T)`, token s at frame t. blank: `(B, S + 1, T)`, the end of frame t after s tokens.
    tokens, frames: `(B,)` int64 lengths on the arcs' device; what lies behind them is not looked at.
    """

    emit: Tensor
    blank: Tensor
    tokens: Tensor
    frames: Tensor

    def __post_init__(self) -> None:
        """Raise HarkenError when the shapes do not fit each other."""
        size, tokens, frames = self.emit.shape
        if self.blank.shape != (size, tokens + 1, frames) or not (self.tokens.shape == self.frames.shape == (size,)):
            raise HarkenError(
                "expected arcs `emit` (B, S, T), `blank` (B, S + 1, T) and lengths (B,), got "
                f"{tuple(self.emit.shape)}, {tuple(self.blank.shape)}, {tuple(self.tokens.shape)} and "
                f"{tuple(self.frames.shape)}"
            )


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What a lattice sums up to.

    scores: `(B,)` natural-log probability of each utterance's tokens, -inf where no path exists; carries the gradient.
    emit `(B, S, T)`, blank `(B, S + 1, T)`: occupation, the share of that probability whose paths take an arc, which is
        the derivative of the score by its log-probability. Without gradient; 0 where no path exists.
    """

    scores: Tensor
    emit: Tensor
    blank: Tensor


def sum_paths(arcs: Arcs) -> Sums:
    """Sum over all paths of each utterance, in float64 whatever the arcs are in.

    Float64 costs little here, as the lattice has no axis of classes. In float32 a score near -3000 (500 frames of an
    untrained model) is known to 2e-4, and so would be every gradient. The backward pass is part of the forward pass:
    what is kept for the gradient are the occupations, two numbers for each node.
    """
    arrays = arcs.emit, arcs.blank, arcs.tokens, arcs.frames
    scores, emit, blank = _SumPaths.apply(*arrays)  # type: ignore[no-untyped-call]
    return Sums(scores=scores, emit=emit, blank=blank)


class _SumPaths(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, emit: Tensor, blank: Tensor, tokens: Tensor, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        steps = int(emit.shape[1] + emit.shape[2])
        # behind an utterance's last frame nothing may be written: it would be scored by frames of padding
        behind = torch.arange(emit.shape[2], device=emit.device)[None, :] >= frames[:, None]
        emits = _to_diagonals(emit.masked_fill(behind[:, None], -INFINITY), steps, one_more_row=True)
        blanks = _to_diagonals(blank, steps)
        scores = _forward(emits, blanks, tokens, frames)
        _backward(emits, blanks, tokens, frames)
        occupation = _from_diagonals(emits, emit), _from_diagonals(blanks, blank)
        ctx.save_for_backward(*occupation)
        ctx.mark_non_differentiable(*occupation)
        return scores.to(emit.dtype), *occupation

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        emit, blank = ctx.saved_tensors
        scale = grads[0][:, None, None]
        return emit * scale, blank * scale, None, None


def _to_diagonals(arcs: Tensor, steps: int, *, one_more_row: bool = False) -> Tensor:
    """Return `(steps, B, S + 1)` float64: the arc of row s that leaves diagonal d, -inf where there is none.

    Rows that are one longer than they are read as move by one place from row to row, which is the shift that is needed.
    """
    size, rows, frames = arcs.shape
    padded = functional.pad(arcs.double(), (0, steps + 1 - frames, 0, int(one_more_row)), value=-INFINITY)
    rows += int(one_more_row)
    flat = padded.flatten(1)[:, : rows * steps]
    return flat.view(size, rows, steps).permute(2, 0, 1).contiguous()


def _from_diagonals(diagonals: Tensor, like: Tensor) -> Tensor:
    """Return what `_to_diagonals` was given, in the shape and dtype of `like`."""
    steps = len(diagonals)
    size, rows, frames = like.shape
    flat = diagonals[:, :, :rows].permute(1, 2, 0).to(like.dtype).flatten(1)
    return functional.pad(flat, (0, rows)).view(size, rows, steps + 1)[:, :, :frames].contiguous()


def _forward(emits: Tensor, blanks: Tensor, tokens: Tensor, frames: Tensor) -> Tensor:
    """Return the scores `(B,)`, and turn the arcs' log-probabilities, in place, into shares.

    The share of an arc is what it brings of the probability of the node that it leads to.
    """
    steps, size, rows = emits.shape
    nodes = emits.new_full((steps + 1, size, rows), -INFINITY)
    nodes[0, :, 0] = 0.0
    per_step = nodes.unbind(0)
    for step, (emit, blank) in enumerate(zip(emits.unbind(0), blanks.unbind(0), strict=True)):
        here, there = per_step[step], per_step[step + 1]
        torch.add(here, blank, out=there)
        there[:, 1:] = torch.logaddexp(there[:, 1:], here[:, :-1] + emit[:, :-1])
    for arcs, reached in ((emits[:, :, :-1], nodes[1:, :, 1:]), (blanks, nodes[1:])):
        arcs.add_(nodes[:-1, :, : arcs.shape[2]]).sub_(reached).exp_().nan_to_num_(nan=0.0)  # -inf - -inf: no path
    emits[:, :, -1] = 0.0
    return nodes[tokens + frames, torch.arange(size, device=tokens.device), tokens]


def _backward(emits: Tensor, blanks: Tensor, tokens: Tensor, frames: Tensor) -> None:
    """Turn the shares, in place, into occupations: what goes through a node times the share of the arc into it."""
    steps, size, rows = emits.shape
    nodes = emits.new_zeros(steps + 1, size, rows)
    nodes[tokens + frames, torch.arange(size, device=tokens.device), tokens] = 1.0
    per_step = nodes.unbind(0)
    pairs = list(zip(emits.unbind(0), blanks.unbind(0), strict=True))
    for step in range(steps - 1, -1, -1):
        (emit, blank), here, there = pairs[step], per_step[step], per_step[step + 1]
        emit[:, :-1] *= there[:, 1:]
        blank *= there
        here += emit
        here += blank
