"""Building objectives, fresh or from saved models."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import cast

from torch import Tensor

from harken.config.registry import build, find
from harken.config.saved import find_model, load_config, load_into, load_weights
from harken.config.schema import RunConfig
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec
from harken.encoders.backbone import Backbone, build_backbone
from harken.encoders.saved import backbone_weights
from harken.objectives.base import Objective, Prepare


def build_objective(config: RunConfig) -> Objective:
    """Build the objective that a configuration names; `train.init_from` gives its backbone a saved model's weights.

    Raises HarkenError when these do not fit, or `train.init_fresh_blocks` is more than there are blocks.
    """
    backbone = build_backbone(config)
    if config.train.init_from is not None:
        folder = find_model(config.train.init_from)
        fresh = _top_blocks(backbone, config.train.init_fresh_blocks)
        load_into(backbone, {**backbone_weights(folder), **fresh}, folder)
    return cast(Objective, build("objective", config.objective, run=config, backbone=backbone))


def _top_blocks(backbone: Backbone, count: int) -> dict[str, Tensor]:
    """Return the weights that the top blocks of a backbone have now, by name."""
    encoder, prefix = backbone.encoder, "encoder."
    if count > encoder.num_layers:
        raise HarkenError(
            f"`train.init_fresh_blocks` must be at most the encoder's {encoder.num_layers} blocks, got {count}"
        )
    return {
        name: value
        for name, value in backbone.state_dict().items()
        if name.startswith(prefix) and encoder.depth(name.removeprefix(prefix)) > encoder.num_layers - count
    }


def build_prepare(config: RunConfig, spec: FrameSpec, *, train: bool) -> Prepare:
    """Build the objective's part that runs in the loader's workers."""
    part = cast(type[Objective], find("objective", config.objective.name).build)
    return part.preparer(config, spec, train=train)


def preparers(config: RunConfig) -> tuple[Callable[[bool], Prepare], FrameSpec]:
    """Return what builds the worker part for training (True) or validation, and the frontend's frame arithmetic.

    Raises HarkenError where `data.min_seconds` lets in cuts that give no frame.
    """
    spec = cast(FrameSpec, build("frontend", config.frontend).spec)
    _check_shortest(config, spec)
    return lambda train: build_prepare(config, spec, train=train), spec


def _check_shortest(config: RunConfig, spec: FrameSpec) -> None:
    """Raise HarkenError unless the shortest cut, at the fastest `data.speed`, gives a frame."""
    fastest = max((1.0, *config.data.speed))
    # one sample of slack: resampling rounds
    needed = (spec.receptive_field + 1) * fastest / config.data.sample_rate
    if config.data.min_seconds < needed:
        raise HarkenError(
            f"`data.min_seconds` must be at least {math.ceil(1000 * needed) / 1000:g}, for shorter cuts give no frame "
            f"of `frontend.name: {config.frontend.name}`, got {config.data.min_seconds:g}"
        )


def load_objective(path: str | Path) -> tuple[Objective, RunConfig]:
    """Load a saved model with its head, in evaluation mode on the CPU, and its configuration."""
    folder = find_model(path)
    config = load_config(folder)
    model = cast(Objective, build("objective", config.objective, run=config, backbone=build_backbone(config)))
    load_into(model, load_weights(folder), folder)
    return model.eval(), config
