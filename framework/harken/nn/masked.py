"""Statistics over the real frames of a padded batch."""

from __future__ import annotations

from torch import Tensor

from harken.core.batch import real_mask


def normalise_over_time(x: Tensor, lengths: Tensor | None, eps: float = 1e-5, *, with_channels: bool = False) -> Tensor:
    """Give each channel of each sequence zero mean and unit variance over its real frames.

    x: `(B, T, C)`. lengths: `(B,)` frames; None when nothing is padded. with_channels: over frames and channels
    together, which is a group norm of one group.
    """

    def mean_of(total: Tensor) -> Tensor:
        return total.mean(2, keepdim=True) if with_channels else total

    if lengths is None:
        centred = x - mean_of(x.mean(1, keepdim=True))
        return centred * (mean_of(centred.square().mean(1, keepdim=True)) + eps).rsqrt()
    lengths = lengths.to(x.device, non_blocking=True)
    real = real_mask(lengths, x.shape[1])[..., None].to(x.dtype)
    count = lengths.clamp(min=1).to(x.dtype)[:, None, None]
    centred = (x - mean_of((x * real).sum(1, keepdim=True) / count)) * real
    variance = mean_of(centred.square().sum(1, keepdim=True) / count)
    return centred * (variance + eps).rsqrt()


def summed_mean_squares(frames: Tensor, lengths: Tensor, counts: Tensor) -> Tensor:
    """Return the sum over sequences of (mean square of the real frames) x (count): a features penalty.

    It is weighed by each sequence's targets, so that it does not depend on how sequences share batches; where lengths
    and counts are equal it is the mean over the batch times all targets, as in fairseq.

    frames: `(B, T, C)`. lengths: `(B,)` frames. counts: `(B,)`.
    """
    squares = frames.float().square().mean(-1)
    length = lengths.to(frames.device, non_blocking=True).clamp(min=1)
    real = real_mask(length, frames.shape[1])
    return ((squares * real).sum(1) / length * counts.to(frames.device, non_blocking=True)).sum()
