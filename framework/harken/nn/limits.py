"""What keeps activations and parameters in a range by changing gradients: balancers, whiteners, parameter limits.

None of them changes a value in the forward pass. Each acts in a share of the passes, drawn from torch's generator, and
keeps no state between passes, so that a run continues exactly and does not depend on the number of its ranks.
Source: arXiv 2310.11230 appendix A.2 ("Activation constraints") and icefall's `scaling.py`. Left out, as
they are state: icefall's balancers rest while a GPU's memory is nearly full, its whiteners look less often while all is
well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from harken.nn.scheduled import Chance, Clock, Number, Scheduled, happens

_TINY = 1e-20
WHITENER_SHARE = 0.25  # icefall's, while the limit is exceeded


def _scalar(value: Number | Chance) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(float(value))


class _Balance(torch.autograd.Function):
    """Moves each channel's mean over its deviation, and its root mean square, back between their bounds.

    With m, d and r a channel's mean, deviation and root mean square, q = m / d and z = (x - m) / d, the gradient of
    |q - bounded q| + |log r - bounded log r|, times d, is s (1 - q z) + t (q + z) / (1 + q^2), s and t the signs of
    what is in the bars: A + B z.
    It is scaled to a root mean square of `strength` over the channel, which is that of A + B z, and to the size of each
    element's own gradient. A channel that is zero everywhere, as a masked one is, has none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, active: Tensor, bounds: Tensor, strength: float, channel_dim: int) -> Tensor:
        ctx.save_for_backward(x, active, bounds)
        ctx.strength, ctx.channel_dim = strength, channel_dim
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the changed gradient of `x`, of its shape and in the type of what came; None for the rest."""
        x, active, bounds = ctx.saved_tensors
        (grad,) = grads
        low_mean, high_mean, low_rms, high_rms = bounds.to(x.device, non_blocking=True).unbind()
        x = x.float()
        others = [dim for dim in range(x.ndim) if dim != ctx.channel_dim % x.ndim]
        mean = x.mean(others, keepdim=True)
        variance = (x - mean).square().mean(others, keepdim=True)
        square = mean.square() + variance
        deviation, rms = variance.clamp(min=_TINY).sqrt(), square.clamp(min=_TINY).sqrt()
        ratio = mean / deviation
        off_mean = torch.sign(ratio - torch.clamp(ratio, low_mean, high_mean))
        off_rms = torch.sign(rms - torch.clamp(rms, low_rms, high_rms)) * (square > _TINY)
        a = off_mean + off_rms * ratio / (1 + ratio.square())
        b = off_rms / (1 + ratio.square()) - off_mean * ratio * (variance > _TINY)
        strength = active.to(x.device, non_blocking=True) * ctx.strength
        scale = strength / (a.square() + b.square()).sqrt().clamp(min=_TINY)
        changed = grad.float() + grad.float().abs() * scale * (a + b * (x - mean) / deviation)
        return changed.to(grad.dtype), None, None, None, None


class Balancer(nn.Module):
    """Keeps the share of positive values and the mean absolute value of each channel between bounds.

    min_positive, max_positive, min_abs, max_abs: numbers or schedules. share: of the passes in which it acts.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        min_positive: float | Scheduled = 0.05,
        max_positive: float | Scheduled = 0.95,
        min_abs: float | Scheduled = 0.2,
        max_abs: float | Scheduled = 100.0,
        share: float | None = None,
        channel_dim: int = -1,
    ) -> None:
        super().__init__()
        self.positive = (min_positive, max_positive)
        self.absolute = (min_abs, max_abs)
        self.strength = 0.04
        self.share = Scheduled(clock, *(((0.0, 0.5), (8000.0, 0.125)) if share is None else ((0.0, share),)))
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` of any shape, whose gradient is changed in training."""
        if not self.training or not x.requires_grad:
            return x
        active = happens(self.share())
        if active is False:
            return x
        # of a normal distribution: what mean a share of positive values has, and what rms a mean absolute value
        means = [mean_of_positive_share(_now(bound)) for bound in self.positive]
        sizes = [math.sqrt(math.pi / 2) * _now(bound) for bound in self.absolute]
        bounds = torch.stack([_scalar(bound) for bound in (*means, *sizes)])
        y: Tensor = _Balance.apply(x, _scalar(active), bounds, self.strength, self.channel_dim)  # type: ignore[no-untyped-call]
        return y


def _now(value: float | Scheduled) -> Number:
    return value() if isinstance(value, Scheduled) else value


def mean_of_positive_share(share: Number) -> Number:
    """Return about which mean, in deviations, a channel has that is positive in this share of places.

    It is icefall's: 0.8139535143 atanh(2 share - 1), a crude inverse of the error function, finite at 0 and 1.
    """
    eps = 1e-10
    up, down = 2 * share + eps, 2 - 2 * share + eps
    if isinstance(up, Tensor):
        return 0.8139535143 * (torch.log(up) - torch.log(cast(Tensor, down))) / 2
    return 0.8139535143 * (math.log(up) - math.log(cast(float, down))) / 2


@torch.library.custom_op("harken::whitening_gradient", mutates_args=())
def _whitening_gradient(x: Tensor, grad: Tensor, active: Tensor, limit: Tensor, strength: float, groups: int) -> Tensor:
    """Return `grad` plus the gradient of the whitening metric of `x` `(..., C)`, where active and above the limit.

    The metric is the mean square of the eigenvalues of the groups' covariances over their squared mean. With S the
    covariance, t the mean of its diagonal and s that of S S, its gradient is along (x - mean) (S - s / t I). It is
    scaled to `strength` of the norm of `grad`. It is an operation of its own so that compiled code need not compute it
    in the passes in which it is not active.
    """
    if not bool(active):
        return grad.clone()
    flat = x.float().reshape(-1, groups, x.shape[-1] // groups).transpose(0, 1)
    flat = flat - flat.mean(1, keepdim=True)
    covariance = flat.transpose(1, 2) @ flat
    trace = covariance.diagonal(dim1=1, dim2=2).mean()
    square = covariance.square().sum() / x.shape[-1]
    identity = torch.eye(flat.shape[-1], device=x.device)
    penalty: Tensor = (flat @ (covariance - square / (trace + _TINY) * identity)).transpose(0, 1).reshape(x.shape)
    above = square / (trace.square() + _TINY) >= limit.to(x.device, non_blocking=True)
    scale = strength * grad.float().norm() / (penalty.norm() + _TINY)
    changed: Tensor = grad + torch.where(above, penalty * scale, 0.0).to(grad.dtype)
    return changed


@_whitening_gradient.register_fake
def _(x: Tensor, grad: Tensor, active: Tensor, limit: Tensor, strength: float, groups: int) -> Tensor:
    return torch.empty_like(grad)


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, active: Tensor, limit: Tensor, strength: float, groups: int) -> Tensor:
        ctx.save_for_backward(x, active, limit)
        ctx.strength, ctx.groups = strength, groups
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, active, limit = ctx.saved_tensors
        return _whitening_gradient(x, grads[0], active, limit, ctx.strength, ctx.groups), None, None, None, None


class Whitener(nn.Module):
    """Keeps the covariance of channels, within groups of them, from being far from a multiple of the identity.

    limit: number or schedule, what the metric may be; 1 is white. strength: size of the added gradient.
    """

    def __init__(self, limit: float | Scheduled, *, strength: float = 0.01, groups: int = 1) -> None:
        super().__init__()
        self.limit = limit
        self.strength = strength
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` `(..., C)`, whose gradient is changed in training."""
        if not self.training or not x.requires_grad:
            return x
        active = happens(WHITENER_SHARE)
        if active is False:
            return x
        limit = _scalar(_now(self.limit))
        y: Tensor = _Whiten.apply(x, _scalar(active), limit, self.strength, self.groups)  # type: ignore[no-untyped-call]
        return y


class _Limit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, active: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x, active, low, high)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, active, low, high = (tensor.to(grads[0].device, non_blocking=True) for tensor in ctx.saved_tensors)
        (grad,) = grads
        further_out = ((x < low) & (grad > 0)) | ((x > high) & (grad < 0))
        return torch.where(further_out & (active > 0), -grad, grad), None, None, None


def limit_parameter(x: Tensor, low: Number, high: Number) -> Tensor:
    """Return a parameter, whose gradient is turned round, in 0.6 of the passes, where it would lead further out.

    Source: icefall's `limit_param_value`.
    """
    active = happens(0.6)
    if active is False:
        return x
    y: Tensor = _Limit.apply(x, _scalar(active), _scalar(low), _scalar(high))  # type: ignore[no-untyped-call]
    return y


@dataclass(frozen=True)
class Regime:
    """What an encoder is regularised with, and by which clock.

    skips: parts are left out at random. limits: gradients keep activations and parameters in their ranges.
    """

    clock: Clock
    skips: bool
    limits: bool

    def schedule(self, *points: tuple[float, float]) -> Scheduled:
        """Return a schedule by this clock."""
        return Scheduled(self.clock, *points)

    def balancer(self, **bounds: Any) -> nn.Module:
        """Return a balancer; see there."""
        return Balancer(self.clock, **bounds) if self.limits else nn.Identity()

    def whitener(self, limit: float, end: float | None = None, **how: Any) -> nn.Module:
        """Return a whitener whose limit goes from `limit` to `end` (twice as much if not said) in 20000 steps."""
        schedule = self.schedule((0.0, limit), (20000.0, 2 * limit if end is None else end))
        return Whitener(schedule, **how) if self.limits else nn.Identity()
