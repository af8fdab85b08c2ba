"""k2SSL's pretraining checkpoints of icefall (HuBERT and Zipformer) as harken models, without icefall.

A checkpoint is one dict: the state dict as `model`, that of the average over the whole training as `model_avg`, and
every option of the run beside them. Outputs and losses equal the original's: group norm and the features penalty count
the padding, and the Zipformer attends to it. Source: arXiv 2411.17100; icefall `egs/librispeech/SSL`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harken.config.load import from_dict
from harken.config.registry import build
from harken.config.saved import load_into
from harken.core.errors import HarkenError
from harken.core.files import check_replaceable, sha256_file
from harken.encoders.backbone import build_backbone
from harken.interop import fairseq
from harken.interop.fairseq_options import GROUPS, check_supported, hubert_config, not_carried_over, training_config
from harken.interop.imported import Imported, classes_line, write_imported
from harken.interop.names import rename_weights
from harken.interop.unpickle import plain, read_checkpoint

_PART = r"(weight|bias)"
_BLOCK = r"encoder\.encoders\.(\d+)\.(?:encoder\.)?layers\.(\d+)\."
_NEW_BLOCK = r"backbone.encoder.stacks.\1.blocks.\2."
_STACK = r"encoder\.encoders\.(\d+)\."
_HEAD: tuple[tuple[str, str], ...] = ((rf"final_proj\.{_PART}", r"codes.maps.0.\1"),)
HUBERT: tuple[tuple[str, str], ...] = (
    *_HEAD,
    (r"encoder\.pos_conv\.0\.parametrizations\.weight\.original0", "backbone.encoder.positions.weight_g"),
    (r"encoder\.pos_conv\.0\.parametrizations\.weight\.original1", "backbone.encoder.positions.weight_v"),
    *fairseq.NAMES,
)
ZIPFORMER: tuple[tuple[str, str], ...] = (
    *_HEAD,
    (rf"{_STACK}downsample\.bias", r"backbone.encoder.stacks.\1.downsample.logits"),
    (rf"{_STACK}out_combiner\.bypass_scale", r"backbone.encoder.stacks.\1.combine.scale"),
    (rf"{_BLOCK}bypass\.bypass_scale", rf"{_NEW_BLOCK}bypass.scale"),
    (rf"{_BLOCK}bypass_mid\.bypass_scale", rf"{_NEW_BLOCK}bypass_middle.scale"),
    (rf"{_BLOCK}norm\.(log_scale|bias)", rf"{_NEW_BLOCK}norm.\3"),
    (rf"{_BLOCK}self_attn_weights\.in_proj\.{_PART}", rf"{_NEW_BLOCK}weights.project.\3"),
    (rf"{_BLOCK}self_attn_weights\.linear_pos\.weight", rf"{_NEW_BLOCK}weights.positions.weight"),
    (rf"{_BLOCK}self_attn([12])\.in_proj\.{_PART}", rf"{_NEW_BLOCK}attention\3.project.\4"),
    (rf"{_BLOCK}self_attn([12])\.out_proj\.{_PART}", rf"{_NEW_BLOCK}attention\3.out.\4"),
    (rf"{_BLOCK}nonlin_attention\.in_proj\.{_PART}", rf"{_NEW_BLOCK}nonlinear.project.\3"),
    (rf"{_BLOCK}nonlin_attention\.out_proj\.{_PART}", rf"{_NEW_BLOCK}nonlinear.out.\3"),
    (rf"{_BLOCK}feed_forward([123])\.in_proj\.{_PART}", rf"{_NEW_BLOCK}feed_forward\3.up.\4"),
    (rf"{_BLOCK}feed_forward([123])\.out_proj\.{_PART}", rf"{_NEW_BLOCK}feed_forward\3.down.\4"),
    (rf"{_BLOCK}conv_module([12])\.in_proj\.{_PART}", rf"{_NEW_BLOCK}convolution\3.gate.\4"),
    (rf"{_BLOCK}conv_module([12])\.depthwise_conv\.{_PART}", rf"{_NEW_BLOCK}convolution\3.depthwise.\4"),
    (rf"{_BLOCK}conv_module([12])\.out_proj\.{_PART}", rf"{_NEW_BLOCK}convolution\3.out.\4"),
    *(pair for pair in fairseq.NAMES if not pair[0].startswith(("encoder", "final_proj", "label_embs"))),
)
# icefall's modules make these and never use them
UNUSED = re.compile(rf"{_BLOCK}bypass_scale|encoder\.downsample_output\.bias")
NO_QUERY_KEY_VALUE = re.compile(r"(?!)")
# what a checkpoint holds besides options
STATE = frozenset({"model", "model_avg", "optimizer", "scheduler", "grad_scaler", "sampler"})
# the encoder's fields and icefall's names of them; lists are written as text
LISTS = {
    "downsampling": "downsampling_factor",
    "layers": "num_encoder_layers",
    "dims": "encoder_dim",
    "unmasked_dims": "encoder_unmasked_dim",
    "ffn_dims": "feedforward_dim",
    "heads": "num_heads",
    "kernels": "cnn_module_kernel",
    "query_dims": "query_head_dim",
    "value_dims": "value_head_dim",
    "position_head_dims": "pos_head_dim",
}


def import_checkpoint(path: str | Path, folder: str | Path) -> Imported:
    """Read a checkpoint and write it as a model folder, which `load_objective` and `load_backbone` open.

    Raises HarkenError when the folder holds something already, when the checkpoint cannot be read, when it is of
    another model, or when it has an option that harken does not support.
    """
    return import_average([path], folder)


def import_average(paths: Sequence[str | Path], folder: str | Path, *, running: bool = False) -> Imported:
    """Write the average of several checkpoints of one run as a model folder.

    running: use the averages over the training (`model_avg`) that icefall keeps: of one checkpoint as it is, of two the
    average over the steps between them. Else the mean of `model` of all. Source: icefall's `average_checkpoints` and
    `average_checkpoints_with_averaged_model`. Raises HarkenError as `import_checkpoint` does.
    """
    files, folder = [Path(path) for path in paths], Path(folder)
    check_replaceable(folder, kind="imported model")  # before the work
    imported = read_average(files, running=running)
    source = {
        "format": "icefall",
        "checkpoints": [{"name": path.name, "sha256": sha256_file(path)} for path in files],
        "running_average": running,
    }
    write_imported(folder, imported, source)
    return imported


def read_average(paths: Sequence[Path], *, running: bool = False) -> Imported:
    """Read one model from one or several checkpoints; see `import_average`."""
    if running and len(paths) > 2:
        raise HarkenError(f"a running average is of one checkpoint, or between two, got {len(paths)} files")
    states = [_read(path, running=running) for path in paths]
    newest, source = states[-1], paths[-1]
    models = [_weights(state, path, running=running) for state, path in zip(states, paths, strict=True)]
    factors = _between(states, paths) if running and len(paths) == 2 else [1.0 / len(paths)] * len(paths)
    weights = _mean(models, factors, paths)
    options = {name: value for name, value in newest.items() if name not in STATE}
    config, notes = _config(plain(options), weights, source)
    objective = build("objective", config.objective, run=config, backbone=build_backbone(config))
    load_into(objective, weights, source)
    return Imported(config, weights, (), _updates(newest), notes, classes_line(config.objective.classes))


def _read(path: Path, *, running: bool) -> Mapping[str, Any]:
    state = read_checkpoint(path)
    if not isinstance(state, Mapping) or not isinstance(state.get("model"), Mapping):
        raise HarkenError(f"{path} is no icefall checkpoint: expected a `model` in it")
    if "encoder_dim" not in state and "encoder_layers" not in state:
        raise HarkenError(
            f"{path} has neither `encoder_dim` nor `encoder_layers`: it does not say which model its weights are of. "
            "Give the checkpoint that training wrote (epoch-N.pt), not one that was exported"
        )
    if running and not isinstance(state.get("model_avg"), Mapping):
        raise HarkenError(f"{path} holds no `model_avg`: it was trained without a running average")
    return state


def _weights(state: Mapping[str, Any], path: Path, *, running: bool) -> dict[str, Tensor]:
    model = state["model_avg" if running else "model"]
    used = {name: value for name, value in model.items() if not UNUSED.fullmatch(name)}
    if "encoder_dim" in state:
        renamed = rename_weights(used, ZIPFORMER, NO_QUERY_KEY_VALUE, path)
        return {name: value.reshape(1) if value.ndim == 0 else value for name, value in renamed.items()}  # log_scale
    return rename_weights(used, HUBERT, fairseq.QUERY_KEY_VALUE, path)


def _between(states: Sequence[Mapping[str, Any]], paths: Sequence[Path]) -> list[float]:
    begin, end = (_updates(state) for state in states)
    if not 0 < begin < end:
        raise HarkenError(
            "a running average is between an earlier and a later checkpoint, both with `batch_idx_train`, "
            f"got {begin} in {paths[0]} and {end} in {paths[1]}"
        )
    return [-begin / (end - begin), end / (end - begin)]


def _mean(models: Sequence[Mapping[str, Tensor]], factors: Sequence[float], paths: Sequence[Path]) -> dict[str, Tensor]:
    first = models[0]
    for model, path in zip(models, paths, strict=True):
        if {name: value.shape for name, value in model.items()} != {name: value.shape for name, value in first.items()}:
            raise HarkenError(f"{paths[0]} and {path} hold other weights: only checkpoints of one run can be averaged")
    return {
        name: torch.stack([factor * model[name].double() for factor, model in zip(factors, models, strict=True)])
        .sum(0)
        .float()
        for name in first
    }


def _config(options: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> tuple[Any, tuple[str, ...]]:
    classes = options.get("num_classes")
    if not isinstance(classes, list) or len(classes) != 1:
        raise HarkenError(f"icefall's `num_classes` must be a list of one number to be read, {path} has {classes!r}")
    if "codes.maps.0.weight" not in weights:
        raise HarkenError(f"{path} has no `final_proj`: the head of the pretraining was removed from it")
    given = {name: value for name, value in options.items() if value is not None}
    given["normalize"] = bool(given.get("do_normalize", False))
    groups = dict.fromkeys(GROUPS, given)
    transformer = "encoder_dim" not in given
    if transformer:
        check_supported({**given, "_name": "hubert"}, path)
    slots = hubert_config(groups, classes)
    if not transformer:
        slots["encoder"] = _zipformer(given, path)
    for unused in ("code_dim", "separate_projections"):
        del slots["objective"][unused]
    slots["objective"].update(head="linear", penalty_over_padding=True)
    training = training_config(groups, path.name, _updates(given))
    seconds = float(given.get("max_duration", 87.5))
    step = seconds * int(given.get("world_size", 1)) * int(given.get("accum_grad", 1))
    training["batch"] = {"max_seconds": seconds, "seconds_per_step": step}
    training["data"].update(min_seconds=given.get("min_keep_size", 32000) / 16000, max_seconds=min(30.0, seconds))
    training["optimizer"] = {"name": "adamw", "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.01}
    training["schedule"] = {"name": "linear", "peak": 5e-4, "warmup_steps": 32000}
    notes = [
        *not_carried_over({**groups, "optimizer": {}, "lr_scheduler": {}}),
        "`optimizer` is ScaledAdam with the schedule Eden, the configuration has AdamW with HuBERT Base's rates",
    ]
    try:
        return from_dict({**slots, **training}), tuple(notes)
    except TypeError as error:
        raise HarkenError(f"{path} has an option of a wrong type: {error}") from error


def _zipformer(options: Mapping[str, Any], path: Path) -> dict[str, Any]:
    missing = [name for name in LISTS.values() if name not in options]
    if missing:
        raise HarkenError(f"{path} does not say what its Zipformer is: it has no {', '.join(missing)}")
    return {
        "name": "zipformer",
        **{field: integers(name, options[name]) for field, name in LISTS.items()},
        "position_dim": options.get("pos_dim", 48),
        "input_dropout": options.get("dropout_input", 0.0),
        "attend_to_padding": True,
    }


def integers(name: str, value: Any) -> list[int]:
    """Return the integers of an option that icefall keeps as text, such as `192,256,384`.

    Raises HarkenError that names the option where it holds something else.
    """
    try:
        return [int(item) for item in str(value).split(",")]
    except ValueError as error:
        raise HarkenError(f"icefall's `{name}` must be integers with commas between, got {value!r}") from error


def _updates(state: Mapping[str, Any]) -> int:
    updates = state.get("batch_idx_train")
    return updates if isinstance(updates, int) else 0
