"""fairseq's options as a harken configuration.

The model is described exactly; an option that harken has no counterpart for is an error that names it. The training is
described as far as the checkpoint tells, and what it is silent about has the Base model's published value (arXiv
2106.07447 section IV-C, fairseq `hubert_base_librispeech.yaml`; arXiv 2006.11477, `wav2vec2_base_librispeech.yaml`).
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harken.core.errors import HarkenError
from harken.interop.unpickle import plain

Options = Mapping[str, Any]

# fairseq options that change what the model computes, with the one value that harken's model stands for
SUPPORTED: dict[str, Any] = {
    "layer_type": "transformer",
    "activation_fn": "gelu",
    "target_glu": False,
    "conv_pos_batch_norm": False,
    "pos_enc_type": "abs",
    "attn_type": "",
}
QUANTISED = {"quantize_targets": True, "quantize_input": False, "quantizer_depth": 1}
KINDS: dict[str, dict[str, Any]] = {
    "hubert": SUPPORTED,
    "wav2vec2": {**SUPPORTED, **QUANTISED},
    "data2vec_audio": {**SUPPORTED, "ema_transformer_only": True},
}
# fairseq options that change its training alone: harken's objective has the values here
TRAINING: dict[str, Any] = {
    "mask_selection": "static",
    "mask_other": 0,
    "no_mask_overlap": False,
    "mask_channel_prob": 0,
    "negatives_from_everywhere": False,
    "cross_sample_negatives": 0,
    "codebook_negatives": 0,
    "ema_layers_only": True,
    "instance_norm_target_layer": True,
    "batch_norm_target_layer": False,
    "group_norm_target_layer": False,
    "layer_norm_target_layer": False,
    "instance_norm_targets": False,
    "layer_norm_targets": False,
}
ADAM = {"optimizer": "adam", "lr_scheduler": "polynomial_decay"}
GROUPS = ("model", "task", "criterion", "optimization", *ADAM, "dataset", "distributed_training")
# of the published training, where a checkpoint is silent: GPUs, limit on the gradient's norm, samples on each GPU
PUBLISHED = {"wav2vec2": (64, 0.0, 1_400_000), "data2vec_audio": (16, 0.0, 3_800_000)}
PUBLISHED_HUBERT = (32, 10.0, 1_400_000)
EXTRACTORS = {"default": "group", "layer_norm": "layer"}
CONVOLUTIONS = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
MOST_CONVOLUTIONS = 64


def read_options(state: Mapping[str, Any], path: Path) -> dict[str, Options]:
    """Return a checkpoint's options by group; the old flat namespace stands for each of them.

    Options without a value are left out. Raises HarkenError when the checkpoint has no options.
    """
    cfg, args = plain(state.get("cfg")), plain(state.get("args"))
    if isinstance(cfg, Mapping) and isinstance(cfg.get("model"), Mapping):
        groups = {name: cfg.get(name) for name in GROUPS}
    elif isinstance(args, Mapping):
        groups = dict.fromkeys(GROUPS, args)
    else:
        raise HarkenError(f"{path} has neither `cfg` nor `args`: it does not say which model its weights are of")
    return {name: _given(group) for name, group in groups.items()}


def kind_of(model: Options) -> str:
    """Return fairseq's name of a model."""
    return str(model.get("_name", model.get("arch", "hubert")))


def check_supported(model: Options, path: Path) -> None:
    """Raise HarkenError when the checkpoint is of another model, or computes what harken's does not."""
    kind = kind_of(model)
    if kind not in KINDS:
        known = ", ".join(f"`{name}`" for name in KINDS)
        raise HarkenError(
            f"{path} holds a fairseq `{kind}` model: harken reads pretrained {known} models, "
            "and those of them that were fine-tuned by CTC"
        )
    for name, value in KINDS[kind].items():
        default = False if name == "quantize_targets" else value  # fairseq's own default is not what harken stands for
        if model.get(name, default) != value:
            raise HarkenError(
                f"fairseq's `{name}` must be {value!r} to be read, {path} has {model.get(name, default)!r}"
            )


def not_carried_over(groups: Mapping[str, Options]) -> list[str]:
    """Return a line for each option of the training that has no counterpart."""
    model = groups["model"]
    notes = [
        f"`{name}` is {model[name]!r}, harken's {kind_of(model)} objective has {value!r}"
        for name, value in TRAINING.items()
        if model.get(name, value) != value
    ]
    for name, known in ADAM.items():
        kind = groups[name].get("_name", groups[name].get(name, known))
        if kind != known and not (name == "lr_scheduler" and tri_stage(groups)):
            notes.append(f"`{name}` is {kind!r}, the configuration has what stands for {known!r}")
    return notes


