"""Backbones of saved models."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from harken.config.saved import WEIGHTS, find_model, load_config, load_into, load_weights
from harken.config.schema import RunConfig
from harken.core.errors import HarkenError
from harken.encoders.backbone import Backbone, build_backbone


def backbone_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the backbone in a saved model, without their prefix."""
    prefix = "backbone."
    found = {
        name.removeprefix(prefix): value for name, value in load_weights(folder).items() if name.startswith(prefix)
    }
    if not found:
        raise HarkenError(f"{folder / WEIGHTS} holds no `backbone.` weights: it is no model of harken")
    return found


def load_backbone(path: str | Path) -> tuple[Backbone, RunConfig]:
    """Load the backbone of a saved model, in evaluation mode on the CPU, and its configuration."""
    folder = find_model(path)
    config = load_config(folder)
    backbone = build_backbone(config)
    load_into(backbone, backbone_weights(folder), folder)
    return backbone.eval(), config
