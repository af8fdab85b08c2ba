"""What networks say about the arcs of a transducer's lattice: added scores, smoothed ones, and those of a joiner.

Source: Kuang et al. 2022, "Pruned RNN-T for fast, memory-efficient ASR training" (arXiv 2206.13236), and k2's
`rnnt_loss.py` for what the paper leaves open: how the smoothed loss averages, and how ranges are made to fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harken.core.errors import HarkenError
from harken.nn.transducer.lattice import INFINITY, Arcs, Sums

_FRAMES_AT_ONCE = 32  # copies in float32 and exponentials are made for this many frames, not for all


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The tokens of a padded batch.

    tokens: `(B, S)` int64 ids, any valid id where padded. lengths, frames: `(B,)` int64, tokens and frames of each
    utterance. All on the device of the scores. blank: the id that ends a frame.
    """

    tokens: Tensor
    lengths: Tensor
    frames: Tensor
    blank: int = 0

    def arcs(self, emit: Tensor, blank: Tensor) -> Arcs:
        """Put log-probabilities `(B, S, T)` and `(B, S + 1, T)` together with the lengths."""
        return Arcs(emit=emit, blank=blank, tokens=self.lengths, frames=self.frames)


def additive_arcs(am: Tensor, lm: Tensor, labels: Labels, *, lm_scale: float = 0.0, am_scale: float = 0.0) -> Arcs:
    """Return the arcs of a joiner that only adds: the softmax of `am[t] + lm[s]`, without an array `(B, T, S, V)`.

    am: `(B, T, V)` and lm: `(B, S + 1, V)` unnormalised scores. With scales, log-probabilities are interpolated,
    `(1 - lm_scale - am_scale) * both + lm_scale * lm alone + am_scale * am alone` (arXiv 2206.13236, 2.4), where
    `am alone` is joined with the mean of lm's probabilities over the whole batch and its padding, as in k2: with
    `am_scale` an utterance's score depends on the others.

    Computed in float32, or float64 for such scores, whatever the autocast.
    """
    with torch.autocast(am.device.type, enabled=False):
        am, lm = _precise(am), _precise(lm)
        am_max, lm_max = am.amax(2, keepdim=True), lm.amax(2, keepdim=True)
        am_parts, lm_parts = (am - am_max).exp(), (lm - lm_max).exp()
        tiny = torch.finfo(am.dtype).tiny
        both = ((lm_parts @ am_parts.transpose(1, 2)) + tiny).log() + lm_max + am_max.transpose(1, 2)
        index = labels.tokens[:, None, :].expand(-1, am.shape[1], -1)
        am_emit, am_blank = am.gather(2, index).transpose(1, 2), am[:, :, labels.blank][:, None]
        lm_emit, lm_blank = lm[:, :-1].gather(2, labels.tokens[:, :, None]), lm[:, :, labels.blank][:, :, None]
        share = 1.0 - lm_scale - am_scale
        emit = share * (am_emit + lm_emit - both[:, :-1])
        blank = share * (am_blank + lm_blank - both)
        if lm_scale:
            alone = lm_parts.sum(2, keepdim=True).log() + lm_max
            emit = emit + lm_scale * (lm_emit - alone[:, :-1])
            blank = blank + lm_scale * (lm_blank - alone)
        if am_scale:
            mean = (lm_parts / lm_parts.sum(2, keepdim=True)).mean((0, 1)) + tiny
            alone = ((am_parts @ mean).log() + am_max[:, :, 0])[:, None]
            emit = emit + am_scale * (am_emit + mean.log()[labels.tokens][:, :, None] - alone)
            blank = blank + am_scale * (am_blank + mean.log()[labels.blank] - alone)
    return labels.arcs(emit, blank)


def prune_starts(sums: Sums, labels: Labels, width: int) -> Tensor:
    """Return `(B, T)` int64: the first of the `width` token positions that are kept at each frame.

    The positions of a frame are those within which the paths of `sums` most probably spend the whole frame: they leave
    it by a blank from there, and did not enter by a token from below. They never fall, begin with 0, reach the last
    token at the last frame, and move by less than `width` from one frame to the next, so that paths go through. A
    `width` above S + 1 keeps everything.

    Raises HarkenError for a width below 2, which no path goes through. Source: arXiv 2206.13236, section 2.3, with the
    choice of positions as k2 1.24 makes it.
    """
    rows, frames = sums.blank.shape[1:]
    if width < 2:
        raise HarkenError(f"at least 2 token positions must be kept at each frame, got {width}")
    width = min(width, rows)
    leaves = sums.blank.unfold(1, width, 1).sum(-1)
    enters = functional.pad(sums.emit, (0, 0, 1, 0))[:, : rows - width + 1]
    best = (leaves - enters).argmax(1)
    last = (labels.lengths - width + 1).clamp(min=0)[:, None]
    place = torch.arange(frames, device=best.device)
    best = torch.where(place < labels.frames[:, None] - 1, best, last)
    best = _never_falling(best)
    # the same after a change of sign and slope bounds the rise from frame to frame
    slope = (width - 1) * place
    return slope - _never_falling(slope - best).clamp(min=0)


def _never_falling(values: Tensor) -> Tensor:
    """Lower values `(B, T)` to the least of what follows them."""
    return values.flip(1).cummin(1).values.flip(1)


def kept_positions(starts: Tensor, rows: int, width: int) -> Tensor:
    """Return `(B, T, R)`, the positions that are kept at each frame, R the `width` but at most all `rows` = S + 1."""
    return starts[:, :, None] + torch.arange(min(width, rows), device=starts.device)


def joined_arcs(logits: Tensor, positions: Tensor, labels: Labels) -> Arcs:
    """Return the arcs of a joiner's unnormalised scores `(B, T, R, V)` at positions `(B, T, R)`; all others are closed.

    With R = S + 1 and positions 0..S at each frame it is the full lattice. The gradient is made in one array of the
    logits' size, and nothing else of that size is kept.
    """
    ids = functional.pad(labels.tokens, (0, 1))
    following = ids[:, None, :].expand(-1, logits.shape[1], -1).gather(2, positions)
    emit, blank = _JoinedArcs.apply(logits, following, labels.blank)  # type: ignore[no-untyped-call]
    shape = (*positions.shape[:2], ids.shape[1])
    closed = emit.new_full(shape, -INFINITY)
    emits, blanks = (closed.scatter(2, positions, values).transpose(1, 2) for values in (emit, blank))
    return labels.arcs(emits[:, :-1], blanks)


class _JoinedArcs(torch.autograd.Function):
    """Log-probabilities of the following token and of the blank, `(B, T, R)` each, from logits `(B, T, R, V)`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, following: Tensor, blank: int) -> tuple[Tensor, Tensor]:
        normaliser = torch.cat([_precise(part).logsumexp(3) for part in logits.split(_FRAMES_AT_ONCE, 1)], 1)
        ctx.save_for_backward(logits, following, normaliser)
        ctx.blank = blank
        emit = _precise(logits.gather(3, following[..., None])[..., 0]) - normaliser
        return emit, _precise(logits[..., blank]) - normaliser

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, *others = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        arrays = [gradient, logits, *others, *grads]
        for target, scores, following, normaliser, emit, blank in zip(
            *(array.split(_FRAMES_AT_ONCE, 1) for array in arrays), strict=True
        ):
            part = (_precise(scores) - normaliser[..., None]).exp_().mul_(-(emit + blank)[..., None])
            part.scatter_add_(3, following[..., None], emit[..., None])
            part[..., ctx.blank] += blank
            target.copy_(part)
        return gradient, None, None


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
