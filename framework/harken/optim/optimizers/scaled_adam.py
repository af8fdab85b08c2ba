"""ScaledAdam: updates in proportion to each tensor's size, and a learned size. Zipformer's optimiser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from harken.config.registry import SlotConfig, register
from harken.config.rules import check_numbers

_EARLY = (10, 20, 40)
"""Steps before the first `clipping_update_period` at which a threshold is set. Source: icefall `zipformer/optim.py`."""
_EARLY_SLACK = 2.0
"""What such a threshold is multiplied by, as norms still change fast. Source: the same."""
_LARGEST_GROWTH = 0.1
"""Share of itself by which a tensor may at most grow or shrink in a size update. Source: the same."""
_UNCORRECTED = 0.99
"""Bias correction of the second moment that is near enough to 1 to be left out. Source: the same."""


@dataclass(frozen=True, kw_only=True)
class ScaledAdamConfig(SlotConfig):
    """Defaults are those of icefall's Zipformer recipes (`zipformer/optim.py`, `train.py`; arXiv 2310.11230, 3.5)."""

    whole_tensors: ClassVar[bool] = True

    betas: tuple[float, ...] = (0.9, 0.98)
    """Decay of the momentum, and of the mean square of gradients. icefall `betas`."""
    eps: float = 1e-8
    """Added to the root of the mean square. icefall `eps`."""
    scalar_rate_scale: float = 0.1
    """Factor on the learning rate of the size of a tensor, and of parameters of one element. icefall
    `scalar_lr_scale`."""
    min_rms: float = 1e-5
    """A smaller tensor is updated as if it had this root mean square, and does not shrink. icefall `param_min_rms`."""
    max_rms: float = 3.0
    """Size updates take no tensor above this root mean square. icefall `param_max_rms`."""
    scalar_max: float = 10.0
    """Largest absolute value of parameters of one element. icefall `scalar_max`."""
    size_update_period: int = 4
    """Steps from one update of the sizes to the next. icefall `size_update_period`."""
    clipping_scale: float | None = 2.0
    """Gradients are clipped at this times the median of their past norms; null is off. icefall `clipping_scale`."""
    clipping_update_period: int = 100
    """Norms that the median is over, and steps from one median to the next. icefall `clipping_update_period`."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "optimizer",
            positive=(
                "eps",
                "min_rms",
                "max_rms",
                "scalar_max",
                "clipping_scale",
                "size_update_period",
                "clipping_update_period",
            ),
            not_negative=("scalar_rate_scale",),
            shares=("betas",),
        )


@dataclass
class _Part:
    """A parameter in a step: its gradient in its own layout, its state, and its group's learning rate."""

    parameter: Tensor
    grad: Tensor
    state: dict[str, Any]
    rate: float

    @property
    def scalar(self) -> bool:
        return self.parameter.numel() == 1