def backbone_config(groups: Mapping[str, Options]) -> dict[str, Any]:
    """Return the frontend and the encoder; the defaults are those of fairseq's `HubertConfig`."""
    model, task = groups["model"], groups["task"]
    layers = parse_convolutions(model.get("conv_feature_layers", CONVOLUTIONS))
    if len({channels for channels, _, _ in layers}) != 1:
        raise HarkenError(f"`conv_feature_layers` must have one number of channels to be read, got {layers}")
    mode = model.get("extractor_mode", "default")
    if mode not in EXTRACTORS:
        raise HarkenError(f"`extractor_mode` must be one of {', '.join(EXTRACTORS)}, got {mode!r}")
    frontend = {
        "name": "waveform",
        "sample_rate": task.get("sample_rate", 16000),
        "channels": layers[0][0],
        "kernels": [kernel for _, kernel, _ in layers],
        "strides": [stride for _, _, stride in layers],
        "norm": EXTRACTORS[mode],
        "bias": model.get("conv_bias", False),
        "norm_over_padding": True,
        "normalize": task.get("normalize", False),
        "grad_scale": model.get("feature_grad_mult", 1.0),
    }
    encoder = {
        "name": "transformer",
        "dim": model.get("encoder_embed_dim", 768),
        "layers": model.get("encoder_layers", 12),
        "heads": model.get("encoder_attention_heads", 12),
        "ffn_dim": model.get("encoder_ffn_embed_dim", 3072),
        "norm_first": model.get("layer_norm_first", False),
        "dropout": model.get("dropout", 0.1),
        "attention_dropout": model.get("attention_dropout", 0.1),
        "activation_dropout": model.get("activation_dropout", 0.0),
        "input_dropout": model.get("dropout_input", 0.0),
        "layer_drop": model.get("encoder_layerdrop", 0.0),
        "position_kernel": model.get("conv_pos", 128),
        "position_groups": model.get("conv_pos_groups", 16),
        "position_depth": model.get("pos_conv_depth", 1),
    }
    return {"frontend": frontend, "encoder": encoder}


def hubert_config(groups: Mapping[str, Options], classes: list[int]) -> dict[str, Any]:
    """Return the slots that describe a HuBERT; the defaults are those of fairseq's `HubertConfig`."""
    model, criterion = groups["model"], groups["criterion"]
    # a criterion without loss weights adds no penalty; a checkpoint without a criterion says nothing of it
    penalty = 0.0 if criterion else 10.0
    objective = {
        "name": "hubert",
        "classes": classes,
        "mask_probability": model.get("mask_prob", 0.65),
        "mask_length": model.get("mask_length", 10),
        "code_dim": _code_dim(model),
        "temperature": model.get("logit_temp", 0.1),
        "masked_weight": 0.0 if model.get("skip_masked") else criterion.get("pred_masked_weight", 1.0),
        "unmasked_weight": 0.0 if model.get("skip_nomask") else criterion.get("pred_nomask_weight", 0.0),
        "penalty_weight": _list(criterion.get("loss_weights"), [penalty])[0],
        "separate_projections": model.get("untie_final_proj", False),
    }
    return {**backbone_config(groups), "objective": objective}


def wav2vec2_config(groups: Mapping[str, Options]) -> dict[str, Any]:
    """Return the slots that describe a wav2vec 2.0; the defaults are those of fairseq's `Wav2Vec2Config`."""
    model, criterion = groups["model"], groups["criterion"]
    weights = _list(criterion.get("loss_weights"), [0.0, 0.0] if criterion else [0.1, 10.0])
    start, end, decay = _list(model.get("latent_temp"), [2.0, 0.5, 0.999995])
    objective = {
        "name": "wav2vec2",
        "mask_probability": model.get("mask_prob", 0.65),
        "mask_length": model.get("mask_length", 10),
        "negatives": model.get("num_negatives", 100),
        "groups": model.get("latent_groups", 2),
        "entries": model.get("latent_vars", 320),
        "quantizer_dim": model.get("latent_dim", 0),
        "code_dim": _code_dim(model),
        "temperature": model.get("logit_temp", 0.1),
        "gumbel_start": start,
        "gumbel_end": end,
        "gumbel_decay": decay,
        "feature_dropout": model.get("dropout_features", 0.0),
        "diversity_weight": weights[0],
        "diversity_over": "batch",
        "penalty_weight": weights[-1],
    }
    return {**backbone_config(groups), "objective": objective}


def data2vec_config(groups: Mapping[str, Options]) -> dict[str, Any]:
    """Return the slots that describe a data2vec; the defaults are those of fairseq's `Data2VecAudioConfig`."""
    model = groups["model"]
    objective = {
        "name": "data2vec",
        "mask_probability": model.get("mask_prob", 0.65),
        "mask_length": model.get("mask_length", 10),
        "top_layers": model.get("average_top_k_layers", 8),
        "targets": "feed_forward",
        "beta": model.get("loss_beta", 0.0),
        "loss_scale": model.get("loss_scale"),
        "ema_start": model.get("ema_decay", 0.999),
        "ema_end": model.get("ema_end_decay", 0.9999),
        "ema_steps": model.get("ema_anneal_end_step") or groups["optimization"].get("max_update") or 30000,
        "min_target_deviation": model.get("min_target_var", 0.1),
        "min_prediction_deviation": model.get("min_pred_var", 0.01),
    }
    return {**backbone_config(groups), "objective": objective}


