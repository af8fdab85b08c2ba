"""AdamW on torch's fused kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from harken.config.registry import SlotConfig, register
from harken.config.rules import check_numbers


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(SlotConfig):
    """Defaults are HuBERT's (fairseq `hubert_base_librispeech.yaml`)."""

    betas: tuple[float, ...] = (0.9, 0.98)
    """fairseq `adam_betas`."""
    eps: float = 1e-6
    """fairseq `adam_eps`."""
    weight_decay: float = 0.01
    """A step takes this times the learning rate times the weight from each weight. fairseq `weight_decay`."""
    decay_all: bool = True
    """Decay norms and biases too, as fairseq does; False decays matrices and kernels only."""

    def __post_init__(self) -> None:
        check_numbers(self, "optimizer", positive=("eps",), not_negative=("weight_decay",), shares=("betas",))


@register("optimizer", AdamWConfig)
class AdamW(torch.optim.AdamW):
    """Adam with decoupled weight decay. Source: Loshchilov and Hutter, arXiv 1711.05101."""

    def __init__(self, config: AdamWConfig, groups: Sequence[dict[str, Any]]) -> None:
        for group in groups:
            group["weight_decay"] = config.weight_decay if group["decay"] or config.decay_all else 0.0
        beta1, beta2 = config.betas
        super().__init__(list(groups), lr=0.0, betas=(beta1, beta2), eps=config.eps, fused=True)