@register("optimizer", ScaledAdamConfig)
class ScaledAdam(torch.optim.Optimizer):
    """Adam whose update of a tensor is scaled by the tensor's root mean square (RMS), which is learned besides.

    Source: Yao et al., arXiv 2310.11230 section 3.5, in the form of icefall `zipformer/optim.py`. For a tensor p of
    RMS r with gradient g, learning rate a, and s the sum of p g:

        v <- beta2 v + (1 - beta2) g^2,    u = -a r g / (sqrt(v / (1 - beta2^t)) + eps)
        every `size_update_period` steps: u += p x (an Adam step on the size, of rate a `scalar_rate_scale`, from s)
        d <- beta1 d + (1 - beta1) u,      p <- p + d

    Momentum is thus of updates, not of gradients, and is not corrected for its start: both as icefall does. Parameters
    of one element have no RMS, the rate a `scalar_rate_scale`, and a largest value. Gradients are clipped by the norm
    over all parameters of r g, against its own past median.

    State of a parameter: `delta` (d) and `exp_avg_sq` (v), shaped as it; numbers for its size. The first parameter
    also has the `step` and, as `norm_N`, the past norms. All are functions of the steps taken.
    """

    def __init__(self, config: ScaledAdamConfig, groups: Sequence[dict[str, Any]]) -> None:
        super().__init__(list(groups), {"lr": 0.0})
        self.config = config

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step. A parameter without a gradient has one of zeros."""
        parts = [self._part(p, group["lr"]) for group in self.param_groups for p in group["params"]]
        shared = parts[0].state  # the first parameter's: what belongs to the whole model
        step = shared.setdefault("step", 0)
        if self.config.clipping_scale is not None and step > 0:
            factor = self._clipping(parts, shared, step)
            if factor < 1:
                torch._foreach_mul_([part.grad for part in parts], factor)
        large = [part for part in parts if not part.scalar]
        if self._due(step) and large:
            for part, rms in zip(large, _rms([part.parameter for part in large]), strict=True):
                part.state["param_rms"] = rms
        if parts[0].parameter.device.type == "cpu":
            corrected = 1 - self.config.betas[1] ** (step + 1) < _UNCORRECTED
            count = torch.tensor(float(step + 1 if corrected else 2**30))
            for part in parts:  # one after the other: what a tensor needs stays in the cache
                self._advance_one(part, step, count)
        else:
            self._advance(large, step)
            self._advance([part for part in parts if part.scalar], step)
        shared["step"] = step + 1

    def _due(self, step: int) -> bool:
        """Whether sizes are updated in a step."""
        return step % self.config.size_update_period == self.config.size_update_period - 1

    def _part(self, parameter: Tensor, rate: float) -> _Part:
        state = self.state[parameter]
        if "delta" not in state:
            state["delta"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            if parameter.numel() > 1:
                state.update(param_rms=_rms([parameter])[0], scale_exp_avg_sq=0.0)
                state.update(scale_grad_sum=0.0, scale_grad_sq_sum=0.0)
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if grad.stride() != parameter.stride():  # the fused kernel goes through memory, not through axes
            grad = torch.empty_like(parameter).copy_(grad)
        return _Part(parameter, grad, state, rate)

    def _clipping(self, parts: Sequence[_Part], shared: dict[str, Any], step: int) -> float:
        """Return what to multiply gradients by, at most 1; keep the norm, and set the threshold when it is due."""
        own = self.config
        assert own.clipping_scale is not None
        norms = _norms([part.grad for part in parts])
        sizes = [own.scalar_rate_scale if part.scalar else part.state["param_rms"] for part in parts]
        total = math.hypot(*(norm * size for norm, size in zip(norms, sizes, strict=True)))
        period = own.clipping_update_period
        shared[f"norm_{step % period}"] = total
        early = step in _EARLY and step < period
        if early or step % period == 0:
            places = range(step - (step if early else period) + 1, step + 1)
            # some are not there when the period was made longer since
            past = sorted(shared[key] for key in (f"norm_{place % period}" for place in places) if key in shared)
            median = past[min(len(past) - 1, len(past) // 4 * 2)]
            shared["clip_threshold"] = own.clipping_scale * median * (_EARLY_SLACK if early else 1.0)
        return min(1.0, float(shared.get("clip_threshold", math.inf)) / (total + 1e-20))

    def _advance_one(self, part: _Part, step: int, count: Tensor) -> None:
        """Do what `_advance` does for one parameter on a CPU. count: the step that AdamW is to correct for."""
        momentum, growth, delta = 1 - self.config.betas[0], 0.0, part.state["delta"]
        if not part.scalar:
            dot = torch.dot(part.parameter.reshape(-1), part.grad.reshape(-1)).item()
            growth = self._growth(part, dot, step)
        rate = self._rate(part)
        if _fits_fused(rate):
            _accumulate_fused(part, rate, self.config, count)
        else:
            self._accumulate([part], [rate], step)
        if growth:
            delta.add_(part.parameter, alpha=momentum * growth)
        part.parameter.add_(delta)
        if part.scalar:
            part.parameter.clamp_(-self.config.scalar_max, self.config.scalar_max)

    def _advance(self, parts: Sequence[_Part], step: int) -> None:
        """Update parameters that are all of one element, or all larger, in few kernels."""
        if not parts:
            return
        own = self.config
        parameters = [part.parameter for part in parts]
        deltas = [part.state["delta"] for part in parts]
        growths = [0.0] * len(parts)
        if not parts[0].scalar:
            products = [torch.dot(part.parameter.reshape(-1), part.grad.reshape(-1)) for part in parts]
            dots = torch.stack(products).tolist()
            growths = [self._growth(part, dot, step) for part, dot in zip(parts, dots, strict=True)]
        self._accumulate(parts, [self._rate(part) for part in parts], step)
        for parameter, delta, growth in zip(parameters, deltas, growths, strict=True):
            if growth:
                delta.add_(parameter, alpha=(1 - own.betas[0]) * growth)
        torch._foreach_add_(parameters, deltas)
        if parts[0].scalar:
            torch._foreach_clamp_min_(parameters, -own.scalar_max)
            torch._foreach_clamp_max_(parameters, own.scalar_max)

    def _rate(self, part: _Part) -> float:
        """Return what a normalised gradient is multiplied by on its way into the momentum."""
        own = self.config
        size = own.scalar_rate_scale if part.scalar else max(part.state["param_rms"], own.min_rms)
        return float((1 - own.betas[0]) * part.rate * size)

    def _growth(self, part: _Part, dot: float, step: int) -> float:
        """Return the share of itself by which a tensor is to grow: 0 but every `size_update_period` steps.

        Then it is a step of Adam without momentum on the tensor's size, from the gradients of a period. dot: the sum
        of parameter times gradient, which is the gradient of the logarithm of the size.
        """
        own, state = self.config, part.state
        state["scale_grad_sum"] += dot
        state["scale_grad_sq_sum"] += dot * dot
        if not self._due(step):
            return 0.0
        total, squares = state["scale_grad_sum"], state["scale_grad_sq_sum"]
        state.update(scale_grad_sum=0.0, scale_grad_sq_sum=0.0)
        if step == 0:
            return 0.0
        decay = own.betas[1] ** own.size_update_period  # so that it forgets as fast in steps as the other moment
        mean = decay * state["scale_exp_avg_sq"] + (1 - decay) * squares / own.size_update_period
        state["scale_exp_avg_sq"] = mean
        rms = state["param_rms"]
        if rms < own.min_rms:
            return 0.0
        corrected = 1 - decay ** ((step + 1) // own.size_update_period)
        rate = part.rate * own.scalar_rate_scale
        growth = -rate * math.sqrt(corrected) * total / (math.sqrt(mean) + own.eps)
        growth = max(-_LARGEST_GROWTH, min(_LARGEST_GROWTH, growth))
        return float(min(growth, (own.max_rms - rms) / rms))

    def _accumulate(self, parts: Sequence[_Part], rates: Sequence[float], step: int) -> None:
        """Add the gradients' squares to their means, and minus each rate times its normalised gradient to the momenta.

        rates: the factors of the momentum and of the tensor's size are in them.
        """
        beta1, beta2 = self.config.betas
        correction = 1 - beta2 ** (step + 1)
        grads = [part.grad for part in parts]
        squares = [part.state["exp_avg_sq"] for part in parts]
        deltas = [part.state["delta"] for part in parts]
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        roots = torch._foreach_sqrt(squares)  # noqa: SLF001  torch has no public name for it
        if correction < _UNCORRECTED:
            torch._foreach_div_(roots, math.sqrt(correction))
        torch._foreach_add_(roots, self.config.eps)
        torch._foreach_mul_(deltas, beta1)
        torch._foreach_addcdiv_(deltas, grads, roots, [-rate for rate in rates])


def _fits_fused(rate: float) -> bool:
    """Whether the fused kernel can do it: rates near 0 would give it a weight decay near infinity."""
    return rate > 1e-30


def _accumulate_fused(part: _Part, rate: float, config: ScaledAdamConfig, count: Tensor) -> None:
    """Do what `_accumulate` does in one pass through memory, by torch's AdamW with the momentum as its parameter.

    AdamW without momentum of its own takes rate g / (sqrt(v) + eps) from its parameter; its decay of rate x weight
    decay = 1 - beta1 is that of our momentum. Its first moment would be a copy of the gradient, so it is given that.
    """
    beta1, beta2 = config.betas
    torch._fused_adamw_(
        [part.state["delta"]],
        [part.grad],
        [part.grad],
        [part.state["exp_avg_sq"]],
        [],
        [count],
        lr=rate,
        beta1=0.0,
        beta2=beta2,
        weight_decay=(1 - beta1) / rate,
        eps=config.eps,
        amsgrad=False,
        maximize=False,
    )


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    """Return the 2-norm of each tensor, by one transfer from the device."""
    norms = torch._foreach_norm(list(tensors))  # noqa: SLF001  torch has no public name for it
    values: list[float] = torch.stack(norms).tolist()
    return values


def _rms(tensors: Sequence[Tensor]) -> list[float]:
    """Return the root mean square of each tensor."""
    return [norm / math.sqrt(tensor.numel()) for norm, tensor in zip(_norms(tensors), tensors, strict=True)]
