"""Microsoft's WavLM checkpoints as harken models, without its code.

A checkpoint is one dict: `cfg`, the options of the model, and `model`, its state dict, in which the first block holds
the table of biases that all share. Nothing of the pretraining is in it, neither head nor training options: the folder
holds a backbone, and its configuration has HuBERT Base's training and 500 units in their place.
Source: arXiv 2110.13900; `WavLM.py` and `modules.py` of the released code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from harken.config.load import from_dict
from harken.config.saved import load_into
from harken.config.schema import RunConfig
from harken.core.errors import HarkenError
from harken.encoders.backbone import build_backbone
from harken.interop import fairseq
from harken.interop.fairseq_options import GROUPS, check_supported, hubert_config, training_config
from harken.interop.imported import Imported, import_one
from harken.interop.names import rename_weights
from harken.interop.unpickle import plain, read_checkpoint

_BLOCK = r"encoder\.layers\.(\d+)\.self_attn\."
_NEW_BLOCK = r"backbone.encoder.blocks.\1.attention."
NAMES: tuple[tuple[str, str], ...] = (
    (r"encoder\.layers\.0\.self_attn\.relative_attention_bias\.weight", "backbone.encoder.bias.table"),
    (rf"{_BLOCK}grep_linear\.(weight|bias)", rf"{_NEW_BLOCK}gate.\2"),
    (rf"{_BLOCK}grep_a", rf"{_NEW_BLOCK}gate_scale"),
    *fairseq.NAMES,
)
UNITS = 500
"""Clusters that WavLM Base was trained to predict: those of HuBERT Base's second iteration (arXiv 2110.13900)."""


def import_checkpoint(path: str | Path, folder: str | Path) -> Imported:
    """Read a checkpoint and write it as a model folder, which `load_backbone` and `train.init_from` open.

    Raises HarkenError when the folder holds something already, when the checkpoint cannot be read, when it is of
    another model, or when it has an option that harken does not support.
    """
    return import_one(read_wavlm, "wavlm", path, folder)


def read_wavlm(path: str | Path) -> Imported:
    """Read a checkpoint; see `import_checkpoint` for what is raised."""
    path = Path(path)
    options, model = read_parts(path, "WavLM")
    weights = rename(model, NAMES, path)
    config = checked(_settings(options, path), weights, path)
    notes = ("the head: WavLM's checkpoints hold none",)
    return Imported(config, weights, (), 0, notes, "classes: none, it holds no head")


def read_parts(path: Path, kind: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Return the options that have a value, and the state dict; `kind` is the model's name for messages."""
    state = read_checkpoint(path)
    cfg = plain(state.get("cfg")) if isinstance(state, Mapping) else None
    if not isinstance(state, Mapping) or not isinstance(state.get("model"), Mapping) or not isinstance(cfg, Mapping):
        raise HarkenError(f"{path} is no {kind} checkpoint: expected `cfg` and `model` in it")
    return {name: value for name, value in cfg.items() if value is not None}, state["model"]


def rename(model: Mapping[str, Any], names: Sequence[tuple[str, str]], path: Path) -> dict[str, Tensor]:
    """Return a state dict's weights under harken's names, without the tables of biases that blocks share."""
    renamed = rename_weights(_used(model), names, fairseq.QUERY_KEY_VALUE, path)
    return {name: value.reshape(-1) if name.endswith(".gate_scale") else value for name, value in renamed.items()}


def checked(settings: dict[str, Any], weights: Mapping[str, Tensor], path: Path) -> RunConfig:
    """Return the configuration that settings amount to; raise HarkenError where the weights are not its backbone's."""
    try:
        config = from_dict(settings)
    except TypeError as error:
        raise HarkenError(f"{path} has an option of a wrong type: {error}") from error
    prefix = "backbone."
    load_into(build_backbone(config), {name.removeprefix(prefix): value for name, value in weights.items()}, path)
    return config


def relative_positions(options: Mapping[str, Any], path: Path, kind: str) -> dict[str, Any]:
    """Return the settings of gated relative positions; raise HarkenError where a checkpoint has none."""
    for name in ("relative_position_embedding", "gru_rel_pos"):
        if not options.get(name, False):
            raise HarkenError(
                f"{kind}'s `{name}` must be true to be read, {path} has {options.get(name)!r}: "
                "without gated relative positions it is a plain HuBERT encoder, `--from fairseq`"
            )
    return {
        "name": "wavlm",
        "position_buckets": options.get("num_buckets", 320),
        "position_max_distance": options.get("max_distance", 1280),
    }


def _used(model: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the tables that other blocks than the first may hold: the first one's is passed to them."""
    later = re.compile(r"encoder\.layers\.(?!0\.)\d+\.self_attn\.relative_attention_bias\.weight")
    return {name: value for name, value in model.items() if not later.fullmatch(name)}


def _settings(options: Mapping[str, Any], path: Path) -> dict[str, Any]:
    positions = relative_positions(options, path, "WavLM")
    check_supported({**options, "_name": "hubert"}, path)
    # what groups the training would be in are empty: the checkpoint is silent about it
    groups = {name: options if name in ("model", "task") else {} for name in GROUPS}
    slots = hubert_config(groups, [UNITS])
    slots["encoder"].update(positions)
    return {**slots, **training_config(groups, path.name, 0)}
