"""Parameter groups: parameters whose learning rate and weight decay always agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from harken.config.load import flatten
from harken.core.errors import HarkenError, nearest

RateScale = Callable[[str, int], float]
LAST = 10**12  # a step after every freeze


def scaled_by_name(rate_scale: RateScale, scales: Mapping[str, Any], model: nn.Module) -> RateScale:
    """Return `rate_scale` times the factors of `train.rate_scales` for the parameter and all modules that it is in.

    Raises HarkenError for a name that is no parameter or module of the model.
    """
    factors = {name: float(value) for name, value in flatten(scales).items()}
    parts = [name for name, _ in (*model.named_modules(), *model.named_parameters()) if name]
    for name in factors:
        if name not in parts:
            raise HarkenError(
                f"`train.rate_scales` must name parameters or modules of the model, got `{name}`{nearest(name, parts)}"
            )

    def scaled(parameter: str, step: int) -> float:
        steps = parameter.split(".")
        within = (".".join(steps[: depth + 1]) for depth in range(len(steps)))
        return rate_scale(parameter, step) * math.prod(factors.get(name, 1.0) for name in within)

    return scaled


def parameter_groups(model: nn.Module, rate_scale: RateScale) -> list[dict[str, Any]]:
    """Group the trainable parameters; freeze those whose rate is 0 from the first step to the last.

    Each group has `params`, `names`, and `decay` (whether its parameters have more than one axis).
    """
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        first, last = rate_scale(name, 0), rate_scale(name, LAST)
        if first == 0 and last == 0:
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        # under ZeRO-3 a parameter's own shape may be gathered later: ds_shape is the whole one
        decay = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        group = groups.setdefault((first, last, decay), {"params": [], "names": [], "decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def set_rates(
    optimizer: torch.optim.Optimizer, names: list[str], rate: float, rate_scale: RateScale, step: int
) -> None:
    """Set the learning rate of each group; `names` holds one parameter's name for each group."""
    for group, name in zip(optimizer.param_groups, names, strict=True):
        group["lr"] = rate * rate_scale(name, step)