def _code_dim(model: Options) -> int:
    final = model.get("final_dim", 0)
    return int(final if final > 0 else model.get("encoder_embed_dim", 768))


def training_config(groups: Mapping[str, Options], source: str, updates: int) -> dict[str, Any]:
    """Return the rest of the configuration: how the model was trained, for a run that goes on from it.

    `data.train` cannot be known and says so. Without `max_update`, or where it is 0 (no limit), the steps are the
    updates that were made, and 1 where none were.
    """
    published_gpus, published_clip, published_samples = PUBLISHED.get(kind_of(groups["model"]), PUBLISHED_HUBERT)
    task, data, run = groups["task"], groups["dataset"], groups["optimization"]
    optimizer, warmup = groups["optimizer"], groups["lr_scheduler"].get("warmup_updates", 32000)
    peak, rate = _peak(groups), task.get("sample_rate", 16000)
    batch_seconds = data.get("max_tokens", published_samples) / rate
    crop = task.get("max_sample_size")
    gpus = groups["distributed_training"].get("distributed_world_size", published_gpus)
    return {
        "optimizer": {
            "name": "adamw",
            "betas": _list(optimizer.get("adam_betas"), [0.9, 0.98]),
            "eps": optimizer.get("adam_eps", 1e-6),
            "weight_decay": optimizer.get("weight_decay", 0.01),
        },
        "schedule": tri_stage(groups) or {"name": "linear", "peak": peak, "warmup_steps": warmup},
        "data": {
            "train": f"give data.train: this model was imported from {source}",
            "sample_rate": rate,
            "min_seconds": task.get("min_sample_size", 32000) / rate,
            "max_seconds": min(30.0, batch_seconds) if crop is None else 30.0,
            "crop_seconds": None if crop is None else crop / rate,
        },
        "batch": {
            "max_seconds": batch_seconds,
            "seconds_per_step": batch_seconds * gpus * _list(run.get("update_freq"), [1])[0],
        },
        "train": {"steps": run.get("max_update") or updates or 1, "clip_norm": run.get("clip_norm", published_clip)},
    }


def tri_stage(groups: Mapping[str, Options]) -> dict[str, Any]:
    """Return fairseq's schedule of three phases, nothing where it is another or is not given in shares of the run."""
    schedule = groups["lr_scheduler"]
    shares = _list(schedule.get("phase_ratio"), [])
    if schedule.get("_name", schedule.get("lr_scheduler")) != "tri_stage" or len(shares) != 3:
        return {}
    return {
        "name": "tri_stage",
        "peak": _peak(groups),
        "warmup_share": shares[0],
        "hold_share": shares[1],
        "start_scale": schedule.get("init_lr_scale", 0.01),
        "end_scale": schedule.get("final_lr_scale", 0.01),
    }


def _peak(groups: Mapping[str, Options]) -> Any:
    return _list(groups["optimization"].get("lr"), [5e-4])[0]


def parse_convolutions(value: Any) -> list[tuple[int, int, int]]:
    """Return (channels, kernel, stride) of each layer from fairseq's `conv_feature_layers`.

    The option is a Python expression. It is parsed, never run: lists, tuples and integers with `+` and `*`.
    """
    try:
        layers = _sequence(ast.parse(value.strip(), mode="eval").body) if isinstance(value, str) else value
        triples = [(int(channels), int(kernel), int(stride)) for channels, kernel, stride in layers]
    except (SyntaxError, TypeError, ValueError, RecursionError) as error:
        raise HarkenError(
            f"`conv_feature_layers` must be a list of (channels, kernel, stride) like `{CONVOLUTIONS}`, "
            f"got `{str(value)[:100]}`: {error}"
        ) from error
    return triples


def _sequence(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            return number
        case ast.List(elts=items):
            return [_sequence(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_sequence(item) for item in items)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _sequence(left) + _sequence(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            a, b = _sequence(left), _sequence(right)
            sizes = [len(x) if isinstance(x, list | tuple) else abs(x) for x in (a, b)]
            if not (isinstance(a, int) and isinstance(b, int)) and sizes[0] * sizes[1] > MOST_CONVOLUTIONS:
                raise ValueError(f"more than {MOST_CONVOLUTIONS} layers")
            return a * b
    raise ValueError(f"`{ast.unparse(node)}` is no list, tuple, integer, sum or product")


def _given(group: Any) -> dict[str, Any]:
    """Return the options that have a value; `???` is OmegaConf's mark of a missing one."""
    options = group if isinstance(group, Mapping) else {}
    return {str(name): value for name, value in options.items() if value is not None and value != "???"}


def _list(value: Any, default: list[float]) -> list[Any]:
    """Return what fairseq keeps as a list (rates by epoch, weights by loss term), as text or as one number."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (SyntaxError, ValueError) as error:
            raise HarkenError(f"a fairseq option must be a list of numbers, got `{value[:100]}`") from error
    if isinstance(value, int | float):
        return [value]
    return list(value) if value else default
